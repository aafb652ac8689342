"""Makes one commit from a change; after a lost answer it checks whether the commit exists."""

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
from lewis_hub.hub.failures import HubRepo, hub_failures
from lewis_hub.hub.resolve import digests_of, git_sha1_of
from lewis_hub.hub.retries import PAUSES_S, is_transient, retry, retry_after_s
from lewis_hub.hub.target import MAIN, Landing, Target, read_target, read_text
from lewis_hub.progress import Advance

Additions = Mapping[str, CommitOperationAdd]

LOCK = "lewis/lock.json"
SIGNATURE = "model.sig"  # of the previous merge: it does not hold for this one
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
SAMPLE_BYTES = 512  # the Hub decides by a file's first bytes how to store it
ALONE_BYTES = 8 << 20  # larger files are uploaded one by one, so that progress shows
OVERTAKEN = {404, 412}  # a file to delete is gone already; the parent is not main any more


@dataclass(frozen=True)
class Change:
    """The content of one commit: it brings `target` to the files of a folder and uploaded files.

    Attributes:
        files: all of the folder; path in the repo -> file.
        sent: uploaded already, in no commit yet, and deleted here.
        digests: of all of them.
        stale: files of the previous merge that this one does not have.
    """

    target: Target
    files: Mapping[str, Path]
    sent: Additions
    digests: Mapping[str, str]
    stale: Sequence[str]

    @property
    def added(self) -> list[str]:
        """Paths that are new or have other bytes."""
        present = self.target.digests
        return [path for path in self.digests if present.get(path) != self.digests[path]]

    def done_in(self, target: Target) -> bool:
        """Whether a repo has exactly these files already."""
        same = all(self._equal(path, target.digests.get(path)) for path in self.digests)
        return same and not any(path in target.digests for path in self.stale)

    def _equal(self, path: str, present: str | None) -> bool:
        hashed = self.digests[path].startswith("sha256:") and path in self.files
        if present and present.startswith("git-sha1:") and hashed:
            return present == git_sha1_of(self.files[path])
        return present == self.digests[path]


def compare(
    hub_repo: HubRepo, target: Target, files: Mapping[str, Path], sent: Additions
) -> Change:
    """Find the differences; a file that the Hub stores in git is compared by its git sha1."""
    in_git = [path for path in files if target.digests.get(path, "").startswith("git-sha1:")]
    others = [path for path in files if path not in in_git]
    digests = dict(zip(others, digests_of([files[path] for path in others]), strict=True))
    digests |= {path: git_sha1_of(files[path]) for path in in_git}
    digests |= {path: f"sha256:{a.upload_info.sha256.hex()}" for path, a in sent.items()}
    ours = {path for path in target.digests if WEIGHTS.fullmatch(path) or path == SIGNATURE}
    ours |= _outputs_of_previous_merge(hub_repo, target) & set(target.digests)
    return Change(target, files, sent, digests, sorted(ours - set(digests)))


def open_pull_request(hub_repo: HubRepo, change: Change) -> tuple[str, str] | None:
    """The address and commit sha of an open pull request with exactly this change."""
    for url, proposed in open_pull_requests(hub_repo):
        if change.done_in(proposed):
            return url, str(proposed.head)
    return None


def open_pull_requests(hub_repo: HubRepo) -> Iterator[tuple[str, Target]]:
    """The address of each open pull request, and the state of the repo with it."""
    with hub_failures(hub_repo):
        pull_requests = retry(
            lambda: list(
                hub_repo.api.get_repo_discussions(
                    hub_repo.name, discussion_type="pull_request", discussion_status="open"
                )
            )
        )
    for pull_request in pull_requests:
        yield pull_request.url, read_target(hub_repo, f"refs/pr/{pull_request.num}")


def _outputs_of_previous_merge(hub_repo: HubRepo, target: Target) -> set[str]:
    """The output files of the published merge, by its lock."""
    try:
        lock = json.loads(read_text(hub_repo, target, LOCK) or "")
    except ValueError:
        return set()
    outputs = lock.get("outputs") if isinstance(lock, dict) else None
    return set(outputs) if isinstance(outputs, dict) else set()


@dataclass(frozen=True)
class Message:
    """Title and description of a commit."""

    title: str
    description: str


@dataclass(frozen=True)
class PushedCommit:
    """A commit that exists on the Hub."""

    commit_sha: str
    pull_request_url: str | None = None


def upload(hub_repo: HubRepo, change: Change, landing: Landing, advance: Advance) -> Additions:
    """Upload the large files of a change; they belong to no commit yet.

    Files that an interrupted push uploaded, and those of `change.sent`, are not uploaded again.
    """
    for path, file in change.files.items():
        if path not in change.added:
            advance(file.stat().st_size)
    new = [path for path in change.added if path in change.files]
    additions = {path: CommitOperationAdd(path, change.files[path]) for path in new}
    large = {p: a for p, a in additions.items() if a.upload_info.size >= ALONE_BYTES}
    small = {p: a for p, a in additions.items() if p not in large}
    for batch in ([list(small.values())] if small else []) + [
        [addition] for addition in large.values()
    ]:
        _preupload_files(hub_repo, batch, landing)
        advance(sum(addition.upload_info.size for addition in batch))
    return additions | {path: change.sent[path] for path in change.added if path in change.sent}


def _preupload_files(
    hub_repo: HubRepo, batch: Sequence[CommitOperationAdd], landing: Landing
) -> None:
    """Upload files that the Hub stores as large files."""
    disable_progress_bars()  # only the command line prints
    with hub_failures(hub_repo):
        retry(
            lambda: hub_repo.api.preupload_lfs_files(
                hub_repo.name,
                batch,
                revision=MAIN,
                create_pr=landing == "pull-request",
                free_memory=False,
            )
        )


def commit(
    hub_repo: HubRepo, change: Change, additions: Additions, landing: Landing, message: Message
) -> PushedCommit:
    """Make the commit; its parent has to be the commit that was compared with.

    Raises:
        PublishError: somebody else pushed in the meantime, or the Hub failed; there is no commit.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            made = _send(hub_repo, change, additions, landing, message)
        except (HfHubHTTPError, httpx2.TransportError) as error:
            stale = isinstance(error, HfHubHTTPError) and error.response.status_code in OVERTAKEN
            if not stale and not is_transient(error):
                with hub_failures(hub_repo):
                    raise
            if not stale:
                time.sleep(retry_after_s(error) or pause_s or 0)
            landed = _find_pushed(hub_repo, change, landing)
            if landed:
                return landed
            if pause_s is None or stale:
                with hub_failures(hub_repo):
                    raise
        except ValueError as error:  # the Hub checks the card itself
            problem = " ".join(str(error).split()).rstrip(".")
            raise hub_repo.failed(problem, "Repair README.md, then push again.") from error
        else:
            return PushedCommit(str(made.oid), made.pr_url)
    raise AssertionError("the last attempt returns or raises")


def head_moved(hub_repo: HubRepo, head: str | None) -> PublishError | SourceError:
    """The error when main is no longer the commit that was compared with."""
    return hub_repo.failed(
        f"somebody pushed {head} meanwhile; nothing was changed",
        f"Look at {hub_repo.url}/commits/{MAIN}, then run the same command again.",
    )


def _send(
    hub_repo: HubRepo, change: Change, additions: Additions, landing: Landing, message: Message
) -> CommitInfo:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warnings while validating metadata")  # a bare card
        return hub_repo.api.create_commit(
            hub_repo.name,
            [*additions.values(), *map(CommitOperationDelete, change.stale)],
            commit_message=message.title,
            commit_description=message.description,
            revision=MAIN,
            parent_commit=change.target.head,
            create_pr=landing == "pull-request",
        )


def _find_pushed(hub_repo: HubRepo, change: Change, landing: Landing) -> PushedCommit | None:
    """Find the commit on the Hub if the answer to its request was lost.

    Raises:
        PublishError: main has another new commit.
    """
    now = read_target(hub_repo)
    if landing == "pull-request":
        found = open_pull_request(hub_repo, change)
        return PushedCommit(found[1], found[0]) if found else None
    if change.done_in(now):
        return PushedCommit(str(now.head))
    if now.head != change.target.head:
        raise head_moved(hub_repo, now.head)
    return None


def preupload(hub_repo: HubRepo, landing: Landing, file: Path, sha256: str) -> CommitOperationAdd:
    """Upload a file of weights, unless the Hub has it; a later commit has to add it.

    Args:
        hub_repo: a repo that exists.
        landing: of the later commit.
        file: its name is its path in the repo.
        sha256: 64 hex digits, computed when the file was written.

    Raises:
        PublishError: the upload failed, or the repo stores weights as text.
    """
    addition = CommitOperationAdd(file.name, file)
    addition.upload_info.sha256 = bytes.fromhex(sha256)
    _preupload_files(hub_repo, [addition], landing)
    _require_large(hub_repo, addition)
    return addition


def find_uploaded(
    hub_repo: HubRepo, landing: Landing, name: str, n_bytes: int, sha256: str
) -> CommitOperationAdd | None:
    """A file that was uploaded and deleted here; None if the Hub no longer has it.

    Args:
        hub_repo: a repo that exists.
        landing: of the later commit.
        name: its path in the repo.
        n_bytes: its size.
        sha256: 64 hex digits.

    Raises:
        PublishError: the Hub failed.
    """
    addition = CommitOperationAdd(name, b"")
    addition.path_or_fileobj = cast("BinaryIO", _DeletedFile())
    addition.upload_info = UploadInfo(n_bytes, bytes(SAMPLE_BYTES), bytes.fromhex(sha256))
    try:
        _preupload_files(hub_repo, [addition], landing)
    except RuntimeError as error:  # huggingface_hub wraps the errors of an upload
        if not isinstance(error.__cause__, _DeletedFileError):
            raise
        return None
    _require_large(hub_repo, addition)
    return addition


def _require_large(hub_repo: HubRepo, addition: CommitOperationAdd) -> None:
    if not addition._is_uploaded:  # there is no public attribute
        problem = f"it stores `{addition.path_in_repo}` as text and not as a large file"
        remedy = "Let its .gitattributes say `*.safetensors filter=lfs`, then run again."
        raise hub_repo.failed(problem, remedy)


class _DeletedFileError(Exception):
    """The Hub requests the bytes of a file that was deleted here."""


class _DeletedFile(io.BufferedIOBase):
    """Stands for a file that was deleted here; reading it is an error."""

    def tell(self) -> int:
        """The first call of a reader."""
        raise _DeletedFileError
