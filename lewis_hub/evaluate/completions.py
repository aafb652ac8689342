"""What a server of completions answers, compared with what it was asked.

lm-eval takes the likelihoods of a prompt from the places where they should be: a server that does
not echo the prompt has none there, and all likelihoods would be 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.models.openai_completions import LocalCompletionsAPI

from lewis_hub.errors import EvaluationError

ROUNDED = 1e-3  # by which a log probability may be above 0
NO_ECHO = (
    "Use a server that answers `echo` and `logprobs`, as vLLM's does, or score only tasks for "
    "which the model generates text."
)
NO_COMPLETION = "Check that `base_url` is the address of completions, such as /v1/completions."


class CheckedCompletions(LocalCompletionsAPI):  # type: ignore[misc]
    """A server of completions whose answers belong to the requests."""

    def parse_logprobs(
        self,
        outputs: Any,
        tokens: Sequence[Sequence[int]] | None = None,
        ctxlens: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Return likelihood and greedy match of each prompt, as lm-eval does.

        Raises:
            EvaluationError: the log probabilities are not those of the prompts' tokens.
        """
        prompts = tokens or []
        for choice, prompt in zip(self._choices(outputs, len(prompts)), prompts, strict=True):
            n_found = _n_likelihoods(choice.get("logprobs"))
            if n_found != len(prompt) + 1:
                found = "none, or what is none" if n_found is None else f"{n_found:,}"
                problem = "the server was asked for the log probabilities of "
                problem += f"{len(prompt):,} tokens and one more, and gave {found}"
                raise EvaluationError(str(self.base_url), problem, NO_ECHO)
        return super().parse_logprobs(outputs, tokens=tokens, ctxlens=ctxlens, **options)

    def parse_generations(
        self, outputs: Any, contexts: Sequence[Any] | None = None, **options: Any
    ) -> Any:
        """Return the text of each prompt, as lm-eval does.

        Raises:
            EvaluationError: there is not one text for each prompt.
        """
        n_prompts = None if contexts is None else len(contexts)  # of concurrent requests
        for choice in self._choices(outputs, n_prompts):
            if not isinstance(choice.get("text"), str):
                problem = "the server gave an answer without a text"
                raise EvaluationError(str(self.base_url), problem, NO_COMPLETION)
        return super().parse_generations(outputs, contexts=contexts, **options)

    def _choices(self, outputs: Any, n_prompts: int | None) -> list[Mapping[str, Any]]:
        """The answers in the order of the prompts; None: their number is not known."""
        listed = outputs if isinstance(outputs, list) else [outputs]
        found = [one.get("choices") if isinstance(one, Mapping) else None for one in listed]
        choices = [choice for one in found if isinstance(one, list) for choice in one]
        n_prompts = max(1, len(choices)) if n_prompts is None else n_prompts
        by_index = {c.get("index"): c for c in choices if isinstance(c, Mapping)}
        if len(choices) != n_prompts or by_index.keys() != set(range(n_prompts)):
            problem = f"the server gave {len(choices):,} answers to {n_prompts:,} prompts"
            if len(choices) == n_prompts:
                problem = f"the server did not number its {n_prompts:,} answers from 0"
            raise EvaluationError(str(self.base_url), problem, NO_COMPLETION)
        return [by_index[number] for number in range(n_prompts)]


def _n_likelihoods(found: Any) -> int | None:
    """How many log probabilities a choice has; None if they are no such numbers."""
    if not isinstance(found, Mapping):
        return None
    own, best = found.get("token_logprobs"), found.get("top_logprobs")
    if not isinstance(own, list) or not isinstance(best, list) or len(own) != len(best):
        return None
    above = [list(one.values()) if isinstance(one, Mapping) else [math.nan] for one in best[1:]]
    numbers = [*own[1:], *(value for values in above for value in values)]
    is_whole = all(map(_is_log_probability, numbers)) and all(above)
    return len(own) if is_whole else None


def _is_log_probability(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value <= ROUNDED
