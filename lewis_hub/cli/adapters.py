"""Commands about LoRA adapters: extract one from a model, merge several into one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lewis_hub
from lewis_hub.cli import options
from lewis_hub.cli.terminal import Terminal, terminal_options
from lewis_hub.display import size

if TYPE_CHECKING:
    from lewis_hub.merge.task_vectors import Extracted


@click.command(
    "extract-lora",
    epilog="\b\nExamples:\n  lewis-hub extract-lora me/code --base org/base --rank 64\n"
    "  lewis-hub extract-lora me/code --base org/base --error 0.1",
)
@click.argument("model")
@click.option("--base", required=True, help="Model that MODEL was fine-tuned from.")
@click.option(
    "--rank", type=options.COUNT, help="Maximum rank. [default: 32; no maximum with --error]"
)
@options.error
@click.option("--include", metavar="REGEX", help="Store only modules whose names contain this.")
@click.option("--exclude", metavar="REGEX", help="Leave out modules whose names contain this.")
@options.repeated("--save", help="Store this module whole, such as lm_head; may be repeated.")
@click.option(
    "--embeddings",
    type=click.Choice(["whole", "low-rank"]),
    default="whole",
    help="Store embeddings and head whole, or as low-rank updates.",
)
@options.output("Folder for the adapter.", default="adapter")
@terminal_options
def extract_lora(terminal: Terminal, model: str, base: str, output: Path, **given: Any) -> None:
    """Extract a LoRA adapter from a fine-tuned model.

    The adapter has PEFT's format. MODEL and its base are repos, repo@revision or folders.
    """
    settings = lewis_hub.LoraSettings(**given)
    adapter = lewis_hub.extract_lora(model, base, output, settings, terminal.progress)
    _finish(terminal, "extracted", adapter, output)


@click.command(
    "merge-lora",
    epilog="\b\nExamples:\n  lewis-hub merge-lora recipe.yaml\n"
    "  lewis-hub merge-lora recipe.yaml --rank 32 -o adapter",
)
@options.recipe
@click.option(
    "--rank",
    type=options.COUNT,
    help="Maximum rank. [default: the sum of the adapters' ranks; no maximum with --error]",
)
@options.error
@options.output("Folder for the adapter.", default="adapter")
@terminal_options
def merge_lora(
    terminal: Terminal, recipe_file: Path, rank: int | None, error: float, output: Path
) -> None:
    """Merge LoRA adapters into one adapter.

    The models of RECIPE are adapters of its base, whose weights are not downloaded. The result has
    PEFT's format.
    """
    recipe = options.read_recipe(recipe_file)
    adapter = lewis_hub.merge_loras(recipe, output, terminal.progress, rank=rank, error=error)
    _finish(terminal, "merged", adapter, output)


def _finish(terminal: Terminal, status: str, adapter: Extracted, output: Path) -> None:
    document: dict[str, Any] = {
        "status": status,
        "output": str(output),
        "n_bytes": adapter.n_bytes,
        "modules": {m: {"rank": f.rank, "error": f.error} for m, f in adapter.fits.items()},
        "whole": list(adapter.whole),
        "left_out": list(adapter.left_out),
    }
    terminal.finish(document, *_extraction(adapter), f"{size(adapter.n_bytes)} in {output}")


def _extraction(adapter: Extracted) -> list[str]:
    """Ranks and relative errors of an adapter, if it has modules; whole tensors."""
    ranks = [fit.rank for fit in adapter.fits.values()]
    errors = [fit.error for fit in adapter.fits.values()]
    parts = []
    if ranks:
        parts.append(
            f"{len(ranks)} modules of rank {min(ranks)} to {max(ranks)}, relative error "
            f"{sum(errors) / len(errors):.2%} on average and {max(errors):.2%} at most"
        )
    if adapter.whole:
        parts.append(f"{len(adapter.whole)} tensors stored whole")
    if adapter.left_out:
        parts.append(f"{len(adapter.left_out)} tensors that differ left out")
    return parts
