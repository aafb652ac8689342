"""Random orders of the units of a model, for tests of alignment."""

import numpy as np

from lewis_hub.merge.symmetries import HEADS


def width_of(units, group):
    """The number of units of a group."""
    name, dimension = next(units.with_group(group))
    return units.shapes[name][dimension]


def random_orders(units, generator):
    """An order of each group that the architecture allows."""
    orders = {"residual": generator.permutation(width_of(units, "residual"))}
    for block in range(units.n_blocks):
        orders[f"{block}.mlp"] = generator.permutation(width_of(units, f"{block}.mlp"))
        orders |= _of_heads(units, block, generator)
    return orders


def _of_heads(units, block, generator):
    group, width = units.n_heads // units.n_kv_heads, units.head_width
    of_groups = generator.permutation(units.n_kv_heads)
    dims = [np.arange(width) for _ in of_groups]
    if not units.family.rotary:
        dims = [generator.permutation(width) for _ in of_groups]
    values = [generator.permutation(width) for _ in of_groups]
    queries = [generator.permutation(group) for _ in of_groups]

    def heads(places, within):
        return np.concatenate([p * width + w for p, w in zip(places, within, strict=True)])

    places = [g * group + q for g, own in zip(of_groups, queries, strict=True) for q in own]
    repeated = [[one for one in parts for _ in range(group)] for parts in (dims, values)]
    found = (
        heads(places, repeated[0]),
        heads(of_groups, dims),
        heads(of_groups, values),
        heads(places, repeated[1]),
    )
    return {f"{block}.{kind}": order for kind, order in zip(HEADS, found, strict=True)}
