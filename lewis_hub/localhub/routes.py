"""The addresses of the embedded Hub, each with the function that answers it."""

from __future__ import annotations

import asyncio
import re

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lewis_hub.localhub import commits, files, jobs, pages, repositories
from lewis_hub.localhub.call import Answer, Call, endpoint, refusal
from lewis_hub.localhub.hub import Fault, Faults, Hub

UNQUOTED_REF = re.compile(r"(/(?:tree|resolve|revision|commits?|preupload)/)refs/(pr|heads|tags)/")

LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3})(:\d{1,5})?", re.ASCII | re.IGNORECASE)

METHODS = ("GET", "POST", "PUT", "DELETE")
REPO = "/{namespace}/{name}"
Table = tuple[tuple[str, str, Answer], ...]  # method, path, answer

API: Table = (
    ("GET", "/style.css", pages.style),
    ("POST", "/oauth/token", repositories.exchange_token),
    ("GET", "/api/whoami-v2", repositories.whoami),
    ("POST", "/api/validate-yaml", repositories.validate_yaml),
    ("POST", "/api/repos/create", repositories.create),
)
REPO_API: Table = (
    ("GET", "", repositories.info),
    ("GET", "/revision/{revision}", repositories.info),
    ("PUT", "/settings", repositories.settings),
    ("GET", "/auth-check", repositories.auth_check),
    ("GET", "/auth-check/write", repositories.auth_check),
    ("GET", "/refs", repositories.refs),
    ("POST", "/branch/{branch}", repositories.create_ref),
    ("POST", "/tag/{revision}", repositories.create_ref),
    ("GET", "/tree/{revision}", repositories.tree),
    ("GET", "/tree/{revision}/{path:path}", repositories.tree),
    ("POST", "/paths-info/{revision}", repositories.paths_info),
    ("GET", "/commits/{revision}", commits.commits),
    ("POST", "/preupload/{revision}", commits.preupload),
    ("GET", "/xet-write-token/{revision}", commits.xet_token),
    ("POST", "/commit/{revision}", commits.commit),
    ("GET", "/discussions", commits.pull_requests),
    ("POST", "/discussions", commits.create_pull_request),
    ("GET", "/discussions/{number}", commits.pull_request),
)
REPO_SITE: Table = (
    ("POST", ".git/info/lfs/objects/batch", files.lfs_batch),
    ("POST", ".git/info/lfs/objects/verify", files.lfs_verify),
    ("GET", "/resolve/{revision}/{path:path}", files.resolve),
    ("GET", "/blob/{revision}/{path:path}", files.resolve),
    ("GET", "", pages.repository),
    ("GET", "/tree/{revision}", pages.repository),
    ("GET", "/commit/{revision}", pages.repository),
    ("GET", "/commits/{revision}", pages.repository),
    ("GET", "/discussions/{number}", pages.repository),
)


def application(hub: Hub, running: jobs.Jobs | None) -> ASGIApp:
    """The Hub as an ASGI application; `running` runs Jobs, None refuses them."""
    unknown = tuple((method, "/{rest:path}", unknown_address) for method in METHODS)
    tables: tuple[tuple[str, str, Table], ...] = (
        ("", "", (*API, *(running.routes() if running else jobs.REFUSED))),
        ("/api/datasets" + REPO, "datasets", REPO_API),
        ("/api/models" + REPO, "models", REPO_API),
        ("/api", "", unknown),
        ("/datasets" + REPO, "datasets", REPO_SITE),
        ("/datasets", "", unknown),
        (REPO, "models", REPO_SITE),
        ("", "", unknown),
    )
    routes = [
        Route("/lfs/{oid}/{name}", files.lfs_download, methods=["GET"]),
        Route("/lfs-upload/{oid}", files.lfs_upload, methods=["PUT"]),
    ]
    for prefix, kind, table in tables:
        for method, path, answer in table:
            routes.append(Route(prefix + path, endpoint(hub, answer, kind), methods=[method]))
    app = Starlette(
        routes=routes, exception_handlers={HTTPException: refused, ClientDisconnect: hung_up}
    )
    app.state.hub = hub
    return with_faults(only_local(by_raw_path(app)), hub.faults)


def refused(_request: Request, error: Exception) -> Response:
    """Send a refusal in the body and in headers, as the Hub does."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def hung_up(_request: Request, _error: Exception) -> Response:
    """End a request whose client left before its end; nobody reads the answer."""
    return Response(status_code=400)


def only_local(app: ASGIApp) -> ASGIApp:
    """Refuse requests for another host than this machine.

    A page of the web could let its own name point here, and would then read the answers. The port
    may be another one, that of a tunnel.
    """

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if LOCAL_HOST.fullmatch(Headers(scope=scope).get("host", "")):
            await app(scope, receive, send)
        else:
            problem = "This Hub answers at 127.0.0.1 and localhost only"
            await JSONResponse({"error": problem}, 421)(scope, receive, send)

    return checked


def by_raw_path(app: ASGIApp) -> ASGIApp:
    """Route by the path as it was sent: a revision may hold a percent-encoded slash.

    The few refs that clients also write with plain slashes (``refs/pr/1``) are encoded here.
    """

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["raw_path"].decode("latin-1").split("?", 1)[0]
        scope["path"] = UNQUOTED_REF.sub(r"\1refs%2F\2%2F", path, count=1)
        await app(scope, receive, send)

    return routed


def unknown_address(call: Call) -> Response:
    """Answer any other address with 404; gpt2 and the like are repositories that do not exist."""
    path = call.request.url.path
    if re.match(r"/api/(models|datasets)/[^/]+($|/revision/)|/(datasets/)?[^/]+/resolve/", path):
        raise call.not_found()
    raise refusal(404, f"This Hub has nothing at {path}")


def with_faults(app: ASGIApp, faults: Faults) -> ASGIApp:
    """Let requests fail, or be slow, as `faults` say."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        target = scope["path"] + "?" + scope["query_string"].decode("latin-1")
        fault = faults.take(scope["method"], target)
        await asyncio.sleep(faults.delay_s)

        async def paced_receive() -> Message:
            message = await receive()
            await faults.transfer(len(message.get("body", b"")))
            return message

        async def paced_send(message: Message) -> None:
            await faults.transfer(len(message.get("body", b"")))
            await send(message)

        if fault is None:
            await app(scope, paced_receive, paced_send)
        elif fault.status == "drop" and fault.after_bytes is not None:
            await app(scope, paced_receive, _cut(paced_send, fault.after_bytes))
        else:
            await _fail(receive, send, fault)

    return answer


def _cut(send: Send, after_bytes: int) -> Send:
    """Let some bytes of the body through; the server then closes, since the rest is missing."""
    left = after_bytes

    async def cut(message: Message) -> None:
        nonlocal left
        if message["type"] == "http.response.start":
            await send(message)
        elif left > 0:
            body = message.get("body", b"")[:left]
            left -= len(body)
            await send({"type": "http.response.body", "body": body, "more_body": True})

    return cut


async def _fail(receive: Receive, send: Send, fault: Fault) -> None:
    while (await receive()).get("more_body"):
        pass  # a connection that is closed with bytes unread is reset, and its answer may be lost
    dropped = fault.status == "drop"
    body = b'{"error":"injected fault"}'
    length = len(body) + dropped  # a dropped answer announces a byte that never comes
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % length)]
    headers += [(name.lower().encode(), value.encode()) for name, value in fault.headers.items()]
    code = 200 if dropped else fault.status
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": dropped})
