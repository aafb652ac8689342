"""The command `init`: writes a recipe, and the GitHub workflow that merges it every week."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lewis_hub.cli import options
from lewis_hub.cli.terminal import Terminal, terminal_options
from lewis_hub.distribution import requirement
from lewis_hub.files import starts_like_path, write_whole
from lewis_hub.workflow.draft import Outline, draft_recipe, render

if TYPE_CHECKING:
    from lewis_hub.recipe.schema import Recipe


WORKFLOW = Path(".github") / "workflows" / "remerge.yml"
DEPENDABOT = "dependabot.yml"
PLAIN_PATH = re.compile(r"\w[\w./-]*", re.ASCII)  # no special meaning in YAML, GitHub or a shell
ACCESS = (
    "The workflow publishes with the secret HF_TOKEN, or without a token if the variable "
    "HF_OIDC_RESOURCE is set."
)


@click.command(
    epilog="\b\nExamples:\n  lewis-hub init --base google/gemma-2-2b --expert me/gemma-math\n"
    "  lewis-hub init --base B --expert E1 --task my_task --include tasks/\n"
    "  lewis-hub init --github"
)
@click.option("--base", help="Model that the experts were fine-tuned from.")
@options.repeated("--expert", "experts", help="Fine-tuned model; may be repeated.")
@options.repeated(
    "--task",
    "tasks",
    help="lm-eval task to score; may be repeated. With a task per expert, use the experts' order.",
)
@click.option("--include", type=options.FOLDER, help="Folder with your own lm-eval task files.")
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
@click.option("--repo", type=options.REPO, help="Repo to publish to, as owner/name.")
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
@click.option(
    "--gated",
    "gated_user",
    type=options.Format("user", "the name of a user", options.matching(r"[A-Za-z0-9][\w-]*")),
    metavar="USER",
    help="With --github: read gated sources as the CI/CD identity of this user, without a token.",
)
@options.flag("--force", help="Replace existing files.")
@terminal_options
def init(
    terminal: Terminal,
    base: str | None,
    experts: tuple[str, ...],
    tasks: tuple[str, ...],
    include: Path | None,
    calibrations: tuple[str, ...],
    text: str,
    repo: str | None,
    output: Path,
    github: bool,
    gated_user: str | None,
    force: bool,
) -> None:
    """Write a recipe with comments.

    This also writes the JSON Schema of recipes, for editors.
    """
    if github and base is None and output.exists():
        workflow = write_workflow(output, gated_user, force=force)
        document = {"status": "written", "output": str(output), "workflow": str(workflow)}
        terminal.finish(document, f"Wrote {workflow}. {ACCESS}")
        return
    _require_place(output, force=force)
    from lewis_hub.recipe import read

    base = base or _ask("Base model")
    experts = experts or tuple(_ask("Experts (separated by spaces)").split())
    outline = Outline(
        base=base,
        experts=experts,
        tasks=tasks,
        include=_beside(include, output) if include else None,
        datasets=calibrations,
        text=text,
        repo=repo,
    )
    if outline.problem:
        raise click.UsageError(outline.problem)
    draft = draft_recipe(outline, output.parent)
    recipe = read.parse_recipe(draft.text, str(output))  # refuses it before it is written
    _require_folders(recipe.placed_in(output.parent))
    schema_file = output.with_name("recipe.schema.json")
    document = {"status": "written", "output": str(output), "schema": str(schema_file)}
    shown = [f"Wrote {output} and {schema_file.name}. Next: lewis-hub check {output}"]
    if draft.note:
        document["note"] = draft.note
        shown.append(f"Note: {draft.note}")
    if github:
        document["workflow"] = str(write_workflow(output, gated_user, force=force))
        shown.append(f"Wrote {document['workflow']}. {ACCESS}")
    write_whole(output, draft.text)
    write_whole(schema_file, read.schema())
    terminal.finish(document, *shown)


def _require_place(output: Path, *, force: bool) -> None:
    """Refuse, before any question, a file that exists or has no folder."""
    if not output.parent.is_dir():
        raise click.UsageError(
            f"the folder {output.parent} does not exist; create it, or name another file with -o"
        )
    if output.exists() and not force:
        raise click.UsageError(
            f"{output} exists; name another file with -o, or replace it with --force"
        )


def _ask(question: str) -> str:
    """Ask on the terminal, or read a line that was piped in."""
    try:
        return str(click.prompt(question, err=True))
    except click.Abort:
        if sys.stdin.isatty():
            raise
        click.echo(err=True)
        raise click.UsageError(
            "there is no terminal to ask on; give --base MODEL and --expert MODEL"
        ) from None


def _require_folders(recipe: Recipe) -> None:
    """Refuse models that are written as folders and do not exist."""
    models = [entry.model for entry in recipe.models]
    for model in [*([recipe.base_model] if recipe.base_model else []), *models]:
        if starts_like_path(model.name) and not Path(recipe.locate(model.name)).exists():
            raise click.UsageError(
                f"the folder {model.name} does not exist; name a folder with a model, or owner/name"
            )


def _beside(folder: Path, output: Path) -> str:
    """The path of a folder from the recipe's own, which must contain it, as `check` requires."""
    inside, beside = folder.resolve(), output.resolve().parent
    if not inside.is_relative_to(beside):
        raise click.UsageError(
            f"{folder} is not in the recipe's folder {beside}, and the task files that are used "
            "become part of the merge; move or copy the folder there"
        )
    return inside.relative_to(beside).as_posix()


def write_workflow(recipe: Path, gated_user: str | None, *, force: bool) -> Path:
    """Write the GitHub workflow that merges `recipe` every week; returns its file.

    Dependabot is set up for its actions, unless the repository has a file for Dependabot. Outside
    of a git repository, the working folder counts as its root.
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
    if output.parent.resolve() != (root.resolve() / WORKFLOW).parent:  # a clone may come with one
        raise click.UsageError(f"{output.parent} is a link, or in one: delete the link")
    if output.exists() and not force:
        raise click.UsageError(f"{output} exists; replace it with --force")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, render_workflow(relative, gated_user))
    updates = root / ".github" / DEPENDABOT
    if not updates.exists():
        write_whole(updates, render(f"workflows/{DEPENDABOT}"))
    return output


def render_workflow(recipe: str, gated_user: str | None = None) -> str:
    """Render the workflow for a recipe at a plain path; it installs this version of lewis-hub."""
    values = {"recipe": recipe, "gated_user": gated_user, "requirement": requirement()}
    return render(f"workflows/{WORKFLOW.name}", **values)
