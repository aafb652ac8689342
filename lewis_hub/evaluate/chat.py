"""Tokenizers and chat templates of others, within limits of time and memory.

Jinja's sandbox bounds neither.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import operator
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lewis_hub.errors import TokenizerError
from lewis_hub.system import limited_memory, resident_bytes
from lewis_hub.text_growth import require_modest_steps
from lewis_hub.tokenizer import apply_all_merges

MAX_S = 10.0  # of one conversation; real templates take milliseconds
MAX_GROWTH_BYTES = 1 << 30  # of this process meanwhile
CHECK_EVERY_S = 0.02
LAST_S = 30.0  # C code that no error stops, as it compares nested lists, ends with the process
STDERR = 2  # sys.stderr may be none of the system's files
MAX_BITS = 1 << 20  # of a number that a template computes: larger ones take C code very long
WATCH = "limit of a chat template"
REMEDY = "Set `chat_template` in the recipe, or use a copy of the model with another template."


class _LimitError(BaseException):
    """Raised in a thread that renders too long; no template can catch it."""


def limit_tokenizer(label: str, tokenizer: Any) -> None:
    """Make a loaded tokenizer of transformers safe to use: its steps, merges and chat templates.

    Raises:
        TokenizerError: its steps may make a text very long.
    """
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

    C code that keeps the interpreter for itself cannot be stopped, not by Ctrl-C either: after
    LAST_S the process ends, with exit code 1, and stderr says where it was.

    Raises:
        TokenizerError: it took too much time or memory; it names `where`.
    """
    watch = _Watch(threading.get_ident())
    try:
        faulthandler.dump_traceback_later(LAST_S, exit=True, file=STDERR)
        threading.Thread(target=watch.run, name=WATCH, daemon=True).start()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            watch.end()
    except (_LimitError, MemoryError):
        problem = watch.problem or "it takes too much memory"
        raise TokenizerError(where, problem, REMEDY) from None


class _Watch:
    """Watches a thread, and raises an error in it if it takes too much."""

    def __init__(self, thread_id: int) -> None:
        self.problem = ""
        self._thread_id, self._ended, self._turn = thread_id, threading.Event(), threading.Lock()

    def run(self) -> None:
        began, before = time.monotonic(), resident_bytes() or 0
        while not self._ended.wait(CHECK_EVERY_S):
            problem = ""
            if time.monotonic() - began > MAX_S:
                problem = f"it takes more than {MAX_S:g} s for one conversation"
            elif (resident_bytes() or 0) - before > MAX_GROWTH_BYTES:
                problem = f"it takes more than {MAX_GROWTH_BYTES / 1e9:.1f} GB for one conversation"
            with self._turn:
                if problem and not self._ended.is_set():
                    self.problem = problem
                    stop = ctypes.py_object(_LimitError)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(self._thread_id), stop
                    )
                    return

    def end(self) -> None:
        """End the watch; an error that was raised too late reaches the caller in here."""
        with self._turn:
            self._ended.set()
        if self.problem:
            time.sleep(0)
