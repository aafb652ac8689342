"""Whether the tensors of a model have the units that its configuration says.

Both come from others: matching relies on each group of units having one size everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

from lewis_hub.checkpoint import names
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.symmetries import HEADS, MLP, OUTPUT, QUERY, REMEDY, RESIDUAL, Units


def require_units(label: str, units: Units) -> None:
    """Refuse a model with tensors that do not fit its configuration, or each other.

    Raises:
        AlignmentError: it names the model, and the first tensor or group that does not fit.
    """
    for problem in _problems(units):
        raise AlignmentError(label, problem, REMEDY)


def _problems(units: Units) -> Iterator[str]:
    blocks = {block for name in units.axes if (block := names.block(name)) is not None}
    if len(blocks) != units.n_blocks:
        yield f"its blocks are numbered up to {units.n_blocks - 1}, and there are {len(blocks)}"
        return
    sizes: dict[str, int] = {}
    for name, axes in units.axes.items():
        shape = units.shapes[name]
        if axes and len(axes) != len(shape):
            yield f"{name} has the shape {[*shape]}, expected {len(axes)} dimensions"
            return
        for axis, size in zip(axes, shape, strict=bool(axes)):
            n_units, rest = divmod(size, max(len(axis), 1))
            for group in axis:
                if rest or not n_units or sizes.setdefault(group, n_units) != n_units:
                    yield f"{name} has the shape {[*shape]}, which does not fit its other tensors"
                    return
    seen = {site.split(" ")[0] for site in units.sites}
    for group, expected in _expected(units):
        if group not in sizes or group not in seen:
            yield f"it has no tensors with the units `{group}`"
        elif expected not in (None, sizes[group]):
            yield f"it has {sizes[group]} units `{group}`, and its config.json {expected}"


def _expected(units: Units) -> Iterator[tuple[str, int | None]]:
    """Every group of units, and its size by the configuration; None: it does not say."""
    n_kv = units.n_kv_heads
    yield RESIDUAL, None
    for block in range(units.n_blocks):
        yield f"{block}.{MLP}", None
        for kind in HEADS:
            n_heads = units.n_heads if kind in (QUERY, OUTPUT) else n_kv
            whole = n_kv > 0 and units.n_heads % n_kv == 0
            yield f"{block}.{kind}", n_heads * units.head_width if whole else 0
