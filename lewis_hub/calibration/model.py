"""A source's model, as transformers loads it from a local folder, and its structure.

Nothing here runs a repo's own code or opens a connection.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as untyped_logging

from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.errors import CalibrationModelError, LewisHubError
from lewis_hub.evaluate.chat import limit_tokenizer
from lewis_hub.evaluate.empty_models import (
    limited_load,
    model_class,
    require_size_of_files,
    require_whole,
    stored_in,
)
from lewis_hub.evaluate.short_text import require_short_pass
from lewis_hub.loadable import only_files_of, require_loadable
from lewis_hub.tokenizer import panics_as_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LINE = 64  # bytes of a cache line, to which torch aligns its allocations


def load_tokenizer(folder: str, name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder, without a repo's own code, or refuse it."""
    auto = transformers.AutoTokenizer
    with refusals(name, "tokenizer"), panics_as_errors(), only_files_of(Path(folder)):
        require_loadable(Path(folder))
        loaded = auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        limit_tokenizer(name, loaded)
    return cast("PreTrainedTokenizerBase", loaded)


def load_model(folder: Path, device: str, name: str) -> PreTrainedModel:
    """Load a language model for measuring, in eval mode.

    On a CPU the arithmetic is float32, whatever the file's dtype, as half precision is slow there.
    On other devices, named as in torch, the file's own dtype is kept; "cuda" is all GPUs together.
    A CalibrationModelError says that transformers cannot load it, that it needs own code, that
    weights of the architecture are not in the files, or that the GPUs have no room for it.
    """
    with refusals(name, "model"), quiet(), only_files_of(folder):
        kind = model_class(folder)
        require_size_of_files(name, folder, kind)
        with limited_load(name, stored_in(folder), device):
            model, report = kind.from_pretrained(
                folder,
                dtype=torch.float32 if device == "cpu" else "auto",
                device_map=placement(device, torch.cuda.device_count()),
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                experts_implementation="eager",
            )
        require_whole(name, report["missing_keys"], CalibrationModelError)
        check_reads_tokens(name, model)
        check_on_gpus(name, getattr(model, "hf_device_map", {}), device)
        model.config.get_text_config().use_cache = False  # some keep one unless this says so
        align(model)
        require_short_pass(name, model.eval())
        return cast("PreTrainedModel", model)


def placement(device: str, n_gpus: int) -> str | dict[str, str] | None:
    """The `device_map` of transformers; "auto" distributes blocks over all GPUs."""
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
    """Refuse a model with modules outside the GPUs, which every forward pass would move there."""
    if device != "cpu" and not {"cpu", "disk"}.isdisjoint(map(str, placed.values())):
        problem = "it is larger than the memory of all GPUs"
        remedy = "Measure it block by block: `--max-memory 1GB`, or anything less than it takes."
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
    logging: Any = untyped_logging
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
    which calibration texts do not reach. An item that is itself a Linear is not a block.
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


def block_linears(model: nn.Module, name: str) -> dict[str, Linear]:
    """Every Linear of a block by its path, the first of several; refuses a model without one."""
    found: dict[str, Linear] = {}
    for path, blocks in block_lists(model).items():
        found |= linears(path, blocks)
    if not found:
        problem = "no Linear module in a list of blocks was found"
        remedy = "Importance is measured on those; use guide `uniform` for this architecture."
        raise CalibrationModelError(name, problem, remedy)
    return found


def further_uses(model: nn.Module, modules: Mapping[str, Linear]) -> list[dict[str, Linear]]:
    """The other Linears of a model with the weight of one of `modules`, by the path of that one.

    Blocks may share weights as one module, or as several modules with the same parameters.
    """
    owners = {id(module.weight): path for path, module in modules.items()}
    return [
        {owner: module}
        for path, module in linears("", model)
        if path not in modules and (owner := owners.get(id(module.weight)))
    ]


def check_tokens_fit(model: PreTrainedModel, name: str, tokens: CalibrationTokens) -> None:
    """Refuse token ids and lengths without an embedding with a CalibrationModelError."""
    check_rows(len(cast("Tensor", model.get_input_embeddings().weight)), name, tokens)
    n_positions = config_value(model, "max_position_embeddings")
    longest = max(map(len, tokens.ids))
    if longest > (n_positions or 0) > 0:  # -1 stands for "no limit" in some configurations
        problem = f"a calibration text has {longest} tokens, the model {n_positions} positions"
        remedy = f"Set `max_tokens: {n_positions}`, or less, in the calibration."
        raise CalibrationModelError(name, problem, remedy)


def check_rows(n_rows: int, name: str, tokens: CalibrationTokens) -> None:
    """Refuse token ids without one of `n_rows` embeddings with a CalibrationModelError."""
    highest = max(map(max, tokens.ids))
    if highest >= n_rows:
        problem = f"token {highest} of {tokens.tokenizer} is not among its {n_rows} embeddings"
        remedy = "Calibrate with the tokenizer that base and experts share."
        raise CalibrationModelError(name, problem, remedy)


def loose_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Matrices in the blocks, and stacks of matrices, that no Linear owns."""
    found: dict[str, Tensor] = {}
    for path, blocks in block_lists(model).items():
        owned = {id(module.weight) for _, module in linears(path, blocks)}
        for name, parameter in blocks.named_parameters(prefix=path):
            if parameter.dim() > 1 and id(parameter) not in owned:
                found[name] = parameter
    return found


def stacks(model: nn.Module) -> dict[str, Tensor]:
    """The stacks of matrices in a model's blocks, such as the fused ones of a mixture.

    The kernels of convolutions do not count.
    """
    return {
        f"{path}.{name}": parameter
        for outer, blocks in block_lists(model).items()
        for path, module in blocks.named_modules(prefix=outer)
        if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and 1 not in parameter.shape
    }


def fused_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The stacks of matrices of a mixture's experts, and its routers where no Linear owns them.

    In a model with stacks that is all that `loose_parameters` finds; in others it is empty.
    """
    return loose_parameters(model) if stacks(model) else {}


def n_parameters(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def matrix(module: Linear) -> Tensor:
    """The weight as (out_features, in_features); a view."""
    weight: Tensor = module.weight
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


@contextmanager
def refusals(name: str, what: str) -> Iterator[None]:
    """Turn the errors of transformers for a `model` or `tokenizer` that it cannot load into one."""
    try:
        yield
    except LewisHubError:
        raise
    except Exception as error:  # of any class, where a configuration has values of other types
        text, line = str(error), _first_line(error) or repr(error)
        remedy = f"Calibration loads a {what} with transformers; see what it needs above."
        if "trust_remote_code" in text:
            line = f"its {what} needs Python code from its repo, which is not run"
            remedy = "Take a source that transformers supports by itself, or use guide `uniform`."
        elif "Unrecognized configuration class" in text:
            line = "its architecture is no causal language model"
            remedy = "Calibration measures decoders; merge it with guide `uniform` instead."
        elif "does not recognize this architecture" in text:
            line = "this version of transformers does not know its architecture"
            remedy = "Upgrade: pip install -U transformers."
        elif "out of memory" in text:
            line, remedy = "there is not enough memory to load it", "Use a larger device, or cpu."
        raise CalibrationModelError(name, line.rstrip("."), remedy) from error


@contextmanager
def run_refusals(name: str, by: str) -> Iterator[None]:
    """Turn the errors of a model's own code, while texts run through it, into one error.

    An error without a frame of transformers is a bug of this program, and keeps its traceback.
    `by` says what needs the measurement, such as "guide `lewis`".
    """
    try:
        yield
    except LewisHubError:
        raise
    except Exception as error:
        frames = (frame for frame, _ in walk_tb(error.__traceback__))
        if not any(frame.f_globals["__name__"].startswith("transformers.") for frame in frames):
            raise
        text, line = str(error), _first_line(error) or "no message"
        problem = f"{by} cannot measure it: {type(error).__name__}: {line.rstrip('.')}"
        remedy = (
            "Its own code fails so on calibration texts. Guides `uniform` and `magnitude`, and "
            "methods without statistics, run no model."
        )
        if "out of memory" in text or "allocate memory" in text:
            problem = f"{by} cannot measure it: there is not enough memory"
            remedy = "Use a larger device, or measure it block by block: `--max-memory 1GB`."
        raise CalibrationModelError(name, problem, remedy) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
