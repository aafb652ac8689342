"""Where work is done: shaped like `map`, and with equal results wherever it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lewis_hub.errors import MergeError
from lewis_hub.merge.cluster import Ray, require_address

LARGE_ELEMENTS = 8 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


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
class Means:
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
