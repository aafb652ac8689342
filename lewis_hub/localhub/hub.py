"""An embedded Hub: its repositories, tokens and Jobs, and its addresses while it is served."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.localhub.access import Grant, Role, load_grants, save_grants
from lewis_hub.localhub.faults import Fault, Faults
from lewis_hub.localhub.jobs import Jobs
from lewis_hub.localhub.store import Store

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class Hub:
    """A Hub in a folder.

    Attributes:
        url: the Hub's address, for ``HF_ENDPOINT``; empty until it is served.
        storage_url: the other origin, which stores large files.
        publishers: identity of a CI run -> the repository that it may publish without a token.
        jobs: runs Jobs as processes of this machine; None refuses them.
        faults: the faults of requests; `fail`, `drop` and `faults.delay_s` set them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root)
        self.grants = load_grants(root / "users.json")
        self.publishers: dict[str, str] = {}
        self.faults = Faults()
        self.jobs: Jobs | None = None
        self.url = self.storage_url = ""

    @property
    def write_token(self) -> str:
        """The first token that may write."""
        return self._token("write")

    @property
    def read_token(self) -> str:
        """The first token that may only read."""
        return self._token("read")

    @property
    def user(self) -> str:
        """The user of `write_token`."""
        return self.grants[self.write_token].user

    def _token(self, role: Role) -> str:
        return next(grant.token for grant in self.grants.values() if grant.role == role)

    def api(self, token: str | None = None) -> HfApi:
        """A client of this Hub, by default with `write_token`."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.url, token=token or self.write_token)

    def add_token(
        self, token: str, user: str, role: Role, namespaces: tuple[str, ...] | None = None
    ) -> Grant:
        """Accept a token, also after a restart; its user owns `namespaces` (by default its own)."""
        grant = Grant(token, user, role, namespaces if namespaces is not None else (user,))
        self.grants[token] = grant
        save_grants(self.root / "users.json", self.grants)
        return grant

    def fail(
        self, path: str, status: int, *, times: int = 1, method: str | None = None, skip: int = 0
    ) -> Fault:
        """Answer requests whose path and query match a pattern with an error; see `Fault`."""
        return self._add(Fault(re.compile(path), status, times, method, skip=skip))

    def drop(
        self,
        path: str,
        *,
        after_bytes: int | None = None,
        times: int = 1,
        method: str | None = None,
        skip: int = 0,
    ) -> Fault:
        """Cut the connection of requests whose path and query match a pattern; see `Fault`."""
        return self._add(Fault(re.compile(path), "drop", times, method, after_bytes, skip))

    def _add(self, fault: Fault) -> Fault:
        self.faults.pending.append(fault)
        return fault

    def clear(self) -> None:
        """Remove all repositories, publishers, contents and faults; tokens stay."""
        self.faults.clear()
        self.publishers.clear()
        self.store.clear()
