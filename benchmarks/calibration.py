"""The cost of calibration, compared with the authors' procedure and with a plain forward pass.

    python benchmarks/calibration.py [--models MODELS] [--data DATA] [--cases CASE ...]

MODELS contains `base`, `expert-math` and `expert-strings` of SmolLM2-135M; without it, the cases
with these models are skipped. DATA contains `skills/math_train.jsonl`, `skills/strings_train.jsonl`
and `gsm8k/train.jsonl`; without it, GSM8K is downloaded from the Hub. The model of 0.5 B parameters
is that of `merge.py`, with a tokenizer of 8,000 tokens, trained on GSM8K.

The first table compares whole processes, run in turns, on a base and one expert. Ours is `lewis-hub
importance` with the guide `lewis`, which also checks the recipe, samples the texts and draws plots.
The authors' is `published.py`, which loads, measures and writes numbers. Ours runs once in advance,
to compile the kernels and to hash the sources.

The second table is about the pass alone (`passes.py`): from models on the disk to importance,
compared with a plain forward pass over the same batches, with and without loading the models.

The numbers are medians of three runs; peaks are resident memory. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge import build, run

N_BLOCKS = 14  # of the model of 0.5 B parameters
N_LEARNT = 8000  # tokens of its tokenizer
N_LONGEST = 512  # tokens of a text
BARS = "at least 5 ×, at most 0.6 ×, at most 1.15 ×"
GENERIC, OWN = "{question} {answer}", "Question: {question}\nAnswer: {answer}"


@dataclass(frozen=True)
class Case:
    """Models and texts.

    Attributes:
        expert: folder in MODELS, beside `base`; None for the model of 0.5 B parameters.
        file: path in DATA.
        text: template for a row of the file.
    """

    name: str
    expert: str | None
    file: str
    text: str
    n_texts: int


GSM8K = "gsm8k/train.jsonl"
CASES = {
    "math": Case("135 M, own texts", "expert-math", "skills/math_train.jsonl", OWN, 64),
    "strings": Case("135 M, own texts", "expert-strings", "skills/strings_train.jsonl", OWN, 64),
    "gsm8k": Case("135 M, GSM8K", "expert-math", GSM8K, GENERIC, 15),
    "large": Case("0.5 B, GSM8K", None, GSM8K, GENERIC, 15),
}


def rows(data: Path | None, file: str) -> Iterator[dict[str, str]]:
    if data:
        for line in (data / file).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
    else:
        from datasets import load_dataset

        yield from load_dataset("openai/gsm8k", "main", split="train")


def prepare(case: Case, data: Path | None, folder: Path) -> None:
    """Write the texts, and create the model of 0.5 B parameters."""
    found = [case.text.format(**row) for row in rows(data, case.file)]
    lines = [json.dumps({"text": text}) for text in found[: case.n_texts]]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if case.expert is None:
        build(folder / "models", N_BLOCKS, 1)
        for source in (folder / "models").iterdir():
            learn(found, source)


def learn(texts: Sequence[str], folder: Path) -> None:
    """Train a tokenizer: byte-level BPE with separate digits."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pieces]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=N_LEARNT,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def write_recipe(folder: Path, models: Sequence[Path]) -> Path:
    calibration = {"dataset": str(folder / "texts.jsonl"), "text": "{text}"}
    n_texts = len((folder / "texts.jsonl").read_text(encoding="utf-8").splitlines())
    recipe = {
        "base_model": str(models[0]),
        "models": [{"model": str(expert)} for expert in models[1:]],
        "merge_method": "ties",
        "guide": {
            "name": "lewis",
            "calibration": calibration | {"samples": n_texts, "max_tokens": N_LONGEST},
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return file


def timed(side: str, texts: Path, models: Sequence[Path]) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).with_name("passes.py")), side, str(texts)]
    command += map(str, models)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def median(found: Sequence[Any]) -> float:
    return statistics.median(found)


def measure(case: Case, models: Sequence[Path], folder: Path, n_runs: int) -> tuple[str, str]:
    """Measure one row of each table."""
    texts, output = folder / "texts.jsonl", folder / "output"
    ours = [sys.executable, "-m", "lewis_hub", "importance", str(write_recipe(folder, models))]
    ours += ["-q", "-o"]
    theirs = [sys.executable, str(Path(__file__).with_name("published.py")), str(texts)]
    theirs += map(str, models)
    run(ours, output)
    whole, alone = [], []
    for _ in range(n_runs):
        whole.append((*run(theirs, output), *run(ours, output)))
        alone.append(timed("plain", texts, models) | timed("lewis", texts, models))
    their_s, their_mb, our_s, our_mb = (median([one[i] for one in whole]) for i in range(4))
    load_s, forward_s, pass_s = (
        median([one[name] for one in alone]) for name in ("load_s", "forward_s", "pass_s")
    )
    name = f"{case.name}, {case.n_texts} texts, {alone[0]['n_tokens']:,} tokens"
    return (
        f"| {name} | {their_s:.1f} s | {their_mb:,.0f} MB | {our_s:.1f} s | {our_mb:,.0f} MB"
        f" | {their_s / our_s:.1f} × | {our_mb / their_mb:.2f} × |",
        f"| {name} | {load_s:.2f} s | {forward_s:.2f} s | {pass_s:.2f} s"
        f" | {pass_s / (load_s + forward_s):.2f} × | {pass_s / forward_s:.2f} × |",
    )


def lines_of(
    case: Case, models: Path | None, data: Path | None, n_runs: int, made: Path | None
) -> tuple[str, str]:
    with tempfile.TemporaryDirectory(dir=made) as folder:
        here = Path(folder)
        # in a process of its own: a child's peak memory begins at its parent's
        preparing = multiprocessing.get_context("spawn").Process(
            target=prepare, args=(case, data, here)
        )
        preparing.start()
        preparing.join()
        if preparing.exitcode:
            raise SystemExit(f"{case.name}: the models or texts could not be made")
        own = [here / "models" / f"source-{i}" for i in range(2)]
        lab = [models / name for name in ("base", case.expert)] if models and case.expert else own
        return measure(case, lab, here, n_runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, help="folder with `base` and experts")
    parser.add_argument("--data", type=Path, help="folder with texts")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", type=int, default=3, help="of which the medians are told [3]")
    parser.add_argument("--folder", type=Path, help="where all else is made [a temporary]")
    asked = parser.parse_args()
    models = asked.models.resolve() if asked.models else None
    data = asked.data.resolve() if asked.data else None
    cases = [CASES[name] for name in asked.cases]
    chosen = [
        one for one in cases if one.expert is None or (models and (data or one.file == GSM8K))
    ]
    print("| case | authors' procedure | its peak | `lewis` | its peak | faster | memory |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    alone = []
    for case in chosen:
        whole, of_pass = lines_of(case, models, data, asked.runs, asked.folder)
        alone.append(of_pass)
        print(whole, flush=True)
    print("\n| case | loading | plain forward | pass | with loading | without |")
    print("|---|---:|---:|---:|---:|---:|")
    print("\n".join(alone))
    print(f"\nAims: {BARS}.")
    if len(chosen) < len(cases):
        print("Without --models and --data the other cases were left out.")


if __name__ == "__main__":
    main()
