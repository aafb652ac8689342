"""Publishes a folder by one commit or pull request, or by none if nothing changed.

After a lost answer it checks whether the commit exists.
"""

from __future__ import annotations

import io
import json
import re
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError
from huggingface_hub.lfs import UploadInfo
from huggingface_hub.utils import disable_progress_bars

from lewis_hub.display import Advance, to_html
from lewis_hub.documents import read_json
from lewis_hub.errors import PublishError, SourceError
from lewis_hub.files import require_inside, visible_files
from lewis_hub.hub.cache import MAX_SMALL_BYTES
from lewis_hub.hub.digests import digests_of, git_sha1_of
from lewis_hub.hub.failures import (
    MISREAD,
    PAUSES_S,
    HubRepo,
    asks_for_long_pause,
    call_hub,
    hub_failures,
    is_transient,
    retry_after_s,
)
from lewis_hub.hub.source import listed_sha
from lewis_hub.hub.tags import put_tag, require_commit, require_free
from lewis_hub.hub.target import (
    MAIN,
    Landing,
    Target,
    open_pull_requests,
    open_repo,
    read_target,
    read_text,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Additions = Mapping[str, CommitOperationAdd]

LOCK = "lewis/lock.json"
SIGNATURE = "model.sig"  # of the previous merge: it does not hold for this one
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
SAMPLE_BYTES = 512  # the Hub decides by a file's first bytes how to store it
ALONE_BYTES = 8 << 20  # larger files are uploaded one by one, so that progress shows
UNREADABLE = (json.JSONDecodeError, FileMetadataError, *MISREAD)  # of the answer to a commit
OVERTAKEN = {404, 412}  # a file to delete is gone already; the parent is not main any more
NO_REPO = ""  # in place of a commit: the repo did not exist
NEW_REPO = {".gitattributes"}  # the files that the Hub gives a new repo


@dataclass(frozen=True)
class Publication:
    """How a folder is published."""

    message: str  # the commit's title
    description: str = ""
    landing: Landing = "commit"
    tag: str | None = None
    private: bool = False  # of a repo that is created
    expected_parent: str | None = None  # sha of main that was compared with, or NO_REPO; None: any
    former: Collection[str] = ()  # files of the previous merge that its lock does not list


@dataclass(frozen=True)
class Published:
    """The result of a push."""

    repo: str
    url: str  # the model's page, or the pull request's
    commit_sha: str
    commit_url: str
    changed: bool  # False: the Hub had all files already, and no commit was made
    pull_request_url: str | None = None
    tag: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {
            "status": "published" if self.changed else "unchanged",
            "repo": self.repo,
            "commit": self.commit_sha,
            "url": self.url,
            "commit_url": self.commit_url,
            "pull_request": self.pull_request_url,
            "tag": self.tag,
        }

    def __repr__(self) -> str:
        if not self.changed:
            return f"Nothing to publish: {self.url} already holds this merge"
        done = "Proposed" if self.pull_request_url else "Published"
        return f"{done} {self.url} ({self.commit_url})"

    def _repr_html_(self) -> str:
        return to_html(repr(self))


@dataclass(frozen=True)
class PushedCommit:
    """A commit that exists on the Hub."""

    commit_sha: str
    pull_request_url: str | None = None


@dataclass(frozen=True)
class Change:
    """The content of one commit: it brings `target` to the files of a folder and uploaded files."""

    target: Target
    files: Mapping[str, Path]  # all of the folder, by path in the repo
    sent: Additions  # uploaded already, in no commit yet, and deleted here
    digests: Mapping[str, str]  # of all of them
    stale: Sequence[str]  # files of the previous merge that this one does not have

    @property
    def added(self) -> list[str]:
        """Paths that are new or have other bytes."""
        present = self.target.digests
        return [path for path in self.digests if present.get(path) != self.digests[path]]

    def done_in(self, target: Target) -> bool:
        """Whether a repo has exactly these files already."""
        same = all(self._equal(path, target.digests.get(path)) for path in self.digests)
        return same and not any(path in target.digests for path in self.stale)

    def is_all_of(self, target: Target) -> bool:
        """Whether the other files of a repo are as they were; a stranger may propose more."""
        others = self.target.digests.keys() | target.digests.keys()
        others -= {*self.digests, *self.stale}
        return all(self.target.digests.get(path) == target.digests.get(path) for path in others)

    def _equal(self, path: str, present: str | None) -> bool:
        hashed = self.digests[path].startswith("sha256:") and path in self.files
        if present and present.startswith("git-sha1:") and hashed:
            return present == git_sha1_of(self.files[path])
        return present == self.digests[path]


def publish(
    api: HfApi,
    folder: Path,
    repo_id: str,
    publication: Publication,
    advance: Advance,
    sent: Additions | None = None,
) -> Published:
    """Push a merged model.

    After a failure the repo is unchanged and a rerun completes the push. Only if the tag, which is
    the last step, fails, the commit exists; the error says so.

    Args:
        api: whose endpoint and token are used.
        folder: the model; hidden files are not pushed.
        repo_id: created if it does not exist.
        publication: how it is published.
        advance: called with the bytes uploaded or found on the Hub; they sum to `folder_bytes`.
        sent: files of the model that were uploaded before and are no longer in the folder.

    Raises:
        PublishError: no model in the folder, no right to write, somebody else pushed in the
            meantime, or the Hub failed.
    """
    hub_repo = HubRepo.to_publish(api, repo_id)
    files, sent = files_of(folder), sent or {}
    _require_model(folder, [*files, *sent])
    landing, tag = publication.landing, publication.tag
    require_commit(hub_repo, landing, tag)
    target = open_repo(hub_repo, landing, private=publication.private)
    change = _compare(hub_repo, target, files, sent, publication.former)
    found = PushedCommit(str(target.head)) if change.done_in(target) else None
    require_free(hub_repo, tag, found.commit_sha if found else None)
    if not found and not _is_expected(target, publication.expected_parent):
        raise _head_moved(hub_repo, target.head)
    if not found and landing == "pull-request":
        found = _proposed(hub_repo, change)
    if found:
        advance(folder_bytes(folder))
        return _published(hub_repo, found, tag, changed=False)
    additions = _upload(hub_repo, change, landing, advance)
    pushed = _commit(hub_repo, change, additions, publication)
    return _published(hub_repo, pushed, tag, changed=True)


def _is_expected(target: Target, parent: str | None) -> bool:
    """Whether nobody else has committed since main was looked at."""
    if parent == NO_REPO:
        return target.digests.keys() <= NEW_REPO
    return parent in {None, target.head}


def publish_tag(api: HfApi, repo_id: str, pushed: PushedCommit, tag: str | None) -> Published:
    """The result of a push whose commit exists already; adds the tag if it is missing.

    Raises:
        PublishError: the tag could not be made.
    """
    return _published(HubRepo.to_publish(api, repo_id), pushed, tag, changed=False)


def matches_folder(api: HfApi, folder: Path, target: Target) -> bool:
    """Whether a repo has exactly the files of a folder.

    Raises:
        PublishError: the Hub failed, or a file is a link to outside of the folder.
    """
    hub_repo = HubRepo.to_publish(api, target.repo)
    return _compare(hub_repo, target, files_of(folder), {}).done_in(target)


def folder_bytes(folder: Path) -> int:
    """The bytes that `publish` would push."""
    return sum(path.stat().st_size for path in files_of(folder).values())


def files_of(folder: Path) -> dict[str, Path]:
    """The files that `publish` pushes, by path; a link out of the folder is a PublishError."""
    shown = folder / ".eval_results"  # hidden, but part of a model's repo
    results = [path for path in shown.glob("*") if not path.is_dir()]
    for path in results:
        require_inside(folder, path, PublishError)
    found = sorted([*visible_files(folder, PublishError), *results])
    return {path.relative_to(folder).as_posix(): path for path in found}


def _require_model(folder: Path, paths: Sequence[str]) -> None:
    weights = any(path.endswith(".safetensors") for path in paths)
    if "config.json" not in paths or not weights:
        missing = ".safetensors file" if "config.json" in paths else "config.json"
        problem = f"there is no {missing} in it, so it is not a model's folder"
        raise PublishError(str(folder), problem, "Name the folder that `lewis-hub merge` wrote.")


def _compare(
    hub_repo: HubRepo,
    target: Target,
    files: Mapping[str, Path],
    sent: Additions,
    former: Collection[str] = (),
) -> Change:
    """Find the differences; a file that the Hub stores in git is compared by its git sha1."""
    in_git = [path for path in files if target.digests.get(path, "").startswith("git-sha1:")]
    others = [path for path in files if path not in in_git]
    digests = dict(zip(others, digests_of([files[path] for path in others]), strict=True))
    digests |= {path: git_sha1_of(files[path]) for path in in_git}
    digests |= {path: f"sha256:{a.upload_info.sha256.hex()}" for path, a in sent.items()}
    ours = {path for path in target.digests if WEIGHTS.fullmatch(path) or path == SIGNATURE}
    ours |= {*former, *_outputs_of_previous_merge(hub_repo, target)} & set(target.digests)
    return Change(target, files, sent, digests, sorted(ours - set(digests)))


def _outputs_of_previous_merge(hub_repo: HubRepo, target: Target) -> set[str]:
    """The output files of the published merge, by its lock."""
    try:
        lock = read_json(read_text(hub_repo, target, LOCK) or "")
    except ValueError:
        return set()
    outputs = lock.get("outputs") if isinstance(lock, dict) else None
    return set(outputs) if isinstance(outputs, dict) else set()


def _proposed(hub_repo: HubRepo, change: Change) -> PushedCommit | None:
    """The open pull request with exactly this change, whoever opened it."""
    paths = change.digests.keys() | change.target.digests.keys()
    for url, proposed in open_pull_requests(hub_repo, paths=paths):
        if change.done_in(proposed) and change.is_all_of(proposed):
            return PushedCommit(str(proposed.head), url)
    return None


def _published(
    hub_repo: HubRepo, pushed: PushedCommit, tag: str | None, *, changed: bool
) -> Published:
    sha = pushed.commit_sha
    if tag is not None:
        try:
            put_tag(hub_repo, tag, sha)
        except PublishError as error:
            problem = f"{sha} is published, but tag `{tag}` is not on it: {error.problem}"
            raise PublishError(error.where, problem, error.remedy) from error
    return Published(
        repo=hub_repo.name,
        url=pushed.pull_request_url or hub_repo.url,
        commit_sha=sha,
        commit_url=f"{hub_repo.url}/commit/{sha}",
        changed=changed,
        pull_request_url=pushed.pull_request_url,
        tag=tag,
    )


def _upload(hub_repo: HubRepo, change: Change, landing: Landing, advance: Advance) -> Additions:
    """Upload the large files of a change; they belong to no commit yet.

    Files that an interrupted push uploaded, and those of `change.sent`, are not uploaded again.

    Raises:
        PublishError: the upload failed, or the commit would have to have large files in it.
    """
    new = [path for path in change.added if path in change.files]
    advance(sum(f.stat().st_size for path, f in change.files.items() if path not in new))
    additions = {path: CommitOperationAdd(path, change.files[path]) for path in new}
    large = [[a] for a in additions.values() if a.upload_info.size >= ALONE_BYTES]
    small = [a for a in additions.values() if a.upload_info.size < ALONE_BYTES]
    for batch in [small, *large]:
        _preupload_files(hub_repo, batch, landing)
        advance(sum(addition.upload_info.size for addition in batch))
    as_text = [addition for addition in additions.values() if not addition._is_uploaded]
    if sum(addition.upload_info.size for addition in as_text) > MAX_SMALL_BYTES:
        _require_large(hub_repo, max(as_text, key=lambda addition: addition.upload_info.size))
    return additions | {path: change.sent[path] for path in change.added if path in change.sent}


def _preupload_files(
    hub_repo: HubRepo, batch: Sequence[CommitOperationAdd], landing: Landing
) -> None:
    """Upload files that the Hub stores as large files.

    Raises:
        PublishError: the repo ignores a file: huggingface_hub would leave it out of the commit.
    """
    if not batch:
        return
    disable_progress_bars()  # only the command line prints
    name, upload, proposes = hub_repo.name, hub_repo.api.preupload_lfs_files, landing != "commit"
    call_hub(
        hub_repo,
        lambda: upload(name, batch, revision=MAIN, create_pr=proposes, free_memory=False),
    )
    for addition in batch:
        if addition._should_ignore:  # there is no public attribute
            problem = f"its .gitignore ignores `{addition.path_in_repo}`; nothing was changed"
            raise hub_repo.failed(problem, "Let its .gitignore keep the file, then run again.")


def _commit(
    hub_repo: HubRepo, change: Change, additions: Additions, publication: Publication
) -> PushedCommit:
    """Make the commit; its parent has to be the commit that was compared with.

    Raises:
        PublishError: somebody else pushed in the meantime, or the Hub failed; there is no commit.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            made = _send(hub_repo, change, additions, publication)
        except (HfHubHTTPError, httpx2.RequestError, *UNREADABLE) as error:
            stale = isinstance(error, HfHubHTTPError) and error.response.status_code in OVERTAKEN
            # an answer that cannot be read, such as a page of a proxy: the commit may exist
            unread = not isinstance(error, HfHubHTTPError) and not is_transient(error)
            with hub_failures(hub_repo):
                if not stale and not unread and not is_transient(error):
                    raise
                last = stale or unread or pause_s is None or asks_for_long_pause(error)
                if not last:
                    time.sleep(retry_after_s(error) or pause_s or 0)
                if pushed := _find_pushed(hub_repo, change, publication.landing):
                    return pushed
                if last:
                    raise
        except ValueError as error:  # the Hub checks the card itself
            if pushed := _find_pushed(hub_repo, change, publication.landing):
                return pushed  # the answer to the commit could not be read
            problem = " ".join(str(error).split()).rstrip(".")
            raise hub_repo.failed(problem, "Repair README.md, then push again.") from error
        else:
            return made
    raise AssertionError("the last attempt returns or raises")


def _send(
    hub_repo: HubRepo, change: Change, additions: Additions, publication: Publication
) -> PushedCommit:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warnings while validating metadata")  # a bare card
        made = hub_repo.api.create_commit(
            hub_repo.name,
            [*additions.values(), *map(CommitOperationDelete, change.stale)],
            commit_message=publication.message,
            commit_description=publication.description,
            revision=MAIN,
            parent_commit=change.target.head,
            create_pr=publication.landing == "pull-request",
        )
    return PushedCommit(listed_sha(made.oid), made.pr_url)


def _find_pushed(hub_repo: HubRepo, change: Change, landing: Landing) -> PushedCommit | None:
    """Find the commit on the Hub if the answer to its request was lost.

    Raises:
        PublishError: main has another new commit.
    """
    if landing == "pull-request":
        return _proposed(hub_repo, change)
    now = read_target(hub_repo)
    if change.done_in(now):
        return PushedCommit(str(now.head))
    if now.head != change.target.head:
        raise _head_moved(hub_repo, now.head)
    return None


def _head_moved(hub_repo: HubRepo, head: str | None) -> PublishError | SourceError:
    """The error when main is no longer the commit that was compared with."""
    return hub_repo.failed(
        f"somebody pushed {head} meanwhile; nothing was changed",
        f"Look at {hub_repo.url}/commits/{MAIN}, then run the same command again.",
    )


def preupload(hub_repo: HubRepo, landing: Landing, file: Path, sha256: str) -> CommitOperationAdd:
    """Upload a file of weights, unless the repo has it; a later commit has to add it.

    Its name is its path in the repo, and `sha256` was computed when it was written.

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
    """A file that `preupload` sent and that was deleted here; None if the Hub no longer has it.

    Raises:
        PublishError: the Hub failed, or the repo stores weights as text.
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
        kind = PurePosixPath(addition.path_in_repo).suffix
        remedy = f"Let its .gitattributes say `*{kind} filter=lfs`, then run again."
        raise hub_repo.failed(problem, remedy)


class _DeletedFileError(Exception):
    """The Hub requests the bytes of a file that was deleted here."""


class _DeletedFile(io.BufferedIOBase):
    """Stands for a file that was deleted here; reading it is an error."""

    def tell(self) -> int:
        """The first call of a reader."""
        raise _DeletedFileError
