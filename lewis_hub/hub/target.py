"""The repo that a merge is published to: the right to push, and its present files."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id
from pydantic import Field, TypeAdapter, ValidationError

from lewis_hub.display import shortened, some_of
from lewis_hub.hub.answers import Received, counted
from lewis_hub.hub.failures import HubRepo, call_hub, hub_failures, no_token, read_answer, retry
from lewis_hub.hub.fetch import read_file
from lewis_hub.hub.resolve import listed_files
from lewis_hub.hub.source import listed_sha

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi, ModelInfo


Landing = Literal["commit", "pull-request"]
MAIN = "main"
FORBIDDEN = 403
FINE_GRAINED, WRITE = "fineGrained", "repo.write"  # a role of tokens, and one of its permissions
MAX_PULL_REQUESTS = 200  # anybody can open any number


@dataclass(frozen=True)
class Target:
    """The state of a repo at one moment; `head` is None if the repo does not exist."""

    repo: str
    head: str | None  # commit sha of main
    digests: Mapping[str, str]  # path -> digest as `SourceFile` has it
    is_public: bool = True  # whether everybody may read it


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class _Author:
    name: str | None = None  # of a user who is deleted


@dataclass(frozen=True)
class _PullRequest:
    num: int
    author: _Author = field(default_factory=_Author)


@dataclass(frozen=True)
class _PullRequests:
    """A page of the list of pull requests."""

    discussions: Annotated[list[_PullRequest], Field(fail_fast=True)]
    start: int
    count: int  # on all pages


@dataclass(frozen=True)
class _Scope:
    entity: _Named
    permissions: Annotated[list[str], Field(fail_fast=True)]


@dataclass(frozen=True)
class _Scopes:
    scoped: Annotated[list[_Scope], Field(fail_fast=True)]


@dataclass(frozen=True)
class _AccessToken:
    role: str | None = None
    scopes: Annotated[Any, Field(validation_alias="fineGrained")] = None


@dataclass(frozen=True)
class _Auth:
    access_token: Annotated[_AccessToken | None, Field(validation_alias="accessToken")] = None


@dataclass(frozen=True)
class Account:
    """Who signs in by a token."""

    name: str
    orgs: Annotated[list[_Named], Field(fail_fast=True)] = field(default_factory=list)
    auth: _Auth = field(default_factory=_Auth)

    @property
    def only_reads(self) -> bool:
        """Whether the token may write nothing."""
        return self.auth.access_token is not None and self.auth.access_token.role == "read"

    @property
    def namespaces(self) -> list[str]:
        """The user and their organisations; `*`, of the embedded Hub's first user, is any."""
        return [self.name, *(organisation.name for organisation in self.orgs)]

    def owns(self, repo: str) -> bool:
        """Whether a repo is in one of the namespaces."""
        return not {"*", repo.partition("/")[0]}.isdisjoint(self.namespaces)

    def may_make(self, repo: str) -> bool:
        """Whether the token may make a repo of this name, as far as it says."""
        token = self.auth.access_token
        if token is None or token.role != FINE_GRAINED:
            return self.owns(repo) and not self.only_reads
        try:
            scoped = SCOPES.validate_python(token.scopes).scoped
        except ValidationError:
            return False
        namespace = repo.partition("/")[0]
        return any(one.entity.name == namespace and WRITE in one.permissions for one in scoped)


DISCUSSIONS, ACCOUNT = TypeAdapter(_PullRequests), TypeAdapter(Account)
SCOPES = TypeAdapter(_Scopes)


def open_target(api: HfApi, repo: str, landing: Landing = "commit") -> Target:
    """Check, before hours of work, that a push to `repo` is allowed.

    Raises:
        PublishError: bad name, no token, a token that cannot write, or somebody else's namespace.
    """
    hub_repo = HubRepo.to_publish(api, repo)
    _require_name(hub_repo)
    target = read_target(hub_repo)
    _require_rights(hub_repo, target, landing)
    return target


def open_repo(hub_repo: HubRepo, landing: Landing, *, private: bool) -> Target:
    """The present state of the repo to push to; created, maybe `private`, if it does not exist.

    Raises:
        PublishError: no right to write.
    """
    target = open_target(hub_repo.api, hub_repo.name, landing)
    if target.head is None:
        create, name = hub_repo.api.create_repo, hub_repo.name
        call_hub(hub_repo, lambda: create(name, private=private, exist_ok=True))
        target = read_target(hub_repo)
    if target.head is None:
        remedy = f"Use a token that may ({hub_repo.api.endpoint}/settings/tokens), or another name."
        raise hub_repo.failed("it exists already and this token may not see it", remedy)
    return target


def read_target(hub_repo: HubRepo, revision: str = MAIN) -> Target:
    """The present state of the repo."""
    info = _described(hub_repo, revision)
    return _target(hub_repo, info) if info else Target(hub_repo.name, None, {})


def _described(hub_repo: HubRepo, revision: str) -> ModelInfo | None:
    """The Hub's description of the repo; None if it does not exist."""
    with hub_failures(hub_repo):
        try:
            return retry(
                lambda: hub_repo.api.model_info(
                    hub_repo.name, revision=revision, files_metadata=True, timeout=30
                )
            )
        except RepositoryNotFoundError:
            return None


def _target(hub_repo: HubRepo, info: ModelInfo) -> Target:
    with hub_failures(hub_repo):
        sha = listed_sha(info.sha)
        files = listed_files(hub_repo, sha, info.siblings or ())
    digests = {file.path: file.digest for file in files}
    is_public = not (getattr(info, "private", False) or getattr(info, "gated", False))
    return Target(hub_repo.name, sha, digests, is_public)


def will_be_public(hub_repo: HubRepo, target: Target, *, private: bool) -> bool:
    """Whether everybody may read the repo after a push, which makes it `private` or not.

    A repo that the token does not see counts as private, unless the token could make it: the push
    may have another token.
    """
    if target.head is not None:
        return target.is_public
    if private or hub_repo.token is None or os.environ.get("HF_OIDC_RESOURCE"):
        return False
    return account(hub_repo).may_make(hub_repo.name)


def open_pull_requests(
    hub_repo: HubRepo, author: str | None = None, paths: Collection[str] | None = None
) -> Iterator[tuple[str, Target]]:
    """The address of each of the newest open pull requests, and the state of the repo with it.

    Anybody can open one: of a pull request that was not compared file by file, ask its `author`.
    One with files beside `paths` is left out before they are listed: there may be very many. The
    oldest are left out if the answers on the others have together more than a list may have.
    """
    n_found, received = 0, Received()
    for page in range(MAX_PULL_REQUESTS):
        with counted(received):
            listed = _pull_requests(hub_repo, page, author)
        for one in listed.discussions[: MAX_PULL_REQUESTS - n_found]:
            if received.exceeded:
                return
            if author in (None, one.author.name):
                with counted(received):
                    proposed = _proposed(hub_repo, one, paths)
                if proposed:
                    yield f"{hub_repo.url}/discussions/{one.num}", proposed
        n_found += len(listed.discussions)
        is_last = listed.start + len(listed.discussions) >= listed.count
        if is_last or not listed.discussions or n_found >= MAX_PULL_REQUESTS:
            return


def _proposed(
    hub_repo: HubRepo, pull_request: _PullRequest, paths: Collection[str] | None
) -> Target | None:
    """The state of the repo with a pull request; None if it has files beside `paths`."""
    info = _described(hub_repo, f"refs/pr/{pull_request.num}")
    return _target(hub_repo, info) if info and _has_only(info, paths) else None


def _has_only(info: ModelInfo, paths: Collection[str] | None) -> bool:
    """Whether a repo has no other files than `paths`, as far as it is described."""
    return paths is None or all(file.rfilename in paths for file in info.siblings or ())


def own_pull_requests(hub_repo: HubRepo) -> Iterator[tuple[str, Target]]:
    """Those of the token's user; none without a user, as with trusted publishing."""
    if hub_repo.token is None or os.environ.get("HF_OIDC_RESOURCE"):
        return iter(())
    return open_pull_requests(hub_repo, account(hub_repo).name)


def _pull_requests(hub_repo: HubRepo, page: int, author: str | None) -> _PullRequests:
    """A page of the list of open pull requests, the newest first; if named, those of an author.

    huggingface_hub's own loop over the pages does not end if the Hub always says that there are
    more.
    """
    api = hub_repo.api
    url = f"{api.endpoint}/api/models/{hub_repo.name}/discussions"
    asked: dict[str, str | int] = {"type": "pull_request", "status": "open", "p": page}
    asked |= {"author": author} if author else {}

    def ask() -> httpx2.Response:
        answer = get_session().get(url, headers=build_hf_headers(token=api.token), params=asked)
        hf_raise_for_status(answer)
        return answer

    return read_answer(hub_repo, DISCUSSIONS, call_hub(hub_repo, lambda: ask().json()))


def read_text(hub_repo: HubRepo, target: Target, path: str) -> str | None:
    """A small text file of the repo; None if it does not exist or is not text."""
    digest = target.digests.get(path)
    if digest is None:
        return None
    content = read_file(replace(hub_repo, revision=target.head), path, digest)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _require_name(hub_repo: HubRepo) -> None:
    try:
        validate_repo_id(hub_repo.name if "/" in hub_repo.name else "")
    except HFValidationError:
        remedy = "Write owner/name: letters, digits, `-`, `_`, `.`; no `--` and no `..`."
        raise hub_repo.failed("this is not the name of a repo", remedy) from None


def _require_rights(hub_repo: HubRepo, target: Target, landing: Landing) -> None:
    if resource := os.environ.get("HF_OIDC_RESOURCE"):
        _require_publisher(hub_repo, target, resource)  # such a token belongs to no user
        return
    if hub_repo.token is None:
        raise no_token(hub_repo)
    who = account(hub_repo)
    if who.only_reads:
        raise hub_repo.failed(
            "this token may only read",
            f"Make one with write access at {hub_repo.api.endpoint}/settings/tokens, then set"
            " HF_TOKEN to it or run `hf auth login`.",
        )
    if target.head is None:
        _require_membership(hub_repo, who)
    elif landing == "commit":
        _require_write(hub_repo, who.name)


def account(hub_repo: HubRepo) -> Account:
    """Who signs in by the token."""
    return read_answer(hub_repo, ACCOUNT, call_hub(hub_repo, lambda: hub_repo.api.whoami()))


def _require_publisher(hub_repo: HubRepo, target: Target, resource: str) -> None:
    """Trusted publishing pushes to one repo, which has to exist."""
    if resource != hub_repo.name:
        raise hub_repo.failed(
            f"HF_OIDC_RESOURCE lets this run write to {resource} alone",
            f"Publish there, or set HF_OIDC_RESOURCE to {hub_repo.name}.",
        )
    if target.head is None:
        raise hub_repo.failed(
            "there is no such repo, and without a stored token none can be made",
            f"Make it at {hub_repo.api.endpoint}/new, and name this workflow in its settings as a"
            " trusted publisher.",
        )


def _require_membership(hub_repo: HubRepo, who: Account) -> None:
    """A new repo needs a namespace of the user or of an organisation of theirs."""
    if not who.owns(hub_repo.name):
        namespace, _, name = hub_repo.name.partition("/")
        user = shortened(who.name)
        raise hub_repo.failed(
            f"`{user}` may not make a repo under `{namespace}`",
            f"This token's namespaces are {some_of(who.namespaces)}: push to"
            f" {user}/{name}, or use a token of a member of `{namespace}`.",
        )


def _require_write(hub_repo: HubRepo, name: str) -> None:
    name = shortened(name)
    with hub_failures(hub_repo):
        try:
            retry(lambda: hub_repo.api.auth_check(hub_repo.name, write=True))
        except HfHubHTTPError as error:
            if error.response.status_code != FORBIDDEN:
                raise
            own = f"{name}/{hub_repo.name.partition('/')[2]}"
            raise hub_repo.failed(
                f"`{name}` may not push to it",
                "Propose the change instead: `--as pull-request`. Or push to a repo of your own,"
                f" such as {own}.",
            ) from error
