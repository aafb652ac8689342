"""Scores of `reproduce.py`: tasks of lm-eval; GLUE by answers in words, or by heads."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from reproduce_suites import GLUE, Setting, Suite
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import lewis_hub
from lewis_hub.workflow.resources import Execution

SPLITS = {"mnli": "validation_matched"}  # the others: validation
COLUMNS = {  # texts of a classification head, in order
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
}
BATCH = 32
MAX_ANSWER = 10  # tokens

Heads = Mapping[str, Path]  # task -> folder of the expert


@dataclass(frozen=True)
class Scoring:
    """How models are scored.

    Attributes:
        limit: first items of each task; None: all.
        heads: for `glue-heads`.
        include: folder of own task files of lm-eval.
        revision: of GLUE.
    """

    suite: Suite
    execution: Execution
    limit: int | None = None
    heads: Heads | None = None
    include: str | None = None
    revision: str | None = None

    def of(self, folder: Path | str, tasks: Mapping[str, str]) -> dict[str, float]:
        """Task -> score of the model in a folder."""
        if self.suite.scoring == "lm-eval":
            return self.by_lm_eval(folder, tasks)
        by_task: Callable[[Path, str], float] = (
            self._by_words if self.suite.scoring == "glue-text" else self._by_head
        )
        return {task: by_task(Path(folder), task) for task in tasks}

    def by_lm_eval(self, folder: Path | str, tasks: Mapping[str, str]) -> dict[str, float]:
        """The metric of each task, by name or by name and filter."""
        asked = lewis_hub.Evaluation(tasks=tuple(tasks), include=self.include, limit=self.limit)
        scores = lewis_hub.evaluate_model(str(folder), asked, self.execution, progress=False)
        return {task: _metric(scores.tasks[task], wanted) for task, wanted in tasks.items()}

    def _by_words(self, folder: Path, task: str) -> float:
        """Exact match of greedy answers."""
        templates = glue_templates()[task]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval().to(self.execution.device)
        right = n = 0
        for rows in _batches(self._items(task)):
            asked = [templates["input_text"].format(**row) for row in rows]
            given = tokenizer(asked, return_tensors="pt", padding=True, truncation=True)
            with torch.inference_mode():
                told = model.generate(
                    **given.to(model.device), max_new_tokens=MAX_ANSWER, do_sample=False
                )
            answers = tokenizer.batch_decode(told, skip_special_tokens=True)
            wanted = [templates["target_text"][str(row["label"])] for row in rows]
            right += sum(a.strip() == w for a, w in zip(answers, wanted, strict=True))
            n += len(rows)
        return float(right / n)

    def _by_head(self, folder: Path, task: str) -> float:
        """Accuracy of the merged body under the head of the task's expert."""
        assert self.heads
        tokenizer = AutoTokenizer.from_pretrained(self.heads[task])
        body = AutoModel.from_pretrained(folder).eval().to(self.execution.device)
        expert = AutoModelForSequenceClassification.from_pretrained(self.heads[task])
        head, right, n = expert.score.weight.detach().to(body.device), 0, 0
        for rows in _batches(self._items(task)):
            for row in rows:
                ids = tokenizer(*(row[c] for c in COLUMNS[task]), truncation=True)["input_ids"]
                with torch.inference_mode():
                    given = torch.tensor([ids], device=body.device)
                    last: Tensor = body(input_ids=given).last_hidden_state[0, -1]
                right += int(int((head.to(last.dtype) @ last).argmax()) == row["label"])
            n += len(rows)
        return right / n

    def _items(self, task: str) -> list[dict[str, Any]]:
        from datasets import load_dataset

        rows = load_dataset(
            GLUE, task, split=SPLITS.get(task, "validation"), revision=self.revision
        )
        return list(rows.select(range(min(self.limit, len(rows)))) if self.limit else rows)


def glue_templates() -> Mapping[str, Mapping[str, Any]]:
    """Prompts and answers that the experts were trained on, read from the package fusion-bench.

    Only this file of the package is run, so that its dependencies are not needed.
    """
    found = find_spec("fusion_bench")
    assert found
    assert found.submodule_search_locations
    folder = Path(next(iter(found.submodule_search_locations)))
    file = folder / "tasks" / "flan_t5_text_generation" / "glue_prompt_templates.py"
    templates: Mapping[str, Mapping[str, Any]] = runpy.run_path(str(file))["glue_prompt_templates"]
    return templates


def own_tasks(setting: Setting) -> list[str]:
    """Experts whose names are tasks: each can be scored on its own."""
    return [name for name in setting.experts if name in setting.tasks]


def _batches(rows: Sequence[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    return (rows[n : n + BATCH] for n in range(0, len(rows), BATCH))


def _metric(task: Any, wanted: str) -> float:
    metrics = next(iter(task.models.values()))
    for name, metric in metrics.items():
        if wanted in (name, name.partition(",")[0]):
            return float(metric.value)
    raise SystemExit(f"no metric {wanted} among {', '.join(metrics)}: correct the suite's file")
