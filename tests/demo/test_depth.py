"""The models of the benchmark of merges of different depth."""

import depth
import pytest
import torch
from alignment import load
from train_zoo import Stage, sgd

import lewis_hub

IDS = torch.arange(60).reshape(2, 30) % 390


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_blocks_that_add_nothing_leave_the_logits_as_they_were():
    base = load(lewis_hub.zoo_folder() / "base")
    deeper = depth.deeper(base)

    assert deeper.config.num_hidden_layers == 8
    assert logits(deeper).equal(logits(base))
    placed = depth.in_places(base, deeper, depth.NAIVE)
    deeper.load_state_dict(placed)
    assert (logits(deeper) - logits(base)).abs().max() < 1e-5


def test_items_are_not_those_of_another_split():
    asked = {split: set(depth.skill_items("reverse", split, 50)) for split in ("texts", "scored")}

    assert [len(items) for items in asked.values()] == [50, 50]
    assert not asked["texts"] & asked["scored"]


@pytest.mark.slow
def test_the_blocks_of_a_base_are_found_in_what_was_made_of_it(tmp_path):
    few = Stage("cipher", 2, 8, sgd(0.1))
    depth.make(tmp_path, few, few)

    merged = depth.merged(tmp_path, "sum", {"cipher": 1.0, "base": 0.0}, "skills")

    assert depth.places(tmp_path, "sum") == {"base": [*depth.TRUE]}
    by_hand = depth.by_places(tmp_path, {"cipher": 1.0, "base": 0.0}, depth.TRUE)
    assert (logits(merged) - logits(by_hand)).abs().max() < 1e-4
