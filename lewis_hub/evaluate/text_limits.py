"""Limits of the texts that models are scored on: a file of a few kB can hold texts of any length.

lm-eval holds the tokens of all requests of a run, and mteb the vectors of all texts. They may take
what large honest benchmarks take: the 56,000 requests of MMLU have 170 million letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lewis_hub.documents import leaves
from lewis_hub.errors import EvaluationError
from lewis_hub.system import memory_bytes

MAX_LETTERS = 5_000_000  # of a text: a million tokens, more than known benchmarks have
TOKENIZER_BYTES = 300  # for each letter, while a text is tokenised
MAX_BYTES = max(8_000_000_000, (memory_bytes() or 0) // 2)  # of all that is held together
ITEM_BYTES = 1500  # of a row with its request, or its vector, beside its letters
TEXT_BYTES = 4  # of a letter, which is in the row, its prompt and its log
TOKEN_BYTES = 40  # of a letter whose token is held, too, if each is a token


@dataclass
class HeldTexts:
    """Adds up what the texts of a run take in memory, and refuses very much."""

    n_bytes: int = 0

    def add_rows(self, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count the rows of a table.

        Raises:
            EvaluationError: a text is very long, or they are too many.
        """
        self._add(task, len(rows) * ITEM_BYTES)
        table = getattr(rows, "data", None)  # of `datasets`
        if table is None or table.nbytes > MAX_LETTERS:  # else no text of it is too long
            for row in rows:
                self.add_texts(task, row)

    def add_texts(self, task: str, values: Any, per_letter: int = TEXT_BYTES) -> None:
        """Count the letters of all texts in nested values; `per_letter` is in bytes.

        Raises:
            EvaluationError: as `add_rows`.
        """
        for text in leaves(values):
            if isinstance(text, str):
                if len(text) > MAX_LETTERS:
                    problem = f"a text has {len(text):,} letters, the limit is {MAX_LETTERS:,}."
                    raise EvaluationError(task, problem, "Choose a task with shorter texts.")
                self._add(task, len(text) * per_letter)

    def _add(self, task: str, n_bytes: int) -> None:
        self.n_bytes += n_bytes
        if self.n_bytes > MAX_BYTES:
            problem = "its texts, and those of the tasks before it, may take more than "
            problem += f"{MAX_BYTES / 1e9:.1f} GB while they are scored."
            remedy = "Score fewer or smaller tasks in a run, or use a machine with more memory."
            raise EvaluationError(task, problem, remedy)


@contextmanager
def counting_requests(name: str, task: Any, held: HeldTexts, per_letter: int) -> Iterator[None]:
    """Count the letters of the requests that a task of lm-eval builds inside of the block."""
    construct = task.construct_requests

    def construct_counted(*args: Any, **options: Any) -> Any:
        requests = construct(*args, **options)
        for request in requests if isinstance(requests, list) else [requests]:
            held.add_texts(name, list(request.args), per_letter)
        return requests

    task.construct_requests = construct_counted
    try:
        yield
    finally:
        del task.construct_requests  # of the instance; its class has the method
