"""Where work runs: threads of this process, or workers of a Ray cluster. The results are equal."""

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
from typing import Any, TypeVar

from lewis_hub.errors import ExtraMissingError, LewisHubError, MergeError
from lewis_hub.system import n_cores

ADDRESS = re.compile(r"auto|([^\s:/\[\]]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}")
N_RETRIES = 3  # of an item whose worker was lost
CONNECT_S = 10.0
LARGE_ELEMENTS = 32 << 20
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray's processes listen on no other address

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ray:
    """Workers of a Ray cluster, on machines that see the same folders under the same paths.

    Without an address, a cluster is started on this machine and stopped afterwards. If this process
    is already connected to a cluster, that cluster is used and stays connected.
    """

    address: str | None = None  # `auto`, or HOST:PORT

    def require_installed(self) -> None:
        """Raise an ExtraMissingError if Ray is not installed."""
        if importlib.util.find_spec("ray") is None:
            raise ExtraMissingError("The runner `ray`", "ray")

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Return each result when it is finished; an item is repeated if its worker is lost.

        Function, items and results are pickled. After an error or an interruption all tasks are
        cancelled.

        Raises:
            LewisHubError: raised by the function.
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
    """The processors that the cluster assigned to the calling task."""
    import ray

    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Yield the module `ray` while it is connected."""
    if address is None:
        os.environ.setdefault(LOOPBACK_ONLY, "0")  # read when ray is imported
    import ray

    if ray.is_initialized():
        yield ray
        return
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            _start(ray, **options, job_config=_installed_only(ray))
        else:
            if address != "auto":  # Ray itself would try to connect for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            ray.init(address, **options, job_config=_installed_only(ray))
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        remedy = "See `ray status` on this machine, or work without Ray: `--runner threads`."
        raise MergeError(f"ray at {address or 'this machine'}", _line(error), remedy) from error
    try:
        with redirect_stdout(sys.stderr):  # Ray reports lost workers on stdout
            yield ray
    finally:
        ray.shutdown()


def _installed_only(ray: Any) -> Any:
    """Settings by which workers import what is installed.

    Ray would put the folder that this process works in first on their path, unless the job has a
    folder of its own.
    """

    class InstalledOnly(ray.job_config.JobConfig):  # type: ignore[misc]
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return InstalledOnly()


def _start(ray: Any, **options: Any) -> None:
    """Start a cluster on this machine; try twice, as it may time out while all cores are busy."""
    for is_last in (False, True):
        try:
            ray.init("local", include_dashboard=False, **options)
        except RuntimeError:
            ray.shutdown()
            if is_last:
                raise
        else:
            return


def _result(ray: Any, finished: Any) -> Any:
    remedy = "Run again, and finished shards are kept; or try `--runner threads`."
    try:
        return ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LewisHubError):
            raise error.cause from None
        problem = f"a worker failed with {type(error.cause).__name__}: {_line(error.cause)}"
        raise MergeError("runner `ray`", problem, remedy) from error
    except ray.exceptions.RayError as error:
        reason = f"{type(error).__name__}: {_line(error)}"
        problem = f"a worker was lost {1 + N_RETRIES} times on the same shard ({reason})"
        raise MergeError("runner `ray`", problem, remedy) from error


def _line(error: BaseException) -> str:
    """The first line of a message, without its full stop."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")


@dataclass(frozen=True)
class Runner:
    """Threads of this process; one thread is the calling thread itself."""

    n_workers: int = 1  # items that are worked on at a time
    large_elements: int = LARGE_ELEMENTS  # a tensor with more elements is divided among workers

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Return the results in the order of the items; after an error no further item begins."""
        if self.n_workers == 1:
            yield from map(function, items)
            return
        pool = ThreadPoolExecutor(self.n_workers)
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def threads(n_workers: int | None = None) -> Runner:
    """A runner with this number of threads; None: one per core of this process."""
    return Runner(n_workers or n_cores())


@dataclass(frozen=True)
class Backend:
    """The hardware that a merge runs on; the merged bytes do not depend on it."""

    runner: Runner | Ray
    device: str | None = None  # of torch, for the methods' definitions; None: kernels on the CPU
    is_read_next: bool = False  # whether merged weights stay in the page cache

    @property
    def n_together(self) -> int:
        """Consecutive tensors that one machine works on at a time, at most."""
        if self.device:
            return 2  # one is transferred while the other is computed
        return 1 if isinstance(self.runner, Ray) else self.runner.n_workers


def parse_runner(name: str, ray_address: str | None = None) -> Runner | Ray:
    """Parse `inline`, `threads`, `threads:N` or `ray`; only `ray` takes an address."""
    if name == "ray":
        if ray_address is not None and not ADDRESS.fullmatch(ray_address):
            problem = f"`{ray_address}` is not the address of a Ray cluster"
            remedy = "Write `auto` on a machine of the cluster, or HOST:PORT such as "
            raise MergeError("ray address", problem, f"{remedy}head.local:6379.")
        return Ray(ray_address)
    if ray_address is not None:
        problem = f"`{ray_address}` was given for the runner `{name}`"
        raise MergeError("ray address", problem, "Choose the runner `ray`, or give no address.")
    if name == "inline":
        return Runner()
    if match := re.fullmatch("threads(?::0*([1-9][0-9]*))?", name):
        return threads(int(match[1]) if match[1] else None)
    problem = f"there is no runner `{name}`"
    raise MergeError("runner", problem, "Write `inline`, `threads`, `threads:N` or `ray`.")
