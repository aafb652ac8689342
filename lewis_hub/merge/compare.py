"""Compare sources by the names, shapes and dtypes of their tensors, before they are merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from typing import Literal

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import COPIED, MERGEABLE, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.recipe.schema import Missing

N_SHOWN = 3

Kind = Literal["missing", "extra", "shape", "vocabulary", "dtype", "tied"]


@dataclass(frozen=True)
class Mismatch:
    """A difference that prevents a merge; `str` returns the problem and its remedy."""

    kind: Kind
    source: str
    tensors: tuple[str, ...]
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.source} {self.problem}. {self.remedy}"


def compare(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    missing: Missing = "error",
    assembled: Collection[str] = (),
) -> tuple[Mismatch, ...]:
    """Find the differences between every expert and the base that prevent a merge.

    The base has the tensors of the merge; for a method without a base it is the first source.
    Tensors that are `assembled` may differ in their numbers of rows.
    """
    found = list(_dtypes(base))
    for expert in experts:
        named = tuple(_names(base, expert))
        found += named if missing == "error" else _strangers(base, expert)
        found += _shapes(base, expert, assembled)
        found += _dtypes(expert)
        found += _kinds(base, expert)
    return tuple(found)


def passed_over(base: Checkpoint, experts: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Sentences on the tensors that `missing: base` replaces or leaves out."""
    notes = []
    for expert in experts:
        missing, extra = _differing(base, expert)
        if missing:
            notes.append(f"{expert.label} lacks {_listed(missing)}: the base's stand in.")
        if extra:
            notes.append(f"{_listed(extra)} of {expert.label} are left out: the base has none.")
    return tuple(notes)


def _differing(base: Checkpoint, expert: Checkpoint) -> tuple[list[str], list[str]]:
    """The tensors that only the base has, and those that only the expert has."""
    missing = [name for name in base.tensors if name not in expert.tensors]
    return missing, [name for name in expert.tensors if name not in base.tensors]


def _strangers(base: Checkpoint, expert: Checkpoint) -> Iterator[Mismatch]:
    missing, _ = _differing(base, expert)
    if len(missing) == len(base.tensors):
        problem = f"has no tensor of the base {base.label}"
        remedy = "Nothing of it would be merged: use models of one architecture."
        yield Mismatch("missing", expert.label, tuple(missing), problem, remedy)


def _names(base: Checkpoint, expert: Checkpoint) -> Iterator[Mismatch]:
    missing, extra = _differing(base, expert)
    if missing and _shapes_of(base, missing) == _shapes_of(expert, extra):
        problem = f"has {_listed(extra)} where the base {base.label} has {_listed(missing)}"
        remedy = "They have the same shapes: if they are the same parameters, rename them in one "
        remedy += "of the two models. `missing: base` would leave out what the expert learned in "
        remedy += "them."
        yield Mismatch("missing", expert.label, tuple(missing), problem, remedy)
        return
    other_depth = "Use models of one architecture and depth, or set `missing: base` to "
    if heads := tuple(filter(names.is_head, missing)):
        problem = f"has no {heads[0]} (its head is tied to the embeddings), the base {base.label} "
        remedy = "Use an expert that was trained from this base, or set `missing: base` to keep "
        yield Mismatch("tied", expert.label, heads, f"{problem}has", f"{remedy}the base's head.")
    if heads := tuple(filter(names.is_head, extra)):
        problem = f"has a {heads[0]} of its own, the base {base.label} ties its head to the "
        remedy = "Use the base that it was trained from, or set `missing: base` to leave its head "
        yield Mismatch("tied", expert.label, heads, f"{problem}embeddings", f"{remedy}out.")
    if rest := tuple(filterfalse(names.is_head, missing)):
        problem = f"lacks {_listed(rest)} of the base {base.label}"
        remedy = f"{other_depth}keep the base's."
        yield Mismatch("missing", expert.label, rest, problem, remedy)
    if rest := tuple(filterfalse(names.is_head, extra)):
        problem = f"has {_listed(rest)}, which the base {base.label} lacks"
        yield Mismatch("extra", expert.label, rest, problem, f"{other_depth}leave them out.")


def _shapes_of(one: Checkpoint, found: Sequence[str]) -> Counter[tuple[int, ...]]:
    return Counter(one.tensors[name].shape for name in found)


def _shapes(base: Checkpoint, expert: Checkpoint, assembled: Collection[str]) -> Iterator[Mismatch]:
    pairs = [(ours, expert.tensors.get(name)) for name, ours in base.tensors.items()]
    differing = [
        (ours, theirs)
        for ours, theirs in pairs
        if theirs and theirs.shape != ours.shape
        if ours.name not in assembled or ours.shape[1:] != theirs.shape[1:]
    ]
    rows = [(ours, theirs) for ours, theirs in differing if _only_rows_differ(ours, theirs)]
    if rows:
        ours, theirs = rows[0]
        problem = (
            f"has a vocabulary of {theirs.shape[0]} rows in {ours.name}, "
            f"the base {base.label} has {ours.shape[0]}"
        )
        remedy = (
            "No tokenizer.json of theirs says which token a row is for: bring the expert to the "
            "base's vocabulary with transformers' `model.resize_token_embeddings`."
        )
        tensors = tuple(tensor.name for tensor, _ in rows)
        yield Mismatch("vocabulary", expert.label, tensors, problem, remedy)
    for ours, theirs in differing:
        if not _only_rows_differ(ours, theirs):
            problem = (
                f"has {theirs.name} of shape {list(theirs.shape)}, "
                f"the base {base.label} has {list(ours.shape)}"
            )
            remedy = "A task vector needs equal shapes: use experts of the same size as the base."
            yield Mismatch("shape", expert.label, (ours.name,), problem, remedy)


def _dtypes(checkpoint: Checkpoint) -> Iterator[Mismatch]:
    unread = [t for t in checkpoint.tensors.values() if t.dtype not in (*MERGEABLE, *COPIED)]
    for dtype in sorted({tensor.dtype for tensor in unread}):
        named = [tensor.name for tensor in unread if tensor.dtype == dtype]
        problem = f"holds {_listed(named)} as {dtype}, which this version does not read"
        remedy = "Use the model in bfloat16, float16 or float32."
        yield Mismatch("dtype", checkpoint.label, tuple(named), problem, remedy)


def _kinds(base: Checkpoint, expert: Checkpoint) -> Iterator[Mismatch]:
    for name, ours in base.tensors.items():
        theirs = expert.tensors.get(name)
        if theirs and (ours.dtype in MERGEABLE) != (theirs.dtype in MERGEABLE):
            problem = f"holds {name} as {theirs.dtype}, the base {base.label} as {ours.dtype}"
            remedy = (
                "Numbers and counts cannot be merged: use experts that were trained from the base."
            )
            yield Mismatch("dtype", expert.label, (name,), problem, remedy)


def _only_rows_differ(ours: TensorHeader, theirs: TensorHeader) -> bool:
    """Whether two tensors are embeddings or heads of vocabularies of different size."""
    is_vocabulary = names.is_token_embedding(ours.name) or names.is_head(ours.name)
    return is_vocabulary and len(ours.shape) == 2 and ours.shape[1:] == theirs.shape[1:]


def _listed(found: Sequence[str]) -> str:
    if len(found) <= N_SHOWN:
        return ", ".join(found)
    return f"{len(found)} tensors ({', '.join(found[:N_SHOWN])}, ...)"
