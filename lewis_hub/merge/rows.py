"""Where each row of a tensor comes from, when a source's own does not lie as it is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from lewis_hub.checkpoint.header import WIDTHS, TensorHeader

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
