"""The command that compares this program with mergekit on the user's machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from lewis_hub.cli.terminal import Terminal, terminal_options

NO_MERGEKIT = (
    "No mergekit-yaml on the PATH: only lewis-hub is measured. To compare, install mergekit into "
    "an environment of its own:\n  python -m venv mergekit && mergekit/bin/pip install mergekit\n"
    "then give --mergekit mergekit/bin/mergekit-yaml"
)


@click.command(
    epilog="\b\nExamples:\n  lewis-hub bench\n"
    "  lewis-hub bench --mergekit mergekit/bin/mergekit-yaml --blocks 14"
)
@click.option(
    "--mergekit",
    type=click.Path(exists=True, dir_okay=False),
    help="Path of mergekit-yaml [the one on the PATH].",
)
@click.option(
    "--blocks",
    default=2,
    type=click.IntRange(min=1),
    help="Blocks of the models; 14 are 0.5 B [2].",
)
@click.option(
    "--hidden-size", default=1536, type=click.IntRange(min=64), help="A multiple of 64 [1536]."
)
@click.option("--runs", default=3, type=click.IntRange(min=1), help="Runs of each program [3].")
@terminal_options
def bench(
    terminal: Terminal, mergekit: str | None, blocks: int, hidden_size: int, runs: int
) -> None:
    """Compare time and memory of six merges with mergekit on this machine.

    The models have random weights and are made in the folder for temporary files (TMPDIR).
    """
    from lewis_hub.cli.tables import timings_table
    from lewis_hub.demo.bench import cases, measure_cases

    if hidden_size % 64:
        raise click.BadParameter("it is not a multiple of 64", param_hint="--hidden-size")
    mergekit = mergekit or shutil.which("mergekit-yaml")
    if mergekit is None:
        terminal.progress.say(NO_MERGEKIT)
    chosen, timings = cases(hidden_size, blocks).values(), []
    with (
        TemporaryDirectory(prefix="lewis-bench-") as folder,
        terminal.progress.stage("Benchmark", len(chosen), "items") as advance,
    ):
        for timing in measure_cases(chosen, Path(folder), mergekit, runs):
            timings.append(timing)
            advance(1)
    document = {"status": "measured", "cases": [timing.to_json() for timing in timings]}
    terminal.finish(document, timings_table(timings))
