"""What guidance gains: merges of two experts, by the answer loss of both skills, item by item.

    python benchmarks/guidance.py MODELS DATA [--split test] [--items 250] [--only NAME ...]

MODELS holds `base`, `expert-math` and `expert-strings`; DATA holds `math_train.jsonl`,
`math_test.jsonl` and so on, of questions and answers. Each expert is calibrated on 64 of its own
training items in the prompt format of the test. The answer loss of an item is the mean negative
log-likelihood of its answer's tokens and of the end after them. Every merge is made by
`lewis_hub.merge_models`. Where many share a machine, OMP_NUM_THREADS=1 is quicker.

A row's t is that of the paired difference to its twin, the merge in its column `against`: negative
where the row is better.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lewis_hub

SKILLS = ("math", "strings")
PROMPT, TEXT = "Question: {question}\nAnswer:", "Question: {question}\nAnswer: {answer}"
N_CALIBRATED = 64
BATCH = 25

Losses = Mapping[str, Sequence[float]]  # skill -> of each item


@dataclass(frozen=True)
class Variant:
    """One merge: the recipe's words for it, and the variant that it has to beat."""

    name: str
    method: str
    parameters: Mapping[str, object]
    guide: Mapping[str, object] | None = None
    against: str | None = None

    def recipe(self, models: Path, data: Path) -> dict[str, object]:
        experts = [
            {
                "model": str(models / f"expert-{skill}"),
                "calibration": {
                    "dataset": str(data / f"{skill}_train.jsonl"),
                    "text": TEXT,
                    "samples": N_CALIBRATED,
                },
            }
            for skill in SKILLS
        ]
        return {
            "base_model": str(models / "base"),
            "models": experts,
            "merge_method": self.method,
            "parameters": dict(self.parameters),
            "dtype": "float32",
        } | ({"guide": dict(self.guide)} if self.guide else {})


LEWIS = {"name": "lewis", "gamma": 0.3, "epsilon": 0.8}
UNIFORM = {"name": "uniform", "gamma": 0.3, "epsilon": 0.8}
VARIANTS = (
    Variant("task arithmetic 0.7", "task_arithmetic", {"weight": 0.7}),
    Variant("regmean 0.5", "regmean", {}, against="task arithmetic 0.7"),
    Variant("ties 0.5", "ties", {"density": 0.5}),
    Variant("ties 0.05", "ties", {"density": 0.05}),
    Variant(
        "ties 0.05 by activation",
        "ties",
        {"density": 0.05, "trim": "activation"},
        against="ties 0.05",
    ),
    Variant("task arithmetic 1.0", "task_arithmetic", {"weight": 1.0}),
    Variant("task arithmetic 0.5", "task_arithmetic", {"weight": 0.5}),
    Variant("regmean 0", "regmean", {"off_diagonal": 0.0}, against="task arithmetic 0.7"),
    Variant("regmean 0.9", "regmean", {"off_diagonal": 0.9}, against="task arithmetic 0.7"),
    Variant("regmean 0.5 uniform", "regmean", {}, UNIFORM, against="task arithmetic 0.7"),
    Variant("regmean 0.5 lewis", "regmean", {}, LEWIS, against="regmean 0.5 uniform"),
)


def main() -> None:
    asked = _arguments()
    chosen = [v for v in VARIANTS if not asked.only or v.name in asked.only]
    items = {skill: _items(asked.data, skill, asked.split, asked.items) for skill in SKILLS}
    alone: dict[str, Sequence[float]] = {}
    for skill in SKILLS:
        alone |= answer_losses(asked.models / f"expert-{skill}", {skill: items[skill]})
    found: dict[str, Losses] = {"experts alone": alone}
    print("| merge | seconds | " + " | ".join(SKILLS) + " | against | t | ")
    print("|---|---:|" + "---:|" * len(SKILLS) + "---|---:|")
    print(_row("experts alone", 0.0, alone, None, None), flush=True)
    for variant in chosen:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            merged = _merged(variant, asked, Path(folder))
            seconds = time.perf_counter() - started
            found[variant.name] = answer_losses(merged, items)
        twin = found.get(variant.against or "")
        print(_row(variant.name, seconds, found[variant.name], variant.against, twin), flush=True)


def answer_losses(folder: Path, items: Mapping[str, Sequence[Mapping[str, str]]]) -> Losses:
    """The mean negative log-likelihood of each item's answer and end, given the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = {}
    for skill, told in items.items():
        losses[skill] = [
            loss
            for first in range(0, len(told), BATCH)
            for loss in _of_batch(model, tokenizer, told[first : first + BATCH])
        ]
    return losses


def _of_batch(model, tokenizer, items) -> list[float]:  # type: ignore[no-untyped-def]
    prompts = [len(tokenizer(PROMPT.format(**item))["input_ids"]) for item in items]
    texts = [TEXT.format(**item) + tokenizer.eos_token for item in items]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, ids))
    rows = torch.tensor([one + [0] * (longest - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
    losses = []
    with torch.no_grad():
        hidden = model.base_model(input_ids=rows, attention_mask=mask).last_hidden_state
        for row, start, one in zip(hidden, prompts, ids, strict=True):
            scores = model.lm_head(row[start - 1 : len(one) - 1]).log_softmax(-1)
            losses.append(-float(scores.gather(1, torch.tensor(one[start:])[:, None]).mean()))
    return losses


def _merged(variant: Variant, asked: argparse.Namespace, folder: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(variant.recipe(asked.models.resolve(), asked.data.resolve())))
    return lewis_hub.merge_models(lewis_hub.read_recipe(file), folder / "merged").output


def _items(data: Path, skill: str, split: str, n: int) -> list[dict[str, str]]:
    lines = (data / f"{skill}_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:n]]


def _row(
    name: str, seconds: float, losses: Losses, against: str | None, twin: Losses | None
) -> str:
    means = [f"{statistics.fmean(losses[skill]):.3f}" for skill in SKILLS]
    t = " / ".join(f"{paired_t(losses[s], twin[s]):+.1f}" for s in SKILLS) if twin else ""
    cells = [name, f"{seconds:.0f}" if seconds else "", *means, against or "", t]
    return f"| {' | '.join(cells)} |"


def paired_t(first: Sequence[float], second: Sequence[float]) -> float:
    """Student's t of the differences, item by item."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    spread = statistics.stdev(differences)
    return statistics.fmean(differences) / (spread / math.sqrt(len(differences)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--items", type=int, default=250)
    parser.add_argument("--only", nargs="*", default=())
    return parser.parse_args()


if __name__ == "__main__":
    main()
