"""Commands that run on this machine alone: `demo`, `hub` and `bench`."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from lewis_hub.cli import options
from lewis_hub.cli.terminal import Terminal, terminal_options
from lewis_hub.display import TextTable, size

if TYPE_CHECKING:
    from lewis_hub.demo.bench import Timing, Usage
    from lewis_hub.evaluate.scores import Scores
    from lewis_hub.localhub.hub import Hub


PORT = click.IntRange(0, 65535)
OWN_MODELS = """
To merge your own models, run the same three commands:
  lewis-hub init --base BASE --expert EXPERT --expert EXPERT --task ITS-TASK --task ITS-TASK
  lewis-hub check
  lewis-hub merge --push --repo YOUR-NAME/YOUR-MERGE"""
NO_MERGEKIT = (
    "No mergekit-yaml on the PATH: only lewis-hub is measured. To compare, install mergekit into "
    "an environment of its own:\n  python -m venv mergekit && mergekit/bin/pip install mergekit\n"
    "then give --mergekit mergekit/bin/mergekit-yaml"
)


@click.command(epilog="\b\nExample:\n  lewis-hub hub --root my-hub --port 5564")
@click.option(
    "--root",
    default="lewis-hub-root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with the repos.",
)
@click.option("--host", default="127.0.0.1", help="Loopback address to listen on.")
@click.option("--port", default=5564, type=PORT, help="Port to listen on; 0 selects a free one.")
@options.flag("--jobs", help="Also run Jobs, as local processes of your user.")
@options.flag("--zoo", help="Fill it with the models and data of the demo, such as zoo/base.")
@terminal_options
def hub(terminal: Terminal, root: Path, host: str, port: int, jobs: bool, zoo: bool) -> None:
    """Run a Hub on this machine.

    Use it to try out publishing. It is not a production server.
    """
    from lewis_hub.localhub.server import serve

    with serve(root, host=host, port=port, jobs=jobs) as running:
        if zoo:
            _fill(running)
        terminal.finish(
            {"status": "serving", "url": running.url, "token": running.write_token},
            f"Serving {root} at {running.url}. Stop it with Ctrl-C. In another shell, run:\n\n"
            f"  export HF_ENDPOINT={running.url} HF_TOKEN={running.write_token} "
            "HF_HUB_DISABLE_XET=1\n",
        )
        _until_interrupted()


def _fill(running: Hub) -> None:
    """Upload the zoo to a Hub; huggingface_hub reads these variables when it is imported."""
    os.environ.update(
        HF_ENDPOINT=running.url, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1"
    )
    from lewis_hub.demo.zoo import seed_hub

    seed_hub(running.api())


@click.command(epilog="\b\nExample:\n  lewis-hub demo --keep")
@options.output("Folder for the files of the demo.", default="lewis-demo")
@click.option(
    "--port", default=0, type=PORT, help="Port of the embedded Hub; 0 selects a free one."
)
@options.flag("--keep", help="Keep the Hub running, to view it in a browser.")
@terminal_options
def demo(terminal: Terminal, output: Path, port: int, keep: bool) -> None:
    """Merge, score and publish tiny models, offline.

    The demo publishes to a Hub on this machine. It needs no network, no account and no GPU.
    """
    from lewis_hub.demo.zoo import run_demo

    output = output.resolve()
    with run_demo(output, port, quiet=terminal.quiet) as (url, document):
        terminal.finish(document, *_shown(output, document["url"]))
        if keep:
            page = f"{url}/{document['repo']}"
            terminal.progress.say(f"The Hub runs until you press Ctrl-C. Model page: {page}")
            _until_interrupted()


def _shown(folder: Path, address: str) -> list[TextTable | str]:
    from lewis_hub.demo.zoo import BY_REGMEAN, MERGED
    from lewis_hub.evaluate.scores import Scores

    merged, by_regmean = folder / MERGED, folder / BY_REGMEAN
    scores = {
        name: Scores.from_json((made / "lewis" / "scores.json").read_text(encoding="utf-8"))
        for name, made in {"TIES guided by LEWIS": merged, "regmean": by_regmean}.items()
    }
    return [
        models_table(scores),
        f"\nPublished to {address} on the embedded Hub, in one commit.\n",
        f"  merged model     {merged}",
        f"  model card       {merged / 'README.md'}",
        f"  report           {merged / 'lewis' / 'report.html'}",
        f"  plots            {merged / 'lewis' / '*.png'}",
        f"  regmean merge    {by_regmean}",
        f"  recipes          {folder / 'recipe*.yaml'}",
        OWN_MODELS,
    ]


def _until_interrupted() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def models_table(merges: Mapping[str, Scores]) -> TextTable:
    """Several merges of the same experts, by name: a row per model, a column per task and metric.

    No two merges have a twin of the same kind.
    """
    from lewis_hub.evaluate.scores import MERGED, TWINS
    from lewis_hub.report.findings import metric_name, model_name

    rows: dict[str, dict[str, str]] = {}
    for title, scores in merges.items():
        for task, scored in scores.tasks.items():
            for label in sorted(scored.models, key=lambda label: label in TWINS):  # twins last
                name = title if label == MERGED else model_name(label)
                row = rows.setdefault(f"its {name}" if label in TWINS else name, {})
                for key, score in scored.models[label].items():
                    row[f"{task} ({metric_name(key)})"] = str(score)
    columns = tuple(dict.fromkeys(column for row in rows.values() for column in row))
    texts = ((name, *(row.get(column, "-") for column in columns)) for name, row in rows.items())
    return TextTable(("model", *columns), tuple(texts))


@click.command(
    epilog="\b\nExamples:\n  lewis-hub bench\n"
    "  lewis-hub bench --mergekit mergekit/bin/mergekit-yaml --blocks 14"
)
@click.option(
    "--mergekit",
    type=click.Path(exists=True, dir_okay=False),
    help="Path of mergekit-yaml. [default: the one on the PATH]",
)
@click.option("--blocks", default=2, type=options.COUNT, help="Blocks of a model; 14 are 0.5 B.")
@click.option("--hidden-size", default=1536, type=options.COUNT, help="A multiple of 64.")
@click.option("--runs", default=3, type=options.COUNT, help="Runs of each program.")
@terminal_options
def bench(
    terminal: Terminal, mergekit: str | None, blocks: int, hidden_size: int, runs: int
) -> None:
    """Compare time and memory of six merges with mergekit on this machine.

    The models have random weights and are made in the folder for temporary files (TMPDIR).
    """
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
    terminal.finish(document, _timings_table(timings))


def _timings_table(timings: Sequence[Timing]) -> TextTable:
    """A row per case; without mergekit our figures alone."""
    header = ("model", "merge", "lewis-hub", "peak", "first run", "mergekit", "peak", "ratio")
    rows = []
    for timing in timings:
        model, _, merge = timing.case.name.partition(", ")
        ratio = f"{timing.ratio:.1f} ×" if timing.ratio else "-"
        first = f"{timing.first.seconds:.2f} s"
        rows.append((model, merge, *_usage(timing.ours), first, *_usage(timing.mergekit), ratio))
    return TextTable(header, tuple(rows))


def _usage(usage: Usage | None) -> tuple[str, str]:
    return (f"{usage.seconds:.2f} s", size(usage.peak_bytes)) if usage else ("-", "-")
