"""Keeps libraries and Python from settings and code in the working folder.

It may be a clone of others, with any file beside a recipe.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SETTINGS = ("matplotlibrc", ".numba_config.yaml")  # of matplotlib and numba


@contextmanager
def hidden_settings() -> Iterator[None]:
    """Inside the block matplotlib and numba find no settings in the working folder.

    They would follow a link and print the lines that they do not understand. Both ask
    `os.path.exists` first, matplotlib when it is imported, numba whenever it compiles.
    """
    exists = os.path.exists

    def exists_elsewhere(path: Any) -> bool:
        return path not in SETTINGS and exists(path)

    os.path.exists = exists_elsewhere
    try:
        yield
    finally:
        os.path.exists = exists


def keep_out_of_path() -> None:
    """Let Python not import from the working folder in any process that this one starts.

    It would do so with `-c` and `-m`: multiprocessing and joblib start helpers in this way.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
