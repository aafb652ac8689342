"""Commands about recipes: write one, describe them, list what they may name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import click

from lewis_hub.cli.actions import write_workflow
from lewis_hub.cli.options import Template
from lewis_hub.cli.terminal import Terminal, terminal_options
from lewis_hub.errors import LewisHubError

ACCESS = "It publishes with the secret HF_TOKEN, or without one: the variable HF_OIDC_RESOURCE."


@click.command(
    epilog="\b\nExamples:\n  lewis-hub init --base google/gemma-2-2b --expert me/gemma-math\n"
    "  lewis-hub init --github"
)
@click.option("--base", help="What the experts were fine-tuned from.")
@click.option("--expert", "experts", multiple=True, help="A fine-tuned model; repeat it.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="An lm-eval task to score; repeat it, in the experts' order if each has its own.",
)
@click.option(
    "--calibration",
    "calibrations",
    multiple=True,
    help="A dataset like the benchmark: one for each expert in order, or one for all [the "
    "training items of --task, where there is one for each expert].",
)
@click.option(
    "--text",
    type=Template(),
    default="{question} {answer}",
    help="Template over the dataset's columns; \\n is a new line.",
)
@click.option("--repo", help="Where to publish: owner/name.")
@click.option(
    "-o",
    "--output",
    default="recipe.yaml",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write [recipe.yaml].",
)
@click.option(
    "--github",
    is_flag=True,
    help="Also write .github/workflows/remerge.yml, which merges again every week. Without --base "
    "a recipe that is there stays as it is.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@terminal_options
def init(
    terminal: Terminal,
    base: str | None,
    experts: tuple[str, ...],
    tasks: tuple[str, ...],
    calibrations: tuple[str, ...],
    text: str,
    repo: str | None,
    output: Path,
    github: bool,
    force: bool,
) -> None:
    """Write a commented recipe, and its JSON Schema for editors."""
    if github and base is None and output.exists():
        workflow = write_workflow(output, force=force)
        document = {"status": "written", "output": str(output), "workflow": str(workflow)}
        terminal.finish(document, f"Wrote {workflow}. {ACCESS}")
        return
    from lewis_hub.recipe_file import parse_recipe
    from lewis_hub.recipe_file import schema as recipe_schema

    base = base or click.prompt("Base model", err=True)
    experts = experts or tuple(click.prompt("Experts (separated by spaces)", err=True).split())
    drawn = _drawn(calibrations, text, tasks, len(experts))
    if output.exists() and not force:
        raise click.UsageError(f"{output} exists; name another with -o, or replace it with --force")
    written = _render(base, experts, tasks, drawn, repo)
    parse_recipe(written, str(output))  # what we write is what we read
    schema_file = output.with_name("recipe.schema.json")
    document = {"status": "written", "output": str(output), "schema": str(schema_file)}
    shown = [f"Wrote {output} and {schema_file.name}. Next: lewis-hub check {output}"]
    if github:
        document["workflow"] = str(write_workflow(output, force=force))
        shown.append(f"Wrote {document['workflow']}. {ACCESS}")
    output.write_text(written, encoding="utf-8")
    schema_file.write_text(recipe_schema(), encoding="utf-8")
    terminal.finish(document, *shown)


def _drawn(
    datasets: tuple[str, ...], text: str, tasks: tuple[str, ...], n_experts: int
) -> list[dict[str, str]]:
    """What to calibrate on: datasets where some are named, else the tasks' own items."""
    if len(datasets) not in {0, 1, n_experts}:
        raise click.UsageError(
            f"expected one --calibration for all experts or one for each of the {n_experts}, "
            f"found {len(datasets)}."
        )
    named = [{"dataset": name, "split": "train", "text": text} for name in datasets]
    return named or _of_tasks(tasks, n_experts)


def _of_tasks(tasks: tuple[str, ...], n_experts: int) -> list[dict[str, str]]:
    """The tasks' own items, where each expert has a task of its own."""
    if not len(tasks) == n_experts > 1:
        return []
    from lewis_hub.errors import EvaluationError
    from lewis_hub.evaluate.data import free_split
    from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks

    drawn = []
    for task in tasks:
        try:
            split = free_split(locate_tasks(TaskSelection((task,), allow_code=True)))
        except EvaluationError:  # `check` tells what is wrong with it
            return []
        if split is None:
            return []
        drawn.append({"task": task, "split": split})
    return drawn


def _render(
    base: str,
    experts: tuple[str, ...],
    tasks: tuple[str, ...],
    calibrations: list[dict[str, str]],
    repo: str | None,
) -> str:
    import jinja2

    source = resources.files("lewis_hub.templates").joinpath("recipe.yaml.j2").read_text("utf-8")
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["yaml"] = _yaml_string
    return environment.from_string(source).render(
        base=base,
        experts=experts,
        tasks=list(tasks),
        calibrations=calibrations,
        experts_calibrate=len(calibrations) == len(experts) > 1,
        repo=repo,
    )


def _yaml_string(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


@click.command(epilog="\b\nExamples:\n  lewis-hub schema\n  lewis-hub schema lock")
@click.argument("what", default="recipe", type=click.Choice(["recipe", "importance", "lock"]))
def schema(what: str) -> None:
    """Print the JSON Schema of a recipe, of importance.json or of lewis/lock.json."""
    from lewis_hub.recipe_file import schema as recipe_schema
    from lewis_hub.report.lock import schema as lock_schema

    if what == "importance":
        file = resources.files("lewis_hub.guides").joinpath("importance.schema.json")
        click.echo(file.read_text("utf-8"), nl=False)
    else:
        click.echo(recipe_schema() if what == "recipe" else lock_schema(), nl=False)


@click.command()
@terminal_options
def methods(terminal: Terminal) -> None:
    """List the merge methods, their options and their papers."""
    from lewis_hub.methods.registry import broken
    from lewis_hub.methods.registry import methods as all_methods

    entries: list[dict[str, Any]] = []
    for m in all_methods():
        options = [*m.settings, *m.options]
        entries.append({"name": m.name, "summary": m.summary, "options": options, "paper": m.paper})
    _listed(terminal, "methods", entries, "options", broken())


@click.command()
@terminal_options
def guides(terminal: Terminal) -> None:
    """List the guides: what they decide densities by, what they need, and their papers."""
    from lewis_hub.guides.registry import broken
    from lewis_hub.guides.registry import guides as all_guides

    found = all_guides()
    _listed(
        terminal,
        "guides",
        [{"name": g.name, "summary": g.summary, "needs": g.needs, "paper": g.paper} for g in found],
        "needs",
        broken(),
    )


def _listed(
    terminal: Terminal,
    what: str,
    entries: list[dict[str, Any]],
    third: str,
    broken: Sequence[LewisHubError],
) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "what it does", third, "paper"):
        table.add_column(column, no_wrap=column in {"name", "paper"})
    for entry in entries:
        listed = ", ".join(entry[third])
        table.add_row(*map(Text, (entry["name"], entry["summary"], listed, entry["paper"] or "")))
    for error in broken:
        click.echo(f"warning: {error}", err=True)
    document = {what: entries, **({"broken": [str(error) for error in broken]} if broken else {})}
    terminal.finish(document, table)
