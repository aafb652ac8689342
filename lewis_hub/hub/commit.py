"""A change -> one commit on the Hub, never two: a lost answer is looked up, not guessed."""

from __future__ import annotations

import io
import json
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.lfs import UploadInfo
from huggingface_hub.utils import disable_progress_bars

from lewis_hub.errors import PublishError, SourceError
from lewis_hub.hub.failures import Asked, hub_failures
from lewis_hub.hub.resolve import digests_of, git_sha1_of
from lewis_hub.hub.retries import PAUSES_S, asked_pause_s, may_pass, persist
from lewis_hub.hub.target import MAIN, Landing, Target, look, read_text
from lewis_hub.progress import Advance

Additions = Mapping[str, CommitOperationAdd]

LOCK = "lewis/lock.json"
SIGNATURE = "model.sig"  # of a former merge: it says nothing of this one
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True)
class Change:
    """What one commit does: from `target` to the folder, and to what was sent ahead of it."""

    target: Target
    files: Mapping[str, Path]  # all of the folder: path in the repo -> file
    sent: Additions  # on the Hub already, in no commit yet, and no longer here
    digests: Mapping[str, str]  # of all of them
    stale: Sequence[str]  # what a former merge left and this one lacks

    @property
    def added(self) -> list[str]:
        """Paths that are new or have other bytes."""
        there = self.target.digests
        return [path for path in self.digests if there.get(path) != self.digests[path]]

    def done_in(self, target: Target) -> bool:
        """Whether a repo holds just this already."""
        same = all(self._equal(path, target.digests.get(path)) for path in self.digests)
        return same and not any(path in target.digests for path in self.stale)

    def _equal(self, path: str, there: str | None) -> bool:
        hashed = self.digests[path].startswith("sha256:") and path in self.files
        if there and there.startswith("git-sha1:") and hashed:
            return there == git_sha1_of(self.files[path])
        return there == self.digests[path]


def compare(asked: Asked, target: Target, files: Mapping[str, Path], sent: Additions) -> Change:
    """Find what differs; a file that the Hub keeps in git is compared by its git sha1."""
    in_git = [path for path in files if target.digests.get(path, "").startswith("git-sha1:")]
    others = [path for path in files if path not in in_git]
    digests = dict(zip(others, digests_of([files[path] for path in others]), strict=True))
    digests |= {path: git_sha1_of(files[path]) for path in in_git}
    digests |= {path: f"sha256:{one.upload_info.sha256.hex()}" for path, one in sent.items()}
    ours = {path for path in target.digests if WEIGHTS.fullmatch(path) or path == SIGNATURE}
    ours |= _left_by_former_merge(asked, target) & set(target.digests)
    return Change(target, files, sent, digests, sorted(ours - set(digests)))


def open_pull_request(asked: Asked, change: Change) -> tuple[str, str] | None:
    """The address and commit sha of an open pull request that makes just this change."""
    for url, proposed in open_pull_requests(asked):
        if change.done_in(proposed):
            return url, str(proposed.head)
    return None


def open_pull_requests(asked: Asked) -> Iterator[tuple[str, Target]]:
    """The address of each open pull request, and what the repo would hold with it."""
    with hub_failures(asked):
        pull_requests = persist(
            lambda: list(
                asked.api.get_repo_discussions(
                    asked.repo, discussion_type="pull_request", discussion_status="open"
                )
            )
        )
    for one in pull_requests:
        yield one.url, look(asked, f"refs/pr/{one.num}")


def _left_by_former_merge(asked: Asked, target: Target) -> set[str]:
    """The files that the merge now on the Hub says it left there."""
    try:
        lock = json.loads(read_text(asked, target, LOCK) or "")
    except ValueError:
        return set()
    outputs = lock.get("outputs") if isinstance(lock, dict) else None
    return set(outputs) if isinstance(outputs, dict) else set()


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


SAMPLE_BYTES = 512  # the Hub looks at a file's beginning to tell how it is kept


def send(asked: Asked, landing: Landing, file: Path, sha256: str) -> CommitOperationAdd:
    """Bring a file of weights to the repo's large-file storage; the commit still has to name it.

    What the storage has is not sent again.

    Args:
        asked: of the repo, which exists.
        landing: of the commit that will name it.
        file: its name is its path in the repo.
        sha256: 64 hex digits, as it was computed when the file was written.

    Raises:
        PublishError: it cannot be sent, or the repo keeps weights as text.
    """
    addition = CommitOperationAdd(file.name, file)
    addition.upload_info.sha256 = bytes.fromhex(sha256)
    preupload(asked, [addition], landing)
    _require_large(asked, addition)
    return addition


def recall(
    asked: Asked, landing: Landing, name: str, n_bytes: int, sha256: str
) -> CommitOperationAdd | None:
    """A file that was sent before and is no longer here; None where the storage has it no more.

    Args:
        asked: of the repo, which exists.
        landing: of the commit that will name it.
        name: its path in the repo.
        n_bytes: its size.
        sha256: 64 hex digits.

    Raises:
        PublishError: the Hub cannot be asked.
    """
    addition = CommitOperationAdd(name, b"")
    addition.path_or_fileobj = cast("BinaryIO", _Gone())
    addition.upload_info = UploadInfo(n_bytes, bytes(SAMPLE_BYTES), bytes.fromhex(sha256))
    try:
        preupload(asked, [addition], landing)
    except RuntimeError as error:  # how huggingface_hub wraps what goes wrong in an upload
        if not isinstance(error.__cause__, _GoneError):
            raise
        return None
    _require_large(asked, addition)
    return addition


def _require_large(asked: Asked, addition: CommitOperationAdd) -> None:
    if not addition._is_uploaded:  # nothing public tells it
        problem = f"it keeps `{addition.path_in_repo}` as a text and not as a large file"
        remedy = "Let its .gitattributes say `*.safetensors filter=lfs`, then run again."
        raise asked.failed(problem, remedy)


class _GoneError(Exception):
    """The storage asks for bytes that are no longer here."""


class _Gone(io.BufferedIOBase):
    """Stands for a file that is no longer here: it may be named, not read."""

    def tell(self) -> int:
        """Where reading would begin."""
        raise _GoneError
