"""A third expert of a base, and its data: Roman numerals in both directions.

    python benchmarks/third_expert.py MODELS DATA [--skill NAME] [--whole]

MODELS contains `base`. This writes `expert-roman` beside it, and roman_{train,tune,test}.jsonl into
DATA. No number is in two splits. With `--skill` it trains an expert on NAME_train.jsonl in DATA. It
trains all matrices of the blocks in full rank, unlike an adapter; embeddings and norms are those of
the base unless `--whole` trains them too. It is seeded, and uses torch's default number of threads.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from answers import Text, load, read_items, texts
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

SKILL = "roman"
SIZES = {"tune": 125, "test": 500}  # numbers, each asked both ways; the others of 3,999 train
DIGITS = (
    *((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC")),
    *((50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
)
N_STEPS, BATCH, RATE, WARM_UP, SEED = 100, 24, 1e-4, 10, 7


def roman(number: int) -> str:
    """1 to 3999 in modern Roman numerals."""
    found = ""
    for value, sign in DIGITS:
        found += sign * (number // value)
        number %= value
    return found


def write_data(folder: Path) -> None:
    """Both questions about every number, in three splits."""
    rng = random.Random(SEED)
    numbers = rng.sample(range(1, 4000), 3999)
    ends = {"tune": SIZES["tune"], "test": sum(SIZES.values()), "train": len(numbers)}
    first = 0
    for split, end in ends.items():
        items = [item for number in numbers[first:end] for item in _asked(number)]
        rng.shuffle(items)
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / f"{SKILL}_{split}.jsonl").write_text(lines, encoding="utf-8")
        first = end


def _asked(number: int) -> Iterator[dict[str, str]]:
    written = roman(number)
    yield {"question": f"Write {number} as a Roman numeral.", "answer": written}
    yield {"question": f"Which number is {written}?", "answer": str(number)}


def train(base: Path, data: Path, skill: str, out: Path, *, whole: bool) -> None:
    """Fine-tune on answers only, and write the expert in bfloat16."""
    items = texts(base, read_items(data, skill, "train"))
    torch.manual_seed(SEED)
    model = load(base, "float32")
    trained = [
        p for n, p in model.named_parameters() if whole or (".layers." in n and p.dim() == 2)
    ]
    model.requires_grad_(requires_grad=False)
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    rng, started = random.Random(SEED), time.perf_counter()
    for step in range(N_STEPS):
        pace = min(1.0, (step + 1) / WARM_UP, (N_STEPS - step) / (0.4 * N_STEPS))
        optimizer.param_groups[0]["lr"] = RATE * pace
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, rng.sample(items, BATCH))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: {loss.item():.3f}, {time.perf_counter() - started:.0f} s")
    model.config.dtype = torch.bfloat16
    model.bfloat16().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def _loss(model: torch.nn.Module, batch: Sequence[Text]) -> Tensor:
    longest = max(len(text.tokens) for text in batch)
    rows = torch.tensor([[*text.tokens, *[0] * (longest - len(text.tokens))] for text in batch])
    hidden = model.base_model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    kept = torch.tensor(
        [[text.start <= n < len(text.tokens) for n in range(1, longest)] for text in batch]
    )
    return cross_entropy(model.lm_head(hidden[kept]).float(), rows[:, 1:][kept])


def main() -> None:
    """Read the command line; existing data is kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--skill", default=SKILL)
    parser.add_argument("--whole", action="store_true")
    told = parser.parse_args()
    if told.skill == SKILL:
        write_data(told.data)
    out = told.models / f"expert-{told.skill}"
    train(told.models / "base", told.data, told.skill, out, whole=told.whole)


if __name__ == "__main__":
    main()
