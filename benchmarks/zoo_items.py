"""More items of the zoo's two skills, with words that no model was trained on.

Calibration uses the training items of the zoo. The items of `tune` and `test` are sampled like the
zoo's own, from words that are in no training item of any of its models, forwards or backwards. To
know these words, all training items are generated again. Most of the remaining words have five
letters.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import puzzles
from answers import SIZES
from train_zoo import BASE, BUCKET, EXPERTS, SEED

from lewis_hub.demo.zoo import zoo_folder


def write_items(folder: Path) -> None:
    """Write SKILL_{train,tune,test}.jsonl, unless they exist."""
    if all((folder / f"{skill}_test.jsonl").exists() for skill in puzzles.SKILLS):
        return
    folder.mkdir(parents=True, exist_ok=True)
    trained = set(_trained())
    for skill, make in puzzles.SKILLS.items():
        own = zoo_folder() / "data" / skill / "train.jsonl"
        train = own.read_text(encoding="utf-8")
        (folder / f"{skill}_train.jsonl").write_text(train, encoding="utf-8")
        known = trained | set(_words(train))
        rng = random.Random(f"{SEED} {skill} benchmark")
        for split, n in SIZES.items():
            drawn: list[str] = []
            while len(drawn) < n:
                word = puzzles.draw_word(rng)
                if not {word, word[::-1]} & known:
                    known.add(word)
                    drawn.append(word)
            lines = (json.dumps(asdict(make(word))) + "\n" for word in drawn)
            (folder / f"{skill}_{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _trained() -> Iterator[str]:
    """Every word in an item that a training stage of the zoo can contain."""
    for stage in (*BASE, *EXPERTS):
        n_drawn = -(-stage.n_steps // BUCKET) * BUCKET * stage.batch_size
        items = puzzles.stream(stage.lesson, SEED, stage.lesson_share)
        for item in itertools.islice(items, n_drawn):
            yield from _words(item.question)
            yield "".join(item.question.split()[-2:])  # of `join` and `swap`


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Z]{4,}", text)
