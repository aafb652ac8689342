"""Tensors with a row per token, aligned so that row i is the same token in all sources."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.tokenizer import Vocabulary

MEAN = -1  # in place of the number of a source: the row is a mean of rows

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Assembled:
    """A tensor whose rows come from several sources.

    Attributes:
        parts: the tensor in each source; None if the source lacks it.
        runs: (n_runs, 3) int32, one line per run of consecutive rows: its first row, the source or
            MEAN, and the first row there or the number of the first mean.
        means: per mean the (n, 2) int32 sources and rows that it is taken over; zero if n is 0.
    """

    n_rows: int
    parts: tuple[TensorHeader | None, ...]
    runs: Ints
    means: tuple[Ints, ...] = ()

    def stored_parts(self) -> dict[int, TensorHeader]:
        """The tensors that are read, by source."""
        arrays = [self.runs[:, 1], *(mean[:, 0] for mean in self.means)]
        sources = sorted(set(np.concatenate(arrays).tolist()) - {MEAN})
        return {source: part for source in sources if (part := self.parts[source])}

    def digest(self) -> str:
        """Tensors with the same digest have the same origin."""
        facts = json.dumps([self.n_rows, [part and asdict(part) for part in self.parts]])
        digest = hashlib.sha256(facts.encode())
        for array in (self.runs, *self.means):
            digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def header(self, name: str, shape: Sequence[int]) -> TensorHeader:
        """Its header, without a position in a file.

        It is float32 if its parts differ in dtype or rows are means, else of their dtype.
        """
        dtypes = {part.dtype for part in self.stored_parts().values()}
        dtype = dtypes.pop() if len(dtypes) == 1 and not self.means else "F32"
        return TensorHeader(name, dtype, tuple(shape), "", 0, prod(shape) * WIDTHS[dtype])


@dataclass(frozen=True)
class Override:
    """The row of a token, instead of the one that `Alignment` describes."""

    source: str | None  # label of the source whose row is used; None: zeros
    row: int = 0  # of this source
    is_forced: bool = False  # whether it also replaces the row of sources that have the token


@dataclass(frozen=True)
class Alignment:
    """How the rows of token tensors are mapped to the tokens of the merge.

    A source that lacks a token gets the base's row; if the base lacks it too, the mean of the rows
    of all sources that have it. If no source has it, the row is the mean of all rows of the first
    source. An override is ignored for a tensor that its source lacks.
    """

    tensors: frozenset[str]  # their names
    n_rows: int  # of the merge
    ids: Mapping[str, Ints]  # label of a source -> (n_rows,) int32, its row for each row, or -1
    base: str | None  # label of the base; None without a base
    overrides: Mapping[int, Override] = field(default_factory=dict)  # by row

    def foreign_source(self, labels: Collection[str]) -> str | None:
        """A source of an override that is not among `labels`; None if there is none."""
        sources = (override.source for override in self.overrides.values())
        return next((one for one in sources if one is not None and one not in labels), None)

    def assemble(
        self, labels: Sequence[str], parts: Sequence[TensorHeader | None]
    ) -> tuple[Assembled | None, ...]:
        """Map the rows of one tensor (`parts`) for each source; None if stored as needed."""
        ids = np.stack([self.ids[label] for label in labels])
        n_stored = np.array([part.shape[0] if part else 0 for part in parts])
        lengths = dict(zip(labels, n_stored.tolist(), strict=True))
        has = (ids >= 0) & (ids < n_stored[:, None])
        overrides = {
            row: override
            for row, override in self.overrides.items()
            if override.source is None or override.row < lengths.get(override.source, 0)
        }
        sources, rows, means = self._substitutes(labels, ids, has, overrides)
        forced = np.zeros(self.n_rows, bool)
        forced[[row for row, override in overrides.items() if override.is_forced]] = True
        made: list[Assembled | None] = []
        for s, part in enumerate(parts):
            own = has[s] & ~forced
            origins = np.where(own, s, sources).astype(np.int32)
            runs = _runs(origins, np.where(own, ids[s], rows))
            is_stored = part is not None and part.shape[0] == self.n_rows
            if is_stored and runs.tolist() == [[0, s, 0]]:
                made.append(None)
            else:
                used = means if (origins == MEAN).any() else ()
                made.append(Assembled(self.n_rows, tuple(parts), runs, used))
        return tuple(made)

    def _substitutes(
        self,
        labels: Sequence[str],
        ids: Ints,
        has: npt.NDArray[np.bool_],
        overrides: Mapping[int, Override],
    ) -> tuple[Ints, Ints, tuple[Ints, ...]]:
        """Per row its replacement in sources without it: source or MEAN, row or number of mean."""
        count = has.sum(axis=0)
        sources = has.argmax(axis=0).astype(np.int32)  # the only one that has it
        if self.base in labels:
            base = labels.index(self.base)
            sources[has[base]] = base
            count[has[base]] = 1
        rows = np.take_along_axis(ids, sources[None].astype(np.int64), axis=0)[0].astype(np.int32)
        first = int(has.any(axis=1).argmax())
        means = [np.stack([np.full(has[first].sum(), first), ids[first][has[first]]], axis=1)]
        sources[count == 0], rows[count == 0] = MEAN, 0
        for row in np.flatnonzero((count > 1) & ~has.all(axis=0)).tolist():
            having = np.flatnonzero(has[:, row])
            sources[row], rows[row] = MEAN, len(means)
            means.append(np.stack([having, ids[having, row]], axis=1))
        for row, override in overrides.items():
            if override.source is None:
                sources[row], rows[row] = MEAN, len(means)
                means.append(np.zeros((0, 2)))
            else:
                sources[row], rows[row] = labels.index(override.source), override.row
        return sources, rows, tuple(mean.astype(np.int32) for mean in means)


def _runs(sources: Ints, rows: Ints) -> Ints:
    """`Assembled.runs` of the source and the row there of each row."""
    breaks = (np.diff(sources) != 0) | (np.diff(rows) != 1)
    firsts = np.concatenate([[0], np.flatnonzero(breaks) + 1])[: len(rows)]
    return np.stack([firsts, sources[firsts], rows[firsts]], axis=1).astype(np.int32)


def output_shape(alignment: Alignment | None, tensor: TensorHeader) -> tuple[int, ...]:
    """The shape of a tensor of the first source in the merge."""
    if alignment is None or tensor.name not in alignment.tensors:
        return tensor.shape
    return (alignment.n_rows, *tensor.shape[1:])


def assemble_inputs(
    alignment: Alignment | None,
    name: str,
    shape: Sequence[int],
    labels: Sequence[str],
    parts: Sequence[TensorHeader | None],
) -> tuple[tuple[TensorHeader, ...], tuple[Assembled | None, ...]]:
    """The headers of one tensor of the merge as each source provides it.

    The first source's tensor replaces those that other sources lack (None in `parts`).

    Returns:
        Per source the header, and the origin of its rows; no origins if all are stored as needed.
    """
    assembled: tuple[Assembled | None, ...]
    if alignment and name in alignment.tensors:
        assembled = alignment.assemble(labels, parts)
    else:
        first = Assembled(shape[0] if shape else 1, tuple(parts), np.zeros((1, 3), np.int32))
        assembled = tuple(None if part else first for part in parts)
    inputs = []
    for one, part in zip(assembled, parts, strict=True):
        header = one.header(name, shape) if one else part
        assert header  # a tensor that a source lacks is assembled
        inputs.append(header)
    return tuple(inputs), assembled if any(assembled) else ()


def token_tensors(checkpoint: Checkpoint, n_tokens: int | None) -> tuple[str, ...]:
    """The tensors with a row per token: embeddings, heads and their biases, whatever their names.

    They are outside the blocks and have `n_tokens` rows, or as many as the first input embedding.
    A table of positions or labels of the same length is recognised by its name. Tables without
    values do not count: a header can have any number of them, each with a million rows.
    """
    tensors = {
        name: tensor.shape
        for name, tensor in checkpoint.tensors.items()
        if tensor.n_elements
        and (
            (len(tensor.shape) == 2 and names.may_have_tokens(name))
            or (len(tensor.shape) == 1 and names.is_head(name))
        )
    }
    if n_tokens is None:
        lengths = (shape[0] for name, shape in tensors.items() if names.is_input_side(name))
        n_tokens = next(lengths, None)
    return tuple(name for name, shape in tensors.items() if shape[0] == n_tokens)


def rows_of(checkpoint: Checkpoint, tensors: Sequence[str]) -> int:
    """The number of rows of a source's token tensors; 0 if it has none."""
    lengths = (checkpoint.tensors[name].shape[0] for name in tensors if name in checkpoint.tensors)
    return max(lengths, default=0)


def by_row(base: Checkpoint, sources: Sequence[Checkpoint], tensors: Sequence[str]) -> Alignment:
    """Align sources whose row i is the same token; the base has as many rows as the merge."""
    n_rows = rows_of(base, tensors)
    ids = {source.label: np.arange(n_rows, dtype=np.int32) for source in sources}
    return Alignment(frozenset(tensors), n_rows, ids, base.label)


def by_token(
    merged: Vocabulary,
    vocabularies: Mapping[str, Vocabulary],
    tensors: Sequence[str],
    n_rows: int,
    base: str,
    padding: str,
) -> Alignment:
    """Align sources by the tokens of their vocabularies.

    `base` and `padding` are labels: of the source whose rows replace those that others lack, and
    of the source of the rows that are no token of the merge.
    """
    ids = {label: np.full(n_rows, -1, np.int32) for label in vocabularies}
    ids[padding][:] = np.arange(n_rows)
    for token, row in merged.ids.items():
        if row < n_rows:
            for label, vocabulary in vocabularies.items():
                ids[label][row] = vocabulary.ids.get(token, -1)
    return Alignment(frozenset(tensors), n_rows, ids, base)
