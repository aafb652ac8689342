"""How surprised a model is by the right answers: their negative log-likelihood, token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lewis_hub.evaluate.harness import affordable_batch, fitting_threads
from lewis_hub.evaluate.items import Question
from lewis_hub.evaluate.results import MetricResult
from lewis_hub.evaluate.tasks import quiet_libraries
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from torch import Tensor


NAME = "answer_loss,none"
CPU_BYTES = 1_000_000_000  # of logits


@dataclass(frozen=True)
class AnswerLoss:
    """Of one item: the sum over its answer's tokens, in nats, and how many they are."""

    nats: float
    n_tokens: int


@dataclass(frozen=True)
class _Encoded:
    place: int
    tokens: tuple[int, ...]  # as the model reads them: without the last
    targets: tuple[int, ...]  # the answer's


def answer_losses(lm: Any, asked: Sequence[Question], advance: Advance) -> list[AnswerLoss]:
    """Score the right answers, in the order of the questions; none is one without tokens.

    Prompt and answer become tokens as lm-eval's own loglikelihoods do; what is too long loses its
    beginning. Padding comes last, where no token of a text sees it.

    Args:
        lm: from `harness.load`.
        asked: texts. An empty answer has 0 nats over 0 tokens.
        advance: called with the number of items done.
    """
    with quiet_libraries():
        encoded = [_encoded(lm, place, one) for place, one in enumerate(asked)]
    found = [AnswerLoss(0.0, 0)] * len(asked)
    with fitting_threads(lm):
        for batch in _batches(lm, [one for one in encoded if one.targets]):
            for one, nats in zip(batch, _nats(lm, batch), strict=True):
                found[one.place] = AnswerLoss(nats, len(one.targets))
            advance(len(batch))
    advance(sum(not one.targets for one in encoded))
    return found


def metric(losses: Sequence[AnswerLoss]) -> MetricResult:
    """The mean over all answer tokens, as a mean over items: long answers count for more."""
    n_answers = sum(loss.n_tokens > 0 for loss in losses)
    n_tokens = sum(loss.n_tokens for loss in losses)
    values = tuple(loss.nats * n_answers / n_tokens if loss.n_tokens else None for loss in losses)
    mean = sum(loss.nats for loss in losses) / n_tokens if n_tokens else float("nan")
    return MetricResult(mean, values, higher_is_better=False)


def _encoded(lm: Any, place: int, one: Question) -> _Encoded:
    if not one.answer:
        return _Encoded(place, (), ())
    if one.prompt:
        prompt, answer = lm._encode_pair(one.prompt, one.answer)
    else:
        prompt, answer = [lm.prefix_token_id], lm.tok_encode(one.answer)
    whole = [*prompt, *answer][-lm.max_length - 1 :]
    targets = tuple(answer[-len(whole) + 1 :])
    return _Encoded(place, tuple(whole[:-1]), targets)


def _batches(lm: Any, encoded: Sequence[_Encoded]) -> Iterator[list[_Encoded]]:
    """Texts of like length together, the longest first, so that little is padding."""
    left = sorted(encoded, key=lambda one: (-len(one.tokens), one.place))
    n_vocabulary = lm.model.config.get_text_config().vocab_size
    while left:
        n = affordable_batch(len(left[0].tokens), n_vocabulary, CPU_BYTES)
        yield left[:n]
        left = left[n:]


def _nats(lm: Any, batch: Sequence[_Encoded]) -> list[float]:
    """Of each text of a batch, over its answer."""
    import torch

    longest = max(len(one.tokens) for one in batch)
    rows = [one.tokens + (0,) * (longest - len(one.tokens)) for one in batch]
    mask = [[int(i < len(one.tokens)) for i in range(longest)] for one in batch]
    starts = [len(one.tokens) - len(one.targets) for one in batch]
    first = min(starts)  # logits before every answer are never made, where the model can be told so
    told = "logits_to_keep" in inspect.signature(lm.model.forward).parameters
    more = {"logits_to_keep": longest - first} if told else {}
    with torch.inference_mode():
        logits: Tensor = lm.model(
            input_ids=torch.tensor(rows, device=lm.device),
            attention_mask=torch.tensor(mask, device=lm.device),
            **more,
        ).logits[:, first - longest :]
        found = []
        for row, start, one in zip(logits, starts, batch, strict=True):
            own = row[start - first : start - first + len(one.targets)].float()
            targets = torch.tensor(one.targets, device=own.device)
            found.append(float(torch.nn.functional.cross_entropy(own, targets, reduction="sum")))
    return found
