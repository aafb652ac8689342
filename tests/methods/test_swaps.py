"""Methods that take over entries of one other model, and passthrough."""

import pytest
import torch

from lewis_hub.methods.averages import nearswap, passthrough
from lewis_hub.methods.selection import arcee_fusion


def test_nearswap_takes_near_entries_and_moves_far_ones_by_t():
    base, other = torch.full((4,), 1.0), torch.tensor([1.1, 0.6, 1.0, 3.0])

    merged = nearswap(base, other[None], t=0.2)

    # 0.1 away: taken | 0.4 away: half way | equal | 2 away: a tenth of the way
    assert merged.tolist() == pytest.approx([1.1, 0.8, 1.0, 1.2])


def test_nearswap_with_nothing_near_is_the_base():
    base, other = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.5, -2.0])

    assert torch.equal(nearswap(base, other[None], t=0.0), base)
    assert torch.equal(nearswap(base, other[None], t=4.0), other)


def test_arcee_fusion_takes_what_stands_out():
    base, other = torch.zeros(5), torch.tensor([0.0, 0.1, 0.2, 2.0, 0.3])

    merged = arcee_fusion(base, other[None])

    # quartiles 0.1, 0.2 and 0.3 (times one divergence): the border is 0.2 + 1.5 * 0.2 = 0.5
    assert merged.tolist() == [0.0, 0.0, 0.0, 2.0, 0.0]


def test_arcee_fusion_weighs_rows_by_how_much_their_softmax_moved():
    base = torch.zeros(3, 4)
    # adding one number to a row moves no probability: far entries that do not matter
    other = torch.tensor([[9.0, 9, 9, 9], [0.1, 0, 0, 0], [3.0, 0, 0, 0]])

    merged = arcee_fusion(base, other[None])

    # importances: 0 (10 times), little, much; quartiles 0: the border is 0, so all are taken
    assert torch.equal(merged, other)
    other[1] = torch.tensor([0.1, 0.2, 0.1, 0.3])
    merged = arcee_fusion(base, other[None])
    # importances: 7 zeros, then 4 of the second row; the third quartile is among them
    assert torch.equal(merged[0], base[0])
    assert torch.equal(merged[2], torch.tensor([3.0, 0, 0, 0]))


def test_arcee_fusion_of_equal_models_is_the_model():
    model = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))

    assert torch.equal(arcee_fusion(model, model[None]), model)


def test_passthrough_is_the_model_times_scale():
    model = torch.tensor([[1.0, -2.0, -0.0]])

    assert passthrough(model, scales=[1.0]) is not None
    assert torch.equal(passthrough(model, scales=[1.0]), model[0])
    assert passthrough(model, scales=[1.5]).tolist() == [1.5, -3.0, 0.0]
