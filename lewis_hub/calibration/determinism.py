"""As many threads as leave the arithmetic exactly what it is with one.

torch hands each thread an equal share of a tensor and works on it by pairs of vectors; the rest
that fills no pair takes another path, where an activation function may round otherwise. Shares of
whole pairs have no rest, so the measurements, and with them the merged bytes, are the same on any
number of cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

PAIR = 32  # float32 numbers in two of a CPU's widest vectors, AVX-512


def whole_shares(widths: Iterable[int], available: int) -> int:
    """The most threads, a power of two, that split every row into shares of whole pairs.

    Args:
        widths: numbers of features of what activation functions work on.
        available: threads there are, at least 1.
    """
    width = gcd(*widths)
    n_threads = 1
    while 2 * n_threads <= available and width % (2 * n_threads * PAIR) == 0:
        n_threads *= 2
    return n_threads


@contextmanager
def threads(n_threads: int) -> Iterator[None]:
    """Let torch work with so many threads for the time being."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# (x, weight, bias, what comes after: nothing); torch for some machines is built without it
by_onednn: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


class ByOneDNN(TorchFunctionMode):
    """A context manager, for what has no gradients: inside it Linears multiply by `by_rows`.

    So does what multiplies as a Linear or Conv1D does, such as an expert that is a slice of a
    parameter.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of torch's, or another in its place."""
        if func is torch.addmm and not kwargs and args[0].dim() == 1:  # as Conv1D multiplies
            bias, rows, matrix = args
            return by_rows(rows, matrix.T, bias)
        return (by_rows if func is linear else func)(*args, **(kwargs or {}))


def by_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """What `torch.nn.functional.linear` returns: input @ weight.T + bias; it has no gradients.

    Args:
        input: (..., k).
        weight: (n, k).
        bias: (n,).

    Returns:
        (..., n), by oneDNN in float32 on a CPU for which torch has it.

    Raises:
        RuntimeError: `weight` has no values.
    """
    if weight.is_meta and not input.is_meta:
        raise RuntimeError("a weight that is on meta has no values")  # torch returns nonsense
    here = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
    if here and is_there() and _is_plain(weight) and input.shape[-1] == weight.shape[1]:
        found: Tensor = by_onednn(input, weight, bias, "none", [], "")
        return found
    return linear(input, weight, bias)


def _is_plain(weight: Tensor) -> bool:
    """Whether it is a matrix that lies as oneDNN's kernels take it.

    Another layout it multiplies entry by entry; a class of its own may hold other numbers.
    """
    is_dense = weight.is_contiguous() or weight.T.is_contiguous()
    return weight.dim() == 2 and is_dense and type(weight) in (Tensor, Parameter)


@cache
def is_there() -> bool:
    """Whether torch has it for this processor."""
    backends: Any = torch.backends
    by_avx = backends.cpu.get_cpu_capability().startswith("AVX")
    return by_avx and by_onednn is not None and bool(backends.mkldnn.is_available())
