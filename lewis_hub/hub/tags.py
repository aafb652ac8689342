"""Tags on the commits of a merge: each is put on one commit, and never moved."""

from __future__ import annotations

from lewis_hub.hub.failures import HubRepo, call_hub
from lewis_hub.hub.target import Landing, Target


def tagged_commit(hub_repo: HubRepo, tag: str) -> str | None:
    """The commit that a tag is on."""
    refs = call_hub(hub_repo, lambda: hub_repo.api.list_repo_refs(hub_repo.name))
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def require_taggable(hub_repo: HubRepo, target: Target, landing: Landing, tag: str | None) -> None:
    """Refuse, before the work on a new commit, a tag that it could not get.

    Raises:
        PublishError: the tag is on a commit already, or a pull request is asked for.
    """
    require_commit(hub_repo, landing, tag)
    if target.head is not None:
        require_free(hub_repo, tag, None)


def require_commit(hub_repo: HubRepo, landing: Landing, tag: str | None) -> None:
    """Refuse a tag on a pull request."""
    if tag and landing == "pull-request":
        remedy = "Tag it once it is merged, or push it as a commit."
        raise hub_repo.failed("a pull request has no commit on main to tag yet", remedy)


def require_free(hub_repo: HubRepo, tag: str | None, sha: str | None) -> None:
    """Refuse a tag on another commit than `sha`; None: on any."""
    tagged = tagged_commit(hub_repo, tag) if tag else None
    if tagged not in (None, sha):
        problem = f"tag `{tag}` is already on {tagged}; nothing was changed"
        raise hub_repo.failed(problem, "Choose another tag.")


def put_tag(hub_repo: HubRepo, tag: str, sha: str) -> None:
    """Put a tag on a commit; somebody else may have put it on another one meanwhile."""
    name, create_tag = hub_repo.name, hub_repo.api.create_tag
    call_hub(hub_repo, lambda: create_tag(name, tag=tag, revision=sha, exist_ok=True))
    if (tagged := tagged_commit(hub_repo, tag)) != sha:
        raise hub_repo.failed(f"it is already on {tagged}", "Choose another tag.")
