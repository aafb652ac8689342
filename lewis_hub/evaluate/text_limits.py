"""Limits of the texts that models are scored on: a file of a few kB can hold texts of any length.

lm-eval holds the tokens of all requests of a run, and mteb the vectors of all texts. They may take
what large honest benchmarks take: the 56,000 requests of MMLU with examples have 170 million
letters, and those of a leaderboard twice as many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lewis_hub.documents import texts_in
from lewis_hub.errors import EvaluationError, UnscorableAnswerError
from lewis_hub.system import memory_bytes

MAX_LETTERS = 5_000_000  # of a text: a million tokens, more than known benchmarks have
TOKENIZER_BYTES = 300  # for each letter, while a text is tokenised
FEWER = "Score fewer or smaller tasks in a run, or use a machine with more memory."
MAX_BYTES = max(8_000_000_000, (memory_bytes() or 0) // 2)  # of all that is held together
ITEM_BYTES = 1500  # of a row, or a request, or a vector, beside its letters
COLUMN_BYTES = 100  # of each value of a row
LISTED_BYTES = 500  # of each text in lists: mteb makes a vector of it
# functions of lm-eval that compare by sacrebleu -> letters of a text: a page has 3,000. ter takes
# the product of the words of both texts: 27 s for 1,000 words each
MAX_COMPARED = {"bleu": 100_000, "chrf": 100_000, "chrfpp": 100_000, "ter": 5000}
# of any answer of a model, and for each token of it: tokenizers have tokens of 128 spaces
MAX_ANSWER, ANSWER_LETTERS = 20_000, 150
TOKENS_OF_ANSWER = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
MAX_CHOICES = 10_000  # of an item: each is a request
TEXT_BYTES = 4  # of a letter, which is in the row, its prompt and its log
TOKEN_BYTES = 12  # of a letter whose token is held, too: one of four letters takes 36 bytes


@dataclass
class HeldTexts:
    """Adds up what the texts of a run take in memory, and refuses very much."""

    n_bytes: int = 0

    def add_rows(self, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count the rows of a table.

        Raises:
            EvaluationError: a text is very long, or they are too many.
        """
        n_columns = len(getattr(rows, "column_names", ()))
        self.add(task, len(rows) * (ITEM_BYTES + COLUMN_BYTES * n_columns))
        table = getattr(rows, "data", None)  # of `datasets`
        if table is None or table.nbytes > MAX_LETTERS:  # else no text of it is too long
            for row in rows:
                n_texts = sum(1 for _ in texts_in(row))
                self.add(task, LISTED_BYTES * max(0, n_texts - len(row)))
                self.add_texts(task, row)

    def add_request(self, task: str, request: Any, per_letter: int) -> None:
        """Count a request of lm-eval; raises as `add_rows`."""
        self.add(task, ITEM_BYTES)
        self.add_texts(task, list(request.args), per_letter)

    def add_texts(self, task: str, values: Any, per_letter: int = TEXT_BYTES) -> None:
        """Count the letters of all texts in nested values; `per_letter` is in bytes.

        Raises:
            EvaluationError: as `add_rows`.
        """
        for text in texts_in(values):
            if len(text) > MAX_LETTERS:
                problem = f"a text has {len(text):,} letters, the limit is {MAX_LETTERS:,}."
                raise EvaluationError(task, problem, "Choose a task with shorter texts.")
            self.add(task, len(text) * per_letter)

    def add(self, task: str, n_bytes: int) -> None:
        """Count memory that is taken while the texts of a task are scored; raises as `add_rows`."""
        self.n_bytes += n_bytes
        if self.n_bytes > MAX_BYTES:
            problem = "its texts, and those of the tasks before it, may take more than "
            problem += f"{MAX_BYTES / 1e9:.1f} GB while they are scored."
            raise EvaluationError(task, problem, FEWER)


def require_short_targets(name: str, task: Any) -> None:
    """Refuse very long answers that sacrebleu would compare a model's with, once these are made.

    Raises:
        EvaluationError: one has more letters than MAX_COMPARED.
    """
    used = (getattr(one, "__name__", None) for one in task.aggregation().values())
    limits = {metric: MAX_COMPARED[metric] for metric in used if metric in MAX_COMPARED}
    if not limits:
        return
    metric = min(limits, key=limits.__getitem__)
    documents = {request.doc_id: request.doc for request in task.instances}
    for document in documents.values():
        n_letters = max(map(len, texts_in(task.doc_to_target(document))), default=0)
        if n_letters > limits[metric]:
            problem = f"its answer to an item has {n_letters:,} letters, the limit for {metric} is "
            problem += f"{limits[metric]:,}."
            raise EvaluationError(name, problem, "Choose a task with shorter answers.")


def require_short_answer(model: str, answer: str, asked: Mapping[str, Any], n_tokens: int) -> None:
    """Refuse an answer of a model that is far longer than its number of tokens lets expect.

    Filters and metrics of tasks take the square of the letters: gsm8k .6 s for 40,000, which are 4
    tokens if each has 10,000.

    Args:
        model: its name, for the error.
        answer: what it wrote.
        asked: the settings of the request, as the task gives them to lm-eval.
        n_tokens: how many tokens it may have if `asked` does not say.

    Raises:
        UnscorableAnswerError: it has more letters than the limit.
    """
    stated = [asked[key] for key in TOKENS_OF_ANSWER if isinstance(asked.get(key), int)]
    most = max(MAX_ANSWER, ANSWER_LETTERS * (stated[0] if stated else n_tokens))
    if len(answer) > most:
        problem = f"wrote an answer of {len(answer):,} letters, the limit is {most:,}, or "
        problem += f"{ANSWER_LETTERS} for each token."
        remedy = "Its tokenizer has very long tokens: score another model, or other tasks."
        raise UnscorableAnswerError(model, problem, remedy)


@contextmanager
def counting_examples(held: HeldTexts) -> Iterator[None]:
    """Count the rows that tasks of lm-eval draw examples from, which are listed as a task is built.

    An EvaluationError is raised where they are too many.
    """
    from lm_eval.api.task import ConfigurableTask

    examples = ConfigurableTask.fewshot_docs

    def counted(task: Any) -> Any:
        rows = examples(task)
        if isinstance(rows, Sequence) or hasattr(rows, "column_names"):
            held.add_rows(str(task.config.task), rows)
        return rows

    ConfigurableTask.fewshot_docs = counted
    try:
        yield
    finally:
        ConfigurableTask.fewshot_docs = examples


@contextmanager
def counting_requests(name: str, task: Any, held: HeldTexts, per_letter: int) -> Iterator[None]:
    """Count the requests that a task of lm-eval builds inside of the block, and their letters.

    An EvaluationError is raised where they are too many.
    """
    construct, choose = task.construct_requests, getattr(task, "doc_to_choice", None)

    def construct_counted(*args: Any, **options: Any) -> Any:
        requests = construct(*args, **options)
        for request in requests if isinstance(requests, list) else [requests]:
            held.add_request(name, request, per_letter)
        return requests

    def choose_few(*args: Any, **options: Any) -> Any:
        found = choose(*args, **options)  # type: ignore[misc]
        if isinstance(found, Sized) and len(found) > MAX_CHOICES:
            problem = f"an item has {len(found):,} choices, the limit is {MAX_CHOICES:,}."
            raise EvaluationError(name, problem, "Choose a task with fewer choices.")
        return found

    task.construct_requests = construct_counted
    if choose:
        task.doc_to_choice = choose_few
    try:
        yield
    finally:  # of the instance; its class has the methods
        del task.construct_requests
        if choose:
            del task.doc_to_choice
