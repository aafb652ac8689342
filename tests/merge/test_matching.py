"""Matching the units of two models: naive references, and orders that were applied before."""

import numpy as np
import pytest
import torch

from lewis_hub.checkpoint.reader import TensorReader, local_checkpoint, read_tensor
from lewis_hub.merge.matching import Model, match
from lewis_hub.merge.permutation import PermutingReader
from lewis_hub.merge.symmetries import permute, units_of
from tests.merge.test_permutation import MODELS, saved
from tests.unit_orders import random_orders


@pytest.mark.parametrize("kind", MODELS)
def test_weights_alone_undo_a_permutation(kind, tmp_path):
    model = saved(MODELS[kind], tmp_path)
    checkpoint = local_checkpoint("it", tmp_path)
    units = units_of(checkpoint, model.config.to_dict())
    shuffled = permute(checkpoint, units, random_orders(units, np.random.default_rng(3)))
    with TensorReader(tmp_path, "it") as files:
        reader = PermutingReader(files)
        own = Model(lambda name: read_tensor(reader, checkpoint.tensors[name]), None)
        other = Model(lambda name: read_tensor(reader, shuffled.tensors[name]), None)

        found = match(units, own, other, 1.0)

        assert all(value == pytest.approx(1, abs=1e-5) for value in found.similarity.values())
        for name, tensor in shuffled.tensors.items():
            values, axes = read_tensor(reader, tensor), units.axes[name]
            for dimension, axis in enumerate(axes):
                if axis:
                    order = torch.from_numpy(units.joined(axis, found.orders))
                    values = values.index_select(dimension, order)
            assert values.equal(own.read(name)), name
