"""Which hosts get a token: those of the Hubs that are asked, whatever their answers name.

huggingface_hub sends its token to the address of the next page of a list, to the one that checks
an upload and to the one that gives access to Xet, wherever they are.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import constants

Origin = tuple[str, str, int | None]  # scheme, host and port

PORTS = {"http": 80, "https": 443}
# mirrors redirect to it, and name its addresses; huggingface_hub sends its token there, too
WELL_KNOWN = ("https://huggingface.co", "https://hf.co")
ASKED: Counter[str] = Counter()  # addresses of the Hubs that calls in progress ask, in all threads
LOCK = threading.Lock()


@contextmanager
def asking(endpoint: str) -> Iterator[None]:
    """Inside the block, only Hubs that are asked get tokens; other clients stay as they are."""
    with LOCK:
        ASKED[endpoint] += 1
    try:
        yield
    finally:
        with LOCK:
            ASKED[endpoint] -= 1
            if not ASKED[endpoint]:
                del ASKED[endpoint]


def withhold_token(request: httpx2.Request) -> None:
    """Send no token to a host that is no Hub: an answer named it."""
    if "Authorization" in request.headers and not is_asked(request.url):
        del request.headers["Authorization"]


def hide_access_elsewhere(answer: httpx2.Response) -> None:
    """Let a file whose access to Xet another host would give come as other files do.

    hf-xet, which is no client of huggingface_hub, would send the token there, too.
    """
    route = answer.links.get("xet-auth", {}).get("url")
    route = route or answer.headers.get(constants.HUGGINGFACE_HEADER_X_XET_REFRESH_ROUTE)
    if route is not None and not is_asked(route):
        answer.headers.pop(constants.HUGGINGFACE_HEADER_X_XET_HASH, None)


def is_asked(address: httpx2.URL | str) -> bool:
    """Whether an address is one of a Hub that is asked; any is, while none is asked."""
    with LOCK:
        asked = list(ASKED)
    if not asked:
        return True
    issuer = os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL")  # of GitHub, for trusted publishing
    known = {origin(hub) for hub in (*asked, constants.ENDPOINT, *WELL_KNOWN, issuer) if hub}
    found = origin(address)
    if found is None:
        return False
    scheme, host, port = found
    is_upgrade = (scheme, port) == ("https", 443)  # of a Hub's http://
    return found in known or (is_upgrade and ("http", host, 80) in known)


def place(address: httpx2.URL) -> str:
    """The beginning of an address, for readers."""
    return f"{address.scheme}://{address.netloc.decode()}"


def origin(address: httpx2.URL | str) -> Origin | None:
    """Scheme, host and port of an address; None if it is none."""
    try:
        url = httpx2.URL(address)
    except httpx2.InvalidURL:
        return None
    return url.scheme, url.host, url.port or PORTS.get(url.scheme)
