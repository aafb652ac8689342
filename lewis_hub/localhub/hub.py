"""An embedded Hub: its repositories and tokens, its address, and the faults that tests ask for.

``users.json`` in the Hub's folder lists tokens: ``[{"token", "user", "role", "namespaces"}]``.
A fresh folder gets one user who may write in every namespace, with a write and a read token.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from lewis_hub.localhub.store import Store, replacing

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Role = Literal["write", "read"]
FIRST_USER = "lewis"
BUFFERED_S = 0.05  # buffers of a real link bridge pauses of the sender of about this length


@dataclass(frozen=True)
class Grant:
    """The rights of a token; a namespace may be "*" (all) or owner/name (one repository)."""

    token: str
    user: str
    role: Role
    namespaces: tuple[str, ...]
    only_gated: bool = False  # of a CI identity: it sees no private repository

    def owns(self, where: str) -> bool:
        """Whether the user owns a namespace or repository, whatever the token's role."""
        return not {"*", where, where.partition("/")[0]}.isdisjoint(self.namespaces)


GRANTS = TypeAdapter(list[Grant])


@dataclass
class Fault:
    """A fault of requests whose path and query match, after `skip` that succeed.

    The request is carried out only if `after_bytes` of its answer reach the client before a drop.
    """

    path: re.Pattern[str]
    status: int | Literal["drop"]
    times: int
    method: str | None
    after_bytes: int | None = None
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)  # of an answer with `status`


@dataclass
class Faults:
    """The faults from now on."""

    pending: list[Fault] = field(default_factory=list)
    delay_s: float = 0.0  # before every answer
    bytes_per_s: float | None = None  # shared by all bodies in both directions; None is unlimited
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


class Hub:
    """A Hub in a folder; `url` is its address for ``HF_ENDPOINT``, empty until it is served."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root)
        self.publishers: dict[str, str] = {}  # identity of a CI run -> the repo that it may write,
        # or the user whose gated repos it may read
        self.faults = Faults()
        self.url = ""
        self.storage_url = ""  # the other origin, which stores large files
        self.signing_key = secrets.token_bytes(32)  # for the addresses of large files
        self.users = root / "users.json"
        self.grants: dict[str, Grant] = {}  # by token
        if self.users.exists():
            self.grants = {g.token: g for g in GRANTS.validate_json(self.users.read_bytes())}
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
        with replacing(self.users) as file:  # only the owner's system account may read it
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
