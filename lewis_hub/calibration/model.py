"""A source's model, as transformers loads it from a local folder, and its structure.

Nothing here runs a repo's own code or opens a connection.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lewis_hub.calibration.failures import refusals
from lewis_hub.errors import CalibrationModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


LINE = 64  # bytes of a cache line, to which torch aligns its allocations


def load_model(folder: Path, device: str, name: str) -> PreTrainedModel:
    """Load a language model for measuring, in eval mode.

    Its class is the one that its configuration names; if transformers does not have it, it is
    loaded as a causal language model. On a CPU the arithmetic is float32, whatever the file's
    dtype, as half precision is slow there. On other devices the file's own dtype is kept.

    Args:
        folder: a complete local snapshot.
        device: as torch names it: "cpu", "cuda", "cuda:1". "cuda" is all GPUs together.
        name: the source for messages.

    Raises:
        CalibrationModelError: transformers cannot load it, it needs own code, weights that the
            architecture needs are not in the files, or the GPUs have no room for it.
    """
    import torch

    with refusals(name, "model"), quiet():
        model, report = model_class(folder).from_pretrained(
            folder,
            dtype=torch.float32 if device == "cpu" else "auto",
            device_map=placement(device, torch.cuda.device_count()),
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            experts_implementation="eager",
        )
        check_complete(name, report["missing_keys"])
        check_reads_tokens(name, model)
        check_on_gpus(name, getattr(model, "hf_device_map", {}), device)
        model.config.get_text_config().use_cache = False  # some keep one unless this says so
        align(model)
        return cast("PreTrainedModel", model.eval())


def placement(device: str, n_gpus: int) -> str | dict[str, str] | None:
    """The `device_map` of transformers for a device.

    Returns:
        "auto", which distributes blocks over all GPUs, for "cuda" with several GPUs; None for the
        CPU; else the one device.
    """
    if device == "cpu":
        return None
    return "auto" if device == "cuda" and n_gpus > 1 else {"": device}


def align(model: nn.Module) -> None:
    """Copy parameters that are not aligned to a cache line, such as those of a mapped file.

    Some processors round matrix products by the alignment, so measurements would depend on the
    offset of a tensor in its file.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % LINE:
            parameter.data = parameter.data.clone()


def check_on_gpus(name: str, placed: Mapping[str, int | str | torch.device], device: str) -> None:
    """Refuse a model with modules outside the GPUs, which every forward pass would move there.

    Args:
        name: the source for messages.
        placed: module -> its device, "cpu" or "disk".
        device: of the model.
    """
    if device != "cpu" and not {"cpu", "disk"}.isdisjoint(map(str, placed.values())):
        problem = "it is larger than the memory of all GPUs"
        remedy = "Measure it block by block: `--max-memory 1GB`, or anything less than it takes."
        raise CalibrationModelError(name, problem, remedy)


def model_class(folder: Path) -> Any:
    """The class of transformers that a folder's configuration names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    return next(filter(None, named), transformers.AutoModelForCausalLM)


def check_complete(name: str, missing: Iterable[str]) -> None:
    """Refuse a model with weights that are in no file, and would be random."""
    absent = sorted(missing)
    if absent:
        others = f"{len(absent) - 1} more of the weights that its architecture needs"
        problem = f"its files lack {absent[0]} (and {others})"
        remedy = "The config does not describe these files: check the source, or take another."
        raise CalibrationModelError(name, problem, remedy)


def check_reads_tokens(name: str, model: PreTrainedModel) -> None:
    """Refuse a model that takes only images or sound."""
    if "input_ids" not in inspect.signature(model.forward).parameters:
        problem = f"{type(model).__name__} reads no tokens"
        remedy = "Calibration measures language models; merge it with guide `uniform` instead."
        raise CalibrationModelError(name, problem, remedy)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report of transformers, as only the command line prints."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def config_value(model: PreTrainedModel, key: str) -> Any:
    """A value of the language model's configuration; None if it is not set."""
    return getattr(model.config.get_text_config(), key, None)


Linear = nn.Linear | Conv1D


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every list of blocks by its path: the outermost ModuleLists whose items hold a Linear.

    A decoder has one, an encoder-decoder two; others belong to a vision tower or an extra head,
    which calibration texts do not reach. Lists inside a block, such as the networks of a mixture,
    are left out. An item that is itself a Linear is not a block.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inner and any(map(_is_block, module)):
            lists[name] = module
    return lists


def linears(path: str, root: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every Linear and Conv1D under `root`, which lies at `path` in the model, in order."""
    for name, module in root.named_modules(prefix=path):
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def _is_block(item: nn.Module) -> bool:
    return not isinstance(item, (nn.Linear, Conv1D)) and any(linears("", item))


def loose_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Matrices in the blocks, and stacks of matrices, that no Linear owns."""
    found: dict[str, Tensor] = {}
    for path, blocks in block_lists(model).items():
        owned = {id(module.weight) for _, module in linears(path, blocks)}
        for name, parameter in blocks.named_parameters(prefix=path):
            if parameter.dim() > 1 and id(parameter) not in owned:
                found[name] = parameter
    return found


def has_stacks(model: nn.Module) -> bool:
    """Whether a model's blocks have stacks of matrices, such as the fused ones of a mixture.

    The kernels of convolutions do not count.
    """
    return any(
        parameter.dim() == 3 and 1 not in parameter.shape
        for blocks in block_lists(model).values()
        for module in blocks.modules()
        if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        for parameter in module.parameters(recurse=False)
    )


def matrix(module: Linear) -> Tensor:
    """The weight as (out_features, in_features); a view."""
    weight: Tensor = module.weight
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()
