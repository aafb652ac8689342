"""A request to the embedded Hub: its caller and their rights, its repository, its parameters."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lewis_hub.documents import DocumentError, require_few_values
from lewis_hub.localhub.hub import Grant, Hub
from lewis_hub.localhub.store import Commit, Repo, Store

T = TypeVar("T")

MAX_BODY_BYTES = 1 << 28  # of a request with a token; large files are sent to the storage
MAX_UNKNOWN_BODY_BYTES = 1 << 20  # of one without
MAX_BODY_VALUES = 1_000_000  # of JSON: clients send some thousands, and files of any length as one
MAX_MESSAGE = 1000  # characters of a header
OBJECT = TypeAdapter(dict[str, Any])


def _finite(number: str) -> float:
    """A number that JSON has: Python reads Infinity and NaN too."""
    if math.isfinite(value := float(number)):
        return value
    raise ValueError(number)


def refusal(status: int, message: str, code: str | None = None) -> HTTPException:
    """An answer that refuses a call, as the Hub words it for people and, by `code`, for clients."""
    shown = message[:MAX_MESSAGE].strip()
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in shown)
    headers = {"X-Error-Message": plain} | ({"X-Error-Code": code} if code else {})
    return HTTPException(status, message, headers)


@dataclass(frozen=True)
class Call:
    """A request whose body has been read; `parts` of the path are percent-decoded."""

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
            require_few_values(self.body, MAX_BODY_VALUES)
            read = json.loads(self.body or b"{}", parse_float=_finite, parse_constant=_finite)
            json.dumps(read, ensure_ascii=False).encode()  # no answer can repeat half a letter
            return OBJECT.validate_python(read)
        except DocumentError as error:
            raise refusal(400, f"The body: {error}") from None
        except (ValueError, RecursionError):
            raise refusal(400, "The body must be a JSON object") from None

    def flag(self, name: str) -> bool:
        """Whether a query parameter is true."""
        return self.request.query_params.get(name, "").lower() in ("1", "true")

    def signed_in(self) -> Grant:
        """The caller, who has to be known."""
        if self.grant is None:
            raise refusal(401, "Invalid username or password.")
        return self.grant

    def writer(self) -> Grant:
        """The caller, if their token may change anything anywhere."""
        if self.signed_in().role != "write":
            problem = "This token has the role read, a token with the role write is needed"
            raise refusal(403, problem)
        return self.signed_in()

    def owner(self, where: str, noun: str) -> Grant:
        """The caller, if they may change a repository, or anything in a namespace."""
        grant = self.writer()
        if not grant.owns(where):
            rights = f"You don't have the rights to create a {noun} under the namespace"
            raise refusal(403, f'{rights} "{where.partition("/")[0]}"')
        return grant

    def committer(self, repo: Repo) -> Grant:
        """The caller, if they may commit; anyone with a write token may to a pull request."""
        if self.flag("create_pr") or self.parts["revision"].startswith("refs/pr/"):
            return self.writer()
        return self.owner(repo.id, repo.noun)

    def not_found(self) -> HTTPException:
        """The Hub's answer for a repository that is missing, or hidden from the caller."""
        if self.grant is None:
            return refusal(401, "Invalid username or password.", "RepoNotFound")
        return refusal(404, "Repository not found", "RepoNotFound")

    def seen_repo(self) -> Repo:
        """The repository of the path; a private one exists for its owners only."""
        repo_id = f"{self.parts['namespace']}/{self.parts['name']}"
        repo = self.store.find(self.parts["kind"], repo_id)
        only_gated = self.grant is not None and self.grant.only_gated
        if repo is None or (repo.private and (only_gated or not self._owns(repo))):
            raise self.not_found()
        return repo

    def read_repo(self) -> Repo:
        """The repository of the path, if the caller may read its files."""
        repo = self.seen_repo()
        if not repo.gated or self._owns(repo):
            return repo
        restricted = f"Access to {repo.noun} {repo.id} is restricted"
        if self.grant is None:
            restricted += ". You must have access to it and be authenticated to access it."
            raise refusal(401, f"{restricted} Please log in.", "GatedRepo")
        raise refusal(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")

    def owned_repo(self) -> Repo:
        """The repository of the path, if the caller may change it."""
        repo = self.seen_repo()
        self.owner(repo.id, repo.noun)
        return repo

    def _owns(self, repo: Repo) -> bool:
        return self.grant is not None and self.grant.owns(repo.id)

    def commit(self, repo: Repo, revision: str | None = None) -> Commit:
        """The commit of a revision, by default the path's."""
        revision = revision or self.parts.get("revision", "main")
        if commit := repo.resolve(revision):
            return commit
        raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def parsed(shape: TypeAdapter[T], content: bytes) -> T:
    """JSON of this shape; any other is refused."""
    try:
        require_few_values(content, MAX_BODY_VALUES)
        return shape.validate_json(content)
    except DocumentError as error:
        raise refusal(400, f"The body: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "The body"
        raise refusal(400, f"{place}: {first['msg']}") from None


Answer = Callable[[Call], Any]  # a Response, or a value that is sent as JSON


def endpoint(hub: Hub, answer: Answer, kind: str = "") -> Callable[[Request], Awaitable[Response]]:
    """Make a Starlette endpoint of a quick function; `kind` of repository is added to `parts`."""

    async def answered(request: Request) -> Response:
        authorization = request.headers.get("authorization", "")
        grant = hub.grants.get(authorization.removeprefix("Bearer ").strip())
        if authorization and grant is None:
            raise refusal(401, "Invalid credentials in Authorization header")
        body = await _body(request, MAX_BODY_BYTES if grant else MAX_UNKNOWN_BODY_BYTES)
        parts = {name: unquote(value) for name, value in request.path_params.items()}
        try:
            result = answer(Call(hub, request, body, grant, {**parts, "kind": kind}))
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise refusal(400, "A name is longer than the disk allows") from None
        return result if isinstance(result, Response) else JSONResponse(result)

    return answered


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body of a request, which may not be longer."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise refusal(413, f"The body has more than {max_bytes:,} bytes")
    return bytes(body)
