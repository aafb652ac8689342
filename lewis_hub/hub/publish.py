"""Publishes a folder by one commit or pull request, or by none if nothing changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.display import to_html
from lewis_hub.errors import PublishError
from lewis_hub.hub.commit import (
    Additions,
    Change,
    Message,
    PushedCommit,
    commit,
    compare,
    head_moved,
    open_pull_request,
    open_pull_requests,
    upload,
)
from lewis_hub.hub.failures import HubRepo, hub_failures
from lewis_hub.hub.retries import retry
from lewis_hub.hub.target import Landing, Target, open_target, read_target
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Publication:
    """How a folder is published."""

    message: str
    description: str = ""
    landing: Landing = "commit"
    tag: str | None = None
    private: bool = False  # of a repo that is created
    expected_parent: str | None = (
        None  # commit sha of main that the caller compared with; None: any
    )


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
        repo_id: owner/name; created if it does not exist.
        publication: how it is published.
        advance: called with the bytes uploaded or found on the Hub; they sum to `folder_bytes`.
        sent: files of the model that were uploaded before and are no longer in the folder.

    Raises:
        PublishError: no model in the folder, no right to write, somebody else pushed in the
            meantime, or the Hub failed.
    """
    hub_repo = HubRepo(api, repo_id, error_type=PublishError)
    files, sent = _files(folder), sent or {}
    _require_model(folder, [*files, *sent])
    if publication.tag and publication.landing == "pull-request":
        remedy = "Tag it once it is merged, or push it as a commit."
        raise hub_repo.failed("a pull request has no commit on main to tag yet", remedy)
    target = open_repo(hub_repo, publication.landing, private=publication.private)
    change = compare(hub_repo, target, files, sent)
    _require_free_tag(hub_repo, change, publication.tag)
    if change.done_in(target):
        advance(folder_bytes(folder))
        return _published(hub_repo, PushedCommit(str(target.head)), publication.tag, changed=False)
    if publication.expected_parent not in {None, target.head}:
        raise head_moved(hub_repo, target.head)
    landing = publication.landing
    if landing == "pull-request" and (found := open_pull_request(hub_repo, change)):
        advance(folder_bytes(folder))
        return _published(hub_repo, PushedCommit(found[1], found[0]), None, changed=False)
    additions = upload(hub_repo, change, landing, advance)
    message = Message(publication.message, publication.description)
    landed = commit(hub_repo, change, additions, landing, message)
    return _published(hub_repo, landed, publication.tag, changed=True)


def proposals(api: HfApi, repo_id: str) -> Iterator[tuple[str, Target]]:
    """The address of each open pull request, and the state of the repo with it."""
    return open_pull_requests(HubRepo(api, repo_id, error_type=PublishError))


def publish_tag(api: HfApi, repo_id: str, landed: PushedCommit, tag: str | None) -> Published:
    """The result of a push whose commit exists already; adds the tag if it is missing.

    Raises:
        PublishError: the tag could not be made.
    """
    hub_repo = HubRepo(api, repo_id, error_type=PublishError)
    return _published(hub_repo, landed, tag, changed=False)


def matches_folder(api: HfApi, folder: Path, target: Target) -> bool:
    """Whether a repo has exactly the files of a folder.

    Raises:
        PublishError: the Hub failed, or a file is a link to outside of the folder.
    """
    hub_repo = HubRepo(api, target.repo, error_type=PublishError)
    return compare(hub_repo, target, _files(folder), {}).done_in(target)


def open_repo(hub_repo: HubRepo, landing: Landing, *, private: bool) -> Target:
    """The present state of the repo to push to; created if it does not exist.

    Args:
        hub_repo: the repo.
        landing: a commit needs the right to write to it.
        private: of a repo that is created.

    Raises:
        PublishError: no right to write.
    """
    target = open_target(hub_repo.api, hub_repo.name, landing)
    if target.head is None:
        with hub_failures(hub_repo):
            retry(lambda: hub_repo.api.create_repo(hub_repo.name, private=private, exist_ok=True))
        target = read_target(hub_repo)
    if target.head is None:
        remedy = f"Use a token that may ({hub_repo.api.endpoint}/settings/tokens), or another name."
        raise hub_repo.failed("it exists already and this token may not see it", remedy)
    return target


def folder_bytes(folder: Path) -> int:
    """The bytes that `publish` would push."""
    return sum(path.stat().st_size for path in _files(folder).values())


def _files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        part = path.relative_to(folder)
        hidden = any(piece.startswith(".") for piece in part.parts)
        if path.is_dir() or (hidden and part.parts[0] != ".eval_results"):
            continue
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            problem = f"`{part.as_posix()}` is a link to outside of the folder, or to nothing"
            raise PublishError(str(folder), problem, "Put the file itself in its place.")
        found[part.as_posix()] = path
    return found


def _require_model(folder: Path, paths: Sequence[str]) -> None:
    weights = any(path.endswith(".safetensors") for path in paths)
    if "config.json" not in paths or not weights:
        missing = ".safetensors file" if "config.json" in paths else "config.json"
        problem = f"there is no {missing} in it, so it is not a model's folder"
        raise PublishError(str(folder), problem, "Name the folder that `lewis-hub merge` wrote.")


def _require_free_tag(hub_repo: HubRepo, change: Change, tag: str | None) -> None:
    """Refuse a tag that exists on another commit, since a tag is never moved."""
    if tag is None:
        return
    with hub_failures(hub_repo):
        refs = retry(lambda: hub_repo.api.list_repo_refs(hub_repo.name))
    tagged = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    if tagged and not (tagged == change.target.head and change.done_in(change.target)):
        problem = f"tag `{tag}` is already on {tagged}; nothing was changed"
        raise hub_repo.failed(problem, "Choose another tag.")


def _published(
    hub_repo: HubRepo, landed: PushedCommit, tag: str | None, *, changed: bool
) -> Published:
    if tag is not None:
        _tag(hub_repo, landed.commit_sha, tag)
    return Published(
        repo=hub_repo.name,
        url=landed.pull_request_url or hub_repo.url,
        commit_sha=landed.commit_sha,
        commit_url=f"{hub_repo.url}/commit/{landed.commit_sha}",
        changed=changed,
        pull_request_url=landed.pull_request_url,
        tag=tag,
    )


def _tag(hub_repo: HubRepo, commit_sha: str, tag: str) -> None:
    try:
        with hub_failures(hub_repo):
            retry(
                lambda: hub_repo.api.create_tag(
                    hub_repo.name, tag=tag, revision=commit_sha, exist_ok=True
                )
            )
    except PublishError as error:
        problem = f"{commit_sha} is published, but tag `{tag}` is not on it: {error.problem}"
        raise PublishError(error.where, problem, error.remedy) from error
