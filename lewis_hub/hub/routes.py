"""Which address of the embedded Hub is answered by what."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lewis_hub.hub import contents, discussions, jobs_answers, keyless, lfs, pages, repositories
from lewis_hub.hub.access import Refusal, not_found
from lewis_hub.hub.call import Call, answering, refused_json
from lewis_hub.hub.faults import FaultInjector

if TYPE_CHECKING:
    from lewis_hub.hub.server import Hub


Answer = Callable[[Call], Response]
REPO = "/api/{kind}/{namespace}/{name}"
UNQUOTED_REF = re.compile(
    r"(/(?:tree|resolve|blob|revision|commits?|preupload|paths-info)/)refs/(pr|heads|tags)/([^/]+)"
)

API: tuple[tuple[str, str, Answer], ...] = (
    ("GET", "/api/whoami-v2", repositories.whoami),
    ("POST", "/api/validate-yaml", repositories.validate_yaml),
    ("POST", "/api/repos/create", repositories.create),
    ("DELETE", "/api/repos/delete", repositories.delete),
    ("POST", "/api/jobs/{namespace}", jobs_answers.run),
    ("GET", "/api/jobs/{namespace}", jobs_answers.listing),
    ("GET", "/api/jobs/{namespace}/{id}", jobs_answers.details),
    ("GET", "/api/jobs/{namespace}/{id}/logs", jobs_answers.logs),
    ("POST", "/api/jobs/{namespace}/{id}/cancel", jobs_answers.cancel),
    ("POST", "/api/scheduled-jobs/{namespace}", jobs_answers.schedule),
    ("GET", "/api/scheduled-jobs/{namespace}", jobs_answers.schedules),
    ("DELETE", "/api/scheduled-jobs/{namespace}/{id}", jobs_answers.unschedule),
    ("POST", "/api/scheduled-jobs/{namespace}/{id}/run", jobs_answers.trigger),
    ("POST", "/api/buckets/{namespace}/{name}", jobs_answers.create_bucket),
    ("GET", "/api/buckets/{namespace}/{name}/xet-write-token", jobs_answers.bucket_token),
    ("POST", "/api/buckets/{namespace}/{name}/batch", jobs_answers.fill_bucket),
    ("GET", "/api/{kind}", repositories.listing),
    ("GET", REPO, repositories.info),
    ("GET", REPO + "/revision/{revision}", repositories.info),
    ("PUT", REPO + "/settings", repositories.settings),
    ("POST", REPO + "/user-access-request/grant", repositories.grant_access),
    ("GET", REPO + "/auth-check", repositories.auth_check),
    ("GET", REPO + "/auth-check/write", repositories.auth_check_write),
    ("GET", REPO + "/refs", repositories.refs),
    ("POST", REPO + "/branch/{branch}", repositories.create_ref),
    ("DELETE", REPO + "/branch/{branch}", repositories.delete_ref),
    ("POST", REPO + "/tag/{revision}", repositories.create_ref),
    ("DELETE", REPO + "/tag/{revision}", repositories.delete_ref),
    ("GET", REPO + "/tree/{revision}", contents.tree),
    ("GET", REPO + "/tree/{revision}/{path:path}", contents.tree),
    ("POST", REPO + "/paths-info/{revision}", contents.paths_info),
    ("GET", REPO + "/commits/{revision}", contents.commits),
    ("POST", REPO + "/preupload/{revision}", contents.preupload),
    ("GET", REPO + "/xet-write-token/{revision}", contents.xet_token),
    ("POST", REPO + "/commit/{revision}", contents.commit),
    ("GET", REPO + "/discussions", discussions.listing),
    ("POST", REPO + "/discussions", discussions.create),
    ("GET", REPO + "/discussions/{number}", discussions.details),
    ("POST", REPO + "/discussions/{number}/comment", discussions.comment),
    ("POST", REPO + "/discussions/{number}/status", discussions.change_status),
    ("POST", REPO + "/discussions/{number}/merge", discussions.merge),
)

HOME = "/{namespace}/{name}"
SITE: tuple[tuple[str, str, Answer], ...] = (
    ("POST", HOME + ".git/info/lfs/objects/batch", lfs.batch),
    ("POST", HOME + ".git/info/lfs/objects/verify", lfs.verify),
    ("GET", HOME + "/resolve/{revision}/{path:path}", contents.resolve),
    ("GET", HOME, pages.repository),
    ("GET", HOME + "/tree/{revision}", pages.folder),
    ("GET", HOME + "/tree/{revision}/{path:path}", pages.folder),
    ("GET", HOME + "/blob/{revision}/{path:path}", pages.file),
    ("GET", HOME + "/commits/{revision}", pages.commits),
    ("GET", HOME + "/commit/{revision}", pages.commit),
    ("GET", HOME + "/discussions/{number}", pages.discussion),
)


def application(hub: Hub) -> ASGIApp:
    """The Hub as an ASGI application."""
    routes: list[BaseRoute] = [
        Route("/", answering(hub, pages.front), methods=["GET"]),
        Route("/style.css", answering(hub, pages.style), methods=["GET"]),
        Route("/icon.svg", answering(hub, pages.icon), methods=["GET"]),
        Route("/lfs/{oid}/{filename}", lfs.stored, methods=["GET"]),
        Route("/lfs-upload/{oid}", lfs.put, methods=["PUT"]),
        Route("/lfs-upload/{oid}", lfs.complete, methods=["POST"]),
        Route("/lfs-upload/{oid}/{part:int}", lfs.put, methods=["PUT"]),
    ]
    routes.append(Route("/oauth/token", answering(hub, keyless.exchange), methods=["POST"]))
    routes += [Route(path, answering(hub, to), methods=[how]) for how, path, to in API]
    for kind, prefix in (("datasets", "/datasets"), ("models", "")):
        for how, path, to in SITE:
            answer = answering(hub, to, kind=kind)
            routes.append(Route(prefix + path, answer, methods=[how]))
    routes.append(Route("/{rest:path}", answering(hub, nothing), methods=["GET", "POST", "PUT"]))
    app = Starlette(routes=routes, exception_handlers={Refusal: refused})
    app.state.hub = hub
    return FaultInjector(undecoded(app), hub.faults)


def refused(request: Request, refusal: Exception) -> Response:
    """Say no to a browser in HTML, to everything else in JSON."""
    assert isinstance(refusal, Refusal)
    api = request.url.path.startswith("/api/") or "/resolve/" in request.url.path
    if not api and "text/html" in request.headers.get("accept", ""):
        return pages.refusal(refusal, str(request.base_url).rstrip("/"))
    return refused_json(refusal)


def undecoded(app: ASGIApp) -> ASGIApp:
    """Route by the path as it was sent: a revision may hold a percent-encoded slash.

    The few refs that clients also write with plain slashes (``refs/pr/1``) are encoded here.
    """

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["raw_path"].decode("ascii").split("?", 1)[0]
        scope["path"] = UNQUOTED_REF.sub(r"\1refs%2F\2%2F\3", path, count=1)
        await app(scope, receive, send)

    return routed


def nothing(call: Call) -> Response:
    """What is not here; the repositories without a namespace that the real Hub has are not."""
    path = call.request.url.path
    if re.match(r"/api/(models|datasets)/[^/]+($|/revision/)|/(datasets/)?[^/]+/resolve/", path):
        raise not_found(call.grant)
    raise Refusal(404, f"This Hub has nothing at {path}")
