"""How long the command takes to answer: `python benchmarks/startup.py`.

Prints the median of several runs of `lewis-hub --help` and its ratio to an empty Python program,
run in turns; the bar is 0.3 s on an idle machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

N_RUNS = 9
PROGRAMS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "lewis-hub --help": [sys.executable, "-m", "lewis_hub", "--help"],
    "lewis-hub merge --help": [sys.executable, "-m", "lewis_hub", "merge", "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    runs = [{name: seconds(command) for name, command in PROGRAMS.items()} for _ in range(N_RUNS)]
    medians = {name: statistics.median(run[name] for run in runs) for name in PROGRAMS}
    empty = medians["python -c pass"]
    for name, median in medians.items():
        print(f"{name:24} {median:6.3f} s  {median / empty:5.1f} x an empty program")


if __name__ == "__main__":
    main()
