"""Tokens of the embedded Hub, and the answer that refuses a call.

``users.json`` in the Hub's folder lists tokens: ``[{"token", "user", "role", "namespaces"}]``.
A fresh folder gets one user who may write in every namespace, with a write and a read token.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from lewis_hub.localhub.store import replacing

Role = Literal["read", "write"]
ROLES: tuple[Role, ...] = ("write", "read")
FIRST_USER = "lewis"


@dataclass(frozen=True)
class Grant:
    """The rights of a token.

    Attributes:
        namespaces: where its user owns repositories; "*" is every namespace, owner/name is one
            repository.
    """

    token: str
    user: str
    role: Role
    namespaces: tuple[str, ...]

    def owns(self, where: str) -> bool:
        """Whether the user owns a namespace or repository, whatever the token's role."""
        return not {"*", where, where.partition("/")[0]}.isdisjoint(self.namespaces)


GRANTS = TypeAdapter(list[Grant])


@dataclass(eq=False)
class Refusal(Exception):  # noqa: N818 - an answer, not a failure of ours
    """An answer that refuses a call, as the Hub words it."""

    status: int
    message: str
    code: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)


def load_grants(path: Path) -> dict[str, Grant]:
    """Read the rights by token; a missing file is written with a first user."""
    if not path.exists():
        first = [Grant(f"hf_{secrets.token_hex(16)}", FIRST_USER, role, ("*",)) for role in ROLES]
        save_grants(path, {grant.token: grant for grant in first})
    return {grant.token: grant for grant in GRANTS.validate_json(path.read_bytes())}


def save_grants(path: Path, grants: Mapping[str, Grant]) -> None:
    """Write the tokens; only the owner's system account may read the file."""
    with replacing(path) as file:
        file.write(GRANTS.dump_json(list(grants.values()), indent=2))


def identify(authorization: str | None, grants: Mapping[str, Grant]) -> Grant | None:
    """The rights of a caller; None is anonymous.

    Raises:
        Refusal: the token is not known.
    """
    if not authorization:
        return None
    grant = grants.get(authorization.removeprefix("Bearer ").strip())
    if grant is None:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return grant
