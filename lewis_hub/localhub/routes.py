"""The addresses of the embedded Hub, each with the function that answers it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lewis_hub.localhub import commits, files, jobs_api, pages, repositories
from lewis_hub.localhub.access import Refusal
from lewis_hub.localhub.call import Call, endpoint
from lewis_hub.localhub.faults import FaultInjector

if TYPE_CHECKING:
    from lewis_hub.localhub.hub import Hub

UNQUOTED_REF = re.compile(r"(/(?:tree|resolve|revision|commits?|preupload)/)refs/(pr|heads|tags)/")

METHODS = ("GET", "POST", "PUT", "DELETE")
REPO = "/{namespace}/{name}"
Table = tuple[tuple[str, str, Callable[[Call], Response]], ...]  # method, path, answer

API: Table = (
    ("POST", "/oauth/token", repositories.exchange_token),
    ("GET", "/api/whoami-v2", repositories.whoami),
    ("POST", "/api/validate-yaml", repositories.validate_yaml),
    ("POST", "/api/repos/create", repositories.create),
    ("POST", "/api/jobs/{namespace}", jobs_api.run),
    ("GET", "/api/jobs/{namespace}", jobs_api.jobs),
    ("GET", "/api/jobs/{namespace}/{id}", jobs_api.job),
    ("GET", "/api/jobs/{namespace}/{id}/logs", jobs_api.logs),
    ("POST", "/api/jobs/{namespace}/{id}/cancel", jobs_api.cancel),
    ("POST", "/api/scheduled-jobs/{namespace}", jobs_api.create_schedule),
    ("GET", "/api/scheduled-jobs/{namespace}", jobs_api.schedules),
    ("DELETE", "/api/scheduled-jobs/{namespace}/{id}", jobs_api.delete_schedule),
    ("POST", "/api/scheduled-jobs/{namespace}/{id}/run", jobs_api.trigger),
    ("POST", "/api/buckets/{namespace}/{name}", jobs_api.create_bucket),
    ("GET", "/api/buckets/{namespace}/{name}/xet-write-token", jobs_api.bucket_token),
    ("POST", "/api/buckets/{namespace}/{name}/batch", jobs_api.fill_bucket),
)
REPO_API: Table = (
    ("GET", "", repositories.info),
    ("GET", "/revision/{revision}", repositories.info),
    ("PUT", "/settings", repositories.settings),
    ("GET", "/auth-check", repositories.auth_check),
    ("GET", "/auth-check/write", repositories.auth_check_write),
    ("GET", "/refs", repositories.refs),
    ("POST", "/branch/{branch}", repositories.create_ref),
    ("POST", "/tag/{revision}", repositories.create_ref),
    ("GET", "/tree/{revision}", files.tree),
    ("GET", "/tree/{revision}/{path:path}", files.tree),
    ("POST", "/paths-info/{revision}", files.paths_info),
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


def application(hub: Hub) -> ASGIApp:
    """The Hub as an ASGI application."""
    routes: list[BaseRoute] = [
        Route("/style.css", endpoint(hub, pages.style), methods=["GET"]),
        Route("/lfs/{oid}/{name}", files.lfs_download, methods=["GET"]),
        Route("/lfs-upload/{oid}", files.lfs_upload, methods=["PUT"]),
        *(Route(path, endpoint(hub, answer), methods=[method]) for method, path, answer in API),
    ]
    for prefix, kind, table in (
        ("/api/datasets", "datasets", REPO_API),
        ("/api/models", "models", REPO_API),
        ("/api", "", ()),
        ("/datasets", "datasets", REPO_SITE),
        ("", "models", REPO_SITE),
    ):
        for method, path, answer in table:
            answered = endpoint(hub, answer, kind=kind)
            routes.append(Route(prefix + REPO + path, answered, methods=[method]))
        routes.append(
            Route(prefix + "/{rest:path}", endpoint(hub, unknown_address), methods=METHODS)
        )
    app = Starlette(routes=routes, exception_handlers={Refusal: refused})
    app.state.hub = hub
    return FaultInjector(by_raw_path(app), hub.faults)


def refused(_request: Request, refusal: Exception) -> Response:
    """Send a refusal as the Hub does: in the body, and in headers that its clients read."""
    assert isinstance(refusal, Refusal)
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in refusal.message)
    headers = {"X-Error-Message": plain}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    return JSONResponse({"error": refusal.message, **refusal.fields}, refusal.status, headers)


def by_raw_path(app: ASGIApp) -> ASGIApp:
    """Route by the path as it was sent: a revision may hold a percent-encoded slash.

    The few refs that clients also write with plain slashes (``refs/pr/1``) are encoded here.
    """

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["raw_path"].decode("ascii").split("?", 1)[0]
        scope["path"] = UNQUOTED_REF.sub(r"\1refs%2F\2%2F", path, count=1)
        await app(scope, receive, send)

    return routed


def unknown_address(call: Call) -> Response:
    """Answer any other address with 404; gpt2 and the like are repositories that do not exist."""
    path = call.request.url.path
    if re.match(r"/api/(models|datasets)/[^/]+($|/revision/)|/(datasets/)?[^/]+/resolve/", path):
        raise call.not_found()
    raise Refusal(404, f"This Hub has nothing at {path}")
