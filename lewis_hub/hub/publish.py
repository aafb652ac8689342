"""A finished folder -> one commit, one pull request, or nothing because nothing changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.errors import PublishError
from lewis_hub.hub.commit import (
    Additions,
    Change,
    Landed,
    Message,
    commit,
    compare,
    open_pull_request,
    open_pull_requests,
    overtaken,
    upload,
)
from lewis_hub.hub.failures import Asked, hub_failures
from lewis_hub.hub.retries import persist
from lewis_hub.hub.target import Landing, Target, look, open_target
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Publication:
    """How a folder is to land."""

    message: str
    description: str = ""
    landing: Landing = "commit"
    tag: str | None = None
    private: bool = False  # of a repo that is created
    expected_parent: str | None = None  # main's commit sha as the caller saw it; None: any


@dataclass(frozen=True)
class Published:
    """What a push left on the Hub."""

    repo: str
    url: str  # the model's page, or the pull request's
    commit_sha: str
    commit_url: str
    changed: bool  # False: all of it was there already, and no commit was made
    pull_request_url: str | None = None
    tag: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For the document of `--json`."""
        return {
            "status": "published" if self.changed else "unchanged",
            "repo": self.repo,
            "commit": self.commit_sha,
            "url": self.url,
            "commit_url": self.commit_url,
            "pull_request": self.pull_request_url,
            "tag": self.tag,
        }


def publish(
    api: HfApi,
    folder: Path,
    repo_id: str,
    publication: Publication,
    advance: Advance,
    sent: Additions | None = None,
) -> Published:
    """Push a merged model; on any failure a rerun completes.

    The repo is then as it was; where the tag alone could not be made, which comes last, the error
    says so.

    Args:
        api: whose endpoint and token are used.
        folder: the model; hidden files stay here.
        repo_id: owner/name; created if it is not there.
        publication: how it lands.
        advance: called with the bytes uploaded or found there already, in all `folder_bytes`.
        sent: files that belong to the model, were sent ahead and are in the folder no more.

    Raises:
        PublishError: no model in the folder, no right to write, somebody pushed meanwhile, or
            the Hub failed.
    """
    asked = Asked(api, repo_id, kind=PublishError)
    files, sent = _files(folder), sent or {}
    _require_model(folder, [*files, *sent])
    if publication.tag and publication.landing == "pull-request":
        remedy = "Tag it once it is merged, or push it as a commit."
        raise asked.failed("a pull request has no commit on main to tag yet", remedy)
    target = open_repo(asked, publication.landing, private=publication.private)
    change = compare(asked, target, files, sent)
    _require_free_tag(asked, change, publication.tag)
    if change.done_in(target):
        advance(folder_bytes(folder))
        return _published(asked, Landed(str(target.head)), publication.tag, changed=False)
    if publication.expected_parent not in {None, target.head}:
        raise overtaken(asked, target.head)
    landing = publication.landing
    if landing == "pull-request" and (found := open_pull_request(asked, change)):
        advance(folder_bytes(folder))
        return _published(asked, Landed(found[1], found[0]), None, changed=False)
    additions = upload(asked, change, landing, advance)
    message = Message(publication.message, publication.description)
    landed = commit(asked, change, additions, landing, message)
    return _published(asked, landed, publication.tag, changed=True)


def proposals(api: HfApi, repo_id: str) -> Iterator[tuple[str, Target]]:
    """The address of each open pull request, and what the repo would hold with it."""
    return open_pull_requests(Asked(api, repo_id, kind=PublishError))


def keep(api: HfApi, repo_id: str, landed: Landed, tag: str | None) -> Published:
    """What a push leaves that finds all of it there: no commit, but the tag if it is missing.

    Raises:
        PublishError: the tag could not be made.
    """
    asked = Asked(api, repo_id, kind=PublishError)
    return _published(asked, landed, tag, changed=False)


def holds(api: HfApi, folder: Path, target: Target) -> bool:
    """Whether a repo, as it was seen, holds just the files of a folder.

    Raises:
        PublishError: the Hub cannot be asked, or a file is a link to outside.
    """
    asked = Asked(api, target.repo, kind=PublishError)
    return compare(asked, target, _files(folder), {}).done_in(target)


def open_repo(asked: Asked, landing: Landing, *, private: bool) -> Target:
    """The repo to push to as it is now; created if it is not there.

    Args:
        asked: of the repo.
        landing: what the right to write is needed for.
        private: of a repo that is created.

    Raises:
        PublishError: no right to write.
    """
    target = open_target(asked.api, asked.repo, landing)
    if target.head is None:
        with hub_failures(asked):
            persist(lambda: asked.api.create_repo(asked.repo, private=private, exist_ok=True))
        target = look(asked)
    if target.head is None:
        remedy = f"Use a token that may ({asked.api.endpoint}/settings/tokens), or another name."
        raise asked.failed("it exists already and this token may not see it", remedy)
    return target


def folder_bytes(folder: Path) -> int:
    """The size of what `publish` would push."""
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


def _require_free_tag(asked: Asked, change: Change, tag: str | None) -> None:
    """A tag is never moved; one that is where it would go is fine."""
    if tag is None:
        return
    with hub_failures(asked):
        refs = persist(lambda: asked.api.list_repo_refs(asked.repo))
    there = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    if there and not (there == change.target.head and change.done_in(change.target)):
        problem = f"tag `{tag}` is already on {there}; nothing was changed"
        raise asked.failed(problem, "Choose another tag.")


def _published(asked: Asked, landed: Landed, tag: str | None, *, changed: bool) -> Published:
    if tag is not None:
        _tag(asked, landed.commit_sha, tag)
    return Published(
        repo=asked.repo,
        url=landed.pull_request_url or asked.url,
        commit_sha=landed.commit_sha,
        commit_url=f"{asked.url}/commit/{landed.commit_sha}",
        changed=changed,
        pull_request_url=landed.pull_request_url,
        tag=tag,
    )


def _tag(asked: Asked, commit_sha: str, tag: str) -> None:
    try:
        with hub_failures(asked):
            persist(
                lambda: asked.api.create_tag(
                    asked.repo, tag=tag, revision=commit_sha, exist_ok=True
                )
            )
    except PublishError as error:
        problem = f"{commit_sha} is published, but tag `{tag}` is not on it: {error.problem}"
        raise PublishError(error.where, problem, error.remedy) from error
