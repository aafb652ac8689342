"""Calibration data to densities."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

for _file in sorted(Path(__file__).parent.glob("*.py")):
    if "\n@register(" in _file.read_text(encoding="utf-8"):  # the others import torch: 2 s
        import_module(f"{__name__}.{_file.stem}")
