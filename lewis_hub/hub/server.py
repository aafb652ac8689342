"""The embedded Hub: as much of the Hugging Face Hub as its clients need, on the loopback interface.

It serves unmodified huggingface_hub, transformers, datasets and lm-eval, for demos, tests and
rehearsing a publish. It is no production server. Large files are served from a second loopback
address, as the Hub serves them from another origin. Needs the extra ``demo``.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import importlib.util
import ipaddress
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from lewis_hub.errors import ExtraMissingError, HubServerError
from lewis_hub.hub.access import Grant, Role, load_grants, save_grants
from lewis_hub.hub.faults import Fault, Faults
from lewis_hub.hub.jobs_server import Jobs
from lewis_hub.hub.store import Store

if TYPE_CHECKING:
    import uvicorn
    from huggingface_hub import HfApi


LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
PART_BYTES = 64 * 2**20
START_S = 10.0
ATTEMPTS = 20  # to find a port that is free on both addresses


class Hub:
    """A Hub in a folder, and, while it is served, its addresses.

    Attributes:
        url: for ``HF_ENDPOINT``.
        storage_url: the other origin, from which large files are read.
        part_bytes: larger files are uploaded in parts of this size.
        publishers: a CI's identity -> the repo that trusts it, to publish without a stored token.
        jobs: what runs Jobs, as processes of this machine; None: nothing does.
        faults: what goes wrong; `fail`, `drop` and `faults.delay_s` set it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root)
        self.grants = load_grants(root / "users.json")
        self.publishers: dict[str, str] = {}
        self.faults = Faults()
        self.part_bytes = PART_BYTES
        self.jobs: Jobs | None = None
        self.host, self.port = "127.0.0.1", 0
        self.storage_url = ""
        self._secret = secrets.token_bytes(32)

    @property
    def url(self) -> str:
        """The Hub's address."""
        return f"http://{self.host}:{self.port}"

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
        """Whose token `write_token` is."""
        return self.grants[self.write_token].user

    def _token(self, role: Role) -> str:
        return next(grant.token for grant in self.grants.values() if grant.role == role)

    def api(self, token: str | None = None) -> HfApi:
        """A client of this Hub; without a token of its own it has `write_token`."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.url, token=token or self.write_token)

    def add_token(
        self, token: str, user: str, role: Role, namespaces: tuple[str, ...] | None = None
    ) -> Grant:
        """Let a token in, now and after a restart; its user owns `namespaces` (its own)."""
        grant = Grant(token, user, role, namespaces if namespaces is not None else (user,))
        self.grants[token] = grant
        save_grants(self.root / "users.json", self.grants)
        return grant

    def fail(
        self, path: str, status: int, *, times: int = 1, method: str | None = None, skip: int = 0
    ) -> Fault:
        """Answer requests whose path and query match a pattern with an error.

        It strikes so many `times`, after the first `skip` that match.
        """
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
        """Cut the connection of matching requests, as `fail` chooses them.

        With `after_bytes` the request is carried out, and so much of the answer still arrives;
        without, nothing happens at all.
        """
        return self._add(Fault(re.compile(path), "drop", times, method, after_bytes, skip))

    def _add(self, fault: Fault) -> Fault:
        with self.faults.lock:
            self.faults.pending.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all repositories, publishers, contents and faults; tokens stay."""
        self.faults.clear()
        self.publishers.clear()
        self.store.clear()

    def stored_url(self, sha256: str, name: str) -> str:
        """Where a large file's bytes are read, for whoever was told."""
        signature = self._sign(sha256)
        return f"{self.storage_url}/lfs/{sha256}/{quote(name, safe='')}?signature={signature}"

    def upload_url(self, sha256: str, part: int | None = None) -> str:
        """Where a large file's bytes, or those of a part, are sent."""
        path = f"{sha256}/{part}" if part else sha256
        return f"{self.storage_url}/lfs-upload/{path}?signature={self._sign(f'upload {sha256}')}"

    def signed(self, text: str, signature: str) -> bool:
        """Whether this Hub signed an address for this text."""
        return hmac.compare_digest(self._sign(text).encode(), signature.encode())

    def _sign(self, text: str) -> str:
        return hmac.digest(self._secret, text.encode(), hashlib.sha256).hex()


@contextmanager
def serve(
    root: Path, host: str = "127.0.0.1", port: int = 0, *, jobs: bool = False
) -> Iterator[Hub]:
    """Serve a Hub from a folder, in a thread, until the context is left.

    Args:
        root: holds all the Hub's files; made if missing. A fresh one gets a user with a write
            token and a read token (`Hub.write_token`, `Hub.read_token`), kept in ``users.json``.
        host: an address of 127.0.0.0/8.
        port: 0 takes a free one.
        jobs: run the commands of Jobs that clients with a write token send, on this machine.

    Raises:
        ExtraMissingError: the extra ``demo`` is not installed.
        HubServerError: `host` is not loopback, the port is taken, or the folder is being served.
    """
    check_loopback(host)
    for module in ("starlette", "uvicorn", "markdown_it"):
        if importlib.util.find_spec(module) is None:
            raise ExtraMissingError("The embedded Hub", "demo")
    with _reserved(root), _listening(host, port) as sockets:
        hub = Hub(root)
        hub.host, hub.port = sockets[0].getsockname()[:2]
        other = sockets[1].getsockname()[0] if sockets[1:] else "localhost"
        hub.storage_url = f"http://{other}:{hub.port}"
        if jobs:
            hub.jobs = Jobs(root, hub.url)
        server = _server(hub)
        thread = threading.Thread(target=server.run, args=(sockets,), name="lewis-hub", daemon=True)
        thread.start()
        try:
            _await_start(server, thread)
            yield hub
        finally:
            if hub.jobs:
                hub.jobs.close()
            server.should_exit = True
            thread.join()


def check_loopback(host: str) -> None:
    """Refuse an address that others could reach.

    Raises:
        HubServerError: `host` is not in 127.0.0.0/8.
    """
    name = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(name) in LOOPBACK
    except ValueError:
        loopback = False
    if not loopback:
        raise HubServerError(
            host,
            "the embedded Hub binds to 127.0.0.0/8 only; it is no production server",
            "Use 127.0.0.1, and a tunnel such as `ssh -L` to reach it from elsewhere.",
        )


@contextmanager
def _reserved(root: Path) -> Iterator[None]:
    """Keep other processes from serving the same folder."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubServerError(
                str(root),
                "another embedded Hub serves this folder",
                "Stop that one, or choose another folder with --root.",
            ) from None
        yield


@contextmanager
def _listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listen on a loopback address and, at the same port, on the next one.

    Where the system knows no other loopback address than 127.0.0.1 (macOS), one listener has to do:
    `localhost` is then the other origin.
    """
    first = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    hosts = (str(first), str(first + 1 if first + 1 in LOOPBACK else LOOPBACK[1]))
    with ExitStack() as opened:
        for attempt in range(ATTEMPTS):
            listeners: list[socket.socket] = []
            try:
                for address in hosts:
                    listener = opened.enter_context(socket.socket())
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    same = listeners[0].getsockname()[1] if listeners else port
                    listener.bind((address, same))
                    listeners.append(listener)
                break
            except OSError as error:
                if listeners and error.errno == errno.EADDRNOTAVAIL:
                    break
                opened.close()
                if port or attempt == ATTEMPTS - 1:
                    raise HubServerError(
                        f"{host}:{port}",
                        f"the embedded Hub cannot listen there ({error.strerror})",
                        "Stop what listens there, or choose another port with --port.",
                    ) from error
        yield listeners


def _server(hub: Hub) -> uvicorn.Server:
    import uvicorn

    from lewis_hub.hub.routes import application

    config = uvicorn.Config(
        application(hub),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def _await_start(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + START_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise HubServerError("the embedded Hub", "it did not start", "Run it again.")
        time.sleep(0.005)
