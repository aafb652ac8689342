"""What a model's card says about it, and under which licence a merge may go out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import is_offline_mode

from lewis_hub.errors import PublishError
from lewis_hub.hub.failures import Asked, hub_failures
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.retries import persist

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lewis_hub.hub.source import Source


METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ModelFacts:
    """The card's metadata as its author wrote it; None or empty where the card is silent."""

    source: str  # as the user wrote it
    licence: str | None  # the Hub's identifier: apache-2.0, gemma, other, ...
    license_name: str | None  # what `other` stands for
    license_link: str | None
    languages: tuple[str, ...]
    tags: tuple[str, ...]
    gated: bool
    url: str | None  # its page; None for a local folder


@dataclass(frozen=True)
class Licence:
    """A licence as a model card's metadata states it."""

    identifier: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.identifier} ({self.name})" if self.name else self.identifier


def model_facts(api: HfApi, source: Source) -> ModelFacts:
    """Read the metadata block of the source's README.md; a broken one counts as silent."""
    card = _metadata(read_small(api, source, "README.md") or b"")
    asked = Asked(api, source.name, "model", source.commit_sha)
    licences = _words(card.get("license"))
    return ModelFacts(
        source=source.name,
        licence=" or ".join(sorted(licences)).lower() or None,
        license_name=_word(card.get("license_name")),
        license_link=_word(card.get("license_link")),
        languages=_words(card.get("language")),
        tags=_words(card.get("tags")),
        gated=source.folder is None and _gated(asked),
        url=None if source.folder else asked.url,
    )


def states_a_licence(readme: bytes) -> bool:
    """Whether a card's metadata names any."""
    return bool(_words(_metadata(readme).get("license")))


def quantised_from(api: HfApi, source: Source) -> str | None:
    """What a quantised model was made from, where its card says it."""
    card = _metadata(read_small(api, source, "README.md") or b"")
    if card.get("base_model_relation") not in (None, "quantized"):
        return None
    return next(iter(_words(card.get("base_model"))), None)


def combined_licence(facts: Sequence[ModelFacts], chosen: str | None) -> Licence | None:
    """The licence of a merge: what was chosen, or what all parents agree on.

    Returns:
        None when no card says anything: then the merge's card says nothing either.

    Raises:
        PublishError: the parents disagree, or some are silent, and nothing was chosen.
    """
    stated = {stated_licence(parent) for parent in facts}
    if chosen:
        same = [licence for licence in stated if licence and licence.identifier == chosen.lower()]
        return same[0] if len(same) == 1 else Licence(chosen)
    if len(stated) <= 1:
        return next(iter(stated), None)
    parents = "; ".join(
        f"{parent.source}: {stated_licence(parent) or 'not stated'}" for parent in facts
    )
    raise PublishError(
        "publish.license",
        f"the parents' licences differ ({parents})",
        "Which one a merge of them may carry is yours to judge: set `publish.license`.",
    )


def stated_licence(facts: ModelFacts) -> Licence | None:
    """What a card states; None where it is silent."""
    if facts.licence is None:
        return None
    return Licence(facts.licence, facts.license_name, facts.license_link)


def _metadata(readme: bytes) -> dict[str, Any]:
    block = METADATA.match(readme.decode("utf-8", errors="replace").removeprefix("\ufeff"))
    try:
        card = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def _gated(asked: Asked) -> bool:
    if is_offline_mode():
        return False  # it is in the cache, so access was granted
    with hub_failures(asked):
        info = persist(lambda: asked.api.model_info(asked.repo, timeout=30))
    return bool(info.gated)


def _words(value: object) -> tuple[str, ...]:
    """YAML authors write one word or a list; `no` (Norwegian) arrives as False."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    return tuple("no" if item is False else str(item) for item in items)


def _word(value: object) -> str | None:
    return None if value is None else " ".join(str(value).split())
