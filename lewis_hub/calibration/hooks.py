"""Sums over the inputs of a model's Linears, and of the parameters that no Linear owns.

Hooks show the input of each Linear. But transformers keeps the expert matrices of a
mixture-of-experts block as one parameter of three dimensions and multiplies tokens with a slice of
it, so there is no module to hook. A function mode looks at every matrix product instead: if one
factor is a view of such a parameter, the other factor holds the tokens.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from lewis_hub.calibration.grams import InputSum, sum_of_squares
from lewis_hub.calibration.texts import TokenBatch
from lewis_hub.errors import CalibrationModelError, EmptyCalibrationError
from lewis_hub.methods.numerics import all_finite

Statistic = Callable[[Tensor], Tensor]  # (n_tokens, in_features) -> its sum over the tokens
Observe = Callable[[str, Tensor], None]  # takes a module's path and its input, (..., in_features)


@contextmanager
def hooked(modules: Mapping[str, nn.Module], *observers: Observe) -> Iterator[None]:
    """Show the inputs of modules to observers, before the modules run, inside the context."""

    def hook(path: str, observe: Observe) -> Callable[..., None]:
        def show(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            observe(path, args[0] if args else next(iter(named.values())))

        return show

    with ExitStack() as handles:
        for path, module in modules.items():
            for observe in observers:
                handle = module.register_forward_pre_hook(hook(path, observe), with_kwargs=True)
                handles.enter_context(handle)
        yield


class OutOfStepError(Exception):
    """A module's input has not one row per token, so the mask cannot say which rows count."""


class _LastTensor:
    """The last tensor, as a weak reference; a tensor that was written to since is another one."""

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = -1

    def is_still(self, x: Tensor) -> bool:
        return self._x is not None and self._x() is x and self._version == x._version

    def set(self, x: Tensor) -> None:
        self._x, self._version = weakref.ref(x), x._version


class InputRecorder:
    """Sums a statistic over the kept tokens of each module's input.

    q, k and v have the same input tensor, and so have gate and up: the sum is computed once, and
    no activation is kept.
    """

    def __init__(self, statistic: Statistic) -> None:
        self.totals: dict[str, InputSum] = {}
        self._statistic = statistic
        self._of_batch: dict[str, InputSum] = {}
        self._n_rows = 0
        self._kept: Tensor | None = None  # flat indices of the kept tokens; None: all of them
        self._last = _LastTensor()
        self._last_sum: InputSum | None = None

    def start(self, batch: TokenBatch) -> None:
        """Prepare for the inputs of a batch."""
        mask = batch.attention_mask.flatten()
        self._n_rows = len(mask)
        self._kept = None if bool(mask.all()) else mask.nonzero().flatten()
        self._of_batch = {}

    def finish(self) -> None:
        """Add the batch to the totals; a batch that was not finished does not count."""
        made: dict[tuple[int, int], InputSum] = {}  # modules that share a sum share the next one
        for path, added in self._of_batch.items():
            before = self.totals.get(path)
            both = id(before), id(added)
            if both not in made:
                made[both] = before + added if before else added
            self.totals[path] = made[both]

    def see(self, path: str, x: Tensor) -> None:
        """Add a module's input; raises an OutOfStepError if its rows and the mask differ."""
        added = self._sum(x)
        if added.n_tokens:
            before = self._of_batch.get(path)
            self._of_batch[path] = before + added if before else added

    def _sum(self, x: Tensor) -> InputSum:
        if self._last_sum is None or not self._last.is_still(x):
            rows = x.detach().reshape(-1, x.shape[-1])
            if self._kept is not None:
                if len(rows) != self._n_rows:
                    raise OutOfStepError
                rows = rows.index_select(0, self._kept.to(rows.device))
            self._last_sum = InputSum(self._statistic(rows), len(rows))
            self._last.set(x)
        return self._last_sum


class CallOrder:
    """Records in which order modules are called, and which have the same input tensor."""

    def __init__(self) -> None:
        self.levels: list[list[str]] = []
        self.n_rows: dict[str, list[int]] = {}  # path -> rows of each call
        self._last = _LastTensor()

    def see(self, path: str, x: Tensor) -> None:
        """Record a call."""
        calls = self.n_rows.setdefault(path, [])
        calls.append(x.numel() // x.shape[-1])
        if not self._last.is_still(x):
            self.levels.append([])  # stays empty if all its modules were called before
        if len(calls) == 1:
            self.levels[-1].append(path)
        self._last.set(x)


def require_seen(measured: Mapping[str, object], name: str) -> None:
    """Refuse an empty measurement of the source `name` with an EmptyCalibrationError."""
    if not measured:
        remedy = "Choose calibration data with texts in it."
        raise EmptyCalibrationError(name, "no calibration token reached a block", remedy)


def require_measured(measured: Mapping[str, float], name: str) -> None:
    """Refuse an empty measurement, as `require_seen`, or numbers that are NaN or infinite."""
    require_seen(measured, name)
    for module, number in measured.items():
        if not math.isfinite(number):
            raise not_finite(f"the products of activations and weights in {module}", name)


def require_finite(totals: Mapping[str, InputSum], name: str) -> None:
    """Refuse sums that are NaN or infinite with a CalibrationModelError."""
    for path, one in totals.items():
        if not all_finite(one.total):
            raise not_finite(f"the activations before {path}", name)


def not_finite(numbers: str, name: str) -> CalibrationModelError:
    """The error for numbers of the source `name` that are NaN or infinite."""
    remedy = "Its weights may be broken, or overflow in float16: try `--device cpu`."
    return CalibrationModelError(name, f"{numbers} are not finite", remedy)


PRODUCTS: Sequence[Callable[..., Any]] = (  # of their first two arguments
    *(linear, torch.matmul, torch.mm, torch.bmm),  # a Linear's weight is stored as (n_out, n_in)
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
)
FACTORS = dict.fromkeys(PRODUCTS, (0, 1))  # product -> arguments that are multiplied
FACTORS |= {torch.addmm: (1, 2), torch.baddbmm: (1, 2)}

Slice = tuple[str, int, tuple[int, ...], tuple[int, ...]]  # of: path, offset, shape, stride


class ProductRecorder(TorchFunctionMode):
    """Sums a statistic of the tokens that each slice of some parameters is multiplied with.

    A context manager: it sees the products inside it. Every token counts, so texts must not be
    padded.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], statistic: Statistic = sum_of_squares
    ) -> None:
        super().__init__()
        self._parameters, self._statistic = parameters, statistic
        self.sums: dict[Slice, InputSum] = {}
        starts = sorted((p.data_ptr(), path) for path, p in parameters.items())
        self._starts, self._paths = [s for s, _ in starts], [path for _, path in starts]

    @property
    def used(self) -> dict[str, Tensor]:
        """The parameters of which a slice was multiplied with a token."""
        used = {path for path, *_ in self.sums}
        return {path: p for path, p in self._parameters.items() if path in used}

    def norms(self, path: str, n_tokens: int) -> Tensor:
        """The activation norm of each entry of a parameter: sqrt(Σ_t x_t² / n_tokens), float32.

        The statistic has to be the sum of squares. All tokens of the pass count, routed to a slice
        or not; NaN in slices that none was multiplied with.
        """
        parameter = self._parameters[path].detach()
        found = torch.full_like(parameter, torch.nan, dtype=torch.float32)
        for (of, offset, shape, stride), one in self.sums.items():
            if of == path:
                part = found.as_strided(shape, stride, offset)
                part.copy_(part.nan_to_num(0.0) + (one.total / n_tokens).float()[:, None])
        return found.sqrt_()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch's, and look at the factors of a product."""
        if func in FACTORS:
            given = (*args, *(kwargs or {}).values())
            left, right = (given[i] for i in FACTORS[func])
            if func is linear and right.dim() > 1:
                right = right.mT
            if path := self._owner(right):
                self._record(path, right, left)
            elif path := self._owner(left):
                self._record(path, left.mT, right.mT)
        return func(*args, **(kwargs or {}))

    def _owner(self, factor: Tensor) -> str | None:
        """The parameter that a tensor is a view of."""
        i = bisect_right(self._starts, factor.data_ptr()) - 1
        if i < 0 or factor.dim() < 2 or not factor.numel():
            return None
        parameter = self._parameters[self._paths[i]]
        end = parameter.data_ptr() + parameter.numel() * parameter.element_size()
        inside = factor.device == parameter.device and factor.dtype == parameter.dtype
        return self._paths[i] if inside and factor.data_ptr() < end else None

    def _record(self, path: str, weight: Tensor, tokens: Tensor) -> None:
        """Add `tokens` (..., n_tokens, n_in) to `weight` (..., n_in, n_out), a view."""
        for part, rows in _matrix_pairs(weight.detach(), tokens.detach()):
            seen = InputSum(self._statistic(rows), int(rows.any(dim=-1).sum()))
            if seen.total.any():
                parameter = self._parameters[path]
                offset = (part.data_ptr() - parameter.data_ptr()) // parameter.element_size()
                key = (path, offset, tuple(part.shape), part.stride())
                self.sums[key] = self.sums[key] + seen if key in self.sums else seen


def _matrix_pairs(weight: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each matrix of a stack, with the rows that it is multiplied with."""
    while weight.dim() > 2 and (weight.stride(0) == 0 or len(weight) == 1):  # one, repeated
        weight = weight[0]
    if weight.dim() == 2:
        yield weight, tokens.reshape(-1, tokens.shape[-1])
        return
    stacked = (weight[..., 0, 0] + tokens[..., 0, 0]).shape  # of both, broadcast
    weight = weight.expand(*stacked, *weight.shape[-2:])
    tokens = tokens.expand(*stacked, *tokens.shape[-2:])
    for place in product(*map(range, stacked)):
        yield weight[place], tokens[place]
