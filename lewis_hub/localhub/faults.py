"""Fault injection: the embedded Hub answers with errors, cuts connections or slows down."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

BUFFERED_S = 0.05  # buffers of a real link bridge pauses of the sender of about this length


@dataclass
class Fault:
    """A fault of matching requests, a given number of times.

    Attributes:
        path: pattern that is searched for in the path and query of a request.
        status: of the answer, sent without carrying out the request; "drop" cuts the connection.
        times: number of requests that fail.
        method: of the requests that fail; None is any method.
        after_bytes: number of bytes of the answer's body that still reach the client before "drop"
            cuts the connection; the request is then carried out. None drops before that.
        skip: number of matching requests that succeed first.
    """

    path: re.Pattern[str]
    status: int | Literal["drop"]
    times: int
    method: str | None
    after_bytes: int | None = None
    skip: int = 0


@dataclass
class Faults:
    """The faults from now on.

    Attributes:
        pending: the faults that still have to happen.
        delay_s: pause before every answer, in seconds.
        bytes_per_s: bandwidth that all bodies share, in both directions; None is unlimited.
    """

    pending: list[Fault] = field(default_factory=list)
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    busy_until: float = 0.0  # the time on the event loop's clock when the link is free again

    def take(self, method: str, target: str) -> Fault | None:
        """The fault of a request, counted down; None if the request succeeds."""
        for fault in self.pending:
            if fault.method in (None, method) and fault.path.search(target):
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                if fault.times <= 0:
                    self.pending.remove(fault)
                return fault
        return None

    async def transfer(self, n_bytes: int) -> None:
        """Wait as long as the link needs for these bytes and those that are queued before them."""
        if self.bytes_per_s and n_bytes:
            now = asyncio.get_running_loop().time()
            start = max(self.busy_until, now - BUFFERED_S)
            self.busy_until = start + n_bytes / self.bytes_per_s
            await asyncio.sleep(self.busy_until - now)

    def clear(self) -> None:
        """Remove all faults."""
        self.pending.clear()
        self.delay_s, self.bytes_per_s = 0.0, None


class FaultInjector:
    """ASGI middleware that applies `Faults` to each request."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self.app, self.faults = app, faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or fail."""
        target = scope["path"] + "?" + scope["query_string"].decode("latin-1")
        fault = self.faults.take(scope["method"], target)
        await asyncio.sleep(self.faults.delay_s)

        async def paced_receive() -> Message:
            message = await receive()
            await self.faults.transfer(len(message.get("body", b"")))
            return message

        async def paced_send(message: Message) -> None:
            await self.faults.transfer(len(message.get("body", b"")))
            await send(message)

        if fault is None:
            await self.app(scope, paced_receive, paced_send)
        elif fault.status == "drop" and fault.after_bytes is not None:
            await self.app(scope, paced_receive, _cut(paced_send, fault.after_bytes))
        else:
            await _fail(send, fault)


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


async def _fail(send: Send, fault: Fault) -> None:
    dropped = fault.status == "drop"
    body = b'{"error":"injected fault"}'
    length = len(body) + dropped  # a dropped answer announces a byte that never comes
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % length)]
    code = 200 if dropped else fault.status
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": dropped})
