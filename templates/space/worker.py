"""One step for one user, in a process of its own: `worker.py STEP FOLDER`.

The request is a JSON object on stdin. Every line on stdout is a JSON object: `say` (a line of the
log), `stage` with `done` from 0 to 1, and at the end `result`, or `problem` for the user to read.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from refusals import calibrations, not_on_the_hub, refusals

import lewis_hub

MAX_BYTES = int(float(os.environ.get("MAX_GB", "4")) * 1e9)  # of all weights, and of all rows
MAX_ITEMS = 50  # of each task that is scored
EVERY_S = 0.3  # between reports of a stage
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
PICTURES = (".png", ".svg")
OPTIONS = re.compile(r"give --(task|calibration)\b.*")  # of the command line, in a note
FIELDS = "name a task for each expert, in their order, or add `calibration` to the recipe."
OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # what libraries print goes to the log of the Space


class Reports:
    """Progress as JSON lines."""

    @contextmanager
    def stage(self, title: str, total: int, unit: str) -> Iterator[Any]:  # noqa: ARG002
        """Report the share of a stage that is done."""
        done, reported = 0, time.monotonic()

        def advance(n: int) -> None:
            nonlocal done, reported
            done += n
            if time.monotonic() - reported >= EVERY_S:
                reported = time.monotonic()
                tell(stage=title, done=min(1.0, done / max(1, total)))

        tell(stage=title, done=0.0)
        yield advance
        tell(stage=title, done=1.0)

    def say(self, text: str) -> None:
        """Report a line."""
        tell(say=text)


def tell(**values: object) -> None:
    """Write a line for the app."""
    OUT.write(json.dumps(values) + "\n")
    OUT.flush()


def require(problems: Iterator[str]) -> None:
    """Stop if there is a problem."""
    found = [*dict.fromkeys(problems)]
    if found:
        raise RefusedError("\n".join(found))


class RefusedError(Exception):
    """This Space does not do what was asked."""


def init(_folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Write a recipe for a base and its experts."""
    models = (request["base"], *request["experts"])
    if not request["base"] or not request["experts"]:
        raise RefusedError("Name a base and at least one expert.")
    require(not_on_the_hub(*models, *filter(None, [request["repo"]])))
    outline = lewis_hub.Outline(
        request["base"], tuple(request["experts"]), tuple(request["tasks"]), repo=request["repo"]
    )
    draft = lewis_hub.draft_recipe(outline)
    return {"recipe": draft.text, "note": OPTIONS.sub(FIELDS, draft.note or "")}


def check(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Check a recipe, and whether its models are small enough."""
    report = _checked(_recipe(folder, request))
    return {"table": report.table.to_html(), "lines": report.lines}


def merge(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the models of a recipe into `merged` in the folder."""
    recipe = _recipe(folder, request)
    report = _checked(recipe)
    if report.problems:
        raise RefusedError("\n".join(report.lines))
    scoring = recipe.evaluate
    if scoring and request["score"]:
        limit = min(MAX_ITEMS, scoring.limit or MAX_ITEMS)
        scoring = scoring.model_copy(update={"limit": limit, "benchmarks": None})
        recipe = recipe.model_copy(update={"evaluate": scoring})
        execution = lewis_hub.Execution(replace=True)
    else:
        recipe = recipe.model_copy(update={"evaluate": None})
        execution = lewis_hub.Execution(replace=True, held_out=scoring)
    merged = lewis_hub.merge_models(recipe, folder / "merged", execution, Reports())
    shutil.rmtree(folder / "cache", ignore_errors=True)  # the downloaded models
    return {
        "card": card(merged.output),
        "scores": merged.scores.table.to_html() if merged.scores else None,
    }


def push(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Publish the merged model with the user's token."""
    if not (folder / "merged").is_dir():
        raise RefusedError("There is no merged model yet: merge first.")
    require(not_on_the_hub(request["repo"]))
    asked = recipe_in(folder).publish
    settings = asked.model_dump() if asked else {}
    settings |= {"repo": request["repo"], "private": request["private"]}
    target = lewis_hub.open_target(lewis_hub.Publishing(**settings))
    return {"published": str(lewis_hub.publish(folder / "merged", target, Reports()))}


def card(merged: Path) -> str:
    """The model card as HTML: all text is escaped, and pictures are part of it."""
    from lewis_hub.localhub.pages import HUGGING_FACE, render_markdown

    merged = merged.resolve()

    def address(path: str) -> str:
        file = (merged / path).resolve()
        if file.suffix not in PICTURES or not file.is_file() or merged not in file.parents:
            return f"#{escape(path)}"
        kind = "svg+xml" if file.suffix == ".svg" else "png"
        return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"

    text = (merged / "README.md").read_text(encoding="utf-8")
    html = render_markdown(FRONT_MATTER.sub("", text), address)
    html = html.replace('href="/', f'href="{HUGGING_FACE}/')  # the pages of an embedded Hub
    return html.replace('<a href="https://', '<a target="_blank" rel="noopener" href="https://')


def recipe_in(folder: Path) -> lewis_hub.Recipe:
    """Read the recipe of a folder, and refuse what this Space does not run."""
    recipe = lewis_hub.read_recipe(folder / "recipe" / "recipe.yaml")
    require(refusals(recipe))
    return recipe


def _recipe(folder: Path, request: Mapping[str, Any]) -> lewis_hub.Recipe:
    text = request["recipe"].encode("utf-8", errors="replace")  # a browser may send half a letter
    (folder / "recipe" / "recipe.yaml").write_bytes(text)
    return recipe_in(folder)


def _checked(recipe: lewis_hub.Recipe) -> Any:
    report = lewis_hub.check(recipe)
    read = sum(source.size_bytes for source in report.sources)
    # layers or experts that a recipe names several times are written several times
    written = report.output_bytes * (1 + len(recipe.export or ()))  # an export is no larger
    n_bytes, what = max((read, "These models have"), (written, "The merged model would have"))
    _require_small(n_bytes, f"{what} {n_bytes / 1e9:.1f} GB of weights")
    if not report.problems:
        data_bytes = sum(file.size_bytes for data in _datasets(recipe) for file in data.files)
        _require_small(data_bytes, f"The datasets have {data_bytes / 1e9:.1f} GB")
    return report


def _require_small(n_bytes: int, found: str) -> None:
    if n_bytes > MAX_BYTES:
        raise RefusedError(
            f"{found}, and this Space merges up to {MAX_BYTES / 1e9:.1f} GB. Copy the recipe, and "
            "run `lewis-hub merge recipe.yaml` on a machine of your own, or duplicate this Space "
            "to larger hardware and set its variable MAX_GB."
        )


def _datasets(recipe: lewis_hub.Recipe) -> Iterator[Any]:
    """The datasets that calibration or scoring may download whole."""
    from lewis_hub.evaluate.tasks import TaskSelection
    from lewis_hub.hub.resolve import resolve_dataset
    from lewis_hub.workflow.resolve import hub_api
    from lewis_hub.workflow.task_data import scored_sources

    api, asked = hub_api(), [*calibrations(recipe)]
    for name in dict.fromkeys(one.dataset for one in asked if one.dataset):
        repo, _, revision = name.partition("@")
        yield resolve_dataset(api, repo, revision or None)
    scored = recipe.evaluate.tasks if recipe.evaluate else ()
    tasks = dict.fromkeys([*scored, *(one.task for one in asked if one.task)])
    if tasks:
        yield from scored_sources(api, TaskSelection(tuple(tasks))).values()


STEPS = {"init": init, "check": check, "merge": merge, "push": push}


def main(step: str, folder: str) -> None:
    """Run a step and write its result, or what the user can do about a problem."""
    request = json.loads(sys.stdin.read())
    try:
        tell(result=STEPS[step](Path(folder), request))
    except (lewis_hub.LewisHubError, RefusedError) as error:
        tell(problem=str(error).replace(folder, ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
