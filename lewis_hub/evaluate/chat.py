"""Tokenizers and chat templates of others, within limits of time and memory.

Jinja's sandbox bounds neither.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lewis_hub import limits
from lewis_hub.errors import TokenizerError
from lewis_hub.limits import TooMuchError
from lewis_hub.system import limited_memory
from lewis_hub.text_growth import require_modest_steps
from lewis_hub.tokenizer import apply_all_merges

MAX_S = 10.0  # of one conversation; real templates take milliseconds
MAX_GROWTH_BYTES = 1 << 30  # of this process meanwhile
LAST_S = 30.0  # C code that no error stops, as it compares nested lists, ends with the process
MAX_BITS = 1 << 20  # of a number that a template computes: larger ones take C code very long
REMEDY = "Set `chat_template` in the recipe, or use a copy of the model with another template."


def limit_tokenizer(label: str, tokenizer: Any) -> None:
    """Make a loaded tokenizer of transformers safe to use: its steps, merges and chat templates.

    Raises:
        TokenizerError: its steps may make a text very long, or its longest text is no number.
    """
    if not isinstance(getattr(tokenizer, "model_max_length", 0), int | float):
        problem = "`model_max_length` in its tokenizer_config.json is no number"
        raise TokenizerError(label, problem, "Repair it, or use an intact copy of the model.")
    require_modest_steps(label, tokenizer)
    apply_all_merges(tokenizer)
    limit_templates(tokenizer)


def limit_templates(tokenizer: Any) -> None:
    """Let a tokenizer of transformers refuse conversations that take too much time or memory.

    Its `apply_chat_template` raises a TokenizerError then. What Python code raises in a template,
    as `1 / 0` or a macro that calls itself, is a TemplateError as what Jinja raises.
    """
    apply: Callable[..., Any] | None = getattr(tokenizer, "apply_chat_template", None)
    if apply is None:  # of a server that is given texts
        return
    _limit_numbers()

    @functools.wraps(apply)
    def apply_within_limits(*args: Any, **options: Any) -> Any:
        where = f"{tokenizer.name_or_path}: chat template"
        with limited_memory(2 * MAX_GROWTH_BYTES), limited(where):
            try:
                return apply(*args, **options)
            except (ArithmeticError, AssertionError, AttributeError, RuntimeError) as error:
                from jinja2 import TemplateError

                raise TemplateError(f"{type(error).__name__}: {error}") from error

    tokenizer.apply_chat_template = apply_within_limits


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
