"""Calls that are worth repeating, with growing pauses.

huggingface_hub itself repeats uploads and HEAD, but no lookup, download or commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers

T = TypeVar("T")

PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
LONGEST_PAUSE_S = 60.0  # a server that asks for more gets an error that says so
N_CONNECTION_RETRIES = 2  # nobody listening seldom changes within seconds


def persist(call: Callable[[], T]) -> T:
    """Call until it works, while the failure may pass: 408, 429, 5xx, a broken connection."""
    for attempt, pause_s in enumerate(PAUSES_S):
        try:
            return call()
        except (HfHubHTTPError, httpx2.TransportError, OSError) as error:
            if not may_pass(error):
                raise
            if isinstance(error, httpx2.ConnectError) and attempt >= N_CONNECTION_RETRIES:
                raise
            asked_s = asked_pause_s(error)
            if asked_s is not None and asked_s > LONGEST_PAUSE_S:
                raise
            time.sleep(pause_s if asked_s is None else asked_s)
    return call()


def complete(call: Callable[[], object], done: Callable[[], int]) -> None:
    """Persist with a transfer that goes on where it broke off.

    It is given up only when several attempts in a row brought nothing.

    Args:
        call: one attempt; what it brought before it failed stays.
        done: how many bytes are there.
    """
    while True:
        before = done()
        try:
            persist(call)
        except (httpx2.TransportError, ConnectionResetError):
            if done() <= before:
                raise
        else:
            return


def may_pass(error: BaseException) -> bool:
    """Whether the same call may work a moment later."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in {408, 429} or status >= 500
    if isinstance(error, httpx2.TransportError):
        return not isinstance(error, httpx2.UnsupportedProtocol | httpx2.ProxyError)
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def asked_pause_s(error: BaseException) -> float | None:
    """How long the server asks us to wait, if it does."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if error.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    seconds = headers.get("retry-after", "")
    return float(seconds) if seconds.isdigit() else None
