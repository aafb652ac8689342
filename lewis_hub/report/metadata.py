"""The YAML block of a model card, as the Hub reads it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lewis_hub.recipe import REPO
from lewis_hub.report import markdown
from lewis_hub.report.facts import CardFacts
from lewis_hub.report.findings import MERGED

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

HUB_REPO = re.compile(rf"{REPO.pattern}|[A-Za-z0-9][\w.-]*", re.ASCII)  # gpt2 has no owner
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")


def card_data(facts: CardFacts) -> ModelCardData:
    """The metadata: parents, licence, languages, data, tags, and the merged model's own scores.

    What the Hub would not accept is left out: local folders, licence links that lead nowhere,
    scores that are not finite.
    """
    from huggingface_hub import ModelCardData

    results = list(_eval_results(facts))
    scored: dict[str, Any] = {"eval_results": results, "model_name": facts.title or "merge"}
    parents = [one.name for one in facts.sources if one.folder is None]
    data = [one.name for one in facts.datasets if one.folder is None]
    guide = [facts.guided.guide] if facts.guided else []
    return ModelCardData(
        base_model=_repos(parents) or None,
        base_model_relation="merge",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "lewis-hub", *guide, facts.method.name],
        language=languages(facts) or None,
        datasets=_repos(data) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        **_licence(facts),
        **(scored if results else {}),
    )


def _repos(names: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if HUB_REPO.fullmatch(name)]


def languages(facts: CardFacts) -> list[str]:
    """What the parents' cards state, each once; what is no language code is left out."""
    told = (facts.models[one.pinned].languages for one in facts.sources)
    found = dict.fromkeys(language for languages in told for language in languages)
    return [language for language in found if LANGUAGE.fullmatch(language)]


def _licence(facts: CardFacts) -> dict[str, Any]:
    """An identifier of the Hub's, or `other` with a name and, where there is one, a link."""
    licence = facts.licence
    if licence is None:
        return {}
    identifiers = licence.identifier.lower().split(" or ")
    if all(IDENTIFIER.fullmatch(identifier) for identifier in identifiers):
        told: dict[str, Any] = {"license": identifiers[0] if len(identifiers) == 1 else identifiers}
        name = licence.name
    else:
        told, name = {"license": "other"}, licence.name or licence.identifier
    slug = re.sub(r"[^a-z0-9.-]+", "-", (name or "").lower())[:60].strip("-.")
    if slug:
        told["license_name"] = slug
    if licence.link in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        told["license_link"] = licence.link
    elif address := markdown.web_address(licence.link):
        told["license_link"] = address
    return told


def _eval_results(facts: CardFacts) -> Iterable[EvalResult]:
    from huggingface_hub import EvalResult

    for task, scored in facts.scores.tasks.items() if facts.scores else ():
        for key, score in scored.models.get(MERGED, {}).items():
            if math.isfinite(score.value):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=task,
                    metric_type=key.partition(",")[0],
                    metric_name=key,
                    metric_value=float(score.value),
                )
