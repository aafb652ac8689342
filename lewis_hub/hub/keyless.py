"""Trusted publishers: who a CI vouches for gets a token of an hour for one repository, no more."""

from __future__ import annotations

import secrets

from starlette.responses import JSONResponse, Response

from lewis_hub.hub.access import Grant, Refusal
from lewis_hub.hub.call import Call

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"  # RFC 8693
HOUR_S = 3600


def exchange(call: Call) -> Response:
    """A token that may write the one repository whose publishers the caller is among.

    The embedded Hub checks no signature: it compares the identity with what `Hub.publishers` holds.
    """
    asked = call.json()
    if asked.get("grant_type") != EXCHANGE:
        raise Refusal(400, "unsupported_grant_type")
    repo = asked.get("resource")
    if not repo or call.hub.publishers.get(str(asked.get("subject_token"))) != repo:
        raise Refusal(403, f"No trusted publisher of {repo} matches this identity")
    token = f"hf_jwt_{secrets.token_hex(16)}"
    call.hub.grants[token] = Grant(token, "trusted-publisher", "write", (str(repo),))
    answer = {"access_token": token, "token_type": "bearer", "expires_in": HOUR_S}
    return JSONResponse(answer)
