"""Commands about recipes: `init`, `schema`, `methods`, `guides`, and `actions` for workflows."""

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
PLAIN_PATH = re.compile(r"\w[\w./-]*", re.ASCII)  # no special meaning in YAML, GitHub or a shell
ACCESS = (
    "The workflow publishes with the secret HF_TOKEN, or without a token if the variable "
    "HF_OIDC_RESOURCE is set."
)


@click.command(
    epilog="\b\nExamples:\n  lewis-hub init --base google/gemma-2-2b --expert me/gemma-math\n"
    "  lewis-hub init --github"
)
@click.option("--base", help="Model that the experts were fine-tuned from.")
@click.option("--expert", "experts", multiple=True, help="Fine-tuned model; may be repeated.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="lm-eval task to score; may be repeated. With a task per expert, use the experts' order.",
)
@click.option(
    "--calibration",
    "calibrations",
    multiple=True,
    help="Dataset that resembles the benchmark: one per expert, in their order, or one for all. "
    "[default: the training items of --task, if there is a task per expert]",
)
@click.option(
    "--text",
    type=Template(),
    default="{question} {answer}",
    help="Template over the dataset's columns; \\n is a line break.",
)
@click.option("--repo", help="Repo to publish to, as owner/name.")
@click.option(
    "-o",
    "--output",
    default="recipe.yaml",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write.",
)
@click.option(
    "--github",
    is_flag=True,
    help="Also write .github/workflows/remerge.yml, which merges every week. Without --base, an "
    "existing recipe is kept.",
)
@click.option("--force", is_flag=True, help="Replace existing files.")
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
    """Write a recipe with comments.

    This also writes the JSON Schema of recipes, for editors.
    """
    if github and base is None and output.exists():
        workflow = write_workflow(output, force=force)
        document = {"status": "written", "output": str(output), "workflow": str(workflow)}
        terminal.finish(document, f"Wrote {workflow}. {ACCESS}")
        return
    from lewis_hub.recipe.read import parse_recipe
    from lewis_hub.recipe.read import schema as recipe_schema

    base = base or click.prompt("Base model", err=True)
    experts = experts or tuple(click.prompt("Experts (separated by spaces)", err=True).split())
    calibration = _calibration(calibrations, text, tasks, len(experts))
    if output.exists() and not force:
        raise click.UsageError(
            f"{output} exists; name another file with -o, or replace it with --force"
        )
    written = _render(base, experts, tasks, calibration, repo)
    parse_recipe(written, str(output))  # refuses an invalid recipe before it is written
    schema_file = output.with_name("recipe.schema.json")
    document = {"status": "written", "output": str(output), "schema": str(schema_file)}
    shown = [f"Wrote {output} and {schema_file.name}. Next: lewis-hub check {output}"]
    if github:
        document["workflow"] = str(write_workflow(output, force=force))
        shown.append(f"Wrote {document['workflow']}. {ACCESS}")
    output.write_text(written, encoding="utf-8")
    schema_file.write_text(recipe_schema(), encoding="utf-8")
    terminal.finish(document, *shown)


def _calibration(
    datasets: tuple[str, ...], text: str, tasks: tuple[str, ...], n_experts: int
) -> list[dict[str, str]]:
    """Calibration settings: the named datasets, otherwise the training items of the tasks."""
    if len(datasets) not in {0, 1, n_experts}:
        raise click.UsageError(
            f"expected one --calibration for all experts or one for each of the {n_experts}, "
            f"found {len(datasets)}."
        )
    named = [{"dataset": name, "split": "train", "text": text} for name in datasets]
    return named or _task_calibration(tasks, n_experts)


def _task_calibration(tasks: tuple[str, ...], n_experts: int) -> list[dict[str, str]]:
    """The training items of the tasks, if there are several experts with one task each."""
    if not len(tasks) == n_experts > 1:
        return []
    from lewis_hub.errors import EvaluationError
    from lewis_hub.evaluate.benchmarks import free_split
    from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks

    calibrations = []
    for task in tasks:
        try:
            split = free_split(locate_tasks(TaskSelection((task,), allow_code=True)))
        except EvaluationError:  # `check` reports the problem
            return []
        if split is None:
            return []
        calibrations.append({"task": task, "split": split})
    return calibrations


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
    return json.dumps(value, ensure_ascii=False)


@click.command(epilog="\b\nExamples:\n  lewis-hub schema\n  lewis-hub schema lock")
@click.argument("kind", default="recipe", type=click.Choice(["recipe", "importance", "lock"]))
def schema(kind: str) -> None:
    """Print the JSON Schema of a file.

    The file is a recipe, importance.json or lewis/lock.json.
    """
    from lewis_hub.recipe.read import schema as recipe_schema
    from lewis_hub.report.lock import schema as lock_schema

    if kind == "importance":
        file = resources.files("lewis_hub.calibration").joinpath("importance.schema.json")
        click.echo(file.read_text("utf-8"), nl=False)
    else:
        click.echo(recipe_schema() if kind == "recipe" else lock_schema(), nl=False)


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
    _print_list(terminal, "methods", entries, "options", broken())


@click.command()
@terminal_options
def guides(terminal: Terminal) -> None:
    """List the guides, what they need, and their papers."""
    from lewis_hub.guides.registry import broken
    from lewis_hub.guides.registry import guides as all_guides

    entries = [
        {"name": g.name, "summary": g.summary, "needs": g.needs, "paper": g.paper}
        for g in all_guides()
    ]
    _print_list(terminal, "guides", entries, "needs", broken())


def _print_list(
    terminal: Terminal,
    kind: str,
    entries: list[dict[str, Any]],
    third: str,
    broken: Sequence[LewisHubError],
) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "description", third, "paper"):
        table.add_column(column, no_wrap=column in {"name", "paper"})
    for entry in entries:
        names = ", ".join(entry[third])
        table.add_row(*map(Text, (entry["name"], entry["summary"], names, entry["paper"] or "")))
    for error in broken:
        click.echo(f"warning: {error}", err=True)
    document = {kind: entries, **({"broken": [str(error) for error in broken]} if broken else {})}
    terminal.finish(document, table)


def write_workflow(recipe: Path, *, force: bool) -> Path:
    """Write the GitHub workflow that merges `recipe` every week.

    Args:
        recipe: a file in a git repository. Without a repository, the working folder is its root.
        force: replace an existing workflow.

    Returns:
        The file that was written.

    Raises:
        click.UsageError: a workflow exists, or the recipe is not in the repository.
    """
    path, here = recipe.resolve(), Path.cwd()
    root = next((folder for folder in path.parents if (folder / ".git").exists()), here)
    if not path.is_relative_to(root):
        raise click.UsageError(f"{recipe} is not in {root}, where the workflow would run.")
    relative = path.relative_to(root).as_posix()
    if not PLAIN_PATH.fullmatch(relative):
        raise click.UsageError(
            "expected a path of the recipe with letters, digits and ./-_ only, which a shell "
            f"passes on unchanged; found {relative!r}"
        )
    output = root / WORKFLOW
    if output.exists() and not force:
        raise click.UsageError(f"{output} exists; replace it with --force")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render_workflow(relative), encoding="utf-8")
    return output


def render_workflow(recipe: str) -> str:
    """Render the workflow for a recipe at a plain path; it installs this version of lewis-hub."""
    import jinja2

    template = resources.files("lewis_hub.templates").joinpath("workflows", WORKFLOW.name)
    environment = jinja2.Environment(
        variable_start_string="[[",  # `{{` belongs to GitHub's expressions
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
@click.option(
    "--repo", type=RepoName(), help="Repo to publish to, instead of the recipe's `publish.repo`."
)
@output_option("Folder for the merged model. [default: merged/ beside the recipe]")
@click.option("--force", is_flag=True, help="Merge even if nothing changed.")
@terminal_options
def preflight(
    terminal: Terminal, recipe_file: Path, repo: str | None, output: Path | None, force: bool
) -> None:
    """Decide whether to merge, stream or skip the merge.

    The answer (merge, stream or unchanged) is also the output `way` of the step.
    """
    from lewis_hub.workflow.resolve import destination, published_at, read_recipe

    recipe = read_recipe(recipe_file)
    from lewis_hub import pipeline
    from lewis_hub.cli.tables import plain

    if repo:
        recipe = published_at(recipe, repo)
    target = destination(recipe)
    output = output or recipe_file.parent / "merged"
    decision = pipeline.preflight(recipe, target, output, force=force)
    _append_for_github("GITHUB_OUTPUT", f"way={decision.way}\n")
    document = {"status": decision.way, "why": decision.why, "repo": target.repo}
    if decision.commit_url:
        document["commit_url"] = decision.commit_url
    terminal.finish(document, *plain(f"{decision.way}: {decision.why}"))


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
        if file.exists() and (text := file.read_text(encoding="utf-8").strip()):
            results |= json.loads(text)
    summary = step_summary(results)
    _append_for_github("GITHUB_STEP_SUMMARY", summary)
    outputs = f"status={outcome(results)}\ncommit-url={results.get('commit_url') or ''}\n"
    _append_for_github("GITHUB_OUTPUT", outputs)
    click.echo(summary, nl=False)


def _append_for_github(variable: str, text: str) -> None:
    """Append to the file that GitHub names in `variable`; outside of GitHub do nothing."""
    if path := os.environ.get(variable):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
