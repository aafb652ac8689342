"""How much the calibration texts of each expert excite the task vectors of all experts.

No labels are needed: texts that resemble what an expert was trained on excite its own task vector
more than the texts of other experts do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.methods.numerics import dot, product

if TYPE_CHECKING:
    from torch import Tensor

FILE = "excitations.jsonl"  # a line for each matrix; a later line on the same matrix is equal
ROWS = 64  # of a task vector, evenly spread, stand for all of its rows

Excitations = Sequence[Sequence[float]]  # of the task vector of expert j by the texts of expert i


def excitations(vectors: Sequence[Tensor], grams: Sequence[Tensor]) -> list[list[float]]:
    """E|v_j x|^2 / (|v_j|^2 E|x|^2 / n), for the inputs x on texts i; 1 for random directions.

    `vectors` are (out, in), and `grams` E[x x^T], (n_parts, width, width). A task vector that is 0
    is not excited.
    """
    kept = [vector[:: max(1, -(-len(vector) // ROWS))] for vector in vectors]
    found = []
    for gram in grams:
        mean = float(gram.diagonal(dim1=-2, dim2=-1).double().mean())
        sizes = [mean * dot(vector, vector) for vector in kept]
        found.append(
            [_energy(v, gram) / s if s > 0 else 0.0 for v, s in zip(kept, sizes, strict=True)]
        )
    return found


def _energy(rows: Tensor, gram: Tensor) -> float:
    parts = zip(rows.chunk(len(gram), dim=1), gram, strict=True)
    return sum(dot(product(part, one), part) for part, one in parts)


def append(folder: Path, tensor: str, found: Excitations) -> None:
    """Add the line of a matrix to the file."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps([tensor, found]) + "\n")


def read(folder: Path) -> dict[str, Excitations]:
    """All lines by matrix, without one that an interrupted run left incomplete."""
    found: dict[str, Excitations] = {}
    path = folder / FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            tensor, numbers = json.loads(line)
        except ValueError:
            continue
        found[tensor] = numbers
    return dict(sorted(found.items()))


def own_against_others(found: Mapping[str, Excitations]) -> list[float]:
    """For each expert: how much its texts excite its task vector, over the mean of other texts.

    Empty without matrices or without other experts.
    """
    tables = list(found.values())
    n = len(tables[0]) if tables else 0
    if n < 2:
        return []
    mean = [[sum(t[i][j] for t in tables) / len(tables) for j in range(n)] for i in range(n)]
    others = [sum(mean[i][j] for i in range(n) if i != j) / (n - 1) for j in range(n)]
    return [mean[j][j] / others[j] if others[j] > 0 else 0.0 for j in range(n)]
