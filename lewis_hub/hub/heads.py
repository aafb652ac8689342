"""A server has as long for the whole head of an answer as it may be silent before it.

httpx2 limits each wait for bytes alone, so that heads such as `102 Processing`, or a head that
comes one byte at a time, could go on without end.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import httpx2

# the blank line before a head that is no `1xx`, and the one after it
WHOLE_HEAD = re.compile(rb"\n\r?\nHTTP/[\d.]+ [02-9].*?\n\r?\n", re.DOTALL)
KEPT_BYTES = 1 << 18  # of heads: httpx2 refuses one of 100 KiB


def limit_heads(session: httpx2.Client) -> None:
    """Limit the heads of answers to a session; httpx2 has no public way to its connections."""
    for transport in (session._transport, *session._mounts.values()):
        pool = getattr(transport, "_pool", None)  # none: of a transport of another kind
        backend = getattr(pool, "_network_backend", None)
        # calls share a connection of HTTP/2, which huggingface_hub does not ask for
        if pool is not None and backend is not None and not getattr(pool, "_http2", False):
            pool._network_backend = _Backend(backend)


@dataclass(frozen=True)
class _Backend:
    """Makes connections whose heads are limited."""

    backend: Any  # httpcore2.NetworkBackend

    def connect_tcp(self, *args: Any, **options: Any) -> _Connection:
        return _Connection(self.backend.connect_tcp(*args, **options))

    def connect_unix_socket(self, *args: Any, **options: Any) -> _Connection:
        return _Connection(self.backend.connect_unix_socket(*args, **options))

    def sleep(self, seconds: float) -> None:
        self.backend.sleep(seconds)


@dataclass
class _Connection:
    """A connection on which requests and answers take turns."""

    stream: Any  # httpcore2.NetworkStream
    asked_s: float | None = None  # when the request was complete; None: it is being written
    heads: bytes | None = None  # what came since; None: the head of the answer is complete

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.asked_s, self.heads = None, b"\n\n"
        self.stream.write(buffer, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self.heads is None or timeout is None:
            return bytes(self.stream.read(max_bytes, timeout))
        now_s = time.monotonic()
        self.asked_s = self.asked_s or now_s
        left_s = self.asked_s + timeout - now_s
        if left_s <= 0:
            raise httpx2.ReadTimeout("the head of the answer did not come in time")
        piece = bytes(self.stream.read(max_bytes, left_s))
        heads = (self.heads + piece)[-KEPT_BYTES:]
        self.heads = None if WHOLE_HEAD.search(heads) else heads
        return piece

    def start_tls(self, *args: Any, **options: Any) -> _Connection:
        return _Connection(self.stream.start_tls(*args, **options))

    def close(self) -> None:
        self.stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)
