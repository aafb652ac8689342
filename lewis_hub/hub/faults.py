"""Faults on purpose: the embedded Hub answers with errors, cuts connections, or dawdles."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


BUFFERED_S = 0.05  # a link's buffers bridge pauses of the sender, and so do those of this one


@dataclass
class Fault:
    """One thing that goes wrong, a given number of times.

    Attributes:
        path: pattern that is searched for in the path and query of a request.
        status: of the answer, given before anything happens; "drop" cuts the connection.
        after_bytes: of a dropped answer's body still reach the client; the request has then been
            carried out. None drops before anything happens.
        skip: so many matching requests go well first.
    """

    path: re.Pattern[str]
    status: int | Literal["drop"]
    times: int
    method: str | None
    after_bytes: int | None = None
    skip: int = 0


@dataclass
class Faults:
    """What goes wrong from now on.

    Attributes:
        delay_s: pause before every answer.
        bytes_per_s: speed of all bodies together, in both directions; None is as fast as can be.
    """

    pending: list[Fault] = field(default_factory=list)
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy_until: float = 0.0  # when the bodies under way will have passed, on the loop's clock

    def take(self, method: str, target: str) -> Fault | None:
        """The fault that strikes a request, counted down."""
        with self.lock:
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

    async def carry(self, n_bytes: int) -> None:
        """Wait until so many bytes more have passed, behind those that others wait for."""
        if self.bytes_per_s and n_bytes:
            now = asyncio.get_running_loop().time()
            begins = max(self.busy_until, now - BUFFERED_S)
            self.busy_until = begins + n_bytes / self.bytes_per_s
            await asyncio.sleep(self.busy_until - now)

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        with self.lock:
            self.pending.clear()
        self.delay_s, self.bytes_per_s = 0.0, None


class FaultInjector:
    """ASGI layer around the Hub that lets `Faults` happen."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self.app, self.faults = app, faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or fail as told."""
        target = scope["path"] + "?" + scope["query_string"].decode("latin-1")
        fault = self.faults.take(scope["method"], target)
        await asyncio.sleep(self.faults.delay_s)
        receive, paced = self._received(receive), self._sent(send)
        if fault is None:
            await self.app(scope, receive, paced)
        elif fault.status == "drop" and fault.after_bytes is not None:
            await self.app(scope, receive, _cut(paced, fault.after_bytes))
        else:
            await _fail(send, fault.status)

    def _received(self, receive: Receive) -> Receive:
        async def paced() -> Message:
            message = await receive()
            await self.faults.carry(len(message.get("body", b"")))
            return message

        return paced

    def _sent(self, send: Send) -> Send:
        async def paced(message: Message) -> None:
            await self.faults.carry(len(message.get("body", b"")))
            await send(message)

        return paced


def _cut(send: Send, after_bytes: int) -> Send:
    """Let so many bytes of the body through; the server closes when the rest doesn't come."""
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


async def _fail(send: Send, status: int | Literal["drop"]) -> None:
    body = json.dumps({"error": "injected fault"}).encode()
    length = len(body) + 1 if status == "drop" else len(body)  # promise a byte that never comes
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(length).encode()),
    ]
    code = 200 if status == "drop" else status
    await send({"type": "http.response.start", "status": code, "headers": headers})
    more = status == "drop"
    await send({"type": "http.response.body", "body": body, "more_body": more})
