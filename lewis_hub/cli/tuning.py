"""The command `tune`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lewis_hub.cli.options import (
    code_option,
    device_option,
    output_option,
    overlap_option,
    pickle_option,
    recipe_argument,
)
from lewis_hub.cli.terminal import Terminal, terminal_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lewis_hub.tune.report import Report
    from lewis_hub.tune.run import Tuned


N_SHOWN = 10  # trials in the table; --json contains all
COPY_RECIPE = (
    "The tuned recipe is written beside the recipe: copy the recipe to a folder that you can "
    "write to."
)


@click.command(
    epilog="\b\nExamples:\n  lewis-hub tune --trials 40 --budget 60\n"
    "  lewis-hub tune recipe.yaml --split validation --metric exact_match,none\n"
    "  lewis-hub tune --method task_arithmetic --method dare_ties --guide uniform"
)
@recipe_argument
@click.option(
    "--trials",
    "n_trials",
    default=30,
    type=click.IntRange(min=1),
    help="Number of trials, including those of earlier runs.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    help="Time limit in minutes; no new trial starts after it.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="lm-eval task to tune on; may be repeated. [default: the tasks of the recipe]",
)
@click.option(
    "--split", help="Split of the tasks to tune on. [default: a split that is not scored]"
)
@click.option(
    "--samples", default=200, type=click.IntRange(min=1), help="Number of items per task."
)
@click.option(
    "--metric",
    help="Metric to optimise, as metric,filter such as exact_match,none. "
    "[default: loss on the answers]",
)
@click.option(
    "--method", "methods", multiple=True, help="Also try this merge method; may be repeated."
)
@click.option(
    "--guide",
    "guides",
    multiple=True,
    help="Also try this guide, or `none`; may be repeated. [default: uniform]",
)
@output_option("Folder for the study. [default: tuning/ beside the recipe]")
@device_option
@code_option
@overlap_option
@pickle_option
@terminal_options
def tune(
    terminal: Terminal,
    recipe_file: Path,
    n_trials: int,
    budget: float | None,
    tasks: tuple[str, ...],
    split: str | None,
    samples: int,
    metric: str | None,
    methods: tuple[str, ...],
    guides: tuple[str, ...],
    output: Path | None,
    device: str,
    allow_code_execution: bool,
    allow_overlap: bool,
    allow_pickle: bool,
) -> None:
    """Search for better settings of a recipe.

    The search varies weights, densities and the options of the merge method, and measures them on
    items that the recipe does not score. It writes the best
    settings to recipe.tuned.yaml beside the recipe, and compares both on the items that the recipe
    scores. Run the same command again to continue the search.
    """
    from lewis_hub.workflow.resolve import allowing_overlap, read_recipe

    recipe = read_recipe(recipe_file)
    if allow_overlap:
        recipe = allowing_overlap(recipe)
    from lewis_hub.files import require_writable
    from lewis_hub.tune.report import write_report
    from lewis_hub.tune.run import Search, tune_recipe
    from lewis_hub.workflow.resources import Execution

    search_settings = Search(
        n_trials=n_trials,
        budget_s=None if budget is None else 60 * budget,
        tasks=tasks,
        split=split,
        samples=samples,
        metric=metric,
        methods=methods,
        guides=guides,
    )
    execution = Execution(device=device, allow_code=allow_code_execution, allow_pickle=allow_pickle)
    output = output or recipe_file.parent / "tuning"
    require_writable(recipe_file.parent, COPY_RECIPE)
    tuned = tune_recipe(recipe, search_settings, output, execution, terminal.progress)
    report = write_report(tuned, recipe_file, output)
    terminal.finish(report.document, *_shown(tuned, report, recipe_file.name, terminal.width))


def _shown(tuned: Tuned, report: Report, name: str, width: int) -> Iterator[RenderableType]:
    from lewis_hub.cli.tables import plain, scores_table, trials_tables
    from lewis_hub.tune.report import found_by, seconds

    yield from trials_tables(tuned, N_SHOWN, width)
    steps = ", ".join(f"{step} {duration:.2f} s" for step, duration in seconds(tuned).items())
    yield from plain(f"Mean time of a complete trial: {steps}.", "")
    yield from plain(*found_by(tuned, name))
    if tuned.final:
        yield scores_table(tuned.final)
    plots = f", and to {report.output}: {', '.join(report.plots)}" if report.plots else ""
    yield from plain(f"Wrote {report.recipe}{plots}")
