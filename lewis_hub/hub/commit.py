"""A change -> one commit on the Hub, never two: a lost answer is looked up, not guessed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars

from lewis_hub.errors import PublishError, SourceError
from lewis_hub.hub.change import Additions, Change, open_pull_request
from lewis_hub.hub.failures import Asked, hub_failures
from lewis_hub.hub.retries import PAUSES_S, asked_pause_s, may_pass, persist
from lewis_hub.hub.target import MAIN, Landing, look
from lewis_hub.progress import Advance

ALONE_BYTES = 8 << 20  # files from here on are uploaded one by one, so that progress shows
OVERTAKEN = {404, 412}  # a file to delete is gone already; the parent is not main any more


@dataclass(frozen=True)
class Message:
    """What the commit says about itself."""

    title: str
    description: str


@dataclass(frozen=True)
class Landed:
    """A commit that is on the Hub."""

    commit_sha: str
    pull_request_url: str | None = None


def upload(asked: Asked, change: Change, landing: Landing, advance: Advance) -> Additions:
    """Bring the contents of large files to the Hub; they belong to no commit yet.

    What was uploaded before, by a push that broke off, is not sent again, and what was sent ahead
    is there.
    """
    for path, file in change.files.items():
        if path not in change.added:
            advance(file.stat().st_size)
    new = [path for path in change.added if path in change.files]
    additions = {path: CommitOperationAdd(path, change.files[path]) for path in new}
    large = {p: a for p, a in additions.items() if a.upload_info.size >= ALONE_BYTES}
    small = {p: a for p, a in additions.items() if p not in large}
    for batch in ([list(small.values())] if small else []) + [[one] for one in large.values()]:
        preupload(asked, batch, landing)
        advance(sum(addition.upload_info.size for addition in batch))
    return additions | {path: change.sent[path] for path in change.added if path in change.sent}


def preupload(asked: Asked, batch: Sequence[CommitOperationAdd], landing: Landing) -> None:
    """Bring the contents of files to the Hub, where it keeps them as large ones."""
    disable_progress_bars()  # only the command line prints
    with hub_failures(asked):
        persist(
            lambda: asked.api.preupload_lfs_files(
                asked.repo,
                batch,
                revision=MAIN,
                create_pr=landing == "pull-request",
                free_memory=False,
            )
        )


def commit(
    asked: Asked, change: Change, additions: Additions, landing: Landing, message: Message
) -> Landed:
    """Make the commit, on the parent that was compared with and on no other.

    Raises:
        PublishError: somebody pushed meanwhile, or the Hub failed; there is no commit then.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            made = _send(asked, change, additions, landing, message)
        except (HfHubHTTPError, httpx2.TransportError) as error:
            stale = isinstance(error, HfHubHTTPError) and error.response.status_code in OVERTAKEN
            if not stale and not may_pass(error):
                with hub_failures(asked):
                    raise
            if not stale:
                time.sleep(asked_pause_s(error) or pause_s or 0)
            landed = _landed_after_all(asked, change, landing)
            if landed:
                return landed
            if pause_s is None or stale:
                with hub_failures(asked):
                    raise
        except ValueError as error:  # the Hub's own check of the card
            problem = " ".join(str(error).split()).rstrip(".")
            raise asked.failed(problem, "Repair README.md, then push again.") from error
        else:
            return Landed(str(made.oid), made.pr_url)
    raise AssertionError("the last attempt returns or raises")


def overtaken(asked: Asked, head: str | None) -> PublishError | SourceError:
    """Main is not where it was when it was compared with."""
    return asked.failed(
        f"somebody pushed {head} meanwhile; nothing was changed",
        f"Look at {asked.url}/commits/{MAIN}, then run the same command again.",
    )


def _send(
    asked: Asked, change: Change, additions: Additions, landing: Landing, message: Message
) -> CommitInfo:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warnings while validating metadata")  # a bare card
        return asked.api.create_commit(
            asked.repo,
            [*additions.values(), *map(CommitOperationDelete, change.stale)],
            commit_message=message.title,
            commit_description=message.description,
            revision=MAIN,
            parent_commit=change.target.head,
            create_pr=landing == "pull-request",
        )


def _landed_after_all(asked: Asked, change: Change, landing: Landing) -> Landed | None:
    """Look whether a commit whose answer was lost is there.

    Raises:
        PublishError: somebody else's is.
    """
    now = look(asked)
    if landing == "pull-request":
        found = open_pull_request(asked, change)
        return Landed(found[1], found[0]) if found else None
    if change.done_in(now):
        return Landed(str(now.head))
    if now.head != change.target.head:
        raise overtaken(asked, now.head)
    return None
