"""SLERP and NuSLERP: from one model to another along an arc instead of a straight line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lewis_hub.methods.products import cosine, dot, row_dots
from lewis_hub.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]

PAPER = "https://doi.org/10.1145/325334.325242"
NEARLY_PARALLEL = 0.9995  # above this |cosine| the way is straight; as in mergekit
PARALLEL = 1e-16  # squared sine below which NuSLERP's way is straight; as in mergekit
BALANCED = 1e-6  # weights whose sum is below this count as equal; as in mergekit


@register("slerp", paper=PAPER, n_experts=(1, 1))
def slerp(
    base: Tensor,  # (*shape) float32
    tensors: Tensor,  # (1, *shape) float32, the other model
    *,
    t: float,  # 0 gives the base, 1 the other model
) -> Tensor:
    """Go from the base to one other model along the arc between them.

    Nearly parallel tensors, and opposite ones, are mixed on a straight line. A tensor of zeros
    counts as at right angles to any other. The angle is measured in float64.
    """
    other = tensors[0]
    angle = np.array(cosine(dot(base, other), dot(base, base), dot(other, other)))
    start, end = arc(t, angle, abs(angle) > NEARLY_PARALLEL)
    return float(start) * base + float(end) * other


@register("nuslerp", paper=PAPER, n_experts=(2, 2), base_is_optional=True)
def nuslerp(
    base: Tensor,  # (*shape) float32; zeros where the recipe has no base
    tensors: Tensor,  # (2, *shape) float32
    *,
    weights: Tensor,  # (2,) the second's share of the sum is how far the way is gone
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
) -> Tensor:
    """Go from one model, or task vector, to another along the arc, as far as their weights say.

    Flattened, a tensor is one vector. Otherwise every row (along the last dimension) is turned by
    its own angle or, with `nuslerp_row_wise`, every vector along the first dimension: the option
    means what it does in mergekit.
    """
    first, second = tensors[0] - base, tensors[1] - base
    w, v = weights.tolist()
    t = v / (w + v) if abs(w + v) >= BALANCED else 0.5
    if nuslerp_flatten:
        angle = np.array(cosine(dot(first, second), dot(first, first), dot(second, second)))
        start, end = arc(t, angle, _parallel(angle))
        return base + (float(start) * first + float(end) * second)
    if nuslerp_row_wise and base.dim() > 1:
        along = first.transpose(0, -1), second.transpose(0, -1)
        turned = _turned_by_row(*along, t).transpose(0, -1)
    else:
        turned = _turned_by_row(first, second, t)
    return base + turned


def arc(t: float, cosines: Floats, straight: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """What two vectors are multiplied by, for the point at t of the arc between them.

    Args:
        t: 0 is the first vector, 1 the second.
        cosines: of the angles between them, in [-1, 1].
        straight: where the way is a straight line instead.

    Returns:
        Two factors, in the shape of `cosines`.
    """
    theta = np.arccos(np.where(straight, 0.0, cosines))
    start, end = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    return np.where(straight, 1 - t, start), np.where(straight, t, end)


def _turned_by_row(first: Tensor, second: Tensor, t: float) -> Tensor:
    lengths = (row_dots(first, first).sqrt() * row_dots(second, second).sqrt()).cpu().numpy()
    products = row_dots(first, second).cpu().numpy()
    angles = np.divide(products, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    angles = angles.clip(-1.0, 1.0)
    start, end = arc(t, angles, _parallel(angles))
    return first.new_tensor(start) * first + first.new_tensor(end) * second


def _parallel(cosines: Floats) -> npt.NDArray[np.bool_]:
    return np.asarray(1 - cosines**2 <= PARALLEL)
