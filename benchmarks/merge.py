"""Time and memory of a merge, compared with mergekit: `python benchmarks/merge.py --mergekit BIN`.

`lewis-hub bench` runs the same cases with smaller models.

This creates Llama-shaped bf16 checkpoints, then runs both programs in turns on the same mergekit
configuration: whole processes, local folders, files in the page cache. The files are read again
before each run, because the other program may have displaced them. It prints the median times,
their ratio and the peak resident memory of each program. Each program runs once in advance, to
compile its code; ours also hashes the sources in this first run, whose time is a separate column.
`--mergekit` is the path of `mergekit-yaml` (0.1.5) in a separate environment; without it, only our
program runs. `--guided` prints the memory that the merge adds after calibration. Run it on an idle
machine; `--cases` selects cases.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from lewis_hub.demo.bench import LEWIS_HUB, Case, cases, measure_cases, with_models, write_config

N_RUNS = 3
CASES = cases(1536, 14)
BARS = {"ties": 18, "dare": 12, "della": 12, "linear": 4, "many": 30, "large": 30}


def added_by_merging(case: Case, folder: Path) -> None:
    """Memory of a merge guided by LEWIS, in the process that calibrated with torch."""
    config = json.loads(write_config(folder, case).read_text())
    texts = [{"text": f"{number} plus {number} is {2 * number}."} for number in range(64)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    calibration = {"dataset": str(folder / "texts.jsonl"), "text": "{text}", "samples": 64}
    for model in config["models"]:
        del model["parameters"]
    recipe = config | {"guide": {"name": "lewis", "calibration": calibration}}
    (folder / "guided.yaml").write_text(json.dumps(recipe))
    output = folder / "guided"
    command = [*LEWIS_HUB, "merge", str(folder / "guided.yaml"), "--no-eval"]
    subprocess.run([*command, "-q", "-o", str(output)], check=True)
    stages = json.loads((output / "lewis" / "cost.json").read_text())["stages"]
    merge = next(stage for stage in stages if stage["stage"] == "merge")
    before_mb, peak_mb = merge["rss_before_bytes"] / 1e6, merge["peak_rss_bytes"] / 1e6
    shutil.rmtree(output)
    print(
        f"{case.name}: merging adds {peak_mb - before_mb:,.0f} MB to the {before_mb:,.0f} MB that "
        f"calibration leaves (bar: 300 MB), in {merge['seconds']:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", help="path of mergekit-yaml")
    parser.add_argument("--guided", action="store_true", help="memory beside calibration's")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made [a temporary]")
    asked = parser.parse_args()
    chosen = {CASES[name]: BARS[name] for name in asked.cases}
    with tempfile.TemporaryDirectory(dir=asked.folder) as made:
        if asked.guided:
            for case in with_models(chosen, Path(made)):
                added_by_merging(case, Path(made))
            return
        print("| case | mergekit | its peak | lewis-hub | its peak | first run | ratio | bar |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
        for timing in measure_cases(chosen, Path(made), asked.mergekit, N_RUNS, LEWIS_HUB):
            ours, theirs = timing.ours, timing.mergekit
            other = (
                f"{theirs.seconds:.1f} s | {theirs.peak_bytes / 1e6:,.0f} MB" if theirs else "- | -"
            )
            ratio = f"{timing.ratio:.1f} ×" if timing.ratio else "-"
            print(
                f"| {timing.case.name} | {other} | {ours.seconds:.2f} s"
                f" | {ours.peak_bytes / 1e6:,.0f} MB | {timing.first.seconds:.2f} s"
                f" | {ratio} | {chosen[timing.case]} × |",
                flush=True,
            )


if __name__ == "__main__":
    main()
