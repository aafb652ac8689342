"""Products of Linears by oneDNN, which torch has for every x86 processor.

Of itself torch takes MKL for float32, which keeps AVX-512 for one maker's processors: on two cores
of an AMD EPYC (Zen 5) it does 215 GFLOP/s, and oneDNN 480. Nor does what oneDNN finds depend on the
number of threads, as it does with MKL where a width is no multiple of the vectors'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.weight, self.bias, "none", [], ""
        )
        return found


def multiply_by_onednn(model: nn.Module, device: str) -> None:
    """Let every Linear of a model multiply by oneDNN, if it is on a CPU and torch has it there.

    Args:
        model: in float32, if it is on a CPU; to be run without gradients from now on.
        device: as torch names it.
    """
    if device != "cpu" or not is_there():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Linear


def is_there() -> bool:
    """Whether torch has it for this processor."""
    backends: Any = torch.backends
    by_avx = backends.cpu.get_cpu_capability().startswith("AVX")
    return by_avx and bool(backends.mkldnn.is_available())
