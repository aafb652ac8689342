"""Vocabularies side by side: which row of each source belongs to a token of the merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.merge.rows import MEAN, Assembled, Ints, RowMap


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
