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

from lewis_hub.cli import options
from lewis_hub.cli.terminal import Terminal, say, terminal_options
from lewis_hub.display import TextTable
from lewis_hub.distribution import requirement
from lewis_hub.errors import EvaluationError, LewisHubError

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
@options.repeated("--expert", "experts", help="Fine-tuned model; may be repeated.")
@options.repeated(
    "--task",
    "tasks",
    help="lm-eval task to score; may be repeated. With a task per expert, use the experts' order.",
)
@options.repeated(
    "--calibration",
    "calibrations",
    help="Dataset that resembles the benchmark: one per expert, in their order, or one for all. "
    "[default: the training items of --task, if there is a task per expert]",
)
@click.option(
    "--text",
    type=options.line_breaks,
    metavar="TEXT",
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
@options.flag(
    "--github",
    help="Also write .github/workflows/remerge.yml, which merges every week. Without --base, an "
    "existing recipe is kept.",
)
@options.flag("--force", help="Replace existing files.")
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
    from lewis_hub.recipe import read

    base = base or click.prompt("Base model", err=True)
    experts = experts or tuple(click.prompt("Experts (separated by spaces)", err=True).split())
    calibration = _calibration(calibrations, text, tasks, len(experts))
    if output.exists() and not force:
        raise click.UsageError(
            f"{output} exists; name another file with -o, or replace it with --force"
        )
    written = _render(
        "recipe.yaml.j2",
        base=base,
        experts=experts,
        tasks=tasks,
        calibrations=calibration,
        experts_calibrate=len(calibration) == len(experts) > 1,
        repo=repo,
    )
    read.parse_recipe(written, str(output))  # refuses an invalid recipe before it is written
    schema_file = output.with_name("recipe.schema.json")
    document = {"status": "written", "output": str(output), "schema": str(schema_file)}
    shown = [f"Wrote {output} and {schema_file.name}. Next: lewis-hub check {output}"]
    if github:
        document["workflow"] = str(write_workflow(output, force=force))
        shown.append(f"Wrote {document['workflow']}. {ACCESS}")
    output.write_text(written, encoding="utf-8", newline="\n")
    schema_file.write_text(read.schema(), encoding="utf-8", newline="\n")
    terminal.finish(document, *shown)


def _calibration(
    datasets: tuple[str, ...], text: str, tasks: tuple[str, ...], n_experts: int
) -> list[dict[str, str]]:
    """Calibration settings: the named datasets, or the training items of a task per expert."""
    if len(datasets) not in {0, 1, n_experts}:
        raise click.UsageError(
            f"expected one --calibration for all experts or one for each of the {n_experts}, "
            f"found {len(datasets)}."
        )
    if datasets or not len(tasks) == n_experts > 1:
        return [{"dataset": name, "split": "train", "text": text} for name in datasets]
    from lewis_hub.evaluate.benchmarks import free_split
    from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks

    selections = {task: TaskSelection((task,), allow_code=True) for task in tasks}
    try:
        splits = {task: free_split(locate_tasks(one)) for task, one in selections.items()}
    except EvaluationError:  # `check` reports the problem
        return []
    if None in splits.values():
        return []
    return [{"task": task, "split": splits[task] or ""} for task in tasks]


def _render(template: str, **values: object) -> str:
    """Render a template, in which `[[ ]]` holds a value: GitHub's expressions use `{{ }}`."""
    import jinja2

    environment = jinja2.Environment(
        variable_start_string="[[",
        variable_end_string="]]",
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)
    source = resources.files("lewis_hub.templates").joinpath(template).read_text("utf-8")
    return environment.from_string(source).render(values)


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


@click.command()
@terminal_options
def methods(terminal: Terminal) -> None:
    """List the merge methods, their options and their papers."""
    from lewis_hub.methods import registry

    names = {m.name: [*m.settings, *m.options] for m in registry.methods()}
    rows = [(m.name, m.summary, names[m.name], m.paper) for m in registry.methods()]
    _print_list(terminal, ("methods", "options"), rows, registry.broken())


@click.command()
@terminal_options
def guides(terminal: Terminal) -> None:
    """List the guides, what they need, and their papers."""
    from lewis_hub.guides import registry

    rows = [(g.name, g.summary, g.needs, g.paper) for g in registry.guides()]
    _print_list(terminal, ("guides", "needs"), rows, registry.broken())


def _print_list(
    terminal: Terminal,
    keys: tuple[str, str],
    rows: Sequence[tuple[str, str, Sequence[str], str | None]],
    broken: Sequence[LewisHubError],
) -> None:
    kind, third = keys
    entries = [{"name": n, "summary": s, third: words, "paper": p} for n, s, words, p in rows]
    texts = ((n, summary, ", ".join(words), p or "") for n, summary, words, p in rows)
    for error in broken:
        say(f"warning: {error}", err=True)
    document = {kind: entries, **({"broken": [str(error) for error in broken]} if broken else {})}
    terminal.finish(document, TextTable(("name", "description", third, "paper"), tuple(texts)))


def write_workflow(recipe: Path, *, force: bool) -> Path:
    """Write the GitHub workflow that merges `recipe` every week; returns its file.

    Outside of a git repository, the working folder counts as its root.
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
    output.write_text(render_workflow(relative), encoding="utf-8", newline="\n")
    return output


def render_workflow(recipe: str) -> str:
    """Render the workflow for a recipe at a plain path; it installs this version of lewis-hub."""
    return _render(f"workflows/{WORKFLOW.name}", recipe=recipe, requirement=requirement())


@click.group()
def actions() -> None:
    """Steps of the GitHub workflow that `init --github` writes."""


@actions.command(
    epilog="\b\nExample:\n  lewis-hub actions preflight recipe.yaml --repo me/my-merge"
)
@options.recipe
@options.repo
@options.output("Folder for the merged model. [default: merged/ beside the recipe]")
@options.flag("--force", help="Merge even if nothing changed.")
@terminal_options
def preflight(
    terminal: Terminal, recipe_file: Path, repo: str | None, output: Path | None, force: bool
) -> None:
    """Decide whether to merge, stream or skip the merge.

    The answer (merge, stream or unchanged) is also the output `way` of the step.
    """
    recipe = options.read_recipe(recipe_file, repo)
    from lewis_hub import pipeline
    from lewis_hub.workflow.resolve import destination

    target = destination(recipe)
    output = output or recipe_file.parent / "merged"
    decision = pipeline.preflight(recipe, target, output, force=force)
    _append_for_github("GITHUB_OUTPUT", f"way={decision.way}\n")
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
        if file.exists() and (text := file.read_text(encoding="utf-8").strip()):
            results |= json.loads(text)
    summary = step_summary(results)
    _append_for_github("GITHUB_STEP_SUMMARY", summary)
    url = "".join(str(results.get("commit_url") or "").split())  # a second line is another output
    outputs = f"status={outcome(results)}\ncommit-url={url}\n"
    _append_for_github("GITHUB_OUTPUT", outputs)
    say(summary, nl=False)


def _append_for_github(variable: str, text: str) -> None:
    """Append to the file that GitHub names in `variable`; outside of GitHub do nothing."""
    if path := os.environ.get(variable):
        with Path(path).open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)
