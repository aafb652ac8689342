"""Calibration with equal bytes on any number of threads.

torch gives each thread an equal share of a tensor and works on it by pairs of vectors; the rest of
a share takes another path, on which an activation function may round otherwise. Shares of whole
pairs have no rest. Matrices are multiplied by oneDNN, which, unlike MKL, adds up each output in one
order whatever the number of threads, and is faster on AMD's processors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from lewis_hub.calibration.model import Linear, matrix
from lewis_hub.methods.numerics import torch_threads

PAIR = 32  # float32 numbers in two of a CPU's widest vectors, AVX-512


def whole_shares(widths: Iterable[int], available: int) -> int:
    """The most threads, a power of two, that split every row into shares of whole pairs.

    Args:
        widths: numbers of features that activation functions work on.
        available: the number of available threads, at least 1.
    """
    width = gcd(*widths)
    n_threads = 1
    while 2 * n_threads <= available and width % (2 * n_threads * PAIR) == 0:
        n_threads *= 2
    return n_threads


@contextmanager
def deterministic_threads(modules: Iterable[Linear]) -> Iterator[None]:
    """Limit torch to as many threads as leave the result of a model's forward pass unchanged."""
    widths = {matrix(module).shape[1] for module in modules}
    with torch_threads(whole_shares(widths, torch.get_num_threads())):
        yield


class ByOneDNN(TorchFunctionMode):
    """A context manager without gradients: inside it Linears and Conv1Ds multiply by `by_rows`.

    Slices of a parameter that are multiplied as a Linear's weight, such as those of a mixture of
    experts, are included.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch's, or `by_rows` in its place."""
        if func is torch.addmm and not kwargs and args[0].dim() == 1:  # as Conv1D multiplies
            bias, rows, weight = args
            return by_rows(rows, weight.T, bias)
        return (by_rows if func is linear else func)(*args, **(kwargs or {}))


def by_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """What `torch.nn.functional.linear` returns, input @ weight.T + bias, without gradients.

    Args:
        input: (..., k).
        weight: (n, k).
        bias: (n,).

    Returns:
        (..., n), by oneDNN in float32 on a CPU that torch has it for.

    Raises:
        RuntimeError: `weight` has no values.
    """
    if weight.is_meta and not input.is_meta:
        raise RuntimeError("a weight that is on meta has no values")  # torch returns nonsense
    on_cpu = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
    fits = input.numel() > 0 and input.shape[-1] == weight.shape[-1]
    if on_cpu and fits and has_onednn() and _is_plain(weight):
        return linear(input.to_mkldnn(), weight, bias).to_dense()
    return linear(input, weight, bias)


def _is_plain(weight: Tensor) -> bool:
    """Whether it is a matrix in a layout that oneDNN's kernels take.

    A subclass may hold other numbers than its memory.
    """
    is_dense = weight.is_contiguous() or weight.T.is_contiguous()
    return weight.dim() == 2 and is_dense and type(weight) in (Tensor, Parameter)


@cache
def has_onednn() -> bool:
    """Whether torch has oneDNN for this processor."""
    backends: Any = torch.backends  # not all typed
    has_avx = backends.cpu.get_cpu_capability().startswith("AVX")
    return bool(has_avx and backends.mkldnn.is_available())
