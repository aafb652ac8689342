"""A tokenizer's chat template, used as lm-eval uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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
