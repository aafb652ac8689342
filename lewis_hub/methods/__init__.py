"""How sources become one tensor."""

from __future__ import annotations

from lewis_hub.methods import dare, linear, task_arithmetic, ties

__all__ = ["dare", "linear", "task_arithmetic", "ties"]
