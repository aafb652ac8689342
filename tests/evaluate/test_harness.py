from __future__ import annotations

from pathlib import Path

import pytest

from lewis_hub.evaluate.benchmarks import Benchmarks, load_tasks
from lewis_hub.evaluate.harness import EvaluationSettings, evaluate_model
from lewis_hub.evaluate.results import ModelResult
from lewis_hub.evaluate.tasks import TaskSelection


@pytest.fixture(scope="module")
def benchmarks(own_tasks: Path) -> Benchmarks:
    return load_tasks(TaskSelection(("both",), include=own_tasks))


@pytest.fixture(scope="module")
def good(benchmarks: Benchmarks, good_model: Path) -> ModelResult:
    return run(good_model, benchmarks)


@pytest.fixture(scope="module")
def poor(benchmarks: Benchmarks, poor_model: Path) -> ModelResult:
    return run(poor_model, benchmarks)


def run(folder: Path, benchmarks: Benchmarks) -> ModelResult:
    return evaluate_model(folder, benchmarks, EvaluationSettings(), lambda _: None)


def test_a_model_that_counts_right_scores_one_on_both_tasks(good):
    assert good.tasks["after"].metrics["exact_match,none"].value == 1.0
    assert good.tasks["choose"].metrics["acc,none"].value == 1.0
    assert good.tasks["choose"].metrics["mcc,none"].value == 1.0


def test_each_item_has_the_value_that_the_model_was_made_to_give(poor):
    right_after_zero_only = (1.0, *[0.0] * 9) * 2

    assert poor.tasks["after"].metrics["exact_match,none"].values == right_after_zero_only
    assert poor.tasks["choose"].metrics["acc,none"].values == right_after_zero_only
    assert poor.tasks["after"].metrics["exact_match,none"].value == 0.1
