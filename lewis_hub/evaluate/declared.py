"""Which metrics a task's file declares, so that a gate on another one is refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.gate import unknown_metric
from lewis_hub.evaluate.task_files import Function, TaskFile
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks

NO_FILTER = "none"
BY_OUTPUT = {  # what lm-eval scores where a file names no metrics
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
}


def require_metric(selection: TaskSelection, task: str, metric: str) -> None:
    """Refuse a metric (`name,filter`) that the task cannot have; nothing is run or downloaded.

    Files that leave their metrics to Python code tell them only once they have run.

    Raises:
        EvaluationError: the task is a tag, a group without scores of its own, or has no such
            metric.
    """
    located = locate_tasks(selection)
    file = next((file for file in located.files if file.name == task), None)
    if file is None:
        problem = "it is a tag, which has no scores of its own."
        raise EvaluationError(task, problem, "Name one of its tasks, here and in `evaluate.tasks`.")
    if file.is_group and not _listed(file.config, "aggregate_metric_list"):
        problem = "it is a group without `aggregate_metric_list`, so it has no scores of its own."
        raise EvaluationError(task, problem, "Name one of its tasks, here and in `evaluate.tasks`.")
    known = _declared(file)
    if known is not None and metric not in known:
        raise unknown_metric(task, metric, known)


def _declared(file: TaskFile) -> list[str] | None:
    """Every `metric,filter`; None where only running the task tells."""
    config = file.config
    if file.is_group:
        entries = _listed(config, "aggregate_metric_list")
        if not all("filter_list" in entry for entry in entries):
            return None  # lm-eval looks for filters among the results
        return [f"{one['metric']},{name}" for one in entries for name in _names(one["filter_list"])]
    entries = _listed(config, "metric_list")
    in_code = any(isinstance(entry.get("metric"), Function) for entry in entries)
    if in_code or any(entry.get("hf_evaluate") for entry in entries):
        return None
    if "class" in config or config.get("process_results") is not None:
        return None
    default = BY_OUTPUT.get(str(config.get("output_type", "generate_until")), ())
    metrics = [str(entry["metric"]) for entry in entries if "metric" in entry] or default
    filters = [str(one.get("name")) for one in _listed(config, "filter_list")] or [NO_FILTER]
    return [f"{metric},{name}" for metric in metrics for name in filters]


def _listed(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = config.get(key)
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, Mapping)]


def _names(value: Any) -> list[str]:
    return [str(name) for name in (value if isinstance(value, list) else [value])]
