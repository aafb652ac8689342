"""Publish: where a merge goes is looked at first and written to last, and says what it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.files import write_whole
from lewis_hub.hub.commit import Landed
from lewis_hub.hub.publish import (
    Publication,
    Published,
    folder_bytes,
    keep,
    proposals,
    publish,
)
from lewis_hub.hub.target import Target, open_target
from lewis_hub.progress import Progress
from lewis_hub.recipe import Publishing
from lewis_hub.report import changelog
from lewis_hub.report.difference import differences
from lewis_hub.report.lock import Lock
from lewis_hub.stages.standing import Former, former_merge, lock_in

if TYPE_CHECKING:
    from huggingface_hub import HfApi


CARD = "README.md"
TITLE = "Merge with lewis-hub"
LONGEST_TITLE = 100


@dataclass(frozen=True)
class Destination:
    """A repo as it was before the work began, and how the result is to land in it.

    Attributes:
        former: the merge that lies there; None: another model, or none.
    """

    asked: Publishing
    target: Target
    former: Former | None


def open_destination(asked: Publishing, api: HfApi) -> Destination:
    """Make sure, before any work, that a push can end well.

    Raises:
        PublishError: no token, one that may not write there, or no such namespace.
    """
    target = open_target(api, asked.repo, asked.landing)
    return Destination(asked, target, former_merge(target, api))


def published_already(destination: Destination, planned: Lock, api: HfApi) -> Published | None:
    """Main, or an open pull request, where it holds just the planned merge: nothing is pushed then.

    Pull requests are looked into only where the merge would land as one.
    """
    asked, former = destination.asked, destination.former
    if former and former.holds(planned):
        return keep(api, asked.repo, Landed(former.source.commit_sha), asked.tag)
    if asked.landing == "pull-request":
        for url, target in proposals(api, asked.repo):
            proposed = former_merge(target, api)
            if proposed and proposed.holds(planned):
                return keep(api, asked.repo, Landed(proposed.source.commit_sha, url), None)
    return None


def push(folder: Path, destination: Destination, api: HfApi, progress: Progress) -> Published:
    """Push a folder in one commit, unless somebody pushed to the repo since it was looked at.

    What it changes against the merge that lies there goes into the commit's message, and into the
    folder's changelog and card.

    Raises:
        PublishError: the repo is as it was before.
    """
    asked, former, lock = destination.asked, destination.former, lock_in(folder)
    changes: tuple[str, ...] = ()
    if former and lock:
        changes = differences(former.lock, lock)
        _write_changelog(folder, former, lock, changes)
    publication = Publication(
        message=_title(changes),
        description="\n".join(f"- {change}" for change in changes),
        landing=asked.landing,
        tag=asked.tag,
        private=asked.private,
        expected_parent=destination.target.head,
    )
    with progress.stage("Publishing", folder_bytes(folder), "bytes") as advance:
        return publish(api, folder, asked.repo, publication, advance)


def _title(changes: Sequence[str]) -> str:
    if not changes:
        return TITLE
    more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
    first = " ".join(changes[0].partition(" (")[0].split())  # without the names of files
    room = LONGEST_TITLE - len(TITLE) - len(more) - 2
    return f"{TITLE}: {first if len(first) <= room else first[: room - 1] + '…'}{more}"


def _write_changelog(folder: Path, former: Former, lock: Lock, changes: tuple[str, ...]) -> None:
    """Put what the folder changes, and what its forerunners did, into changelog and card."""
    entries, card = former.changes, folder / CARD
    if changes:
        today = datetime.now(UTC).date()
        new = changelog.Entry(today, former.source.commit_sha, lock.digest, changes)
        entries = (new, *entries)
    if not entries or not card.exists():
        return
    write_whole(folder / changelog.FILE, changelog.to_json(entries))
    write_whole(card, changelog.in_card(card.read_text(encoding="utf-8"), entries))
