"""One cell of PROTOCOL.md: make the model, choose its settings on tune items, score it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from answers import load, read_items, texts
from protocol_cells import Cell, Cost, Result, Scores, Store, work
from protocol_methods import (
    COMMON,
    METHODS,
    OURS,
    STEPS,
    Inputs,
    Method,
    Settings,
    recipe,
)
from protocol_scores import Scorer
from protocol_tasks import Family, calibration_items, drawn, items_file, kind_of, write_items
from protocol_train import distillation, fine_tuning, save, seconds, train_expert, train_for

import lewis_hub
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resources import software

WEIGHTS = METHODS["task_arithmetic"]
Made = tuple[Path, Cost]


class Bench:
    """A family's base, its experts and items, and the cells that are stored already."""

    def __init__(
        self, store: Store, family: Family, base: Path, device: str, *, abilities: bool
    ) -> None:
        self.store, self.family, self.base, self.device = store, family, base, device
        self.items = store.folder / "items"
        self.items.mkdir(parents=True, exist_ok=True)
        self.scorer = Scorer(family, base, self.items, device, abilities=abilities)

    def run(self, cell: Cell) -> Result:
        """Make, score and store one cell; experts that it needs are trained first."""
        method, tasks = METHODS[cell.method], self._tasks(cell)
        given = self._inputs(cell)
        began = seconds(self.device)
        with TemporaryDirectory(dir=self.store.folder) as scratch:
            made = Path(scratch)
            chosen, cost, scores = {
                "base": self._base,
                "experts": self._experts,
                "weights": self._weights,
                "merge": self._merge,
                "twin": self._twin,
                "gradient": self._gradient,
            }[method.kind](cell, given, tasks, made)
        whole_s = seconds(self.device) - began
        told = {**software(), "device": self.device}
        result = Result(cell, scores, chosen, cost, whole_s, told)
        self.store.write(result)
        return result

    def missing_experts(self, cell: Cell) -> list[Path]:
        """Experts of a cell that are not trained yet."""
        return [p for p in self._places(cell) if not (p / "training.json").exists()]

    def refused(self, method: Method) -> str | None:
        """Why this version cannot read the method's recipe; None if it can."""
        if not method.merge:
            return None
        given = Inputs(self.base, [self.base], [self.items / "x.jsonl"], self.family.n_texts)
        told = recipe(method, given, method.grid[0], [1.0])
        try:
            parse_recipe(json.dumps(told), "recipe.yaml")
        except lewis_hub.LewisHubError as error:
            return " ".join(str(error).split())
        return None

    def _tasks(self, cell: Cell) -> tuple[str, ...]:
        return drawn(self.family, cell.n, cell.tasks)

    def _places(self, cell: Cell) -> list[Path]:
        tasks = drawn(self.family, max(self.family.counts), cell.tasks)
        folder = self.store.folder / "models" / self.family.name
        return [folder / f"{kind_of(task, cell.tasks, tasks)}-{task}" for task in self._tasks(cell)]

    def _inputs(self, cell: Cell) -> Inputs:
        tasks, experts = self._tasks(cell), self._places(cell)
        for task, place in zip(tasks, experts, strict=True):
            write_items(self.items, task)
            if not (place / "training.json").exists():
                self._train(task, place)
        n = self.family.n_texts
        items = [calibration_items(self.items, task, n, cell.texts) for task in tasks]
        return Inputs(self.base, experts, [file.resolve() for file in items], n)

    def _train(self, task: str, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        kind, how = place.name.partition("-")[0], self.family.training
        began = seconds(self.device)
        train_expert(self.base, self.scorer.texts(task, "train"), kind, how, place, self.device)
        told = {
            "cpu_s": seconds(self.device) - began,
            "work": work(how, self.family.n_parameters),
            "kind": kind,
            "task": task,
        }
        (place / "training.json").write_text(json.dumps(told), encoding="utf-8")
        print(f"trained {place.name}: {told['cpu_s']:.0f} core-seconds", flush=True)

    def _base(self, cell: Cell, given: Inputs, tasks: Sequence[str], made: Path) -> Found:  # noqa: ARG002
        return {}, Cost(0, 0), self.scorer.of(self.base, tasks)

    def _experts(self, cell: Cell, given: Inputs, tasks: Sequence[str], made: Path) -> Found:  # noqa: ARG002
        """Each expert on its own task; its general text is no merge's."""
        own = [
            self.scorer.of(folder, [task], whole=False)
            for folder, task in zip(given.experts, tasks, strict=True)
        ]
        losses = {task: one.losses[task] for task, one in zip(tasks, own, strict=True)}
        right = {task: one.right[task] for task, one in zip(tasks, own, strict=True)}
        return {}, Cost(0, 0), Scores(losses, right, [], {})

    def _weights(self, cell: Cell, given: Inputs, tasks: Sequence[str], made: Path) -> Found:  # noqa: ARG002
        """Task arithmetic: the best common weight, then one step of each expert's in turn."""
        known: dict[tuple[float, ...], float] = {}

        def loss(weights: tuple[float, ...]) -> float:
            if weights not in known:
                with self._merged(recipe(WEIGHTS, given, {}, weights), made) as (folder, _):
                    known[weights] = self.scorer.tuned(folder, tasks)
            return known[weights]

        best = min(((common,) * cell.n for common in COMMON), key=loss)
        for n in range(cell.n):
            near = [(*best[:n], round(best[n] + step, 2), *best[n + 1 :]) for step in STEPS]
            best = min([best, *near], key=loss)
        with self._merged(recipe(WEIGHTS, given, {}, best), made) as (folder, cost):
            return {"weights": list(best)}, cost, self.scorer.of(folder, tasks)

    def _merge(self, cell: Cell, given: Inputs, tasks: Sequence[str], made: Path) -> Found:
        method, weights = METHODS[cell.method], self._known_weights(cell)
        chosen, tried = method.grid[0], {}
        if len(method.grid) > 1:
            for n, settings in enumerate(method.grid):
                with self._merged(recipe(method, given, settings, weights), made) as (folder, _):
                    tried[n] = self.scorer.tuned(folder, tasks)
            chosen = method.grid[min(tried, key=tried.__getitem__)]
        with self._merged(recipe(method, given, chosen, weights), made) as (folder, cost):
            mean = _mean_density(folder) if method.guide else None
            told = {**chosen} | ({"mean_density": mean} if mean else {})
            return told, cost, self.scorer.of(folder, tasks)

    def _twin(self, cell: Cell, given: Inputs, tasks: Sequence[str], made: Path) -> Found:
        """Uniform densities of the mean that LEWIS has in the same cell."""
        guided = self._stored(replace(cell, method="lewis_alone"))
        mean = guided.chosen["mean_density"]
        told = recipe(replace(METHODS[cell.method], texts="none"), given, {})
        told["guide"] = {"name": "uniform", "gamma": mean, "epsilon": mean}
        with self._merged(told, made) as (folder, cost):
            return {"mean_density": mean}, cost, self.scorer.of(folder, tasks)

    def _gradient(self, cell: Cell, given: Inputs, tasks: Sequence[str], made: Path) -> Found:
        """Train task arithmetic's merge on the calibration texts for a multiple of our time."""
        method = METHODS[cell.method]
        ours = self._stored(replace(cell, method=OURS))
        if ours.software.get("device", "cpu") != self.device:
            raise SystemExit(f"{ours.cell} ran on another device than {self.device}")
        budget_s = method.seconds * ours.cost.cpu_s
        rates: Sequence[Settings] = method.grid
        if method.seconds > 1:
            once = replace(cell, method=cell.method.rpartition("_")[0])
            rates = [{"rate": self._stored(once).chosen["rate"]}]
        weights = self._known_weights(cell)
        tried: dict[int, tuple[float, int, Cost]] = {}
        with self._merged(recipe(WEIGHTS, given, {}, weights), made) as (start, _):
            for n, settings in enumerate(rates):
                out = made / f"trained{n}"
                trained = self._trained(start, given, cell.method, settings, budget_s, out)
                tried[n] = (self.scorer.tuned(out, tasks), *trained)
        best = min(tried, key=lambda n: tried[n][0])
        _, n_steps, cost = tried[best]
        told = {**rates[best], "n_steps": n_steps}
        return told, cost, self.scorer.of(made / f"trained{best}", tasks)

    def _trained(  # noqa: PLR0913 (one training)
        self, start: Path, given: Inputs, name: str, settings: Settings, budget_s: float, out: Path
    ) -> tuple[int, Cost]:
        torch.manual_seed(0)
        began, started = seconds(self.device), time.perf_counter()
        model = load(start, "float32", self.device)
        own = [texts(self.base, read_items(f.parent, *_split(f))) for f in given.items]
        if name.startswith("fine_tuning"):
            loss = fine_tuning(model, own)
        else:
            loss = distillation(model, given.experts, own)
        left_s = budget_s - (seconds(self.device) - began)
        n_steps = train_for(model, loss, float(str(settings["rate"])), left_s)
        cost = Cost(seconds(self.device) - began, time.perf_counter() - started)
        save(model, self.base, out)
        return n_steps, cost

    def _known_weights(self, cell: Cell) -> list[float] | None:
        """Task arithmetic's, of the same experts; it reads no texts. N = 1 has none."""
        if cell.n == 1:
            return None
        found = self._stored(replace(cell, method="task_arithmetic", texts=1))
        return [float(weight) for weight in found.chosen["weights"]]

    def _stored(self, cell: Cell) -> Result:
        if not self.store.has(cell):
            self.run(cell)
        found = self.store.read(cell)
        assert found
        return found

    @contextmanager
    def _merged(self, told: Mapping[str, object], scratch: Path) -> Iterator[Made]:
        """Merge by the package's public function; the folder is deleted afterwards."""
        file, folder = scratch / "recipe.yaml", scratch / "merged"
        file.write_text(json.dumps(told), encoding="utf-8")
        execution = lewis_hub.Execution(device=self.device)
        began, started = seconds(self.device), time.perf_counter()
        lewis_hub.merge_models(lewis_hub.read_recipe(file), folder, execution, progress=False)
        took = seconds(self.device) - began, time.perf_counter() - started
        yield folder, Cost(*took, _peak(folder))
        shutil.rmtree(folder)


Found = tuple[Mapping[str, object], Cost, Scores]
Step = Callable[[Cell, Inputs, Sequence[str], Path], Found]


def _peak(folder: Path) -> int | None:
    stages = json.loads((folder / "lewis" / "cost.json").read_text(encoding="utf-8"))["stages"]
    peaks = [one["peak_rss_bytes"] for one in stages if one["peak_rss_bytes"]]
    return max(peaks, default=None)


def _mean_density(folder: Path) -> float:
    """The mean of a schedule over the entries of the matrices that it decides."""
    from safetensors import safe_open

    told = json.loads((folder / "lewis" / "density.json").read_text(encoding="utf-8"))
    densities = told["experts"][0]["tensors"]
    n_entries: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                shape = opened.get_slice(name).get_shape()
                n_entries[name] = torch.Size(shape).numel()
    whole = sum(n_entries[name] for name in densities)
    return float(sum(densities[name] * n_entries[name] for name in densities) / whole)


def _split(file: Path) -> tuple[str, str]:
    """Task and split of a file of items."""
    task, _, split = file.stem.rpartition("_")
    assert file == items_file(file.parent, task, split)
    return task, split
