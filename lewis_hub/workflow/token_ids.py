"""The ids of special tokens in the configuration of a model that gets another tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lewis_hub.errors import TokenizerError
from lewis_hub.merge.token_matches import ROLES

ID = re.compile(r"\w+_token_(?:id|index)")
OF_TEXTS = re.compile(r"\w+_to_id")  # a mapping from names to ids, such as Whisper's `lang_to_id`
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
WORDS = ("bad_words_ids", "force_words_ids")
PAIRED = {"forced_decoder_ids": 1, "sequence_bias": 0}  # which part of each pair has the ids
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
                continue
            require = partial(_required, model, donor, f"{place}: {name}", moved)
            written[name] = _moved(name, value, moved if name in SUPPRESSED else require)
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
            if name not in SPECIAL and _has_ids(name, value):
                yield name, value


def _has_ids(name: str, value: Any) -> bool:
    if ID.fullmatch(name):
        values = value if isinstance(value, list) else [value]
        return all(_is_id(one) for one in values)
    if OF_TEXTS.fullmatch(name):
        return isinstance(value, dict)
    return isinstance(value, list) and name in (*SUPPRESSED, *WORDS, *PAIRED)


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0  # -1 is no token


def _moved(name: str, value: Any, moved: Moved) -> Any:
    """Return a setting with new ids in its own structure.

    A token of `SUPPRESSED` that has no new id is left out: nothing can write it.
    """
    if isinstance(value, dict):
        return {key: _moved(name, one, moved) for key, one in value.items()}
    if isinstance(value, list) and name in PAIRED:
        return [_moved_part(one, PAIRED[name], moved) for one in value]
    if isinstance(value, list):
        found = [_moved(name, one, moved) for one in value]
        return [one for one in found if one is not None] if name in SUPPRESSED else found
    return moved(value) if _is_id(value) else value


def _moved_part(pair: Any, part: int, moved: Moved) -> Any:
    if not isinstance(pair, list):
        return pair
    return [_moved("", one, moved) if at == part else one for at, one in enumerate(pair)]


def _required(
    model: Configuration, donor: Configuration, where: str, moved: Moved, value: int
) -> int:
    found = moved(value)
    if found is None:
        problem = f"it is token {value}, which the tokenizer of {donor.label} lacks"
        remedy = "Choose a donor whose tokenizer has it."
        raise TokenizerError(f"{model.label}: {where}", problem, remedy)
    return found
