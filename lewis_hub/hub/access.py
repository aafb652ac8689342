"""Who may do what on the embedded Hub: tokens with roles, private and gated repositories.

``users.json`` in the Hub's folder lists tokens: ``[{"token", "user", "role", "namespaces"}]``.
A fresh folder gets one user who may write in every namespace, with a write and a read token.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lewis_hub.hub.blobs import write_json
from lewis_hub.hub.store import Repo, read_json

Role = Literal["read", "write"]
FIRST_USER = "lewis"


@dataclass(frozen=True)
class Grant:
    """What a token stands for.

    Attributes:
        namespaces: where its user owns repositories; "*" is everywhere, owner/name one alone.
    """

    token: str
    user: str
    role: Role
    namespaces: tuple[str, ...]

    def owns(self, place: str) -> bool:
        """Whether the user, with whatever token, could write in a namespace or repository."""
        return not {"*", place, place.partition("/")[0]}.isdisjoint(self.namespaces)


@dataclass(eq=False)
class Refusal(Exception):  # noqa: N818 - an answer, not a failure of ours
    """An answer that says no, as the Hub says it."""

    status: int
    message: str
    code: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)


def load_grants(path: Path) -> dict[str, Grant]:
    """Read the tokens by token; a missing file is written with a first user."""
    if not path.exists():
        first = [Grant(f"hf_{secrets.token_hex(16)}", FIRST_USER, role, ("*",)) for role in ROLES]
        save_grants(path, {grant.token: grant for grant in first})
    rows = read_json(path)
    return {row["token"]: Grant(**{**row, "namespaces": tuple(row["namespaces"])}) for row in rows}


ROLES: tuple[Role, ...] = ("write", "read")


def save_grants(path: Path, grants: Mapping[str, Grant]) -> None:
    """Write the tokens; only their owner's system account may read the file."""
    write_json(path, [asdict(grant) for grant in grants.values()])


def identify(authorization: str | None, grants: Mapping[str, Grant]) -> Grant | None:
    """Who calls; None is anonymous.

    Raises:
        Refusal: a token was sent that isn't known.
    """
    if not authorization:
        return None
    grant = grants.get(authorization.removeprefix("Bearer ").strip())
    if grant is None:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return grant


def not_found(grant: Grant | None) -> Refusal:
    """What the Hub says of a repository that is missing, or hidden from the caller."""
    if grant is None:
        return Refusal(401, "Invalid username or password.", "RepoNotFound")
    return Refusal(404, "Repository not found", "RepoNotFound")


def check_sees(grant: Grant | None, repo: Repo) -> None:
    """Refuse a caller who may not know that the repository exists."""
    if repo.private and not (grant and grant.owns(repo.id)):
        raise not_found(grant)


def check_reads(grant: Grant | None, repo: Repo) -> None:
    """Refuse a caller who may not have the files of a gated repository."""
    check_sees(grant, repo)
    if not repo.gated or (grant and (grant.owns(repo.id) or grant.user in repo.granted)):
        return
    noun = repo.kind.removesuffix("s")
    restricted = f"Access to {noun} {repo.id} is restricted"
    if grant is None:
        raise Refusal(
            401,
            f"{restricted}. You must have access to it and be authenticated to access it. "
            "Please log in.",
            "GatedRepo",
        )
    raise Refusal(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")


def check_role(grant: Grant | None) -> Grant:
    """Refuse a caller whose token may change nothing, wherever it is."""
    if grant is None:
        raise Refusal(401, "Invalid username or password.")
    if grant.role != "write":
        raise Refusal(403, "This token has the role read, a token with the role write is needed")
    return grant


def check_writes(caller: Grant | None, place: str, noun: str) -> Grant:
    """Refuse a caller who may not create or change what lies in a namespace or repository."""
    grant = check_role(caller)
    if not grant.owns(place):
        namespace = place.partition("/")[0]
        raise Refusal(
            403, f'You don\'t have the rights to create a {noun} under the namespace "{namespace}"'
        )
    return grant
