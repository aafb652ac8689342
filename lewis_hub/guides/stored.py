"""From what a loaded model multiplies to its checkpoint's tensors, and what each entry met.

What transformers holds in memory and what the file holds differ: experts are fused into one
parameter, gate and up into another, names change. transformers can turn a loaded model's tensors
into those of its file, to save it. All that it does is to move entries, so it is asked to move the
activation norm that each entry was multiplied with too: a tensor of the file has those of the
entries that end up in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from lewis_hub.checkpoint import names
from lewis_hub.guides.blocks import Linear, matrix
from lewis_hub.guides.products import Products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Place = tuple[str | None, int | None]  # a block: its list, and its number


@dataclass(frozen=True)
class StoredBlock:
    """The tensors of a block that tokens met, by the checkpoint's modules.

    Attributes:
        weights: module -> (out_features, in_features); of another shape where no Linear owns it.
        norms: module -> (in_features,) activation norms, or one for each entry of the weight: 0
            where an entry met no token.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def add(self, tensor: str, weight: Tensor, norm: Tensor) -> None:
        """Take a tensor that any token met."""
        if not norm.isnan().all():
            self.weights[names.module(tensor)] = weight
            self.norms[names.module(tensor)] = norm.nan_to_num(0.0)


def stored_blocks(  # noqa: PLR0913
    model: PreTrainedModel,
    parameters: Iterable[tuple[str, Tensor]],
    modules: Mapping[str, Linear],
    norms: Mapping[str, Tensor],
    products: Products | None,
    n_tokens: int,
    kept: Mapping[str, str],
) -> Iterator[StoredBlock]:
    """Tell block by block what was multiplied with what.

    Args:
        model: as `from_pretrained` returned it.
        parameters: by their names, of all of it or of whole blocks.
        modules: path -> Linear.
        norms: path of a module -> its activation norms.
        products: what was multiplied besides.
        n_tokens: that ran through the model.
        kept: from `stored_names`.

    Yields:
        In the model's order. A tensor of which no entry met a token is not in it. Copies are made
        only of what the file holds otherwise, one block at a time.
    """
    linear = {f"{path}.weight": path for path in norms}
    met = linear.keys() | (products.used if products else frozenset())

    def entries(name: str, parameter: Tensor) -> Tensor:
        """The norm that each entry was multiplied with; NaN where no token was."""
        if name in linear:
            norm = norms[linear[name]]
            turned = norm[:, None] if isinstance(modules[linear[name]], Conv1D) else norm
            return turned.expand(parameter.shape)
        if products and name in products.used:
            return products.norms(name, n_tokens)
        return _unknown(parameter, parameter.device)

    for inside in _by_block(parameters):
        block = StoredBlock()
        for name in inside:
            if name in kept and name in linear:  # without a norm for each entry
                path = linear[name]
                block.add(kept[name], matrix(modules[path]), norms[path])
            elif name in kept and name in met:
                block.add(kept[name], inside[name], entries(name, inside[name]))
        moved = {name: parameter for name, parameter in inside.items() if name not in kept}
        if met & moved.keys():
            moving = {name: entries(name, parameter) for name, parameter in moved.items()}
            weights = revert_weight_conversion(model, moved)
            for name, found in revert_weight_conversion(model, moving).items():
                block.add(name, weights[name], found)
        if block.weights:
            yield block


def _by_block(parameters: Iterable[tuple[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    found: defaultdict[Place, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in parameters:
        found[names.stack(name), names.block(name)][name] = parameter.detach()
    return found.values()


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> its tensor in the file, of those that are stored as they are."""
    parameters = dict(model.named_parameters())
    empty = {name: _unknown(parameter, "meta") for name, parameter in parameters.items()}
    names_of = {id(tensor): name for name, tensor in empty.items()}
    stored = revert_weight_conversion(model, empty)
    return {names_of[id(tensor)]: name for name, tensor in stored.items() if id(tensor) in names_of}


def _unknown(parameter: Tensor, device: torch.device | str) -> Tensor:
    return torch.full((), torch.nan, device=device).expand(parameter.shape)
