"""The arithmetic on pieces: compiled by numba, or in numpy where numba cannot be had."""

from __future__ import annotations

try:
    from lewis_hub.merge.counting import count_high, count_low, magnitudes, sort_out
    from lewis_hub.merge.kernels import average, merge_task_vectors
    from lewis_hub.merge.scaling import scale_up
except ImportError:  # no numba for this machine; slower, and the same bytes
    from lewis_hub.merge.plain import (
        average,
        count_high,
        count_low,
        magnitudes,
        merge_task_vectors,
        scale_up,
        sort_out,
    )

__all__ = [
    "average",
    "count_high",
    "count_low",
    "magnitudes",
    "merge_task_vectors",
    "scale_up",
    "sort_out",
]
