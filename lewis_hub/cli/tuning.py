"""The command that searches for better settings of a recipe."""

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


N_SHOWN = 10  # trials in the table; --json has them all
BESIDE = "The tuned recipe is written beside its recipe: copy that to a folder of yours."


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
    help="How many in all, those of earlier runs included [30].",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    help="Minutes after which no trial is begun.",
)
@click.option("--task", "tasks", multiple=True, help="lm-eval task to tune on [those evaluated].")
@click.option("--split", help="Split of its data to tune on [one it does not score].")
@click.option(
    "--samples", default=200, type=click.IntRange(min=1), help="Items of each task [200]."
)
@click.option(
    "--metric", help="metric,filter of the tasks, such as exact_match,none [loss on answers]."
)
@click.option("--method", "methods", multiple=True, help="Also try this method; repeat it.")
@click.option(
    "--guide", "guides", multiple=True, help="Also try this guide, or none [uniform]; repeat it."
)
@output_option("Folder for the study [tuning/ beside the recipe].")
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
    """Search for better settings of a recipe, on items that are not scored.

    Weights, densities and what else its method takes are tried, first as the recipe has them. The
    best become recipe.tuned.yaml beside it, scored against the recipe on the untouched items. The
    same command goes on with the study where it ended.
    """
    from lewis_hub.workflow.read import allowing_overlap, read_recipe

    recipe = read_recipe(recipe_file)
    if allow_overlap:
        recipe = allowing_overlap(recipe)
    from lewis_hub.files import require_writable
    from lewis_hub.tune.report import write_report
    from lewis_hub.tune.run import Search
    from lewis_hub.tune.run import tune as search
    from lewis_hub.workflow.execution import Execution

    asked = Search(
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
    require_writable(recipe_file.parent, BESIDE)
    tuned = search(recipe, asked, output, execution, terminal.progress)
    report = write_report(tuned, recipe_file, output)
    terminal.finish(report.document, *_shown(tuned, report, recipe_file.name, terminal.width))


def _shown(tuned: Tuned, report: Report, name: str, width: int) -> Iterator[RenderableType]:
    from lewis_hub.cli.tables import plain, scores_table, trials_tables
    from lewis_hub.tune.report import found_by, seconds

    yield from trials_tables(tuned, N_SHOWN, width)
    steps = ", ".join(f"{step} {took:.2f} s" for step, took in seconds(tuned).items())
    yield from plain(f"A trial that is scored to the end takes: {steps}.", "")
    yield from plain(*found_by(tuned, name))
    if tuned.final:
        yield scores_table(tuned.final)
    plots = f"; in {report.output}: {', '.join(report.plots)}" if report.plots else ""
    yield from plain(f"Wrote {report.recipe}{plots}")
