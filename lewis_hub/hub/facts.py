"""The metadata of a model's card, and the licence of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lewis_hub.documents import DocumentError, front_matter, read_yaml
from lewis_hub.errors import PublishError
from lewis_hub.hub.fetch import read_small

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lewis_hub.hub.source import Source

HUB = "https://huggingface.co"
LONGEST_EXAMPLE = 200
OWN = "other"  # the identifier of licences that the Hub has no identifier for


@dataclass(frozen=True)
class Licence:
    """A licence as a model card's metadata states it."""

    identifier: str  # the Hub's: apache-2.0, gemma, other, ...
    name: str | None = None  # if the identifier is `other`, as is the link
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.identifier} ({self.name})" if self.name else self.identifier


@dataclass(frozen=True)
class ModelFacts:
    """The card's metadata as its author wrote it; None or empty if the card does not state it."""

    source: str  # as the user wrote it
    licence: Licence | None
    languages: tuple[str, ...]
    url: str | None  # its page on huggingface.co, whatever mirror it is read from; None: a folder
    task: str | None = None  # `pipeline_tag`
    example: str | None = None  # the first text in `widget`


def model_facts(api: HfApi, source: Source) -> ModelFacts:
    """Read the metadata block of the source's README.md; an invalid block counts as empty."""
    card = _metadata(read_small(api, source, "README.md") or b"")
    identifier = " or ".join(sorted(_texts(card.get("license")))).lower()
    own = card if identifier == OWN else {}  # else they may contradict the identifier
    name, link = (_text(own.get(key)) for key in ("license_name", "license_link"))
    return ModelFacts(
        source=source.name,
        licence=Licence(identifier, name, link) if identifier else None,
        languages=_texts(card.get("language")),
        url=None if source.folder else f"{HUB}/{source.name}",
        task=_text(card.get("pipeline_tag")),
        example=_example(card.get("widget")),
    )


def _example(widget: object) -> str | None:
    """The first text in the examples of a card, if it is short enough for a line of code."""
    for item in _objects(widget):
        said = [message.get("content") for message in _objects(item.get("messages"))]
        texts = (item.get("text"), item.get("source_sentence"), *said[:1])
        for text in texts:
            if isinstance(text, str) and 0 < len(text) <= LONGEST_EXAMPLE and text.isprintable():
                return text
    return None


def _objects(value: object) -> list[dict[str, Any]]:
    items = value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, dict)]


def states_a_licence(readme: bytes) -> bool:
    """Whether a card's metadata names a licence."""
    return bool(_texts(_metadata(readme).get("license")))


def quantised_from(api: HfApi, source: Source) -> str | None:
    """The model that a quantised model was made from, if its card names it."""
    card = _metadata(read_small(api, source, "README.md") or b"")
    if card.get("base_model_relation") not in (None, "quantized"):
        return None
    return next(iter(_texts(card.get("base_model"))), None)


def combined_licence(facts: Sequence[ModelFacts], chosen: str | None) -> Licence | None:
    """The licence of a merge: the chosen one, or that of all parents; None if they state none.

    Raises:
        PublishError: the parents disagree, or some state none, and no licence was chosen.
    """
    stated = {parent.licence for parent in facts}
    if chosen:
        same = [licence for licence in stated if licence and licence.identifier == chosen.lower()]
        return same[0] if len(same) == 1 else Licence(chosen)
    if len(stated) <= 1:
        return next(iter(stated), None)
    parents = "; ".join(f"{parent.source}: {parent.licence or 'not stated'}" for parent in facts)
    raise PublishError(
        "publish.license",
        f"the parents' licences differ ({parents})",
        "Decide which licence a merge of them may have, and set `publish.license`.",
    )


def _metadata(readme: bytes) -> dict[str, Any]:
    text = readme.decode("utf-8", errors="replace").removeprefix("\ufeff")
    try:
        card = read_yaml(front_matter(text))
    except DocumentError:
        return {}
    return card if isinstance(card, dict) else {}


def _texts(value: object) -> tuple[str, ...]:
    """The texts of a YAML value or list; YAML reads `no` (Norwegian) as False."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    return tuple("no" if item is False else str(item) for item in items)


def _text(value: object) -> str | None:
    return None if value is None else " ".join(str(value).split())
