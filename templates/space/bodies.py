"""What this Space takes from anyone who can reach it: the body of a request.

Gradio takes files of any size from every site, keeps them for an hour, and reads JSON of any size
into memory. The page of this Space sends the text of a recipe at most, and no files.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BYTES = 8 << 20  # a recipe has at most 2 MiB, and JSON may spell a character as six
FILES = "multipart/"


class LimitedBodies:
    """Refuses files, and bodies of more than `MAX_BYTES`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        kinds = Headers(scope=scope).getlist("content-type")
        has_files = any(FILES in kind.lower() for kind in kinds)
        n_bytes = 0

        async def limited() -> Message:
            nonlocal n_bytes
            if has_files:
                raise HTTPException(415, "This Space takes no files")
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > MAX_BYTES:
                raise HTTPException(413, f"The body has more than {MAX_BYTES:,} bytes")
            return message

        await self.app(scope, limited, send)
