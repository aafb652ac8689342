"""What guidance gains: merges of two experts, by what is left of both skills, item by item.

    python benchmarks/guidance.py MODELS DATA RESULTS [--split test] [--items N]
        [--variants PATTERN ...] [--best FAMILY ...] [--dtype bfloat16] [--processes 2]

MODELS holds `base`, `expert-math` and `expert-strings`; DATA holds `math_train.jsonl`,
`math_tune.jsonl`, `math_test.jsonl` and so on, of questions and answers, and beside it lie `gsm8k`
and `mbpp`. Each expert is calibrated on 64 of its own training items in the prompt format of the
test, unless the variant says otherwise. Every merge is made by `lewis_hub.merge_models`.

PATTERN picks variants by name (`regmean 0.5*`); FAMILY picks its variant that has the lowest
sum of losses on the tune split, after a run with `--split tune`. RESULTS keeps the scores of every
variant, so that a run goes on where another ended; the table is of all that it holds of the split,
of so many items.

The second table is of paired differences in loss between a merge and its twin: t is negative where
the merge is better. p is two-sided, by the normal distribution (items are many), after Holm over
both skills of all rows. Scores of several seeds are averaged item by item before.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from answers import Items, Scored, score
from guidance_variants import ALONE, SKILLS, Variant, variants

N_TUNED, N_TESTED = 250, 1000  # items of each skill

Scores = Mapping[str, Scored]  # skill -> item by item
Test = tuple[str, str, str]  # a merge, its twin, and a skill


@dataclass(frozen=True)
class Asked:
    """Where things are, and what is scored."""

    models: Path
    data: Path
    results: Path
    split: str
    n_items: int
    dtype: str

    def file(self, name: str, seed: int, split: str) -> Path:
        """Where the scores of a variant are kept."""
        folder = self.results / f"{split}-{self.dtype}"
        return folder / f"{name.replace(' ', '_')}-{seed}.json"

    def kept(self, variant: Variant, split: str, n_items: int) -> Scores | None:
        """The scores of its first items, over all its seeds; None where any is missing."""
        found = [read(self.file(variant.name, seed, split), n_items) for seed in variant.seeds]
        if any(one is None for one in found):
            return None
        return {skill: _averaged([one[skill] for one in found if one]) for skill in SKILLS}


def read(file: Path, n_items: int) -> dict[str, Scored] | None:
    """What is kept of one run; None where that is fewer items."""
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"items": 0}
    if told["items"] < n_items:
        return None
    return {
        skill: Scored(one["losses"][:n_items], one["right"][:n_items])
        for skill, one in told["scores"].items()
    }


def main() -> None:
    """Make and score what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("models", "data", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--split", default="test", choices=("tune", "test"))
    parser.add_argument("--items", type=int, help="250 and 1000 unless said")
    parser.add_argument("--variants", nargs="*", default=[])
    parser.add_argument("--best", nargs="*", default=[])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    told = parser.parse_args()
    asked = Asked(
        told.models.resolve(),
        told.data.resolve(),
        told.results.resolve(),
        told.split,
        told.items or (N_TUNED if told.split == "tune" else N_TESTED),
        told.dtype,
    )
    known = variants()
    chosen = {name for p in told.variants for name in fnmatch.filter(known, p)}
    chosen |= {best_on_tune(asked, known, family) for family in told.best}
    runs = [(v, seed) for v in known.values() if v.name in chosen for seed in v.seeds]
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with ProcessPoolExecutor(told.processes, get_context("spawn")) as pool:
        for line in pool.map(partial(run, asked), *zip(*runs, strict=True) if runs else ((), ())):
            print(line, flush=True)
    print_tables(asked, known)


def run(asked: Asked, variant: Variant, seed: int) -> str:
    """Make a merge and score it, unless its scores of enough items are kept."""
    file = asked.file(variant.name, seed, asked.split)
    if read(file, asked.n_items):
        return f"{file.stem}: kept"
    items = {skill: _items(asked, skill) for skill in SKILLS}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        found: dict[str, Scored] = {}
        if variant.name == ALONE:
            for skill in SKILLS:
                expert = asked.models / f"expert-{skill}"
                found |= score(expert, {skill: items[skill]}, asked.dtype)
        else:
            merged = _merged(asked, variant, seed, Path(folder))
            found = score(merged, items, asked.dtype)
    whole_s = time.perf_counter() - started
    told = {"name": variant.name, "seed": seed, "items": asked.n_items}
    scores = {skill: asdict(one) for skill, one in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(told | {"seconds": round(whole_s, 1), "scores": scores}))
    part.replace(file)
    return f"{file.stem}: {whole_s:.0f} s"


def best_on_tune(asked: Asked, known: Mapping[str, Variant], family: str) -> str:
    """The name of the family's variant whose losses on the tune split have the lowest sum."""
    tuned = {
        v.name: sum(statistics.fmean(scores[skill].losses) for skill in SKILLS)
        for v in known.values()
        if v.family == family and (scores := asked.kept(v, "tune", N_TUNED))
    }
    if not tuned:
        raise SystemExit(f"nothing of {family} was scored on the tune split: --split tune first")
    return min(tuned, key=tuned.__getitem__)


def print_tables(asked: Asked, known: Mapping[str, Variant]) -> None:
    """All that is kept of the split, and every merge against its twins."""
    found = {
        v.name: scores
        for v in known.values()
        if (scores := asked.kept(v, asked.split, asked.n_items))
    }
    columns = [f"{what}, {skill}" for what in ("loss", "exact") for skill in SKILLS]
    print(f"\n| merge | {' | '.join(columns)} |")
    print("|---|" + "---:|" * len(columns))
    for name, scores in found.items():
        losses = [f"{statistics.fmean(scores[skill].losses):.3f}" for skill in SKILLS]
        right = [f"{statistics.fmean(scores[skill].right):.3f}" for skill in SKILLS]
        print(f"| {' | '.join([name, *losses, *right])} |")
    pairs = [
        (name, twin)
        for name in found
        for against in known[name].against
        if (twin := against if against in known else best_on_tune(asked, known, against)) in found
    ]
    t = {
        (*pair, skill): paired_t(*(found[name][skill].losses for name in pair))
        for pair in pairs
        for skill in SKILLS
    }
    p = holm({key: math.erfc(abs(value) / math.sqrt(2)) for key, value in t.items()})
    print("\n| merge | against | t | p |\n|---|---|---:|---:|")
    for pair in pairs:
        tested = " / ".join(f"{t[*pair, skill]:+.1f}" for skill in SKILLS)
        likely = " / ".join(_probability(p[*pair, skill]) for skill in SKILLS)
        print(f"| {' | '.join([*pair, tested, likely])} |")


def holm(p: Mapping[Test, float]) -> dict[Test, float]:
    """Holm's correction: the k-th smallest of n times n - k + 1, never falling."""
    corrected: dict[Test, float] = {}
    highest = 0.0
    for rank, key in enumerate(sorted(p, key=p.__getitem__)):
        highest = max(highest, min(1.0, p[key] * (len(p) - rank)))
        corrected[key] = highest
    return corrected


def paired_t(first: Sequence[float], second: Sequence[float]) -> float:
    """Student's t of the differences, item by item."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    spread = statistics.stdev(differences)
    return statistics.fmean(differences) / (spread / math.sqrt(len(differences)))


def _merged(asked: Asked, variant: Variant, seed: int, folder: Path) -> Path:
    import lewis_hub

    file = folder / "recipe.yaml"
    file.write_text(json.dumps(variant.recipe(asked.models, asked.data, seed)))
    return lewis_hub.merge_models(lewis_hub.read_recipe(file), folder / "merged").output


def _items(asked: Asked, skill: str) -> Items:
    lines = (asked.data / f"{skill}_{asked.split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: asked.n_items]]


def _averaged(seeds: Sequence[Scored]) -> Scored:
    losses = [statistics.fmean(one) for one in zip(*(s.losses for s in seeds), strict=True)]
    right = [statistics.fmean(one) for one in zip(*(s.right for s in seeds), strict=True)]
    return Scored(losses, right)


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


if __name__ == "__main__":
    main()
