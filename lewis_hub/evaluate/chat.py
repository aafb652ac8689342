"""Tokenizers and chat templates of others, within limits of time and memory.

Jinja's sandbox bounds neither.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lewis_hub import limits
from lewis_hub.errors import TokenizerError
from lewis_hub.limits import TooMuchError
from lewis_hub.system import limited_memory
from lewis_hub.text_growth import limit_texts
from lewis_hub.tokenizer import apply_all_merges

MIN_TOKENS = 2  # beside special ones
MAX_S = 10.0  # of one conversation; real templates take milliseconds
MAX_GROWTH_BYTES = 1 << 30  # of this process meanwhile
LAST_S = 30.0  # C code that no error stops, as it compares nested lists, ends with the process
# of the text of a conversation: a template may add a system prompt and the JSON of tools, whose
# letters it escapes by at most six; a tokenizer takes 100 times the memory of the text
MAX_ADDED_LETTERS = 50_000
MAX_TIMES = 8
MAX_BITS = 1 << 20  # of a number that a template computes: larger ones take C code very long
# of tokens: no text has them
OF_TOKENS = {"tokenize", "return_assistant_tokens_mask", "sanitize_control_tokens"}
REMEDY = "Set `chat_template` in the recipe, or use a copy of the model with another template."


def limit_tokenizer(label: str, tokenizer: Any) -> None:
    """Make a loaded tokenizer of transformers safe: its steps, texts, merges and chat templates.

    Raises:
        TokenizerError: it has no tokens, its steps may make a text very long, or its longest text
            is no number.
    """
    _require_tokens(label, tokenizer)
    if not isinstance(getattr(tokenizer, "model_max_length", 0), int | float):
        problem = "`model_max_length` in its tokenizer_config.json is no number"
        raise TokenizerError(label, problem, "Repair it, or use an intact copy of the model.")
    limit_texts(label, getattr(tokenizer, "tokenizer", tokenizer))
    apply_all_merges(tokenizer)
    limit_templates(tokenizer)


def _require_tokens(label: str, tokenizer: Any) -> None:
    """Refuse what transformers makes for a model without files of a tokenizer, and tells no one.

    It has special tokens alone, and at most one other, so that all texts are alike.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    if not hasattr(inner, "added_tokens_decoder"):  # of a server
        return
    special = {str(one) for one in inner.added_tokens_decoder.values() if one.special}
    if len(inner.get_vocab().keys() - special - {*map(str, inner.all_special_tokens)}) < MIN_TOKENS:
        problem = "it has no files of a tokenizer, or they have no tokens but special ones"
        raise TokenizerError(label, problem, "Use a copy with the files, such as tokenizer.json.")


def limit_templates(tokenizer: Any) -> None:
    """Let a tokenizer of transformers refuse conversations that take too much time or memory.

    Its `apply_chat_template` raises a TokenizerError then, also for a text that is far longer than
    the conversation, before it is tokenised. What Python code raises in a template, as `1 / 0` or
    a macro that calls itself, is a TemplateError as what Jinja raises; so is a template with more
    loops in each other than Python compiles.
    """
    apply: Callable[..., Any] | None = getattr(tokenizer, "apply_chat_template", None)
    if apply is None:  # of a server that is given texts
        return
    _limit_numbers()

    @functools.wraps(apply)
    def apply_within_limits(*args: Any, **options: Any) -> Any:
        where = f"{tokenizer.name_or_path}: chat template"
        with limited_memory(2 * MAX_GROWTH_BYTES), limited(where), _python_errors_of_template():
            if options.get("tokenize", True):  # its text is looked at first
                as_text = {key: options[key] for key in options.keys() - OF_TOKENS}
                _require_modest_text(where, apply(*args, **as_text, tokenize=False), args, options)
                return apply(*args, **options)
            rendered = apply(*args, **options)
            _require_modest_text(where, rendered, args, options)
            return rendered

    tokenizer.apply_chat_template = apply_within_limits


@contextmanager
def _python_errors_of_template() -> Iterator[None]:
    from jinja2 import TemplateError

    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, RuntimeError, SyntaxError) as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error


def _require_modest_text(where: str, rendered: str | list[str], *given: object) -> None:
    """Refuse what a template wrote if it is far longer than what it was given."""
    texts = [rendered] if isinstance(rendered, str) else rendered
    n_letters, limit = sum(map(len, texts)), MAX_ADDED_LETTERS * len(texts)
    limit += MAX_TIMES * _n_letters(given)
    if n_letters > limit:
        problem = f"it makes a text of {n_letters:,} letters of one conversation, the limit is "
        raise TokenizerError(where, f"{problem}{limit:,}", REMEDY)


def _n_letters(value: object) -> int:
    """The letters of all texts in messages, tools and other values."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_n_letters, (*value.keys(), *value.values())))
    return sum(map(_n_letters, value)) if isinstance(value, list | tuple) else 0


def _limit_numbers() -> None:
    """Let Jinja's sandbox refuse very large numbers: nothing stops C code that computes with them.

    transformers makes the environment itself, so the class is changed.
    """
    from jinja2.sandbox import SandboxedEnvironment as Sandbox

    operators = {"**": _power, "*": _product}
    Sandbox.default_binop_table = {**Sandbox.default_binop_table, **operators}
    Sandbox.intercepted_binops |= operators.keys()


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int):
        _require_bits(base.bit_length() * exponent)
    return operator.pow(base, exponent)


def _product(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() + right.bit_length())
    return operator.mul(left, right)


def _require_bits(n_bits: int) -> None:
    if n_bits > MAX_BITS:
        raise OverflowError(f"a number has more than {MAX_BITS:,} bits")


@contextmanager
def limited(where: str) -> Iterator[None]:
    """Stop Python code of this thread, such as loops of a template, that takes too much.

    After LAST_S, C code that no error stops ends with the process.

    Raises:
        TokenizerError: it took too much time or memory; it names `where`.
    """
    try:
        with limits.limited(MAX_S, "one conversation", max_bytes=MAX_GROWTH_BYTES, last_s=LAST_S):
            yield
    except TooMuchError as error:
        raise TokenizerError(where, str(error), REMEDY) from None
    except MemoryError:
        raise TokenizerError(where, "it takes too much memory", REMEDY) from None
