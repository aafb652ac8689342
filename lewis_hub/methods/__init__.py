"""How sources become one tensor."""

from __future__ import annotations

from lewis_hub.methods import averages, dare, ram, regmean, selection, spectral, ties

__all__ = ["averages", "dare", "ram", "regmean", "selection", "spectral", "ties"]
