"""The cells of PROTOCOL.md: what is measured, in which order, where it is stored, what is left."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from protocol_methods import METHODS, methods_for
from protocol_tasks import Family, Training

VERSION = 1
N_TEXT_DRAWS = 3
PARAMETERS = 134_515_008  # of the smallest family, for which `Method.cost_s` is a guess


@dataclass(frozen=True)
class Cell:
    """One merge and its scores: a family, N experts, draws of tasks and texts, a method."""

    family: str
    n: int
    tasks: int
    texts: int
    method: str

    def __str__(self) -> str:
        draws = f"tasks{self.tasks}/texts{self.texts}"
        return f"{self.family}/n{self.n}/{draws}/{self.method}"

    @property
    def place(self) -> tuple[str, int, int, int]:
        """All that a method is compared within."""
        return self.family, self.n, self.tasks, self.texts


def cells(families: Sequence[Family], pattern: str = "*") -> list[Cell]:
    """All cells in the order of the run.

    First draws first, then the smallest family, then N = 2, 1, 4, 8, 16. Later draws of texts come
    after all draws of tasks. A method that reads no texts has only the first draw of them.
    """
    draws = [(tasks, texts) for texts in range(1, N_TEXT_DRAWS + 1) for tasks in range(1, 4)]
    found = [
        Cell(family.name, n, tasks, texts, method.name)
        for tasks, texts in draws
        for family in families
        if max(tasks, texts) <= family.n_draws
        for n in family.counts
        for method in methods_for(n)
        if texts == 1 or method.has_texts
    ]
    return [cell for cell in found if fnmatch.fnmatchcase(str(cell), pattern)]


@dataclass(frozen=True)
class Cost:
    """What making the model took, without scoring.

    Attributes:
        cpu_s: seconds of all cores; with a GPU seconds of the clock.
    """

    cpu_s: float
    wall_s: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Scores:
    """Item by item, of one model.

    Attributes:
        losses: task -> mean negative log-likelihood of each answer, in nats.
        right: task -> 1 for each answer whose tokens are all the most likely ones.
        general: mean negative log-likelihood of each passage of general text.
        abilities: lm-eval task -> its score.
    """

    losses: Mapping[str, Sequence[float]]
    right: Mapping[str, Sequence[float]]
    general: Sequence[float]
    abilities: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """A stored cell."""

    cell: Cell
    scores: Scores
    chosen: Mapping[str, Any]
    cost: Cost
    whole_s: float  # core-seconds of the cell, with the choice of settings and all scoring
    software: Mapping[str, str]


class Store:
    """A folder of results: `cells/` with a file per cell, `models/`, `items/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell}.json"

    def has(self, cell: Cell) -> bool:
        return self.file(cell).exists()

    def write(self, result: Result) -> None:
        """Write a cell whole or not at all."""
        file = self.file(result.cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps({"version": VERSION, **asdict(result)}), encoding="utf-8")
        part.replace(file)

    def read(self, cell: Cell) -> Result | None:
        """A stored cell, or None."""
        if not self.has(cell):
            return None
        told = json.loads(self.file(cell).read_text(encoding="utf-8"))
        if told.pop("version") != VERSION:
            raise SystemExit(f"{self.file(cell)}: not of version {VERSION}; start a new folder")
        parts = {"cell": Cell(**told["cell"]), "scores": Scores(**told["scores"])}
        return Result(**{**told, **parts, "cost": Cost(**told["cost"])})

    def trainings(self) -> list[float]:
        """Core-seconds of each expert's training, for one step of one item of one parameter."""
        files = (self.folder / "models").glob("*/*/training.json")
        told = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return [one["cpu_s"] / one["work"] for one in told]


@dataclass(frozen=True)
class Estimate:
    """What is left, in core-seconds."""

    store: Store
    families: Sequence[Family]
    left: Sequence[Cell]
    experts: Sequence[tuple[Family, Path]]  # to train

    @cached_property
    def _measured(self) -> dict[str, float]:
        """Median core-seconds of a method, for one expert of 135 M parameters."""
        by_method: dict[str, list[float]] = {}
        for cell in cells(self.families):
            if result := self.store.read(cell):
                unit = result.whole_s / (cell.n * self._scale(cell.family))
                by_method.setdefault(cell.method, []).append(unit)
        return {name: median(found) for name, found in by_method.items()}

    def _scale(self, family: str) -> float:
        return next(f.n_parameters for f in self.families if f.name == family) / PARAMETERS

    def of(self, cell: Cell) -> float:
        """Core-seconds of a cell: as measured for its method, otherwise guessed."""
        unit = self._measured.get(cell.method, METHODS[cell.method].cost_s)
        return unit * cell.n * self._scale(cell.family)

    def training_s(self) -> float:
        """Core-seconds of all experts to train."""
        units = self.store.trainings()
        unit = median(units) if units else 2.5e-9
        return sum(unit * work(family.training, family.n_parameters) for family, _ in self.experts)

    def lines(self) -> list[str]:
        """A table: family, N, cells, core-hours."""
        told = ["| family | N | cells left | core-hours |", "|---|---:|---:|---:|"]
        for family in self.families:
            for n in family.counts:
                own = [c for c in self.left if (c.family, c.n) == (family.name, n)]
                hours = sum(map(self.of, own)) / 3600
                told.append(f"| {family.name} | {n} | {len(own)} | {hours:.1f} |")
        whole = sum(map(self.of, self.left)) + self.training_s()
        told.append(
            f"\n{len(self.experts)} experts to train: {self.training_s() / 3600:.1f} core-hours. "
            f"All that is left: {whole / 3600:.1f} core-hours."
        )
        guessed = sorted({c.method for c in self.left} - self._measured.keys())
        if guessed:
            told.append(f"Guessed, since nothing of it is stored yet: {', '.join(guessed)}.")
        return told


def work(how: Training, n_parameters: int) -> float:
    """Items times parameters that a training of an expert sees."""
    return float(how.n_steps * how.batch * n_parameters)
