"""Products of Linears by oneDNN, which torch has for every x86 processor.

Of itself torch takes MKL for float32, which keeps AVX-512 for one maker's processors: on two cores
of an AMD EPYC (Zen 5) it does 215 GFLOP/s, and oneDNN 480. And MKL rounds otherwise on two threads
than on one for 7 rows, and for widths that are no multiple of the vectors'; oneDNN does not, but
where a few rows have a sum of many thousand terms each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

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
