"""Commands about finished models: score, publish, verify and compare, extract an adapter."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lewis_hub.cli.options import (
    RepoName,
    code_option,
    device_option,
    nan_option,
    output_option,
    pickle_option,
    sign_option,
)
from lewis_hub.cli.terminal import Terminal, terminal_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lewis_hub.demo.run import Demo
    from lewis_hub.recipe.schema import Publishing


RANK = 32  # of an adapter's updates, where no error is asked for


@click.command(epilog="\b\nExample:\n  lewis-hub evaluate merged --task gsm8k --limit 100")
@click.argument("model")
@click.option("--task", "tasks", multiple=True, required=True, help="lm-eval task; repeat it.")
@click.option(
    "--include",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with own lm-eval task files.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Score the first items only.")
@click.option("--chat-template", is_flag=True, help="Put prompts through the chat template.")
@device_option
@pickle_option
@code_option
@terminal_options
def evaluate(
    terminal: Terminal,
    model: str,
    tasks: tuple[str, ...],
    include: Path | None,
    limit: int | None,
    chat_template: bool,
    device: str,
    allow_pickle: bool,
    allow_code_execution: bool,
) -> None:
    """Score MODEL (a repo, repo@revision or folder) on lm-eval tasks."""
    from lewis_hub import pipeline
    from lewis_hub.cli.tables import scores_table
    from lewis_hub.recipe.schema import Evaluation, ModelReference
    from lewis_hub.workflow.execution import Execution

    evaluation = Evaluation(
        tasks=tasks,
        include=str(include) if include else None,
        limit=limit,
        chat_template=chat_template,
        compare=(),
    )
    execution = Execution(device=device, allow_code=allow_code_execution, allow_pickle=allow_pickle)
    scores = pipeline.evaluate_model(
        ModelReference.model_validate(model), evaluation, execution, terminal.progress
    )
    terminal.finish(json.loads(scores.to_json()), scores_table(scores))


@click.command(
    epilog="\b\nExamples:\n  lewis-hub push merged\n"
    "  lewis-hub push merged me/my-merge --as pull-request"
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo", type=RepoName(), required=False)
@click.option(
    "--as",
    "landing",
    type=click.Choice(["commit", "pull-request"]),
    help="How it lands [commit, or as the recipe says].",
)
@click.option("--tag", help="Tag to put on the new commit.")
@click.option("--private", is_flag=True, help="Make the repo private if it is created.")
@click.option("--force", is_flag=True, help="Push what the quality gate refused, marked as such.")
@sign_option
@terminal_options
def push(
    terminal: Terminal,
    folder: Path,
    repo: str | None,
    landing: str | None,
    tag: str | None,
    private: bool,
    force: bool,
    private_key: Path | None,
) -> None:
    """Publish the merged model in FOLDER in one commit; prints its address.

    Without REPO it goes where, and as, the recipe says that made the folder.
    """
    from lewis_hub import pipeline
    from lewis_hub.cli.tables import publication
    from lewis_hub.workflow import verify as signing
    from lewis_hub.workflow.publish import read_verdict, refused

    given = {"repo": repo, "as": landing, "tag": tag, "private": private or None}
    target = pipeline.open_target(_asked(folder, given))
    if private_key:
        signing.sign(folder, private_key)
    published = pipeline.publish(folder, target, terminal.progress, force=force)
    verdict = read_verdict(folder)
    proposed = verdict is not None and bool(verdict.missed) and not force
    document = published.to_json() | ({"status": "refused"} if proposed else {})
    terminal.finish(document, *publication(published))
    if verdict and proposed:
        refusal = refused(folder, verdict, published.url)
        click.echo(f"lewis-hub: {refusal}", err=True)
        raise click.exceptions.Exit(refusal.exit_code)


def _asked(folder: Path, given: Mapping[str, str | bool | None]) -> Publishing:
    """How a folder is published: as its recipe says unless it goes elsewhere, and as is given."""
    from lewis_hub.recipe.schema import Publishing
    from lewis_hub.workflow.publish import lock_in

    made = None if given["repo"] else lock_in(folder)
    told = (made.recipe.get("publish") if made else None) or {}
    asked = told | {key: value for key, value in given.items() if value is not None}
    if "repo" not in asked:
        raise click.UsageError(f"{folder} does not say where it goes: name the repo, owner/name.")
    return Publishing.model_validate(asked)


@click.command(
    epilog="\b\nExamples:\n  lewis-hub verify merged\n  lewis-hub verify me/my-merge --rebuild\n"
    "  lewis-hub verify me/my-merge --public-key key.pub"
)
@click.argument("model")
@click.option("--rebuild", is_flag=True, help="Make the merge again and compare the bytes.")
@click.option(
    "--public-key",
    metavar="KEY.pub",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Require a signature by this key.",
)
@device_option
@code_option
@nan_option
@pickle_option
@terminal_options
def verify(
    terminal: Terminal,
    model: str,
    rebuild: bool,
    public_key: Path | None,
    device: str,
    allow_code_execution: bool,
    allow_nan: bool,
    allow_pickle: bool,
) -> None:
    """Hold MODEL (a folder or repo that a merge made) against its lock, byte by byte."""
    from lewis_hub import pipeline
    from lewis_hub.cli.tables import verdict_lines
    from lewis_hub.recipe.schema import ModelReference
    from lewis_hub.workflow.execution import Execution

    verdict = pipeline.verify(
        ModelReference.model_validate(model),
        Execution(
            device=device,
            allow_code=allow_code_execution,
            allow_nan=allow_nan,
            allow_pickle=allow_pickle,
        ),
        terminal.progress,
        rebuild=rebuild,
        public_key=public_key,
    )
    document = {
        "status": "failed" if verdict.problems else "verified",
        "digest": verdict.lock.digest,
        "n_files": verdict.n_files,
        "rebuilt": rebuild,
        "signature": verdict.signature,
        "problems": list(verdict.problems),
    }
    terminal.finish(document, *verdict_lines(verdict, rebuilt=rebuild))
    if verdict.problems:
        raise click.exceptions.Exit(1)


@click.command(
    epilog="\b\nExamples:\n  lewis-hub diff merged me/my-merge\n"
    "  lewis-hub diff me/my-merge@v1 me/my-merge@v2\n  lewis-hub diff me/my-merge recipe.yaml"
)
@click.argument("before")
@click.argument("after")
@terminal_options
def diff(terminal: Terminal, before: str, after: str) -> None:
    """Tell what differs between two merges (folders or repos) or recipes (.yaml files).

    A recipe beside a merge stands for what it would make now: inputs that moved are told.
    """
    from lewis_hub.cli.tables import plain
    from lewis_hub.workflow.resolve import hub_api
    from lewis_hub.workflow.single_model import tell_differences

    found = tell_differences(before, after, hub_api())
    document = {"status": "differs" if found else "same", "differences": list(found)}
    terminal.finish(document, *plain(*found or ("Nothing differs.",)))


@click.command(
    "extract-lora",
    epilog="\b\nExamples:\n  lewis-hub extract-lora me/code --base org/base --rank 64\n"
    "  lewis-hub extract-lora me/code --base org/base --error 0.1",
)
@click.argument("model")
@click.option("--base", required=True, help="What MODEL was fine-tuned from.")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Highest rank [32; with --error as high as it takes].",
)
@click.option(
    "--error",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Per module the lowest rank that misses no more of its task vector than this share.",
)
@output_option("Folder to make [adapter/].", default="adapter")
@terminal_options
def extract_lora(
    terminal: Terminal, model: str, base: str, rank: int | None, error: float, output: Path
) -> None:
    """Make a LoRA adapter (PEFT's format) of how MODEL differs from its base."""
    from lewis_hub.cli.tables import extraction
    from lewis_hub.recipe.schema import ModelReference
    from lewis_hub.workflow.resolve import hub_api
    from lewis_hub.workflow.single_model import extract_adapter

    expert, start = (ModelReference.model_validate(name) for name in (model, base))
    most = rank or (None if error else RANK)
    found = extract_adapter(expert, start, most, error, output, hub_api(), terminal.progress)
    document = {
        "status": "extracted",
        "output": str(output),
        "n_bytes": found.n_bytes,
        "modules": {m: {"rank": f.rank, "error": f.error} for m, f in found.fits.items()},
        "whole": list(found.whole),
    }
    terminal.finish(document, *extraction(found, output))


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
    from lewis_hub.localhub.server import serve

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
