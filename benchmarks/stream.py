"""Time of a merge from Hub to Hub compared with the network: `python benchmarks/stream.py`.

This serves Llama-shaped bf16 checkpoints from the embedded Hub in a separate process, with a
latency before every answer and one bandwidth for all bodies in both directions. Then it runs
`lewis-hub merge --stream --push` by TIES with two experts. It prints the wall time, the lower limit
(bytes in + bytes out) / bandwidth, the peak resident memory, and the largest number of bytes on the
disk. Run it on an idle machine: the Hub needs one core at 150 MB/s.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import yaml
from merge import Case, build, shapes, write_config

BAR = 1.3


def serve_slowly(root: Path, asked: Connection) -> None:
    """Serve at full speed until a latency and a bandwidth arrive, then until the end signal."""
    from lewis_hub.localhub.server import serve

    with serve(root) as hub:
        asked.send((hub.url, hub.write_token))
        hub.faults.delay_s, hub.faults.bytes_per_s = asked.recv()
        asked.recv()


@contextmanager
def hub_process(root: Path):
    here, there = multiprocessing.Pipe()
    spawned = multiprocessing.get_context("spawn")
    process = spawned.Process(target=serve_slowly, args=(root, there))
    process.start()
    try:
        yield (*here.recv(), here)
    finally:
        here.send(None)
        process.join()


def seed(folder: Path, url: str, token: str, case: Case) -> None:
    """Upload the sources to the Hub, and keep no local copy."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    build(folder, case.n_blocks, case.n_experts)
    api = HfApi(endpoint=url, token=token)
    for i in range(case.n_experts + 1):
        source = folder / f"source-{i}"
        api.create_repo(f"bench/source-{i}")
        api.upload_folder(repo_id=f"bench/source-{i}", folder_path=source)
        shutil.rmtree(source)


def disk_bytes(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                total += (Path(root) / file).stat().st_blocks * 512
            except FileNotFoundError:
                continue  # used up meanwhile
    return total


def run(command: list[str], work: Path, environment: dict[str, str]) -> tuple[float, float, int]:
    """Wall seconds, peak resident megabytes, and the largest number of bytes on the disk."""
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.05):
            most = max(most, disk_bytes(work))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    assert process.stderr
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if status:
        raise SystemExit(told.decode(errors="replace")[-2000:])
    return seconds, usage.ru_maxrss / 1000, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=39, help="39 are 1.2 B parameters [39]")
    parser.add_argument("--mbytes-per-s", type=float, default=150, help="of the network [150]")
    parser.add_argument("--latency-ms", type=float, default=50, help="before every answer [50]")
    parser.add_argument("--shard", default="500MB", help="largest output file [500MB]")
    parser.add_argument("--folder", type=Path, help="where everything is made [a temporary]")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as made:
        folder = Path(made)
        case = Case("", asked.blocks, "ties", 2, 0)
        with hub_process(folder / "hub") as (url, token, hub):
            measure(case, folder, asked, (url, token, hub))


def measure(
    case: Case, folder: Path, asked: argparse.Namespace, served: tuple[str, str, Connection]
) -> None:
    url, token, hub = served
    config = yaml.safe_load(write_config(folder, case).read_text())
    text = yaml.safe_dump(config, sort_keys=False).replace(f"{folder}/", "bench/")
    # in a process of its own: a child's peak memory begins at its parent's
    seeding = multiprocessing.get_context("spawn").Process(
        target=seed, args=(folder, url, token, case)
    )
    seeding.start()
    seeding.join()
    bytes_out = 2 * sum(math.prod(shape) for shape in shapes(case.n_blocks).values())
    bytes_in = (case.n_experts + 1) * bytes_out
    work = folder / "work"
    work.mkdir()
    (work / "recipe.yaml").write_text(text)
    command = [sys.executable, "-m", "lewis_hub", "merge", str(work / "recipe.yaml"), "-q"]
    command += ["--stream", "--push", "--repo", "bench/merged", "--max-shard-size", asked.shard]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
        "HF_ENDPOINT": url,
        "HF_TOKEN": token,
        "HF_HOME": str(work / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    hub.send((asked.latency_ms / 1000, asked.mbytes_per_s * 1e6))
    seconds, peak_mb, disk = run(command, work, environment)
    floor_s = (bytes_in + bytes_out) / (asked.mbytes_per_s * 1e6)
    network = f"{asked.mbytes_per_s:.0f} MB/s, {asked.latency_ms:.0f} ms"
    print(
        f"{bytes_in / 1e9:.2f} GB in, {bytes_out / 1e9:.2f} GB out at {network}: {seconds:.1f} s,"
    )
    print(f"{seconds / floor_s:.2f} times {floor_s:.1f} s, which the network takes (aim {BAR}).")
    print(
        f"Peak memory {peak_mb:,.0f} MB, peak disk {disk / 1e6:,.0f} MB in shards of {asked.shard} "
        "(two of them and small files, unless one tensor's sources take more)."
    )


if __name__ == "__main__":
    main()
