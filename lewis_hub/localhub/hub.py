"""An embedded Hub: its repositories, tokens and faults, and its addresses while it is served.

``users.json`` in the Hub's folder lists tokens: ``[{"token", "user", "role", "namespaces"}]``.
A fresh folder gets one user who may write in every namespace, with a write and a read token.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from lewis_hub.localhub.faults import Fault, Faults
from lewis_hub.localhub.store import Store, replacing

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Role = Literal["write", "read"]
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


class Hub:
    """A Hub in a folder.

    Attributes:
        url: the Hub's address, for ``HF_ENDPOINT``; empty until it is served.
        storage_url: the other origin, which stores large files.
        signing_key: signs the addresses of large files.
        publishers: identity of a CI run -> the repository that it may publish without a token.
        faults: the faults of requests; `fail` and `faults.delay_s` set them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root)
        self.publishers: dict[str, str] = {}
        self.faults = Faults()
        self.url = self.storage_url = ""
        self.signing_key = secrets.token_bytes(32)
        self.grants: dict[str, Grant] = {}  # by token
        if self._users.exists():
            self.grants = {g.token: g for g in GRANTS.validate_json(self._users.read_bytes())}
        else:
            self.add_token(f"hf_{secrets.token_hex(16)}", FIRST_USER, "write", ("*",))
            self.add_token(f"hf_{secrets.token_hex(16)}", FIRST_USER, "read", ("*",))

    @property
    def write_token(self) -> str:
        """The first token that may write."""
        return self._first("write").token

    @property
    def read_token(self) -> str:
        """The first token that may only read."""
        return self._first("read").token

    @property
    def user(self) -> str:
        """The user of `write_token`."""
        return self._first("write").user

    @property
    def _users(self) -> Path:
        return self.root / "users.json"

    def _first(self, role: Role) -> Grant:
        return next(grant for grant in self.grants.values() if grant.role == role)

    def api(self, token: str | None = None) -> HfApi:
        """A client of this Hub, by default with `write_token`."""
        from huggingface_hub import HfApi  # it reads HF_ENDPOINT when it is imported

        return HfApi(endpoint=self.url, token=token or self.write_token)

    def add_token(
        self, token: str, user: str, role: Role, namespaces: tuple[str, ...] = ()
    ) -> None:
        """Accept a token, also after a restart; its user owns `namespaces` (by default its own)."""
        self.grants[token] = Grant(token, user, role, namespaces or (user,))
        with replacing(self._users) as file:  # only the owner's system account may read it
            file.write(GRANTS.dump_json(list(self.grants.values()), indent=2))

    def fail(
        self,
        path: str,
        status: int | Literal["drop"],
        *,
        times: int = 1,
        method: str | None = None,
        after_bytes: int | None = None,
        skip: int = 0,
    ) -> Fault:
        """Let requests whose path and query match a pattern fail from now on; see `Fault`."""
        fault = Fault(re.compile(path), status, times, method, after_bytes, skip)
        self.faults.pending.append(fault)
        return fault

    def clear(self) -> None:
        """Remove all repositories, publishers, contents and faults; tokens stay."""
        self.faults.clear()
        self.publishers.clear()
        self.store.clear()
