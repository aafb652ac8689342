"""Several models' results side by side, and the merged one tested against each of the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.paired import Comparison, compare_items, holm
from lewis_hub.evaluate.results import MetricResult, ModelResult, TaskResult
from lewis_hub.evaluate.scores import MetricScore, PairedTest, Scores, TaskScores

SEED = 42  # of the paired bootstrap: the same items give the same interval


def compare(results: Mapping[str, ModelResult]) -> Scores:
    """Put the models side by side; where one is `merged`, test it against each of the others.

    Raises:
        EvaluationError: two models did not answer the same items of the same tasks.
    """
    reference_label, reference = next(iter(results.items()))
    for label, result in results.items():
        _check_same_items(reference_label, reference, label, result)
    tests = _adjusted(list(_paired_tests(results)))
    return Scores(
        {
            name: TaskScores(
                n=len(task.documents),
                version=task.version,
                models={
                    label: _metric_scores(result.tasks[name]) for label, result in results.items()
                },
                paired=tuple(test for task_name, test in tests if task_name == name),
            )
            for name, task in reference.tasks.items()
        }
    )


def _metric_scores(task: TaskResult) -> dict[str, MetricScore]:
    """A task that does not say which way is better means the higher one."""
    return {
        key: MetricScore(metric.value, metric.stderr, metric.higher_is_better is not False)
        for key, metric in task.metrics.items()
    }


def _check_same_items(
    reference_label: str, reference: ModelResult, label: str, result: ModelResult
) -> None:
    if result.tasks.keys() != reference.tasks.keys():
        problem = (
            f"{reference_label} was scored on {', '.join(sorted(reference.tasks))}; "
            f"{label} on {', '.join(sorted(result.tasks))}."
        )
        raise EvaluationError("compare", problem, "Evaluate both on the same tasks.")
    for name, task in reference.tasks.items():
        other = result.tasks[name]
        if (task.version, task.documents) == (other.version, other.documents):
            continue
        same = len(set(task.documents) & set(other.documents))
        problem = (
            f"{reference_label} and {label} did not answer the same items: "
            f"{len(task.documents)} of version {task.version} against "
            f"{len(other.documents)} of version {other.version}, {same} in common."
        )
        raise EvaluationError(name, problem, "Evaluate both again with one version and one limit.")


def _paired_tests(results: Mapping[str, ModelResult]) -> Iterator[tuple[str, PairedTest]]:
    """(task, test) for each metric that is a mean over items, unadjusted."""
    merged = results.get("merged", ModelResult({}))
    for label, other in results.items():
        if label == "merged":
            continue
        for name, task in merged.tasks.items():
            for key, metric in task.metrics.items():
                rival = other.tasks[name].metrics.get(key)
                found = paired(metric, rival) if rival else None
                if found:
                    yield (
                        name,
                        PairedTest(
                            key, label, found.difference, found.ci95, p=found.p, p_holm=found.p
                        ),
                    )


def paired(mine: MetricResult, theirs: MetricResult) -> Comparison | None:
    """Test two results over the items that both have a number for.

    Returns:
        None where there is no such item, or the metric is no mean over items.
    """
    if mine.values is None or theirs.values is None:
        return None
    pairs = [
        (first, second)
        for first, second in zip(mine.values, theirs.values, strict=True)
        if first is not None and second is not None
    ]
    return compare_items([a for a, _ in pairs], [b for _, b in pairs], SEED) if pairs else None


def _adjusted(tests: list[tuple[str, PairedTest]]) -> list[tuple[str, PairedTest]]:
    """The same tests with Holm's p-values over all that are against the same model."""
    families: dict[str, list[int]] = defaultdict(list)
    for index, (_, test) in enumerate(tests):
        families[test.against].append(index)
    adjusted = list(tests)
    for family in families.values():
        p_values = holm([tests[index][1].p for index in family])
        for index, p_holm in zip(family, p_values, strict=True):
            name, test = tests[index]
            adjusted[index] = name, replace(test, p_holm=p_holm)
    return adjusted
