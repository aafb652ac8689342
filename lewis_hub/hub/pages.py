"""The embedded Hub's plain web page."""

from __future__ import annotations

from starlette.responses import PlainTextResponse, Response

from lewis_hub.hub.call import Call


def front(call: Call) -> Response:
    """What this is."""
    return PlainTextResponse(f"lewis-hub: an embedded Hub at {call.endpoint}")


repository = folder = file = commits = commit = discussion = front
