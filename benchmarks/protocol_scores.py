"""Scores of PROTOCOL.md: an expert's items, general text, and abilities of the base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import puzzles
import torch
from answers import Text, fill, load, read_items, score, texts
from protocol_cells import Scores
from protocol_tasks import SMOKE, SPLITS, Family
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

import lewis_hub

N_ABILITY = 300  # first items of each lm-eval task
N_PRIMER = 20  # items of the smoke run's ability

PRIMER = """task: zoo_primer
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: " {{answer}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 9, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


class Scorer:
    """A family's model in memory, into which weights of merges are copied."""

    def __init__(
        self, family: Family, base: Path, items: Path, device: str, *, abilities: bool
    ) -> None:
        self.family, self.base, self.items, self.device = family, base, items, device
        self.abilities = tuple(family.abilities) if abilities else ()

    @cached_property
    def model(self) -> Any:
        return load(self.base, "float32", self.device)

    @cached_property
    def passages(self) -> torch.Tensor:
        """General text: topics of Python's own help, in equal passages; no expert saw them."""
        n, length = self.family.passages
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        whole = "\n".join(topics[name] for name in sorted(topics))[: 8 * n * length]
        tokens = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(tokens[: n * length]).view(n, length)

    def texts(self, task: str, split: str) -> list[Text]:
        return texts(self.base, read_items(self.items, task, split)[: SPLITS.get(split)])

    def tuned(self, folder: Path, tasks: Sequence[str]) -> float:
        """The sum over tasks of mean losses on tune items."""
        fill(self.model, folder)
        return sum(_mean(score(self.model, self.texts(t, "tune")).losses) for t in tasks)

    def of(self, folder: Path, tasks: Sequence[str], *, whole: bool = True) -> Scores:
        """All scores of a model on disk; `whole`: also those of general text and abilities."""
        fill(self.model, folder)
        found = {task: score(self.model, self.texts(task, "test")) for task in tasks}
        return Scores(
            {task: list(one.losses) for task, one in found.items()},
            {task: list(one.right) for task, one in found.items()},
            self._general() if whole else [],
            self._abilities(folder) if whole else {},
        )

    @torch.inference_mode()
    def _general(self) -> list[float]:
        told = []
        for passage in self.passages.to(self.device):
            logits = self.model(input_ids=passage[None], use_cache=False).logits[0, :-1]
            told.append(float(cross_entropy(logits, passage[1:])))
        return told

    def _abilities(self, folder: Path) -> dict[str, float]:
        """lm-eval's accuracy, or exact match, on the first items of each task."""
        if not self.abilities:
            return {}
        own = str(self._primer()) if self.family == SMOKE else None
        limit = N_PRIMER if own else N_ABILITY
        asked = lewis_hub.Evaluation(tasks=self.abilities, include=own, limit=limit)
        execution = lewis_hub.Execution(device=self.device)
        scores = lewis_hub.evaluate_model(folder, asked, execution, progress=False)
        return {name: _accuracy(scores.tasks[name]) for name in self.abilities}

    def _primer(self) -> Path:
        """A task of the zoo's base alone: puzzles that no expert is trained on."""
        folder = self.items / "primer"
        folder.mkdir(exist_ok=True)
        drawn = islice(puzzles.stream(None, 1), N_PRIMER)
        lines = (json.dumps({"question": i.question, "answer": i.answer}) + "\n" for i in drawn)
        file = folder / "primer.jsonl"
        file.write_text("".join(lines), encoding="utf-8")
        (folder / "zoo_primer.yaml").write_text(PRIMER.replace("FILE", str(file)), encoding="utf-8")
        return folder


def _accuracy(task: Any) -> float:
    metrics = next(iter(task.models.values()))
    for name, metric in metrics.items():
        if name.partition(",")[0] in ("acc", "exact_match"):
            return float(metric.value)
    raise SystemExit(f"no accuracy among {', '.join(metrics)}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
