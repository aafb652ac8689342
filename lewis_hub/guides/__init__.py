"""Measurements to densities: importing this package registers the guides in its files."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

for _file in sorted(Path(__file__).parent.glob("*.py")):
    if "\n@register(" in _file.read_text(encoding="utf-8"):
        import_module(f"{__name__}.{_file.stem}")
