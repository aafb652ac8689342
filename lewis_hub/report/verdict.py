"""The verdict on a scored merge: how much of its experts' skill it keeps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from lewis_hub.evaluate.scores import BASE, EXPERT, MERGED, Scores, TaskScores
from lewis_hub.report import markdown
from lewis_hub.report.findings import model_name, number, readable_metric

CLEAR = 2.0  # standard errors that an expert must be better than the base
MAX_STATED = 3  # tasks in a verdict without skills


@dataclass(frozen=True)
class Kept:
    """The share of an expert's skill that the merged model keeps.

    Skill is an expert's gain over the base. It is counted on the tasks where the expert is the best
    one and clearly better than the base; the share is the mean over these tasks.
    """

    expert: str  # label in the scores
    share: float  # 1.0: all of it
    tasks: tuple[str, ...]


def kept_skills(scores: Scores) -> list[Kept]:
    """The skills that a merge kept, an entry for each expert with a skill that was measured."""
    shares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, task in scores.tasks.items():
        for metric in task.models.get(MERGED, {}):
            if found := _share(task, metric):
                expert, share = found
                shares[expert][name].append(share)
    return [
        Kept(expert, fmean(map(fmean, shares[expert].values())), tuple(shares[expert]))
        for expert in scores.labels
        if expert in shares
    ]


def _share(task: TaskScores, metric: str) -> tuple[str, float] | None:
    """The best expert on a metric, and the share of its gain over the base that was kept."""
    known = {label: scores[metric] for label, scores in task.models.items() if metric in scores}
    experts = [label for label in known if label.startswith(EXPERT)]
    if BASE not in known or not experts:
        return None
    best, base = max(experts, key=lambda label: known[label].merit), known[BASE]
    gain = known[best].merit - base.merit
    share = (known[MERGED].merit - base.merit) / gain if gain else math.nan
    noise = math.hypot(known[best].stderr or 0.0, base.stderr or 0.0)
    return (best, share) if gain > CLEAR * noise and math.isfinite(share) else None


@dataclass(frozen=True)
class SkillVerdict:
    """The verdict on a scored merge, in Markdown."""

    sentence: str
    computed: str = ""  # how its numbers were computed; empty if they are plain scores


def verdict(scores: Scores) -> SkillVerdict:
    """The shares of skills that a merge keeps; without any, its first scores."""
    kept = kept_skills(scores)
    if not kept:
        return SkillVerdict(" ".join(_values(scores)))
    shares = _listed([f"{_percent(one.share)} of {_named(one.expert)}'s" for one in kept])
    tasks = "; ".join(
        f"{_named(one.expert)}: {_listed([markdown.code(task) for task in one.tasks])}"
        for one in kept
    )
    computed = (
        "An expert's skill is its gain over the base on the tasks where it is the best expert "
        f"({tasks}), if that gain is above two standard errors. The share that the merged model "
        "keeps is its own gain over the base, divided by the expert's, as a mean over these tasks."
    )
    measured = {one.expert for one in kept}
    experts = [label for label in scores.labels if label.startswith(EXPERT)]
    if others := [_named(label) for label in experts if label not in measured]:
        computed += f" No task measured a skill of {_listed(others)}."
    return SkillVerdict(f"It keeps {shares} skill.", computed)


def _values(scores: Scores) -> Iterator[str]:
    """A sentence for each of the first tasks: the value, and that of the best expert."""
    for name, task in list(scores.tasks.items())[:MAX_STATED]:
        for metric, score in list(task.models.get(MERGED, {}).items())[:1]:
            known = [(label, one[metric]) for label, one in task.models.items() if metric in one]
            rival = ""
            if experts := [(label, one) for label, one in known if label.startswith(EXPERT)]:
                best, value = max(experts, key=lambda pair: pair[1].merit)
                rival = f", its best expert {_named(best)} {number(value.value)}"
            where = f"{markdown.code(name)} ({markdown.text(readable_metric(metric))})"
            yield f"It scores {number(score.value)} on {where}{rival}."


def _percent(share: float) -> str:
    return f"{round(100 * share)} %" if share > 0 else "none"


def _named(label: str) -> str:
    return markdown.code(model_name(label))


def _listed(items: Sequence[str]) -> str:
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last
