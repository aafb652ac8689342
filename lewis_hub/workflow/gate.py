"""Gate: whether a merge is good enough to be published, beside its rivals and what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.errors import EvaluationError, PublishError
from lewis_hub.evaluate.gate import FILE, Demand, GateVerdict, Previous, judge
from lewis_hub.evaluate.scores import ModelResult
from lewis_hub.files import write_whole
from lewis_hub.hub.failures import HubRepo
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.target import read_target, read_text
from lewis_hub.report.findings import gate_section
from lewis_hub.workflow.evaluate import Scored
from lewis_hub.workflow.existing import PreviousMerge, read_scores

if TYPE_CHECKING:
    from huggingface_hub import HfApi


CARD, LOCK = "README.md", "lewis/lock.json"
ITEMS = "lewis/items.json"


def judge_scores(demands: Sequence[Demand], scored: Scored, repo: str | None, api: HfApi) -> Scored:
    """Return the same scores with the gate's verdict, where there is a gate.

    Args:
        demands: of the gate; none: there is no gate.
        scored: the merge and its rivals.
        repo: that the merge is published in, and compared with; None: it stays on disk.
        api: the Hub.

    Raises:
        EvaluationError: the gate names a metric that is not there, or cannot be tested.
        PublishError: what was published before cannot be read.
    """
    if not demands:
        return scored
    previous = _previous(demands, repo, api)
    return replace(scored, gate=judge(demands, scored.scores, scored.items, previous))


def judge_again(
    demands: Sequence[Demand], output: Path, repo: str | None, api: HfApi
) -> GateVerdict | None:
    """Return the verdict on a merge that was made before: its rivals may have changed.

    If they did, the folder's verdict and card change too. A merge that is published already is not
    compared with itself.
    """
    verdict = read_verdict(output)
    if verdict is None or not any("previous" in demand.not_worse_than for demand in demands):
        return verdict
    asked = _asked(repo, api)
    lock = (output / LOCK).read_text(encoding="utf-8")
    scores = read_scores(output)
    if scores is None or (asked and read_text(asked, read_target(asked), LOCK) == lock):
        return verdict
    items = ModelResult.from_json((output / ITEMS).read_text(encoding="utf-8"))
    found = judge(demands, scores, items, _previous(demands, repo, api))
    if found != verdict:
        card = (output / CARD).read_text(encoding="utf-8")
        write_whole(output / CARD, card.replace(gate_section(verdict), gate_section(found)))
        write_whole(output / FILE, found.to_json())
    return found


def published_verdict(previous: PreviousMerge | None, api: HfApi) -> GateVerdict | None:
    """What the gate said of the merge in the target repo; None where it was pushed in spite of it.

    The file is no part of the lock, so one that cannot be read says nothing.
    """
    told = read_small(api, previous.source, FILE) if previous else None
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


def _asked(repo: str | None, api: HfApi) -> HubRepo | None:
    return HubRepo(api, repo, error_type=PublishError) if repo else None


def _previous(demands: Sequence[Demand], repo: str | None, api: HfApi) -> Previous:
    """Read what lies in the repo that the merge is published in."""
    asked = _asked(repo, api)
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
