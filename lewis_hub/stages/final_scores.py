"""The tuned recipe beside the one that the search began with, on items that it never saw."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lewis_hub.evaluate.answer_loss import NAME, AnswerLoss, answer_losses, metric
from lewis_hub.evaluate.chat import chat_of
from lewis_hub.evaluate.compare import compare
from lewis_hub.evaluate.harness import load
from lewis_hub.evaluate.items import scored_questions
from lewis_hub.evaluate.results import ModelResult
from lewis_hub.evaluate.scores import Scores
from lewis_hub.guides.tokens import load_tokenizer
from lewis_hub.stages.evaluation import Candidate, Run, score, settings_of
from lewis_hub.stages.execution import Step
from lewis_hub.stages.merging import MergedModel


def score_both(step: Step, models: Mapping[str, MergedModel], scratch: Path) -> Scores:
    """Score models as the recipe's `evaluate` says, their answer loss among the metrics.

    Args:
        step: of a recipe with `evaluate`.
        models: label -> model; `merged` is tested against each of the others.
        scratch: for results.
    """
    asked = step.recipe.evaluate
    assert asked
    settings = settings_of(asked, step.execution.device)
    run = Run(step.scored, asked.limit, settings, scratch / "scored")
    candidates = [Candidate(label, one.identity, one.folder) for label, one in models.items()]
    results = dict(score(candidates, run, step.progress))
    merged = models["merged"].folder  # all have its tokenizer
    chat = chat_of(load_tokenizer(str(merged), "merged")) if asked.chat_template else None
    questions = scored_questions(step.scored, asked.limit, chat)
    n_items = len(models) * sum(map(len, questions.values()))
    with step.progress.stage("Scoring right answers", n_items, "items") as advance:
        for label, one in models.items():
            lm = load(one.folder, settings)
            losses = {task: answer_losses(lm, some, advance) for task, some in questions.items()}
            results[label] = _with_losses(results[label], losses)
            del lm
            gc.collect()  # one model in memory at a time
    return compare(results)


def _with_losses(result: ModelResult, losses: Mapping[str, Sequence[AnswerLoss]]) -> ModelResult:
    tasks = dict(result.tasks)
    for name, found in losses.items():
        metrics = {**tasks[name].metrics, NAME: metric(found)}
        tasks[name] = replace(tasks[name], metrics=metrics)
    return ModelResult(tasks)
