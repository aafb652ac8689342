"""Which units of a model can be permuted without a change of its outputs, by architecture.

The units of the residual stream are permuted together in all tensors that read or write it, and
those of an MLP in the matrices of its block. Attention heads move in whole groups that share keys
and values, query heads within their group, and values within their head. Queries and keys within a
head move only where no rotary position ties a dimension to its frequency.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.permutation import Order, permuted_header

RESIDUAL = "residual"
MLP = "mlp"
QUERY, KEY, VALUE, OUTPUT = HEADS = ("query", "key", "value", "output")
FUSED = (QUERY, KEY, VALUE)  # in one matrix
PREFIX = re.compile(r"^(?:model|transformer)\.")
NUMBERS = {  # what a configuration calls the numbers of heads
    "n_heads": ("num_attention_heads", "n_head"),
    "width": ("hidden_size", "n_embd"),
}
REMEDY = "Remove `align` from this model, or merge models of a listed architecture."

Side = Literal["input", "output"]
Axis = tuple[str, ...]  # kinds of the units along a dimension, one after the other; empty: fixed
FIXED: Axis = ()
Axes = tuple[Axis, ...]  # of the dimensions of a tensor

IN_RESIDUAL: Axis = (RESIDUAL,)


@dataclass(frozen=True)
class Symmetries:
    """Architectures with the same tensors."""

    tensors: Mapping[str, Axes]  # by component; those outside the blocks by their whole name
    norms: tuple[str, ...]  # modules whose input is the residual stream, in their order
    sites: Mapping[str, tuple[str, Side]]  # kind of a block's units -> where they are seen
    writers: tuple[str, str]  # modules whose outputs are added to the residual stream
    ignored: tuple[str, ...] = ()  # buffers without units
    rotary: bool = True  # whether queries and keys are rotated by their position


def _gated() -> Symmetries:
    """Llama and its like: rotary positions, gated MLP, norms that only scale."""
    tensors: dict[str, Axes] = {
        "embed_tokens.weight": (FIXED, IN_RESIDUAL),
        "norm.weight": (IN_RESIDUAL,),
        "lm_head.weight": (FIXED, IN_RESIDUAL),
        "input_layernorm.weight": (IN_RESIDUAL,),
        "post_attention_layernorm.weight": (IN_RESIDUAL,),
        "self_attn.q_norm.weight": (FIXED,),  # one scale for all heads
        "self_attn.k_norm.weight": (FIXED,),
    }
    matrices: dict[str, tuple[str, str]] = {
        "self_attn.q_proj": (QUERY, RESIDUAL),
        "self_attn.k_proj": (KEY, RESIDUAL),
        "self_attn.v_proj": (VALUE, RESIDUAL),
        "self_attn.o_proj": (RESIDUAL, OUTPUT),
        "mlp.gate_proj": (MLP, RESIDUAL),
        "mlp.up_proj": (MLP, RESIDUAL),
        "mlp.down_proj": (RESIDUAL, MLP),
    }
    for name, (rows, columns) in matrices.items():
        tensors[f"{name}.weight"] = ((rows,), (columns,))
        tensors[f"{name}.bias"] = ((rows,),)
    sites: dict[str, tuple[str, Side]] = {
        MLP: ("mlp.down_proj", "input"),
        QUERY: ("self_attn.q_proj", "output"),
        KEY: ("self_attn.k_proj", "output"),
        VALUE: ("self_attn.v_proj", "output"),
        OUTPUT: ("self_attn.o_proj", "input"),
    }
    norms = ("input_layernorm", "post_attention_layernorm", "norm")
    writers = ("self_attn.o_proj", "mlp.down_proj")
    return Symmetries(tensors, norms, sites, writers, ignored=("self_attn.rotary_emb.inv_freq",))


def _gpt2() -> Symmetries:
    """GPT-2: matrices are stored as (in, out), and queries, keys and values in one."""
    tensors: dict[str, Axes] = {
        "wte.weight": (FIXED, IN_RESIDUAL),
        "wpe.weight": (FIXED, IN_RESIDUAL),
        "lm_head.weight": (FIXED, IN_RESIDUAL),
        "attn.c_attn.weight": (IN_RESIDUAL, FUSED),
        "attn.c_attn.bias": (FUSED,),
        "attn.c_proj.weight": ((OUTPUT,), IN_RESIDUAL),
        "attn.c_proj.bias": (IN_RESIDUAL,),
        "mlp.c_fc.weight": (IN_RESIDUAL, (MLP,)),
        "mlp.c_fc.bias": ((MLP,),),
        "mlp.c_proj.weight": ((MLP,), IN_RESIDUAL),
        "mlp.c_proj.bias": (IN_RESIDUAL,),
    }
    norms = ("ln_1", "ln_2", "ln_f")
    for norm in norms:
        tensors |= {f"{norm}.{part}": (IN_RESIDUAL,) for part in ("weight", "bias")}
    seen: tuple[str, Side] = ("attn.c_attn", "output")
    sites: dict[str, tuple[str, Side]] = {
        MLP: ("mlp.c_proj", "input"),
        OUTPUT: ("attn.c_proj", "input"),
        **dict.fromkeys(FUSED, seen),
    }
    buffers = ("attn.bias", "attn.masked_bias")
    return Symmetries(tensors, norms, sites, ("attn.c_proj", "mlp.c_proj"), buffers, rotary=False)


GATED = _gated()
FAMILIES = {  # by `model_type`
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), GATED),
    "gpt2": _gpt2(),
}


@dataclass(frozen=True)
class Units:
    """The units of one model, and the tensors that they are in."""

    family: Symmetries
    n_blocks: int
    n_heads: int
    n_kv_heads: int  # fewer than `n_heads` if several query heads share keys and values
    head_width: int
    axes: Mapping[str, Axes]  # tensor -> the groups of its dimensions, such as `3.mlp`
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def sites(self) -> dict[str, tuple[str, Side]]:
        """Where units are seen: its name -> module in the checkpoint's names, and the side."""
        found: dict[str, tuple[str, Side]] = {}
        for name in self.axes:
            module, block = names.module(name), names.block(name)
            if _component(module) in self.family.norms:
                found[f"{RESIDUAL} {module}"] = (module, "input")
            for kind, (component, side) in self.family.sites.items():
                if block is not None and names.component(name) == component:
                    found[f"{block}.{kind}"] = (module, side)
        return found

    @property
    def blocks(self) -> list[int]:
        """The numbers of the blocks that have units."""
        found = {block for name in self.axes if (block := names.block(name)) is not None}
        return sorted(found)

    @property
    def streams(self) -> tuple[str, ...]:
        """The sites of the residual stream before each block, and after the last one.

        They are the inputs of the next norm.
        """
        first, *_, last = self.family.norms
        modules = dict.fromkeys(names.module(name) for name in self.axes)
        read = {names.block(one): one for one in modules if _component(one) in (first, last)}
        return tuple(f"{RESIDUAL} {read.get(n, read[None])}" for n in (*self.blocks, None))

    def without(self, blocks: Iterable[int]) -> Units:
        """The same units, but for those of some blocks."""
        left = set(blocks)
        return replace(
            self, axes={n: a for n, a in self.axes.items() if names.block(n) not in left}
        )

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of units of each group."""
        return {
            group: size // len(axis)
            for name, axes in self.axes.items()
            for axis, size in zip(axes, self.shapes[name], strict=False)
            for group in axis
        }

    @property
    def in_words(self) -> str:
        """The numbers that two models need to share."""
        heads = f"{self.n_heads} heads of {self.head_width}, {self.n_kv_heads} with keys"
        return f"{self.n_blocks} blocks, {heads}"

    def width_at(self, site: str) -> int:
        """The number of units that are seen at a site."""
        name = f"{self.sites[site][0]}.weight"
        sizes, axes = self.shapes[name], self.axes[name]
        inside = [n for n, axis in zip(sizes, axes, strict=True) if axis != IN_RESIDUAL]
        return (inside or sizes)[0]

    def with_group(self, group: str) -> Iterator[tuple[str, int]]:
        """The tensors that have a group of units, with its dimension in each."""
        for name, axes in self.axes.items():
            for dimension, axis in enumerate(axes):
                if group in axis:
                    yield name, dimension

    def across(self, name: str, dimension: int) -> Axis:
        """The groups of the other dimension of a matrix; of a vector none."""
        return next((axis for d, axis in enumerate(self.axes[name]) if d != dimension), FIXED)

    def place_in(self, group: str, name: str, dimension: int, size: int) -> tuple[int, int]:
        """The first of a group's units along a dimension of a size, and their number."""
        axis = self.axes[name][dimension]
        return axis.index(group) * (size // len(axis)), size // len(axis)

    def place_at_site(self, group: str, site: str, width: int) -> tuple[int, int]:
        """The first of a group's units among the `width` seen at a site, and their number."""
        module, side = self.sites[site]
        if side == "input" or group == RESIDUAL:
            return 0, width
        axis = next(axis for axis in self.axes[f"{module}.weight"] if group in axis)
        return axis.index(group) * (width // len(axis)), width // len(axis)

    @staticmethod
    def joined(axis: Axis, orders: Mapping[str, Order]) -> Order:
        """The order of a dimension that consists of several groups."""
        parts = [orders[group] for group in axis]
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        return np.concatenate([part + start for part, start in zip(parts, starts, strict=True)])


def units_of(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Units:
    """Find the units of a model.

    Raises:
        AlignmentError: its architecture is not known, or it has a tensor that is not.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        problem = f"`align` does not know the architecture {config.get('model_type')!r}; "
        problem += f"it knows {', '.join(FAMILIES)}"
        raise AlignmentError(checkpoint.label, problem, REMEDY)
    axes: dict[str, Axes] = {}
    for name in checkpoint.tensors:
        known = family.tensors.get(_component(name))
        if known is None and _component(name) not in family.ignored:
            problem = f"`align` does not know its tensor {name}"
            raise AlignmentError(checkpoint.label, problem, REMEDY)
        block = names.block(name)
        axes[name] = tuple(
            tuple(kind if kind == RESIDUAL else f"{block}.{kind}" for kind in axis)
            for axis in known or ()
        )
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    n_heads, width = (_number(config, NUMBERS[key]) for key in ("n_heads", "width"))
    return Units(
        family,
        1 + max((block for name in axes if (block := names.block(name)) is not None), default=-1),
        n_heads,
        _number(config, ("num_key_value_heads",)) or n_heads,
        _number(config, ("head_dim",)) or width // max(n_heads, 1),
        axes,
        shapes,
    )


def permute(checkpoint: Checkpoint, units: Units, orders: Mapping[str, Order]) -> Checkpoint:
    """The headers of the same model with its units in other orders, by their groups."""

    def order(name: str, dimension: int, axis: Axis) -> Order | None:
        if not axis or any(group not in orders for group in axis):
            return None
        found = units.joined(axis, orders)
        if len(found) != units.shapes[name][dimension]:
            problem = f"{name} has {units.shapes[name][dimension]} units where {len(found)} fit"
            raise AlignmentError(checkpoint.label, problem, REMEDY)
        return found

    tensors = dict(checkpoint.tensors)
    for name, axes in units.axes.items():
        if axes:
            found = [order(name, dimension, axis) for dimension, axis in enumerate(axes)]
            tensors[name] = permuted_header(tensors[name], found)
    return replace(checkpoint, tensors=tensors)


def _component(name: str) -> str:
    """The name within its block, with `.weight`; outside the blocks without the model's prefix."""
    found = names.BLOCK.search(name)
    return name[found.end() :] if found else PREFIX.sub("", name)


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The first of these values that is a whole number above 0; 0 if there is none."""
    values = (config.get(key) for key in keys)
    return next((one for one in values if type(one) is int and one > 0), 0)
