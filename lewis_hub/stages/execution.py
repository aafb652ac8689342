"""How a merge runs, and what every step of one merge knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.progress import Progress
from lewis_hub.recipe import Recipe
from lewis_hub.stages.checking import Examined
from lewis_hub.stages.sources import Inputs

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Folders = Mapping[str, Path]  # pinned source -> a complete local snapshot


@dataclass(frozen=True)
class Execution:
    """Where and how the work is done; the merged weights are the same whatever is chosen here.

    Attributes:
        runner: `inline`, `threads` (one a core) or `threads:N`.
        device: where models run to be measured and scored, as torch names it.
        max_shard_bytes: largest file of weights.
        replace: whether a folder that is there already may be replaced.
        allow_code: whether benchmarks may run code that a model wrote.
        allow_pickle: whether sources may have pickled weights alone.
    """

    runner: str = "threads"
    device: str = "cpu"
    max_shard_bytes: int = 5_000_000_000
    replace: bool = False
    allow_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class Step:
    """What every step after the check knows."""

    recipe: Recipe
    inputs: Inputs
    examined: Examined
    execution: Execution
    api: HfApi
    progress: Progress
