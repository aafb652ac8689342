"""Calibration data to densities."""

from __future__ import annotations

from lewis_hub.guides import lewis, uniform

__all__ = ["lewis", "uniform"]
