"""A source's model and tokenizer, as transformers loads them from a local folder.

Nothing here runs a repo's own code or opens a connection.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from lewis_hub.calibration.failures import refusals
from lewis_hub.errors import CalibrationModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


LINE = 64  # bytes of a line of the cache, to which torch aligns what it allocates


def load_model(folder: Path, device: str, name: str) -> PreTrainedModel:
    """Load a language model for measuring, in eval mode.

    Its class is the one that its configuration names, as the files hold the tensors of that one;
    where none is named that transformers has, it is loaded as a causal language model.

    On a CPU the arithmetic is float32, whatever the file's dtype: it is the definition, and half
    precision is slow there. Elsewhere the file's own dtype is kept.

    Args:
        folder: a complete local snapshot.
        device: as torch names it: "cpu", "cuda", "cuda:1". "cuda" is all GPUs together.
        name: the source as the user knows it, for messages.

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
    """Where transformers has to put a model, in its own words.

    Returns:
        "auto", which is block by block over all GPUs, for "cuda" where there are several. None for
        the CPU's memory. Else the one device.
    """
    if device == "cpu":
        return None
    return "auto" if device == "cuda" and n_gpus > 1 else {"": device}


def align(model: nn.Module) -> None:
    """Copy parameters that begin at an odd place of a line of the cache, as those of a mapped file.

    Products of matrices are rounded otherwise there, on some processors; so what is measured would
    depend on where in its file a tensor lies, and on how it was read.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % LINE:
            parameter.data = parameter.data.clone()


def check_on_gpus(name: str, placed: Mapping[str, int | str | torch.device], device: str) -> None:
    """Refuse that parts of a model were left beside the GPUs: every forward would carry them there.

    Args:
        name: the source as the user knows it, for messages.
        placed: module -> its device, "cpu" or "disk".
        device: that was asked for.
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
    """Refuse weights that are in no file: random ones would mean nothing."""
    absent = sorted(missing)
    if absent:
        others = f"{len(absent) - 1} more of the weights that its architecture needs"
        problem = f"its files lack {absent[0]} (and {others})"
        remedy = "The config does not describe these files: check the source, or take another."
        raise CalibrationModelError(name, problem, remedy)


def check_reads_tokens(name: str, model: PreTrainedModel) -> None:
    """Refuse a model of pictures or sound alone."""
    if "input_ids" not in inspect.signature(model.forward).parameters:
        problem = f"{type(model).__name__} reads no tokens"
        remedy = "Calibration measures language models; merge it with guide `uniform` instead."
        raise CalibrationModelError(name, problem, remedy)


@contextmanager
def quiet() -> Iterator[None]:
    """Only the command line prints: no progress bar and no report from transformers."""
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
    """A value of the language model's configuration, None where it has none."""
    return getattr(model.config.get_text_config(), key, None)


Linear = nn.Linear | Conv1D


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every list of blocks by its path: the outermost ModuleLists whose items hold a Linear.

    A decoder has one, an encoder-decoder two; others are a vision tower's or an extra head's, which
    calibration texts do not reach. "Outermost" leaves out lists inside a block, such as its
    experts. An item that is itself a Linear is no block.
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
    """Matrices in the blocks, and stacks of them, that no Linear owns."""
    found: dict[str, Tensor] = {}
    for path, blocks in block_lists(model).items():
        owned = {id(module.weight) for _, module in linears(path, blocks)}
        for name, parameter in blocks.named_parameters(prefix=path):
            if parameter.dim() > 1 and id(parameter) not in owned:
                found[name] = parameter
    return found


def has_stacks(model: nn.Module) -> bool:
    """Whether a model's blocks have stacks of matrices, such as experts that are fused.

    What a convolution owns looks like one, and is none.
    """
    return any(
        parameter.dim() == 3 and 1 not in parameter.shape
        for blocks in block_lists(model).values()
        for module in blocks.modules()
        if not isinstance(module, _ConvNd)
        for parameter in module.parameters(recurse=False)
    )


def matrix(module: Linear) -> Tensor:
    """The weight as (out_features, in_features); a view."""
    weight: Tensor = module.weight
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()
