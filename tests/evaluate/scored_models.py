"""The scores of a model on the own tasks of the tests."""

from __future__ import annotations

from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.benchmarks import load_tasks, with_prompts
from lewis_hub.evaluate.harness import evaluate_model
from lewis_hub.evaluate.tasks import TaskSelection


def result(own_tasks, folder, *tasks, **settings):
    """What a model has on ten items of each task."""
    asked = EvaluationSettings(**settings)
    loaded = load_tasks(TaskSelection(tasks, include=own_tasks), {})
    return evaluate_model(folder, with_prompts(loaded, 10, asked), asked, lambda _: None)
