"""The effect of guidance: losses of merges on the experts' skills, item by item.

    python benchmarks/guidance.py RESULTS --all
    python benchmarks/guidance.py RESULTS --variants PATTERN ...
    python benchmarks/guidance.py RESULTS --models MODELS --data DATA --variants PATTERN ...
        [--skills NAME ...] [--split test] [--items N] [--best FAMILY ...] [--dtype bfloat16]

The first two commands use the zoo of the demo, with items sampled in the same way as its own.
MODELS contains `base` and an `expert-SKILL` per skill. DATA contains SKILL_train.jsonl,
SKILL_tune.jsonl and SKILL_test.jsonl with questions and answers; beside it, `gsm8k` and `mbpp` can
provide generic texts. Each expert is calibrated on 64 of its own training items in the prompt
format of the test, unless the variant says otherwise. Merges are computed and scored one after the
other in this process.

PATTERN selects variants by name (`regmean 0.5*`), in that order. FAMILY selects its variant with
the lowest sum of losses on the tune split, after a run with `--split tune`. `--all` scores every
family on the tune split; on the test split it scores the best of each family, the variants in
SHOWN, and all variants without a family. RESULTS stores the scores of every variant, so that a
second run continues the first. The tables (see `guidance_tables.py`) contain all stored variants of
the split with this number of items.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from answers import SIZES, Scored, Text, fill, load, read_items, score, texts
from guidance_merge import make
from guidance_tables import Found, best_of, tables
from guidance_variants import ALONE, BASE, SHOWN, Bench, Variant, variants
from zoo_items import write_items

from lewis_hub.demo.zoo import zoo_folder


class Scoring:
    """A model in memory for all merges, and the items to score.

    Attributes:
        folder: stores the scores, for these skills, this split and this dtype.
    """

    def __init__(self, bench: Bench, results: Path, split: str, n_items: int, dtype: str) -> None:
        self.bench, self.split, self.n_items, self.dtype = bench, split, n_items, dtype
        self.results = results / "+".join(bench.skills)
        self.folder = self.results / f"{split}-{dtype}"

    @cache  # noqa: B019 (one a process)
    def items(self, skill: str) -> list[Text]:
        items = read_items(self.bench.data, skill, self.split)[: self.n_items]
        assert len(items) == self.n_items, (skill, self.split)
        return texts(self.bench.models / "base", items)

    @cache  # noqa: B019
    def model(self) -> Any:
        return load(self.bench.models / "base", self.dtype)

    def of(self, folder: Path, skills: Sequence[str]) -> dict[str, Scored]:
        """Score a model on disk: skill -> scores."""
        fill(self.model(), folder)
        return {skill: score(self.model(), self.items(skill)) for skill in skills}

    def file(self, name: str, seed: int) -> Path:
        """The file with the scores of a variant."""
        return self.folder / f"{name.replace(' ', '_')}-{seed}.json"

    def found(self, known: dict[str, Variant]) -> Found:
        """All stored scores with this number of items: variant -> skill -> one per seed."""
        kept = {
            v.name: [one for seed in v.seeds if (one := self._read(v.name, seed))]
            for v in known.values()
        }
        return {
            name: {skill: [one[skill] for one in seeds] for skill in self.bench.skills}
            for name, seeds in kept.items()
            if len(seeds) == len(known[name].seeds)
        }

    def _read(self, name: str, seed: int) -> dict[str, Scored] | None:
        file = self.file(name, seed)
        told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"items": 0}
        if told["items"] < self.n_items:
            return None
        return {
            skill: Scored(one["losses"][: self.n_items], one["right"][: self.n_items])
            for skill, one in told["scores"].items()
        }

    def run(self, variant: Variant, seed: int) -> None:
        """Compute a merge and score it, unless enough scores are stored."""
        if self._read(variant.name, seed):
            return
        started = time.perf_counter()
        skills, models = self.bench.skills, self.bench.models
        scores: dict[str, Scored] = {}
        if variant.name == BASE:
            scores = self.of(models / "base", skills)
        elif variant.name == ALONE:
            for skill in skills:
                scores |= self.of(models / f"expert-{skill}", [skill])
        else:
            with TemporaryDirectory() as folder:
                merged = Path(folder) / "merged"
                make(variant.recipe(self.bench, seed), self.results / "measured", merged)
                made_s = time.perf_counter() - started
                scores = self.of(merged, skills)
                print(f"made in {made_s:.1f} s; ", end="")
        whole_s = time.perf_counter() - started
        told = {"name": variant.name, "seed": seed, "items": self.n_items, "seconds": whole_s}
        told |= {"scores": {skill: asdict(one) for skill, one in scores.items()}}
        file = self.file(variant.name, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(told))
        part.replace(file)
        means = (f"{skill} {sum(one.losses) / self.n_items:.3f}" for skill, one in scores.items())
        print(f"{file.stem}: {', '.join(means)}, {whole_s:.1f} s", flush=True)


def main() -> None:
    """Compute and score missing variants, then print the tables."""
    told = _arguments()
    bench = _bench(told)
    known = variants(bench)
    n_items = told.items or SIZES[told.split]
    scoring = Scoring(bench, told.results.resolve(), told.split, n_items, told.dtype)
    tuning = Scoring(bench, told.results.resolve(), "tune", SIZES["tune"], told.dtype)
    families = list(dict.fromkeys(v.family for v in known.values() if v.family))
    if told.all:
        _run(tuning, known, [variant.name for variant in known.values() if variant.family])
    tuned = tuning.found(known)
    patterns = [*told.variants, *(SHOWN if told.all else ())]
    chosen = [name for pattern in patterns for name in fnmatch.filter(known, pattern)]
    chosen += [variant.name for variant in known.values() if told.all and not variant.family]
    chosen += [best_of(family, known, tuned) for family in (families if told.all else told.best)]
    _run(scoring, known, chosen)
    print(tables(bench.skills, known, scoring.found(known), tuned))


def _run(scoring: Scoring, known: dict[str, Variant], names: Sequence[str]) -> None:
    for name in dict.fromkeys(names):
        for seed in known[name].seeds:
            scoring.run(known[name], seed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--skills", nargs="*", help="all experts of MODELS unless said")
    parser.add_argument("--split", default="test", choices=tuple(SIZES))
    parser.add_argument("--items", type=int, help="250 and 1000 unless said")
    parser.add_argument("--variants", nargs="*", default=[])
    parser.add_argument("--best", nargs="*", default=[])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def _bench(told: argparse.Namespace) -> Bench:
    models, data = told.models or zoo_folder(), told.data
    if data is None:
        data = told.results / "items"
        write_items(data)
    found = sorted(path.name.removeprefix("expert-") for path in models.glob("expert-*"))
    return Bench(models.resolve(), data.resolve(), tuple(told.skills or found))


if __name__ == "__main__":
    main()
