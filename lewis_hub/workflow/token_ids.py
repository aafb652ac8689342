"""The ids of special tokens in the configuration of a model that gets another tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lewis_hub.errors import TokenizerError
from lewis_hub.merge.token_matches import ROLES

ID = re.compile(r"\w+_token_(?:id|index)")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
OF_ROLES = tuple(f"{role}_token_id" for role in ROLES)

# values of `model_type` whose positions are counted from the id of the padding
COUNTED_FROM_PADDING = frozenset(
    {"bridgetower", "camembert", "data2vec-text", "esm", "fsmt", "ibert", "layoutlmv3", "lilt"}
    | {"longformer", "luke", "m2m_100", "markuplm", "mpnet", "nllb-moe", "roberta"}
    | {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)

Moved = Callable[[int], int | None]  # the new id of a token; None if there is none


@dataclass(frozen=True)
class Configuration:
    """What a model's files say about the ids of its tokens; empty for a missing file."""

    label: str  # the model, for messages
    config: Mapping[str, Any]  # `config.json`
    generation: Mapping[str, Any]  # `generation_config.json`

    def ids(self, name: str) -> tuple[Any, Any]:
        """An id in `config.json`, and the one that is used to generate text."""
        inner = self.config.get("text_config") or {}
        own = self.config.get(name, inner.get(name))
        return own, self.generation.get(name, own)


@dataclass(frozen=True)
class NewIds:
    """The values to write; None removes a key."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any]


def new_ids(
    model: Configuration, donor: Configuration, roles: Mapping[str, int], moved: Moved
) -> NewIds:
    """Return the donor's ids of begin, end and padding, and the new ids of all other tokens.

    `roles` are the ids of the donor's special tokens.

    Raises:
        TokenizerError: the configuration names a token that the donor lacks.
    """
    config: dict[str, Any] = {}
    generation: dict[str, Any] = {}
    for name in SPECIAL:
        own, used = donor.ids(name)
        by_role = roles.get(name.removesuffix("_token_id"))
        generation[name] = by_role if used is None else used
        config[name] = generation[name] if own is None or not model.generation else own
    for place, written in (("config.json", config), ("generation_config.json", generation)):
        document = model.config if place == "config.json" else model.generation
        for name, value in dict(_others(document)).items():
            if name in OF_ROLES:
                written[name] = roles.get(name.removesuffix("_token_id"))
            elif isinstance(value, list):
                written[name] = [_moved(model, donor, f"{place}: {name}", i, moved) for i in value]
            else:
                written[name] = _moved(model, donor, f"{place}: {name}", value, moved)
    _require_same_positions(model.label, model.config, config)
    return NewIds(config, generation)


def _require_same_positions(label: str, config: Mapping[str, Any], ids: Mapping[str, Any]) -> None:
    """Refuse `ids` with another padding for a model that counts its positions from it.

    Raises:
        TokenizerError: texts would get the embeddings of other positions.
    """
    before, after = config.get("pad_token_id"), ids.get("pad_token_id")
    is_other = None not in (before, after) and before != after
    if is_other and config.get("model_type") in COUNTED_FROM_PADDING:
        problem = f"it counts positions from the id of its padding, {before}, which would be "
        remedy = "Choose a tokenizer whose padding has the same id."
        raise TokenizerError(label, f"{problem}{after}", remedy)


def _others(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The ids beside begin, end and padding, also of the text part of a multimodal model."""
    inner = document.get("text_config")
    for part in (inner if isinstance(inner, dict) else {}, document):
        for name, value in part.items():
            values = value if isinstance(value, list) else [value]
            is_set = all(type(one) is int and one >= 0 for one in values)
            if ID.fullmatch(name) and name not in SPECIAL and is_set:
                yield name, value


def _moved(model: Configuration, donor: Configuration, where: str, value: int, moved: Moved) -> int:
    found = moved(value)
    if found is None:
        problem = f"it is token {value}, which the tokenizer of {donor.label} lacks"
        remedy = "Choose a donor whose tokenizer has it."
        raise TokenizerError(f"{model.label}: {where}", problem, remedy)
    return found
