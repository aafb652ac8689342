"""Other people's libraries kept off the terminal: whoever calls us owns it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

LOGGERS = ("lm_eval", "datasets", "transformers", "accelerate", "huggingface_hub")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back warnings, log lines below an error and progress bars of lm-eval and what it calls.

    Everything is as before afterwards. Nothing of ours runs inside but the calls to lm-eval.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        _hide_bars(stack)  # imports the libraries, and with that sets their log levels
        for name in LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def _hide_bars(stack: ExitStack) -> None:
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from datasets import utils as datasets_utils
    from transformers.utils import logging as untyped

    transformers_logging: Any = untyped

    if not datasets_utils.are_progress_bars_disabled():
        datasets_utils.disable_progress_bars()
        stack.callback(datasets_utils.enable_progress_bars)
    if transformers_logging.is_progress_bar_enabled():
        transformers_logging.disable_progress_bar()
        stack.callback(transformers_logging.enable_progress_bar)
    # lm-eval has no switch for its bars: the name that each of its modules draws them by is lent
    for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
        _lend_silent_bar(stack, module)


def _lend_silent_bar(stack: ExitStack, module: ModuleType) -> None:
    bar: Any = module.tqdm

    def silent(*args: Any, **kwargs: Any) -> Any:
        return bar(*args, **{**kwargs, "disable": True})

    stack.callback(setattr, module, "tqdm", bar)
    module.tqdm = silent  # type: ignore[attr-defined]
