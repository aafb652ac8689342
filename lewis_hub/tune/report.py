"""Report a search: the tuned recipe, all trials, and their plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from lewis_hub.evaluate.scores import PairedTest
from lewis_hub.files import write_whole
from lewis_hub.report.plots import PlottedTrial, SearchPlot, draw_search
from lewis_hub.tune import space as search_space
from lewis_hub.tune.drift import n_predicted
from lewis_hub.tune.run import STUDY, Tuned


def write_report(tuned: Tuned, recipe_file: Path, output: Path) -> dict[str, Any]:
    """Write `recipe.tuned.yaml` beside the recipe, and all trials and their plot into `output`."""
    trials = [
        PlottedTrial(
            t.number, {search_space.short_name(n): v for n, v in t.values.items()}, t.value
        )
        for t in tuned.trials
    ]
    plots = draw_search(
        SearchPlot(
            title=f"{len(trials)} trials; the best is number {tuned.best.number}",
            objective=_short(tuned.objective.metric),
            trials=tuple(trials),
            best=tuned.best.number,
            lower_is_better=tuned.objective.lower_is_better,
        ),
        output,
    )
    best = recipe_file.with_name(f"{recipe_file.stem}.tuned.yaml")
    document = _document(tuned) | {
        "recipe": str(best),
        "output": str(output),
        "study": str(output / STUDY),
        "plots": list(plots),
    }
    text = json.dumps(document, indent=2, ensure_ascii=False)
    write_whole(output / "trials.json", text + "\n")
    comment = "".join(f"# {line}\n" for line in found_by(tuned, recipe_file.name))
    write_whole(best, comment + search_space.written(tuned.recipe))
    return document


def found_by(tuned: Tuned, name: str) -> Iterator[str]:
    """Yield lines that describe how the best settings were found."""
    n_pruned = sum(trial.state == "pruned" for trial in tuned.trials)
    trials = _count(len(tuned.trials), "trial")
    yield f"Tuned by lewis-hub {version('lewis-hub')} from {name}: the best of {trials}"
    yield f"({n_pruned} pruned) by Optuna's TPE, seed {tuned.recipe.seed}."
    yield from _measured_on(tuned)
    own = f", {tuned.start.value:.4f} with the settings of {name}" if tuned.start else ""
    yield f"Result: {tuned.best.value:.4f}{own}."
    if tuned.refused:
        yield f"The settings of {name} themselves failed: {' '.join(tuned.refused.splitlines())}"
        return
    if tuned.best is tuned.start:
        yield "No other settings were better than the recipe's own."
    if tuned.final is None and tuned.recipe.evaluate is None:
        yield "Only the drift was measured. Whether the merge answers better was not: no item was"
        yield "scored. With `evaluate` in the recipe the best settings are compared on its items."
    if tuned.final is None:
        return
    yield f"On the items that are scored, which the search never saw, against {name}:"
    for task, scored in tuned.final.tasks.items():
        for test in scored.paired:
            yield f"  {task} {_short(test.metric)} (n = {scored.n:,}): {_tested(test)}"


def _measured_on(tuned: Tuned) -> Iterator[str]:
    """Yield lines on the objective, and on the items or texts that it was measured on."""
    if not tuned.texts:
        on = "; ".join(
            f"{_count(len(i.indices), 'item')} of {i.task}, split {i.split}" for i in tuned.items
        )
        yield f"Objective: {_short(tuned.objective.metric)}, mean over tasks, on {on}."
        yield "These items are neither calibrated on nor scored."
        return
    whole, n_kept = tuned.texts[0].keeps_all, tuned.texts[0].n_kept
    kept = "" if whole else f", the {n_kept} likeliest tokens and all others as one"
    yield "Objective: drift, the KL divergence of the merge's predictions of the next token from"
    yield f"each expert's, in nats{kept}, mean over tokens, then over experts."
    for one in tuned.texts:
        of = f"{_count(len(one.tokens.ids), 'text')} of {one.calibration.data}"
        yield f"  {one.expert.name}: {of}, split {one.calibration.split}"
    yield "No merge was fitted on these texts."


def _tested(test: PairedTest) -> str:
    low, high = test.ci95
    interval = f"95 % interval {low:+.4f} to {high:+.4f}"
    return f"{test.difference:+.4f}, {interval}, p = {test.p:.3g}, p (Holm) = {test.p_holm:.3g}"


def _document(tuned: Tuned) -> dict[str, Any]:
    complete = [trial.seconds for trial in tuned.trials if trial.state == "complete"]
    steps = dict.fromkeys(step for seconds in complete for step in seconds)
    means = {step: fmean(seconds.get(step, 0.0) for seconds in complete) for step in steps}
    return {
        "status": "tuned",
        "objective": {
            "metric": tuned.objective.metric,
            "lower_is_better": tuned.objective.lower_is_better,
            "items": [
                {"task": i.task, "split": i.split, "n": len(i.indices), "passed": i.n_calibrated}
                for i in tuned.items
            ],
            "texts": [
                {
                    "expert": one.expert.pinned,
                    "data": one.calibration.data,
                    "split": one.calibration.split,
                    "n": len(one.tokens.ids),
                    "n_tokens": n_predicted(one.tokens),
                    "n_kept": None if one.keeps_all else one.n_kept,
                }
                for one in tuned.texts
            ],
        },
        "trials": [asdict(trial) for trial in tuned.trials],
        "n_begun": tuned.n_begun,
        "best": asdict(tuned.best),
        "start": asdict(tuned.start) if tuned.start else None,
        "seconds_a_trial": {step: round(mean, 3) for step, mean in means.items()},
        "final": tuned.final.to_document()["tasks"] if tuned.final else None,
    }


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _short(metric: str) -> str:
    return metric.removesuffix(",none").replace("_", " ")
