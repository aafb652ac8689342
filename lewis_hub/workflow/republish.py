"""State where a merge is published, and rewrite that in a finished merge; its weights stay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lewis_hub.errors import MergeError, OutputError, PublishError
from lewis_hub.evaluate.samples import Samples
from lewis_hub.files import write_whole
from lewis_hub.hub.facts import ModelFacts, combined_licence
from lewis_hub.hub.publish import SIGNATURE
from lewis_hub.hub.source import Source
from lewis_hub.merge.workspace import alone_with
from lewis_hub.methods import registry
from lewis_hub.recipe.evaluation import Benchmark
from lewis_hub.recipe.formats import exports_in
from lewis_hub.recipe.schema import Publishing
from lewis_hub.report import lock as locks
from lewis_hub.report import page
from lewis_hub.report.card import (
    command_starts,
    dark_folder,
    eval_results,
    model_card,
    name_line,
)
from lewis_hub.report.facts import CardFacts
from lewis_hub.report.lock import Lock
from lewis_hub.report.patch import patched
from lewis_hub.workflow.evaluate import CARD, read_scores
from lewis_hub.workflow.report import RECIPE, ReportSettings, described, locked_outputs
from lewis_hub.workflow.snapshot import RecipeSnapshot
from lewis_hub.workflow.transplant_job import TRANSPLANT

UNNAMED = "Merged model"
PUSHED_TO = re.compile(r"(?<!\n)\n*<!-- lewis-hub: pushed to (\S+) -->\n")


def published_as(facts: CardFacts, publish: Publishing | None) -> CardFacts:
    """Return the facts of a merge that is published as asked; None: it stays on disk."""
    chosen = publish.license if publish else None
    try:
        licence = combined_licence([facts.models[one.pinned] for one in facts.sources], chosen)
    except PublishError:  # the parents differ and none was chosen
        licence = None
    return replace(
        facts,
        title=publish.repo.partition("/")[2] if publish else facts.title,
        repo=publish.repo if publish else None,
        licence=licence,
        licence_chosen=chosen is not None,
    )


def has_recipe_of(lock: Lock, folder: Path) -> bool:
    """Whether the recipe in a folder is that of its lock: not if a run was killed between them."""
    stated = lock.outputs.get(RECIPE)
    return stated is None or locked_outputs(folder, {}, [RECIPE]) == {RECIPE: stated}


def republish(
    settings: ReportSettings, found: Lock, parameters: Mapping[str, int], folder: Path
) -> None:
    """Rewrite a finished merge in `folder` after a change of the recipe's `publish` alone.

    Only the lines of card and page that depend on it change. A signature of the folder would not
    be valid any more, and is deleted. The lock is written last, so that a rerun completes it.

    Args:
        settings: of the recipe with the new `publish`; without one, that of the lock stays.
        found: the lock in the folder.
        parameters: tensor -> number of parameters.
        folder: the merge.
    """
    asked = settings.planned.recipe.get("publish") or found.recipe.get("publish")
    recipe = with_publish(found.recipe, asked)
    facts = replace(
        described(settings.facts, folder),
        parameters=parameters,
        scores=read_scores(folder),
    )
    with alone_with(folder):
        _restate_results(folder, settings.benchmarks, _stating(facts, recipe))
        restate(facts, found, replace(found, recipe=recipe), folder)


def publishing_in(recipe: Mapping[str, Any]) -> Publishing | None:
    """Return the section `publish` of the recipe in a lock.

    Raises:
        OutputError: it cannot be read.
    """
    publish = recipe.get("publish")
    try:
        return Publishing.model_validate(publish) if publish else None
    except ValidationError as error:
        problem = f"its `publish` cannot be read ({error.errors()[0]['msg']})"
        raise OutputError(locks.FILE, problem, "Use the file that the merge wrote.") from None


def benchmarks_in(recipe: Mapping[str, Any]) -> dict[str, Benchmark]:
    """Return the leaderboards of the recipe in a lock, by task; none if they cannot be read."""
    try:
        asked = recipe["evaluate"]["benchmarks"]
        return TypeAdapter(dict[str, Benchmark]).validate_python(asked)
    except (KeyError, TypeError, ValidationError):
        return {}


def _restate_results(folder: Path, benchmarks: Mapping[str, Benchmark], facts: CardFacts) -> None:
    """Rewrite the leaderboard entries in a folder, which name the repo of the facts."""
    scores = read_scores(folder) if benchmarks else None
    found = eval_results(scores, benchmarks, replace(facts, scores=scores)) if scores else {}
    for name, text in found.items():
        if (folder / name).exists():
            write_whole(folder / name, text)


def with_publish(recipe: Mapping[str, Any], asked: Any) -> dict[str, Any]:
    """Return the recipe of a lock with another section `publish`; without one if it is empty."""
    kept = {key: part for key, part in recipe.items() if key != "publish"}
    return kept | ({"publish": asked} if asked else {})


def restate(facts: CardFacts, found: Lock, changed: Lock, folder: Path) -> Lock:
    """Rewrite card, page, lock and so on after a change of the recipe; return the new lock.

    Args:
        facts: of the merge; only lines that depend on the change are written.
        found: the lock in the folder.
        changed: the lock with the new recipe.
        folder: the merge; a signature in it would not be valid any more, and is deleted.
    """
    old, new = _stating(facts, found.recipe), _stating(facts, changed.recipe)
    _patch_card(folder / CARD, old, new)
    if (folder / page.FILE).exists():
        pages = [page.report_page(one, Samples()) for one in (old, new)]
        text = (folder / page.FILE).read_text(encoding="utf-8")
        write_whole(folder / page.FILE, patched(text, *pages))
    write_whole(folder / RECIPE, new.recipe)
    outputs = {**changed.outputs, **locked_outputs(folder, {}, [RECIPE])}
    lock = replace(changed, outputs=outputs)
    statement = folder / locks.PROVENANCE_FILE
    with suppress(OSError, *locks.NO_STATEMENT):  # `verify` reports a missing or damaged one
        text = locks.provenance_again(statement.read_text(encoding="utf-8"), lock)
        write_whole(statement, text)
    (folder / SIGNATURE).unlink(missing_ok=True)
    write_whole(folder / locks.FILE, lock.to_json())
    return lock


def readdress(folder: Path, lock: Lock, repo: str) -> None:
    """Write a repo into card and leaderboard entries of a merge that its recipe does not name."""
    asked = publishing_in(lock.recipe)
    stated = asked.repo if asked else None
    card = folder / CARD
    if not card.exists() or (stated == repo and not _pushed_to(card)):
        return
    if lock.method == TRANSPLANT:
        text = card.read_text(encoding="utf-8")
        write_whole(card, text.replace(name_line(None), name_line(repo)))
        return
    try:
        facts = replace(facts_of(lock), exports=exports_in(lock.recipe))
    except MergeError:  # the package of its method is not installed
        return
    old, new = (
        published_as(facts, Publishing(repo=name) if name else None) for name in (stated, repo)
    )
    _restate_results(folder, benchmarks_in(lock.recipe), new)
    _patch_card(card, old, new)
    if stated != repo:
        text = card.read_text(encoding="utf-8")
        write_whole(card, f"{text.rstrip()}\n\n<!-- lewis-hub: pushed to {repo} -->\n")


def _pushed_to(card: Path) -> str | None:
    """The repo that the last push wrote into a card."""
    found = PUSHED_TO.search(card.read_text(encoding="utf-8"))
    return found[1] if found else None


def _patch_card(card: Path, old: CardFacts, new: CardFacts) -> None:
    if not card.exists():
        return
    if pushed_to := _pushed_to(card):
        old = replace(old, title=pushed_to.partition("/")[2], repo=pushed_to)
    text = PUSHED_TO.sub("\n", card.read_text(encoding="utf-8"))
    text = text.replace(f'srcset="{dark_folder(old)}/', f'srcset="{dark_folder(new)}/')
    if old.repo != new.repo:
        starts = (command_starts(one.repo, new.exports) for one in (old, new))
        for before, after in zip(*starts, strict=True):
            text = text.replace(f"\n{before}", f"\n{after}")
    write_whole(card, patched(text, str(model_card(old)), str(model_card(new))))


def require_stated(found: Lock) -> None:
    """Refuse, before any work, a lock of others whose recipe cannot be stated in a card.

    Raises:
        LewisHubError: its method is unknown, or its `publish` is none.
    """
    _stating(facts_of(found), found.recipe)


def _stating(facts: CardFacts, recipe: Mapping[str, Any]) -> CardFacts:
    """The facts with a recipe as it was run, and its `publish`."""
    text = RecipeSnapshot(recipe, {}).to_yaml()
    named = replace(facts, title=recipe.get("name") or UNNAMED, recipe=text)
    return published_as(replace(named, exports=exports_in(recipe)), publishing_in(recipe))


def facts_of(lock: Lock) -> CardFacts:
    """Return the facts that a lock has; those of the sources' own cards are missing."""
    sources = [
        Source(one.name.partition("@")[0], "model", one.revision, one.commit_sha, (), None)
        for one in lock.inputs
    ]
    bases = [one for one, locked in zip(sources, lock.inputs, strict=True) if locked.role == "base"]
    return CardFacts(
        title=lock.recipe.get("name") or UNNAMED,
        repo=None,
        base=bases[0] if bases else None,
        experts=tuple(one for one in sources if one not in bases),
        models={one.pinned: ModelFacts(one.name, None, (), None) for one in sources},
        datasets=(),
        dtype=None,
        method=registry.find(lock.method),
        recipe="",
        licence=None,
        licence_chosen=False,
        custom_code=False,
        mergekit=False,
        digest=lock.digest,
        software=lock.software,
    )
