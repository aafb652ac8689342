"""Our implementation of the LEWIS authors' measurement, for `calibration.py`.

    python benchmarks/published.py TEXTS MODEL [MODEL ...] OUTPUT

TEXTS contains a JSON object with `text` per line. The models are measured, and pruned during the
measurement, one after the other. OUTPUT gets the importance of every matrix, and the differences of
each model from the first.

It follows the published code (arXiv:2503.03874) in everything that costs time or memory. Every text
is padded to 512 tokens and runs alone. All texts run through a block, its matrices are measured and
pruned by sorting every row, and all texts run through it again. Two buffers hold the hidden states
of 128 texts. The inputs of a matrix are kept until its block is finished, although nothing reads
them. There are two differences. The arithmetic is float32, because half precision is slow on a CPU,
and therefore a stored input is not a copy. A block is called with all arguments that transformers
passes.
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
N_HELD = 128  # texts that fit into the buffers
PRUNED = 0.5  # of every row


class Watched:
    """A matrix: the mean over texts of the sums of its squared inputs, and the inputs."""

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
    """Raised when the first block is called."""


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
    """Hidden states before the first block, a second buffer, and the blocks' other arguments."""
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
    """Set the least important entries of each row to zero; of equal entries, the first ones."""
    least = metric.sort(dim=-1, stable=True).indices[:, : int(metric.shape[1] * PRUNED)]
    mask = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, least, value=True)
    module.weight[mask] = 0


def padded(folder: str, texts: Sequence[str]) -> Tensor:
    """(n_texts, 512) int64, padded with end-of-sequence tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    how = {"padding": "max_length", "truncation": True, "max_length": N_TOKENS}
    return torch.tensor([tokenizer(text, **how)["input_ids"] for text in texts])


def differences(base: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """|other - base|, per component as shares of its sum over the blocks."""
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
