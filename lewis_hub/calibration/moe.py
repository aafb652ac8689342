"""Activation norms of parameters that no Linear owns, such as the fused matrices of a mixture.

transformers keeps the expert matrices of a mixture-of-experts block as one parameter of three
dimensions and multiplies tokens with a slice of it, so there is no module to hook. A function mode
looks at every matrix product instead: if one factor is a view of such a parameter, the other factor
holds the tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from lewis_hub.calibration.model import Linear, matrix
from lewis_hub.calibration.summaries import sum_of_squares
from lewis_hub.calibration.weight_names import as_stored, unknown_like
from lewis_hub.checkpoint import names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FACTORS: dict[Callable[..., Any], tuple[int, int]] = {  # product -> arguments that are multiplied
    linear: (0, 1),  # the second is stored as (n_out, n_in)
    torch.matmul: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
    Tensor.mm: (0, 1),
    torch.bmm: (0, 1),
    Tensor.bmm: (0, 1),
    torch.addmm: (1, 2),
    torch.baddbmm: (1, 2),
}

Slice = tuple[str, int, tuple[int, ...], tuple[int, ...]]  # of: path, offset, shape, stride


class ProductRecorder(TorchFunctionMode):
    """Sums squares of the tokens that each slice of some parameters is multiplied with.

    A context manager: it sees the products inside it. Every token counts, so texts must not be
    padded.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Watch `parameters`, by their paths."""
        super().__init__()
        self._parameters = parameters
        self._sums: dict[Slice, Tensor] = {}
        starts = sorted((p.data_ptr(), path) for path, p in parameters.items())
        self._starts, self._paths = [s for s, _ in starts], [path for _, path in starts]

    @property
    def used(self) -> frozenset[str]:
        """Paths of the parameters of which a slice was multiplied with a token."""
        return frozenset(path for path, *_ in self._sums)

    def only_used(self) -> ProductRecorder | None:
        """A new recorder for the parameters that were multiplied; None if there are none."""
        used = {path: p for path, p in self._parameters.items() if path in self.used}
        return ProductRecorder(used) if used else None

    def norms(self, path: str, n_tokens: int) -> Tensor:
        """The activation norm of each entry of a parameter: sqrt(Σ_t x_t² / n_tokens).

        Args:
            path: of a parameter.
            n_tokens: the number of tokens of the pass, routed to the slice or not.

        Returns:
            In the parameter's shape, float32; NaN in slices that no token was multiplied with.
        """
        parameter = self._parameters[path].detach()
        found = torch.full_like(parameter, torch.nan, dtype=torch.float32)
        for (of, offset, shape, stride), total in self._sums.items():
            if of == path:
                part = found.as_strided(shape, stride, offset)
                part.copy_(part.nan_to_num(0.0) + (total / n_tokens).float()[:, None])
        return found.sqrt_()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch's, and look at the factors of a product."""
        if func in FACTORS:
            given = (*args, *(kwargs or {}).values())
            left, right = (given[i] for i in FACTORS[func])
            if func is linear and right.dim() > 1:
                right = right.mT
            if path := self._owner(right):
                self._record(path, right, left)
            elif path := self._owner(left):
                self._record(path, left.mT, right.mT)
        return func(*args, **(kwargs or {}))

    def _owner(self, factor: Tensor) -> str | None:
        """The parameter that a tensor is a view of."""
        i = bisect_right(self._starts, factor.data_ptr()) - 1
        if i < 0 or factor.dim() < 2 or not factor.numel():
            return None
        parameter = self._parameters[self._paths[i]]
        end = parameter.data_ptr() + parameter.numel() * parameter.element_size()
        inside = factor.device == parameter.device and factor.dtype == parameter.dtype
        return self._paths[i] if inside and factor.data_ptr() < end else None

    def _record(self, path: str, weight: Tensor, tokens: Tensor) -> None:
        """Add `tokens` (..., n_tokens, n_in) to `weight` (..., n_in, n_out), a view."""
        for part, rows in _matrix_pairs(weight.detach(), tokens.detach()):
            total = sum_of_squares(rows)
            if total.any():
                parameter = self._parameters[path]
                offset = (part.data_ptr() - parameter.data_ptr()) // parameter.element_size()
                key = (path, offset, tuple(part.shape), part.stride())
                self._sums[key] = self._sums[key] + total if key in self._sums else total


def _matrix_pairs(weight: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each matrix of a stack, with the rows that it is multiplied with."""
    while weight.dim() > 2 and (weight.stride(0) == 0 or len(weight) == 1):  # one, repeated
        weight = weight[0]
    if weight.dim() == 2:
        yield weight, tokens.reshape(-1, tokens.shape[-1])
        return
    stacked = (weight[..., 0, 0] + tokens[..., 0, 0]).shape  # of both, broadcast
    weight = weight.expand(*stacked, *weight.shape[-2:])
    tokens = tokens.expand(*stacked, *tokens.shape[-2:])
    for place in product(*map(range, stacked)):
        yield weight[place], tokens[place]


@dataclass(frozen=True)
class StoredBlock:
    """The tensors of a block that tokens reached, by the checkpoint's modules.

    Attributes:
        weights: module -> (out_features, in_features); of another shape if no Linear owns it.
        norms: module -> (in_features,) activation norms, or one for each entry of the weight: 0
            for entries that no token reached.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def add(self, tensor: str, weight: Tensor, norm: Tensor) -> None:
        """Add a tensor, if any token reached it."""
        if not norm.isnan().all():
            self.weights[names.module(tensor)] = weight
            self.norms[names.module(tensor)] = norm.nan_to_num(0.0)


@dataclass(frozen=True)
class BlockNorms:
    """Activation norms of all, or of whole, blocks of a model.

    Attributes:
        parameters: of the blocks, by their names.
        modules: path -> Linear.
        norms: path of a module -> (in_features,) activation norms.
        products: the recorder of all other products.
        n_tokens: the number of tokens of the pass.
    """

    parameters: Iterable[tuple[str, Tensor]]
    modules: Mapping[str, Linear]
    norms: Mapping[str, Tensor]
    products: ProductRecorder | None
    n_tokens: int

    def stored(self, model: PreTrainedModel, stored_as: Mapping[str, str]) -> Iterator[StoredBlock]:
        """Assign weights and norms to the tensors of the checkpoint, block by block.

        Copies are made only of parameters that the checkpoint stores otherwise, one block at a
        time.

        Args:
            model: as `from_pretrained` returned it.
            stored_as: from `weight_names`.

        Yields:
            In the model's order. Tensors that no token reached are left out.
        """
        linear_paths = {f"{path}.weight": path for path in self.norms}
        reached = linear_paths.keys() | (self.products.used if self.products else frozenset())
        for parameters in _by_block(self.parameters):
            block = StoredBlock()
            for name, parameter in parameters.items():
                if name in stored_as and name in linear_paths:  # without a norm for each entry
                    path = linear_paths[name]
                    block.add(stored_as[name], matrix(self.modules[path]), self.norms[path])
                elif name in stored_as and name in reached:
                    block.add(stored_as[name], parameter, self._of_entries(name, parameter))
            fused = {name: p for name, p in parameters.items() if name not in stored_as}
            if reached & fused.keys():
                norms = {name: self._of_entries(name, p) for name, p in fused.items()}
                weights = as_stored(model, fused)
                for name, norm in as_stored(model, norms).items():
                    block.add(name, weights[name], norm)
            if block.weights:
                yield block

    def _of_entries(self, name: str, parameter: Tensor) -> Tensor:
        """A norm for each entry of a parameter; NaN if no token was multiplied with it."""
        path = name.removesuffix(".weight")
        if path in self.norms:
            norm = self.norms[path]
            by_entry = norm[:, None] if isinstance(self.modules[path], Conv1D) else norm
            return by_entry.expand(parameter.shape)
        if self.products and name in self.products.used:
            return self.products.norms(name, self.n_tokens)
        return unknown_like(parameter, parameter.device)


def _by_block(parameters: Iterable[tuple[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    blocks: defaultdict[tuple[str | None, int | None], dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in parameters:
        blocks[names.stack(name), names.block(name)][name] = parameter.detach()
    return blocks.values()
