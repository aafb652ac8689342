"""A task's items as texts, and the loss of a model on their answers.

The text of an item is the request that `evaluate` sends to the model, character by character,
followed by the answer: few-shot examples, delimiters, chat template and choices are lm-eval's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

from lewis_hub.display import Advance
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.benchmarks import Commits, LoadedTasks, build, errors_named, prepared
from lewis_hub.evaluate.harness import (
    FEWSHOT_SEED,
    affordable_batch,
    quiet_libraries,
    reset_fewshot,
    threads_for,
)
from lewis_hub.evaluate.scores import MetricResult
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TEXT = "text"
ANSWER_LOSS = "answer_loss,none"
LOGITS_BYTES = 1_000_000_000  # of one batch, for the loss

Chat = Callable[..., str]  # (messages, add_generation_prompt) -> text


@dataclass(frozen=True)
class TaskItem:
    """A document of a task with its prompt and answer."""

    task: str
    prompt: str  # without few-shot examples; empty where the whole text is the answer
    answer: str
    document: Mapping[str, Any]  # the dataset's row
    choices: tuple[str, ...] = ()  # of a multiple choice


@dataclass(frozen=True)
class Question:
    """All that a model is sent, few-shot examples included, and the right answer; empty if none."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class TaskRows:
    """A split of a task, or of all tasks of a group in turn."""

    selection: TaskSelection
    parts: tuple[tuple[Any, Any], ...]  # lm-eval's task object and its documents, of each task
    chat: Chat | None = None  # the chat template of prompts; None: they stay as they are
    answered: bool = True  # whether the texts hold the right answers
    columns: tuple[str, ...] = (TEXT,)

    def __len__(self) -> int:
        return sum(len(documents) for _, documents in self.parts)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items at `indices` as texts: few-shot examples, prompt and answer.

        An item's few-shot examples depend on its index alone, and never include the item. An item
        without a right answer, as in hidden test sets, is an empty text.
        """
        questions = self.questions(indices)
        return [{TEXT: q.prompt + (q.answer if self.answered else "")} for q in questions]

    def questions(self, indices: Sequence[int]) -> list[Question]:
        """The same texts, split where the answer begins."""
        with prepared(self.selection, {}):
            return [_question(*self._at(index), index, self.chat) for index in indices]

    def items(self, indices: Sequence[int]) -> list[TaskItem]:
        """The same items without few-shot examples, with their documents."""
        with prepared(self.selection, {}):
            return [_item(*self._at(index)) for index in indices]

    def part_of(self, indices: Sequence[int]) -> dict[str, tuple[Any, list[Any]]]:
        """Name of each task -> lm-eval's task object and the documents at `indices`."""
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


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """Make a function that renders messages by the tokenizer's chat template.

    Many templates refuse a system message; it is left out then, as lm-eval does.
    """
    from jinja2 import TemplateError

    def render(messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        options: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(tokenizer.apply_chat_template(list(messages), **options))
        except TemplateError:
            others = [message for message in messages if message["role"] != "system"]
            return str(tokenizer.apply_chat_template(others, **options))

    return render


def load_rows(
    selection: TaskSelection, split: str, commits: Commits, *, allow_scored: bool = False
) -> TaskRows:
    """Build a task or a group and load a split of its data.

    Few-shot examples come from where the task says. If that is the split that the task scores, they
    come from the loaded split instead. The loaded split may be scored only with `allow_scored`.

    Raises:
        EvaluationError: there is no such split, the task scores it, or it is not a text task.
    """
    located = locate_tasks(selection)
    with prepared(selection, commits):
        tasks, _ = build(located)
        parts = []
        for name, task in tasks.items():
            _require_text(name, task)
            with errors_named(name):
                reset_fewshot(task)
                documents = _documents(name, task, split, allow_scored=allow_scored)
                if _shows_scored(task) and split != _scored_split(task):
                    task.fewshot_cfg.split = split  # lm-eval then leaves the item itself out
                    task.sampler.replace_df(list(documents))
                parts.append((task, documents))
    return TaskRows(selection, tuple(parts))


def scored_items(loaded: LoadedTasks) -> Iterator[TaskItem]:
    """Every item of every split that the tasks score, whatever the limit."""
    with prepared(loaded.selection, {}):
        for name, task in loaded.tasks.items():
            with errors_named(name):
                yield from [_item(task, document) for document in task.eval_docs]


def first_items(loaded: LoadedTasks, limit: int | None) -> dict[str, list[TaskItem]]:
    """Task -> its first `limit` scored items, in the order of lm-eval's samples."""
    with prepared(loaded.selection, {}):
        found = {}
        for name, task in loaded.tasks.items():
            with errors_named(name):
                found[name] = [_item(task, document) for document in islice(task.eval_docs, limit)]
        return found


def scored_questions(
    loaded: LoadedTasks, limit: int | None, chat: Chat | None
) -> dict[str, list[Question]]:
    """Task -> its first `limit` scored items; tasks that are Python classes are left out."""
    from lm_eval.api.task import ConfigurableTask

    questions = {}
    with prepared(loaded.selection, {}):
        for name, task in loaded.tasks.items():
            if isinstance(task, ConfigurableTask):
                with errors_named(name):
                    reset_fewshot(task)
                    documents = enumerate(islice(task.eval_docs, limit))
                    questions[name] = [_question(task, doc, i, chat) for i, doc in documents]
    return questions


def _require_text(name: str, task: Any) -> None:
    from lm_eval.api.task import ConfigurableTask

    remedy = "Calibrate on another task, or on its `dataset` with a template."
    if not isinstance(task, ConfigurableTask):
        raise EvaluationError(name, "is a Python class, whose prompts are unknown.", remedy)
    if getattr(task, "MULTIMODAL", False):
        raise EvaluationError(name, "asks about images or sound.", remedy)


def _documents(name: str, task: Any, split: str, *, allow_scored: bool) -> Any:
    config, fewshot, scored = task.config, task.fewshot_cfg, _scored_split(task)
    others = ", ".join(f"`{other}`" for other in task.dataset if other != scored)
    remedy = f"It has: {others}." if others else "It has no other split: use a `dataset` instead."
    if split not in task.dataset:
        raise EvaluationError(name, f"its data have no split `{split}`.", remedy)
    if split == scored and not allow_scored:
        problem = f"it scores the split `{split}`, and a merge must not be fitted to its items."
        raise EvaluationError(name, problem, remedy)
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


class _OtherDocuments:
    """A few-shot sampler that never shows an item its own answer."""

    def __init__(self, sampler: Any, document: Any) -> None:
        self.sampler, self.document = sampler, document

    def sample(self, n: int, eval_doc: Any = None) -> Any:  # noqa: ARG002 - lm-eval's signature
        contained = self.document in self.sampler.df
        return self.sampler.sample(n=n, eval_doc=self.document if contained else None)


def _question(task: Any, document: Any, index: int, chat: Chat | None) -> Question:
    """The request that scores the right answer, or that generates an answer, and the answer."""
    sampler = getattr(task, "sampler", None)
    with errors_named(task.task_name):
        answer = _answer(task, document)
        if not answer:
            return Question(task.task_name, "", "")
        task.set_fewshot_seed(FEWSHOT_SEED + index)
        task.sampler = _OtherDocuments(sampler, document)
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
        request = requests[_gold(task, document)] if isinstance(requests, list) else requests
        *prompt, answer = map(str, request.args)  # a rolling likelihood has no prompt
        return Question(task.task_name, "".join(prompt), answer)


def _item(task: Any, document: Any) -> TaskItem:
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask):  # a Python class: only its documents are known
        return TaskItem(task.task_name, "", "", dict(document))
    prompt = task.doc_to_text(document)
    if isinstance(prompt, int):  # as in winogrande: the answer is the number of a text
        prompt = task.doc_to_choice(document)[prompt]
    listed = task.doc_to_choice(document) if task.OUTPUT_TYPE == "multiple_choice" else ()
    choices = tuple(map(str, listed or ()))
    return TaskItem(task.task_name, str(prompt), _answer(task, document), dict(document), choices)


def _answer(task: Any, document: Any) -> str:
    """The right answer; empty where there is none."""
    target = task.doc_to_target(document)
    if getattr(task, "multiple_input", 0) or task.OUTPUT_TYPE != "multiple_choice":
        target = target[0] if isinstance(target, list) and target else target
        return "" if target is None or target == [] else str(target)
    choices, gold = task.doc_to_choice(document), _gold(task, document)
    return str(choices[gold]) if 0 <= gold < len(choices) else ""


def _gold(task: Any, document: Any) -> int:
    """The index of the right choice; -1 if the document does not have it."""
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    gold = gold[0] if isinstance(gold, list) and gold else gold
    if isinstance(gold, str):
        choices = task.doc_to_choice(document)
        return choices.index(gold) if gold in choices else -1
    return gold if isinstance(gold, int) else -1


def _delimiter(task: Any, document: Any, answer: str, *, in_chat: bool) -> str:
    """The delimiter before the answer, as lm-eval puts it in few-shot examples; none in a chat."""
    prefix = task.doc_to_prefix(document)
    if not prefix:
        return "" if in_chat else str(task.config.target_delimiter)
    return "" if prefix[-1].isspace() or answer[0].isspace() else " "


@dataclass(frozen=True)
class AnswerLoss:
    """The loss on one item: the sum over the answer's tokens, in nats, and their number."""

    nats: float
    n_tokens: int


@dataclass(frozen=True)
class _Encoded:
    place: int
    tokens: tuple[int, ...]  # the model's input: all but the last
    targets: tuple[int, ...]  # of the answer


def answer_losses(lm: Any, questions: Sequence[Question], advance: Advance) -> list[AnswerLoss]:
    """Score the right answers, in the order of the questions.

    Prompt and answer are tokenized as in lm-eval's loglikelihood; a text that is too long loses its
    beginning. Padding comes last, where no token of a text attends to it. An empty answer has 0
    nats over 0 tokens.
    """
    with quiet_libraries():
        encoded = [_encode(lm, place, question) for place, question in enumerate(questions)]
    losses = [AnswerLoss(0.0, 0)] * len(questions)
    with threads_for(lm.model):
        for batch in _batches(lm, [text for text in encoded if text.targets]):
            for text, nats in zip(batch, _nats(lm, batch), strict=True):
                losses[text.place] = AnswerLoss(nats, len(text.targets))
            advance(len(batch))
    advance(sum(not text.targets for text in encoded))
    return losses


def loss_metric(losses: Sequence[AnswerLoss]) -> MetricResult:
    """The mean over all answer tokens, as a mean over items: long answers count for more."""
    n_answers = sum(loss.n_tokens > 0 for loss in losses)
    n_tokens = sum(loss.n_tokens for loss in losses)
    values = tuple(loss.nats * n_answers / n_tokens if loss.n_tokens else None for loss in losses)
    mean = sum(loss.nats for loss in losses) / n_tokens if n_tokens else float("nan")
    return MetricResult(mean, values, higher_is_better=False)


def _encode(lm: Any, place: int, question: Question) -> _Encoded:
    """Tokens of a prompt and its answer; white space at the end of a prompt joins the answer."""
    if not question.answer:
        return _Encoded(place, (), ())
    if question.prompt:
        before = question.prompt.rstrip()
        prompt, whole = lm.tok_encode(before), lm.tok_encode(question.prompt + question.answer)
        answer = whole[len(prompt) :]
    else:
        prompt, answer = [lm.prefix_token_id], lm.tok_encode(question.answer)
    tokens = [*prompt, *answer][-lm.max_length - 1 :]
    return _Encoded(place, tuple(tokens[:-1]), tuple(answer[-len(tokens) + 1 :]))


def _batches(lm: Any, encoded: Sequence[_Encoded]) -> Iterator[list[_Encoded]]:
    """Batches of similar length, the longest first, so that there is little padding."""
    left = sorted(encoded, key=lambda text: (-len(text.tokens), text.place))
    n_vocabulary = lm.model.config.get_text_config().vocab_size
    while left:
        n = affordable_batch(len(left[0].tokens), n_vocabulary, LOGITS_BYTES)
        yield left[:n]
        left = left[n:]


def _nats(lm: Any, batch: Sequence[_Encoded]) -> list[float]:
    """The loss of each text of a batch, summed over its answer."""
    import torch

    longest = max(len(text.tokens) for text in batch)
    rows = [text.tokens + (0,) * (longest - len(text.tokens)) for text in batch]
    mask = [[int(i < len(text.tokens)) for i in range(longest)] for text in batch]
    starts = [len(text.tokens) - len(text.targets) for text in batch]
    first = min(starts)  # models with `logits_to_keep` compute no logits before the answers
    keeps = "logits_to_keep" in inspect.signature(lm.model.forward).parameters
    options = {"logits_to_keep": longest - first} if keeps else {}
    with torch.inference_mode():
        logits: Tensor = lm.model(
            input_ids=torch.tensor(rows, device=lm.device),
            attention_mask=torch.tensor(mask, device=lm.device),
            **options,
        ).logits[:, first - longest :]
        nats = []
        for row, start, text in zip(logits, starts, batch, strict=True):
            own = row[start - first : start - first + len(text.targets)].float()
            targets = torch.tensor(text.targets, device=own.device)
            nats.append(float(torch.nn.functional.cross_entropy(own, targets, reduction="sum")))
    return nats
