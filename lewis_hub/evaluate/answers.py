"""What a model answered to each item, from lm-eval's samples, and texts of a bounded length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lewis_hub.evaluate.scores import Answers

MAX_ANSWER = 1000  # characters of an answer that are kept

Row = Mapping[str, Any]  # one of lm-eval's samples
Rows = Mapping[str, Mapping[int, Row]]  # filter -> item -> sample


def recorded_answers(task: Any, rows: Rows, metrics: Iterable[str]) -> Answers | None:
    """The answers of a model; None where the task has none in words, as for a perplexity.

    Args:
        task: lm-eval's task object.
        rows: its samples of this model, with the same items for every filter.
        metrics: keys as in the scores: `metric,filter`.
    """
    items = next(iter(rows.values()))
    given = tuple(_given(task, row) for row in items.values())
    if all(answer is None for answer in given):
        return None
    judged: dict[str, tuple[str | None, ...]] = {}
    for key in metrics:
        metric, _, filter_name = key.partition(",")
        read = [_judged(task, rows[filter_name].get(item, {}), metric) for item in items]
        others = tuple(
            None if text == answer else text for text, answer in zip(read, given, strict=True)
        )
        if any(text is not None for text in others):
            judged[key] = others
    return Answers(given, judged)


def _given(task: Any, row: Row) -> str | None:
    """The generated text, or the choice of the highest likelihood."""
    if task.OUTPUT_TYPE == "generate_until":
        return _text(row["resps"])
    return _choice(task, row, "acc")


def _judged(task: Any, row: Row, metric: str) -> str | None:
    """What a metric judges: the text that its filter extracts, or the choice by its measure."""
    if not row:
        return None
    if task.OUTPUT_TYPE == "generate_until":
        return _text(row["filtered_resps"])
    return _choice(task, row, metric)


def _text(responses: Any) -> str:
    """The first of responses to a request, which repeats and filters may put into lists."""
    while isinstance(responses, Sequence) and not isinstance(responses, str):
        responses = responses[0] if responses else ""
    return shortened(str(responses).strip(), MAX_ANSWER)


def _choice(task: Any, row: Row, metric: str) -> str | None:
    """The choice that a model prefers, as lm-eval's metrics compute it; None for other tasks."""
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "doc_to_choice"):
        return None
    choices = [str(choice) for choice in task.doc_to_choice(row["doc"])]
    likelihoods = [response[0][0] for response in row["resps"]][: len(choices)]
    if not choices or len(likelihoods) != len(choices):
        return None
    lengths = [1] * len(choices)
    if metric == "acc_norm":
        lengths = [len(choice) for choice in choices]
    elif metric == "acc_bytes":
        lengths = [len(choice.encode()) for choice in choices]
    values = [
        likelihood / max(length, 1) for likelihood, length in zip(likelihoods, lengths, strict=True)
    ]
    return shortened(choices[values.index(max(values))].strip(), MAX_ANSWER)


def shortened(text: str, n_characters: int) -> str:
    """The text, or its beginning and its end, where reasoning has its result; valid in UTF-8."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    if len(text) <= n_characters:
        return text
    n_last = n_characters // 3
    n_cut = len(text) - n_characters
    return f"{text[: n_characters - n_last]} [… {n_cut:,} characters …] {text[-n_last:]}"
