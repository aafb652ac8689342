"""The loss of a model on the right answers: their negative log-likelihood, summed over tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lewis_hub.evaluate.harness import affordable_batch, quiet_libraries, threads_for
from lewis_hub.evaluate.items import Question
from lewis_hub.evaluate.scores import MetricResult
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from torch import Tensor

NAME = "answer_loss,none"
CPU_BYTES = 1_000_000_000  # of logits


@dataclass(frozen=True)
class AnswerLoss:
    """The loss on one item: the sum over the answer's tokens, in nats, and their number."""

    nats: float
    n_tokens: int


@dataclass(frozen=True)
class _Encoded:
    place: int
    tokens: tuple[int, ...]  # the model's input: all but the last
    targets: tuple[int, ...]  # of the answer


def answer_losses(lm: Any, questions: Sequence[Question], advance: Advance) -> list[AnswerLoss]:
    """Score the right answers, in the order of the questions.

    Prompt and answer are tokenized as in lm-eval's loglikelihood; a text that is too long loses its
    beginning. Padding comes last, where no token of a text attends to it.

    Args:
        lm: from `harness.load`.
        questions: an empty answer has 0 nats over 0 tokens.
        advance: called with the number of items done.
    """
    with quiet_libraries():
        encoded = [_encode(lm, place, question) for place, question in enumerate(questions)]
    losses = [AnswerLoss(0.0, 0)] * len(questions)
    with threads_for(lm.model):
        for batch in _batches(lm, [text for text in encoded if text.targets]):
            for text, nats in zip(batch, _nats(lm, batch), strict=True):
                losses[text.place] = AnswerLoss(nats, len(text.targets))
            advance(len(batch))
    advance(sum(not text.targets for text in encoded))
    return losses


def metric(losses: Sequence[AnswerLoss]) -> MetricResult:
    """The mean over all answer tokens, as a mean over items: long answers count for more."""
    n_answers = sum(loss.n_tokens > 0 for loss in losses)
    n_tokens = sum(loss.n_tokens for loss in losses)
    values = tuple(loss.nats * n_answers / n_tokens if loss.n_tokens else None for loss in losses)
    mean = sum(loss.nats for loss in losses) / n_tokens if n_tokens else float("nan")
    return MetricResult(mean, values, higher_is_better=False)


def _encode(lm: Any, place: int, question: Question) -> _Encoded:
    """Tokens of a prompt and its answer; white space at the end of a prompt joins the answer."""
    if not question.answer:
        return _Encoded(place, (), ())
    if question.prompt:
        before = question.prompt.rstrip()
        prompt, whole = lm.tok_encode(before), lm.tok_encode(question.prompt + question.answer)
        answer = whole[len(prompt) :]
    else:
        prompt, answer = [lm.prefix_token_id], lm.tok_encode(question.answer)
    tokens = [*prompt, *answer][-lm.max_length - 1 :]
    return _Encoded(place, tuple(tokens[:-1]), tuple(answer[-len(tokens) + 1 :]))


def _batches(lm: Any, encoded: Sequence[_Encoded]) -> Iterator[list[_Encoded]]:
    """Batches of similar length, the longest first, so that there is little padding."""
    left = sorted(encoded, key=lambda text: (-len(text.tokens), text.place))
    n_vocabulary = lm.model.config.get_text_config().vocab_size
    while left:
        n = affordable_batch(len(left[0].tokens), n_vocabulary, CPU_BYTES)
        yield left[:n]
        left = left[n:]


def _nats(lm: Any, batch: Sequence[_Encoded]) -> list[float]:
    """The loss of each text of a batch, summed over its answer."""
    import torch

    longest = max(len(text.tokens) for text in batch)
    rows = [text.tokens + (0,) * (longest - len(text.tokens)) for text in batch]
    mask = [[int(i < len(text.tokens)) for i in range(longest)] for text in batch]
    starts = [len(text.tokens) - len(text.targets) for text in batch]
    first = min(starts)  # models with `logits_to_keep` compute no logits before the answers
    keeps = "logits_to_keep" in inspect.signature(lm.model.forward).parameters
    options = {"logits_to_keep": longest - first} if keeps else {}
    with torch.inference_mode():
        logits: Tensor = lm.model(
            input_ids=torch.tensor(rows, device=lm.device),
            attention_mask=torch.tensor(mask, device=lm.device),
            **options,
        ).logits[:, first - longest :]
        nats = []
        for row, start, text in zip(logits, starts, batch, strict=True):
            own = row[start - first : start - first + len(text.targets)].float()
            targets = torch.tensor(text.targets, device=own.device)
            nats.append(float(torch.nn.functional.cross_entropy(own, targets, reduction="sum")))
    return nats
