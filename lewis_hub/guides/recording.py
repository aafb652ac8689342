"""Sums over the inputs that a model's modules are handed, batch by batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from torch import Tensor

from lewis_hub.guides.tokens import Batch


@dataclass(frozen=True)
class InputSum:
    """A statistic of a module's inputs, summed over `n_tokens` tokens."""

    total: Tensor
    n_tokens: int

    def __add__(self, other: InputSum) -> InputSum:
        return InputSum(self.total + other.total, self.n_tokens + other.n_tokens)

    def mean(self) -> Tensor:
        """Over the tokens, in the sum's dtype."""
        return self.total / self.n_tokens


class OutOfStepError(Exception):
    """A module's input has not one row per token, so the mask cannot say which rows count."""


class Sees(Protocol):
    """Takes the inputs of modules."""

    def see(self, path: str, x: Tensor) -> None:
        """Take the input, (..., in_features), that the module at `path` is about to be run on."""


class _Latest:
    """The tensor that was seen last, by a weak reference; another one once it was written to."""

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = -1

    def is_still(self, x: Tensor) -> bool:
        """Whether a tensor is that one, as it was."""
        return self._x is not None and self._x() is x and self._version == x._version

    def set(self, x: Tensor) -> None:
        """Remember a tensor."""
        self._x, self._version = weakref.ref(x), x._version


class Recorder:
    """Sums a statistic over the kept tokens of each module's input.

    q, k and v are handed the same tensor, and so are gate and up: summing once is most of what
    keeps the pass near the price of a plain forward. What is remembered is a weak reference and
    one sum, void once the tensor was written to; never an activation.
    """

    def __init__(self, summed: Callable[[Tensor], Tensor]) -> None:
        self.totals: dict[str, InputSum] = {}
        self._summed = summed
        self._of_batch: dict[str, InputSum] = {}
        self._n_rows = 0
        self._kept: Tensor | None = None  # flat indices of the kept tokens; None: all of them
        self._latest = _Latest()
        self._latest_sum: InputSum | None = None

    def start(self, batch: Batch) -> None:
        """Expect the inputs of a batch."""
        mask = batch.attention_mask.flatten()
        self._n_rows = len(mask)
        self._kept = None if bool(mask.all()) else mask.nonzero().flatten()
        self._of_batch = {}

    def finish(self) -> None:
        """Count the batch; one that was not finished counts for nothing."""
        made: dict[tuple[int, int], InputSum] = {}  # modules that share a sum share the next one
        for path, added in self._of_batch.items():
            before = self.totals.get(path)
            both = id(before), id(added)
            if both not in made:
                made[both] = before + added if before else added
            self.totals[path] = made[both]

    def see(self, path: str, x: Tensor) -> None:
        """Take a module's input: (..., in_features), a row for each token of the batch.

        Raises:
            OutOfStepError: it has not one row per token, and some are padding.
        """
        seen = self._sum(x)
        if seen.n_tokens:
            before = self._of_batch.get(path)
            self._of_batch[path] = before + seen if before else seen

    def _sum(self, x: Tensor) -> InputSum:
        if self._latest_sum is None or not self._latest.is_still(x):
            rows = x.detach().reshape(-1, x.shape[-1])
            if self._kept is not None:
                if len(rows) != self._n_rows:
                    raise OutOfStepError
                rows = rows.index_select(0, self._kept.to(rows.device))
            self._latest_sum = InputSum(self._summed(rows), len(rows))
            self._latest.set(x)
        return self._latest_sum


class HandedError(Exception):
    """A module is about to be run on `x`."""

    def __init__(self, x: Tensor) -> None:
        super().__init__("seen")
        self.x = x


class First:
    """Stops at the first input."""

    def see(self, path: str, x: Tensor) -> NoReturn:  # noqa: ARG002
        """Take it.

        Raises:
            HandedError: always.
        """
        raise HandedError(x)


class Order:
    """Sees in which order modules are called, and which are handed the very same tensor."""

    def __init__(self) -> None:
        self.levels: list[list[str]] = []
        self.n_rows: dict[str, list[int]] = {}  # of each call
        self._latest = _Latest()

    def see(self, path: str, x: Tensor) -> None:
        """Take a module's input."""
        calls = self.n_rows.setdefault(path, [])
        calls.append(x.numel() // x.shape[-1])
        if not self._latest.is_still(x):
            self.levels.append([])  # stays empty where those that are handed it were called before
        if len(calls) == 1:
            self.levels[-1].append(path)
        self._latest.set(x)
