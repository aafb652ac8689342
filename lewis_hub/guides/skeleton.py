"""A model whose weights are in memory only while they are needed.

It is built from its configuration with parameters that have shapes alone; what the files hold is
brought in part by part. transformers' own rules say which tensor of a file becomes which parameter,
and fuse or split them, so a part is exactly what `from_pretrained` would have made of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import CalibrationModelError, NotByBlockError
from lewis_hub.guides.blocks import block_lists
from lewis_hub.guides.loading import (
    check_complete,
    check_reads_tokens,
    model_class,
    quiet,
    refusals,
)
from lewis_hub.guides.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, and where they come from.

    Attributes:
        path: of the decoder's list of blocks.
        blocks: of the decoder.
        weights: where they come from.
    """

    model: PreTrainedModel
    path: str
    blocks: nn.ModuleList
    weights: Weights
    _targets: Mapping[str, str]  # tensor of a file -> what it becomes in the model
    _loading: LoadStateDictConfig

    @property
    def name(self) -> str:
        """The source as the user knows it, for messages."""
        return self.weights.checkpoint.label

    def walk(self) -> Generator[nn.Module, None, None]:
        """The blocks of the decoder in order, each with its weights until the next is asked for.

        The first comes twice: at first together with what the body has outside all lists of blocks,
        such as embeddings, then alone. Close it.
        """
        around = _surroundings(self.model)
        first, *others = ((f"{self.path}.{number}.",) for number in range(len(self.blocks)))
        wanted = [self._tensors(prefixes) for prefixes in (around, first, *others)]
        with closing(self.weights.parts(wanted)) as parts:
            with ExitStack() as beside:
                beside.enter_context(self._brought(around, parts))
                with self._brought(first, parts):
                    yield self.blocks[0]
                    beside.close()
                    yield self.blocks[0]
            for block, prefixes in zip(self.blocks[1:], others, strict=True):
                with self._brought(prefixes, parts):
                    yield block

    def _tensors(self, prefixes: tuple[str, ...]) -> list[TensorHeader]:
        tensors = self.weights.checkpoint.tensors
        return [
            tensors[name] for name, target in self._targets.items() if target.startswith(prefixes)
        ]

    @contextmanager
    def _brought(
        self, prefixes: tuple[str, ...], parts: Iterator[dict[str, Tensor]]
    ) -> Iterator[None]:
        """What the next part makes of the model, for the time being."""
        with refusals(self.name, "model"), quiet():
            # nobody else may hold the part: its tensors would be in memory a second time
            convert_and_load_state_dict_in_model(self.model, next(parts), self._loading)
        try:
            yield
        finally:
            for name, _ in list(self.model.named_parameters()):
                if name.startswith(prefixes):
                    set_module_tensor_to_device(self.model, name, "meta")


def skeleton(weights: Weights, device: str) -> Skeleton:
    """Build a model from its configuration and the headers of its files.

    The dtypes are those of `load_model`.

    Args:
        weights: none is read yet.
        device: where they are brought, as torch names it.

    Raises:
        NotByBlockError: transformers cannot build it, weights are not in the files, or it is an
            encoder-decoder or shares weights between blocks.
    """
    try:
        return _built(weights, device)
    except CalibrationModelError as error:
        raise NotByBlockError(error.where, error.problem, error.remedy) from error


def _built(weights: Weights, device: str) -> Skeleton:
    name = weights.checkpoint.label
    with refusals(name, "model"), quiet():
        model, loading = _empty(weights, device)
    path, blocks = _decoder(weights, model)
    _refuse_shared(weights, model, path, blocks)
    with refusals(name, "model"), quiet():
        targets = _targets(model, weights.checkpoint, loading)
        _check(model, weights.checkpoint, loading)
    return Skeleton(model, path, blocks, weights, targets, loading)


def _empty(weights: Weights, device: str) -> tuple[PreTrainedModel, LoadStateDictConfig]:
    """The model with real buffers and parameters of shapes alone, and how its weights are made."""
    folder = weights.folder
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    dtype = torch.float32 if device == "cpu" else _own_dtype(config, weights.checkpoint)
    kind: Any = model_class(folder)
    settings = {"dtype": dtype, "experts_implementation": "eager"}
    build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
    with init_empty_weights(include_buffers=False), torch.device(device):
        model = build(config, **settings).eval()
    check_reads_tokens(weights.checkpoint.label, model)
    model.config.get_text_config().use_cache = False  # as `load_model` does
    return model, LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": device},
        weight_mapping=cast("Any", get_model_conversion_mapping(model)),
    )


def _own_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """As `from_pretrained` takes it for "auto": the configuration's, else the first float's."""
    told: torch.dtype | None = getattr(config, "dtype", None)
    stored = (tensor.kept_dtype for tensor in checkpoint.tensors.values())
    return told or next((FLOATS[dtype] for dtype in stored if dtype in FLOATS), torch.float32)


def _decoder(weights: Weights, model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of blocks that texts run through: the largest, and of no other tower."""
    text = cast("Any", model).get_decoder()
    inside = next((path for path, module in model.named_modules() if module is text), "")
    every = block_lists(model)
    if not every:
        problem = "no list of blocks with a Linear was found"
        raise CalibrationModelError(weights.checkpoint.label, problem, weights.remedy)
    lists = {path: blocks for path, blocks in every.items() if path.startswith(inside)} or every
    return max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _targets(
    model: PreTrainedModel, checkpoint: Checkpoint, loading: LoadStateDictConfig
) -> dict[str, str]:
    """Tensor of a file -> the parameter or buffer that it becomes, or the first of several."""
    state = model.state_dict()
    mapping = loading.weight_mapping or []
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    found = {}
    for name, tensor in checkpoint.tensors.items():
        prefix = model.base_model_prefix
        target, _ = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, _ = rename_source_key(name, [], [], prefix, state)
        if target in state and tensor.dtype in FLOATS:
            found[name] = target
    return found


def _check(model: PreTrainedModel, checkpoint: Checkpoint, loading: LoadStateDictConfig) -> None:
    """Load shapes alone: refuse what is not in the files, or of another shape, before any byte."""
    shapes = {
        tensor: torch.empty(header.shape, dtype=torch.float32, device="meta")
        for tensor, header in checkpoint.tensors.items()
    }
    nowhere = LoadStateDictConfig(
        dtype=loading.dtype,
        dtype_plan=loading.dtype_plan,
        device_map={"": "meta"},
        weight_mapping=loading.weight_mapping,
    )
    found, _ = convert_and_load_state_dict_in_model(model, shapes, nowhere)
    absent = found.missing_keys | {key for key, *_ in found.mismatched_keys}
    lists = tuple(f"{path}." for path in block_lists(model))
    needed = (*_surroundings(model), *lists)
    parameters = {key for key, _ in model.named_parameters()} - model.all_tied_weights_keys.keys()
    check_complete(checkpoint.label, {key for key in absent & parameters if key.startswith(needed)})


def _surroundings(model: PreTrainedModel) -> tuple[str, ...]:
    """The beginnings of the names of what the body has outside all lists of blocks."""
    body = next(path for path, module in model.named_modules() if module is model.base_model)
    lists = tuple(f"{path}." for path in block_lists(model))
    inside = f"{body}." if body else ""
    return tuple(
        name
        for name in model.state_dict()
        if name.startswith(inside) and not name.startswith(lists)
    )


def _refuse_shared(
    weights: Weights, model: PreTrainedModel, path: str, blocks: nn.ModuleList
) -> None:
    """Every block must stand alone: brought in, run once with all texts, and let go."""
    name = weights.checkpoint.label
    if model.config.is_encoder_decoder:
        problem = "an encoder-decoder cannot be calibrated block by block"
        raise CalibrationModelError(name, problem, weights.remedy)
    seen: set[int] = set()
    for block in blocks:
        own = {id(parameter) for parameter in block.parameters()}
        if own & seen or any(tied.startswith(f"{path}.") for tied in model.all_tied_weights_keys):
            problem = "its blocks share weights, so it cannot be calibrated block by block"
            raise CalibrationModelError(name, problem, weights.remedy)
        seen |= own
