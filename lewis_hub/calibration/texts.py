"""Calibration texts: rows are sampled, rendered with a template, tokenised and batched.

Rows are sampled by a hash of (seed, row index) alone, so a seed draws the same rows on every
platform and with every version of the libraries. Texts are in the data's order.
"""

from __future__ import annotations

import hashlib
import heapq
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lewis_hub.checkpoint import names
from lewis_hub.documents import SURROGATE
from lewis_hub.errors import CalibrationError, CalibrationModelError, EmptyCalibrationError
from lewis_hub.recipe.schema import Calibration
from lewis_hub.tokenizer import token_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

RENDERED = "text"  # the column of rows that are already rendered


class Text:
    """`text: "{question} {answer}"`: columns in braces, `{{` and `}}` for literal braces.

    A null is an empty text; numbers are formatted as by Python.
    """

    adds_special_tokens: ClassVar[bool] = True

    def __init__(self, calibration: Calibration) -> None:
        self._where = f"calibration on {calibration.data}, `text`"
        template = calibration.text or ""
        how = "Write {column} for a column and {{ or }} for a literal brace."
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            problem = f"{template!r} is not a template: {error}"
            raise CalibrationError(self._where, problem, how) from error
        for _, field, spec, conversion in parsed:
            if field is not None and (spec or conversion or not field):
                problem = f"{template!r} has a field that is not just a column's name"
                raise CalibrationError(self._where, problem, how)
        self._parts = [(literal, field) for literal, field, _, _ in parsed]
        self.columns = [field for _, field in self._parts if field is not None]
        if not self.columns:
            raise CalibrationError(self._where, f"{template!r} names no column", how)

    def parts(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """The values of a row that are part of the text."""
        return tuple(row[column] for column in self.columns)

    def render(self, index: int, row: Mapping[str, Any]) -> str:
        """Render one row; `index` is its number in the data, for messages."""
        return "".join(
            literal + ("" if field is None else self._value(index, field, row[field]))
            for literal, field in self._parts
        )

    def _value(self, index: int, column: str, value: Any) -> str:
        if isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
            problem = f"row {index} holds a {type(value).__name__} in column `{column}`"
            remedy = "A template takes columns of text and numbers; chat goes under `messages`."
            raise CalibrationError(self._where, problem, remedy)
        return "" if value is None else str(value)


class Messages:
    """`messages: COLUMN`: a list of {role, content} per row, through the chat template."""

    adds_special_tokens: ClassVar[bool] = False  # the chat template writes them itself

    def __init__(self, calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> None:
        self._where = f"calibration on {calibration.data}, `messages`"
        self._column = calibration.messages or ""
        self._is_answered = calibration.answers is None
        self._tokenizer = tokenizer
        _require_chat(tokenizer, self._where, "Use `text` over plain columns")

    def parts(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """The contents of the messages of a row; none of a row that `render` refuses."""
        messages = row[self._column]
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            return ()
        return tuple(message["content"] for message in self._prompt(messages))

    def render(self, index: int, row: Mapping[str, Any]) -> str:
        """Render one row's conversation; a null or an empty list is an empty text."""
        messages = row[self._column]
        if not messages:
            return ""
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            problem = f"row {index}, column `{self._column}` is no list of {{role, content}}"
            remedy = "Each message needs `role` and `content`; use `text` for plain columns."
            raise CalibrationError(self._where, problem, remedy)
        asked = self._prompt(messages)
        plain = [{k: v for k, v in message.items() if v is not None} for message in asked]
        if not plain:
            return ""
        opens = not self._is_answered  # the header of the answer
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": opens}
        with _refused(self._where, f"row {index}"):
            return str(self._tokenizer.apply_chat_template(plain, **options))

    def _prompt(self, messages: Sequence[Any]) -> Sequence[Any]:
        """The messages, without the assistant's last turn where the model answers itself."""
        ends = bool(messages) and messages[-1].get("role") == "assistant"
        return messages if self._is_answered or not ends else messages[:-1]


@contextmanager
def _refused(where: str, what: str) -> Iterator[None]:
    """Turn the errors of a chat template into one that says what it refuses."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        # of no class of jinja's where a content is no text
        problem = f"the chat template refuses {what}: {error}"
        remedy = "The roles or their order do not suit this tokenizer; use `text`."
        raise CalibrationError(where, problem, remedy) from error


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()


class Rendered:
    """`task: NAME`: the rows are already rendered with the task's prompt.

    As in lm-eval the tokenizer adds its special tokens, unless a chat template wrote the first one.
    """

    def __init__(self, calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> None:
        self.adds_special_tokens = True
        if calibration.chat_template:
            where = f"calibration on {calibration.data}, `chat_template`"
            _require_chat(tokenizer, where, "Leave `chat_template` out")
            said = [{"role": "user", "content": ""}]
            with _refused(where, "a question"):
                begins = str(tokenizer.apply_chat_template(said, tokenize=False))
            start = tokenizer.bos_token
            self.adds_special_tokens = not (start and begins.startswith(start))

    def parts(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """The whole text."""
        return (row[RENDERED],)

    def render(self, index: int, row: Mapping[str, Any]) -> str:  # noqa: ARG002 - the templates' shape
        """The text."""
        return str(row[RENDERED])


Template = Text | Messages | Rendered


def template_of(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of a calibration; raises a CalibrationError as its class or parser does."""
    if calibration.task:
        return Rendered(calibration, tokenizer)
    return Messages(calibration, tokenizer) if calibration.messages else Text(calibration)


def _require_chat(tokenizer: PreTrainedTokenizerBase, where: str, instead: str) -> None:
    if not tokenizer.chat_template:
        problem = f"the tokenizer of {tokenizer.name_or_path} has no chat template"
        raise CalibrationError(where, problem, f"{instead}, or a source whose tokenizer has one.")


def check_columns(calibration: Calibration, columns: Sequence[str] | None) -> None:
    """Refuse a template that cannot be parsed or has columns that the data does not have.

    `columns` are those of the data; None: they are not known.
    """
    is_chat = calibration.messages is not None
    named = [calibration.messages or ""] if is_chat else Text(calibration).columns
    for column in named:
        if columns is not None and column not in columns:
            lowered = {name.lower(): name for name in columns}
            near = names.nearest(column.lower(), lowered)
            hint = f" Did you mean `{lowered[near]}`?" if near else ""
            there = ", ".join(f"`{name}`" for name in columns) or "none"
            where = f"calibration on {calibration.data}, `{'messages' if is_chat else 'text'}`"
            problem = f"there is no column `{column}`"
            raise CalibrationError(where, problem, f"Columns: {there}.{hint}")


MAX_LETTERS = 10_000_000  # of a text: its tokens take some GB before they are cut
MAX_LETTERS_TOGETHER = 50_000_000  # of all texts: they take a minute to tokenise
MAX_LETTERS_ON_AVERAGE = 500_000  # of many texts, which have more together: each may be a book
LETTERS_AT_ONCE = 50_000  # that are tokenised; a longer text alone
TOGETHER = 2048  # tokens of a batch, padding included; a longer text is a batch of its own
BATCH = 32  # tokens: the cost of one more batch, in the time that a forward takes for a token
N_TRIAL = 8  # tokens that show how a model multiplies


class TextRows(Protocol):
    """A table of which some rows are read at a time."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names, in the table's order."""

    def __len__(self) -> int:
        """Number of rows."""

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at `indices`, in that order."""


@dataclass(frozen=True)
class CalibrationTokens:
    """The tokens that a source is measured on: a sequence for each text that is not empty."""

    ids: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]  # index of each sequence's row in the data
    n_asked: int
    n_truncated: int
    n_empty: int
    tokenizer: str  # where it came from, for messages
    limit: int = 0  # the most tokens of a text
    end: int | None = None  # the tokenizer's end-of-sequence token
    n_cut: int = 0  # tokens that were cut off, all texts together
    cut_first: bool = False  # whether the first tokens of a text were cut off, or the last

    @property
    def n_tokens(self) -> int:
        """The number of tokens of all texts."""
        return sum(map(len, self.ids))

    @property
    def facts(self) -> dict[str, Any]:
        """Digests of row indices and token ids, and counts, for the profile."""
        texts = "\n".join(_joined(ids) for ids in self.ids)
        return {
            "rows_digest": _digest(_joined(self.rows)),
            "tokens_digest": _digest(texts),
            "n_texts": len(self.ids),
            "n_empty": self.n_empty,
            "n_tokens": self.n_tokens,
            "n_truncated": self.n_truncated,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user: too few rows, empty texts, cut texts."""
        drawn, kept = len(self.ids) + self.n_empty, len(self.ids)
        notes = []
        if drawn < self.n_asked:
            notes.append(f"the data has {drawn} rows, {self.n_asked} were asked for: all are used")
        if self.n_empty:
            notes.append(f"{self.n_empty} of {drawn} texts are empty and count for nothing")
        if self.n_truncated:
            longest, where = max(map(len, self.ids)), "begin" if self.cut_first else "end"
            cut = f"{self.n_truncated} of {kept} texts were cut to {longest} tokens"
            notes.append(f"{cut}: {self.n_cut:,} tokens where they {where} are left out")
        return tuple(notes)


@dataclass(frozen=True)
class TokenBatch:
    """Texts of like length, padded on the right; both (n_texts, n_tokens) int64, mask 0 or 1."""

    input_ids: Tensor
    attention_mask: Tensor


Grouping = Callable[[CalibrationTokens], Iterator[TokenBatch]]


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def draw_rows(n_rows: int, n_samples: int, seed: int) -> tuple[int, ...]:
    """Sample rows by a seed: those with the lowest keys, in the order of their keys.

    The key of row i is blake2b-64 of the decimal text "seed:i", read as a big-endian number. A
    larger sample begins with the smaller one; with fewer rows than samples all are returned.
    """
    return tuple(heapq.nsmallest(n_samples, range(n_rows), key=lambda i: (draw_key(seed, i), i)))


def draw_key(seed: int, index: int) -> bytes:
    """The key of a row, by which rows are drawn."""
    return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()


def calibration_tokens(
    rows: TextRows, calibration: Calibration, tokenizer: PreTrainedTokenizerBase, seed: int
) -> CalibrationTokens:
    """Sample rows, render them in the order of the data and cut each text to `max_tokens` tokens.

    No end-of-sequence token is added to a cut text. A task's text and a prompt without answer are
    cut at the beginning, after the tokenizer's own first token, since what matters is at the end. A
    CalibrationError says that the template does not fit the columns, a row or the tokenizer, or
    that no text has a token.
    """
    drawn = draw_rows(len(rows), calibration.samples, seed)
    tokens = tokens_of(rows, drawn, calibration, tokenizer)
    if not tokens.ids:
        where = f"calibration on {calibration.data}, split {calibration.split}"
        found = f"all {len(drawn)} texts are empty" if drawn else "there are no rows"
        remedy = "Choose a split with rows and a `text` or `messages` that is filled in them."
        raise EmptyCalibrationError(where, found, remedy)
    return tokens


def tokens_of(
    rows: TextRows,
    indices: Sequence[int],
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
) -> CalibrationTokens:
    """The tokens of the rows at `indices`, as `calibration_tokens` makes them; there may be none.

    The rows are in the order of the data.
    """
    template = template_of(calibration, tokenizer)
    if not calibration.task:
        check_columns(calibration, rows.columns)
    drawn = sorted(indices)
    texts = _rendered(rows, drawn, template, f"calibration on {calibration.data}")
    kept = [(i, text) for i, text in zip(drawn, texts, strict=True) if text.strip()]
    numbers, cut, n_cut = list[int](), list[list[int]](), list[int]()
    encoded = _encoded([text for _, text in kept], tokenizer, template)
    # a function, so that the tokens of a long text are freed before the next one is tokenised
    shortened = map(partial(_shortened, calibration, tokenizer), encoded)
    for (i, _), (part, n_left_out) in zip(kept, shortened, strict=True):
        if part:
            numbers.append(i)
            cut.append(part)
            n_cut.append(n_left_out)
    return CalibrationTokens(
        ids=tuple(map(tuple, cut)),
        rows=tuple(numbers),
        n_asked=calibration.samples,
        n_truncated=sum(map(bool, n_cut)),
        n_empty=len(texts) - len(cut),
        tokenizer=tokenizer.name_or_path,
        limit=calibration.max_tokens,
        end=tokenizer.eos_token_id,
        n_cut=sum(n_cut),
        cut_first=bool(calibration.task or calibration.answers),
    )


def _rendered(rows: TextRows, drawn: Sequence[int], template: Template, where: str) -> list[str]:
    texts, n_letters = list[str](), 0
    max_letters = max(MAX_LETTERS_TOGETHER, MAX_LETTERS_ON_AVERAGE * len(drawn))
    for i, row in zip(drawn, rows.rows(drawn), strict=True):
        text = template.render(i, row)
        _require_tokenisable(where, i, text)
        texts.append(text)
        n_letters += len(text)
        if n_letters > max_letters:
            problem = f"up to row {i} there are {n_letters:,} letters, the limit is {max_letters:,}"
            raise CalibrationError(where, problem, "Set fewer `samples`, or draw shorter texts.")
    return texts


def _require_tokenisable(where: str, row: int, text: str) -> None:
    if SURROGATE.search(text):
        problem = f"row {row} has half a letter, which UTF-8 cannot encode"
        raise CalibrationError(where, problem, "Repair the row, or draw others by `seed`.")
    if len(text) > MAX_LETTERS:
        problem = f"row {row} has a text of {len(text):,} letters, the limit is {MAX_LETTERS:,}"
        raise CalibrationError(where, problem, "Split the row, or draw others by `seed`.")


def _shortened(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, tokens: list[int]
) -> tuple[list[int], int]:
    """The tokens of a text that are kept, and how many are not."""
    ids = _left_open(tokens, tokenizer) if calibration.answers else tokens
    part = ids[: calibration.max_tokens]
    if ids and (calibration.task or calibration.answers):
        part = _last(ids, calibration.max_tokens, {tokenizer.bos_token_id, tokenizer.cls_token_id})
    return part, len(ids) - len(part)


def _encoded(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: Template
) -> Iterator[list[int]]:
    """Token ids of each text; few texts at a time, since that takes 100 times their memory."""
    start = 0
    while start < len(texts):
        stop, n_letters = start + 1, len(texts[start])
        while stop < len(texts) and (n_letters := n_letters + len(texts[stop])) <= LETTERS_AT_ONCE:
            stop += 1
        special, some = template.adds_special_tokens, list(texts[start:stop])
        ids: list[list[int]]
        ids = token_ids(tokenizer, some, add_special_tokens=special, verbose=False)
        ids.reverse()
        while ids:
            yield ids.pop()
        start = stop


def beginnings(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> CalibrationTokens:
    """The tokens that a model's own texts begin with: `prompt`, or the tokenizer's first token."""
    ids = _left_open(token_ids(tokenizer, calibration.prompt or "", verbose=False), tokenizer)
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = ids or [one for one in starts if one is not None][:1]
    where = f"calibration on {calibration.data}"
    if not start:
        problem = f"the tokenizer of {tokenizer.name_or_path} has no token that begins a text"
        raise EmptyCalibrationError(where, problem, "Give a `prompt`.")
    if len(start) >= calibration.max_tokens:
        problem = f"`prompt` has {len(start)} tokens, and `max_tokens` is {calibration.max_tokens}"
        raise EmptyCalibrationError(where, problem, "Raise `max_tokens`.")
    return CalibrationTokens(
        ids=(tuple(start),) * calibration.samples,
        rows=tuple(range(calibration.samples)),
        n_asked=calibration.samples,
        n_truncated=0,
        n_empty=0,
        tokenizer=tokenizer.name_or_path,
        limit=calibration.max_tokens,
        end=tokenizer.eos_token_id,
    )


def _left_open(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens without an end that the tokenizer added: a model is to continue them."""
    ends = len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id
    return tokens[:-1] if ends else tokens


def _last(tokens: list[int], limit: int, starts: Collection[int | None]) -> list[int]:
    """The last `limit` tokens; the first token is kept if it is one of `starts`."""
    kept = tokens[:1] if tokens[0] in starts else []
    first = max(len(kept), len(tokens) - limit + len(kept))
    return kept + tokens[first:]


def batches(tokens: CalibrationTokens, budget_tokens: int = TOGETHER) -> Iterator[TokenBatch]:
    """Group the texts by length, longest first; padding costs less than one more batch would.

    A batch has at most `budget_tokens`, padding included; a longer text is a batch of its own.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(range(len(tokens.ids)), key=lambda i: (-len(tokens.ids[i]), i))
    while order:
        lengths = [len(tokens.ids[i]) for i in order]
        n_texts = _n_in_batch(lengths, budget_tokens)
        taken, order = order[:n_texts], order[n_texts:]
        texts = [torch.tensor(tokens.ids[i]) for i in taken]
        input_ids = pad_sequence(texts, batch_first=True)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        yield TokenBatch(input_ids, mask)


def unpadded(batch: TokenBatch) -> Iterator[TokenBatch]:
    """Split into batches of texts of equal length."""
    lengths = batch.attention_mask.sum(dim=1)
    for length in sorted(set(lengths.tolist()) - {0}):
        texts = lengths == length
        yield TokenBatch(batch.input_ids[texts, :length], batch.attention_mask[texts, :length])


def unpadded_batches(tokens: CalibrationTokens) -> Iterator[TokenBatch]:
    """Batches without padding."""
    for batch in batches(tokens):
        yield from unpadded(batch)


def first_tokens(tokens: CalibrationTokens) -> TokenBatch:
    """A few tokens of the first text, to find out how a model uses them."""
    return single_text(tokens.ids[0][:N_TRIAL])


def single_text(ids: Sequence[int]) -> TokenBatch:
    """A batch of one text."""
    import torch

    text = torch.tensor([ids])
    return TokenBatch(text, torch.ones_like(text))


def _n_in_batch(lengths: Sequence[int], budget_tokens: int) -> int:
    """The number of texts in the first batch, at least 1; `lengths` are in descending order."""
    longest, n_padding = lengths[0], 0
    for n_texts, length in enumerate(lengths):
        n_padding += longest - length
        if n_texts and (n_padding > BATCH or longest * (n_texts + 1) > budget_tokens):
            return n_texts
    return len(lengths)


def check_padding(name: str, max_tokens: int, n_positions: int | None) -> None:
    """Refuse texts that guide `lewis_reference` pads beyond a model's last position.

    `n_positions` of None, 0 or less are unlimited.
    """
    if max_tokens > (n_positions or 0) > 0:
        problem = (
            f"guide `lewis_reference` pads every text to `max_tokens`, {max_tokens}, and the model "
            f"has {n_positions} positions"
        )
        remedy = f"Set `max_tokens: {n_positions}`, or less, in the calibration."
        raise CalibrationModelError(name, problem, remedy)
