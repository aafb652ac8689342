"""Commands about finished models (evaluate, push, verify, diff, extract-lora), `hub` and `demo`."""

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


OWN_MODELS = """
To merge your own models, run the same three commands:
  lewis-hub init --base BASE --expert EXPERT --expert EXPERT --task ITS-TASK --task ITS-TASK
  lewis-hub check
  lewis-hub merge --push --repo YOUR-NAME/YOUR-MERGE"""


@click.command(epilog="\b\nExample:\n  lewis-hub evaluate merged --task gsm8k --limit 100")
@click.argument("model")
@click.option(
    "--task", "tasks", multiple=True, required=True, help="lm-eval task; may be repeated."
)
@click.option(
    "--include",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with your own lm-eval task files.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Score only the first N items of each task."
)
@click.option(
    "--chat-template", is_flag=True, help="Format prompts with the model's chat template."
)
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
    """Score a model on lm-eval tasks.

    MODEL is a repo, repo@revision or folder.
    """
    from lewis_hub.cli.tables import scores_table
    from lewis_hub.recipe.schema import Evaluation
    from lewis_hub.workflow.resources import Execution
    from lewis_hub.workflow.single_model import evaluate_model

    evaluation = Evaluation(
        tasks=tasks,
        include=str(include) if include else None,
        limit=limit,
        chat_template=chat_template,
        compare=(),
    )
    execution = Execution(device=device, allow_code=allow_code_execution, allow_pickle=allow_pickle)
    scores = evaluate_model(model, evaluation, execution, terminal.progress)
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
    help="Publish as a commit or as a pull request. [default: the recipe's choice, else commit]",
)
@click.option("--tag", help="Tag for the new commit.")
@click.option("--private", is_flag=True, help="Create the repo as a private one.")
@click.option(
    "--force",
    is_flag=True,
    help="Push even if the quality gate refused the merge; the commit title says so.",
)
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
    """Publish a merged model in one commit.

    FOLDER contains the model. Without REPO, the settings under `publish` in its recipe apply.
    """
    from lewis_hub import pipeline
    from lewis_hub.cli.tables import plain
    from lewis_hub.workflow import verify as signing
    from lewis_hub.workflow.evaluate import read_verdict
    from lewis_hub.workflow.publish import refused

    options = {"repo": repo, "as": landing, "tag": tag, "private": private or None}
    target = pipeline.open_target(_publishing(folder, options))
    if private_key:
        signing.sign(folder, private_key)
    published = pipeline.publish(folder, target, terminal.progress, force=force)
    verdict = read_verdict(folder)
    proposed = verdict is not None and bool(verdict.missed) and not force
    document = published.to_json() | ({"status": "refused"} if proposed else {})
    terminal.finish(document, *plain(str(published)))
    if verdict and proposed:
        refusal = refused(folder, verdict, published.url)
        click.echo(f"lewis-hub: {refusal}", err=True)
        raise click.exceptions.Exit(refusal.exit_code)


def _publishing(folder: Path, options: Mapping[str, str | bool | None]) -> Publishing:
    """Combine the recipe's `publish` and the options; a named repo replaces all of `publish`."""
    from lewis_hub.recipe.schema import Publishing
    from lewis_hub.workflow.publish import lock_in

    lock = None if options["repo"] else lock_in(folder)
    settings = (lock.recipe.get("publish") if lock else None) or {}
    settings |= {key: value for key, value in options.items() if value is not None}
    if "repo" not in settings:
        raise click.UsageError(
            f"the recipe of {folder} does not name a repo: add it as OWNER/NAME."
        )
    return Publishing.model_validate(settings)


@click.command(
    epilog="\b\nExamples:\n  lewis-hub verify merged\n  lewis-hub verify me/my-merge --rebuild\n"
    "  lewis-hub verify me/my-merge --public-key key.pub"
)
@click.argument("model")
@click.option("--rebuild", is_flag=True, help="Repeat the merge and compare the files.")
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
    """Check the files of a merge against its lock.

    MODEL is a folder or repo. Its lewis/lock.json contains the digest of every file.
    """
    from lewis_hub import pipeline
    from lewis_hub.cli.tables import verdict_lines
    from lewis_hub.workflow.resources import Execution

    verdict = pipeline.verify(
        model,
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
    """List the differences between two merges or recipes.

    BEFORE and AFTER are folders or repos of merges, or .yaml files of recipes. Compare a merge with
    a recipe to see what a new merge would change, including changed inputs.
    """
    from lewis_hub.cli.tables import plain
    from lewis_hub.workflow.single_model import diff_merges

    differences = diff_merges(before, after)
    document = {"status": "differs" if differences else "same", "differences": list(differences)}
    terminal.finish(document, *plain(*differences or ("Nothing differs.",)))


@click.command(
    "extract-lora",
    epilog="\b\nExamples:\n  lewis-hub extract-lora me/code --base org/base --rank 64\n"
    "  lewis-hub extract-lora me/code --base org/base --error 0.1",
)
@click.argument("model")
@click.option("--base", required=True, help="Model that MODEL was fine-tuned from.")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Maximum rank. [default: 32; no maximum with --error]",
)
@click.option(
    "--error",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Use the lowest rank in each module whose relative error is at most this.",
)
@output_option("Folder for the adapter.", default="adapter")
@terminal_options
def extract_lora(
    terminal: Terminal, model: str, base: str, rank: int | None, error: float, output: Path
) -> None:
    """Extract a LoRA adapter from a fine-tuned model.

    The adapter has PEFT's format. MODEL and its base are repos, repo@revision or folders.
    """
    from lewis_hub.cli.tables import extraction
    from lewis_hub.workflow import single_model

    adapter = single_model.extract_lora(
        model, base, output, terminal.progress, rank=rank, error=error
    )
    document = {
        "status": "extracted",
        "output": str(output),
        "n_bytes": adapter.n_bytes,
        "modules": {m: {"rank": f.rank, "error": f.error} for m, f in adapter.fits.items()},
        "whole": list(adapter.whole),
    }
    terminal.finish(document, *extraction(adapter, output))


@click.command(epilog="\b\nExample:\n  lewis-hub hub --root my-hub --port 5564")
@click.option(
    "--root",
    default="lewis-hub-root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with the repos.",
)
@click.option("--host", default="127.0.0.1", help="Loopback address to listen on.")
@click.option("--port", default=5564, help="Port to listen on; 0 selects a free one.")
@click.option("--jobs", is_flag=True, help="Also run Jobs, as local processes of your user.")
@terminal_options
def hub(terminal: Terminal, root: Path, host: str, port: int, jobs: bool) -> None:
    """Run a Hub on this machine.

    Use it to try out publishing. It is not a production server.
    """
    from lewis_hub.localhub.server import serve

    with serve(root, host=host, port=port, jobs=jobs) as running:
        terminal.finish(
            {"status": "serving", "url": running.url, "token": running.write_token},
            f"Serving {root} at {running.url}. Stop it with Ctrl-C. In another shell, run:\n\n"
            f"  export HF_ENDPOINT={running.url} HF_TOKEN={running.write_token} "
            "HF_HUB_DISABLE_XET=1\n",
        )
        _until_interrupted()


@click.command(epilog="\b\nExample:\n  lewis-hub demo --keep")
@output_option("Folder for the files of the demo.", default="lewis-demo")
@click.option("--port", default=0, help="Port of the embedded Hub; 0 selects a free one.")
@click.option("--keep", is_flag=True, help="Keep the Hub running, to view it in a browser.")
@terminal_options
def demo(terminal: Terminal, output: Path, port: int, keep: bool) -> None:
    """Merge, score and publish tiny models, offline.

    The demo publishes to a Hub on this machine. It needs no network, no account and no GPU.
    """
    from lewis_hub.demo.run import run_demo

    with run_demo(output.resolve(), port, quiet=terminal.quiet) as finished:
        terminal.finish(dict(finished.document), *_shown(finished))
        if keep:
            page = f"{finished.url}/{finished.document['repo']}"
            terminal.progress.say(f"The Hub runs until you press Ctrl-C. Model page: {page}")
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
    files = "\n".join(
        f"  {description:<16} {path}"
        for description, path in (
            ("merged model", merged),
            ("model card", merged / "README.md"),
            ("report", merged / "lewis" / "report.html"),
            ("plots", merged / "lewis" / "*.png"),
            ("regmean merge", by_regmean),
            ("recipes", finished.folder / "recipe*.yaml"),
        )
    )
    pushed = f"Published to {finished.document['url']} on the embedded Hub, in one commit."
    return [models_table(scores), f"\n{pushed}\n\n{files}", OWN_MODELS]


def _until_interrupted() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
