"""How much calibration texts show of what an expert learnt, without labels.

    python benchmarks/trust.py MODELS --texts EXPERT NAME=FILE:TEXT ... --texts EXPERT ...
        [--samples 64] [--max-tokens 64]

MODELS contains `base` and an `expert-NAME` per expert. FILE is JSONL, and TEXT a template with its
columns. For each expert and each set of its texts, on the expert's own inputs:

- change: squared difference between the last hidden states of expert and base, over their square;
- KL: mean over tokens, expert against base, in nats;
- loss gained: loss of the base minus that of the expert on the texts' tokens, in nats;
- excited: mean over the blocks' matrices of |v x|^2 / (|v|^2 |x|^2 / n), v being the task vector.
  1 means as much as inputs in a random direction;
- contrast: excited of the expert's own task vector, over the mean of the others'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from answers import load
from torch import Tensor
from transformers import AutoTokenizer

Grams = dict[str, Tensor]  # module -> sum of x x^T


def main() -> None:
    """Print a line for each expert and set of texts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--texts", nargs="+", action="append", default=[])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    told = parser.parse_args()
    folders = sorted(told.models.glob("expert-*"))
    models = {one.name.removeprefix("expert-"): load(one, "float32") for one in folders}
    base = load(told.models / "base", "float32")
    tokenizer = AutoTokenizer.from_pretrained(told.models / "base")
    vectors = {name: task_vectors(model, base) for name, model in models.items()}
    print("expert, texts: change, KL, loss gained, excited, contrast")
    for expert, *sets in told.texts:
        for one in sets:
            name, _, place = one.partition("=")
            file, _, template = place.partition(":")
            lines = Path(file).read_text(encoding="utf-8").splitlines()[: told.samples]
            texts = [template.format(**json.loads(line)) for line in lines]
            ids = [tokenizer(text)["input_ids"][: told.max_tokens] for text in texts]
            found = measure(models[expert], base, [i for i in ids if len(i) > 1])
            shares = {key: excited(found["grams"], v) for key, v in vectors.items()}
            others = [share for key, share in shares.items() if key != expert]
            contrast = shares[expert] * len(others) / sum(others)
            figures = [*found["figures"], shares[expert], contrast]
            print(f"{expert}, {name}:", ", ".join(f"{x:.4f}" for x in figures), flush=True)


def matrices(model: Any) -> dict[str, Any]:
    """The Linears of the blocks."""
    named = model.named_modules()
    return {p: m for p, m in named if isinstance(m, torch.nn.Linear) and ".layers." in p}


def task_vectors(model: Any, base: Any) -> Grams:
    """Expert minus base, of each matrix."""
    of_base = matrices(base)
    return {p: m.weight.detach() - of_base[p].weight.detach() for p, m in matrices(model).items()}


def excited(grams: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> float:
    """Mean of |v x|^2 / (|v|^2 |x|^2 / n) over the matrices."""
    shares = []
    for path, v in vectors.items():
        gram = grams[path]
        expected = v.square().sum() * gram.diagonal().mean()
        shares.append(float(((v @ gram) * v).sum() / expected))
    return sum(shares) / len(shares)


@torch.inference_mode()
def measure(model: Any, base: Any, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Second moments of the expert's inputs, and figures of its outputs against the base's."""
    grams: Grams = {}

    def sum_up(path: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            grams[path] = grams.get(path, 0) + x.T @ x

        return hook

    handles = [m.register_forward_pre_hook(sum_up(p)) for p, m in matrices(model).items()]
    moved = size = kl = gained = 0.0
    n_tokens = 0
    for ids in texts:
        row, following = torch.tensor([ids]), torch.tensor(ids[1:])
        states = [m.base_model(input_ids=row).last_hidden_state[0] for m in (model, base)]
        logs = [
            m.lm_head(s[:-1]).log_softmax(-1) for m, s in zip((model, base), states, strict=True)
        ]
        moved += float((states[0] - states[1]).square().sum())
        size += float(states[1].square().sum())
        kl += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        gained += float((logs[0] - logs[1]).gather(1, following[:, None]).sum())
        n_tokens += len(following)
    for handle in handles:
        handle.remove()
    return {"grams": grams, "figures": (moved / size, kl / n_tokens, gained / n_tokens)}


if __name__ == "__main__":
    main()
