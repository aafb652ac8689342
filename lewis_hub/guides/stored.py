"""From what a loaded model multiplies to the importance of its checkpoint's tensors.

What transformers holds in memory and what the file holds differ: experts are fused into one
parameter, gate and up into another, names change. transformers can turn a loaded model's tensors
into those of its file, to save it. All that it does is to move entries, so it is asked to move each
entry's share of an importance instead: a tensor of the file has the shares that end up in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from lewis_hub.checkpoint import names
from lewis_hub.guides.blocks import Linear, matrix
from lewis_hub.guides.importance import module_importance
from lewis_hub.guides.products import Products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Place = tuple[str | None, int | None]  # a block: its list, and its number


def stored_importance(
    model: PreTrainedModel,
    modules: Mapping[str, Linear],
    norms: Mapping[str, Tensor],
    products: Products | None,
    n_tokens: int,
) -> dict[str, float]:
    """Importance by the checkpoint's modules.

    Args:
        model: as `from_pretrained` returned it.
        modules: path -> Linear.
        norms: path of a module -> its activation norms.
        products: what was multiplied besides.
        n_tokens: that ran through the model.

    Returns:
        Module -> importance, in the model's order. A tensor of which no entry met a token is not
        in it.
    """
    linear = {f"{path}.weight": path for path in norms}

    def share(name: str, parameter: Tensor) -> Tensor:
        """The squared importance of each entry of a parameter; NaN where no token was met."""
        if name in linear:
            return _entries(modules[linear[name]], norms[linear[name]])
        if products and name in products.used:
            return products.share(name, n_tokens)
        return _unknown(parameter, parameter.device)

    parameters = dict(model.named_parameters())
    renamed = _renamed(model, parameters)
    found: dict[str, float] = {}
    done: set[Place] = set()
    for name, parameter in parameters.items():
        if name in renamed:
            if name in linear:  # without a copy of the weight
                module, norm = modules[linear[name]], norms[linear[name]]
                found[names.module(renamed[name])] = module_importance(matrix(module), norm)
            else:
                found |= _sums({renamed[name]: share(name, parameter)})
        elif (place := _place(name)) not in done:
            done.add(place)
            block = {n: p for n, p in parameters.items() if _place(n) == place and n not in renamed}
            shares = {name: share(name, parameter) for name, parameter in block.items()}
            found |= _sums(revert_weight_conversion(model, shares))
    return found


def _renamed(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Parameter -> its tensor in the file, of those that are stored as they are."""
    empty = {name: _unknown(parameter, "meta") for name, parameter in parameters.items()}
    names_of = {id(tensor): name for name, tensor in empty.items()}
    stored = revert_weight_conversion(model, empty)
    return {names_of[id(tensor)]: name for name, tensor in stored.items() if id(tensor) in names_of}


def _place(name: str) -> Place:
    return names.stack(name), names.block(name)


def _entries(module: Linear, norm: Tensor) -> Tensor:
    """W_ij² a_j², of the weight's own shape, float32."""
    squares = matrix(module).float().square() * norm.square()
    return squares.T if isinstance(module, Conv1D) else squares


def _unknown(parameter: Tensor, device: torch.device | str) -> Tensor:
    return torch.full((), torch.nan, device=device).expand(parameter.shape)


def _sums(shares: Mapping[str, Tensor]) -> dict[str, float]:
    """Tensor -> squared importance of its entries, to module -> importance."""
    return {
        names.module(name): float(entries.nan_to_num(0.0).sum().sqrt())
        for name, entries in shares.items()
        if not entries.isnan().all()
    }
