"""Metadata that the Hub reads: the card's YAML block, and `.eval_results/*.yaml` for leaderboards.

The Hub takes leaderboard entries only for datasets that it lists as benchmarks, so entries are
written only for the benchmarks that the recipe names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

import yaml

from lewis_hub.evaluate.scores import MERGED, Scores, TaskScores
from lewis_hub.recipe.schema import REPO, Benchmark
from lewis_hub.report import markdown
from lewis_hub.report.facts import CardFacts
from lewis_hub.report.findings import number
from lewis_hub.report.profiles import unique_slugs

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

FOLDER = ".eval_results"
DIGITS = 6
HUB_REPO = re.compile(rf"{REPO.pattern}|[A-Za-z0-9][\w.-]*", re.ASCII)  # gpt2 has no owner
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")


def card_data(facts: CardFacts) -> ModelCardData:
    """The YAML block: parents, licence, languages, data, tags, and the merged model's own scores.

    Values that the Hub does not accept are left out: local folders, licence links that are no web
    addresses, scores that are not finite.
    """
    from huggingface_hub import ModelCardData

    results = list(_card_results(facts))
    scored: dict[str, Any] = {"eval_results": results, "model_name": facts.title or "merge"}
    guide = [facts.guided.guide] if facts.guided else []
    return ModelCardData(
        base_model=_repos(source.name for source in facts.sources if not source.folder) or None,
        base_model_relation="merge",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "lewis-hub", *guide, facts.method.name],
        language=languages(facts) or None,
        datasets=_repos(data.name for data in facts.datasets if not data.folder) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        **_licence(facts),
        **(scored if results else {}),
    )


def languages(facts: CardFacts) -> list[str]:
    """The language codes in the parents' cards, each once."""
    stated = (facts.models[source.pinned].languages for source in facts.sources)
    unique = dict.fromkeys(language for languages in stated for language in languages)
    return [language for language in unique if LANGUAGE.fullmatch(language)]


def eval_results(
    scores: Scores, benchmarks: Mapping[str, Benchmark], facts: CardFacts
) -> dict[str, str]:
    """The leaderboard entries of the merged model, a file for each dataset: path -> YAML.

    A benchmark that was not scored, or whose score is not finite, has no entry.

    Args:
        scores: of a merge that was scored on all items.
        benchmarks: task -> its benchmark.
        facts: their repo, if there is one, is named as the source.
    """
    from huggingface_hub import eval_result_entries_to_yaml

    by_dataset: dict[str, list[EvalResultEntry]] = {}
    for task, benchmark in benchmarks.items():
        scored = scores.tasks.get(task)
        score = scored.models.get(MERGED, {}).get(benchmark.metric) if scored else None
        if scored and score and isfinite(score.value):
            entry = _entry(task, scored, benchmark, facts)
            by_dataset.setdefault(benchmark.dataset, []).append(entry)
    return {
        f"{FOLDER}/{name}.yaml": str(
            yaml.safe_dump(
                eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True
            )
        )
        for name, entries in zip(unique_slugs(by_dataset), by_dataset.values(), strict=True)
    }


def _entry(
    task: str, scored: TaskScores, benchmark: Benchmark, facts: CardFacts
) -> EvalResultEntry:
    from huggingface_hub import EvalResultEntry

    url = markdown.web_address(f"{facts.endpoint}/{facts.repo}") if facts.repo else None
    score, error = scored.models[MERGED][benchmark.metric], ""
    if score.stderr is not None:
        error = f", standard error {number(score.stderr * benchmark.scale)}"
    notes = f"lm-eval {task}, version {scored.version}, {benchmark.metric}, n = {scored.n}{error}"
    return EvalResultEntry(
        dataset_id=benchmark.dataset,
        task_id=benchmark.task_id,
        value=round(float(score.value * benchmark.scale), DIGITS),
        source_url=url,
        source_name="Model card" if url else None,
        notes=markdown.visible(notes),
    )


def _card_results(facts: CardFacts) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    for task, scored in facts.scores.tasks.items() if facts.scores else ():
        for key, score in scored.models.get(MERGED, {}).items():
            if isfinite(score.value):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=task,
                    metric_type=key.partition(",")[0],
                    metric_name=key,
                    metric_value=float(score.value),
                )


def _repos(names: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if HUB_REPO.fullmatch(name)]


def _licence(facts: CardFacts) -> dict[str, Any]:
    """An identifier of the Hub, or `other` with a name and, if there is one, a link."""
    licence = facts.licence
    if licence is None:
        return {}
    identifiers = licence.identifier.lower().split(" or ")
    if all(IDENTIFIER.fullmatch(identifier) for identifier in identifiers):
        name = licence.name
        data: dict[str, Any] = {"license": identifiers[0] if len(identifiers) == 1 else identifiers}
    else:
        data, name = {"license": "other"}, licence.name or licence.identifier
    slug = re.sub(r"[^a-z0-9.-]+", "-", (name or "").lower())[:60].strip("-.")
    if slug:
        data["license_name"] = slug
    if licence.link in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        data["license_link"] = licence.link
    elif address := markdown.web_address(licence.link):
        data["license_link"] = address
    return data
