"""The command `tune`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

import lewis_hub
from lewis_hub.cli import options
from lewis_hub.cli.terminal import COLUMN_GAP, Terminal, scores_table, terminal_options
from lewis_hub.display import TextTable

if TYPE_CHECKING:
    from lewis_hub.tune.objective import ObjectiveName
    from lewis_hub.tune.run import Tuned


N_SHOWN = 10  # trials in the table; --json contains all
COPY_RECIPE = (
    "The tuned recipe is written beside the recipe: copy the recipe to a folder that you can "
    "write to."
)


@click.command(
    epilog="\b\nExamples:\n  lewis-hub tune --trials 40 --budget 60\n"
    "  lewis-hub tune recipe.yaml --split validation --metric exact_match,none\n"
    "  lewis-hub tune --objective drift\n"
    "  lewis-hub tune --method task_arithmetic --method dare_ties --guide uniform"
)
@options.recipe
@click.option(
    "--trials",
    "n_trials",
    default=30,
    type=options.COUNT,
    help="Number of trials, including those of earlier runs.",
)
@click.option(
    "--budget",
    type=options.FiniteRange(min=0, min_open=True),
    help="Time limit in minutes; no new trial starts after it.",
)
@click.option(
    "--objective",
    type=click.Choice(["answers", "drift"]),
    default="answers",
    help="What to improve: right answers to the tasks' items, or drift, the distance of the "
    "merge's predictions from each expert's on its own calibration texts.",
)
@options.repeated(
    "--task",
    "tasks",
    help="lm-eval task to tune on; may be repeated. [default: the tasks of the recipe]",
)
@click.option(
    "--split", help="Split of the tasks to tune on. [default: a split that is not scored]"
)
@click.option(
    "--samples",
    type=options.COUNT,
    help="Number of items per task, or of texts per expert. [default: 200 items, 64 texts]",
)
@click.option(
    "--metric",
    help="Metric to optimise, as metric,filter such as exact_match,none. "
    "[default: loss on the answers]",
)
@options.repeated("--method", "methods", help="Also try this merge method; may be repeated.")
@options.repeated(
    "--guide",
    "guides",
    help="Also try this guide, or `none`; may be repeated. [default: uniform]",
)
@options.output("Folder for the study. [default: tuning/ beside the recipe]")
@options.overlap
@options.execution
@terminal_options
def tune(
    terminal: Terminal,
    recipe_file: Path,
    n_trials: int,
    budget: float | None,
    objective: ObjectiveName,
    tasks: tuple[str, ...],
    split: str | None,
    samples: int | None,
    metric: str | None,
    methods: tuple[str, ...],
    guides: tuple[str, ...],
    output: Path | None,
    allow_overlap: bool,
    **given: Unpack[options.ExecutionOptions],
) -> None:
    """Search for better settings of a recipe.

    The search varies weights, densities and the options of the merge method, and measures them on
    items that the recipe does not score, or without items by --objective drift. It writes the best
    settings to recipe.tuned.yaml beside the recipe, and compares both on the items that the recipe
    scores, if it scores any. Run the same command again to continue the search.
    """
    recipe = options.read_recipe(recipe_file, allow_overlap=allow_overlap)
    from lewis_hub.files import require_writable
    from lewis_hub.tune.report import write_report

    search = lewis_hub.Search(
        n_trials=n_trials,
        budget_s=None if budget is None else 60 * budget,
        tasks=tasks,
        split=split,
        samples=samples,
        objective=objective,
        metric=metric,
        methods=methods,
        guides=guides,
    )
    output = output or recipe_file.parent / "tuning"
    require_writable(recipe_file.parent, COPY_RECIPE)
    execution = lewis_hub.Execution(**given)
    tuned = lewis_hub.tune_recipe(recipe, search, output, execution, terminal.progress)
    document = write_report(tuned, recipe_file, output)
    terminal.finish(document, *_shown(tuned, document, recipe_file.name, terminal.width))


def _shown(
    tuned: Tuned, document: Mapping[str, Any], name: str, width: int
) -> Iterator[TextTable | str]:
    from lewis_hub.tune.report import found_by

    yield from trials_tables(tuned, N_SHOWN, width)
    durations = document["seconds_a_trial"].items()
    steps = ", ".join(f"{step} {duration:.2f} s" for step, duration in durations)
    yield f"Mean time of a complete trial: {steps}.\n"
    yield from found_by(tuned, name)
    if tuned.final:
        yield scores_table(tuned.final)
    plots = ", ".join(document["plots"])
    yield f"Wrote {document['recipe']}" + (
        f", and to {document['output']}: {plots}" if plots else ""
    )


def trials_tables(tuned: Tuned, n_shown: int, width: int) -> Iterator[TextTable | str]:
    """The best trials, and always the recipe's own settings.

    Columns that do not fit into the width follow in further tables.
    """
    from lewis_hub.tune.space import short_name, shown_value

    lower = tuned.objective.lower_is_better
    complete = [(trial.value, trial) for trial in tuned.trials if trial.value is not None]
    ranked = [t for _, t in sorted(complete, key=lambda pair: pair[0] if lower else -pair[0])]
    shown = ranked[:n_shown]
    if tuned.start and tuned.start not in shown:
        shown.append(tuned.start)
    parts = (
        "best" if trial is tuned.best else "recipe" if trial is tuned.start else ""
        for trial in shown
    )
    keys = [["trial", *(str(trial.number) for trial in shown)], ["", *parts]]
    metric = tuned.objective.metric.removesuffix(",none")
    columns = [[_in_lines(metric), *(f"{trial.value:.4f}" for trial in shown)]]
    for name in dict.fromkeys(name for trial in shown for name in trial.values):
        values = (shown_value(trial.values.get(name)) for trial in shown)
        columns.append([_in_lines(short_name(name)), *values])
    for number, group in enumerate(_fit_columns(keys, columns, width)):
        if number:
            yield ""
        header, *rows = zip(*group, strict=True)
        yield TextTable(header, tuple(rows))


def _in_lines(head: str) -> str:
    """Break a column's head between words, because heads are wider than numbers."""
    return head.replace("_", "_\n").replace(".", ".\n").replace(",", ",\n")


def _fit_columns(
    keys: Sequence[Sequence[str]], columns: Sequence[Sequence[str]], width: int
) -> Iterator[list[Sequence[str]]]:
    """Split columns into groups that fit into `width`; every group starts with `keys`."""
    group, left = [*keys], width - sum(map(_width, keys))
    for column in columns:
        if _width(column) > left and len(group) > len(keys):
            yield group
            group, left = [*keys], width - sum(map(_width, keys))
        group.append(column)
        left -= _width(column)
    yield group


def _width(column: Sequence[str]) -> int:
    return max(len(line) for cell in column for line in cell.split("\n")) + COLUMN_GAP
