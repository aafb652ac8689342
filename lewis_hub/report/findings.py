"""Scores and gate verdicts as tables and sentences: for the card, messages and CI summaries."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lewis_hub.evaluate.gate import Check, GateVerdict
from lewis_hub.evaluate.scores import (
    BASE,
    EXPERT,
    MERGED,
    TWINS,
    VERSION,
    MetricScore,
    Scores,
    TaskScores,
)
from lewis_hub.report import markdown
from lewis_hub.report.profiles import short_name

SIGNIFICANT = 0.05  # of the p-value after Holm's adjustment
UNIFORM = "uniform"
UNFILTERED = ("", "none")  # filters of lm-eval that a reader need not know
Z = 1.96  # standard errors to each side of a mean: 95 %
MERGED_ROW = "this merge"
NAMES = {
    UNIFORM: "uniform twin",
    "task_arithmetic": "task arithmetic twin",
    "by_magnitude": "magnitude twin",
}
MEANINGS = {
    UNIFORM: "The uniform twin is the same merge with the guide's mean density everywhere.",
    "task_arithmetic": "The task arithmetic twin is the same merge without statistics: the mean of "
    "the task vectors, with the same weights.",
    "by_magnitude": "The magnitude twin is the same merge, trimmed by magnitude alone.",
}
METRICS = {
    "acc": "accuracy",
    "acc_norm": "normalised accuracy",
    "bits_per_byte": "bits per byte",
    "em": "exact match",
    "f1": "F1",
    "mcc": "Matthews correlation",
    "prompt_level_strict_acc": "accuracy of prompts, strict",
}
TITLES = {
    "published": "Published",
    "unchanged": "Nothing changed",
    "refused": "Refused by the quality gate",
    "failed": "Failed",
}


def twins(scores: Scores) -> tuple[str, ...]:
    """A sentence for each twin that was scored beside the merge."""
    return tuple(MEANINGS[label] for label in TWINS if label in scores.labels)


def findings(scores: Scores) -> tuple[list[str], list[str]]:
    """Compare the merged model with its best expert, its twins and the base.

    A difference is significant if its adjusted p-value is below SIGNIFICANT. Without a test nothing
    is said of significance.

    Returns:
        Gains and limits, as sentences in Markdown.
    """
    gains: list[str] = []
    limits: list[str] = []
    for name, task in scores.tasks.items():
        for metric in task.models.get(MERGED, {}):
            for is_gain, sentence in _sentences(name, task, metric):
                (gains if is_gain else limits).append(sentence)
    return gains, limits


def _sentences(name: str, task: TaskScores, metric: str) -> Iterator[tuple[bool, str]]:
    """(whether it is a gain, sentence) for one metric of a task."""
    where = f"On {markdown.code(name)} ({_metric(metric)})"
    rivals = {label: scores[metric] for label, scores in task.models.items() if metric in scores}
    merged = rivals[MERGED]
    experts = [label for label in rivals if label.startswith(EXPERT)]
    if experts:
        best = max(experts, key=lambda label: rivals[label].merit)
        rival = f"its best expert, {markdown.code(model_name(best))}"
        yield from _against(where, task, metric, best, rival)
    for twin in TWINS:
        if twin in rivals:
            yield from _against(where, task, metric, twin, f"its {NAMES[twin]}")
    if BASE in rivals and merged.merit < rivals[BASE].merit:
        yield from _against(where, task, metric, BASE, "the base")


def _against(
    where: str, task: TaskScores, metric: str, label: str, rival: str
) -> Iterator[tuple[bool, str]]:
    merged, other = task.models[MERGED][metric], task.models[label][metric]
    tests = (t for t in task.paired if t.metric == metric and t.against == label)
    test = next(tests, None)
    is_better, is_equal = merged.merit > other.merit, merged.merit == other.merit
    is_noise = test is not None and test.p_holm >= SIGNIFICANT
    numbers = f"{number(merged.value)} against {number(other.value)}"
    if test:
        difference = _difference(test.difference, test.ci95)
        numbers += f" ({difference}, adjusted p {_p(test.p_holm)})"
    if label == UNIFORM and (is_equal or is_noise):
        worse = "is not significantly better than"
        yield False, f"{where} the merged model {worse} {rival}: {numbers}."
    elif not is_equal:
        word = "better" if is_better else "worse"
        noise = "; the difference is not significant" if is_noise else ""
        yield is_better, f"{where} the merged model is {word} than {rival}: {numbers}{noise}."


def _difference(value: float, ci95: tuple[float, float]) -> str:
    low, high = map(signed, ci95)
    return f"difference {signed(value)}, 95 % interval {low} to {high}"


def scores_table(scores: Scores) -> str:
    """A row for each model, the merge first; a column per task and metric, the best in bold."""
    columns = [
        (task, metric, f"{markdown.code(task)}, {markdown.text(readable_metric(metric))}")
        for task, metric, _, _ in scores.by_metric()
    ]
    rows = []
    for label in in_order(scores):
        name = f"**{MERGED_ROW}**" if label == MERGED else markdown.text(model_name(label))
        cells = [_cell(scores.tasks[task], metric, label) for task, metric, _ in columns]
        rows.append([name, *cells])
    counts = [f"{scores.tasks[task].n:,}" for task, _, _ in columns]
    rows.append(["items", *counts])
    header = ["model", *(title for _, _, title in columns)]
    return markdown.table(header, rows, right=range(1, len(header)))


def _cell(task: TaskScores, metric: str, label: str) -> str:
    score = task.models.get(label, {}).get(metric)
    if score is None:
        return "–"
    rivals = [scores[metric] for scores in task.models.values() if metric in scores]
    finite = [one.merit for one in rivals if math.isfinite(one.value)]
    is_best = len(finite) > 1 and score.merit == max(finite)
    value = f"**{number(score.value)}**" if is_best else number(score.value)
    return " ".join(filter(None, (value, uncertainty(score, task.n))))


def paired_table(scores: Scores) -> str | None:
    """The paired tests: merged minus each other model."""
    rows = [
        [
            markdown.code(name),
            _metric(test.metric),
            markdown.text(model_name(test.against)),
            signed(test.difference),
            f"{signed(test.ci95[0])} to {signed(test.ci95[1])}",
            _p(test.p).removeprefix("= "),
            _p(test.p_holm).removeprefix("= "),
        ]
        for name, task in scores.tasks.items()
        for test in task.paired
    ]
    header = ["task", "metric", "merged minus", "difference", "95 % interval", "p", "p (Holm)"]
    return markdown.table(header, rows, right=range(3, 7)) if rows else None


def model_name(label: str) -> str:
    """The name of a model for readers, from its label in the scores."""
    if label.startswith(EXPERT):
        return short_name(label.removeprefix(EXPERT))
    return NAMES.get(label, label)


def metric_name(key: str) -> str:
    """The name of a metric for readers: its filter is left out if it is `none`."""
    name, _, kind = key.partition(",")
    return name if kind in UNFILTERED else f"{name}, {kind}"


def readable_metric(key: str) -> str:
    """The name of a metric in words, with its filter if it has one."""
    name, _, kind = key.partition(",")
    words = METRICS.get(name, name.replace("_", " "))
    return words if kind in UNFILTERED else f"{words}, {kind}"


def in_order(scores: Scores) -> list[str]:
    """The labels of all models: the merge first, then its experts, the base, and its twins."""
    rank = {MERGED: 0, BASE: 2}
    return sorted(
        scores.labels, key=lambda label: 1 if label.startswith(EXPERT) else rank.get(label, 3)
    )


def interval(score: MetricScore, n: int) -> tuple[float, float] | None:
    """The 95 % interval of a score; None if it has none.

    A share of right answers has Wilson's, which is not empty at 0 of n and n of n.
    """
    if score.stderr is None or not math.isfinite(score.value):
        return None
    p, error = score.value, score.stderr
    if 0 <= p <= 1 and math.isclose(error**2 * (n - 1), p * (1 - p), abs_tol=1e-9):
        centre, total = p + Z**2 / (2 * n), 1 + Z**2 / n
        margin = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return (centre - margin) / total, (centre + margin) / total
    return p - Z * error, p + Z * error


def uncertainty(score: MetricScore, n: int) -> str:
    """The standard error, or the interval of a share of zero or one; empty if there is none."""
    if score.stderr is None:
        return ""
    known = interval(score, n)
    if score.stderr == 0 and known and known[0] < known[1]:
        return f"({number(abs(known[0]))} to {number(known[1])})"
    return f"± {number(score.stderr)}"


def number(value: float) -> str:
    """A metric's value with three decimals, or with one from 100 on."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def signed(value: float) -> str:
    """A difference with its sign; without a sign if it rounds to zero."""
    digits = number(abs(value))
    if not any(digit in digits for digit in "123456789"):
        return digits
    return f"+{digits}" if value > 0 else f"−{digits}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _metric(key: str) -> str:
    return markdown.text(readable_metric(key))


def gate_section(verdict: GateVerdict) -> str:
    """The verdict as a section of a card, in Markdown."""
    decision = "refused this merge" if verdict.missed else "accepted this merge"
    rule = "It refuses a merge if the whole interval of a difference is worse than the tolerance."
    lines = [f"- {markdown.text(sentence)}" for sentence in gate_sentences(verdict)]
    return "\n".join(["### Quality gate", "", f"The gate {decision}. {rule}", "", *lines])


def gate_sentences(verdict: GateVerdict) -> Iterator[str]:
    """A sentence of plain text for each check, the missed ones first."""
    for check in sorted(verdict.checks, key=lambda check: not check.missed):
        clause = _clause(check)
        yield f"{clause[0].upper()}{clause[1:]}."


def refusal(verdict: GateVerdict) -> str:
    """The missed checks as clauses of plain text."""
    return "; ".join(map(_clause, verdict.missed))


def _clause(check: Check) -> str:
    where = f"on {check.task} ({check.metric.removesuffix(',none')}) the merged model is"
    rival = _rival(check.against)
    if check.difference is None or check.ci95 is None or check.other is None:
        return f"{where} not compared with {rival}: {check.why}"
    word = "worse than" if check.missed else "not significantly worse than"
    numbers = f"{number(check.value)} against {number(check.other)}"
    tolerance = f", tolerance {number(check.tolerance)}" if check.tolerance else ""
    difference = _difference(check.difference, check.ci95)
    return f"{where} {word} {rival}: {numbers} ({difference}{tolerance})"


def _rival(label: str) -> str:
    repo, at, sha = label.partition("@")
    if at and not label.startswith(EXPERT):
        return f"{repo} at {sha[:8]}"
    if label in NAMES:
        return f"its {NAMES[label]}"
    return "the base" if label == BASE else model_name(label)


def outcome(document: Mapping[str, Any]) -> str:
    """`published`, `unchanged`, `refused` or `failed`; an interrupted run has failed."""
    status = document.get("status")
    if status == "merged" and document.get("commit"):  # from Hub to Hub, by one command
        return "published"
    return status if status in TITLES else "failed"


def step_summary(document: Mapping[str, Any]) -> str:
    """The summary of a CI job: status, commit, error, scores and verdict, as Markdown.

    Args:
        document: what the commands printed with `--json`, later commands over earlier ones.
    """
    parts = [f"## {TITLES[outcome(document)]}"]
    if why := document.get("why"):
        parts.append(markdown.text(why))
    if commit_url := document.get("commit_url"):
        commit = markdown.link(markdown.code(commit_url.rpartition("/")[2][:12]), commit_url)
        repo = markdown.link(markdown.code(document.get("repo")), document.get("url"))
        parts.append(f"{repo} at {commit}" if document.get("url") else commit)
    if error := document.get("error"):
        parts.append(markdown.fenced(error["message"], "text"))
    if tasks := document.get("scores"):
        scores = Scores.from_json(json.dumps({"version": VERSION, "tasks": tasks}))
        parts.append(scores_table(scores))
    if gate := document.get("gate"):
        parts.append(gate_section(GateVerdict.from_json(json.dumps(gate))))
    return "\n\n".join(parts) + "\n"
