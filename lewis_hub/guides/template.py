"""How a row becomes a text: a template over its columns, or chat messages in one of them.

A template is looked up, never evaluated: a field is a column's name and nothing more, so text from
a recipe cannot reach into Python objects.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lewis_hub.errors import CalibrationError
from lewis_hub.recipe_calibration import Calibration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERED = "text"  # the column of rows that are texts already


class Text:
    """`text: "{question} {answer}"`: columns in braces, `{{` and `}}` for literal ones.

    A null counts as an empty text; numbers are written as Python writes them.
    """

    adds_special_tokens: ClassVar[bool] = True

    def __init__(self, calibration: Calibration) -> None:
        self._where = f"calibration on {calibration.data}, `text`"
        self._parts = self._parse(calibration.text or "")

    def _parse(self, template: str) -> list[tuple[str, str | None]]:
        how = "Write {column} for a column and {{ or }} for a literal brace."
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise CalibrationError(
                self._where, f"{template!r} is not a template: {error}", how
            ) from error
        for _, field, spec, conversion in parsed:
            if field is not None and (spec or conversion or not field):
                problem = f"{template!r} has a field that is not just a column's name"
                raise CalibrationError(self._where, problem, how)
        if all(field is None for _, field, _, _ in parsed):
            raise CalibrationError(self._where, f"{template!r} names no column", how)
        return [(literal, field) for literal, field, _, _ in parsed]

    def check(self, columns: Sequence[str]) -> None:
        """Refuse a template that names a column which the data does not have."""
        for _, field in self._parts:
            if field is not None:
                _check_column(self._where, field, columns)

    def parts(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """What of a row goes into the text: the columns that the template names."""
        return tuple(row[field] for _, field in self._parts if field is not None)

    def render(self, index: int, row: Mapping[str, Any]) -> str:
        """Fill in one row; `index` is its place in the data, for messages."""
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
        self._tokenizer = tokenizer
        _require_chat(tokenizer, self._where, "Use `text` over plain columns")

    def check(self, columns: Sequence[str]) -> None:
        """Refuse a column which the data does not have."""
        _check_column(self._where, self._column, columns)

    def parts(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """What of a row goes into the text: what is said in the messages."""
        return tuple(message["content"] for message in row[self._column] or ())

    def render(self, index: int, row: Mapping[str, Any]) -> str:
        """Write one row's conversation out; a null or an empty list is an empty text."""
        from jinja2 import TemplateError

        messages = row[self._column]
        if not messages:
            return ""
        if not _are_messages(messages):
            problem = f"row {index}, column `{self._column}` is no list of {{role, content}}"
            remedy = "Each message needs `role` and `content`; use `text` for plain columns."
            raise CalibrationError(self._where, problem, remedy)
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(plain, tokenize=False))
        except TemplateError as error:
            problem = f"the chat template refuses row {index}: {error}"
            remedy = "The roles or their order do not suit this tokenizer; use `text`."
            raise CalibrationError(self._where, problem, remedy) from error


class Rendered:
    """`task: NAME`: the rows are texts already, as the task's prompt makes them.

    As in lm-eval the tokenizer adds its special tokens, unless a chat template wrote the first one.
    """

    def __init__(self, calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> None:
        self.adds_special_tokens = True
        if calibration.chat_template:
            where = f"calibration on {calibration.data}, `chat_template`"
            _require_chat(tokenizer, where, "Leave `chat_template` out")
            said = [{"role": "user", "content": ""}]
            begins = str(tokenizer.apply_chat_template(said, tokenize=False))
            start = tokenizer.bos_token
            self.adds_special_tokens = not (start and begins.startswith(start))

    def check(self, columns: Sequence[str]) -> None:
        """Nothing is asked of the columns."""

    def parts(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """The whole text."""
        return (row[RENDERED],)

    def render(self, index: int, row: Mapping[str, Any]) -> str:  # noqa: ARG002 - the templates' shape
        """The text as it is."""
        return str(row[RENDERED])


Template = Text | Messages | Rendered


def check_columns(calibration: Calibration, columns: Sequence[str]) -> None:
    """Refuse a template that cannot be read or names columns which the data does not have.

    Args:
        calibration: on a dataset.
        columns: of its rows; none where they are not known, and then nothing is asked of them.

    Raises:
        CalibrationError: see above.
    """
    if calibration.messages is None:
        template = Text(calibration)
        if columns:
            template.check(columns)
    elif columns:
        _check_column(
            f"calibration on {calibration.data}, `messages`", calibration.messages, columns
        )


def template_of(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Template:
    """How rows become texts.

    Raises:
        CalibrationError: the template cannot be read, or the tokenizer has no chat template.
    """
    if calibration.task:
        return Rendered(calibration, tokenizer)
    return Messages(calibration, tokenizer) if calibration.messages else Text(calibration)


def _require_chat(tokenizer: PreTrainedTokenizerBase, where: str, instead: str) -> None:
    if not tokenizer.chat_template:
        problem = f"the tokenizer of {tokenizer.name_or_path} has no chat template"
        raise CalibrationError(where, problem, f"{instead}, or a source whose tokenizer has one.")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value
    )


def _check_column(where: str, column: str, columns: Sequence[str]) -> None:
    if column in columns:
        return
    lowered = {name.lower(): name for name in columns}
    near = difflib.get_close_matches(column.lower(), lowered, n=1)
    hint = f" Did you mean `{lowered[near[0]]}`?" if near else ""
    there = ", ".join(f"`{name}`" for name in columns) or "none"
    raise CalibrationError(where, f"there is no column `{column}`", f"Columns: {there}.{hint}")
