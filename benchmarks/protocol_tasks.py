"""Families, tasks and items of PROTOCOL.md.

`pip install reasoning-gym==0.1.25` makes the items; the smoke run needs no other package. No
question is in two splits of a task. The items of a split depend on the task and `ITEM_SEED` alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import puzzles

ITEM_SEED = 20261130  # not used for any earlier item
SPLITS = {"tune": 48, "test": 200, "train": 1500}  # items; tune and test are drawn first
LONGEST = 500  # characters of a question
POOL = (  # generators of reasoning-gym with short exact answers, no two of the same operation
    *("spell_backward", "chain_sum", "family_relationships", "simple_equations"),
    *("count_bits", "syllogism", "calendar_arithmetic", "letter_counting"),
    *("time_intervals", "complex_arithmetic", "base_conversion", "sentence_reordering"),
    *("prime_factorization", "leg_counting", "number_sequence", "gcd"),
)
SMOKE_POOL = tuple(puzzles.SKILLS)

Item = dict[str, str]  # question, answer


@dataclass(frozen=True)
class Training:
    """How the experts of a family are trained: AdamW on answers, warm-up, then linear decay."""

    n_steps: int
    batch: int
    full_rate: float  # all matrices of the blocks
    lora_rate: float
    lora_rank: int = 16


@dataclass(frozen=True)
class Family:
    """A base model, and how many experts of it are merged.

    Attributes:
        repo: on the Hub; used unless `--models` names a folder.
        counts: numbers of experts; 1 is the base and a single expert.
        abilities: lm-eval tasks for what the base can do.
        passages: of general text: how many, and tokens of each.
    """

    name: str
    repo: str
    license: str
    n_parameters: int
    counts: Sequence[int]
    training: Training
    pool: Sequence[str] = POOL
    n_draws: int = 3
    n_texts: int = 64  # calibration texts of each expert
    abilities: Sequence[str] = ("arc_easy", "hellaswag")
    passages: tuple[int, int] = (32, 128)


TRAINING = Training(n_steps=80, batch=16, full_rate=1e-4, lora_rate=1e-3)
FAMILIES = (
    Family(
        "smollm2-135m",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        134_515_008,
        (2, 1, 4, 8, 16),
        TRAINING,
    ),
    Family("gemma-3-270m", "google/gemma-3-270m", "gemma", 268_098_176, (2, 1, 4, 8), TRAINING),
    Family(
        "qwen2.5-0.5b",
        "Qwen/Qwen2.5-0.5B-Instruct",
        "apache-2.0",
        494_032_768,
        (2, 1, 4, 8),
        TRAINING,
    ),
)
SMOKE = Family(
    "zoo",
    "zoo/base",
    "apache-2.0",
    1_160_000,
    (2, 1),
    Training(n_steps=60, batch=32, full_rate=1e-3, lora_rate=5e-3, lora_rank=8),
    pool=SMOKE_POOL,
    n_draws=1,
    n_texts=32,
    abilities=("zoo_primer",),
    passages=(4, 64),
)


def drawn(family: Family, n: int, draw: int) -> tuple[str, ...]:
    """The tasks of a draw: the first `n` of a random order, so that draws of more contain them."""
    order = random.Random(f"{ITEM_SEED} tasks {draw}").sample(family.pool, len(family.pool))
    return tuple(order[:n])


def kind_of(task: str, draw: int, tasks: Sequence[str]) -> str:
    """Draw 1 merges experts of full rank, draw 2 LoRA, draw 3 both in turns."""
    kinds = {1: ("full",), 2: ("lora",)}.get(draw, ("full", "lora"))
    return kinds[tasks.index(task) % len(kinds)]


def write_items(folder: Path, task: str) -> None:
    """Write TASK_{tune,test,train}.jsonl, unless they exist."""
    if all(items_file(folder, task, split).exists() for split in SPLITS):
        return
    folder.mkdir(parents=True, exist_ok=True)
    drawing = _distinct(_puzzles(task) if task in SMOKE_POOL else _generated(task))
    for split, n in SPLITS.items():
        items = [item for _, item in zip(range(n), drawing, strict=False)]
        if split != "train" and len(items) < n:
            raise SystemExit(f"{task}: {len(items)} different questions, {n} needed for {split}")
        lines = "".join(json.dumps(item) + "\n" for item in items)
        items_file(folder, task, split).write_text(lines, encoding="utf-8")


def items_file(folder: Path, task: str, split: str) -> Path:
    """The file of a split, as `answers.read_items` names it."""
    return folder / f"{task}_{split}.jsonl"


def calibration_items(folder: Path, task: str, n: int, draw: int) -> Path:
    """Write a draw of `n` training items; return the file."""
    file = items_file(folder, task, f"texts{draw}x{n}")
    lines = items_file(folder, task, "train").read_text(encoding="utf-8").splitlines()
    chosen = random.Random(f"{ITEM_SEED} texts {draw} {task}").sample(lines, n)
    file.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return file


def _distinct(items: Iterator[Item]) -> Iterator[Item]:
    """Items whose question was not asked before, until 5,000 in a row were."""
    known: set[str] = set()
    repeated = 0
    for item in items:
        if item["question"] in known or len(item["question"]) > LONGEST:
            repeated += 1
            if repeated == 5000:
                return
            continue
        known.add(item["question"])
        repeated = 0
        yield item


def _generated(task: str) -> Iterator[Item]:
    import reasoning_gym

    made = reasoning_gym.create_dataset(task, seed=ITEM_SEED, size=100_000)
    for n in range(len(made)):
        item = made[n]
        yield {"question": str(item["question"]), "answer": str(item["answer"])}


def _puzzles(task: str) -> Iterator[Item]:
    make: Callable[[str], puzzles.Item] = puzzles.SKILLS[task]
    rng = random.Random(f"{ITEM_SEED} {task}")
    while True:
        item = make(puzzles.draw_word(rng))
        yield {"question": item.question, "answer": item.answer}
