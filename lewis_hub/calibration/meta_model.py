"""A model whose weights are in memory only while they are needed.

It is built from its configuration with parameters on the meta device; tensors of the files are
loaded block by block. transformers' own rules (`weight_names`) say which tensor of a file becomes
which parameter, and fuse or split them, so a block is exactly what `from_pretrained` makes of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoConfig

from lewis_hub.calibration.failures import refusals
from lewis_hub.calibration.model import (
    block_lists,
    check_complete,
    check_reads_tokens,
    model_class,
    quiet,
)
from lewis_hub.calibration.subject import Weights
from lewis_hub.calibration.weight_names import FLOATS, LoadTarget, WeightLoader, empty_model
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import CalibrationModelError, NotByBlockError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class MetaModel:
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
    _targets: Mapping[str, LoadTarget]  # by the tensor of a file
    _loader: WeightLoader
    _device: str

    @property
    def name(self) -> str:
        """The source as the user knows it, for messages."""
        return self.weights.checkpoint.label

    def walk(self) -> Generator[nn.Module, None, None]:
        """Yield the blocks of the decoder in order, each with its weights until the next.

        Modules of the body outside all lists of blocks, such as embeddings, keep theirs until the
        end. Close it.
        """
        around = _surroundings(self.model)
        inside = [(f"{self.path}.{number}.",) for number in range(len(self.blocks))]
        wanted = [self._tensors(prefixes) for prefixes in (around, *inside)]
        with closing(self.weights.parts(wanted)) as parts, self._loaded(around, parts):
            for block, prefixes in zip(self.blocks, inside, strict=True):
                with self._loaded(prefixes, parts):
                    yield block

    def _tensors(self, prefixes: tuple[str, ...]) -> list[TensorHeader]:
        inside = {name for name, to in self._targets.items() if to.name.startswith(prefixes)}
        return [one for name, one in self.weights.checkpoint.tensors.items() if name in inside]

    @contextmanager
    def _loaded(
        self, prefixes: tuple[str, ...], parts: Iterator[dict[str, Tensor]]
    ) -> Iterator[None]:
        """Load the next part inside the context."""
        with refusals(self.name, "model"), quiet():
            self._put(next(parts))
        try:
            yield
        finally:
            for name, parameter in list(self.model.named_parameters()):
                if name.startswith(prefixes):
                    _replace(self.model, name, parameter, "meta")

    def _put(self, part: Mapping[str, Tensor]) -> None:
        """Put tensors of files into the model.

        transformers could load them all, but takes as long for a block as for a whole model.
        """
        for name, tensor in part.items():
            if self._targets[name].is_plain:
                _replace(self.model, self._targets[name].name, tensor, self._device)
        others = {name: t for name, t in part.items() if not self._targets[name].is_plain}
        if others:
            self._loader.load(others)


def _replace(model: nn.Module, name: str, value: Tensor, device: str) -> None:
    """Replace the values of a parameter or buffer, in its dtype.

    `requires_grad` stays as it is, as products may be rounded otherwise without it.
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    there = getattr(module, last)
    value = value.detach().to(device, there.dtype)
    is_parameter = isinstance(there, nn.Parameter)
    setattr(module, last, nn.Parameter(value, there.requires_grad) if is_parameter else value)


def build_meta_model(weights: Weights, device: str) -> MetaModel:
    """Build a model from its configuration and the headers of its files.

    The dtypes are those of `load_model`.

    Args:
        weights: none is read yet.
        device: where they are loaded, as torch names it.

    Raises:
        NotByBlockError: transformers cannot build it, weights are not in the files, or it is an
            encoder-decoder or shares weights between blocks.
    """
    try:
        return _built(weights, device)
    except CalibrationModelError as error:
        raise NotByBlockError(error.where, error.problem, error.remedy) from error


def _built(weights: Weights, device: str) -> MetaModel:
    name, tensors = weights.checkpoint.label, weights.checkpoint.tensors
    with refusals(name, "model"), quiet():
        model, loader = _empty(weights, device)
    path, blocks = _decoder(weights, model)
    _refuse_shared(weights, model, path, blocks)
    with refusals(name, "model"), quiet():
        targets = loader.targets(tensors)
        _check(model, weights.checkpoint, targets, loader)
    return MetaModel(model, path, blocks, weights, targets, loader, device)


def _empty(weights: Weights, device: str) -> tuple[PreTrainedModel, WeightLoader]:
    folder = weights.folder
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    dtype = torch.float32 if device == "cpu" else _own_dtype(config, weights.checkpoint)
    model = empty_model(model_class(folder), config, dtype, device)
    check_reads_tokens(weights.checkpoint.label, model)
    model.config.get_text_config().use_cache = False  # as `load_model` does
    return model, WeightLoader.of(model, dtype, device)


def _own_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that `from_pretrained` takes for "auto": the configuration's, else the files'."""
    told: torch.dtype | None = getattr(config, "dtype", None)
    stored = (tensor.kept_dtype for tensor in checkpoint.tensors.values())
    return told or next((FLOATS[dtype] for dtype in stored if dtype in FLOATS), torch.float32)


def _decoder(weights: Weights, model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of blocks that texts run through: the largest of the text decoder."""
    text = cast("Any", model).get_decoder()
    inside = next((path for path, module in model.named_modules() if module is text), "")
    every = block_lists(model)
    if not every:
        problem = "no list of blocks with a Linear was found"
        raise CalibrationModelError(weights.checkpoint.label, problem, weights.remedy)
    lists = {path: blocks for path, blocks in every.items() if path.startswith(inside)} or every
    return max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _check(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    targets: Mapping[str, LoadTarget],
    loader: WeightLoader,
) -> None:
    """Refuse parameters that the files lack, or have in another shape, before any byte is read."""
    plain = {tensor: target.name for tensor, target in targets.items() if target.is_plain}
    converted = {name: one for name, one in checkpoint.tensors.items() if name not in plain}
    absent = loader.absent(converted) - set(plain.values())
    lists = tuple(f"{path}." for path in block_lists(model))
    needed = (*_surroundings(model), *lists)
    parameters = {key for key, _ in model.named_parameters()} - model.all_tied_weights_keys.keys()
    check_complete(checkpoint.label, {key for key in absent & parameters if key.startswith(needed)})


def _surroundings(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of parameters and buffers of the body outside all lists of blocks."""
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
    """Refuse blocks that cannot be loaded one after the other."""
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
