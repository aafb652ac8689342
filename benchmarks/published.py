"""What the authors of LEWIS run to measure models, in words of our own, for `calibration.py`.

    python benchmarks/published.py TEXTS MODEL [MODEL ...] OUTPUT

TEXTS has a JSON object with `text` a line. Each model is measured, and pruned on the way, one after
the other; OUTPUT gets the importance of every matrix, and what each model but the first differs by.

It follows the published code (arXiv:2503.03874) in all that costs time or memory: every text is
padded to 512 tokens and runs alone; all texts run through a block, its matrices are measured and
pruned by a sort of every row, and all run through it again; two buffers hold the hidden states of
128 texts; and what a matrix was handed is kept, though nobody reads it, until its block is done.
It differs in that the arithmetic is float32, as half precision is slow on a CPU, and an input that
is kept is therefore no copy; and in that a block is called with all that transformers hands it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

N_TOKENS = 512  # of every text, once padded
N_HELD = 128  # texts that the buffers have room for
PRUNED = 0.5  # of every row


class Watched:
    """A matrix: the mean over texts of what its inputs' squares come to, and the inputs."""

    def __init__(self, module: nn.Linear) -> None:
        self.squares = torch.zeros(module.weight.shape[1])
        self.n_texts = 0
        self.kept: list[Tensor] = []

    def see(self, _: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).T.float()
        self.n_texts += 1
        self.squares *= (self.n_texts - 1) / self.n_texts
        self.squares += x.norm(dim=1) ** 2 / self.n_texts
        self.kept.append(x)


class _EnteredError(Exception):
    """The first block was called."""


def importance(model: Any, texts: Tensor) -> dict[str, float]:
    """Measure and prune block by block.

    Args:
        model: a Llama-like decoder in float32 and eval mode; half of its matrices' entries are 0
            on return.
        texts: (n_texts, n_tokens) int64, at most 128 texts.

    Returns:
        `BLOCK.MODULE` -> importance.
    """
    blocks, found = model.model.layers, {}
    with torch.no_grad():
        before, after, named = _entered(model, texts)
        for number, block in enumerate(blocks):
            inside = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            watched = {name: Watched(module) for name, module in inside.items()}
            handles = [inside[n].register_forward_hook(one.see) for n, one in watched.items()]
            _run(block, len(texts), before, after, named)
            for handle in handles:
                handle.remove()
            for name, module in inside.items():
                metric = module.weight.abs() * watched[name].squares.sqrt()
                found[f"{number}.{name}"] = float(metric.norm())
                _prune(module, metric)
            _run(block, len(texts), before, after, named)
            before, after = after, before
    return found


def _entered(model: Any, texts: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Hidden states before the first block, room for as many, and what blocks are called with."""
    before = torch.zeros(N_HELD, texts.shape[1], model.config.hidden_size)
    named: dict[str, Any] = {}

    rows = iter(before)

    def leave(_: nn.Module, args: tuple[Tensor, ...], others: dict[str, Any]) -> None:
        next(rows).copy_(args[0][0])
        named.update(others)
        raise _EnteredError

    handle = model.model.layers[0].register_forward_pre_hook(leave, with_kwargs=True)
    for text in texts:
        try:
            model(text[None], use_cache=False)
        except _EnteredError:
            continue
    handle.remove()
    return before, torch.zeros_like(before), named


def _run(
    block: nn.Module, n_texts: int, before: Tensor, after: Tensor, named: Mapping[str, Any]
) -> None:
    for number in range(n_texts):
        returned = block(before[number][None], **named)
        after[number] = (returned[0] if isinstance(returned, tuple) else returned)[0]


def _prune(module: nn.Linear, metric: Tensor) -> None:
    """Set the entries of each row that matter least to zero; of equal ones, the first."""
    least = metric.sort(dim=-1, stable=True).indices[:, : int(metric.shape[1] * PRUNED)]
    mask = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, least, value=True)
    module.weight[mask] = 0


def padded(folder: str, texts: Sequence[str]) -> Tensor:
    """(n_texts, 512) int64, with end-of-sequence tokens after what there is of each text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    how = {"padding": "max_length", "truncation": True, "max_length": N_TOKENS}
    return torch.tensor([tokenizer(text, **how)["input_ids"] for text in texts])


def differences(base: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """|other - base|, of each component as shares of its sum over the blocks."""
    sums: defaultdict[str, float] = defaultdict(float)
    found = {name: abs(other[name] - base[name]) for name in base}
    for name, difference in found.items():
        sums[name.partition(".")[2]] += difference
    return {name: d / (sums[name.partition(".")[2]] or 1) for name, d in found.items()}


def main() -> None:
    file, *folders, output = sys.argv[1:]
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    measured = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        measured.append(importance(model, padded(folder, texts)))
        del model
    told = [measured, [differences(measured[0], other) for other in measured[1:]]]
    Path(output).mkdir(parents=True, exist_ok=True)
    (Path(output) / "published.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
