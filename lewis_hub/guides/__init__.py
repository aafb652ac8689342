"""Calibration data to densities."""

from __future__ import annotations

from lewis_hub.guides import activation_shift, aim, controls, lewis, magnitude, owl, uniform

__all__ = ["activation_shift", "aim", "controls", "lewis", "magnitude", "owl", "uniform"]
