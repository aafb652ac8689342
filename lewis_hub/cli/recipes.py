"""Commands about recipes: write one, describe them, list what they may name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import click

from lewis_hub import __version__
from lewis_hub.cli.options import RepoName, Template, output_option, recipe_argument
from lewis_hub.cli.terminal import Terminal, terminal_options
from lewis_hub.errors import LewisHubError

WORKFLOW = Path(".github") / "workflows" / "remerge.yml"
PLAIN_PATH = re.compile(r"\w[\w./-]*", re.ASCII)  # means nothing to YAML, GitHub or a shell


def write_workflow(recipe: Path, *, force: bool) -> Path:
    """Put the workflow that merges `recipe` again and again into its repository.

    Args:
        recipe: of a git repository; outside of one the working folder counts as its top.
        force: whether a workflow that is there is replaced.

    Raises:
        click.UsageError: there is a workflow already, or the recipe lies elsewhere.
    """
    place, here = recipe.resolve(), Path.cwd()
    top = next((folder for folder in place.parents if (folder / ".git").exists()), here)
    if not place.is_relative_to(top):
        raise click.UsageError(f"{recipe} lies outside of {top}, where the workflow would run.")
    inside = place.relative_to(top).as_posix()
    if not PLAIN_PATH.fullmatch(inside):
        told = "letters, digits and ./-_ alone, so that no shell takes it for more"
        raise click.UsageError(f"expected a recipe's path of {told}; found {inside!r}")
    output = top / WORKFLOW
    if output.exists() and not force:
        raise click.UsageError(f"{output} exists; replace it with --force")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render_workflow(inside), encoding="utf-8")
    return output


def render_workflow(recipe: str) -> str:
    """The workflow for a recipe at a plain path, pinned to this version of lewis-hub."""
    import jinja2

    template = resources.files("lewis_hub.templates").joinpath("workflows", WORKFLOW.name)
    environment = jinja2.Environment(
        variable_start_string="[[",  # `{{` is GitHub's
        variable_end_string="]]",
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    source = template.read_text("utf-8")
    return environment.from_string(source).render(recipe=recipe, version=__version__)


@click.group()
def actions() -> None:
    """Steps of the GitHub workflow that `init --github` writes."""


@actions.command(
    epilog="\b\nExample:\n  lewis-hub actions preflight recipe.yaml --repo me/my-merge"
)
@recipe_argument
@click.option("--repo", type=RepoName(), help="Where it goes, if not to the recipe's.")
@output_option("Folder for the merged model [merged/ beside the recipe].")
@click.option("--force", is_flag=True, help="Merge though nothing changed.")
@terminal_options
def preflight(
    terminal: Terminal, recipe_file: Path, repo: str | None, output: Path | None, force: bool
) -> None:
    """Tell whether to merge on this disk, from Hub to Hub, or not at all.

    The answer (merge, stream or unchanged) is also the step's output `way`.
    """
    from lewis_hub.workflow.read import destination, published_at, read_recipe

    recipe = read_recipe(recipe_file)
    from lewis_hub.cli.tables import plain
    from lewis_hub.workflow.ci import look_ahead
    from lewis_hub.workflow.resolve import hub_api

    if repo:
        recipe = published_at(recipe, repo)
    asked = destination(recipe)
    output = output or recipe_file.parent / "merged"
    found = look_ahead(recipe, asked, output, hub_api(), force=force)
    _tell_github("GITHUB_OUTPUT", f"way={found.way}\n")
    document = {"status": found.way, "why": found.why, "repo": asked.repo}
    if found.commit_url:
        document["commit_url"] = found.commit_url
    terminal.finish(document, *plain(f"{found.way}: {found.why}"))


@actions.command(epilog="\b\nExample:\n  lewis-hub actions report merge.json push.json")
@click.argument("documents", nargs=-1, type=click.Path(dir_okay=False, path_type=Path))
def report(documents: tuple[Path, ...]) -> None:
    """Put what DOCUMENTS (of --json, in order) say on the page of the run, as Markdown.

    One that is missing or empty belongs to a step that did not run. The step's outputs are
    `status` and `commit-url`.
    """
    from lewis_hub.report.leaderboards import outcome, step_summary

    found: dict[str, Any] = {}
    for file in documents:
        if file.exists() and (text := file.read_text(encoding="utf-8").strip()):
            found |= json.loads(text)
    told = step_summary(found)
    _tell_github("GITHUB_STEP_SUMMARY", told)
    outputs = f"status={outcome(found)}\ncommit-url={found.get('commit_url') or ''}\n"
    _tell_github("GITHUB_OUTPUT", outputs)
    click.echo(told, nl=False)


def _tell_github(variable: str, text: str) -> None:
    """Append to one of the files that GitHub names; elsewhere there is none."""
    if place := os.environ.get(variable):
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(text)


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
    from lewis_hub.recipe.read import parse_recipe
    from lewis_hub.recipe.read import schema as recipe_schema

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
    from lewis_hub.evaluate.benchmarks import free_split
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
    from lewis_hub.recipe.read import schema as recipe_schema
    from lewis_hub.report.lock import schema as lock_schema

    if what == "importance":
        file = resources.files("lewis_hub.calibration").joinpath("importance.schema.json")
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
