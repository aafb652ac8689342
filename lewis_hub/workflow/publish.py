"""Publish: where a merge goes is looked at first and written to last, and says what it changes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.errors import GateRefusedError, PublishError
from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.files import write_whole
from lewis_hub.hub.commit import Additions, PushedCommit
from lewis_hub.hub.facts import states_a_licence
from lewis_hub.hub.publish import (
    Publication,
    Published,
    folder_bytes,
    matches_folder,
    proposals,
    publish,
    publish_tag,
)
from lewis_hub.hub.target import Target, open_target
from lewis_hub.progress import Progress
from lewis_hub.recipe.schema import Publishing
from lewis_hub.report import difference, markdown
from lewis_hub.report.difference import differences
from lewis_hub.report.findings import gate_sentences, refusal, scores_table
from lewis_hub.report.lock import Lock
from lewis_hub.report.sections import DISAGREE
from lewis_hub.workflow.existing import PreviousMerge, lock_in, previous_merge, read_scores
from lewis_hub.workflow.gate import read_verdict

if TYPE_CHECKING:
    from huggingface_hub import HfApi


CARD = "README.md"
TITLE = "Merge with lewis-hub"
BELOW = f"{TITLE}, below the quality gate"
LONGEST_TITLE = 100


@dataclass(frozen=True)
class Destination:
    """A repo as it was before the work began, and how the result is to land in it.

    Attributes:
        previous: the merge that lies there; None: another model, or none.
    """

    asked: Publishing
    target: Target
    previous: PreviousMerge | None


def open_destination(asked: Publishing, api: HfApi) -> Destination:
    """Make sure, before any work, that a push can end well.

    Raises:
        PublishError: no token, one that may not write there, or no such namespace.
    """
    target = open_target(api, asked.repo, asked.landing)
    return Destination(asked, target, previous_merge(target, api))


def published_already(destination: Destination, planned: Lock, api: HfApi) -> Published | None:
    """Main, or an open pull request, where it holds just the planned merge: nothing is pushed then.

    Pull requests are looked into only where the merge would land as one.
    """
    asked, previous = destination.asked, destination.previous
    if previous and previous.holds(planned):
        return publish_tag(api, asked.repo, PushedCommit(previous.source.commit_sha), asked.tag)
    if asked.landing == "pull-request":
        for url, target in proposals(api, asked.repo):
            proposed = previous_merge(target, api)
            if proposed and proposed.holds(planned):
                return publish_tag(
                    api, asked.repo, PushedCommit(proposed.source.commit_sha, url), None
                )
    return None


def is_published(folder: Path, destination: Destination, api: HfApi) -> bool:
    """Whether a folder is, file by file, the merge in the target repo: nothing is lost with it."""
    previous = destination.previous
    same = previous is not None and lock_in(folder) == previous.lock
    return same and matches_folder(api, folder, destination.target)


def push(
    folder: Path,
    destination: Destination,
    api: HfApi,
    progress: Progress,
    sent: Additions | None = None,
    *,
    force: bool,
) -> Published:
    """Push a folder in one commit, unless somebody pushed to the repo since it was looked at.

    What it changes against the merge that lies there goes into the commit's message, and into the
    folder's changelog and card. What the quality gate refused goes nowhere, or into a pull request
    that says so, as the gate asks; with `force` it goes where everything goes, and the commit says
    so.

    Args:
        folder: the model.
        destination: where it goes.
        api: the Hub.
        progress: told the bytes.
        sent: files of the model that were sent ahead.
        force: whether what the gate refused is pushed all the same.

    Raises:
        PublishError: the repo is as it was before, or lacks the tag alone.
        GateRefusedError: so it is here.
    """
    _require_licence(folder)
    asked, verdict = destination.asked, read_verdict(folder)
    missed = verdict if verdict and verdict.missed else None
    if missed and missed.stops and not force:
        raise refused(folder, missed, None)
    changes = _record_changes(folder, destination.previous)
    told = [f"- {change}" for change in changes]
    proposes = missed is not None and not force
    publication = Publication(
        message=_title(changes, BELOW if missed else TITLE),
        description="\n".join([*([_below(folder, missed), ""] if missed else []), *told]),
        landing="pull-request" if proposes else asked.landing,
        tag=None if proposes else asked.tag,
        private=asked.private,
        expected_parent=destination.target.head,
    )
    with progress.stage("Publishing", folder_bytes(folder), "bytes") as advance:
        return publish(api, folder, asked.repo, publication, advance, sent)


def _require_licence(folder: Path) -> None:
    """Refuse a merge of parents whose licences differ, while nobody has decided on one."""
    card = folder / CARD
    told = card.read_bytes() if card.exists() else b""
    if DISAGREE.encode() in told and not states_a_licence(told):
        raise PublishError(
            str(folder),
            f"its parents' licences differ, and {CARD} states none",
            "Decide which licence a merge of them may have: write `license: ...` into the "
            f"metadata at the top of {CARD}, or set `publish.license` and merge again.",
        )


def refused(folder: Path, verdict: GateVerdict, proposed_at: str | None) -> GateRefusedError:
    """The gate's message: by how much, on what, and what can be done.

    Args:
        folder: the merged model's.
        verdict: one that was missed.
        proposed_at: the address of the pull request that was opened instead.
    """
    problem = f"below the quality gate: {refusal(verdict)}"
    if proposed_at:
        remedy = f"Main is as it was; the merge is proposed at {proposed_at}."
    else:
        command = f"lewis-hub push {shlex.quote(str(folder))} OWNER/NAME --force"
        remedy = f"Nothing was pushed. The merge is kept: `{command}` publishes it all the same."
    return GateRefusedError(str(folder), problem, remedy)


def _below(folder: Path, verdict: GateVerdict) -> str:
    """Verdict and scores, as a pull request shows them."""
    told = "\n".join(f"- {markdown.text(sentence)}" for sentence in gate_sentences(verdict))
    scores = read_scores(folder)
    table = scores_table(scores) if scores else ""
    return f"This merge missed its quality gate.\n\n{told}\n\n{table}"


def _title(changes: Sequence[str], title: str) -> str:
    if not changes:
        return title
    more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
    first = " ".join(changes[0].partition(" (")[0].split())  # without the names of files
    room = LONGEST_TITLE - len(title) - len(more) - 2
    return f"{title}: {first if len(first) <= room else first[: room - 1] + '…'}{more}"


def _record_changes(folder: Path, previous: PreviousMerge | None) -> tuple[str, ...]:
    """What a folder changes against a previous merge, in words; its changelog and card tell it."""
    lock = lock_in(folder)
    if not previous or not lock:
        return ()
    changes = differences(previous.lock, lock)
    _write_changelog(folder, previous, lock, changes)
    return changes


def _write_changelog(
    folder: Path, previous: PreviousMerge, lock: Lock, changes: tuple[str, ...]
) -> None:
    """Put what the folder changes, and what its forerunners did, into changelog and card."""
    entries, card = previous.changes, folder / CARD
    if changes:
        today = datetime.now(UTC).date()
        new = difference.ChangelogEntry(today, previous.source.commit_sha, lock.digest, changes)
        entries = (new, *entries)
    if not entries or not card.exists():
        return
    write_whole(folder / difference.FILE, difference.to_json(entries))
    write_whole(card, difference.in_card(card.read_text(encoding="utf-8"), entries))
