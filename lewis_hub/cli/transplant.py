"""The command that gives a model the tokenizer of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Unpack

import click

import lewis_hub
from lewis_hub.cli import options
from lewis_hub.cli.terminal import Terminal, terminal_options


@click.command(
    "transplant-tokenizer",
    epilog="\b\nExamples:\n  lewis-hub transplant-tokenizer me/code org/chat -o transplanted\n"
    "  lewis-hub transplant-tokenizer me/code org/chat --method subtoken --push me/code-chat",
)
@click.argument("model")
@click.argument("donor")
@options.output("Folder for the new model.", default="transplanted")
@click.option(
    "--method",
    type=click.Choice(["omp", "subtoken", "mean"]),
    default="omp",
    help="How to make the row of a token that MODEL lacks: from the shared tokens nearest to it in "
    "DONOR (orthogonal matching pursuit), from MODEL's tokens that spell it, or as the mean.",
)
@click.option("--k", type=options.COUNT, default=64, help="Shared tokens in a combination of omp.")
@click.option("--push", "repo", type=options.REPO, help="Publish the model in this repo.")
@options.runner
@options.max_shard_size
@options.flag("--force", "replace", help="Replace an existing output folder.")
@terminal_options
def transplant_tokenizer(
    terminal: Terminal,
    model: str,
    donor: str,
    output: Path,
    method: Literal["omp", "subtoken", "mean"],
    k: int,
    repo: str | None,
    **given: Unpack[options.ExecutionOptions],
) -> None:
    """Give a model the tokenizer of another one.

    MODEL and DONOR are repos, repo@revision or folders. Rows of tokens that both have are copied,
    the others are approximated. Nothing is trained.
    """
    settings = lewis_hub.TransplantSettings(method, k)
    execution, progress = lewis_hub.Execution(**given), terminal.progress
    target = lewis_hub.open_target(lewis_hub.Publishing(repo=repo)) if repo else None
    made = lewis_hub.transplant_tokenizer(model, donor, output, settings, execution, progress)
    origins = made.origins
    document: dict[str, Any] = {
        "status": made.status,
        "output": str(output),
        "method": method,
        "tokens": origins.n_tokens,
        "copied": origins.n_copied,
        "approximated": len(origins.approximated),
        "mean": origins.n_means,
        "padding": origins.n_rows - origins.n_tokens,
        "errors": dict(made.errors),
    }
    lines = list(made.lines)
    if target:
        published = lewis_hub.publish(output, target, progress)
        document |= {**published.to_json(), "status": made.status}
        lines.append(str(published))
    terminal.finish(document, *lines)
