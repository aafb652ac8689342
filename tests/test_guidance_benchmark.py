"""What the guidance benchmark concludes from: its items, its scores, its tests."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import puzzles
import pytest
import torch
from answers import Scored, Text, load, score, texts
from guidance_tables import holm, lower, paired_t
from third_expert import roman
from torch.nn.functional import cross_entropy
from train_zoo import EXPERTS, SEED
from zoo_items import write_items

from lewis_hub.demo.zoo import zoo_folder


def test_holm_multiplies_the_smallest_p_most_and_never_decreases():
    p = {("a", "b", "x"): 0.01, ("a", "b", "y"): 0.04, ("c", "b", "x"): 0.03}

    corrected = holm(p)

    # 0.01 * 3, 0.03 * 2, then 0.04 * 1, which may not be below the one before
    assert list(corrected.values()) == pytest.approx([0.03, 0.06, 0.06])


def test_a_paired_t_is_the_mean_difference_over_its_standard_error():
    # differences 1, 2, 3: mean 2, standard deviation 1
    assert paired_t([2, 4, 6], [1, 2, 3]) == pytest.approx(2 * math.sqrt(3))
    assert paired_t([1, 2], [1, 2]) == 0


def test_lower_losses_are_counted_against_the_twin_of_the_same_seed():
    def seeds(*losses: float) -> list[Scored]:
        return [Scored([loss, loss], [0, 0]) for loss in losses]

    found = {
        "a 0.1": {"x": seeds(1, 5, 3), "y": seeds(1, 1, 1)},
        "twin 0.1": {"x": seeds(2, 4, 4), "y": seeds(1, 2, 0)},
        "a 0.2": {"x": seeds(0, 0, 0), "y": seeds(0, 0, 0)},  # whose twin was not run
    }

    counted = lower(["a 0.1", "a 0.2"], ["twin 0.1", "twin 0.2"], ["x", "y"], found)

    assert counted == "3 of 6"  # x: of the first and third seed; y: of the second


def test_numerals_are_written_by_subtraction():
    assert [roman(n) for n in (4, 9, 1994, 3999)] == ["IV", "IX", "MCMXCIV", "MMMCMXCIX"]


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("items")
    write_items(folder)
    return folder


def test_no_word_of_the_zoos_benchmark_is_in_two_splits_or_in_the_experts_training(items):
    lessons = {
        word
        for stage in EXPERTS
        for item in islice(
            puzzles.stream(stage.lesson, SEED, stage.lesson_share), stage.n_steps * stage.batch_size
        )
        for word in item.question.split()
    }

    for skill in puzzles.SKILLS:
        words = {
            split: [one["question"].split()[-1] for one in _read(items / f"{skill}_{split}.jsonl")]
            for split in ("train", "tune", "test")
        }
        assert [len(set(one)) for one in words.values()] == [300, 250, 1000]
        assert len({word for one in words.values() for word in one}) == 1550
        for word in words["tune"] + words["test"]:
            assert not {word, word[::-1]} & lessons


def test_scores_in_batches_are_those_of_each_item_alone(items):
    base = zoo_folder() / "expert-reverse"
    asked = texts(base, _read(items / "reverse_test.jsonl")[:40])
    model = load(base, "float32")

    found = score(model, asked)

    alone = [_alone(model, text) for text in asked]
    assert found.losses == pytest.approx([loss for loss, _ in alone], abs=1e-5)
    assert found.right == [right for _, right in alone]


@torch.no_grad()
def _alone(model: torch.nn.Module, text: Text) -> tuple[float, float]:
    logits = model(input_ids=torch.tensor([text.tokens])).logits[0, text.start - 1 : -1]
    answer = torch.tensor(text.tokens[text.start :])
    return float(cross_entropy(logits, answer)), float((logits.argmax(-1) == answer).all())


def _read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
