"""A model whose weights are in memory only while they are needed.

It is built from its configuration with parameters that have shapes alone; what the files hold is
brought in part by part. transformers' own rules say which tensor of a file becomes which parameter,
and fuse or split them, so a part is exactly what `from_pretrained` would have made of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig

from lewis_hub.calibration.model import (
    block_lists,
    check_complete,
    check_reads_tokens,
    model_class,
    quiet,
    refusals,
)
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint, TensorReader, local_checkpoint
from lewis_hub.errors import CalibrationModelError, NotByBlockError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


WHOLE = "Calibrate it whole, where there is memory for it: leave out `--max-memory`."

HELD_BYTES = 64 << 20  # of hidden states, of all texts together: what is more lies on the disk
STATES = "the hidden states of all calibration texts"
FEWER = "lower `samples` or `max_tokens` of the calibration"

Parts = Callable[[Sequence[Sequence[TensorHeader]]], "Generator[dict[str, Tensor], None, None]"]


@dataclass(frozen=True)
class Weights:
    """Where a model's weights come from.

    Attributes:
        folder: has its configuration.
        checkpoint: its headers, labelled as the user knows the source.
        parts: of lists of tensors, brings one list after the other: tensor -> values in float32.
            They are the caller's; the next list may be on its way meanwhile. Close it.
        remedy: what to do about a model that cannot be measured part by part.
        scratch: a folder for the hidden states of texts on their way, where they take more than
            `HELD_BYTES`; None: the system's for such.
    """

    folder: Path
    checkpoint: Checkpoint
    parts: Parts
    remedy: str = WHOLE
    scratch: Path | None = None


def in_folder(name: str, folder: Path, scratch: Path | None = None) -> Weights:
    """The weights of a complete local snapshot; `name` is the source as the user knows it.

    Raises:
        BrokenCheckpointError: a header is broken, or a file is missing.
    """

    def parts(
        lists: Sequence[Sequence[TensorHeader]],
    ) -> Generator[dict[str, Tensor], None, None]:
        with TensorReader(folder, name) as reader:
            for tensors in lists:
                yield {tensor.name: reader.tensor(tensor) for tensor in tensors}

    return Weights(folder, local_checkpoint(name, folder), parts, scratch=scratch)


FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """What a tensor of a file becomes in the model.

    Attributes:
        name: of the parameter or buffer, or of the first of several.
        is_plain: it alone becomes this one, as it is but for the dtype.
    """

    name: str
    is_plain: bool


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
    _names: Sequence[str]  # of the parameters
    _targets: Mapping[str, Target]  # by the tensor of a file
    _loading: LoadStateDictConfig
    _device: str

    @property
    def name(self) -> str:
        """The source as the user knows it, for messages."""
        return self.weights.checkpoint.label

    def walk(self) -> Generator[nn.Module, None, None]:
        """The blocks of the decoder in order, each with its weights until the next is asked for.

        What the body has outside all lists of blocks, such as embeddings, has them all the while.
        Close it.
        """
        around = _surroundings(self.model)
        inside = [(f"{self.path}.{number}.",) for number in range(len(self.blocks))]
        wanted = [self._tensors(prefixes) for prefixes in (around, *inside)]
        with closing(self.weights.parts(wanted)) as parts, self._brought(around, parts):
            for block, prefixes in zip(self.blocks, inside, strict=True):
                with self._brought(prefixes, parts):
                    yield block

    def _tensors(self, prefixes: tuple[str, ...]) -> list[TensorHeader]:
        inside = {name for name, to in self._targets.items() if to.name.startswith(prefixes)}
        return [one for name, one in self.weights.checkpoint.tensors.items() if name in inside]

    @contextmanager
    def _brought(
        self, prefixes: tuple[str, ...], parts: Iterator[dict[str, Tensor]]
    ) -> Iterator[None]:
        """What the next part makes of the model, for the time being."""
        with refusals(self.name, "model"), quiet():
            self._put(next(parts))
        try:
            yield
        finally:
            for name in self._names:
                if name.startswith(prefixes):
                    _replace(self.model, name, self.model.get_parameter(name), "meta")

    def _put(self, part: Mapping[str, Tensor]) -> None:
        """Give the model what tensors of files become.

        transformers could make all of it, but takes as long for a block as for a whole model.
        """
        for name, tensor in part.items():
            if self._targets[name].is_plain:
                _replace(self.model, self._targets[name].name, tensor, self._device)
        others = {name: t for name, t in part.items() if not self._targets[name].is_plain}
        if others:
            convert_and_load_state_dict_in_model(self.model, others, self._loading)


def _replace(model: nn.Module, name: str, value: Tensor, device: str) -> None:
    """Put values in the place of a parameter or buffer, in its dtype.

    That a parameter could have gradients stays, as products may be rounded otherwise without.
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    there = getattr(module, last)
    value = value.detach().to(device, there.dtype)
    is_parameter = isinstance(there, nn.Parameter)
    setattr(module, last, nn.Parameter(value, there.requires_grad) if is_parameter else value)


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
        _check(model, weights.checkpoint, targets, loading)
    names = [name for name, _ in model.named_parameters()]
    return Skeleton(model, path, blocks, weights, names, targets, loading, device)


def _empty(weights: Weights, device: str) -> tuple[PreTrainedModel, LoadStateDictConfig]:
    """The model with real buffers and parameters of shapes alone, and how its weights are made."""
    folder = weights.folder
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    dtype = torch.float32 if device == "cpu" else _own_dtype(config, weights.checkpoint)
    kind: Any = model_class(folder)
    settings = {"dtype": dtype, "experts_implementation": "eager"}
    build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
    with no_init_weights(), init_empty_weights(include_buffers=False), torch.device(device):
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
) -> dict[str, Target]:
    """What each tensor of the files becomes; one that becomes nothing is not in it."""
    state = model.state_dict()
    mapping = loading.weight_mapping or []
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    found: dict[str, Target] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):  # some count, as transformers does
        tensor, prefix = checkpoint.tensors[name], model.base_model_prefix
        target, converted = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, converted = rename_source_key(name, [], [], prefix, state)
        if target in state and tensor.dtype in FLOATS:
            fits = state[target].shape == tensor.shape
            found[name] = Target(target, converted is None and fits)
    taken = Counter(target.name for target in found.values())
    # else some keep another dtype, by transformers' plan
    has_one_dtype = loading.dtype == torch.float32 or not loading.dtype_plan
    return {
        name: replace(to, is_plain=to.is_plain and has_one_dtype and taken[to.name] == 1)
        for name, to in found.items()
    }


def _check(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    targets: Mapping[str, Target],
    loading: LoadStateDictConfig,
) -> None:
    """Refuse what is not in the files, or of another shape, before any byte is read."""
    plain = {tensor: target.name for tensor, target in targets.items() if target.is_plain}
    shapes = {
        tensor: torch.empty(header.shape, dtype=torch.float32, device="meta")
        for tensor, header in checkpoint.tensors.items()
        if tensor not in plain
    }
    nowhere = replace(loading, device_map={"": "meta"})
    found, _ = convert_and_load_state_dict_in_model(model, shapes, nowhere)
    absent = found.missing_keys | {key for key, *_ in found.mismatched_keys}
    absent -= set(plain.values())
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
