"""Execution settings: devices and runners, limits and permissions."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from lewis_hub.errors import DeviceError
from lewis_hub.merge.runners import Backend, Ray, Runner, parse_runner
from lewis_hub.recipe.schema import Evaluation
from lewis_hub.workflow.resources import Loading

SOFTWARE = (
    *("torch", "transformers", "tokenizers", "accelerate", "safetensors", "huggingface_hub"),
    *("datasets", "lm_eval", "numpy", "numba"),
)


@dataclass(frozen=True)
class Execution:
    """Execution settings; none of them changes the merged weights.

    Attributes:
        runner: `inline`, `threads` (one per core), `threads:N` or `ray`.
        ray_address: of the cluster; None: Ray is started on this machine.
        device: torch device on which models are measured and scored. With `cuda` the weights are
            merged there too, unless Ray's workers merge them.
        max_shard_bytes: limit for a file of weights.
        max_memory_bytes: a model that needs more is measured block by block; None: no limit.
        replace: whether an existing output folder may be replaced.
        allow_code: whether benchmarks may run code that a model wrote.
        allow_nan: whether sources may hold NaN and infinity, which are replaced by the base's
            values.
        allow_pickle: whether sources may have only pickled weights.
        held_out: tasks that are scored later if the recipe scores nothing; calibration does not
            draw their items.
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
        """The runner of this name."""
        return parse_runner(self.runner, self.ray_address)

    @property
    def loading(self) -> Loading:
        """The device and memory limit for measured models."""
        return Loading(self.device, self.max_memory_bytes)

    def means(self, *, is_read_next: bool) -> Backend:
        """Return runner and device of a merge; `is_read_next`: whether the files are read soon."""
        device = self.device if self.device.startswith("cuda") else None
        return Backend(self.workers, device, is_read_next)

    def require_usable(self) -> None:
        """Refuse a runner or device that this machine does not have.

        Raises:
            MergeError: the runner is unknown, or the address is invalid.
            ExtraMissingError: Ray is not installed.
            DeviceError: torch does not find the device.
        """
        workers = self.workers
        if isinstance(workers, Ray):
            workers.require_installed()
        _require_device(self.device)


def software() -> dict[str, str]:
    """Return the versions of the installed libraries, by name."""
    found = {"lewis_hub": version("lewis-hub"), "python": python_version()}
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
