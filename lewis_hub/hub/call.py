"""One request to the embedded Hub, with what every answer needs: who asks, for which repository."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lewis_hub.hub.access import (
    Grant,
    Refusal,
    check_reads,
    check_role,
    check_sees,
    check_writes,
    identify,
    not_found,
)
from lewis_hub.hub.store import KINDS, Commit, Repo, Store

if TYPE_CHECKING:
    from lewis_hub.hub.server import Hub


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
    parts: Mapping[str, str] = field(default_factory=dict)

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

    def form(self) -> dict[str, list[str]]:
        """The body, a form or its JSON equal: name -> values."""
        if "json" in self.request.headers.get("content-type", ""):
            values = self.json().items()
            return {k: v if isinstance(v, list) else [str(v)] for k, v in values}
        return parse_qs(self.body.decode(), keep_blank_values=True)

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to something true."""
        return self.request.query_params.get(name, "").lower() in ("1", "true")

    def number(self, name: str, default: int) -> int:
        """A query parameter that counts something."""
        text = self.request.query_params.get(name) or str(default)
        if not text.isdecimal():
            raise Refusal(400, f"{name} must be a number")
        return int(text)

    def seen_repo(self) -> Repo:
        """The repository asked for, if the caller may know of it."""
        repo = self._repo()
        check_sees(self.grant, repo)
        return repo

    def read_repo(self) -> Repo:
        """The repository asked for, if the caller may have its files."""
        repo = self._repo()
        check_reads(self.grant, repo)
        return repo

    def writer(self, repo: Repo) -> Grant:
        """The caller, if they may change the repository."""
        return check_writes(self.grant, repo.id, repo.kind.removesuffix("s"))

    def proposer(self) -> Grant:
        """The caller, if they may open a pull request: anyone with a write token."""
        return check_role(self.grant)

    def _repo(self) -> Repo:
        kind = self.parts.get("kind", "models")
        found = None
        if kind in KINDS:
            found = self.store.find(kind, self.parts["namespace"], self.parts["name"])
        if found is None:
            raise not_found(self.grant)
        return found

    def commit(self, repo: Repo, revision: str | None = None) -> Commit:
        """The commit that a revision, by default the path's, stands for."""
        revision = revision or self.parts.get("revision", "main")
        commit = self.store.resolve(repo, revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def page(self, items: list[Any], size: int) -> JSONResponse:
        """The asked part of a long list; a Link header names the next."""
        start = self.number("cursor", 0)
        headers = {}
        if start + size < len(items):
            url = self.request.url.include_query_params(cursor=start + size)
            headers["Link"] = f'<{url}>; rel="next"'
        return JSONResponse(items[start : start + size], headers=headers)


def answering(
    hub: Hub, answer: Callable[[Call], Response], **fixed: str
) -> Callable[..., Awaitable[Response]]:
    """Make a plain function of a `Call` an endpoint; it runs in a thread of its own.

    `fixed` are parts that the path doesn't spell out, such as the kind of repository.
    """

    async def endpoint(request: Request) -> Response:
        body = await request.body()
        grant = identify(request.headers.get("authorization"), hub.grants)
        parts = {name: unquote(value) for name, value in request.path_params.items()} | fixed
        return await run_in_threadpool(answer, Call(hub, request, body, grant, parts))

    return endpoint


def refused_json(refusal: Refusal) -> Response:
    """Say no as the Hub does: in the body, and in headers that its clients read."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in refusal.message)
    headers = {"X-Error-Message": plain}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    document = {"error": refusal.message, **refusal.fields}
    return JSONResponse(document, refusal.status, headers)
