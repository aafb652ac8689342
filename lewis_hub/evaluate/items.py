"""A task's items as texts: one split through the task's own prompt, with the right answer.

What is rendered is what `evaluate` would send to the model, to the letter, followed by the answer:
few-shot examples, delimiters, chat template and choices are those of lm-eval.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.benchmarks import (
    FEWSHOT_SEED,
    Commits,
    LoadedTasks,
    build,
    prepared,
    reset_fewshot,
    told_of,
)
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Chat = Callable[..., str]  # (messages, add_generation_prompt) -> text


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """What puts messages through a tokenizer's chat template; a system message only if it may be.

    Args:
        tokenizer: one that has a chat template.
    """
    from jinja2 import TemplateError

    def written(messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        def render(some: Sequence[dict[str, str]]) -> str:
            text = tokenizer.apply_chat_template(
                list(some),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return str(text)

        try:
            return render(messages)
        except TemplateError:  # many templates refuse a system message; lm-eval leaves it out then
            return render([one for one in messages if one["role"] != "system"])

    return written


TEXT = "text"


@dataclass(frozen=True)
class Item:
    """A document of a task, and what is made of it."""

    task: str
    prompt: str  # without few-shot examples; empty where the answer is all
    answer: str
    document: Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """All that a model is sent, few-shot examples included, and the right answer; empty if none."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class TaskRows:
    """One split of a task, or of all tasks of a group, one after the other.

    Attributes:
        parts: lm-eval's task object and its documents, of each task.
        chat: the chat template that prompts go through; None: they go as they are.
    """

    selection: TaskSelection
    parts: tuple[tuple[Any, Any], ...]
    chat: Chat | None = None
    columns: tuple[str, ...] = (TEXT,)

    def __len__(self) -> int:
        return sum(len(documents) for _, documents in self.parts)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items at `indices`, each with its prompt, few-shot examples and answer as text.

        An item's few-shot examples depend on its index alone, and it is never among them. One
        without a right answer, as in hidden test sets, is an empty text.
        """
        asked = self.questions(indices)
        return [{TEXT: one.prompt + one.answer} for one in asked]

    def questions(self, indices: Sequence[int]) -> list[Question]:
        """The same texts, cut where the answer begins."""
        with prepared(self.selection, {}):
            return [_question(*self._at(index), index, self.chat) for index in indices]

    def items(self, indices: Sequence[int]) -> list[Item]:
        """The same items, taken apart."""
        with prepared(self.selection, {}):
            return [_item(*self._at(index)) for index in indices]

    def part_of(self, indices: Sequence[int]) -> dict[str, tuple[Any, list[Any]]]:
        """Name of each task -> lm-eval's object of it and those of its documents."""
        chosen: dict[str, tuple[Any, list[Any]]] = {}
        for index in indices:
            task, document = self._at(index)
            chosen.setdefault(task.task_name, (task, []))[1].append(document)
        return chosen

    def _at(self, index: int) -> tuple[Any, Any]:
        ends = accumulate(len(documents) for _, documents in self.parts)
        part, end = next((part, end) for part, end in enumerate(ends) if index < end)
        task, documents = self.parts[part]
        return task, documents[index - end + len(documents)]


def load_rows(
    selection: TaskSelection, split: str, commits: Commits, *, allow_scored: bool = False
) -> TaskRows:
    """Build a task and take one split of its data.

    Few-shot examples come from where the task says. One that would show items that it scores shows
    others of the split that is taken, unless that is the scored one itself.

    Args:
        selection: one task or group.
        split: of its data, as the dataset calls it.
        commits: what datasets are pinned to.
        allow_scored: whether the split that the task scores will do.

    Raises:
        EvaluationError: no such split, one that is scored, or a task that is no text.
    """
    located = locate_tasks(selection)
    with prepared(selection, commits):
        tasks, _ = build(located)
        parts = []
        for name, task in tasks.items():
            _require_text(name, task)
            with told_of(name):
                reset_fewshot(task)
                documents = _documents(name, task, split, allow_scored=allow_scored)
                if _shows_scored(task) and split != _scored_split(task):
                    task.fewshot_cfg.split = split  # so that an item is never among its own
                    task.sampler.replace_df(list(documents))
                parts.append((task, documents))
    return TaskRows(selection, tuple(parts))


def scored_items(loaded: LoadedTasks) -> Iterator[Item]:
    """Every item of every split that the tasks score, whatever the limit.

    Raises:
        EvaluationError: a task's items cannot be rendered.
    """
    with prepared(loaded.selection, {}):
        for name, task in loaded.tasks.items():
            with told_of(name):
                yield from [_item(task, document) for document in task.eval_docs]


def scored_questions(
    loaded: LoadedTasks, limit: int | None, chat: Chat | None
) -> dict[str, list[Question]]:
    """Task -> its first `limit` scored items; tasks that are Python classes are left out.

    Raises:
        EvaluationError: a task's items cannot be rendered.
    """
    from lm_eval.api.task import ConfigurableTask

    found = {}
    with prepared(loaded.selection, {}):
        for name, task in loaded.tasks.items():
            if isinstance(task, ConfigurableTask):
                with told_of(name):
                    reset_fewshot(task)
                    first = islice(task.eval_docs, limit)
                    found[name] = [_question(task, one, i, chat) for i, one in enumerate(first)]
    return found


def _require_text(name: str, task: Any) -> None:
    from lm_eval.api.task import ConfigurableTask

    remedy = "Calibrate on another task, or on its `dataset` with a template."
    if not isinstance(task, ConfigurableTask):
        raise EvaluationError(name, "is a Python class, whose prompts cannot be told.", remedy)
    if getattr(task, "MULTIMODAL", False):
        raise EvaluationError(name, "asks about pictures or sound.", remedy)


def _documents(name: str, task: Any, split: str, *, allow_scored: bool) -> Any:
    config, fewshot = task.config, task.fewshot_cfg
    scored = _scored_split(task)
    others = [found for found in task.dataset if found != scored]
    listed = ", ".join(f"`{found}`" for found in others)
    has = f"It has: {listed}." if others else "It has no other split: name a `dataset` instead."
    if split not in task.dataset:
        raise EvaluationError(name, f"its data have no split `{split}`.", has)
    if split == scored and not allow_scored:
        problem = f"`{split}` is the split that it scores, and no merge may be fitted to its items."
        raise EvaluationError(name, problem, has)
    declared = (config.training_split, config.validation_split, config.test_split)
    process = fewshot.process_docs if split not in declared else config.process_docs
    documents = task.dataset[split]
    return documents if process is None else process(documents)


def _scored_split(task: Any) -> Any:
    return task.config.test_split or task.config.validation_split


def _shows_scored(task: Any) -> bool:
    """Whether lm-eval takes the few-shot examples from the split that the task scores."""
    config, fewshot = task.config, task.fewshot_cfg
    if not config.num_fewshot or (fewshot.split is None and fewshot.samples is not None):
        return False
    declared = (fewshot.split, config.training_split, config.validation_split, config.test_split)
    return bool(next(filter(None, declared), None) == _scored_split(task))


class _Others:
    """A few-shot sampler that never shows an item its own answer."""

    def __init__(self, sampler: Any, document: Any) -> None:
        self.sampler, self.document = sampler, document

    def sample(self, n: int, eval_doc: Any = None) -> Any:  # noqa: ARG002 - lm-eval's signature
        among = self.document in self.sampler.df
        return self.sampler.sample(n=n, eval_doc=self.document if among else None)


def _question(task: Any, document: Any, index: int, chat: Chat | None) -> Question:
    """The request that scores the right answer, or whose answer is generated, and the answer."""
    sampler = getattr(task, "sampler", None)
    with told_of(task.task_name):
        answer = _answer(task, document)
        if not answer:
            return Question(task.task_name, "", "")
        task.set_fewshot_seed(FEWSHOT_SEED + index)
        task.sampler = _Others(sampler, document)
        try:
            context = task.fewshot_context(
                document,
                task.config.num_fewshot,
                apply_chat_template=chat is not None,
                chat_template=chat,
                gen_prefix=task.doc_to_prefix(document),
            )
        finally:
            task.sampler = sampler
        requests = task.construct_requests(
            document,
            context,
            apply_chat_template=chat is not None,
            metadata=(task.task_name, index, 1),
        )
        if task.OUTPUT_TYPE == "generate_until":
            delimiter = _delimiter(task, document, answer, in_chat=chat is not None)
            return Question(task.task_name, str(requests.args[0]), delimiter + answer)
        asked = requests[_gold(task, document)] if isinstance(requests, list) else requests
        *prompt, answer = map(str, asked.args)  # of a text as a whole the answer is all
        return Question(task.task_name, "".join(prompt), answer)


def _item(task: Any, document: Any) -> Item:
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask):  # a Python class, known by its documents alone
        return Item(task.task_name, "", "", dict(document))
    prompt = task.doc_to_text(document)
    if isinstance(prompt, int):  # winogrande and its like: the answer is which text it is
        prompt = task.doc_to_choice(document)[prompt]
    return Item(task.task_name, str(prompt), _answer(task, document), dict(document))


def _answer(task: Any, document: Any) -> str:
    """The right answer; empty where there is none."""
    target = task.doc_to_target(document)
    if getattr(task, "multiple_input", 0) or task.OUTPUT_TYPE != "multiple_choice":
        target = target[0] if isinstance(target, list) and target else target
        return "" if target is None or target == [] else str(target)
    choices, gold = task.doc_to_choice(document), _gold(task, document)
    return str(choices[gold]) if 0 <= gold < len(choices) else ""


def _gold(task: Any, document: Any) -> int:
    """Which of the choices is right; -1 where that is not told."""
    told = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    told = told[0] if isinstance(told, list) and told else told
    if isinstance(told, str):
        choices = task.doc_to_choice(document)
        return choices.index(told) if told in choices else -1
    return told if isinstance(told, int) else -1


def _delimiter(task: Any, document: Any, answer: str, *, in_chat: bool) -> str:
    """Between a prompt and its answer, as lm-eval puts it in few-shot examples; none in a chat."""
    prefix = task.doc_to_prefix(document)
    if not prefix:
        return "" if in_chat else str(task.config.target_delimiter)
    return "" if prefix[-1].isspace() or answer[0].isspace() else " "


ENOUGH = 13  # words that no two texts share by chance: the n-grams of GPT-3's search for overlaps
LABEL = 3  # words of a column that may be a label, a letter or a subject
NEAR = 8  # words between a short question and its answer: "Answer:", a chat template's
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_PIECE = re.compile(rf"[^\W{_UNSPACED}]+|\w|[^\w\s]")  # a word, a letter as in Chinese, or a mark


@dataclass(frozen=True)
class Sought:
    """What of an item is looked for; all in words between single spaces, as `spelt` writes them."""

    question: tuple[str, ...]  # columns, each of which must stand in the text
    answer: str

    @property
    def n_words(self) -> int:
        """Words of the question."""
        return sum(map(_n_words, self.question))


def spelt(text: str) -> str:
    """Words and marks in lower case, one space before, between and after them."""
    return f" {' '.join(_PIECE.findall(text.casefold()))} "


def sought(item: Item) -> Sought:
    """The columns of its document that its prompt shows, or else the prompt; and its answer.

    Short columns, which may be labels, count only where the prompt shows no other.
    """
    prompt, answer = spelt(item.prompt or item.answer), spelt(item.answer)
    columns = {spelt(value) for value in item.document.values() if isinstance(value, str)}
    shown = sorted(column for column in columns if _n_words(column) and column in prompt)
    longer = [column for column in shown if _n_words(column) > LABEL]
    return Sought(tuple(longer or shown or ([prompt] if _n_words(prompt) else [])), answer)


def holding(texts: Sequence[str], items: Iterable[Item]) -> Iterator[tuple[int, Item]]:
    """The place of each text that holds an item, with that item.

    A text holds an item where the whole question stands in it. One of fewer than `ENOUGH` words
    may be there by chance, so its answer has to follow, or the text to end where it would.

    Args:
        texts: as they are.
        items: one after the other; only texts with all words of an item are looked through.
    """
    written = [spelt(text) for text in texts]
    places: dict[str, set[int]] = defaultdict(set)
    for index, text in enumerate(written):
        for word in set(text.split()):
            places[word].add(index)
    for item in items:
        asked = sought(item)
        words = {word for column in asked.question for word in column.split()}
        if words and words <= places.keys():
            for index in set.intersection(*sorted((places[w] for w in words), key=len)):
                if _holds(written[index], asked):
                    yield index, item


def _holds(text: str, asked: Sought) -> bool:
    if not all(column in text for column in asked.question):
        return False
    if asked.n_words >= ENOUGH:
        return True
    last = max(asked.question, key=len)
    ends = (place.start() + len(last) for place in re.finditer(f"(?={re.escape(last)})", text))
    return any(_is_over(text[end:], asked) for end in ends)


def _is_over(rest: str, asked: Sought) -> bool:
    if asked.answer.strip() and _follows(rest, asked.answer):
        return True
    return asked.n_words > 1 and _is_left_open(rest)


def _follows(rest: str, answer: str) -> bool:
    before, found, _ = f" {rest}".partition(answer)
    return bool(found) and _n_words(before) <= NEAR


def _is_left_open(rest: str) -> bool:
    """Whether a text has no answer: nothing is left, or only what asks for one."""
    n_words = _n_words(rest)
    return n_words == 0 or (n_words <= NEAR and rest.rstrip().endswith(":"))


def _n_words(text: str) -> int:
    return sum(piece[0].isalnum() or piece[0] == "_" for piece in text.split())
