"""Runs benchmarks/PROTOCOL.md and writes its tables.

    python benchmarks/protocol.py RESULTS [--models FAMILY=FOLDER ...] [--cells PATTERN]
        [--estimate] [--core-minutes N] [--no-abilities] [--device cuda]
        [--smoke]

RESULTS keeps every cell in a file, so that a run continues where another one ended, in the fixed
order of PROTOCOL.md. A family that `--models` does not name is fetched from the Hub. PATTERN
selects cells, such as `smollm2-135m/n2/tasks1/*`. `--estimate` tells what is left, and runs
nothing. `--core-minutes` starts no cell after so many minutes of processor time. `--no-abilities`
leaves lm-eval's tasks out, whose data are on the Hub. With `--device cuda` models are trained,
merged and scored on a GPU, and seconds are those of the clock. `--smoke` runs everything once on
the demo's tiny models, in minutes. The tables are printed, and written to RESULTS/tables.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from protocol_cells import Cell, Estimate, Store, cells
from protocol_methods import METHODS
from protocol_run import Bench
from protocol_tables import tables
from protocol_tasks import FAMILIES, SMOKE, Family
from transformers.utils.logging import disable_progress_bar

from lewis_hub.demo.zoo import zoo_folder


def main() -> None:
    """Run the cells that are not stored, then write the tables."""
    disable_progress_bar()
    told = _arguments()
    families = (SMOKE,) if told.smoke else FAMILIES
    folders = {SMOKE.name: zoo_folder() / "base"} if told.smoke else _folders(told.models)
    store = Store(told.results.resolve())
    asked = cells(families, told.cells)
    if told.estimate:
        print("\n".join(_estimate(store, families, asked).lines()))
        return
    _run(store, families, asked, folders, told)
    whole = tables(store, families)
    (store.folder / "tables.md").write_text(whole, encoding="utf-8")
    print(whole)


def _run(
    store: Store,
    families: Sequence[Family],
    asked: Sequence[Cell],
    folders: Mapping[str, Path],
    told: argparse.Namespace,
) -> None:
    by_name, benches = {family.name: family for family in families}, dict[str, Bench]()
    refused: dict[str, str | None] = {}
    for cell in asked:
        if store.has(cell):
            continue
        if told.core_minutes and time.process_time() > 60 * told.core_minutes:
            print(f"{told.core_minutes} core-minutes are used up; the next cell is {cell}.")
            return
        if cell.family not in benches:
            base = folders.get(cell.family) or _fetched(by_name[cell.family])
            benches[cell.family] = Bench(
                store, by_name[cell.family], base, told.device, abilities=not told.no_abilities
            )
        bench = benches[cell.family]
        if cell.method not in refused:
            refused[cell.method] = bench.refused(METHODS[cell.method])
            if refused[cell.method]:
                print(f"left out: {cell.method}: {refused[cell.method]}", flush=True)
        if not refused[cell.method]:
            found = bench.run(cell)
            losses = ", ".join(f"{sum(x) / len(x):.3f}" for x in found.scores.losses.values())
            print(f"{cell}: {losses} ({found.whole_s:.0f} core-seconds)", flush=True)


def _fetched(family: Family) -> Path:
    from huggingface_hub import snapshot_download

    print(f"fetching {family.repo} (licence: {family.license}), or name a folder by --models")
    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
    return Path(snapshot_download(family.repo, allow_patterns=wanted))


def _estimate(store: Store, families: Sequence[Family], asked: Sequence[Cell]) -> Estimate:
    left = [cell for cell in asked if not store.has(cell)]
    experts: dict[Path, Family] = {}
    for family in families:
        bench = Bench(store, family, Path(), "cpu", abilities=False)
        for cell in left:
            if cell.family == family.name:
                experts |= dict.fromkeys(bench.missing_experts(cell), family)
    return Estimate(store, families, left, [(family, place) for place, family in experts.items()])


def _folders(named: Sequence[str]) -> dict[str, Path]:
    known = {family.name for family in FAMILIES}
    found = {}
    for one in named:
        name, _, folder = one.partition("=")
        if name not in known or not Path(folder, "config.json").exists():
            raise SystemExit(
                f"--models {one}: expected FAMILY=FOLDER, with a family of "
                f"{', '.join(sorted(known))} and the folder of its base model."
            )
        found[name] = Path(folder).resolve()
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--models", nargs="*", default=[], metavar="FAMILY=FOLDER")
    parser.add_argument("--cells", default="*", metavar="PATTERN")
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--core-minutes", type=float)
    parser.add_argument("--no-abilities", action="store_true")
    parser.add_argument("--device", default="cpu", help="torch device: cpu or cuda")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
