"""Which items of a task a search draws."""

from dataclasses import dataclass, field

from lewis_hub.calibration.texts import draw_rows
from lewis_hub.display import Silent
from lewis_hub.evaluate.items import TaskItem, TaskRows
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.tune.objective import LOOKED_AT, free_items
from lewis_hub.workflow.texts import drawn_items

SEED = 42


@dataclass(frozen=True)
class Rows(TaskRows):
    """Items of these questions, which note which of them are read."""

    questions: tuple[str, ...] = ()
    read: list[int] = field(default_factory=list)

    def __len__(self):
        return len(self.questions)

    def items(self, indices):
        self.read.extend(indices)
        asked = [self.questions[index] for index in indices]
        return [TaskItem("asked", question, "yes", {"question": question}) for question in asked]


def rows_with(n_rows, own):
    """Equal items, but for those at the indices `own`."""
    asked = (f"own question {n}" if n in own else "equal question" for n in range(n_rows))
    return Rows(TaskSelection(("asked",)), (), questions=tuple(asked))


def test_each_item_is_compared_once_until_enough_are_free():
    order = draw_rows(3000, 3000, SEED)
    rows = rows_with(3000, set(order[1000:1005]))
    calibrated = drawn_items(rows.items(order[:1]))
    rows.read.clear()

    chosen, n_known = free_items(rows, 5, calibrated, SEED, Silent())

    assert (chosen, n_known) == (order[1000:1005], 1536 - 5)
    assert rows.read == [*order[:1536]]  # 6, and as many as before, until the 1,005th


def test_of_very_many_equal_items_not_all_are_looked_at():
    n_rows = LOOKED_AT + 40
    order = draw_rows(n_rows, n_rows, SEED)
    rows = rows_with(n_rows, {order[-1]})
    calibrated = drawn_items(rows.items(order[:2]))
    rows.read.clear()

    assert free_items(rows, 5, calibrated, SEED, Silent()) == ((), LOOKED_AT + 2)

    assert rows.read == [*order[: LOOKED_AT + 2]]
