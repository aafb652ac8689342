"""Units are matched by what they are on the same texts."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lewis_hub.calibration.model import load_model
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.calibration.units import MAX_TOKENS, read_activations, write_activations
from lewis_hub.checkpoint.reader import TensorReader, local_checkpoint, read_tensor
from lewis_hub.errors import OutputError
from lewis_hub.merge.matching import ComparedModel, match
from lewis_hub.merge.permutation import PermutingReader
from lewis_hub.merge.symmetries import permute, units_of
from tests.merge.test_permutation import MODELS, saved
from tests.unit_orders import random_orders

TEXTS = tuple(tuple((7 * i * i + 3 * n) % 97 for i in range(10 + n)) for n in range(12))


def tokens(ids=TEXTS):
    return CalibrationTokens(ids, tuple(range(len(ids))), len(ids), 0, 0, "it")


def activations(folder, sites, place):
    place.mkdir()
    model = load_model(folder, "cpu", "it")
    write_activations(model, "it", sites, tokens(), place, lambda _: None)
    return lambda site: read_activations(place, site)


@pytest.mark.parametrize("kind", MODELS)
def test_activations_alone_undo_a_permutation(kind, tmp_path):
    model = saved(MODELS[kind], tmp_path / "own")
    checkpoint = local_checkpoint("it", tmp_path / "own")
    units = units_of(checkpoint, model.config.to_dict())
    orders = random_orders(units, np.random.default_rng(4))
    shuffled = permute(checkpoint, units, orders)
    with TensorReader(tmp_path / "own", "it") as files:
        reader = PermutingReader(files)
        tensors = {name: read_tensor(reader, one) for name, one in shuffled.tensors.items()}
    model.save_pretrained(tmp_path / "other")  # its configuration
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    pair = [
        ComparedModel(
            tensors.__getitem__, activations(tmp_path / name, units.sites, tmp_path / f"a{name}")
        )
        for name in ("own", "other")
    ]

    found = match(units, *pair, 0.0)

    for group, order in found.orders.items():
        assert orders[group][order].tolist() == list(range(len(order))), group
    assert all(one == pytest.approx(1, abs=1e-4) for one in found.similarity.values())


def test_activations_are_those_of_the_model_for_the_kept_tokens(tmp_path):
    model = saved(MODELS["gpt2"], tmp_path / "own")
    units = units_of(local_checkpoint("it", tmp_path / "own"), model.config.to_dict())
    seen = activations(tmp_path / "own", units.sites, tmp_path / "a")

    found = seen("residual transformer.ln_f"), seen("0.mlp")

    hidden = [model(torch.tensor([ids]), output_hidden_states=True) for ids in TEXTS]
    blocks = torch.cat([one.hidden_states[1][0] for one in hidden])  # before the last block
    n_tokens = sum(map(len, TEXTS))
    assert n_tokens < MAX_TOKENS
    assert found[0].shape == (n_tokens, 24)
    assert found[1].shape == (n_tokens, 96)
    assert seen("residual transformer.h.1.ln_1").numpy() == pytest.approx(
        blocks.detach().numpy(), abs=1e-5
    )


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no space")
def test_activations_that_the_disk_has_no_room_for_are_told_before_they_are_written(
    tmp_path, monkeypatch
):
    """A page of a mapped file that has no place on the disk would end the process."""
    saved(MODELS["gpt2"], tmp_path / "own")
    units = units_of(
        local_checkpoint("it", tmp_path / "own"),
        json.loads((tmp_path / "own/config.json").read_text()),
    )

    def full(descriptor, start, n_bytes):  # noqa: ARG001 (as os.posix_fallocate)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"npy: it cannot be written \(No space left on device"):
        activations(tmp_path / "own", units.sites, tmp_path / "a")
