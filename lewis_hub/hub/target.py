"""Where a merge goes: whether this token may push there, and what lies there now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from lewis_hub.errors import PublishError
from lewis_hub.hub.failures import Asked, hub_failures, no_token
from lewis_hub.hub.retries import persist

if TYPE_CHECKING:
    from huggingface_hub import HfApi


Landing = Literal["commit", "pull-request"]
MAIN = "main"
FORBIDDEN = 403


@dataclass(frozen=True)
class Target:
    """A repo as it was seen once; `head` None: it does not exist yet."""

    repo: str
    head: str | None  # commit sha of main
    digests: Mapping[str, str]  # path -> digest as `SourceFile` has it


def open_target(api: HfApi, repo: str, landing: Landing = "commit") -> Target:
    """Make sure, before hours of work, that a push to `repo` can end well.

    Raises:
        PublishError: bad name, no token, a token that cannot write, or somebody else's namespace.
    """
    asked = Asked(api, repo, kind=PublishError)
    _require_name(asked)
    target = look(asked)
    _require_rights(asked, target, landing)
    return target


def look(asked: Asked, revision: str = MAIN) -> Target:
    """What lies in the repo now."""
    with hub_failures(asked):
        try:
            info = persist(
                lambda: asked.api.model_info(
                    asked.repo, revision=revision, files_metadata=True, timeout=30
                )
            )
        except RepositoryNotFoundError:
            return Target(asked.repo, None, {})
    digests = {
        file.rfilename: f"sha256:{file.lfs.sha256}" if file.lfs else f"git-sha1:{file.blob_id}"
        for file in info.siblings or ()
    }
    return Target(asked.repo, info.sha, digests)


def read_text(asked: Asked, target: Target, path: str) -> str | None:
    """A small text file of the repo as it was seen; None where it has none, or no text."""
    if path not in target.digests:
        return None
    with hub_failures(asked):
        file = persist(
            lambda: hf_hub_download(
                asked.repo,
                path,
                revision=target.head,
                endpoint=asked.api.endpoint,
                token=asked.api.token,
            )
        )
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _require_name(asked: Asked) -> None:
    try:
        validate_repo_id(asked.repo)
    except HFValidationError:
        well_formed = False
    else:
        well_formed = "/" in asked.repo
    if not well_formed:
        remedy = "Write owner/name: letters, digits, `-`, `_`, `.`; no `--` and no `..`."
        raise asked.failed("this is not the name of a repo", remedy)


def _require_rights(asked: Asked, target: Target, landing: Landing) -> None:
    if resource := os.environ.get("HF_OIDC_RESOURCE"):
        _require_publisher(asked, target, resource)  # the Hub tells nobody's name
        return
    if asked.token is None:
        raise no_token(asked)
    with hub_failures(asked):
        who = persist(lambda: asked.api.whoami())
    if _role(who) == "read":
        raise asked.failed(
            "this token may only read",
            f"Make one with write access at {asked.api.endpoint}/settings/tokens, then set"
            " HF_TOKEN to it or run `hf auth login`.",
        )
    if target.head is None:
        _require_membership(asked, who)
    elif landing == "commit":
        _require_write(asked, who["name"])


def _require_publisher(asked: Asked, target: Target, resource: str) -> None:
    """Without a stored token a push goes to one repo, which has to be there."""
    if resource != asked.repo:
        raise asked.failed(
            f"HF_OIDC_RESOURCE lets this run write to {resource} alone",
            f"Publish there, or set HF_OIDC_RESOURCE to {asked.repo}.",
        )
    if target.head is None:
        raise asked.failed(
            "there is no such repo, and without a stored token none can be made",
            f"Make it at {asked.api.endpoint}/new, and name this workflow in its settings as a"
            " trusted publisher.",
        )


def _require_membership(asked: Asked, who: Mapping[str, Any]) -> None:
    """A new repo needs a namespace that is the user's or an organisation's of theirs."""
    namespaces = [who["name"], *(organisation["name"] for organisation in who.get("orgs", ()))]
    namespace, _, name = asked.repo.partition("/")
    if namespace not in namespaces and "*" not in namespaces:  # `*`: the embedded Hub's first user
        raise asked.failed(
            f"`{who['name']}` may not make a repo under `{namespace}`",
            f"This token's namespaces are {', '.join(namespaces)}: push to"
            f" {who['name']}/{name}, or use a token of a member of `{namespace}`.",
        )


def _require_write(asked: Asked, name: str) -> None:
    with hub_failures(asked):
        try:
            persist(lambda: asked.api.auth_check(asked.repo, write=True))
        except HfHubHTTPError as error:
            if error.response.status_code != FORBIDDEN:
                raise
            own = f"{name}/{asked.repo.partition('/')[2]}"
            raise asked.failed(
                f"`{name}` may not push to it",
                "Propose the change instead: `--as pull-request`. Or push to a repo of your own,"
                f" such as {own}.",
            ) from error


def _role(who: Mapping[str, Any]) -> str | None:
    token = who.get("auth", {}).get("accessToken") or {}
    role: str | None = token.get("role")
    return role
