"""How blocks and units of one model were matched with another's, and a summary of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from lewis_hub.merge.depth import Blocks
from lewis_hub.merge.permutation import Order
from lewis_hub.merge.symmetries import KEY, MLP, OUTPUT, QUERY, RESIDUAL, VALUE

FILE = "alignment.json"  # in the folder `lewis`
VERSION = 2  # of the arithmetic: raised when the same models and texts give other orders
CALLED = {
    RESIDUAL: "residual stream",
    MLP: "MLP units",
    QUERY: "queries",
    KEY: "keys",
    VALUE: "values",
    OUTPUT: "attention outputs",
}


Seen = Literal["outputs", "updates"]  # of a block: the hidden state after it, or what it adds to it


@dataclass(frozen=True)
class AlignedKind:
    """Units of one kind in all blocks; similarities are means over them."""

    name: str
    n_units: int  # of the reference
    n_moved: int  # units that have another place than before
    n_matched: int
    n_own: int  # of the model
    n_zipped: int  # beside the matched ones, averaged onto them
    before: float  # similarity of units in the same place, if these alone were not matched
    after: float

    @property
    def n_left_out(self) -> int:
        """Units of the model without a place."""
        return self.n_own - self.n_matched - self.n_zipped

    @property
    def n_lacking(self) -> int:
        """Places without a unit of the model."""
        return self.n_units - self.n_matched


@dataclass(frozen=True)
class MatchedBlocks:
    """The blocks of a model in the places of those of a model of another depth."""

    numbers: Blocks  # for each block of the reference, the model's own; None: an identity block
    similarity: tuple[tuple[float, ...], ...]  # (blocks of the reference, of the model)
    weight_similarity: float  # share of the weights in it
    compared: Seen = "outputs"  # the rest of it is theirs

    @property
    def identity(self) -> tuple[int, ...]:
        """The places without a block of the model."""
        return tuple(place for place, number in enumerate(self.numbers) if number is None)

    @property
    def left_out(self) -> tuple[int, ...]:
        """The blocks of the model without a place."""
        return tuple(n for n in range(len(self.similarity[0])) if n not in self.numbers)


@dataclass(frozen=True)
class MatchedWidths:
    """The units of a model in the places of those of a model of another width."""

    places: Mapping[str, Order]  # of each of its units, by group; -1: it is left out
    norm_scales: Mapping[str, float]  # factors of the norms of the residual stream, by module

    def document(self) -> dict[str, Any]:
        """The widths as plain JSON."""
        return {"places": _listed(self.places), "norm_scales": dict(self.norm_scales)}


@dataclass(frozen=True)
class AlignedModel:
    """A model whose blocks, units or both were matched with those of another model."""

    source: str  # pinned
    reference: str  # pinned
    weight_similarity: float
    calibration: Mapping[str, Any]  # facts that fix the texts; empty without texts
    orders: Mapping[str, Order]  # of each group of units, such as `3.mlp`; -1: it has none there
    before: Mapping[str, float]  # similarity of units in the same place, by group
    after: Mapping[str, float]
    blocks: MatchedBlocks | None = None  # None: it has the depth of the reference
    widths: MatchedWidths | None = None  # None: it has the width of the reference

    @property
    def digest(self) -> str:
        """Equal digests mean equal orders and places."""
        facts = [VERSION, _listed(dict(sorted(self.orders.items())))]
        facts += [[*self.blocks.numbers]] if self.blocks else []
        facts += [self.widths.document()] if self.widths else []
        return "sha256:" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def kinds(self) -> tuple[AlignedKind, ...]:
        """A summary of the units, by their kind."""
        return tuple(self._kind(kind) for kind in CALLED if any(self._groups(kind)))

    def _groups(self, kind: str) -> Iterator[str]:
        return (group for group in self.orders if group.rpartition(".")[2] == kind)

    def _kind(self, kind: str) -> AlignedKind:
        orders = {group: self.orders[group] for group in self._groups(kind)}
        own = self.widths.places if self.widths else orders
        n_units, n_own = (sum(len(found[group]) for group in orders) for found in (orders, own))
        moved = sum(((o >= 0) & (o != np.arange(len(o)))).sum() for o in orders.values())
        matched = sum((order >= 0).sum() for order in orders.values())
        placed = sum((own[group] >= 0).sum() for group in orders)
        before, after = (
            sum(values[group] * len(order) for group, order in orders.items()) / n_units
            for values in (self.before, self.after)
        )
        counts = n_units, int(moved), int(matched), n_own, int(placed - matched)
        return AlignedKind(CALLED[kind], *counts, before, after)

    def document(self) -> dict[str, Any]:
        """The model as plain JSON."""
        return {
            "source": self.source,
            "reference": self.reference,
            "weight_similarity": self.weight_similarity,
            "calibration": dict(self.calibration),
            "digest": self.digest,
            **({"blocks": asdict(self.blocks)} if self.blocks else {}),
            **({"widths": self.widths.document()} if self.widths else {}),
            "similarity": {
                group: {"before": self.before[group], "after": self.after[group]}
                for group in self.orders
            },
            "orders": _listed(self.orders),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> AlignedModel:
        """The model that `document` wrote."""
        similarity, blocks = document["similarity"], document.get("blocks")
        widths = document.get("widths")
        return cls(
            document["source"],
            document["reference"],
            document["weight_similarity"],
            document["calibration"],
            _arrays(document["orders"]),
            {group: values["before"] for group, values in similarity.items()},
            {group: values["after"] for group, values in similarity.items()},
            MatchedBlocks(
                tuple(blocks["numbers"]),
                tuple(map(tuple, blocks["similarity"])),
                blocks["weight_similarity"],
                blocks["compared"],
            )
            if blocks
            else None,
            MatchedWidths(_arrays(widths["places"]), widths["norm_scales"]) if widths else None,
        )


def _listed(orders: Mapping[str, Order]) -> dict[str, list[int]]:
    return {group: order.tolist() for group, order in orders.items()}


def _arrays(lists: Mapping[str, list[int]]) -> dict[str, Order]:
    return {group: np.array(order, np.int64) for group, order in lists.items()}


def alignment_json(models: Sequence[AlignedModel]) -> str:
    """The text of `lewis/alignment.json`."""
    document = {"version": VERSION, "models": [one.document() for one in models]}
    return json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n"
