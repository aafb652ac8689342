"""Retries of calls, with growing pauses.

huggingface_hub itself retries uploads and HEAD requests, but no lookup, download or commit.
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
LONGEST_PAUSE_S = 60.0  # a longer Retry-After is an error that names it
N_CONNECTION_RETRIES = 2  # a refused connection seldom recovers within seconds


def retry(call: Callable[[], T]) -> T:
    """Call until it succeeds, as long as errors are transient: 408, 429, 5xx, lost connections."""
    for attempt, pause_s in enumerate(PAUSES_S):
        try:
            return call()
        except (HfHubHTTPError, httpx2.TransportError, OSError) as error:
            if not is_transient(error):
                raise
            if isinstance(error, httpx2.ConnectError) and attempt >= N_CONNECTION_RETRIES:
                raise
            after_s = retry_after_s(error)
            if after_s is not None and after_s > LONGEST_PAUSE_S:
                raise
            time.sleep(pause_s if after_s is None else after_s)
    return call()


def retry_transfer(call: Callable[[], object], done: Callable[[], int]) -> None:
    """Retry a transfer that resumes where it stopped.

    It fails only when several attempts in a row transferred nothing.

    Args:
        call: one attempt; it keeps the bytes that it received before it failed.
        done: gives the number of bytes received.
    """
    while True:
        before = done()
        try:
            retry(call)
        except (httpx2.TransportError, ConnectionResetError):
            if done() <= before:
                raise
        else:
            return


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in {408, 429} or status >= 500
    if isinstance(error, httpx2.TransportError):
        return not isinstance(error, httpx2.UnsupportedProtocol | httpx2.ProxyError)
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def retry_after_s(error: BaseException) -> float | None:
    """The pause that the server requires before a retry, if it names one."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if error.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    seconds = headers.get("retry-after", "")
    return float(seconds) if seconds.isdigit() else None
