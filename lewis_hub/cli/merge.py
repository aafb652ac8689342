"""The commands `check` and `merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lewis_hub.cli.jobs import merge_on_jobs
from lewis_hub.cli.options import (
    RepoName,
    code_option,
    device_option,
    hardware_options,
    memory_option,
    nan_option,
    output_option,
    overlap_option,
    parse_size,
    pickle_option,
    recipe_argument,
    sign_option,
)
from lewis_hub.cli.terminal import Terminal, terminal_options

if TYPE_CHECKING:
    from lewis_hub.hub.publish import Published
    from lewis_hub.pipeline import Merged
    from lewis_hub.recipe.schema import Recipe
    from lewis_hub.workflow.resources import Execution


@click.command(epilog="\b\nExample:\n  lewis-hub check recipe.yaml")
@recipe_argument
@memory_option
@pickle_option
@terminal_options
def check(
    terminal: Terminal, recipe_file: Path, max_memory: int | None, allow_pickle: bool
) -> None:
    """Check a recipe before any download.

    This reads file headers and no weights. It lists every problem, and the download size, disk
    space and memory that the merge needs. The exit code is 1 if there is a problem.
    """
    from lewis_hub.workflow.resolve import read_recipe

    recipe = read_recipe(recipe_file)  # before the slow imports, to report a typo at once
    from lewis_hub import pipeline
    from lewis_hub.cli.tables import check_tables

    report = pipeline.check(recipe, allow_pickle=allow_pickle, max_memory_bytes=max_memory)
    terminal.finish(report.to_json(), *check_tables(report))
    if report.problems:
        raise click.exceptions.Exit(1)


@click.command(
    epilog="\b\nExamples:\n  lewis-hub merge\n  lewis-hub merge recipe.yaml -o out --no-eval\n"
    "  lewis-hub merge --push --repo me/my-merge\n  lewis-hub merge --stream --push --no-eval\n"
    "  lewis-hub merge --push --on jobs --flavor a100-large --timeout 2h --device cuda"
)
@recipe_argument
@output_option("Folder for the merged model. [default: merged/ beside the recipe]")
@click.option(
    "--push",
    is_flag=True,
    help="Publish the result in one commit. Does nothing if the repo already holds this merge.",
)
@click.option(
    "--stream",
    is_flag=True,
    help="With --push: read and upload byte ranges, and never store a whole model on this disk.",
)
@click.option(
    "--repo", type=RepoName(), help="Repo to publish to, instead of the recipe's `publish.repo`."
)
@click.option(
    "--no-eval",
    is_flag=True,
    help="Do not score the merge. Calibration still avoids the items of `evaluate`.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Merge even if nothing changed, and replace an existing output folder.",
)
@sign_option
@click.option(
    "--runner",
    default="threads",
    help="How to run the merge: inline, threads, threads:N or ray.",
)
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="Address of the Ray cluster: auto or HOST:PORT. [default: start Ray on this machine]",
)
@device_option
@click.option("--max-shard-size", default="5GB", help="Maximum size of an output file.")
@memory_option
@click.option("--on", type=click.Choice(["jobs"]), help="Run the merge as a Hugging Face Job.")
@hardware_options
@code_option
@nan_option
@overlap_option
@pickle_option
@terminal_options
def merge(
    terminal: Terminal,
    recipe_file: Path,
    output: Path | None,
    push: bool,
    stream: bool,
    repo: str | None,
    no_eval: bool,
    force: bool,
    private_key: Path | None,
    runner: str,
    ray_address: str | None,
    device: str,
    max_shard_size: str,
    max_memory: int | None,
    on: str | None,
    flavor: str | None,
    timeout: str | None,
    namespace: str | None,
    allow_code_execution: bool,
    allow_nan: bool,
    allow_overlap: bool,
    allow_pickle: bool,
) -> None:
    """Merge the models of a recipe.

    This downloads the models, calibrates, merges, scores and writes a report. With --push it also
    publishes the result. Run an interrupted command again to continue.
    """
    signs = private_key is not None
    if stream:
        _require_streamable(push=push, allow_pickle=allow_pickle, sign=signs)
    recipe = _recipe(recipe_file, repo, allow_overlap=allow_overlap)
    if no_eval:
        _require_no_gate(recipe, push=push)
    if on:
        from lewis_hub.pipeline import Hardware

        _require_for_a_job(push=push, output=output, sign=signs)
        merge_on_jobs(terminal, recipe_file, recipe, Hardware(flavor, timeout, namespace))
    if flavor or timeout or namespace:
        message = "these options select the machine of a Job: add --on jobs."
        raise click.BadParameter(message, param_hint="--flavor, --timeout, --namespace")
    from lewis_hub.workflow.resources import Execution

    execution = Execution(
        runner=runner,
        ray_address=ray_address,
        device=device,
        max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
        max_memory_bytes=max_memory,
        replace=force,
        allow_code=allow_code_execution,
        allow_nan=allow_nan,
        allow_pickle=allow_pickle,
        held_out=recipe.evaluate if no_eval else None,
    )
    if no_eval:
        recipe = recipe.model_copy(update={"evaluate": None})
    output = output or recipe_file.parent / "merged"
    if stream:
        _merge_to_hub(terminal, recipe, output, execution)
    else:
        _merge_to_disk(terminal, recipe, output, execution, push=push, private_key=private_key)


def _merge_to_hub(terminal: Terminal, recipe: Recipe, output: Path, execution: Execution) -> None:
    from lewis_hub import pipeline
    from lewis_hub.cli.tables import plain
    from lewis_hub.workflow.resolve import destination

    target = pipeline.open_target(destination(recipe))
    published = pipeline.stream(recipe, target, output, execution, terminal.progress)
    terminal.finish(_streamed(published), *plain(str(published)))


def _merge_to_disk(
    terminal: Terminal,
    recipe: Recipe,
    output: Path,
    execution: Execution,
    *,
    push: bool,
    private_key: Path | None,
) -> None:
    from lewis_hub import pipeline
    from lewis_hub.workflow import verify
    from lewis_hub.workflow.resolve import destination

    if private_key:
        verify.require_key(private_key)
    target = pipeline.open_target(destination(recipe)) if push else None
    merged = pipeline.merge_models(recipe, output, execution, terminal.progress, target)
    published = merged.published
    if not published:
        if private_key:
            verify.sign(merged.output, private_key)
        if target and not (merged.gate and merged.gate.stops):
            published = pipeline.publish(merged.output, target, terminal.progress)
    _finish(terminal, merged, published)


def _recipe(file: Path, repo: str | None, *, allow_overlap: bool) -> Recipe:
    """Read a recipe and apply the options that change it."""
    from lewis_hub.workflow.resolve import allowing_overlap, published_at, read_recipe

    recipe = read_recipe(file)
    if repo:
        recipe = published_at(recipe, repo)
    return allowing_overlap(recipe) if allow_overlap else recipe


def _require_no_gate(recipe: Recipe, *, push: bool) -> None:
    if push and recipe.evaluate and recipe.evaluate.gate:
        message = (
            "the recipe has a quality gate, which needs scores before a push. "
            "Remove --push, or remove the gate."
        )
        raise click.BadParameter(message, param_hint="--no-eval")


def _finish(terminal: Terminal, merged: Merged, published: Published | None) -> None:
    """Print the result; exit with the gate's code if it refuses the merge."""
    from lewis_hub.cli.tables import outcome
    from lewis_hub.workflow.publish import refused

    terminal.finish(_document(merged, published), *outcome(merged, published))
    if merged.gate and merged.gate.missed:
        refusal = refused(merged.output, merged.gate, published.url if published else None)
        click.echo(f"lewis-hub: {refusal}", err=True)
        raise click.exceptions.Exit(refusal.exit_code)


def _require_streamable(*, push: bool, allow_pickle: bool, sign: bool) -> None:
    if not push:
        raise click.UsageError("--stream does not keep the merge on this disk: add --push.")
    if allow_pickle:
        raise click.UsageError("--stream cannot read pickle files: remove --allow-pickle.")
    if sign:
        raise click.UsageError(
            "--sign needs every file on this disk, and --stream does not keep the weights: "
            "remove one of the two."
        )


def _require_for_a_job(*, push: bool, output: Path | None, sign: bool) -> None:
    if not push:
        message = "the disk of a Job is deleted when it ends: add --push to keep the merge."
        raise click.BadParameter(message, param_hint="--on")
    if output:
        message = "the disk of a Job is deleted when it ends: remove --output."
        raise click.BadParameter(message, param_hint="--output")
    if sign:
        message = "a Job cannot sign, because your key is not sent to it: remove --sign."
        raise click.BadParameter(message, param_hint="--sign")


def _streamed(published: Published) -> dict[str, Any]:
    status = "merged" if published.changed else "unchanged"
    return published.to_json() | {"status": status, "output": None, "scores": None}


def _document(merged: Merged, published: Published | None) -> dict[str, Any]:
    scores = json.loads(merged.scores.to_json())["tasks"] if merged.scores else None
    output = str(merged.output) if merged.output.exists() else None
    document = {"status": merged.status, "output": output, "scores": scores}
    if merged.gate:
        document["gate"] = json.loads(merged.gate.to_json())
    if published:
        document |= published.to_json()
        document["status"] = "merged" if published.changed else "unchanged"
    if merged.gate and merged.gate.missed:
        document["status"] = "refused"
    return document
