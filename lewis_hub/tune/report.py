"""Write the result of a search: the best recipe, all trials and their plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from lewis_hub.evaluate.scores import PairedTest, Scores
from lewis_hub.files import write_whole
from lewis_hub.report.plots import PlottedTrial, SearchPlot, draw_search
from lewis_hub.tune.run import STUDY, Tuned
from lewis_hub.tune.space import short_name, written

TRIALS = "trials.json"


@dataclass(frozen=True)
class Report:
    """The files of a search: the tuned recipe, and in `output` the plots by file name."""

    recipe: Path
    output: Path
    plots: tuple[str, ...]
    document: Mapping[str, Any]


def write_report(tuned: Tuned, recipe_file: Path, output: Path) -> Report:
    """Write `recipe.tuned.yaml` beside the recipe, and all trials and their plot into `output`."""
    best = recipe_file.with_name(f"{recipe_file.stem}.tuned.yaml")
    plots = draw_search(
        SearchPlot(
            title=f"{len(tuned.trials)} trials; the best is number {tuned.best.number}",
            objective=_short(tuned.objective.metric),
            trials=tuple(
                PlottedTrial(t.number, {short_name(n): v for n, v in t.values.items()}, t.value)
                for t in tuned.trials
            ),
            best=tuned.best.number,
            lower_is_better=tuned.objective.lower_is_better,
        ),
        output,
    )
    document = _document(tuned) | {
        "recipe": str(best),
        "output": str(output),
        "study": str(output / STUDY),
        "plots": list(plots),
    }
    write_whole(output / TRIALS, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    comment = "".join(f"# {line}\n" for line in found_by(tuned, recipe_file.name))
    write_whole(best, comment + written(tuned.recipe))
    return Report(best, output, plots, document)


def found_by(tuned: Tuned, name: str) -> Iterator[str]:
    """Yield lines that describe how the best settings were found."""
    n_pruned = sum(trial.state == "pruned" for trial in tuned.trials)
    trials = _count(len(tuned.trials), "trial")
    yield f"Tuned by lewis-hub {version('lewis-hub')} from {name}: the best of {trials}"
    yield f"({n_pruned} pruned) by Optuna's TPE, seed {tuned.recipe.seed}."
    on = "; ".join(
        f"{_count(len(i.indices), 'item')} of {i.task}, split {i.split}" for i in tuned.items
    )
    yield f"Objective: {_short(tuned.objective.metric)}, mean over tasks, on {on}."
    yield "These items are neither calibrated on nor scored."
    own = f", {tuned.start.value:.4f} with the settings of {name}" if tuned.start else ""
    yield f"Result: {tuned.best.value:.4f}{own}."
    if tuned.refused:
        yield f"The settings of {name} themselves failed: {' '.join(tuned.refused.splitlines())}"
        return
    if tuned.final is None:
        yield "No other settings were better than the recipe's own."
        return
    yield f"On the items that are scored, which the search never saw, against {name}:"
    yield from final_lines(tuned.final)


def final_lines(scores: Scores) -> Iterator[str]:
    """Yield the paired test of each metric, best minus start."""
    for task, found in scores.tasks.items():
        for test in found.paired:
            yield f"  {task} {_short(test.metric)} (n = {found.n:,}): {_tested(test)}"


def _tested(test: PairedTest) -> str:
    low, high = test.ci95
    interval = f"95 % interval {low:+.4f} to {high:+.4f}"
    return f"{test.difference:+.4f}, {interval}, p = {test.p:.3g}, p (Holm) = {test.p_holm:.3g}"


def seconds(tuned: Tuned) -> dict[str, float]:
    """Return the mean seconds of each step, over trials that were scored to the end."""
    complete = [trial.seconds for trial in tuned.trials if trial.state == "complete"]
    names = dict.fromkeys(name for steps in complete for name in steps)
    return {name: round(fmean(steps.get(name, 0.0) for steps in complete), 3) for name in names}


def _document(tuned: Tuned) -> dict[str, Any]:
    return {
        "status": "tuned",
        "objective": {
            "metric": tuned.objective.metric,
            "lower_is_better": tuned.objective.lower_is_better,
            "items": [
                {"task": i.task, "split": i.split, "n": len(i.indices), "passed": i.n_calibrated}
                for i in tuned.items
            ],
        },
        "trials": [asdict(trial) for trial in tuned.trials],
        "n_begun": tuned.n_begun,
        "best": asdict(tuned.best),
        "start": asdict(tuned.start) if tuned.start else None,
        "seconds_a_trial": seconds(tuned),
        "final": tuned.final.to_document()["tasks"] if tuned.final else None,
    }


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _short(metric: str) -> str:
    return metric.removesuffix(",none").replace("_", " ")
