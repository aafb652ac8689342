"""lm-eval's prompt templates, compiled once instead of four times an item."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any


@contextmanager
def compiled_once() -> Iterator[None]:
    """Have lm-eval reuse a template that it has compiled before.

    Compiling them anew was more than half of the time of a small model's evaluation. A template
    holds no state, so what it renders is the same.
    """
    from lm_eval import utils

    environment: Any = utils.env
    environment.from_string = lru_cache(maxsize=256)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the instance's own; the method of its class is back
