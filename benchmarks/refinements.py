"""Refinements of `regmean`, and how close they come to the experts themselves.

    python benchmarks/refinements.py MODELS DATA RESULTS [PATTERN ...] [--split tune] [--items 250]

Merges are computed in memory, block by block, for Llama-shaped models. The new weight W of a Linear
minimises the squares of W x - y over the tokens of all experts' calibration texts. The refinements
differ in x and y:

    own      x: the input in the expert itself; y: the expert's output (this is `regmean`)
    mean     x: the input in the average of the experts; y: the output of the expert's Linear on x
    merged   x: the input in the expert's block after the blocks that are already merged; y likewise
             (RegMean++, arXiv 2508.03121)
    cross    x: the input in the merged model so far; y: the output in the expert itself, mixed with
             the output of the expert's Linear on x if `faithful` is below 1

With `corrected`, the last Linear of each block also compensates the error of the block's output.
RESULTS stores the scores; the table contains all stored scores.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from answers import SIZES, Scored, load, read_items, score, texts
from guidance_tables import paired_t
from refinements_merge import Merging, Refinement


def refinements() -> dict[str, Refinement]:
    """All refinements, by name."""
    told: list[Refinement] = []
    for alpha in (0.3, 0.5, 0.7, 0.9):
        told.append(Refinement(f"own {alpha}", alpha=alpha))
        told.append(
            Refinement(f"own {alpha} down {alpha + 0.2:.1f}", alpha=alpha, down=alpha + 0.2)
        )
        for samples in (64, 256):
            more = f" samples {samples}" if samples != 64 else ""
            told.append(Refinement(f"mean {alpha}{more}", "mean", alpha, samples=samples))
            told.append(Refinement(f"merged {alpha}{more}", "merged", alpha, samples=samples))
            for faithful in (0.0, 0.5, 1.0):
                name = f"cross {alpha} faithful {faithful}{more}"
                one = Refinement(name, "cross", alpha, samples=samples, faithful=faithful)
                told.append(one)
            faithful_merge = told[-1]  # faithful to 1
            told.append(
                replace(faithful_merge, name=f"{faithful_merge.name} corrected", corrected="scaled")
            )
            told.append(
                replace(
                    faithful_merge,
                    name=f"{faithful_merge.name} corrected unscaled",
                    corrected="unscaled",
                )
            )
        told.append(Refinement(f"own {alpha} samples 256", alpha=alpha, samples=256))
    told += [Refinement(f"own 0.5 scale {x}", scale=x) for x in (0.95, 1.05, 1.1)]
    told += [Refinement(f"own 0.5 answers {x}", answers=x) for x in (3.0, 10.0)]
    told += [Refinement(f"own 0.5 pull {x}", pull=x) for x in (0.001, 0.01, 0.1)]
    told += [Refinement("own 0.5 trace", norm="trace")]
    return {one.name: one for one in told}


def main() -> None:
    """Compute and score missing merges, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("models", "data", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--skills", nargs="*", default=["math", "strings"])
    parser.add_argument("--split", default="tune", choices=tuple(SIZES))
    parser.add_argument("--dtype", default="bfloat16")
    told = parser.parse_args()
    known, n_items = refinements(), SIZES[told.split]
    asked = {}
    for skill in told.skills:
        items = read_items(told.data, skill, told.split)[:n_items]
        asked[skill] = texts(told.models / "base", items)
    folder = told.results / "+".join(told.skills) / f"refinements-{told.split}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = dict.fromkeys(n for p in told.patterns for n in fnmatch.filter(known, p))
    left = [name for name in chosen if not _file(folder, name).exists()]
    if left:
        merging, scored = (
            Merging(told.models, told.data, told.skills),
            load(told.models / "base", told.dtype),
        )
        for name in left:
            started = time.perf_counter()
            merging.make(known[name])
            made_s = time.perf_counter() - started
            scored.load_state_dict(merging.merged.state_dict())
            found = {skill: asdict(score(scored, items)) for skill, items in asked.items()}
            _file(folder, name).write_text(json.dumps(found))
            whole_s = time.perf_counter() - started
            print(f"{name}: made in {made_s:.0f} s, {whole_s:.0f} s", flush=True)
    for line in _table(folder, known, told.skills):
        print(line)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '_')}.json"


def _table(folder: Path, known: Mapping[str, Refinement], skills: Sequence[str]) -> Iterator[str]:
    found = {
        name: {skill: Scored(**one) for skill, one in json.loads(file.read_text()).items()}
        for name in known
        if (file := _file(folder, name)).exists()
    }
    own = found.get("own 0.5")
    columns = [f"{what}, {skill}" for what in ("loss", "exact") for skill in skills]
    yield f"| refinement | {' | '.join(columns)} | t against `own 0.5` |"
    yield "|---|" + "---:|" * (len(columns) + 1)
    for name, scores in found.items():
        losses = [f"{statistics.fmean(scores[skill].losses):.4f}" for skill in skills]
        right = [f"{statistics.fmean(scores[skill].right):.3f}" for skill in skills]
        t = [paired_t(scores[s].losses, own[s].losses) for s in skills] if own else []
        yield f"| {' | '.join([name, *losses, *right, ' / '.join(f'{x:+.1f}' for x in t)])} |"


if __name__ == "__main__":
    main()
