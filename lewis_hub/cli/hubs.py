"""Commands that need nothing from outside: the embedded Hub, and the demo on it."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lewis_hub.cli.options import output_option
from lewis_hub.cli.terminal import Terminal, terminal_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lewis_hub.demo.run import Demo

OWN_MODELS = """
With your own models, the same three commands:
  lewis-hub init --base BASE --expert EXPERT --expert EXPERT --task ITS-TASK --task ITS-TASK
  lewis-hub check
  lewis-hub merge --push --repo YOUR-NAME/YOUR-MERGE"""


@click.command(epilog="\b\nExample:\n  lewis-hub hub --root my-hub --port 5564")
@click.option(
    "--root",
    default="lewis-hub-root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that holds its repos [lewis-hub-root].",
)
@click.option("--host", default="127.0.0.1", help="A loopback address [127.0.0.1].")
@click.option("--port", default=5564, help="0 takes a free one [5564].")
@click.option("--jobs", is_flag=True, help="Run the commands of Jobs, as processes of yours.")
@terminal_options
def hub(terminal: Terminal, root: Path, host: str, port: int, jobs: bool) -> None:
    """Serve a Hub of your own on this machine, to rehearse a publish. No production server."""
    from lewis_hub.hub.server import serve

    with serve(root, host=host, port=port, jobs=jobs) as running:
        terminal.finish(
            {"status": "serving", "url": running.url, "token": running.write_token},
            f"Serving {root} at {running.url} until Ctrl-C. In another shell:\n\n"
            f"  export HF_ENDPOINT={running.url} HF_TOKEN={running.write_token} "
            "HF_HUB_DISABLE_XET=1\n",
        )
        _until_interrupted()


@click.command(epilog="\b\nExample:\n  lewis-hub demo --keep")
@output_option("Folder for all that the demo makes [lewis-demo].", default="lewis-demo")
@click.option("--port", default=0, help="Of the embedded Hub; 0 takes a free one.")
@click.option("--keep", is_flag=True, help="Leave the Hub serving, to look at it in a browser.")
@terminal_options
def demo(terminal: Terminal, output: Path, port: int, keep: bool) -> None:
    """Run the whole path on a tiny zoo: needs no network, no account and no GPU."""
    from lewis_hub.demo.run import run_demo

    with run_demo(output.resolve(), port, quiet=terminal.quiet) as finished:
        terminal.finish(dict(finished.document), *_shown(finished))
        if keep:
            page = f"{finished.url}/{finished.document['repo']}"
            terminal.progress.say(f"The Hub serves until Ctrl-C; the model's page is {page}")
            _until_interrupted()


def _shown(finished: Demo) -> list[RenderableType]:
    from lewis_hub.cli.tables import models_table
    from lewis_hub.demo.run import BY_REGMEAN, MERGED
    from lewis_hub.evaluate.scores import Scores

    merged, by_regmean = finished.folder / MERGED, finished.folder / BY_REGMEAN
    scores = {
        name: Scores.from_json((folder / "lewis" / "scores.json").read_text(encoding="utf-8"))
        for name, folder in {"TIES guided by LEWIS": merged, "regmean": by_regmean}.items()
    }
    places = "\n".join(
        f"  {what:<14} {path}"
        for what, path in (
            ("merged model", merged),
            ("its card", merged / "README.md"),
            ("its report", merged / "lewis" / "report.html"),
            ("its plots", merged / "lewis" / "*.png"),
            ("by regmean", by_regmean),
            ("the recipes", finished.folder / "recipe*.yaml"),
        )
    )
    pushed = f"Published to {finished.document['url']} on the embedded Hub, in one commit."
    return [models_table(scores), f"\n{pushed}\n\n{places}", OWN_MODELS]


def _until_interrupted() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
