"""How far the predictions of a merged model are from those of an expert, on the same texts.

The drift of a token is the Kullback-Leibler divergence of the merged model's distribution q of the
next token from the expert's distribution p, in nats:

    D(p || q) = sum_v p(v) (log p(v) - log q(v))

With a large vocabulary only the expert's likeliest tokens K are stored, and all others count as
one token, r. By the log sum inequality this is a lower bound:

    D(p || q) >= sum_{v in K} p(v) (log p(v) - log q(v)) + p(r) (log p(r) - log q(r))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lewis_hub.calibration.texts import TOGETHER, CalibrationTokens, TokenBatch, batches

LOGITS_BYTES = 1_000_000_000  # of one batch


@dataclass(frozen=True)
class Predictions:
    """Distributions of the next token; `tokens` and `log_rest` are None if every token is kept."""

    log_probabilities: Tensor  # (n_predicted, n_kept) float32
    tokens: Tensor | None  # (n_predicted, n_kept) int32
    log_rest: Tensor | None  # (n_predicted,) float32, of all other tokens together

    def rows(self, start: int, stop: int) -> Predictions:
        """The predictions from `start` to `stop`."""
        return stored({name: value[start:stop] for name, value in self.named().items()})

    def named(self) -> dict[str, Tensor]:
        """The tensors by name, for a file."""
        return {name: value for name, value in vars(self).items() if value is not None}


def stored(named: Mapping[str, Tensor]) -> Predictions:
    """The predictions with these tensors."""
    return Predictions(named["log_probabilities"], named.get("tokens"), named.get("log_rest"))


def log_probabilities(model: Any, tokens: CalibrationTokens, n_vocabulary: int) -> Iterator[Tensor]:
    """Yield log p of every token at each predicted place, text by text.

    The tensors are (n_predicted, n_vocabulary) float32 on the model's device, in an order that
    depends on the texts and `n_vocabulary` alone, which bounds the texts of a forward pass.
    """
    together = min(TOGETHER, max(1, LOGITS_BYTES // (4 * n_vocabulary)))
    for batch in batches(tokens, together):
        for row, n_tokens in zip(_logits(model, batch), batch.attention_mask.sum(1), strict=True):
            yield row[: int(n_tokens) - 1].float().log_softmax(dim=-1)


def _logits(model: Any, batch: TokenBatch) -> Tensor:
    ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def likeliest(log_p: Tensor, n_kept: int) -> Predictions:
    """Keep the likeliest tokens of each prediction (n_predicted, n_vocabulary), and the rest."""
    if n_kept >= log_p.shape[1]:
        return Predictions(log_p.cpu(), None, None)
    kept = log_p.topk(n_kept, dim=-1)
    rest = _log_rest(log_p, kept.indices)
    return Predictions(kept.values.cpu(), kept.indices.int().cpu(), rest.cpu())


def joined(predictions: Iterable[Predictions]) -> Predictions:
    """Join predictions of several texts, of which either all or none keep every token."""
    parts = [one.named() for one in predictions]
    return stored({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def divergence(expert: Predictions, log_q: Tensor) -> Tensor:
    """D(p || q) of each prediction, (n_predicted,) float64, on the CPU.

    `log_q` is (n_predicted, n_vocabulary) float32. The sum is at least 0 in exact arithmetic, and
    exactly 0 if both are equal to the last bit.
    """
    if expert.tokens is None or expert.log_rest is None:
        return _terms(expert.log_probabilities, log_q.cpu()).sum(dim=-1)
    tokens = expert.tokens.long().to(log_q.device)
    known = _terms(expert.log_probabilities, log_q.gather(1, tokens).cpu()).sum(dim=-1)
    return known + _terms(expert.log_rest, _log_rest(log_q, tokens).cpu())


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log p - log q), which is 0 if p is 0."""
    p = log_p.double().exp()
    return torch.where(p > 0, p * (log_p.double() - log_q.double()), 0.0)


def _log_rest(log_p: Tensor, tokens: Tensor) -> Tensor:
    """The logarithm of the probability of all other tokens."""
    return log_p.scatter(1, tokens, -torch.inf).logsumexp(dim=-1)
