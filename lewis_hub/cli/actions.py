"""GitHub Actions: the workflow that `init --github` writes, and the steps that only it takes."""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import click

from lewis_hub import __version__
from lewis_hub.cli.options import RepoName, output_option, recipe_argument
from lewis_hub.cli.terminal import Terminal, terminal_options

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
    from lewis_hub.stages.reading import read_recipe

    recipe = read_recipe(recipe_file)
    from lewis_hub import steps
    from lewis_hub.cli.tables import plain
    from lewis_hub.stages.preflight import look_ahead
    from lewis_hub.stages.sources import hub_api

    if repo:
        recipe = steps.published_at(recipe, repo)
    asked = steps.destination(recipe)
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
    from lewis_hub.report.summary import outcome, step_summary

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
