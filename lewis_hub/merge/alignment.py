"""Vocabularies side by side: which row of each source belongs to a token of the merge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.tokenizer.vocabulary import Vocabulary

MEAN = -1  # instead of the number of a source: the row is a mean of others

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class RowMap:
    """The origin of each row, as runs of consecutive ones.

    Attributes:
        n_rows: of the tensor that is made.
        runs: (n_runs, 3) int32: first row of the run, source that it is read from (or MEAN), first
            row there (or number of the first mean). A run goes on to where the next begins.
        means: each (n, 2) int32: source and row of what it is the mean of; of nothing it is zero.
    """

    n_rows: int
    runs: Ints
    means: tuple[Ints, ...] = ()

    @classmethod
    def whole(cls, source: int, n_rows: int) -> RowMap:
        """All rows of one source, as they lie there."""
        return cls(n_rows, np.array([[0, source, 0]], np.int32))

    @classmethod
    def of(cls, sources: Ints, rows: Ints, means: tuple[Ints, ...]) -> RowMap:
        """From each row's source (or MEAN) and its row there (or number of the mean)."""
        breaks = (np.diff(sources) != 0) | (np.diff(rows) != 1)
        firsts = np.concatenate([[0], np.flatnonzero(breaks) + 1])[: len(rows)]
        runs = np.stack([firsts, sources[firsts], rows[firsts]], axis=1).astype(np.int32)
        return cls(len(rows), runs, means)

    def is_whole(self, source: int) -> bool:
        """Whether it is the first rows of one source, as they lie there."""
        return bool(self.runs.tolist() == [[0, source, 0]])

    def sources(self) -> set[int]:
        """All sources that are read from."""
        told = {int(source) for source in np.unique(self.runs[:, 1]) if source != MEAN}
        return told | {int(source) for mean in self.means for source in np.unique(mean[:, 0])}

    def digest(self) -> str:
        """Over all that fixes which rows are read."""
        told = hashlib.sha256(str((self.n_rows, len(self.runs))).encode())
        for array in (self.runs, *self.means):
            told.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return told.hexdigest()


@dataclass(frozen=True)
class Assembled:
    """A tensor that is put together from rows of several sources.

    Attributes:
        parts: the tensor of each source; None where a source has none, which is then not read.
    """

    rows: RowMap
    parts: tuple[TensorHeader | None, ...]

    def digest(self) -> str:
        """Over the map and where the parts lie."""
        told = json.dumps([part and asdict(part) for part in self.parts], sort_keys=True)
        return hashlib.sha256((self.rows.digest() + told).encode()).hexdigest()

    def header(self, name: str, shape: Sequence[int]) -> TensorHeader:
        """What the tensor looks like; it lies in no file.

        It is float32 where its parts differ in dtype or means are taken, else as they are.
        """
        dtypes = {part.dtype for s in self.rows.sources() if (part := self.parts[s])}
        dtype = dtypes.pop() if len(dtypes) == 1 and not self.rows.means else "F32"
        made = TensorHeader(name, dtype, tuple(shape), "", 0, 0)
        return TensorHeader(name, dtype, tuple(shape), "", 0, made.n_elements * WIDTHS[dtype])


@dataclass(frozen=True)
class Override:
    """What stands in for a token that sources lack, instead of the usual rule.

    Attributes:
        source: label of the model whose row it is; None: zeros.
        row: of that model's tensors.
        is_forced: whether it stands in for the sources that have the token, too.
    """

    source: str | None
    row: int = 0
    is_forced: bool = False


@dataclass(frozen=True)
class Alignment:
    """How tensors with a row a token are put together, so that row i means the same in all sources.

    A token that a source lacks gets the base's row; where the base lacks it too the mean of the
    rows of the sources that have it; a row that is in none of them gets the mean of all rows of the
    first source.

    Attributes:
        tensors: names of the tensors.
        n_rows: of the merge.
        ids: label of a source -> (n_rows,) int32, its row for each row of the merge, or -1.
        base: label of the source whose rows stand in; None: there is none.
        overrides: by row of the merge; one whose model lacks the tensor does not count.
    """

    tensors: frozenset[str]
    n_rows: int
    ids: Mapping[str, Ints]
    base: str | None
    overrides: Mapping[int, Override] = field(default_factory=dict)

    def assemble(
        self, labels: Sequence[str], parts: Sequence[TensorHeader | None]
    ) -> tuple[Assembled | None, ...]:
        """Put one tensor together for each source; None for one that already lies as it should.

        Args:
            labels: of the sources, in the plan's order.
            parts: the tensor as each source has it; None where it has none.
        """
        ids = np.stack([self.ids[label] for label in labels])
        n_there = np.array([part.shape[0] if part else 0 for part in parts])
        has = (ids >= 0) & (ids < n_there[:, None])
        overrides = {
            row: override
            for row, override in self.overrides.items()
            if override.source is None or override.row < n_there[labels.index(override.source)]
        }
        sources, rows, means = self._stand_ins(labels, ids, has, overrides)
        forced = np.zeros(self.n_rows, bool)
        forced[[row for row, override in overrides.items() if override.is_forced]] = True
        made: list[Assembled | None] = []
        for s, part in enumerate(parts):
            own = has[s] & ~forced
            origins = np.where(own, s, sources).astype(np.int32)
            uses_means = bool((origins == MEAN).any())
            found = RowMap.of(origins, np.where(own, ids[s], rows), means if uses_means else ())
            lies = part is not None and found.is_whole(s) and part.shape[0] == self.n_rows
            made.append(None if lies else Assembled(found, tuple(parts)))
        return tuple(made)

    def _stand_ins(
        self,
        labels: Sequence[str],
        ids: Ints,
        has: npt.NDArray[np.bool_],
        overrides: Mapping[int, Override],
    ) -> tuple[Ints, Ints, tuple[Ints, ...]]:
        """Per row what a source gets that lacks it: a source (or MEAN), and the row (or mean)."""
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


def shape(alignment: Alignment | None, tensor: TensorHeader) -> tuple[int, ...]:
    """Of the merge's tensor, from the base's."""
    if alignment is None or tensor.name not in alignment.tensors:
        return tensor.shape
    return (alignment.n_rows, *tensor.shape[1:])


def arrange(
    alignment: Alignment | None,
    name: str,
    made: Sequence[int],
    labels: Sequence[str],
    parts: Sequence[TensorHeader | None],
) -> tuple[tuple[TensorHeader, ...], tuple[Assembled | None, ...]]:
    """What is read of each source for one tensor, and how it is put together.

    Args:
        alignment: None where row i means the same in all sources.
        name: of the tensor.
        made: its shape in the merge.
        labels: of the sources, in the plan's order.
        parts: the tensor as each source has it; None where it has none: then the first source's
            stands in.

    Returns:
        One header a source; and as many of what is put together, or none where nothing is.
    """
    assembled: tuple[Assembled | None, ...]
    if alignment and name in alignment.tensors:
        assembled = alignment.assemble(labels, parts)
    else:
        whole = Assembled(RowMap.whole(0, made[0] if made else 1), tuple(parts))
        assembled = tuple(None if part else whole for part in parts)
    inputs = []
    for one, part in zip(assembled, parts, strict=True):
        header = one.header(name, made) if one else part
        assert header  # what a source lacks is put together
        inputs.append(header)
    return tuple(inputs), assembled if any(assembled) else ()


def token_tensors(checkpoint: Checkpoint, n_tokens: int | None) -> tuple[str, ...]:
    """The tensors with a row a token, whatever they are called: embeddings, heads and their biases.

    They are outside the blocks and have as many rows as the vocabulary; a table of positions that
    happens to be as long is told by its name.

    Args:
        checkpoint: of the base.
        n_tokens: rows, as its configuration says; None where it does not: then as many as the
            first tensor that is called an embedding.
    """
    tensors = {
        name: tensor.shape
        for name, tensor in checkpoint.tensors.items()
        if (len(tensor.shape) == 2 and names.may_have_tokens(name))
        or (len(tensor.shape) == 1 and names.is_head(name))
    }
    if n_tokens is None:
        lengths = (shape[0] for name, shape in tensors.items() if names.is_input_side(name))
        n_tokens = next(lengths, None)
    return tuple(name for name, shape in tensors.items() if shape[0] == n_tokens)


def rows_of(checkpoint: Checkpoint, tensors: Sequence[str]) -> int:
    """How many rows a source has for tokens."""
    return max(
        (checkpoint.tensors[name].shape[0] for name in tensors if name in checkpoint.tensors),
        default=0,
    )


def by_row(base: Checkpoint, sources: Sequence[Checkpoint], tensors: Sequence[str]) -> Alignment:
    """Row i means the same in all sources; some have fewer, and then the base's stand in.

    Args:
        base: which has as many rows as the merge will have.
        sources: all that are merged.
        tensors: with a row a token.
    """
    n_rows = rows_of(base, tensors)
    every = np.arange(n_rows, dtype=np.int32)
    ids = {source.label: every for source in sources}
    return Alignment(frozenset(tensors), n_rows, ids, base.label)


def by_token(
    merged: Vocabulary,
    vocabularies: Mapping[str, Vocabulary],
    tensors: Sequence[str],
    n_rows: int,
    base: str,
    padding: str,
) -> Alignment:
    """A row of the merge is a token of its vocabulary, wherever the sources have it.

    Args:
        merged: vocabulary of the merge.
        vocabularies: label of a source -> its own.
        tensors: with a row a token.
        n_rows: of the merge.
        base: label of the source whose rows stand in for those that others lack.
        padding: label of the source whose rows are taken where the merge has no token.
    """
    ids = {label: np.full(n_rows, -1, np.int32) for label in vocabularies}
    ids[padding][:] = np.arange(n_rows)
    for token, row in merged.ids.items():
        if row < n_rows:
            for label, vocabulary in vocabularies.items():
                ids[label][row] = vocabulary.ids.get(token, -1)
    return Alignment(frozenset(tensors), n_rows, ids, base)
