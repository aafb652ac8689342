"""A model whose units are put in the places of those of a model of another width.

An entry of a tensor is the model's own where its row and its column have a unit of the model, and
the reference's elsewhere. So a task vector is zero there. Units of a wider model without a partner
are left out, or zipped: several rows of a matrix become their mean, and several columns their sum,
so that equal units stay exact. Only units of an MLP are zipped. The residual stream is not, as a
tied embedding writes and reads it, nor are heads, whose softmax has no mean.

An RMSNorm divides by a mean over all units, of another number and of other units now. So the scales
of each norm of the residual stream are multiplied by the mean over tokens of

    sqrt( (Σ_matched x² + Σ_unmatched y²) / d  /  (Σ x² / d') )

with x the d' units of the model, and y the d units of the reference.

A model of another depth too has zeros in its identity blocks, in the rows of its own units only.

The paper (arXiv:2501.00061) merges the most similar units, also of one model, until as many remain
as the wider model has. In its code, scales and biases of norms are averaged as any weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import MERGEABLE, Adapted, Fitted, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.depth import OTHER_ROWS
from lewis_hub.merge.permutation import Order, as_bytes
from lewis_hub.merge.symmetries import FIXED, RESIDUAL, Axes, Units

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = "`width` matches models of one architecture that differ in their numbers of units only."

DIGITS = 7  # of a factor: further ones differ between machines

Seen = Callable[[str], "Tensor"]  # name of a site -> (tokens, units) float32
Places = Mapping[str, Order]  # group -> the place of each unit of the model; -1: none


def in_widths(
    reference: Checkpoint,
    own: Checkpoint,
    units: Units,
    places: Places,
    norm_scales: Mapping[str, float],
) -> Checkpoint:
    """The headers of a model with the shapes of the reference's tensors.

    Args:
        reference: the model whose width is taken.
        own: the model, which `require_same_names` accepted, or what `in_places` made of it: the
            reference's tensors stay where it has none.
        units: of the reference.
        places: of the model's units; those of absent groups stay where they are.
        norm_scales: the factor of each norm of the residual stream, by its module; absent: 1.
    """
    tensors = {}
    for name, tensor in reference.tensors.items():
        axes, stored = units.axes.get(name), own.tensors.get(name)
        if tensor.dtype not in MERGEABLE or axes is None or stored is None:
            tensors[name] = tensor
        else:
            scale = norm_scales.get(names.module(name), 1.0)
            tensors[name] = _instead(tensor, stored, _fitted(axes, places, scale))
    return Checkpoint(own.label, tensors, reference.label)


def _fitted(axes: Axes, places: Places, scale: float) -> Fitted | None:
    """Where rows and columns go; None: the tensor stays as it is."""
    found = [as_bytes(places[axis[0]]) if axis and axis[0] in places else None for axis in axes]
    if not any(found):
        return None
    *rows, columns = found
    return Fitted(rows[0] if rows else None, columns, scale)


def _instead(base: TensorHeader, saved: TensorHeader, fitted: Fitted | None) -> TensorHeader:
    """A tensor of the reference, with other values; `fitted` if they are of another size."""
    change, n_bytes = Adapted(base, saved, None, fitted), 4 * base.n_elements
    return TensorHeader(base.name, "F32", base.shape, saved.shard, 0, n_bytes, change)


def places_of(order: Order, n_own: int, nearest: Order | None = None) -> Order:
    """The place of each of a model's units; `nearest` is that of units without a partner."""
    places = np.full(n_own, -1, np.int64) if nearest is None else nearest.copy()
    [matched] = np.nonzero(order >= 0)
    places[order[matched]] = matched
    return places


def norm_scales(units: Units, order: Order, ours: Seen, theirs: Seen) -> dict[str, float]:
    """The factors of the scales of all norms that read the residual stream, by module.

    Args:
        units: of the reference.
        order: of the residual stream: the model's unit in each place, or -1.
        ours: what the reference's units are on the texts.
        theirs: those of the model, on the same tokens.
    """
    matched, found = order >= 0, {}
    for site, (module, _) in units.sites.items():
        if site.split(" ")[0] == RESIDUAL:
            x, y = (seen(site).double().square() for seen in (theirs, ours))
            kept = x[:, order[matched]].sum(dim=1) + y[:, ~matched].sum(dim=1)
            ratio = kept / len(order) / x.mean(dim=1)
            mean = ratio[ratio.isfinite()].sqrt().mean().nan_to_num(1.0)
            found[module] = round(float(mean), DIGITS)
    return found


def require_same_names(reference: Checkpoint, own: Checkpoint, units: Units) -> None:
    """Refuse a model that has other tensors, or another number of what has no units.

    Raises:
        AlignmentError: it names the tensor.
    """
    for name in sorted(_merged(reference) ^ _merged(own)):
        lacks, has = (own, reference) if name in reference.tensors else (reference, own)
        raise AlignmentError(lacks.label, f"it lacks {name}, which {has.label} has", REMEDY)
    for name in sorted(_merged(own)):
        shapes = reference.tensors[name].shape, own.tensors[name].shape
        axes = units.axes[name] or [FIXED] * len(shapes[0])
        fixed = [
            tuple(size for axis, size in zip(axes, shape, strict=False) if not axis)
            for shape in shapes
        ]
        if len(shapes[0]) != len(shapes[1]) or fixed[0] != fixed[1]:
            problem = f"{name} has the shape {[*shapes[1]]}, in {reference.label} {[*shapes[0]]}"
            is_rows = names.may_have_tokens(name)
            raise AlignmentError(own.label, problem, OTHER_ROWS if is_rows else REMEDY)


def _merged(checkpoint: Checkpoint) -> set[str]:
    return {name for name, tensor in checkpoint.tensors.items() if tensor.dtype in MERGEABLE}
