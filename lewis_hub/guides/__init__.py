"""Measurements to densities."""

from __future__ import annotations

from lewis_hub.guides import aim, baselines, lewis, owl

__all__ = ["aim", "baselines", "lewis", "owl"]
