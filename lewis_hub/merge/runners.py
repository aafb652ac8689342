"""Where work is done: shaped like `map`, and with equal results wherever it is."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lewis_hub.errors import ExtraMissingError, LewisHubError, MergeError

ADDRESS = re.compile(r"auto|([^\s:/\[\]]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}")
N_RETRIES = 3  # of an item whose worker was lost
CONNECT_S = 10.0
LARGE_ELEMENTS = 8 << 20
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray's processes listen on no other address

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ray:
    """Workers of a Ray cluster, on machines that see the same folders under the same paths.

    Attributes:
        address: `auto` or HOST:PORT of the cluster that this machine is part of; None: a Ray of our
            own on this machine, for as long as the work lasts. Where this process is connected to
            a Ray already, that one is used and left running.
    """

    address: str | None = None

    def require_installed(self) -> None:
        """Refuse early what `map` would refuse.

        Raises:
            ExtraMissingError: Ray is not installed.
        """
        if importlib.util.find_spec("ray") is None:
            raise ExtraMissingError("The runner `ray`", "ray")

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """As `map`, but the results come as they are finished; an item of a lost worker is redone.

        Function, items and results travel by pickle. After an error or an interruption nothing new
        is begun, and what was begun is ended.

        Raises:
            LewisHubError: what the function raised, as it was.
            MergeError: there is no such cluster, or a worker failed in another way.
            ExtraMissingError: Ray is not installed.
        """
        self.require_installed()
        with _connected(self.address) as ray:
            task = ray.remote(max_retries=N_RETRIES)(_call)
            open_tasks = [task.remote(function, item) for item in items]
            try:
                while open_tasks:
                    (finished,), open_tasks = ray.wait(open_tasks)
                    yield _result(ray, finished)
            finally:
                for left in open_tasks:
                    ray.cancel(left, force=True)


def cpus_of_this_task() -> int:
    """How many processors the cluster lends to the task that this is called from."""
    import ray

    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def require_address(address: str) -> None:
    """Refuse what cannot be a cluster's address.

    Raises:
        MergeError: it is neither `auto` nor HOST:PORT.
    """
    if not ADDRESS.fullmatch(address):
        remedy = "Write `auto` on a machine of the cluster, or HOST:PORT such as head.local:6379."
        raise MergeError("ray address", f"`{address}` is not the address of a Ray cluster", remedy)


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected for as long as the block lasts."""
    if address is None:
        os.environ.setdefault(LOOPBACK_ONLY, "0")  # read when ray is imported
    import ray

    if ray.is_initialized():
        yield ray
        return
    try:
        if address is None:
            _start(ray)
        else:
            _require_answer(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        remedy = "See `ray status` on this machine, or work without Ray: `--runner threads`."
        raise MergeError(f"ray at {address or 'this machine'}", _line(error), remedy) from error
    try:
        with redirect_stdout(sys.stderr):  # there Ray tells of lost workers
            yield ray
    finally:
        ray.shutdown()


def _start(ray: Any) -> None:
    """Start a Ray of our own; twice if need be: where all cores are busy it may wait in vain."""
    for is_last in (False, True):
        try:
            ray.init(
                "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        except RuntimeError:
            ray.shutdown()
            if is_last:
                raise
        else:
            return


def _require_answer(address: str) -> None:
    """Ray itself would try for minutes.

    Raises:
        OSError: nobody listens there.
    """
    if address != "auto":
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


def _result(ray: Any, finished: Any) -> Any:
    remedy = "Run again, and finished shards are kept; or try `--runner threads`."
    try:
        return ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LewisHubError):
            raise error.cause from None
        told = f"{type(error.cause).__name__}: {_line(error.cause)}"
        raise MergeError("runner `ray`", f"a worker failed with {told}", remedy) from error
    except ray.exceptions.RayError as error:
        told = f"a worker was lost {1 + N_RETRIES} times on the same shard"
        problem = f"{told} ({type(error).__name__}: {_line(error)})"
        raise MergeError("runner `ray`", problem, remedy) from error


def _line(error: BaseException) -> str:
    """The first line of a message, without the full stop that follows it."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")


class Runner(Protocol):
    """Applies a function to items of this process, several at a time."""

    @property
    def n_workers(self) -> int:
        """How many items are worked on at a time."""

    @property
    def large_elements(self) -> int:
        """A tensor of more elements is one item for each worker, instead of one for one."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results in the order of the items; the first error ends it."""


@dataclass(frozen=True)
class Inline:
    """One item after the other, in the calling thread."""

    n_workers: int = 1
    large_elements: int = LARGE_ELEMENTS

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Exactly `map`."""
        return map(function, items)


@dataclass(frozen=True)
class Threads:
    """Threads of this process; the kernels run without the interpreter's lock."""

    n_workers: int
    large_elements: int = LARGE_ELEMENTS

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """As `map`; after an error or an interruption nothing new is begun."""
        pool = ThreadPoolExecutor(self.n_workers)
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Backend:
    """What a merge is made with; the bytes are the same whatever it is.

    Attributes:
        runner: where shards and their tensors are made.
        device: where the methods' definitions run, as torch names it; None: the kernels run, as
            they do with Ray's workers.
        is_read_next: whether the merged weights stay in the system's cache. Else they leave it as
            soon as they are on the disk, so that what is there and used stays.
    """

    runner: Runner | Ray
    device: str | None = None
    is_read_next: bool = False

    @property
    def n_together(self) -> int:
        """How many neighbouring tensors one machine works on at a time, at most."""
        if self.device:
            return 2  # one is on its way while the other is computed
        return 1 if isinstance(self.runner, Ray) else self.runner.n_workers


def inline() -> Runner:
    """Work in the calling thread."""
    return Inline()


def threads(n_workers: int | None = None) -> Runner:
    """Work in threads: as many as this process has cores, unless said otherwise."""
    return Threads(n_workers or len(os.sched_getaffinity(0)))


def parse_runner(name: str, ray_address: str | None = None) -> Runner | Ray:
    """`inline`, `threads`, `threads:N` or `ray`; an address goes with `ray` alone.

    Raises:
        MergeError: it is none of them, or the address is none.
    """
    kind, _, count = name.partition(":")
    if name == "ray":
        if ray_address is not None:
            require_address(ray_address)
        return Ray(ray_address)
    if ray_address is not None:
        problem = f"`{ray_address}` was given for the runner `{name}`"
        raise MergeError("ray address", problem, "Choose the runner `ray`, or give no address.")
    if name == "inline":
        return inline()
    if name == "threads":
        return threads()
    if kind == "threads" and count.isascii() and count.isdigit() and int(count) > 0:
        return threads(int(count))
    problem = f"there is no runner `{name}`"
    raise MergeError("runner", problem, "Write `inline`, `threads`, `threads:N` or `ray`.")
