"""The items that a search looks at: of no calibration text, and none of those that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lewis_hub.errors import EvaluationError, TuningError
from lewis_hub.evaluate.chat import chat_of
from lewis_hub.evaluate.data import free_split
from lewis_hub.evaluate.items import TaskRows, load_rows, scored_items
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks
from lewis_hub.guides.tokens import draw_rows, load_tokenizer
from lewis_hub.stages.downloading import small_files
from lewis_hub.stages.execution import Step
from lewis_hub.stages.overlap import DrawnText, count_overlap, drawn_items, overlaps
from lewis_hub.stages.task_data import scored_commits


@dataclass(frozen=True)
class TuningItems:
    """DrawnText items of one task.

    Attributes:
        indices: of `rows`, in the order in which they are scored.
        n_calibrated: items that were passed over because calibration draws them too.
    """

    task: str
    split: str
    rows: TaskRows
    indices: tuple[int, ...]
    n_calibrated: int


def free_split_of(selected: TaskSelection) -> str:
    """The split to tune on where none is named.

    Raises:
        EvaluationError: the tasks declare none that they do not score.
    """
    split = free_split(locate_tasks(selected))
    if split is None:
        problem = "these tasks have no common split for examples that they do not score."
        remedy = "Name one with --split, or tasks made for tuning with --task."
        raise EvaluationError(", ".join(selected.names), problem, remedy)
    return split


def draw_items(
    step: Step,
    asked: TaskSelection,
    split: str,
    n_samples: int,
    calibrated: Sequence[DrawnText],
) -> tuple[TuningItems, ...]:
    """Draw `n_samples` items of each task, the recipe's seed deciding which.

    Those that calibration draws are passed over; those that are scored are refused.

    Args:
        step: of a recipe with `evaluate`.
        asked: tasks to tune on.
        split: of their data.
        n_samples: of each task; all where there are not so many.
        calibrated: the calibration texts.

    Raises:
        EvaluationError: a task or split is not there, or is the one that is scored.
        TuningError: an item is scored, or none is left.
    """
    scoring = step.recipe.evaluate
    assert scoring
    commits = scored_commits(step.api, asked)
    donor = step.inputs.donor
    chat = None
    if scoring.chat_template:
        chat = chat_of(load_tokenizer(str(small_files(step.api, donor)), donor.name))
    drawn = []
    for name in asked.names:
        one = TaskSelection((name,), asked.include, allow_code=asked.allow_code)
        rows = load_rows(one, split, commits, allow_scored=name not in scoring.tasks)
        rows = replace(rows, chat=chat)
        found = _passing_over(rows, n_samples, calibrated, step.recipe.seed)
        drawn.append(TuningItems(name, split, rows, *found))
        if not found[0]:
            problem = f"no item of split `{split}` is left that calibration does not draw"
            remedy = "Name another split with --split, or fewer `samples` in `calibration`."
            raise TuningError(name, problem, remedy)
    _refuse_scored(step, drawn)
    return tuple(drawn)


def _passing_over(
    rows: TaskRows, n_samples: int, calibrated: Sequence[DrawnText], seed: int
) -> tuple[tuple[int, ...], int]:
    """Chosen indices, and how many others calibration had taken."""
    n_looked_at = n_samples + len(calibrated)
    while True:  # a text with few-shot examples holds several items
        among = draw_rows(len(rows), n_looked_at, seed)
        items = rows.items(among)
        known = {id(item) for _, item in overlaps(calibrated, items)}
        free = [
            index
            for index, item in zip(among, items, strict=True)
            if item.answer and id(item) not in known
        ]
        if len(free) >= n_samples or len(among) == len(rows):
            return tuple(free[:n_samples]), len(known)
        n_looked_at *= 2


def _refuse_scored(step: Step, drawn: Sequence[TuningItems]) -> None:
    step.progress.say("Comparing the items to tune on with those that are scored")
    scored = list(scored_items(step.scored))
    for one in drawn:
        found = count_overlap(drawn_items(one.rows.items(one.indices)), scored)
        if found:
            told = ", ".join(f"{n} of {task}" for task, n in sorted(found.items()))
            raise TuningError(
                f"{one.task}, split `{one.split}`",
                f"of {len(one.indices)} items to tune on, `evaluate` scores {told}",
                "A score on what a merge was tuned on says nothing: name another split with\n"
                "--split, or another task with --task.",
            )
