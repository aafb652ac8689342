"""How sources become one tensor."""

from __future__ import annotations

from lewis_hub.methods import (
    arcee_fusion,
    breadcrumbs,
    cabs,
    dare,
    della,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    passthrough,
    pcb,
    regmean,
    sce,
    slerp,
    task_arithmetic,
    ties,
)

__all__ = [
    "arcee_fusion",
    "breadcrumbs",
    "cabs",
    "dare",
    "della",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "passthrough",
    "pcb",
    "regmean",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]
