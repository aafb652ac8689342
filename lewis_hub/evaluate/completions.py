"""What a server of completions answers, compared with what it was asked.

lm-eval takes the likelihoods of a prompt from the places where they should be: a server that does
not echo the prompt has none there, and all likelihoods would be 0. It also reads whatever comes, so
requests are made here: the answer to each has a limit of size, and `timeout` is all its time.
"""

from __future__ import annotations

import asyncio
import copy
import math
import os
import ssl
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import certifi
from lm_eval.models.openai_completions import LocalCompletionsAPI

from lewis_hub.display import line_of
from lewis_hub.documents import MAX_TABLE_BYTES, DocumentError, read_json
from lewis_hub.errors import EvaluationError

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession  # of an extra

BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # name certificates in place of certifi's
ROUNDED = 1e-3  # by which a log probability may be above 0
NO_ECHO = (
    "Use a server that answers `echo` and `logprobs`, as vLLM's does, or score only tasks for "
    "which the model generates text."
)
ANSWER_BYTES, TOKEN_BYTES = 1 << 20, 1000  # of an answer, and for each token asked or answered
SHOWN_ERROR = 200  # characters of what a server tells
SMALLER = "Check `base_url`, and set a smaller `batch_size` in `evaluate` if it is right."
NO_COMPLETION = "Check that `base_url` is the address of completions, such as /v1/completions."


class CheckedCompletions(LocalCompletionsAPI):  # type: ignore[misc]
    """A server of completions whose answers belong to the requests, and have limits."""

    def model_call(self, messages: Sequence[Any], **options: Any) -> Any:
        """Return what the server answers to one request; raises as `amodel_call`."""
        asked = self._asked_alone(messages, **options)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(asked)
        with ThreadPoolExecutor(1) as pool:  # a loop runs in this thread, as in a notebook
            return pool.submit(asyncio.run, asked).result()

    async def amodel_call(
        self,
        session: ClientSession,
        sem: asyncio.Semaphore,
        messages: Sequence[Any],
        *,
        generate: bool = True,
        cache_keys: Sequence[Any] | None = None,
        ctxlens: Sequence[int] | None = None,
        **options: Any,
    ) -> list[Any]:
        """Return the texts or likelihoods that the server answers to one request of many.

        Raises:
            EvaluationError: the answer is too large, compressed or no JSON; or it does not fit.
            OSError: there is none, or not within `timeout`.
        """
        async with sem:
            outputs = await self._asked(session, messages, generate=generate, **options)
        if generate:
            answers = self.parse_generations(outputs, messages)
        else:
            answers = self.parse_logprobs(outputs, tokens=messages, ctxlens=ctxlens)
        kind = "generate_until" if generate else "loglikelihood"
        for answer, key in zip(answers, cache_keys or (), strict=False):
            self.cache_hook.add_partial(kind, key, answer)
        return list(answers)

    async def _asked_alone(self, messages: Sequence[Any], **options: Any) -> Any:
        from aiohttp import ClientSession, ClientTimeout

        timeout = ClientTimeout(total=self.timeout)
        async with ClientSession(timeout=timeout, trust_env=True) as session:
            return await self._asked(session, messages, **options)

    async def _asked(
        self,
        session: ClientSession,
        messages: Sequence[Any],
        *,
        generate: bool = True,
        gen_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """What the server answers to a request, read as JSON."""
        request = self._create_payload(
            self.create_message(messages),
            generate=generate,
            gen_kwargs=copy.deepcopy(gen_kwargs),  # lm-eval takes its keys out, and asks again
            seed=self._seed,
            eos=self.eos_string,
            **options,
        )
        n_tokens = sum(map(len, messages)) + len(messages) * int(request["max_tokens"])
        max_bytes = min(MAX_TABLE_BYTES, ANSWER_BYTES + n_tokens * TOKEN_BYTES)
        content = await self._answer(session, request, max_bytes)
        try:
            return read_json(content, max_bytes)
        except DocumentError as error:
            problem = f"the answer of the server cannot be read: {error}"
            raise EvaluationError(str(self.base_url), problem, SMALLER) from None
        except ValueError as error:
            problem = f"the answer of the server is no JSON: {error}"
            raise EvaluationError(str(self.base_url), problem, NO_COMPLETION) from None

    async def _answer(
        self, session: ClientSession, request: Mapping[str, Any], max_bytes: int
    ) -> bytes:
        from aiohttp import ClientConnectorError, ClientError

        headers = {**self.header, "Accept-Encoding": "identity"}
        try:
            async with session.post(
                self.base_url,
                json=request,
                headers=headers,
                ssl=self._trusted,
                auto_decompress=False,
            ) as answer:
                return await self._body(answer, max_bytes)
        except ClientConnectorError as error:
            raise error.os_error from None
        except TimeoutError:
            raise TimeoutError(f"it took more than {self.timeout} s") from None
        except ClientError as error:
            raise ConnectionError(str(error)) from None

    @cached_property
    def _trusted(self) -> bool | ssl.SSLContext:
        """The certificates that `requests` trusts; aiohttp reuses connections of one context."""
        if not self.verify_certificate or not self.base_url.startswith("https:"):
            return bool(self.verify_certificate)
        own = next(filter(None, map(os.environ.get, BUNDLES)), certifi.where())
        if Path(own).is_dir():
            return ssl.create_default_context(capath=own)
        return ssl.create_default_context(cafile=own)

    async def _body(self, answer: ClientResponse, max_bytes: int) -> bytes:
        encoding = answer.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            problem = f"the server compressed its answer ({line_of(encoding, 40)}), unasked"
            raise EvaluationError(str(self.base_url), problem, NO_COMPLETION)
        content = bytearray()
        async for piece in answer.content.iter_any():
            content += piece
            if len(content) > max_bytes:
                problem = f"the server answered more than {max_bytes:,} bytes to a request"
                raise EvaluationError(str(self.base_url), problem, SMALLER)
        if not answer.ok:
            text = content.decode(errors="replace")
            text = text.replace(self.api_key, "...") if self.api_key else text
            problem = f"the server answered {answer.status}: {line_of(text, SHOWN_ERROR)}"
            raise EvaluationError(str(self.base_url), problem, NO_COMPLETION)
        return bytes(content)

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

    def parse_generations(self, outputs: Any, contexts: Sequence[Any], **options: Any) -> Any:
        """Return the text of each prompt, as lm-eval does.

        Raises:
            EvaluationError: there is not one text for each prompt.
        """
        for choice in self._choices(outputs, len(contexts)):
            if not isinstance(choice.get("text"), str):
                problem = "the server gave an answer without a text"
                raise EvaluationError(str(self.base_url), problem, NO_COMPLETION)
        return super().parse_generations(outputs, contexts=contexts, **options)

    def _choices(self, outputs: Any, n_prompts: int) -> list[Mapping[str, Any]]:
        """The answers in the order of the prompts."""
        listed = outputs if isinstance(outputs, list) else [outputs]
        found = [one.get("choices") if isinstance(one, Mapping) else None for one in listed]
        choices = [choice for one in found if isinstance(one, list) for choice in one]
        found_at = [(c.get("index"), c) for c in choices if isinstance(c, Mapping)]
        by_index = {index: choice for index, choice in found_at if type(index) is int}
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
