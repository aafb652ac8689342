"""What a model makes of questions with short answers: the loss of each, and whether it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, TEXT = "Question: {question}\nAnswer:", "Question: {question}\nAnswer: {answer}"
BATCH = 25

Items = Sequence[Mapping[str, str]]  # each with `question` and `answer`


@dataclass(frozen=True)
class Scored:
    """Item by item, in the items' order.

    Attributes:
        losses: mean negative log-likelihood of the answer's tokens and of the end, in nats.
        right: 1 where each of them is the likeliest after those before, which is what greedy
            decoding needs to give the answer and stop; else 0.
    """

    losses: Sequence[float]
    right: Sequence[float]


def score(folder: Path, items: Mapping[str, Items], dtype: str) -> dict[str, Scored]:
    """Score the items of each skill: one forward pass, and logits of answers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return {skill: _of_skill(model, tokenizer, told) for skill, told in items.items()}


def _of_skill(model: Any, tokenizer: Any, items: Items) -> Scored:
    starts = [len(tokenizer(PROMPT.format(**item))["input_ids"]) for item in items]
    ids = [tokenizer(TEXT.format(**item) + tokenizer.eos_token)["input_ids"] for item in items]
    by_length = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    losses, right = [0.0] * len(ids), [0] * len(ids)
    for first in range(0, len(ids), BATCH):
        numbers = by_length[first : first + BATCH]
        found = _of_batch(model, [ids[n] for n in numbers], [starts[n] for n in numbers])
        for number, loss, is_right in zip(numbers, found.losses, found.right, strict=True):
            losses[number], right[number] = loss, is_right
    return Scored(losses, right)


@torch.no_grad()
def _of_batch(model: Any, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Scored:
    """Padding is on the right, where causal attention never looks."""
    longest = max(map(len, ids))
    rows = torch.tensor([[*one, *[0] * (longest - len(one))] for one in ids])
    hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state
    spans = [(start, len(one)) for start, one in zip(starts, ids, strict=True)]
    before = [row[start - 1 : end - 1] for row, (start, end) in zip(hidden, spans, strict=True)]
    answers = torch.tensor([t for one, start in zip(ids, starts, strict=True) for t in one[start:]])
    logits = model.lm_head(torch.cat(before)).float()
    lengths = [end - start for start, end in spans]
    losses = cross_entropy(logits, answers, reduction="none").split(lengths)
    likeliest = (logits.argmax(-1) == answers).split(lengths)
    return Scored([float(x.mean()) for x in losses], [int(x.all()) for x in likeliest])
