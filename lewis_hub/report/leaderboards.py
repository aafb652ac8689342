"""`.eval_results/*.yaml`: the merged model's scores, as the Hub's leaderboards read them.

The Hub takes entries for datasets that it lists as benchmarks alone, so none is written but for
those that the recipe names. One model's page shows them too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any

import yaml

from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.evaluate.scores import VERSION, Scores, TaskScores
from lewis_hub.recipe.schema import Benchmark
from lewis_hub.report import markdown
from lewis_hub.report.facts import CardFacts
from lewis_hub.report.findings import MERGED, card_section, number, scores_table
from lewis_hub.report.plots import unique_slugs

FOLDER = ".eval_results"
DIGITS = 6


def entries(
    scores: Scores, benchmarks: Mapping[str, Benchmark], facts: CardFacts
) -> dict[str, str]:
    """One file a dataset: path -> YAML; none for what was not scored or is not finite.

    Args:
        scores: of a merge that was scored on all items.
        benchmarks: task -> the benchmark that it is.
        facts: tell where the model goes, which is named as the source.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    place = markdown.web_address(f"{facts.endpoint}/{facts.repo}") if facts.repo else None
    by_dataset: dict[str, list[EvalResultEntry]] = {}
    for task, benchmark in benchmarks.items():
        scored = scores.tasks.get(task)
        score = scored.models.get(MERGED, {}).get(benchmark.metric) if scored else None
        if scored and score and isfinite(score.value):
            entry = EvalResultEntry(
                dataset_id=benchmark.dataset,
                task_id=benchmark.task_id,
                value=round(float(score.value * benchmark.scale), DIGITS),
                source_url=place,
                source_name="Model card" if place else None,
                notes=_notes(task, scored, benchmark),
            )
            by_dataset.setdefault(benchmark.dataset, []).append(entry)
    names = unique_slugs(by_dataset)
    return {
        f"{FOLDER}/{name}.yaml": str(
            yaml.safe_dump(eval_result_entries_to_yaml(found), sort_keys=False, allow_unicode=True)
        )
        for name, found in zip(names, by_dataset.values(), strict=True)
    }


def _notes(task: str, scored: TaskScores, benchmark: Benchmark) -> str:
    score = scored.models[MERGED][benchmark.metric]
    error = score.stderr
    spread = f", standard error {number(error * benchmark.scale)}" if error is not None else ""
    told = f"lm-eval {task}, version {scored.version}, {benchmark.metric}, n = {scored.n}{spread}"
    return markdown.visible(told)


TITLES = {
    "published": "Published",
    "unchanged": "Nothing changed",
    "refused": "Refused by the quality gate",
    "failed": "Failed",
}


def outcome(found: Mapping[str, Any]) -> str:
    """`published`, `unchanged`, `refused` or `failed`; a run that was cut off has failed."""
    status = found.get("status")
    if status == "merged" and found.get("commit"):  # from Hub to Hub, in one command
        return "published"
    return status if status in TITLES else "failed"


def step_summary(found: Mapping[str, Any]) -> str:
    """Status, link to the commit, error, scores and the gate's verdict, as Markdown.

    Args:
        found: the documents that the commands printed with `--json`, later ones over earlier ones.
    """
    parts = [f"## {TITLES[outcome(found)]}"]
    if why := found.get("why"):
        parts.append(markdown.text(why))
    if url := found.get("commit_url"):
        where = markdown.link(markdown.code(found.get("repo")), found.get("url"))
        commit = markdown.link(markdown.code(url.rpartition("/")[2][:12]), url)
        parts.append(f"{where} at {commit}" if found.get("url") else commit)
    if error := found.get("error"):
        parts.append(markdown.fenced(error["message"], "text"))
    if tasks := found.get("scores"):
        scores = Scores.from_json(json.dumps({"version": VERSION, "tasks": tasks}))
        parts.append(scores_table(scores))
    if gate := found.get("gate"):
        parts.append(card_section(GateVerdict.from_json(json.dumps(gate))))
    return "\n\n".join(parts) + "\n"
