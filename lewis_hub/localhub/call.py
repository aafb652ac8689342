"""A request to the embedded Hub: its caller, its repository and its parameters."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response

from lewis_hub.localhub.access import Grant, Refusal, identify
from lewis_hub.localhub.store import Commit, Repo, Store

if TYPE_CHECKING:
    from lewis_hub.localhub.hub import Hub


@dataclass(frozen=True)
class Call:
    """A request whose body has been read.

    Attributes:
        parts: the variable parts of the path by name, percent-decoded.
    """

    hub: Hub
    request: Request
    body: bytes
    grant: Grant | None
    parts: Mapping[str, str]

    @property
    def store(self) -> Store:
        """The Hub's repositories."""
        return self.hub.store

    @property
    def endpoint(self) -> str:
        """The Hub's address as the client spells it."""
        return str(self.request.base_url).rstrip("/")

    def json(self) -> dict[str, Any]:
        """The body, a JSON object."""
        try:
            document = json.loads(self.body or b"{}")
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise Refusal(400, "The body must be a JSON object")
        return document

    def flag(self, name: str) -> bool:
        """Whether a query parameter is true."""
        return self.request.query_params.get(name, "").lower() in ("1", "true")

    def not_found(self) -> Refusal:
        """The Hub's answer for a repository that is missing, or hidden from the caller."""
        if self.grant is None:
            return Refusal(401, "Invalid username or password.", "RepoNotFound")
        return Refusal(404, "Repository not found", "RepoNotFound")

    def seen_repo(self) -> Repo:
        """The repository of the path; a private one exists for its owners only."""
        repo = self.store.find(
            self.parts["kind"], f"{self.parts['namespace']}/{self.parts['name']}"
        )
        if repo is None or (repo.private and not self._owns(repo.id)):
            raise self.not_found()
        return repo

    def read_repo(self) -> Repo:
        """The repository of the path, if the caller may read its files."""
        repo = self.seen_repo()
        if not repo.gated or self._owns(repo.id):
            return repo
        restricted = f"Access to {repo.noun} {repo.id} is restricted"
        if self.grant is None:
            restricted += ". You must have access to it and be authenticated to access it."
            raise Refusal(401, f"{restricted} Please log in.", "GatedRepo")
        raise Refusal(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")

    def writer(self) -> Grant:
        """The caller, if their token may change anything anywhere."""
        if self.grant is None:
            raise Refusal(401, "Invalid username or password.")
        if self.grant.role != "write":
            problem = "This token has the role read, a token with the role write is needed"
            raise Refusal(403, problem)
        return self.grant

    def owner(self, where: str, noun: str) -> Grant:
        """The caller, if they may change a repository, or anything in a namespace."""
        grant = self.writer()
        if not grant.owns(where):
            rights = f"You don't have the rights to create a {noun} under the namespace"
            raise Refusal(403, f'{rights} "{where.partition("/")[0]}"')
        return grant

    def committer(self, repo: Repo) -> Grant:
        """The caller, if they may commit; anyone with a write token may to a pull request."""
        if self.flag("create_pr") or self.parts["revision"].startswith("refs/pr/"):
            return self.writer()
        return self.owner(repo.id, repo.noun)

    def _owns(self, where: str) -> bool:
        return self.grant is not None and self.grant.owns(where)

    def commit(self, repo: Repo, revision: str | None = None) -> Commit:
        """The commit of a revision, by default the path's."""
        revision = revision or self.parts.get("revision", "main")
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


def endpoint(
    hub: Hub, answer: Callable[[Call], Response], **fixed: str
) -> Callable[[Request], Awaitable[Response]]:
    """Make a Starlette endpoint from a function of a `Call`.

    Args:
        hub: the Hub that is called.
        answer: answers the call; it must be quick, since it runs in the server's event loop.
        fixed: parts that the path does not contain, such as the kind of repository.
    """

    async def answered(request: Request) -> Response:
        body = await request.body()
        grant = identify(request.headers.get("authorization"), hub.grants)
        parts = {name: unquote(value) for name, value in request.path_params.items()} | fixed
        return answer(Call(hub, request, body, grant, parts))

    return answered
