"""What the scores say, as tables and in words: gains and losses alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lewis_hub.evaluate.gate import Check, GateVerdict
from lewis_hub.evaluate.scores import TWINS, MetricScore, PairedTest, Scores, TaskScores
from lewis_hub.report import markdown
from lewis_hub.report.plots import short_name

SIGNIFICANT = 0.05  # of the p-value after Holm's adjustment
MERGED, UNIFORM, BASE, EXPERT = "merged", "uniform", "base", "expert:"
NAMES = {
    UNIFORM: "uniform twin",
    "task_arithmetic": "task arithmetic twin",
    "by_magnitude": "magnitude twin",
}
TOLD = {
    UNIFORM: "The uniform twin is the same merge with the guide's mean density everywhere.",
    "task_arithmetic": "The task arithmetic twin is the same merge without statistics: the mean of "
    "the task vectors, by the same weights.",
    "by_magnitude": "The magnitude twin is the same merge trimmed by magnitude alone.",
}


@dataclass(frozen=True)
class Findings:
    """Sentences in Markdown."""

    gains: tuple[str, ...]
    limits: tuple[str, ...]


def was_scored(scores: Scores | None) -> bool:
    """Whether the merged model itself was."""
    return scores is not None and any(MERGED in task.models for task in scores.tasks.values())


def twins(scores: Scores) -> tuple[str, ...]:
    """What each twin is that was scored beside the merge, in a sentence."""
    scored = {label for task in scores.tasks.values() for label in task.models}
    return tuple(TOLD[label] for label in TWINS if label in scored)


def findings(scores: Scores) -> Findings:
    """Compare the merged model with its best expert, its uniform twin and the base, in words.

    A difference counts as beyond the noise where its adjusted p-value is below SIGNIFICANT; without
    a test nothing is said of noise.
    """
    gains: list[str] = []
    limits: list[str] = []
    for name, task in scores.tasks.items():
        for metric in task.models.get(MERGED, {}):
            for is_gain, sentence in _sentences(name, task, metric):
                (gains if is_gain else limits).append(sentence)
    return Findings(tuple(gains), tuple(limits))


def scores_table(scores: Scores) -> str:
    """A row per task and metric, a column per model, the best in bold."""
    labels = list(dict.fromkeys(label for task in scores.tasks.values() for label in task.models))
    rows = []
    for name, task in scores.tasks.items():
        for metric in dict.fromkeys(key for found in task.models.values() for key in found):
            found = {label: task.models.get(label, {}).get(metric) for label in labels}
            best = _best([score for score in found.values() if score])
            cells = [_score(found[label], best) for label in labels]
            rows.append([markdown.code(name), _metric(metric), f"{task.n:,}", *cells])
    header = ["task", "metric", "n", *(markdown.text(model_name(label)) for label in labels)]
    return markdown.table(header, rows, right=range(2, len(header)))


def paired_table(scores: Scores) -> str | None:
    """Merged minus each other model, where the items allow a paired test."""
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
    """A label of the scores as a reader knows the model."""
    if label.startswith(EXPERT):
        return short_name(label.removeprefix(EXPERT))
    return NAMES.get(label, label)


def metric_name(key: str) -> str:
    """`exact_match,strict-match` is a metric and a filter; the filter `none` says nothing."""
    name, _, kind = key.partition(",")
    return f"{name}, {kind}" if kind not in ("", "none") else name


def number(value: float) -> str:
    """A metric's value: three decimals, one where it is large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def signed(value: float) -> str:
    """A difference, with its sign; what rounds to nothing has none."""
    told = f"{abs(value):.3f}" if abs(value) < 100 else f"{abs(value):,.1f}"
    if not any(digit in told for digit in "123456789"):
        return told
    return f"+{told}" if value > 0 else f"−{told}"


def _sentences(name: str, task: TaskScores, metric: str) -> Iterator[tuple[bool, str]]:
    """(whether it is a gain, sentence) for one metric of one task."""
    merged = task.models[MERGED][metric]
    where = f"On {markdown.code(name)} ({_metric(metric)})"
    experts = {
        label: found[metric]
        for label, found in task.models.items()
        if label.startswith(EXPERT) and metric in found
    }
    if experts:
        best = max(experts, key=lambda label: experts[label].merit)
        rival = f"its best expert, {markdown.code(model_name(best))}"
        yield from _against(where, task, metric, best, rival)
    if metric in task.models.get(UNIFORM, {}):
        yield _guidance(where, task, metric)
    for twin in TWINS:
        if twin != UNIFORM and metric in task.models.get(twin, {}):
            yield from _against(where, task, metric, twin, f"its {NAMES[twin]}")
    base = task.models.get(BASE, {}).get(metric)
    if base and merged.merit < base.merit:
        yield from _against(where, task, metric, BASE, "the base")


def _against(
    where: str, task: TaskScores, metric: str, label: str, rival: str
) -> Iterator[tuple[bool, str]]:
    merged, other = task.models[MERGED][metric], task.models[label][metric]
    margin = merged.merit - other.merit
    if margin == 0:
        return
    test = _test(task, metric, label)
    word = "better" if margin > 0 else "worse"
    noise = ", which is within the noise" if test and test.p_holm >= SIGNIFICANT else ""
    numbers = f"{number(merged.value)} against {number(other.value)}"
    yield (
        margin > 0,
        f"{where} the merged model is {word} than {rival}: {numbers}{_tested(test)}{noise}.",
    )


def _guidance(where: str, task: TaskScores, metric: str) -> tuple[bool, str]:
    merged, twin = task.models[MERGED][metric], task.models[UNIFORM][metric]
    margin = merged.merit - twin.merit
    test = _test(task, metric, UNIFORM)
    numbers = f"{number(merged.value)} against {number(twin.value)}{_tested(test)}"
    if margin == 0 or (test and test.p_holm >= SIGNIFICANT):
        said = "guided is not better than its uniform twin beyond the noise"
        return False, f"{where} {said}: {numbers}."
    if margin > 0:
        return True, f"{where} guidance gained over the uniform twin: {numbers}."
    return False, f"{where} guidance lost against the uniform twin: {numbers}."


def _test(task: TaskScores, metric: str, against: str) -> PairedTest | None:
    found = (test for test in task.paired if test.metric == metric and test.against == against)
    return next(found, None)


def _tested(test: PairedTest | None) -> str:
    if test is None:
        return ""
    low, high = test.ci95
    return (
        f" (difference {signed(test.difference)}, 95 % interval {signed(low)} to {signed(high)}, "
        f"adjusted p {_p(test.p_holm)})"
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _score(score: MetricScore | None, best: float | None) -> str:
    if score is None:
        return "–"
    value = number(score.value)
    told = f"**{value}**" if score.value == best else value
    return told if score.stderr is None else f"{told} ± {number(score.stderr)}"


def _metric(key: str) -> str:
    return markdown.text(metric_name(key))


def _best(scores: list[MetricScore]) -> float | None:
    known = [score for score in scores if math.isfinite(score.value)]
    if len(known) < 2:
        return None
    return max(known, key=lambda score: score.merit).value


RIVALS = {"base": "the base"} | {label: f"its {name}" for label, name in NAMES.items()}


def card_section(verdict: GateVerdict) -> str:
    """The part of a card that tells the verdict, as Markdown."""
    told = "refused this merge" if verdict.missed else "let this merge pass"
    rule = "A difference counts where its whole interval lies beyond what is tolerated."
    lines = [f"- {markdown.text(sentence)}" for sentence in sentences(verdict)]
    return "\n".join(["### Quality gate", "", f"The gate {told}. {rule}", "", *lines])


def sentences(verdict: GateVerdict) -> Iterator[str]:
    """One a check, what was missed first; plain text."""
    for check in sorted(verdict.checks, key=lambda check: not check.missed):
        yield f"{_told(check)}."


def refusal(verdict: GateVerdict) -> str:
    """By how much and on what, without a full stop."""
    return "; ".join(map(_told, verdict.missed))


def _told(check: Check) -> str:
    where = f"on {check.task} ({check.metric.removesuffix(',none')})"
    rival = _rival(check.against)
    if check.difference is None or check.ci95 is None or check.other is None:
        return f"{where} not compared with {rival}: {check.why}"
    word = "worse than" if check.missed else "not worse than"
    low, high = check.ci95
    allowed = f", {number(check.tolerance)} is tolerated" if check.tolerance else ""
    return (
        f"{where} {word} {rival}: {number(check.value)} against {number(check.other)} (difference "
        f"{signed(check.difference)}, 95 % interval {signed(low)} to {signed(high)}{allowed})"
    )


def _rival(label: str) -> str:
    repo, at, sha = label.partition("@")
    if at and not label.startswith(EXPERT):
        return f"{repo} at {sha[:8]}"
    return RIVALS.get(label, model_name(label))
