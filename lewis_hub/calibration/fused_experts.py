"""What parameters that no Linear owns are multiplied with: fused experts, and their routers.

transformers keeps the experts of a block as one parameter of three dimensions and multiplies
tokens with a slice of it, so there is no module to hook. Here every matrix product is looked at:
one of its factors may be a view of such a parameter, and then the other holds the tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from lewis_hub.calibration.determinism import by_onednn
from lewis_hub.calibration.model import Linear, loose_parameters, matrix
from lewis_hub.calibration.profile import sum_of_squares
from lewis_hub.checkpoint import names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


aten = torch.ops.aten
FACTORS = {  # product -> which arguments are multiplied
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    by_onednn: (0, 1),  # the second lies as (n_out, n_in)
}

Slice = tuple[str, int, tuple[int, ...], tuple[int, ...]]  # of: path, offset, shape, stride


def watched(model: nn.Module, run: Callable[[], None]) -> Products | None:
    """Look out for the parameters of blocks that need it.

    Args:
        model: whose blocks are looked at.
        run: puts a few tokens through it.

    Returns:
        What has seen nothing yet; None where all products are those of Linears.
    """
    loose = loose_parameters(model)
    if not loose:
        return None
    with Products(loose) as tried, torch.no_grad():
        run()
    used = {path: parameter for path, parameter in loose.items() if path in tried.used}
    return Products(used) if used else None


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums squares of the tokens that each slice of some parameters is multiplied with.

    A context manager: products inside it are seen. Every token counts, so what runs has no padding.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Look out for `parameters`, by their paths."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = parameters
        self._sums: dict[Slice, Tensor] = {}
        starts = sorted((p.data_ptr(), path) for path, p in parameters.items())
        self._starts, self._paths = [s for s, _ in starts], [path for _, path in starts]

    @property
    def used(self) -> frozenset[str]:
        """Paths of the parameters of which a slice was multiplied with a token."""
        return frozenset(path for path, *_ in self._sums)

    def norms(self, path: str, n_tokens: int) -> Tensor:
        """What each entry was multiplied with: sqrt(Σ_t x_t² / n_tokens).

        Args:
            path: of a parameter.
            n_tokens: that ran through the model, routed to the slice or not.

        Returns:
            Of the parameter's shape, float32; NaN in slices that no token was multiplied with.
        """
        parameter = self._parameters[path].detach()
        found = torch.full_like(parameter, torch.nan, dtype=torch.float32)
        for (of, offset, shape, stride), total in self._sums.items():
            if of == path:
                place = found.as_strided(shape, stride, offset)
                place.copy_(place.nan_to_num(0.0) + (total / n_tokens).float()[:, None])
        return found.sqrt_()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of torch's, and look at the factors of a product."""
        result = func(*args, **(kwargs or {}))
        if func in FACTORS:
            left, right = (args[i] for i in FACTORS[func])
            if func is by_onednn:
                left, right = left.reshape(-1, left.shape[-1]), right.mT
            if path := self._owner(right):
                self._see(path, right, left)
            elif path := self._owner(left):
                self._see(path, left.mT, right.mT)
        return result

    def _owner(self, factor: Tensor) -> str | None:
        """The parameter that a tensor is a view of."""
        i = bisect_right(self._starts, factor.data_ptr()) - 1
        if i < 0 or not factor.numel():
            return None
        parameter = self._parameters[self._paths[i]]
        end = parameter.data_ptr() + parameter.numel() * parameter.element_size()
        inside = factor.device == parameter.device and factor.dtype == parameter.dtype
        return self._paths[i] if inside and factor.data_ptr() < end else None

    def _see(self, path: str, weight: Tensor, tokens: Tensor) -> None:
        """Count `tokens` (..., n_tokens, n_in) for `weight` (..., n_in, n_out), a view."""
        for part, rows in _matrices(weight, tokens):
            total = sum_of_squares(rows)
            if total.any():
                parameter = self._parameters[path]
                offset = (part.data_ptr() - parameter.data_ptr()) // parameter.element_size()
                key = (path, offset, tuple(part.shape), part.stride())
                self._sums[key] = self._sums[key] + total if key in self._sums else total


def _matrices(weight: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of two dimensions; one matrix that was repeated for every text is one."""
    if weight.dim() == 2:
        yield weight, tokens
    elif weight.stride(0) == 0:
        yield weight[0], tokens.reshape(-1, tokens.shape[-1])
    else:
        yield from zip(weight, tokens, strict=True)


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
