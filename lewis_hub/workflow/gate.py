"""Gate: whether a merge is good enough to be published, beside its rivals and what is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.errors import EvaluationError, PublishError
from lewis_hub.evaluate.gate import FILE, Demand, GateVerdict, Previous, judge
from lewis_hub.evaluate.results import ModelResult
from lewis_hub.files import write_whole
from lewis_hub.hub.failures import HubRepo
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.target import read_target, read_text
from lewis_hub.recipe.schema import Recipe
from lewis_hub.report.findings import card_section
from lewis_hub.workflow.existing import Former, read_scores

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lewis_hub.workflow.evaluate import Scored


CARD, LOCK = "README.md", "lewis/lock.json"
ITEMS = "lewis/items.json"


def judged(recipe: Recipe, scored: Scored | None, api: HfApi) -> Scored | None:
    """The same scores with the gate's verdict, where the recipe has a gate.

    Raises:
        EvaluationError: the gate names a metric that is not there, or cannot be tested.
        PublishError: what was published before cannot be read.
    """
    demands = _demands(recipe)
    if scored is None or not demands:
        return scored
    verdict = judge(demands, scored.scores, scored.items, _previous(recipe, demands, api))
    return replace(scored, gate=verdict)


def judged_again(recipe: Recipe, output: Path, api: HfApi) -> GateVerdict | None:
    """The verdict on a merge that was made before: what it is held against may have changed.

    Where it did, the folder's verdict and card change with it. What is published already is not
    held against itself.
    """
    verdict, demands = read_verdict(output), _demands(recipe)
    if verdict is None or not any("previous" in demand.not_worse_than for demand in demands):
        return verdict
    asked = _asked(recipe, api)
    lock = (output / LOCK).read_text(encoding="utf-8")
    if asked and read_text(asked, read_target(asked), LOCK) == lock:
        return verdict
    scores = read_scores(output)
    assert scores  # there is a verdict on them
    items = ModelResult.from_json((output / ITEMS).read_text(encoding="utf-8"))
    found = judge(demands, scores, items, _previous(recipe, demands, api))
    if found != verdict:
        card = (output / CARD).read_text(encoding="utf-8")
        write_whole(output / CARD, card.replace(card_section(verdict), card_section(found)))
        write_whole(output / FILE, found.to_json())
    return found


def published_verdict(former: Former | None, api: HfApi) -> GateVerdict | None:
    """What the gate said of the merge in the target repo; None where it was pushed in spite of it.

    The file is no part of the lock, so one that cannot be read says nothing.
    """
    told = read_small(api, former.source, FILE) if former else None
    if told is None:
        return None
    try:
        verdict = GateVerdict.from_json(told.decode("utf-8", errors="replace"))
    except EvaluationError:
        return None
    return None if verdict.missed else verdict


def read_verdict(folder: Path) -> GateVerdict | None:
    """What the gate said of the merge in a folder; None where there was no gate.

    Raises:
        EvaluationError: the file is damaged.
    """
    file = folder / FILE
    return GateVerdict.from_json(file.read_text(encoding="utf-8")) if file.exists() else None


def _demands(recipe: Recipe) -> list[Demand]:
    gates = (recipe.evaluate.gate or ()) if recipe.evaluate else ()
    return [
        Demand(gate.task, gate.metric, gate.not_worse_than, gate.tolerance, gate.on_refusal)
        for gate in gates
    ]


def _asked(recipe: Recipe, api: HfApi) -> HubRepo | None:
    return HubRepo(api, recipe.publish.repo, error_type=PublishError) if recipe.publish else None


def _previous(recipe: Recipe, demands: list[Demand], api: HfApi) -> Previous:
    """What lies in the repo that the recipe publishes to."""
    asked = _asked(recipe, api)
    wanted = any("previous" in demand.not_worse_than for demand in demands)
    if asked is None or not wanted:
        return Previous("what was published before", why="the recipe names no repo to publish to")
    target = read_target(asked)
    if target.head is None:
        return Previous(asked.name, why="there is no such repo yet")
    name = f"{asked.name}@{target.head}"
    text = read_text(asked, target, ITEMS)
    if text is None:
        return Previous(name, why=f"it has no {ITEMS}")
    try:
        return Previous(name, ModelResult.from_json(text))
    except EvaluationError as error:
        return Previous(name, why=f"its {ITEMS} {error.problem.rstrip('.')}")
