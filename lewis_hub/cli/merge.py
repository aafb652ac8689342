"""The commands `check` and `merge`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

import lewis_hub
from lewis_hub.cli import options
from lewis_hub.cli.jobs import merge_on_jobs
from lewis_hub.cli.mergekit_flags import MergeCommand
from lewis_hub.cli.terminal import Terminal, scores_table, terminal_options

if TYPE_CHECKING:
    from lewis_hub.hub.publish import Published
    from lewis_hub.pipeline import Merged


SECTIONS = {  # of `merge --help`: title -> names of parameters
    "Publishing": ("push", "repo", "stream", "private_key"),
    "Output": ("output", "exports", "max_shard_bytes", "replace"),
    "Scores and calibration": (
        *("no_eval", "allow_overlap"),
        *("backend", "backend_args", "num_fewshot", "batch_size", "generation"),
    ),
    "This machine": ("device", "runner", "ray_address", "max_memory_bytes"),
    "Hugging Face Jobs": ("on", "flavor", "timeout", "namespace"),
    "Permissions": ("allow_nan", "allow_pickle", "allow_code"),
}


@click.command(epilog="\b\nExample:\n  lewis-hub check recipe.yaml")
@options.recipe
@options.memory
@options.pickle
@terminal_options
def check(
    terminal: Terminal, recipe_file: Path, max_memory_bytes: int | None, allow_pickle: bool
) -> None:
    """Check a recipe before any download.

    This reads file headers and no weights. It lists every problem, and the download size, disk
    space and memory that the merge needs. The exit code is 1 if there is a problem.
    """
    recipe = options.read_recipe(recipe_file)  # before the slow imports, to report a typo at once
    report = lewis_hub.check(
        recipe,
        allow_pickle=allow_pickle,
        max_memory_bytes=max_memory_bytes,
        progress=terminal.progress,
    )
    terminal.finish(report.to_json(), report.table, "", *report.lines)
    if report.problems:
        raise click.exceptions.Exit(1)


@click.command(
    cls=MergeCommand,
    sections=SECTIONS,
    epilog="\b\nExamples:\n  lewis-hub merge\n  lewis-hub merge recipe.yaml -o out --no-eval\n"
    "  lewis-hub merge --push --repo me/my-merge\n  lewis-hub merge --stream --push --no-eval\n"
    "  lewis-hub merge --push --on jobs --flavor a100-large --timeout 2h --device cuda",
)
@options.recipe
@click.argument("folder", metavar="[OUT]", required=False, type=options.OUTPUT)
@options.output(
    "Folder for the merged model; the same as OUT. [default: merged/ beside the recipe]"
)
@options.flag(
    "--push",
    help="Publish the result in one commit. Does nothing if the repo already holds this merge.",
)
@options.flag(
    "--stream",
    help="With --push: read and upload byte ranges, and never store a whole model on this disk.",
)
@options.repo
@options.flag(
    "--no-eval", help="Do not score the merge. Calibration still avoids the items of `evaluate`."
)
@options.flag(
    "--force",
    "replace",
    help="Merge even if nothing changed, and replace an existing output folder.",
)
@options.sign
@options.runner
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="Address of the Ray cluster: auto or HOST:PORT. [default: start Ray on this machine]",
)
@options.max_shard_size
@options.repeated(
    "--export",
    "exports",
    type=options.EXPORT,
    help="Also write a GGUF file, with float16 (gguf), gguf:bf16 or gguf:q8_0; may be repeated.",
)
@options.memory
@click.option("--on", type=click.Choice(["jobs"]), help="Run the merge as a Hugging Face Job.")
@options.hardware
@options.nan
@options.overlap
@options.scoring
@options.execution
@terminal_options
def merge(
    terminal: Terminal,
    recipe_file: Path,
    folder: Path | None,
    output: Path | None,
    push: bool,
    stream: bool,
    repo: str | None,
    no_eval: bool,
    private_key: Path | None,
    on: str | None,
    flavor: str | None,
    timeout: str | None,
    namespace: str | None,
    allow_overlap: bool,
    exports: tuple[str, ...],
    running: dict[str, Any],
    **given: Unpack[options.ExecutionOptions],
) -> None:
    """Merge the models of a recipe.

    This downloads the models, calibrates, merges, scores and writes a report. With --push it also
    publishes the result. Run an interrupted command again to continue.
    """
    _require_compatible(click.get_current_context().params)
    recipe = options.read_recipe(recipe_file, repo, allow_overlap=allow_overlap)
    recipe = options.exported(options.rescored(recipe, running), exports)
    if no_eval and push and recipe.evaluate and recipe.evaluate.gate:
        message = (
            "the recipe has a quality gate, which needs scores before a push. "
            "Remove --push, or remove the gate."
        )
        raise click.BadParameter(message, param_hint="--no-eval")
    if on:
        from lewis_hub.pipeline import Hardware

        merge_on_jobs(terminal, recipe_file, recipe, Hardware(flavor, timeout, namespace))
    execution = lewis_hub.Execution(**given, held_out=recipe.evaluate if no_eval else None)
    if no_eval:
        recipe = recipe.model_copy(update={"evaluate": None})
    output = folder or output or recipe_file.parent / "merged"
    if stream:
        _merge_to_hub(terminal, recipe, output, execution)
    else:
        _merge_to_disk(terminal, recipe, output, execution, push=push, private_key=private_key)


def _merge_to_hub(
    terminal: Terminal, recipe: lewis_hub.Recipe, output: Path, execution: lewis_hub.Execution
) -> None:
    target = options.open_target(recipe)
    published = lewis_hub.stream(recipe, target, output, execution, terminal.progress)
    document = published.to_json() | {"status": _status(published), "output": None, "scores": None}
    terminal.finish(document, str(published))


def _merge_to_disk(
    terminal: Terminal,
    recipe: lewis_hub.Recipe,
    output: Path,
    execution: lewis_hub.Execution,
    *,
    push: bool,
    private_key: Path | None,
) -> None:
    from lewis_hub.workflow import verify
    from lewis_hub.workflow.publish import stays_here

    if private_key:
        verify.require_key(private_key)
    target = options.open_target(recipe) if push else None
    merged = lewis_hub.merge_models(recipe, output, execution, terminal.progress, target)
    published = merged.published
    if not published:
        if private_key:
            verify.sign(merged.output, private_key)
        if target and not (merged.gate and stays_here(merged.gate, target)):
            published = lewis_hub.publish(merged.output, target, terminal.progress)
    _finish(terminal, merged, published)


def _require_compatible(given: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other."""
    push, stream, on, sign = (given[name] for name in ("push", "stream", "on", "private_key"))
    for is_wrong, problem in (
        (
            given["folder"] and given["output"],
            "OUT and --output both name the folder for the merged model: give one.",
        ),
        (stream and not push, "--stream does not keep the merge on this disk: add --push."),
        (
            stream and given["allow_pickle"],
            "--stream cannot read pickle files: remove --allow-pickle.",
        ),
        (
            stream and sign,
            "--sign needs every file on this disk, and --stream does not keep the weights: "
            "remove one of the two.",
        ),
        (
            on and not push,
            "--on: the disk of a Job is deleted when it ends: add --push to keep the merge.",
        ),
        (
            on and (given["output"] or given["folder"]),
            "--output: the disk of a Job is deleted when it ends: remove --output.",
        ),
        (on and sign, "a Job cannot sign, because your key is not sent to it: remove --sign."),
        (
            not on and (given["flavor"] or given["timeout"] or given["namespace"]),
            "--flavor, --timeout, --namespace: these options select the machine of a Job: "
            "add --on jobs.",
        ),
    ):
        if is_wrong:
            raise click.UsageError(problem)


def _finish(terminal: Terminal, merged: Merged, published: Published | None) -> None:
    """Print the result; exit with the gate's code if it refuses the merge."""
    from lewis_hub.workflow.publish import refused

    shown = [scores_table(merged.scores)] if merged.scores else []
    address = [str(published)] if published and not merged.published else []
    terminal.finish(_document(merged, published), *shown, *merged.lines, *address)
    if merged.gate and merged.gate.missed:
        terminal.refuse(refused(merged.output, merged.gate, published.url if published else None))


def _status(published: Published) -> str:
    return "merged" if published.changed else "unchanged"


def _document(merged: Merged, published: Published | None) -> dict[str, Any]:
    scores = merged.scores.to_document()["tasks"] if merged.scores else None
    output = str(merged.output) if merged.output.exists() else None
    document = {"status": merged.status, "output": output, "scores": scores}
    if merged.gate:
        document["gate"] = json.loads(merged.gate.to_json())
    if published:
        document |= published.to_json() | {"status": _status(published)}
    if merged.gate and merged.gate.missed:
        document["status"] = "refused"
    return document
