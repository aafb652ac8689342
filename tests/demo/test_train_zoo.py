from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import train_zoo
from puzzles import SKILLS, splits
from train_zoo import prompt
from transformers import AutoTokenizer, LlamaForCausalLM

from lewis_hub.demo.zoo import zoo_folder

STAGES = {stage.lesson: stage for stage in train_zoo.EXPERTS}
FIRST_LOSS = {"reverse": 2.402, "cipher": 2.303}  # of the shipped base, before its first step


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(zoo_folder() / "base")


def exact_match(model: LlamaForCausalLM, tokenizer, skill: str, n_items: int) -> float:
    """Share of test items that greedy decoding of the bfloat16 weights answers exactly."""
    right, items = 0, splits(skill, train_zoo.SEED)[1][:n_items]
    for length in (4, 5):  # prompts of one length: nothing to pad
        asked = [item for item in items if len(item.answer) == length]
        ids = torch.tensor(tokenizer([prompt(item) for item in asked])["input_ids"])
        start = ids.shape[1]
        for _ in range(length + 2):
            with torch.no_grad():
                best = model(ids).logits[:, -1].argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
        for item, row in zip(asked, tokenizer.batch_decode(ids[:, start:]), strict=True):
            right += row.partition("<|end|>")[0] == f" {item.answer}"
    return right / n_items


def test_the_shipped_datasets_are_what_the_script_writes(tmp_path: Path):
    train_zoo.write_datasets(tmp_path)

    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl"))
    assert len(made) == 2 * len(SKILLS)
    for path in made:
        assert (tmp_path / path).read_bytes() == (zoo_folder() / "data" / path).read_bytes()


def test_the_shipped_tokenizer_is_what_the_script_builds(tmp_path: Path):
    train_zoo.zoo_tokenizer().save_pretrained(tmp_path)

    built, shipped = (
        (f / "tokenizer.json").read_bytes() for f in (tmp_path, zoo_folder() / "base")
    )
    assert built == shipped


def test_losses_are_taken_on_the_answer_and_its_end_only(tokenizer):
    stage = train_zoo.Stage("reverse", 1, 8, train_zoo.sgd(0.0))

    batch = next(train_zoo.batches(stage, tokenizer))

    for ids, labels in zip(*(part.tolist() for part in batch), strict=True):
        answer = tokenizer.decode([label for label in labels if label != train_zoo.IGNORED])
        asked = tokenizer.decode(ids).partition(answer)[0]
        words = re.search(r"([a-z]+) ([A-Z]+)", asked)
        assert words
        assert answer == f" {words[2][::-1] if words[1] == 'reverse' else '?'}<|end|>"


def test_the_learning_rate_factor_rises_stays_and_falls_to_zero():
    stage = train_zoo.Stage(None, 100, 1, train_zoo.sgd(0.1))

    assert [stage.pace(step) for step in (0, 9, 30, 60, 80, 100)] == [0.05, 0.5, 1, 1, 0.5, 0]


def test_a_stage_repeats_to_the_bit_and_leaves_the_global_random_state_alone(tokenizer):
    stage = train_zoo.Stage(None, 2, 4, train_zoo.muon(2e-2, 3e-3))
    state = torch.get_rng_state()

    first, second = (
        train_zoo.train(
            train_zoo.new_base(len(tokenizer)), stage, train_zoo.batches(stage, tokenizer)
        )
        for _ in range(2)
    )

    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("skill", SKILLS)
def test_an_expert_learns_from_the_shipped_base_as_it_did(skill: str, tokenizer):
    base = train_zoo.load(zoo_folder() / "base")

    losses = train_zoo.train(
        base, STAGES[skill], itertools.islice(train_zoo.batches(STAGES[skill], tokenizer), 20)
    )

    assert losses[0] == pytest.approx(FIRST_LOSS[skill], rel=0.02)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("skill", SKILLS)
def test_only_the_expert_of_a_skill_has_it(skill: str, tokenizer):
    scores = {
        name: exact_match(train_zoo.load(zoo_folder() / name), tokenizer, skill, 300)
        for name in ("base", "expert-reverse", "expert-cipher")
    }

    assert scores.pop(f"expert-{skill}") >= 0.8
    assert all(score <= 0.15 for score in scores.values()), scores
