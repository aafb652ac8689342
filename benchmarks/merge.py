"""Time and memory of a merge, compared with mergekit: `python benchmarks/merge.py --mergekit BIN`.

This creates Llama-shaped bf16 checkpoints, then runs both programs in turns on the same mergekit
configuration: whole processes, local folders, files in the page cache. The files are read again
before each run, because the other program may have displaced them. It prints the median times,
their ratio and the peak resident memory of each program. Each program runs once in advance, to
compile its code; ours also hashes the sources in this first run, whose time is a separate column.
`--mergekit` is the path of `mergekit-yaml` (0.1.5) in a separate environment; without it, only our
program runs. `--plain` runs ours as on a machine without llvmlite. `--guided` prints the memory
that the merge adds after calibration. Run it on an idle machine; `--cases` selects cases.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from lewis_hub.demo.zoo import zoo_folder

HIDDEN, INNER, VOCABULARY, HEAD = 1536, 4096, 32_000, 64
N_RUNS = 3
WITH_KERNELS = ["-m", "lewis_hub"]
PLAIN = ["-c", "import sys; sys.modules['llvmlite'] = None; import lewis_hub.__main__"]
DENSITIES = {"self_attn": 0.3, "gate_proj": 0.5, "up_proj": 0.6, "down_proj": 0.8}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    size: str
    n_blocks: int
    method: str
    n_experts: int
    bar: float  # mergekit's time over ours

    @property
    def name(self) -> str:
        return f"{self.size}, {self.method}, {self.n_experts} experts"


CASES = {
    "ties": Case("0.5 B", 14, "ties", 2, 18),
    "dare": Case("0.5 B", 14, "dare_ties", 2, 12),
    "della": Case("0.5 B", 14, "della", 2, 12),
    "linear": Case("0.5 B", 14, "linear", 2, 4),
    "many": Case("0.5 B", 14, "ties", 8, 30),
    "large": Case("1.2 B", 39, "ties", 2, 30),
}


def shapes(n_blocks: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for block in range(n_blocks):
        at = f"model.layers.{block}"
        for name in ("q", "k", "v", "o"):
            found[f"{at}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            found[f"{at}.mlp.{name}_proj.weight"] = (INNER, HIDDEN)
        found[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input", "post_attention"):
            found[f"{at}.{name}_layernorm.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def build(folder: Path, n_blocks: int, n_experts: int) -> None:
    """Create a base, and experts with differences like those of fine-tuning."""
    import torch  # in a process of its own: a child's peak memory begins at its parent's
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    sources: list[dict[str, torch.Tensor]] = [{} for _ in range(n_experts + 1)]
    for name, shape in shapes(n_blocks).items():
        base = torch.randn(shape, generator=generator).mul_(0.02)
        sources[0][name] = base.bfloat16()
        for expert in sources[1:]:
            change = torch.randn(shape, generator=generator).mul_(0.001)
            expert[name] = (base + change).bfloat16()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": n_blocks,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": HIDDEN // HEAD,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    for i, tensors in enumerate(sources):
        source = folder / f"source-{i}"
        source.mkdir(parents=True)
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        (source / "config.json").write_text(json.dumps(config))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(zoo_folder() / "base" / file, source / file)
        tensors.clear()


def write_config(folder: Path, case: Case) -> Path:
    density = [{"filter": name, "value": value} for name, value in DENSITIES.items()]
    parameters: dict[str, object] = {"weight": 0.5}
    if case.method != "linear":
        parameters["density"] = [*density, {"value": 1.0}]
    names = range(0 if case.method == "linear" else 1, case.n_experts + (case.method != "linear"))
    config = {
        "models": [{"model": str(folder / f"source-{i}"), "parameters": parameters} for i in names],
        "merge_method": case.method,
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }
    if case.method != "linear":
        config["base_model"] = str(folder / "source-0")
    path = folder / f"{case.method}-{case.n_experts}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def run(command: list[str], output: Path) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of one process."""
    home = {"HF_HOME": str(output.parent / "hf-home"), "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(output, ignore_errors=True)
    warm(output.parent)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment | home,
    )
    assert process.stderr
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(told.decode(errors="replace")[-2000:])
    shutil.rmtree(output, ignore_errors=True)
    return seconds, usage.ru_maxrss / 1000


def warm(folder: Path) -> None:
    """Read the sources into the page cache."""
    for file in folder.glob("source-*/*.safetensors"):
        with file.open("rb", buffering=0) as held:
            while held.read(1 << 24):
                pass


def measure(case: Case, folder: Path, mergekit: str | None, program: list[str]) -> None:
    config = write_config(folder, case)
    ours = [sys.executable, *program, "merge", str(config), "--no-eval", "-q", "-o"]
    theirs = [mergekit or "", "--out-shard-size", "500M", str(config)]
    first_s, _ = run(ours, folder / "out")
    if mergekit and case is CASES["ties"]:  # the first: it compiles what is compiled once
        run(theirs, folder / "out")
    pairs = []
    for _ in range(N_RUNS):
        other = run(theirs, folder / "out") if mergekit else (float("nan"), float("nan"))
        pairs.append((*other, *run(ours, folder / "out")))
    their_s, their_mb, our_s, our_mb = (
        statistics.median(pair[i] for pair in pairs) for i in range(4)
    )
    ratio = their_s / our_s
    print(
        f"| {case.name} | {their_s:.1f} s | {their_mb:,.0f} MB | {our_s:.2f} s | {our_mb:,.0f} MB"
        f" | {first_s:.2f} s | {ratio:.1f} × | {case.bar} × |",
        flush=True,
    )


def added_by_merging(case: Case, folder: Path) -> None:
    """Memory of a merge guided by LEWIS, in the process that calibrated with torch."""
    config = yaml.safe_load(write_config(folder, case).read_text())
    texts = [{"text": f"{number} plus {number} is {2 * number}."} for number in range(64)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    calibration = {"dataset": str(folder / "texts.jsonl"), "text": "{text}", "samples": 64}
    for model in config["models"]:
        del model["parameters"]
    recipe = config | {"guide": {"name": "lewis", "calibration": calibration}}
    (folder / "guided.yaml").write_text(json.dumps(recipe))
    output = folder / "guided"
    command = [sys.executable, *WITH_KERNELS, "merge", str(folder / "guided.yaml"), "--no-eval"]
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
    parser.add_argument("--plain", action="store_true", help="ours without llvmlite")
    parser.add_argument("--guided", action="store_true", help="memory beside calibration's")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made [a temporary]")
    asked = parser.parse_args()
    if not asked.guided:
        print("| case | mergekit | its peak | lewis-hub | its peak | first run | ratio | bar |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(dir=asked.folder) as made:
        built: tuple[int, int] | None = None
        for name in asked.cases:
            case = CASES[name]
            if built is None or built[0] != case.n_blocks or built[1] < case.n_experts:
                shutil.rmtree(made)
                asked_for = (Path(made), case.n_blocks, case.n_experts)
                builder = multiprocessing.get_context("spawn").Process(target=build, args=asked_for)
                builder.start()
                builder.join()
                built = case.n_blocks, case.n_experts
            if asked.guided:
                added_by_merging(case, Path(made))
                continue
            measure(case, Path(made), asked.mergekit, PLAIN if asked.plain else WITH_KERNELS)


if __name__ == "__main__":
    main()
