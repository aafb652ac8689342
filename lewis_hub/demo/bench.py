"""Compare the time and memory of a merge with those of an installed mergekit, on this machine.

Both programs run as whole processes, in turns, on the same mergekit configuration and on local
Llama-shaped bfloat16 checkpoints, which are read into the page cache before each run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import Any

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import MergeError
from lewis_hub.files import require_room
from lewis_hub.system import peak_if_ended

VOCABULARY, HEAD_SIZE = 32_000, 64
LEWIS_HUB = (sys.executable, "-m", "lewis_hub")
POLL_S = 0.005
DENSITIES = {"self_attn": 0.3, "gate_proj": 0.5, "up_proj": 0.6, "down_proj": 0.8}


@dataclass(frozen=True)
class Case:
    """A merge of Llama models; `hidden_size` is a multiple of 64."""

    hidden_size: int
    n_blocks: int
    method: str
    n_experts: int

    @property
    def intermediate_size(self) -> int:
        """The width of the MLP."""
        return self.hidden_size * 8 // 3

    @property
    def n_parameters(self) -> int:
        """Of each model."""
        hidden = self.hidden_size
        block = 4 * hidden**2 + 3 * hidden * self.intermediate_size + 2 * hidden
        return 2 * VOCABULARY * hidden + self.n_blocks * block + hidden

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.n_parameters / 1e9:.1f} B, {self.method}, {self.n_experts} experts"


@dataclass(frozen=True)
class Usage:
    """Wall time of a process and the peak of its resident memory."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Timing:
    """The figures of a case: our first run, which also hashes the sources, and medians."""

    case: Case
    first: Usage
    ours: Usage
    mergekit: Usage | None

    @property
    def ratio(self) -> float | None:
        """The time of mergekit over ours."""
        return self.mergekit.seconds / self.ours.seconds if self.mergekit else None

    def to_json(self) -> dict[str, Any]:
        """For the document of `--json`."""
        return {**asdict(self), "n_parameters": self.case.n_parameters, "ratio": self.ratio}


def cases(hidden_size: int, n_blocks: int) -> dict[str, Case]:
    """The six cases of the benchmark; the large one has 39 blocks where the others have 14."""
    return {
        "ties": Case(hidden_size, n_blocks, "ties", 2),
        "dare": Case(hidden_size, n_blocks, "dare_ties", 2),
        "della": Case(hidden_size, n_blocks, "della", 2),
        "linear": Case(hidden_size, n_blocks, "linear", 2),
        "many": Case(hidden_size, n_blocks, "ties", 8),
        "large": Case(hidden_size, round(n_blocks * 39 / 14), "ties", 2),
    }


def measure_cases(
    chosen: Iterable[Case],
    folder: Path,
    mergekit: str | None,
    n_runs: int,
    program: Sequence[str] = LEWIS_HUB,
) -> Iterator[Timing]:
    """Run both programs in turns, each `n_runs` times.

    Args:
        chosen: the merges.
        folder: for checkpoints and outputs; its `models` folder is replaced.
        mergekit: the path of `mergekit-yaml`; None: only lewis-hub runs.
        n_runs: the medians of so many runs are taken.
        program: the command that starts lewis-hub.

    Raises:
        MergeError: a program failed.
        OutputError: the disk has no room for the checkpoints.
    """
    compiled = False
    for case in with_models(chosen, folder):
        config, output = write_config(folder, case), folder / "output"
        our_command = [*program, "merge", str(config), "--no-eval", "-q", "-o", str(output)]
        commands = [our_command]
        if mergekit:
            commands += [[mergekit, "--out-shard-size", "500M", str(config), str(output)]]
        first = run(our_command, output)
        if mergekit and not compiled:
            run(commands[1], output)
            compiled = True
        runs = [[run(command, output) for command in commands] for _ in range(n_runs)]
        ours, *others = (_median(of_one) for of_one in zip(*runs, strict=True))
        yield Timing(case, first, ours, others[0] if others else None)


def _median(runs: Sequence[Usage]) -> Usage:
    seconds, peaks = median(run.seconds for run in runs), median(run.peak_bytes for run in runs)
    return Usage(seconds, round(peaks))


def with_models(chosen: Iterable[Case], folder: Path) -> Iterator[Case]:
    """Yield each case when its checkpoints are in `folder`."""
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    built: Case | None = None
    for case in chosen:
        is_same_size = built is not None and built.n_parameters == case.n_parameters
        if built is None or not is_same_size or built.n_experts < case.n_experts:
            shutil.rmtree(folder / "models", ignore_errors=True)
            n_bytes = 2 * case.n_parameters * (case.n_experts + 2)  # the output among them
            require_room(folder, n_bytes, "the checkpoints", "choose a smaller size")
            # in a process of its own: a child's peak memory starts at that of its parent
            builder = spawn.Process(target=build_models, args=(folder / "models", case))
            builder.start()
            builder.join()
            built = case
        yield case


def build_models(folder: Path, case: Case) -> None:
    """Write a base and experts with random weights; the task vectors are small."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_hidden_layers=case.n_blocks,
        num_attention_heads=case.hidden_size // HEAD_SIZE,
    )
    for number in range(case.n_experts + 1):
        torch.manual_seed(0)  # the same base each time, so that one model is in memory
        model = LlamaForCausalLM(config).requires_grad_(requires_grad=False)
        torch.manual_seed(number)
        for weight in model.parameters() if number else ():
            weight.add_(torch.randn_like(weight), alpha=0.001)
        model.bfloat16().save_pretrained(folder / str(number))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(zoo_folder() / "base" / file, folder / str(number) / file)


def write_config(folder: Path, case: Case) -> Path:
    """Write the mergekit configuration of a case, as JSON, which is YAML too."""
    parameters: dict[str, object] = {"weight": 0.5}
    if case.method != "linear":
        density = [{"filter": name, "value": value} for name, value in DENSITIES.items()]
        parameters["density"] = [*density, {"value": 1.0}]
    base, *experts = (str(folder / "models" / str(n)) for n in range(case.n_experts + 1))
    names = [base, *experts[:-1]] if case.method == "linear" else experts
    config = {
        "models": [{"model": name, "parameters": parameters} for name in names],
        "merge_method": case.method,
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }
    if case.method != "linear":
        config["base_model"] = base
    path = folder / f"{case.method}-{case.n_experts}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8", newline="\n")
    return path


def run(command: Sequence[str], output: Path) -> Usage:
    """Run a process that writes `output`, and remove what it wrote.

    Raises:
        MergeError: it failed.
    """
    shutil.rmtree(output, ignore_errors=True)
    for file in output.parent.glob("models/*/*.safetensors"):
        with file.open("rb", buffering=0) as weights:  # into the page cache
            while weights.read(1 << 24):
                pass
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"HF_HOME": str(output.parent / "hf-home"), "HF_HUB_OFFLINE": "1"}
    start, peak_bytes = time.perf_counter(), 0
    with TemporaryFile() as messages:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=messages, env=environment
        )
        last_peak = None
        while last_peak is None:
            time.sleep(POLL_S)
            # Each stage of a merge resets the peak that the system counts.
            peak_bytes = max(peak_bytes, _peak_bytes(process.pid))
            last_peak = peak_if_ended(process)
        seconds = time.perf_counter() - start
        messages.seek(0)
        told = messages.read().decode(errors="replace")
    if process.returncode:
        problem = f"it failed with exit code {process.returncode}: {told[-2000:].strip()}"
        raise MergeError(command[0], problem, "Run it by hand on a configuration of your own.")
    shutil.rmtree(output, ignore_errors=True)
    return Usage(seconds, max(peak_bytes, last_peak))


def _peak_bytes(process_id: int) -> int:
    """The peak of the resident memory of a process; 0 if the system does not tell."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    _, _, peak = status.partition("VmHWM:")
    return int(peak.split()[0]) * 1024 if peak else 0
