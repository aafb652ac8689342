"""How a merge runs, and what every step of one merge knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING

from lewis_hub import __version__
from lewis_hub.errors import DeviceError
from lewis_hub.evaluate.benchmarks import LoadedTasks, load_tasks
from lewis_hub.merge.runners import Means, Ray, Runner, parse_runner
from lewis_hub.progress import Progress
from lewis_hub.recipe.schema import Evaluation, Recipe
from lewis_hub.workflow.check import Examined
from lewis_hub.workflow.evaluate import selection
from lewis_hub.workflow.memory import Loading
from lewis_hub.workflow.resolve import Inputs, scored_commits

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lewis_hub.checkpoint.ranges import Location


SOFTWARE = (
    *("torch", "transformers", "tokenizers", "accelerate", "safetensors", "huggingface_hub"),
    *("datasets", "lm_eval", "numpy", "llvmlite"),
)
Folders = Mapping[str, Path]  # pinned source -> a complete local snapshot


@dataclass(frozen=True)
class Execution:
    """Where and how the work is done; the merged weights are the same whatever is chosen here.

    Attributes:
        runner: `inline`, `threads` (one a core), `threads:N` or `ray`.
        ray_address: of the cluster; None: a Ray of our own on this machine.
        device: where models run to be measured and scored, as torch names it. On `cuda` the weights
            are merged there too, unless Ray's workers do it.
        max_shard_bytes: largest file of weights.
        max_memory_bytes: of a model while it is measured; a larger one is never loaded whole.
            None: any may be.
        replace: whether a folder that is there already may be replaced.
        allow_code: whether benchmarks may run code that a model wrote.
        allow_nan: whether sources may hold NaN and infinity, which then count as the base's.
        allow_pickle: whether sources may have pickled weights alone.
        held_out: what is scored later, where the recipe scores nothing now: calibration does not
            draw its items all the same.
    """

    runner: str = "threads"
    ray_address: str | None = None
    device: str = "cpu"
    max_shard_bytes: int = 5_000_000_000
    max_memory_bytes: int | None = None
    replace: bool = False
    allow_code: bool = False
    allow_nan: bool = False
    allow_pickle: bool = False
    held_out: Evaluation | None = None

    @property
    def workers(self) -> Runner | Ray:
        """The runner by its name."""
        return parse_runner(self.runner, self.ray_address)

    @property
    def loading(self) -> Loading:
        """How models are brought into memory to be measured."""
        return Loading(self.device, self.max_memory_bytes)

    def means(self, *, is_read_next: bool) -> Means:
        """What the weights are made with, which are or are not read soon after."""
        device = self.device if self.device.startswith("cuda") else None
        return Means(self.workers, device, is_read_next)

    def require_usable(self) -> None:
        """Refuse what this machine does not have, before any work.

        Raises:
            MergeError: there is no such runner, or the address is none.
            ExtraMissingError: Ray is not installed.
            DeviceError: torch does not find the device.
        """
        workers = self.workers
        if isinstance(workers, Ray):
            workers.require_installed()
        _require_device(self.device)


@dataclass(frozen=True)
class Step:
    """What every step after the check knows.

    Attributes:
        places: of a stream: pinned source -> where its weights are read. Else nothing: they are in
            the folders of the sources.
    """

    recipe: Recipe
    inputs: Inputs
    examined: Examined
    execution: Execution
    api: HfApi
    progress: Progress
    places: Mapping[str, Location] = field(default_factory=dict)

    @property
    def scoring(self) -> Evaluation | None:
        """What is scored, now or later."""
        return self.recipe.evaluate or self.execution.held_out

    @cached_property
    def scored(self) -> LoadedTasks:
        """The tasks that `scoring` names, loaded when they are first asked for.

        Raises:
            EvaluationError: one cannot be built.
        """
        assert self.scoring
        self.progress.say("Loading the benchmarks")
        allow_code = self.execution.allow_code
        selected = selection(self.recipe, self.scoring, allow_code=allow_code)
        return load_tasks(selected, scored_commits(self.api, selected))


def software() -> dict[str, str]:
    """What the work is done with: name -> version; what is not installed is left out."""
    found = {"lewis_hub": __version__, "python": python_version()}
    for name in SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _require_device(name: str) -> None:
    if name == "cpu":
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        problem = "torch knows no such device"
        raise DeviceError(f"device `{name}`", problem, "Write cpu, cuda or cuda:1.") from None
    n_found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= n_found:
        found = f"only {n_found}, counted from cuda:0" if n_found else "none"
        problem = f"torch {torch.__version__} finds {found}"
        remedy = "Use `--device cpu`, or install a driver and a torch that was built for CUDA."
        raise DeviceError(f"device `{name}`", problem, remedy)
