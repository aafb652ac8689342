"""Loss and exact match of a model on questions with short answers.

Texts of similar length form a batch of about BATCH_TOKENS tokens. Padding is on the right, where
causal attention does not see it. Logits are computed for answers only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, TEXT = "Question: {question}\nAnswer:", "Question: {question}\nAnswer: {answer}"
BATCH_TOKENS = 1024
SIZES = {"tune": 250, "test": 1000}  # items of each skill

Items = Sequence[Mapping[str, str]]  # each with `question` and `answer`


@dataclass(frozen=True)
class Scored:
    """Scores in the order of the items.

    Attributes:
        losses: mean negative log-likelihood of the answer's tokens and the end token, in nats.
        right: 1 if each of these tokens is the most likely one after the tokens before it, so that
            greedy decoding gives the answer and stops; else 0.
    """

    losses: Sequence[float]
    right: Sequence[float]


@dataclass(frozen=True)
class Text:
    """Tokens of an item: prompt, answer and end token; the answer begins at `start`."""

    tokens: Sequence[int]
    start: int


def load(folder: Path, dtype: str, device: str = "cpu") -> Any:
    """A model in which the weights of other models can be placed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def fill(model: Any, folder: Path) -> None:
    """Copy the weights of another model of the same shape into it."""
    for file in sorted(folder.glob("*.safetensors")):
        missing, unexpected = model.load_state_dict(load_file(file), strict=False)
        assert not unexpected, (file, unexpected)
        assert set(missing) <= {"lm_head.weight"}, (file, missing)  # tied to the embeddings


def read_items(data: Path, skill: str, split: str) -> list[dict[str, str]]:
    """All items of a split of a skill, in the order of the file."""
    lines = (data / f"{skill}_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def texts(folder: Path, items: Items) -> list[Text]:
    """Tokenise the items."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenizer([PROMPT.format(**item) for item in items])["input_ids"]
    whole = tokenizer([TEXT.format(**item) + tokenizer.eos_token for item in items])["input_ids"]
    return [Text(ids, len(prompt)) for ids, prompt in zip(whole, prompts, strict=True)]


@torch.inference_mode()
def score(model: Any, asked: Sequence[Text]) -> Scored:
    """Score every item, in one forward pass per batch."""
    losses, right = [0.0] * len(asked), [0.0] * len(asked)
    for numbers in _batches(asked):
        found = _of_batch(model, [asked[n] for n in numbers])
        for number, loss, is_right in zip(numbers, found.losses, found.right, strict=True):
            losses[number], right[number] = loss, is_right
    return Scored(losses, right)


def _batches(asked: Sequence[Text]) -> Iterator[list[int]]:
    """Indices of texts of similar length."""
    batch: list[int] = []
    for number in sorted(range(len(asked)), key=lambda n: len(asked[n].tokens)):
        if batch and (len(batch) + 1) * len(asked[number].tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    yield batch


def _of_batch(model: Any, batch: Sequence[Text]) -> Scored:
    longest = max(len(text.tokens) for text in batch) - 1  # nothing comes after the end
    rows = [[*text.tokens[:-1], *[0] * (longest + 1 - len(text.tokens))] for text in batch]
    given = torch.tensor(rows, device=model.device)
    hidden = model.base_model(input_ids=given, use_cache=False).last_hidden_state
    before = [
        row[text.start - 1 : len(text.tokens) - 1] for row, text in zip(hidden, batch, strict=True)
    ]
    expected = [token for text in batch for token in text.tokens[text.start :]]
    answers = torch.tensor(expected, device=model.device)
    logits = model.lm_head(torch.cat(before)).float()
    lengths = [len(text.tokens) - text.start for text in batch]
    losses = cross_entropy(logits, answers, reduction="none").split(lengths)
    likeliest = (logits.argmax(-1) == answers).split(lengths)
    return Scored([float(x.mean()) for x in losses], [float(x.all()) for x in likeliest])
