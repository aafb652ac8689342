"""Whether a folder holds a merge of several steps already, without making the steps again.

The hidden file `.steps.json` has a digest of all that determines the last merge: the recipes of all
steps, the files of the models that they start from, and the user's task files. The lock cannot
tell: it knows what the steps made. Hidden files are not published.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lewis_hub.documents import MAX_JSON_BYTES, read_json
from lewis_hub.files import sha256_of, text_of, write_whole
from lewis_hub.hub.source import PICKLED, Source
from lewis_hub.methods import registry
from lewis_hub.recipe.evaluation import Gate
from lewis_hub.recipe.formats import ExportFormat
from lewis_hub.recipe.parts import all_of, parts_of
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.recipe.rules import aligns_by_texts, asks_for_statistics
from lewis_hub.recipe.schema import Recipe
from lewis_hub.report.lock import ARITHMETIC, can_change_the_result, canonical
from lewis_hub.workflow.publish import STEPS, complete_in, lock_in
from lewis_hub.workflow.report import ReportSettings
from lewis_hub.workflow.republish import facts_of, with_publish
from lewis_hub.workflow.snapshot import RecipeSnapshot, task_files

LATER = {"publish", "intermediate"}  # keys of a recipe that do not determine a step


@dataclass(frozen=True)
class Finished:
    """A merge that may be finished already, and what its report needs if `publish` changed."""

    reporting: ReportSettings
    parameters: Mapping[str, int]  # tensor -> number of parameters
    gates: tuple[Gate, ...]
    repo: str | None  # target repo; None: the merge stays on disk
    exports: tuple[ExportFormat, ...]


def steps_digest(
    recipe: Recipe, sources: Mapping[ModelReference, Source], max_shard_bytes: int
) -> str | None:
    """Return the digest of a merge with its steps; None where texts decide, which it cannot tell.

    `sources` are all models that are there before the first step.
    """
    recipes = tuple(one for part in (*parts_of(recipe), recipe) for one in all_of(part))
    if any(one.guide or asks_for_statistics(one) or aligns_by_texts(one) for one in recipes):
        return None
    document = {
        "arithmetic": ARITHMETIC,
        "max_shard_bytes": max_shard_bytes,
        "steps": [
            [
                one.model_dump(mode="json", by_alias=True, exclude=LATER),
                registry.find(one.merge_method).version,
            ]
            for one in recipes
        ],
        "sources": {str(model): _digests(source) for model, source in sources.items()},
        "tasks": {path: sha256_of(file) for path, file in task_files(recipe).items()},
    }
    return "sha256:" + hashlib.sha256(canonical(document)).hexdigest()


def _digests(source: Source) -> dict[str, str]:
    """The digests of the files that can change a merge, by path: pickles if there is no other."""
    pickles = source.matching(PICKLED) if source.is_pickled else ()
    return {
        file.path: file.digest
        for file in source.files
        if can_change_the_result(file.path) or file in pickles
    }


def record(output: Path, digest: str) -> None:
    """Write the digest of a finished merge into its folder."""
    if found := lock_in(output):
        document = {"version": 1, "digest": digest, "lock": found.digest}
        write_whole(output / STEPS, json.dumps(document, indent=2) + "\n")


def finished(recipe: Recipe, digest: str, output: Path) -> Finished | None:
    """Return the merge with this digest in a folder; None if there is none.

    None also where a change of `publish` changes more than where the merge is published: a licence
    is combined from the cards of the steps.
    """
    found = complete_in(output)
    if found is None or _recorded(output) != (digest, found.digest):
        return None
    asked = recipe.publish
    stated = found.recipe.get("publish") or {}
    boards = recipe.evaluate.benchmarks if recipe.evaluate else None
    if asked and (asked.license != stated.get("license") or boards):
        return None
    publish = asked and asked.model_dump(mode="json", by_alias=True, exclude_none=True)
    planned = replace(found, recipe=with_publish(found.recipe, publish))
    reporting = ReportSettings(
        facts=facts_of(found),
        planned=planned,
        snapshot=RecipeSnapshot(planned.recipe, {}),
        mergekit=None,
        benchmarks={},
        device="cpu",
    )
    gates = (recipe.evaluate.gate or ()) if recipe.evaluate else ()
    repo = asked.repo if asked else None
    return Finished(reporting, {}, gates, repo, recipe.export or ())


def _recorded(output: Path) -> tuple[Any, Any] | None:
    """The digests of the steps and of the lock that a folder states."""
    try:
        found = read_json(text_of(output / STEPS, MAX_JSON_BYTES))
    except (OSError, ValueError):
        return None
    return (found.get("digest"), found.get("lock")) if isinstance(found, dict) else None
