"""The metadata of a model's card, and the licence of a merge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import is_offline_mode

from lewis_hub.errors import PublishError
from lewis_hub.hub.failures import HubRepo, hub_failures
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.retries import retry

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lewis_hub.hub.source import Source


METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ModelFacts:
    """The card's metadata as its author wrote it; None or empty if the card does not state it."""

    source: str  # as the user wrote it
    licence: str | None  # the Hub's identifier: apache-2.0, gemma, other, ...
    license_name: str | None  # the name of the licence if `licence` is `other`
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
    """Read the metadata block of the source's README.md; an invalid block counts as empty."""
    card = _metadata(read_small(api, source, "README.md") or b"")
    hub_repo = HubRepo(api, source.name, "model", source.commit_sha)
    licences = _texts(card.get("license"))
    return ModelFacts(
        source=source.name,
        licence=" or ".join(sorted(licences)).lower() or None,
        license_name=_text(card.get("license_name")),
        license_link=_text(card.get("license_link")),
        languages=_texts(card.get("language")),
        tags=_texts(card.get("tags")),
        gated=source.folder is None and _gated(hub_repo),
        url=None if source.folder else hub_repo.url,
    )


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
    """The licence of a merge: the chosen one, or that of all parents.

    Returns:
        None if no parent states a licence: the merge's card states none either.

    Raises:
        PublishError: the parents disagree, or some state none, and no licence was chosen.
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
        "Decide which licence a merge of them may have, and set `publish.license`.",
    )


def stated_licence(facts: ModelFacts) -> Licence | None:
    """The licence that a card states; None if it states none."""
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


def _gated(hub_repo: HubRepo) -> bool:
    if is_offline_mode():
        return False  # the model is in the cache, so access was granted
    with hub_failures(hub_repo):
        info = retry(lambda: hub_repo.api.model_info(hub_repo.name, timeout=30))
    return bool(info.gated)


def _texts(value: object) -> tuple[str, ...]:
    """The texts of a YAML value or list; YAML reads `no` (Norwegian) as False."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    return tuple("no" if item is False else str(item) for item in items)


def _text(value: object) -> str | None:
    return None if value is None else " ".join(str(value).split())
