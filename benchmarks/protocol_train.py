"""AdamW for PROTOCOL.md: experts, and merges that go on training on the calibration texts.

All of it trains the matrices of the blocks, in float32; embeddings, norms and biases stay.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from answers import Text, load
from protocol_tasks import Training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.utils import parametrize
from transformers import AutoTokenizer

SEED = 7
WARM_UP = 10  # steps
BATCH = 8  # calibration texts of a step, when a merge is trained


class LowRank(nn.Module):
    """LoRA: W + 2 B A, with B of zeros at the start (arXiv 2106.09685, alpha = 2 rank)."""

    def __init__(self, shape: torch.Size, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, shape[1]) / shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2 * self.b @ self.a


def seconds(device: str) -> float:
    """The processor time of all cores; on a GPU the time of the clock, when its work is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def train_expert(  # noqa: PLR0913 (one training)
    base: Path, texts: Sequence[Text], kind: str, how: Training, out: Path, device: str
) -> None:
    """Train one expert on answers only, and write it in bfloat16."""
    torch.manual_seed(SEED)
    model = load(base, "float32", device)
    matrices = _matrices(model)
    model.requires_grad_(requires_grad=False)
    rate = how.full_rate if kind == "full" else how.lora_rate
    if kind == "full":
        trained = [module.weight.requires_grad_() for module in matrices]
    else:
        for module in matrices:
            low = LowRank(module.weight.shape, how.lora_rank).to(device)
            parametrize.register_parametrization(module, "weight", low)
        trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    rng = random.Random(SEED)
    for step in range(how.n_steps):
        pace = min(1.0, (step + 1) / WARM_UP, (how.n_steps - step) / (0.4 * how.n_steps))
        optimizer.param_groups[0]["lr"] = rate * pace
        _step(optimizer, trained, answer_loss(model, rng.sample(texts, how.batch)))
    if kind == "lora":
        for module in matrices:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    save(model, base, out)


def save(model: Any, base: Path, out: Path) -> None:
    """Write a model in bfloat16, with the tokenizer of its base."""
    model.config.dtype = torch.bfloat16
    model.bfloat16().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def train_for(
    model: Any, loss: Callable[[random.Random], Tensor], rate: float, budget_s: float
) -> int:
    """Train the float32 model in place until `budget_s` is used (`seconds`); return the steps."""
    device = str(model.device)
    model.requires_grad_(requires_grad=False)
    trained = [module.weight.requires_grad_() for module in _matrices(model)]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    rng, began, n_steps = random.Random(SEED), seconds(device), 0
    while (used := seconds(device) - began) < budget_s:
        pace = min(1.0, (n_steps + 1) / WARM_UP, max(0.0, 1 - used / budget_s) / 0.4)
        optimizer.param_groups[0]["lr"] = rate * pace
        _step(optimizer, trained, loss(rng))
        n_steps += 1
    return n_steps


def fine_tuning(model: Any, texts: Sequence[Sequence[Text]]) -> Callable[[random.Random], Tensor]:
    """The loss of answers in texts of all experts."""
    together = [text for own in texts for text in own]
    return lambda rng: answer_loss(model, rng.sample(together, min(BATCH, len(together))))


def distillation(
    model: Any, experts: Sequence[Path], texts: Sequence[Sequence[Text]]
) -> Callable[[random.Random], Tensor]:
    """KL(expert || model) of the next token, over all tokens of a batch of one expert's texts.

    The experts' last hidden states are computed once; their heads are those of the base.
    """
    states: list[list[Tensor]] = []
    for folder, own in zip(experts, texts, strict=True):
        teacher = load(folder, "float32", str(model.device))
        states.append(list(_hidden(teacher, own)))
        del teacher

    def loss(rng: random.Random) -> Tensor:
        expert = rng.randrange(len(texts))
        chosen = rng.sample(range(len(texts[expert])), min(BATCH, len(texts[expert])))
        batch = [texts[expert][n] for n in chosen]
        with torch.no_grad():
            taught = model.lm_head(torch.cat([states[expert][n] for n in chosen]))
        said = model.lm_head(_forward(model, batch)[_kept(batch, whole=True).to(model.device)])
        target = log_softmax(taught, -1)
        return kl_div(log_softmax(said, -1), target, reduction="batchmean", log_target=True)

    return loss


def answer_loss(model: Any, batch: Sequence[Text]) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens."""
    longest = max(len(text.tokens) for text in batch)
    rows = torch.tensor([[*text.tokens, *[0] * (longest - len(text.tokens))] for text in batch])
    rows, kept = rows.to(model.device), _kept(batch, whole=False).to(model.device)
    logits = model.lm_head(_forward(model, batch)[kept])
    return cross_entropy(logits, rows[:, 1:][kept])


def _forward(model: Any, batch: Sequence[Text]) -> Tensor:
    longest = max(len(text.tokens) for text in batch)
    rows = [[*text.tokens, *[0] * (longest - len(text.tokens))] for text in batch]
    given = torch.tensor(rows, device=model.device)[:, :-1]
    hidden: Tensor = model.base_model(input_ids=given, use_cache=False).last_hidden_state
    return hidden


def _kept(batch: Sequence[Text], *, whole: bool) -> Tensor:
    """Which next tokens count: those of answers, or of whole texts."""
    longest = max(len(text.tokens) for text in batch)
    return torch.tensor(
        [
            [(1 if whole else text.start) <= n < len(text.tokens) for n in range(1, longest)]
            for text in batch
        ]
    )


@torch.inference_mode()
def _hidden(teacher: Any, texts: Sequence[Text]) -> Iterator[Tensor]:
    for text in texts:
        yield _forward(teacher, [text])[0].clone()


def _matrices(model: Any) -> list[nn.Linear]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    ]


def _step(optimizer: torch.optim.Optimizer, trained: Sequence[Tensor], loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
