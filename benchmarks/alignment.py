"""Loss between two models trained from different seeds: `python benchmarks/alignment.py OUT`.

Both are Llamas of the zoo's kind, trained on the same items. For each share of
the second model, the loss of the average is printed, of the models as they are and with the second
aligned. Settings are compared on the split `tune`; the table of the result is on `test`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import puzzles
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from train_zoo import END, IGNORED, Stage, batches, muon, new_llama, prompt, train, zoo_tokenizer
from transformers import LlamaForCausalLM

import lewis_hub

SPLITS = {"texts": 101, "tune": 102, "test": 103}  # seeds of the items; 7 is that of the training
N_ITEMS = 512
SHARES = [step / 10 for step in range(11)]  # of the second model
STAGE = Stage(None, 400, 64, muon(2e-2, 3e-3))
RECIPE = """\
models:
  - model: one
    parameters: {{weight: 0.0}}
  - model: two
    parameters: {{weight: 1.0}}
    align: {{method: dual_space, weight_similarity: {weight}}}
merge_method: linear
calibration:
  dataset: texts.jsonl
  text: "Question: {{question}}\\nAnswer: {{answer}}"
  samples: 128
"""


def items(split: str) -> Iterator[puzzles.Item]:
    """The items of a split."""
    return itertools.islice(puzzles.stream(None, SPLITS[split]), N_ITEMS)


def make(out: Path, stage: Stage = STAGE) -> None:
    """Train both models, unless they are there, and write the calibration texts."""
    tokenizer = zoo_tokenizer()
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dataclasses.asdict(item)) + "\n" for item in items("texts"))
    (out / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    for seed, name in enumerate(("one", "two"), start=1):
        if not (out / name).exists():
            model = new_llama(
                seed, len(tokenizer), hidden_size=64, intermediate_size=176, n_blocks=4
            )
            data = itertools.islice(batches(stage, tokenizer), seed, None)
            train(model, stage, data)
            model.save_pretrained(out / name)
            tokenizer.save_pretrained(out / name)


def aligned(out: Path, weight: float) -> LlamaForCausalLM:
    """The second model aligned with the first, by a merge that takes nothing of the first."""
    place = out / f"aligned-{weight:g}"
    if not place.exists():
        (out / "recipe.yaml").write_text(RECIPE.format(weight=weight), encoding="utf-8")
        lewis_hub.merge_models(lewis_hub.read_recipe(out / "recipe.yaml"), place, progress=False)
    return load(place)


def load(folder: Path) -> LlamaForCausalLM:
    """A saved model."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def loss(model: LlamaForCausalLM, asked: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The mean negative log-likelihood of an answer's tokens, in nats."""
    total, n_tokens = 0.0, 0
    for ids, labels in asked:
        logits = model(ids).logits[:, :-1].transpose(1, 2)
        total += float(cross_entropy(logits, labels[:, 1:], reduction="sum"))
        n_tokens += int((labels[:, 1:] != IGNORED).sum())
    return total / n_tokens


def batched(asked: Iterable[puzzles.Item], size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of items, padded on the right, which the causal mask hides."""
    tokenizer, pairs = zoo_tokenizer(), []
    for item in asked:
        first, answer = (tokenizer(text)["input_ids"] for text in (prompt(item), answer_of(item)))
        pairs.append((torch.tensor(first + answer), torch.tensor([IGNORED] * len(first) + answer)))
    pairs.sort(key=lambda pair: len(pair[0]))
    parts = [zip(*pairs[start : start + size], strict=True) for start in range(0, len(pairs), size)]
    return [
        (
            pad_sequence(ids, batch_first=True),
            pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        )
        for ids, labels in map(tuple, parts)
    ]


def answer_of(item: puzzles.Item) -> str:
    """The answer as the models were trained to give it."""
    return f" {item.answer}{END}"


def between(
    one: LlamaForCausalLM, two: LlamaForCausalLM, split: str, shares: Sequence[float] = SHARES
) -> dict[float, float]:
    """The loss of the average of two models, by the share of the second."""
    asked = batched(items(split))
    first, second = one.state_dict(), two.state_dict()
    mixed = LlamaForCausalLM(one.config).eval()
    found = {}
    for share in shares:
        mixed.load_state_dict({n: (1 - share) * first[n] + share * second[n] for n in first})
        found[share] = loss(mixed, asked)
    return found


def barrier(losses: Mapping[float, float]) -> float:
    """The highest loss above the line between both ends."""
    ends = losses[0.0], losses[1.0]
    return max(found - (1 - t) * ends[0] - t * ends[1] for t, found in losses.items())


def main(out: Path, weights: Sequence[float]) -> None:
    """Print the barriers on the split `tune`, and the losses of the best setting on `test`."""
    make(out)
    one, two = load(out / "one"), load(out / "two")
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    print(f"naive: barrier {barrier(between(one, two, 'tune', shares)):.3f} (tune)")
    tried = {w: barrier(between(one, aligned(out, w), "tune", shares)) for w in weights}
    for weight, found in tried.items():
        print(f"weight_similarity {weight:g}: barrier {found:.3f} (tune)")
    best = min(tried, key=lambda weight: tried[weight])
    naive = between(one, two, "test")
    matched = between(one, aligned(out, best), "test")
    print(f"\nweight_similarity {best:g}, split test\n\n| share | naive | aligned |")
    print("|---:|---:|---:|")
    for share in SHARES:
        print(f"| {share:g} | {naive[share]:.3f} | {matched[share]:.3f} |")
    print(f"\nbarrier: naive {barrier(naive):.3f}, aligned {barrier(matched):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path, help="output folder; finished models in it are kept")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    asked = parser.parse_args()
    main(asked.out, asked.weights)
