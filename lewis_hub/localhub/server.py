"""Serves an embedded Hub on the loopback interface.

Unmodified huggingface_hub, transformers, datasets and lm-eval can use it, for demos, tests and
rehearsing a publish. It is no production server. Needs the extra ``demo``.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import ipaddress
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.errors import ExtraMissingError, HubServerError

if TYPE_CHECKING:
    from lewis_hub.localhub.hub import Hub

LOOPBACK = ipaddress.ip_network("127.0.0.0/8")


@contextmanager
def serve(
    root: Path, host: str = "127.0.0.1", port: int = 0, *, jobs: bool = False
) -> Iterator[Hub]:
    """Serve a Hub from a folder, in a thread, until the context is left.

    A fresh folder gets a user with a write token and a read token. Port 0 takes a free one. With
    `jobs`, commands that clients with a write token send run on this machine.

    Raises:
        ExtraMissingError: the extra ``demo`` is not installed.
        HubServerError: `host` is not loopback, the port is taken, or the folder is being served.
    """
    host = _loopback_address(host)
    for module in ("starlette", "uvicorn", "markdown_it"):
        if importlib.util.find_spec(module) is None:
            raise ExtraMissingError("The embedded Hub", "demo")
    import uvicorn

    from lewis_hub.localhub.hub import Hub
    from lewis_hub.localhub.jobs import Jobs
    from lewis_hub.localhub.routes import application

    with (
        _locked(root),
        _listen(host, port) as api,
        _listen_elsewhere(*api.getsockname()) as storage,
    ):
        hub = Hub(root)
        hub.url, hub.storage_url = (
            "http://{}:{}".format(*listener.getsockname()) for listener in (api, storage)
        )
        running = Jobs(root, hub.url) if jobs else None
        config = uvicorn.Config(
            application(hub, running),
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
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([api, storage],), daemon=True)
        thread.start()  # clients may connect already: their requests wait
        try:
            yield hub
        finally:
            if running:
                running.close()
            server.should_exit = True
            thread.join()


def _loopback_address(host: str) -> str:
    """The address of a host; an error if other machines can reach it."""
    address = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(address) in LOOPBACK
    except ValueError:
        loopback = False
    if not loopback:
        raise HubServerError(
            host,
            "the embedded Hub binds to 127.0.0.0/8 only; it is no production server",
            "Use 127.0.0.1, and a tunnel such as `ssh -L` to reach it from elsewhere.",
        )
    return address


@contextmanager
def _locked(root: Path) -> Iterator[None]:
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


def _listen(host: str, port: int) -> socket.socket:
    try:
        return _listener(host, port)
    except OSError as error:
        raise HubServerError(
            f"{host}:{port}",
            f"the embedded Hub cannot listen there ({os.strerror(error.errno or 0)})",
            "Stop what listens there, or choose another port with --port.",
        ) from error


def _listen_elsewhere(host: str, port: int) -> socket.socket:
    """Listen at the other origin, since the Hub serves large files from a storage service.

    It is another loopback address, with the same port if that is free; where the system has only
    127.0.0.1 (macOS), it is another port.
    """
    other = "127.0.0.2" if host == "127.0.0.1" else "127.0.0.1"
    for address in ((other, port), (other, 0)):
        with contextlib.suppress(OSError):
            return _listener(*address)
    return _listener(host, 0)


def _listener(host: str, port: int) -> socket.socket:
    """A listening socket whose connections send at once.

    asyncio leaves Nagle's algorithm on where a listener was made without a protocol number. The
    body of an answer would then wait for the client's delayed acknowledgement of its head, 40 ms.
    """
    listener = socket.create_server((host, port))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
