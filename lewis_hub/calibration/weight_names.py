"""How transformers turns the tensors of a checkpoint into a model's parameters, and back.

transformers renames, fuses and splits tensors while it loads a model. A model that is loaded block
by block needs the same rules for a few tensors at a time, and the importance of a fused parameter
is needed for each tensor of the file. There is no public function for either, so this file alone
uses what transformers has inside; `tests/calibration/test_weight_names.py` fails if it changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
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

from lewis_hub.checkpoint.header import TensorHeader

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


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


def empty_model(
    kind: Any, config: PreTrainedConfig, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """A model with real buffers, and parameters without values on the meta device.

    Args:
        kind: a model class of transformers, or one of its Auto classes.
        config: of the model.
        dtype: of the parameters.
        device: of the buffers.
    """
    build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
    with no_init_weights(), init_empty_weights(include_buffers=False), torch.device(device):
        model = build(config, dtype=dtype, experts_implementation="eager")
    return cast("PreTrainedModel", model.eval())


@dataclass(frozen=True)
class LoadTarget:
    """What a tensor of a file becomes in the model.

    Attributes:
        name: of the parameter or buffer, or of the first of several.
        is_plain: whether it alone becomes this one, unchanged but for the dtype.
    """

    name: str
    is_plain: bool


@dataclass(frozen=True)
class WeightLoader:
    """Loads tensors of a checkpoint into a model, some at a time."""

    model: PreTrainedModel
    _loading: LoadStateDictConfig

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype, device: str) -> WeightLoader:
        """For a model of `empty_model`, whose weights will be on `device` in `dtype`."""
        loading = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),  # some modules stay in float32
            device_map={"": device},
            weight_mapping=cast("Any", get_model_conversion_mapping(model)),
        )
        return cls(model, loading)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Convert tensors, all that a parameter is made of, and put them into the model."""
        convert_and_load_state_dict_in_model(self.model, dict(tensors), self._loading)

    def absent(self, tensors: Mapping[str, TensorHeader]) -> set[str]:
        """Parameters and buffers that `tensors` do not make, or not in their shapes."""
        empty = {
            tensor: torch.empty(header.shape, dtype=torch.float32, device="meta")
            for tensor, header in tensors.items()
        }
        nowhere = replace(self._loading, device_map={"": "meta"})
        report, _ = convert_and_load_state_dict_in_model(self.model, empty, nowhere)
        return {*report.missing_keys, *(key for key, *_ in report.mismatched_keys)}

    def targets(self, tensors: Mapping[str, TensorHeader]) -> dict[str, LoadTarget]:
        """What each tensor becomes; tensors that the model does not use are left out."""
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        mapping = self._loading.weight_mapping or []
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        targets: dict[str, LoadTarget] = {}
        for name in sorted(tensors, key=dot_natural_key):  # transformers' order: some rules count
            target, converted = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, converted = rename_source_key(name, [], [], prefix, state)
            if target in state and tensors[name].dtype in FLOATS:
                fits = state[target].shape == tensors[name].shape
                targets[name] = LoadTarget(target, converted is None and fits)
        n_parts = Counter(target.name for target in targets.values())
        # with a plan, some keep another dtype than the others
        has_one_dtype = self._loading.dtype == torch.float32 or not self._loading.dtype_plan
        return {
            name: replace(to, is_plain=to.is_plain and has_one_dtype and n_parts[to.name] == 1)
            for name, to in targets.items()
        }
