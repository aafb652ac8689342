"""Match the units of one model with those of another: by activations and weights (MuDSC).

Xu et al., "Training-Free Pretrained Model Merging", arXiv:2403.01753. Formula, for units i of the
reference and j of the other model:

    S = w S_weights + (1 - w) S_activations,    order = argmax over permutations p of Σ_i S[i, p(i)]

S_activations is the correlation of two units over the tokens of the same texts. S_weights is the
cosine of their weights, in all tensors that they are in, while the other dimensions of the other
model's tensors are in the order found so far. A group after the other is matched, until the mean
of the matched similarities no longer grows. Units of heads are matched within each pair of heads,
and then the heads by what that gives, as in the paper's matching of groups.

Of two models of different width, some units have no partner: p is one to one where it is defined.
Cosines are then over the entries that both have.

The paper takes the correlation of weights (here: the cosine), takes groups in random order (here:
the residual stream, then the blocks), and matches the heads of queries and keys apart from those of
values. Here a head stays whole, as the outputs of a model change otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lewis_hub.merge.permutation import Order
from lewis_hub.merge.symmetries import (
    HEADS,
    KEY,
    MLP,
    OUTPUT,
    QUERY,
    RESIDUAL,
    VALUE,
    Units,
)
from lewis_hub.methods.numerics import in_range, torch_threads

MAX_SWEEPS = 20  # over all groups
HELD_BYTES = 1 << 30  # of correlations in memory; more are computed again in each sweep
LEAST_GAIN = 1e-6  # of the mean similarity, for another sweep

ReadTensor = Callable[[str], Tensor]  # name -> values in float32
Activations = Callable[[str], Tensor]  # name of a site -> (tokens, units) float32


@dataclass(frozen=True)
class ComparedModel:
    """One of the two models: its tensors, and what its units were on the texts."""

    read: ReadTensor
    activations: Activations | None  # None: weights alone are compared


@dataclass(frozen=True)
class Matched:
    """The orders of all groups, and how similar the units in the same place are."""

    orders: Mapping[str, Order]
    similarity: Mapping[str, float]  # of each group, matched
    unmatched: Mapping[str, float]  # of each group, if it alone were left in its own order
    nearest: Mapping[str, Order]  # of MLPs: for each unit of the other model the most similar one


@dataclass
class _State:
    """What is known during the sweeps."""

    orders: dict[str, Order] = field(default_factory=dict)
    similarity: dict[str, float] = field(default_factory=dict)
    unmatched: dict[str, float] = field(default_factory=dict)
    nearest: dict[str, Order] = field(default_factory=dict)


def match(units: Units, reference: ComparedModel, other: ComparedModel, weight: float) -> Matched:
    """Find the orders in which the units of `other` resemble those of `reference` most.

    Args:
        units: of the reference. The other model has the same tensors, with as many query heads in
            a group.
        reference: the model whose order is kept.
        other: the model that is permuted.
        weight: w in the formula, from 0 (activations alone) to 1 (weights alone).
    """
    with torch.no_grad(), torch_threads(1):  # on any number of threads the sums are the same
        finder = _Finder(units, reference, other, weight)
        best, best_mean = _State(), -np.inf
        for _ in range(MAX_SWEEPS):
            finder.sweep()
            mean = float(np.mean([*finder.state.similarity.values()]))
            if mean < best_mean + LEAST_GAIN:
                break
            best, best_mean = deepcopy(finder.state), mean
    return Matched(best.orders, best.similarity, best.unmatched, best.nearest)


class _Finder:
    """Matches one group after the other, given the orders of all others."""

    def __init__(
        self, units: Units, reference: ComparedModel, other: ComparedModel, weight: float
    ) -> None:
        self._units, self._reference, self._other = units, reference, other
        self._weight = weight
        self._correlations: dict[str, Tensor] = {}
        self.state = _State()

    def sweep(self) -> None:
        """Match the residual stream, then the MLP and the heads of each block."""
        self._assign(RESIDUAL)
        for block in self._units.blocks:
            self._assign(f"{block}.{MLP}")
            self._assign_heads(block)

    def _assign(self, group: str) -> None:
        similarity = self._similarity(group)
        self._keep(group, similarity, best_order(similarity))
        if group != RESIDUAL:
            self.state.nearest[group] = nearest_units(similarity)

    def _keep(self, group: str, similarity: Tensor, order: Order) -> None:
        self.state.orders[group] = order
        self.state.similarity[group] = _mean_of(similarity, order)
        self.state.unmatched[group] = _mean_of(similarity, np.arange(min(similarity.shape)))

    def _assign_heads(self, block: int) -> None:
        groups = {kind: f"{block}.{kind}" for kind in HEADS}
        found = {kind: self._similarity(group) for kind, group in groups.items()}
        units = self._units
        orders = match_heads(
            found,
            (units.n_kv_heads, units.n_heads // units.n_kv_heads, units.head_width),
            rotary=units.family.rotary,
        )
        for kind, group in groups.items():
            self._keep(group, found[kind], orders[kind])

    def _similarity(self, group: str) -> Tensor:
        """S of the formula, (units of the reference, units of the other)."""
        of_weights = self._cosines(group) if self._weight > 0 else None
        of_activations = self._correlation(group) if self._weight < 1 else None
        if of_weights is None or of_activations is None:
            found = of_weights if of_activations is None else of_activations
            assert found is not None  # a weight is on at least one side
            return found
        return self._weight * of_weights + (1 - self._weight) * of_activations

    def _correlation(self, group: str) -> Tensor:
        """The mean of the correlations at all sites of a group."""
        if group in self._correlations:
            return self._correlations[group]
        assert self._reference.activations
        assert self._other.activations
        sites = [site for site in self._units.sites if site.split(" ")[0] == group]
        total = torch.zeros(())
        for site in sites:
            pair = (self._reference.activations(site), self._other.activations(site))
            total = total + correlation(*(self._part(group, site, one) for one in pair))
        found = total / len(sites)
        held = sum(one.nbytes for one in self._correlations.values())
        if held + found.nbytes <= HELD_BYTES:
            self._correlations[group] = found
        return found

    def _part(self, group: str, site: str, seen: Tensor) -> Tensor:
        """The units of a group among those at a site that holds several groups."""
        start, size = self._units.place_at_site(group, site, seen.shape[1])
        return seen[:, start : start + size]

    def _cosines(self, group: str) -> Tensor:
        """The cosines of two units over all their weights whose other dimension is matched."""
        dots, squares, others = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for name, dimension in self._units.with_group(group):
            if any(g not in self.state.orders for g in self._units.across(name, dimension)):
                continue  # in the first sweep
            pair = self._in_order(name, dimension)
            ours, theirs = (self._rows(one, name, dimension, group) for one in pair)
            dots = dots + ours @ theirs.T
            squares = squares + ours.square().sum(dim=1)
            others = others + theirs.square().sum(dim=1)
        lengths = torch.outer(squares.sqrt(), others.sqrt())
        cosines = dots / lengths.where(lengths > 0, 1)
        return cosines.nan_to_num(0.0, 0.0, 0.0)  # products of huge weights overflow float32

    def _in_order(self, name: str, dimension: int) -> tuple[Tensor, Tensor]:
        """A tensor of both, with its other dimension in the order found so far, where matched."""
        ours, theirs = self._reference.read(name), self._other.read(name)
        across = self._units.across(name, dimension)
        if not across:
            return ours, theirs
        order = torch.from_numpy(self._units.joined(across, self.state.orders))
        if (order < 0).any():
            [kept] = torch.nonzero(order >= 0, as_tuple=True)
            ours, order = ours.index_select(1 - dimension, kept), order[kept]
        return ours, theirs.index_select(1 - dimension, order)

    def _rows(self, tensor: Tensor, name: str, dimension: int, group: str) -> Tensor:
        """The weights of a group's units, one unit a row."""
        rows = tensor.movedim(dimension, 0).reshape(tensor.shape[dimension], -1)
        start, size = self._units.place_in(group, name, dimension, len(rows))
        return rows[start : start + size]


def correlation(ours: Tensor, theirs: Tensor) -> Tensor:
    """Pearson's correlation of each column of one matrix with each of the other; 0 if constant."""
    parts = []
    for seen in map(in_range, (ours, theirs)):
        centred = seen - seen.mean(dim=0)
        lengths = centred.square().sum(dim=0).sqrt()
        parts.append(centred / lengths.where(lengths > 0, 1))
    return parts[0].T @ parts[1]


def best_order(similarity: Tensor) -> Order:
    """The p, one to one, with the largest Σ_i S[i, p(i)]; -1 for i without a partner."""
    from scipy.optimize import linear_sum_assignment  # of the extra `align`

    rows, columns = linear_sum_assignment(similarity.double().numpy(), maximize=True)
    order = np.full(len(similarity), -1, np.int64)
    order[rows] = columns
    return order


def nearest_units(similarity: Tensor) -> Order:
    """The i with the largest S[i, j] for each j; -1 if none is above 0."""
    best, nearest = similarity.max(dim=0)
    return np.asarray(nearest.where(best > 0, -1).numpy(), np.int64)


def match_heads(
    similarity: Mapping[str, Tensor], sizes: tuple[int, int, int], *, rotary: bool
) -> dict[str, Order]:
    """Match the heads of a block, in whole groups that share keys and values.

    Within a pair of heads, values are matched, and without rotary positions also queries and keys.
    Then query heads are matched within each pair of groups, and then the groups.

    Args:
        similarity: of queries, keys, values, and of the inputs of the output matrix.
        sizes: the reference's number of groups, and of both query heads in a group and the width
            of a head.
        rotary: whether queries and keys within a head keep their places.
    """
    n_groups, n_queries, width = sizes
    parts = {kind: _by_heads(similarity[kind], width) for kind in HEADS}
    values = np.zeros((n_groups, parts[KEY].shape[1]))
    chosen: dict[tuple[int, int], tuple[Order, Order, Order]] = {}
    for ours in range(n_groups):
        for theirs in range(values.shape[1]):
            pair = {kind: parts[kind][ours, theirs] for kind in (KEY, VALUE)}
            rows, columns = (slice(g * n_queries, (g + 1) * n_queries) for g in (ours, theirs))
            pair |= {kind: parts[kind][rows, columns] for kind in (QUERY, OUTPUT)}
            within = np.arange(width)
            if not rotary:
                within = best_order(pair[KEY] + pair[QUERY].mean(dim=(0, 1)))
            value = best_order(pair[VALUE] + pair[OUTPUT].mean(dim=(0, 1)))
            heads = _means(pair[QUERY], within) + _means(pair[OUTPUT], value)
            queries = best_order(heads)
            chosen[ours, theirs] = within, value, queries
            values[ours, theirs] = _mean_of(pair[KEY], within) + _mean_of(pair[VALUE], value)
            values[ours, theirs] += _mean_of(heads, queries)
    groups = best_order(torch.from_numpy(values))
    return _head_orders(groups, chosen, n_queries, width)


def _head_orders(
    groups: Order,
    chosen: Mapping[tuple[int, int], tuple[Order, Order, Order]],
    n_queries: int,
    width: int,
) -> dict[str, Order]:
    """The orders of all units of a block's heads."""
    found: dict[str, list[Order]] = {kind: [] for kind in HEADS}
    for ours, theirs in enumerate(groups.tolist()):
        if theirs < 0:
            for kind, parts in found.items():
                n_heads = n_queries if kind in (QUERY, OUTPUT) else 1
                parts.append(np.full(n_heads * width, -1, np.int64))
            continue
        within, value, queries = chosen[ours, theirs]
        found[KEY].append(theirs * width + within)
        found[VALUE].append(theirs * width + value)
        for query in queries.tolist():
            head = theirs * n_queries + query
            found[QUERY].append(head * width + within)
            found[OUTPUT].append(head * width + value)
    return {kind: np.concatenate(parts) for kind, parts in found.items()}


def _by_heads(similarity: Tensor, width: int) -> Tensor:
    """(units, units) as (heads, heads, width, width)."""
    n_ours, n_theirs = (size // width for size in similarity.shape)
    return similarity.reshape(n_ours, width, n_theirs, width).transpose(1, 2)


def _means(similarity: Tensor, order: Order) -> Tensor:
    """The mean similarity of units in the same place, for each pair of heads."""
    places = torch.arange(len(order)), torch.from_numpy(order)
    return similarity[:, :, places[0], places[1]].mean(dim=-1)


def _mean_of(similarity: Tensor, order: Order) -> float:
    [places] = np.nonzero(order >= 0)
    matched = similarity[torch.from_numpy(places), torch.from_numpy(order[places])]
    return float(matched.double().mean())
