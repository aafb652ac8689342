"""A model whose weights are in memory only while they are needed.

It is built from its configuration with parameters on the meta device; tensors of the files are
loaded block by block. transformers renames, fuses and splits tensors while it loads a model, and a
block has to be exactly what `from_pretrained` makes of it. Importance, too, is needed for each
tensor of the file that a fused parameter is made of. There is no public function for either, so
this file alone uses what transformers has inside; `tests/calibration/test_meta_model.py` fails if
it changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig

from lewis_hub.calibration.model import (
    block_lists,
    check_reads_tokens,
    n_parameters,
    quiet,
    refusals,
)
from lewis_hub.calibration.subject import Weights
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import CalibrationModelError, NotByBlockError
from lewis_hub.evaluate.empty_models import (
    build_empty,
    builder,
    model_class,
    require_size_of_files,
    require_whole,
)
from lewis_hub.loadable import only_files_of

UNCHAINED = "its decoder does more between its blocks than to hand on hidden states"
SHARES = "its blocks share weights, so it cannot be calibrated block by block"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> its tensor in the checkpoint, of those that are stored unchanged."""
    parameters = dict(model.named_parameters())
    empty = {name: unknown_like(parameter, "meta") for name, parameter in parameters.items()}
    names_of = {id(tensor): name for name, tensor in empty.items()}
    stored = as_stored(model, empty)
    return {names_of[id(tensor)]: name for name, tensor in stored.items() if id(tensor) in names_of}


def as_stored(model: PreTrainedModel, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name to the tensors that the checkpoint stores, by their names there."""
    return cast("dict[str, Tensor]", revert_weight_conversion(model, parameters))


def unknown_like(parameter: Tensor, device: torch.device | str) -> Tensor:
    """A NaN, expanded to the shape of a parameter."""
    return torch.full((), torch.nan, device=device).expand(parameter.shape)


@dataclass(frozen=True)
class MetaModel:
    """A model without weights, a list of its blocks at `path`, and its weights."""

    model: PreTrainedModel
    stack: PreTrainedModel  # what runs the blocks: the model, or its encoder
    path: str
    blocks: nn.ModuleList
    weights: Weights
    _targets: Mapping[str, str]  # tensor of a file -> parameter or buffer, or the first of several
    _plain: frozenset[str]  # tensors that alone become theirs, unchanged but for the dtype
    _loading: LoadStateDictConfig
    _device: str

    @property
    def name(self) -> str:
        """The source as the user knows it, for messages."""
        return self.weights.checkpoint.label

    def walk(self) -> Generator[nn.Module, None, None]:
        """Yield the blocks in order, each with its weights until the next.

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
        inside = {name for name, to in self._targets.items() if to.startswith(prefixes)}
        return [one for name, one in self.weights.checkpoint.tensors.items() if name in inside]

    @contextmanager
    def _loaded(
        self, prefixes: tuple[str, ...], parts: Iterator[dict[str, Tensor]]
    ) -> Iterator[None]:
        """Load the next part inside the context."""
        with refusals(self.name, "model"):
            self._put(next(parts))
            self._tie(prefixes)
        try:
            yield
        finally:
            for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
                if name.startswith(prefixes):
                    _replace(self.model, name, parameter, "meta")

    def _put(self, part: Mapping[str, Tensor]) -> None:
        """Put tensors of files, all that a parameter is made of, into the model.

        transformers could load them all, but takes as long for a block as for a whole model.
        """
        for name, tensor in part.items():
            if name in self._plain:
                _replace(self.model, self._targets[name], tensor, self._device)
        others = {name: tensor for name, tensor in part.items() if name not in self._plain}
        if others:
            with quiet():
                convert_and_load_state_dict_in_model(self.model, others, self._loading)

    def replace_fused(
        self, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> None:
        """Replace parts of loaded parameters by tensors of the checkpoint that they come from."""
        for name, parameter in parameters.items():
            stored = as_stored(self.model, {name: parameter.detach()})
            if found := stored.keys() & tensors.keys():
                self._put(stored | {one: tensors[one].to(parameter) for one in found})

    def _tie(self, prefixes: tuple[str, ...]) -> None:
        """Give parameters that share the values of a loaded one those values."""
        for name, owner in self.model.all_tied_weights_keys.items():
            if name.startswith(prefixes) and owner.startswith(prefixes):
                path, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(path), last, self.model.get_parameter(owner))


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
    """Build a decoder from its configuration and the headers of its files; no weight is read.

    The dtypes are those of `load_model`. A NotByBlockError says that transformers cannot build it,
    that weights are not in the files, or that it is an encoder-decoder or shares weights between
    blocks.
    """
    stacks = build_stacks(weights, device)
    if len(stacks) > 1:
        problem = "an encoder-decoder cannot be calibrated block by block"
        raise NotByBlockError(weights.checkpoint.label, problem, weights.remedy)
    return stacks[0]


def build_stacks(weights: Weights, device: str) -> list[MetaModel]:
    """Build a model, as `build_meta_model` does: its decoder, after its encoder if it has one."""
    checkpoint = weights.checkpoint
    try:
        with refusals(checkpoint.label, "model"), quiet(), only_files_of(weights.folder):
            model, loading = _empty(weights, device)
        stacks: list[tuple[Any, Any]] = [(model, cast("Any", model).get_decoder())]
        if model.config.is_encoder_decoder:
            encoder = cast("Any", model).get_encoder()
            stacks = [(encoder, encoder), *stacks]
        lists = [(stack, *_blocks_in(weights, model, text)) for stack, text in stacks]
        for _, path, blocks in lists:
            _refuse_shared(weights, model, path, blocks)
        with refusals(checkpoint.label, "model"), quiet():
            targets, plain = _load_targets(model, checkpoint.tensors, loading)
            made = {targets[name] for name in plain}
            others = {n: one for n, one in checkpoint.tensors.items() if n not in plain}
            _check_complete(model, checkpoint.label, made, others, loading)
    except CalibrationModelError as error:
        raise NotByBlockError(error.where, error.problem, error.remedy) from error
    return [
        MetaModel(model, stack, path, blocks, weights, targets, plain, loading, device)
        for stack, path, blocks in lists
    ]


def _empty(weights: Weights, device: str) -> tuple[PreTrainedModel, LoadStateDictConfig]:
    """A model with real buffers, and parameters without values on the meta device."""
    folder = weights.folder
    stored_bytes = sum(one.n_bytes for one in weights.checkpoint.tensors.values())
    kind = model_class(folder)
    require_size_of_files(weights.checkpoint.label, folder, kind, stored_bytes)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    dtype = torch.float32 if device == "cpu" else _own_dtype(config, weights.checkpoint)
    with no_init_weights(), init_empty_weights(include_buffers=False), torch.device(device):
        built = builder(kind)(config, dtype=dtype, experts_implementation="eager")
    model = cast("PreTrainedModel", built.eval())
    check_reads_tokens(weights.checkpoint.label, model)
    model.config.get_text_config().use_cache = False  # as `load_model` does
    loading = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),  # some modules stay in float32
        device_map={"": device},
        weight_mapping=cast("Any", get_model_conversion_mapping(model)),
    )
    return model, loading


def build_named(folder: Path, label: str) -> PreTrainedModel:
    """Build the model that a configuration describes, with all its values on the meta device.

    A CalibrationModelError says that transformers cannot build it, or that it names none.
    """
    with refusals(label, "model"), quiet(), only_files_of(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if not config.architectures:
            problem = "its config.json names no architecture"
            raise CalibrationModelError(label, problem, "Use an intact copy.")
        return build_empty(folder, model_class(folder))


def parameter_names(
    model: PreTrainedModel, tensors: Mapping[str, TensorHeader]
) -> tuple[dict[str, str], frozenset[str]]:
    """The parameters or buffers that tensors of files become unchanged, and all other tensors."""
    mapping = cast("Any", get_model_conversion_mapping(model))
    loading = LoadStateDictConfig(dtype=torch.float32, weight_mapping=mapping)
    floats = {name: replace(tensor, dtype="F32") for name, tensor in tensors.items()}
    targets, plain = _load_targets(model, floats, loading)
    return {name: targets[name] for name in plain}, frozenset(targets.keys() - plain)


def _own_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that `from_pretrained` takes for "auto": the configuration's, else the files'."""
    told: torch.dtype | None = getattr(config, "dtype", None)
    stored = (tensor.kept_dtype for tensor in checkpoint.tensors.values())
    return told or next((FLOATS[dtype] for dtype in stored if dtype in FLOATS), torch.float32)


def _blocks_in(
    weights: Weights, model: PreTrainedModel, text: nn.Module
) -> tuple[str, nn.ModuleList]:
    """The list of blocks that texts run through: the largest of the encoder or decoder `text`."""
    inside = next((path for path, module in model.named_modules() if module is text), "")
    every = block_lists(model)
    if not every:
        problem = "no list of blocks with a Linear was found"
        raise CalibrationModelError(weights.checkpoint.label, problem, weights.remedy)
    lists = {path: blocks for path, blocks in every.items() if path.startswith(inside)} or every
    return max(lists.items(), key=lambda item: n_parameters(item[1]))


def _refuse_shared(
    weights: Weights, model: PreTrainedModel, path: str, blocks: nn.ModuleList
) -> None:
    """Refuse blocks that cannot be loaded one after the other."""
    name = weights.checkpoint.label
    seen: set[int] = set()
    for block in blocks:
        own = {id(parameter) for parameter in block.parameters()}
        if own & seen or any(tied.startswith(f"{path}.") for tied in model.all_tied_weights_keys):
            raise CalibrationModelError(name, SHARES, weights.remedy)
        seen |= own


def _load_targets(
    model: PreTrainedModel, tensors: Mapping[str, TensorHeader], loading: LoadStateDictConfig
) -> tuple[dict[str, str], frozenset[str]]:
    """What tensors become, of those that the model uses; and those that are loaded as they are."""
    state, prefix = model.state_dict(), model.base_model_prefix
    mapping = loading.weight_mapping or []
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    targets: dict[str, str] = {}
    plain: set[str] = set()
    for name in sorted(tensors, key=dot_natural_key):  # transformers' order: some rules count
        target, converted = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, converted = rename_source_key(name, [], [], prefix, state)
        if target in state and tensors[name].dtype in FLOATS:
            targets[name] = target
            if converted is None and state[target].shape == tensors[name].shape:
                plain.add(name)
    if loading.dtype != torch.float32 and loading.dtype_plan:  # some keep another dtype
        plain.clear()
    n_parts = Counter(targets.values())
    return targets, frozenset(name for name in plain if n_parts[targets[name]] == 1)


def _check_complete(
    model: PreTrainedModel,
    name: str,
    made: Collection[str],
    others: Mapping[str, TensorHeader],
    loading: LoadStateDictConfig,
) -> None:
    """Refuse parameters that the files lack, or have in another shape, before any byte is read.

    `made` are those of plain tensors; `others` are the headers of the other tensors.
    """
    empty = {
        tensor: torch.empty(header.shape, dtype=torch.float32, device="meta")
        for tensor, header in others.items()
    }
    nowhere = replace(loading, device_map={"": "meta"})
    report, _ = convert_and_load_state_dict_in_model(model, empty, nowhere)
    absent = {*report.missing_keys, *(key for key, *_ in report.mismatched_keys)}
    lists = tuple(f"{path}." for path in block_lists(model))
    needed = (*_surroundings(model), *lists)
    parameters = {key for key, _ in model.named_parameters()} - model.all_tied_weights_keys.keys()
    lacking = (absent & parameters) - set(made)
    lacking = {key for key in lacking if key.startswith(needed)}
    require_whole(name, lacking, CalibrationModelError)


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
