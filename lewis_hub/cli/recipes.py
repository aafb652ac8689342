"""Commands about recipes: `schema`, `methods`, `guides`, and `actions` for workflows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lewis_hub.cli import options
from lewis_hub.cli.help import Commands
from lewis_hub.cli.terminal import Terminal, say, terminal_options
from lewis_hub.display import TextTable, visible
from lewis_hub.documents import MAX_TABLE_BYTES, read_json
from lewis_hub.errors import LewisHubError
from lewis_hub.files import text_of

if TYPE_CHECKING:
    from lewis_hub.methods.registry import Method

ARXIV = "https://arxiv.org/abs/"


@click.command(epilog="\b\nExamples:\n  lewis-hub schema\n  lewis-hub schema lock")
@click.argument("kind", default="recipe", type=click.Choice(["recipe", "importance", "lock"]))
def schema(kind: str) -> None:
    """Print the JSON Schema of a file.

    The file is a recipe, importance.json or lewis/lock.json.
    """
    from lewis_hub.recipe import read
    from lewis_hub.report import lock

    file = resources.files("lewis_hub.calibration").joinpath("importance.schema.json")
    texts = {"recipe": read.schema, "importance": file.read_text, "lock": lock.schema}
    say(texts[kind](), nl=False)


@click.command(epilog="\b\nExamples:\n  lewis-hub methods\n  lewis-hub methods ties")
@click.argument("name", required=False)
@terminal_options
def methods(terminal: Terminal, name: str | None) -> None:
    """List the merge methods, or describe one.

    With NAME, this shows the method's formula, its paper, and what each option means, with its
    default and range. With --json the list has the options and papers of all methods.
    """
    from lewis_hub.methods import registry

    if name is not None:
        _describe(terminal, registry.find(name))
        return
    found = registry.methods()
    entries = [
        {
            "name": one.name,
            "summary": one.summary,
            "options": [*one.settings, *one.options],
            "paper": one.paper,
        }
        for one in found
    ]
    table = TextTable(("name", "description"), tuple((one.name, one.summary) for one in found))
    more = "\n`lewis-hub methods NAME` shows a method's formula, options and paper."
    _print_list(terminal, "methods", entries, registry.broken(), table, more)


def _describe(terminal: Terminal, method: Method) -> None:
    """Print all that a recipe's author needs to know of a method."""
    from lewis_hub.merge.settings import parameters_of

    parameters = parameters_of(method)
    header = ("option", "default", "values", "meaning")
    rows = tuple(
        (
            one.name,
            "required" if one.default is None else str(one.default).lower(),
            one.values,
            one.description,
        )
        for one in parameters
    )
    document = {
        "name": method.name,
        "summary": method.summary,
        "formula": method.formula,
        "paper": method.paper,
        "takes_base": method.takes_base,
        "options": [asdict(one) for one in parameters],
    }
    symbols = "x_i: a model; v_i = x_i - base; w_i: weight; d_i: density"
    formula = [*method.formula.splitlines(), symbols] if method.formula else []
    paper = [f"\nPaper: {method.paper}"] if method.paper else []
    shown = [f"{method.name}: {method.summary}", "", *(f"  {line}" for line in formula), ""]
    terminal.finish(document, *shown, TextTable(header, rows), *paper)


@click.command()
@terminal_options
def guides(terminal: Terminal) -> None:
    """List the guides and their papers. With --json also what each measures."""
    from lewis_hub.guides import registry

    found = registry.guides()
    entries = [
        {"name": one.name, "summary": one.summary, "needs": one.needs, "paper": one.paper}
        for one in found
    ]
    rows = tuple(
        (one.name, one.summary, (one.paper or "").replace(ARXIV, "arXiv ")) for one in found
    )
    table = TextTable(("name", "description", "paper"), rows)
    _print_list(terminal, "guides", entries, registry.broken(), table)


def _print_list(
    terminal: Terminal,
    kind: str,
    entries: Sequence[Mapping[str, object]],
    broken: Sequence[LewisHubError],
    *shown: TextTable | str,
) -> None:
    for error in broken:
        say(f"warning: {error}", err=True)
    document = {kind: entries, **({"broken": [str(error) for error in broken]} if broken else {})}
    terminal.finish(document, *shown)


@click.group(cls=Commands)
def actions() -> None:
    """Steps of the GitHub workflow that `init --github` writes."""


@actions.command(
    epilog="\b\nExample:\n  lewis-hub actions preflight recipe.yaml --repo me/my-merge"
)
@options.recipe
@options.repo
@options.output("Folder for the merged model. [default: merged/ beside the recipe]")
@click.option("--on", type=click.Choice(["jobs"]), help="Hugging Face Jobs are to merge.")
@options.flag("--force", help="Merge even if nothing changed.")
@terminal_options
def preflight(
    terminal: Terminal,
    recipe_file: Path,
    repo: str | None,
    output: Path | None,
    on: str | None,
    force: bool,
) -> None:
    """Decide whether to merge, stream or skip the merge.

    The answer (merge, stream, jobs or unchanged) is also the output `way` of the step. If not
    everybody may read the target, the output `private` is yes.
    """
    recipe = options.read_recipe(recipe_file, repo)
    from lewis_hub import pipeline
    from lewis_hub.workflow.resolve import destination

    target = destination(recipe)
    place = None if on else output or recipe_file.parent / "merged"
    decision = pipeline.preflight(recipe, target, place, force=force)
    private = "" if decision.is_public else "private=yes\n"
    _append_for_github("GITHUB_OUTPUT", f"way={decision.way}\n{private}")
    document = {"status": decision.way, "why": decision.why, "repo": target.repo}
    if decision.commit_url:
        document["commit_url"] = decision.commit_url
    terminal.finish(document, f"{decision.way}: {decision.why}")


@actions.command(epilog="\b\nExample:\n  lewis-hub actions report merge.json push.json")
@click.argument("documents", nargs=-1, type=click.Path(dir_okay=False, path_type=Path))
def report(documents: tuple[Path, ...]) -> None:
    """Show results on the page of the workflow run.

    DOCUMENTS are files with the output of --json, in the order of the steps. A missing or empty
    file belongs to a step that did not run. The outputs of this step are `status` and
    `commit-url`.
    """
    from lewis_hub.report.findings import outcome, step_summary

    results: dict[str, Any] = {}
    for file in documents:
        if file.exists() and (text := text_of(file, MAX_TABLE_BYTES).strip()):
            results |= _printed(file, text)
    summary = step_summary(results)
    _append_for_github("GITHUB_STEP_SUMMARY", summary)
    url = "".join(str(results.get("commit_url") or "").split())  # a second line is another output
    outputs = f"status={outcome(results)}\ncommit-url={visible(url)}\n"
    _append_for_github("GITHUB_OUTPUT", outputs)
    say(summary, nl=False)


TYPES = {  # of what commands print, where the summary reads it
    **dict.fromkeys(("status", "why", "commit_url", "repo", "url"), str),
    **dict.fromkeys(("error", "scores", "gate"), dict),
}


def _printed(file: Path, text: str) -> dict[str, Any]:
    """Read what a command printed with --json, or refuse it."""
    try:
        document = read_json(text, MAX_TABLE_BYTES)
    except ValueError as error:
        raise click.ClickException(f"{file} is not JSON: {error}") from None
    values = document if isinstance(document, dict) else {"": document}
    for key, value in values.items():
        if not isinstance(value, TYPES.get(key, object) if key else dict) and value is not None:
            where = f"`{key}` in {file}" if key else str(file)
            raise click.ClickException(f"{where} is not what a command prints with --json")
    if not isinstance((values.get("error") or {"message": ""}).get("message"), str):
        raise click.ClickException(f"`error` in {file} has no message")
    return values


def _append_for_github(variable: str, text: str) -> None:
    """Append to the file that GitHub names in `variable`; outside of GitHub do nothing."""
    if path := os.environ.get(variable):
        with Path(path).open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)
