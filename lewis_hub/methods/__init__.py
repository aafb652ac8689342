"""How sources become one tensor."""

from __future__ import annotations

from lewis_hub.methods import averages, breadcrumbs, dare, della, regmean, selection, spheres, ties

__all__ = [
    "averages",
    "breadcrumbs",
    "dare",
    "della",
    "regmean",
    "selection",
    "spheres",
    "ties",
]
