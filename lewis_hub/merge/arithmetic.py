"""The arithmetic on pieces: compiled by LLVM, or in numpy where that cannot be had."""

from __future__ import annotations

try:
    from lewis_hub.merge.counting import count_high, count_low, sample, sort_out
    from lewis_hub.merge.kernels import average, merge_task_vectors
    from lewis_hub.merge.low_rank import add_low_rank
    from lewis_hub.merge.scaling import scale_up
except ImportError:  # no llvmlite for this machine; slower, and the same bytes
    from lewis_hub.merge.plain import (
        add_low_rank,
        average,
        count_high,
        count_low,
        merge_task_vectors,
        sample,
        scale_up,
        sort_out,
    )

__all__ = [
    "add_low_rank",
    "average",
    "count_high",
    "count_low",
    "merge_task_vectors",
    "sample",
    "scale_up",
    "sort_out",
]
