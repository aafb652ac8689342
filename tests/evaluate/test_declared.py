"""A gate on a metric that a task cannot have is refused from the task's file alone."""

import pytest

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.tasks import TaskSelection, require_metric

FILES = {
    "sums": "task: sums\ntag: numbers\noutput_type: generate_until\n"
    "metric_list: [{metric: exact_match}, {metric: acc}]\n"
    "filter_list: [{name: strict, filter: []}, {name: flexible, filter: []}]\n",
    "plain": "task: plain\noutput_type: multiple_choice\n",
    "coded": "task: coded\nprocess_results: !function own.results\nmetric_list: [{metric: a}]\n",
    "group": "group: all\ntask: [sums]\n",
    "mean": "group: mean\ntask: [sums]\n"
    "aggregate_metric_list: [{metric: acc, filter_list: [none]}]\n",
}


NAMES = ("exact_match", "acc", "acc_norm", "bleu", "a")


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


KNOWN = {  # task -> every metric that it has
    "sums": {"exact_match,strict", "exact_match,flexible", "acc,strict", "acc,flexible"},
    "plain": {"acc,none", "acc_norm,none"},
    "mean": {"acc,none"},
}


def is_refused(selection, task, metric):
    try:
        require_metric(selection, task, metric)
    except EvaluationError:
        return True
    return False


@pytest.mark.parametrize("task", KNOWN)
def test_of_all_metrics_those_that_the_task_has_are_fine(folder, task):
    asked = {f"{name},{by}" for name in NAMES for by in ("none", "strict", "flexible")}

    fine = {m for m in asked if not is_refused(TaskSelection((task,), folder), task, m)}

    assert fine == KNOWN[task]


def test_of_a_task_that_scores_in_python_any_metric_may_be_meant(folder):
    selection = TaskSelection(("coded",), folder)

    assert not is_refused(selection, "coded", "whatever,none")
    assert not is_refused(selection, "coded", "a,strict")


@pytest.mark.parametrize(
    ("task", "metric", "message"),
    [
        (
            "sums",
            "exact_match,none",
            "sums: it has no metric `exact_match,none`.\n"
            "Did you mean `exact_match,flexible`? It has `exact_match,strict`, "
            "`exact_match,flexible`, `acc,strict`, `acc,flexible`.",
        ),
        (
            "plain",
            "bleu",
            "plain: it has no metric `bleu`.\nIt has `acc,none`, `acc_norm,none`.",
        ),
        (
            "mean",
            "acc,flexible",
            "mean: it has no metric `acc,flexible`.\nDid you mean `acc,none`? It has `acc,none`.",
        ),
        (
            "numbers",
            "acc,strict",
            "numbers: it is a tag, which has no scores of its own.\n"
            "Name one of its tasks, here and in `evaluate.tasks`.",
        ),
        (
            "all",
            "acc,strict",
            "all: it is a group without `aggregate_metric_list`, so it has no scores of its own.\n"
            "Name one of its tasks, here and in `evaluate.tasks`.",
        ),
    ],
)
def test_a_metric_that_the_task_cannot_have_is_refused(folder, task, metric, message):
    with pytest.raises(EvaluationError) as caught:
        require_metric(TaskSelection((task,), folder), task, metric)

    assert str(caught.value) == message


def test_gsm8k_has_the_metric_that_the_documents_show():
    selection = TaskSelection(("gsm8k",))

    assert not is_refused(selection, "gsm8k", "exact_match,flexible-extract")
    assert is_refused(selection, "gsm8k", "exact_match,none")
