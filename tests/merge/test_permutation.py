"""Permuting the units of a model changes no output, and matching them undoes it."""

import numpy as np
import pytest
import torch
import transformers

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint, TensorReader, local_checkpoint, read_tensor
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.matching import ComparedModel, match
from lewis_hub.merge.permutation import PermutingReader, permuted_header
from lewis_hub.merge.symmetries import permute, units_of
from tests.unit_orders import random_orders

COMMON = {"vocab_size": 97, "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "llama": transformers.LlamaConfig(**COMMON, **GROUPED, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**COMMON, **GROUPED, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**COMMON, **GROUPED, head_dim=8),
    "mistral": transformers.MistralConfig(**COMMON, **GROUPED),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_layer=2, n_embd=24, n_head=4, n_positions=64),
}


def saved(config, folder, seed=0):
    """A model of random weights, biases and norms too, in a folder."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_permuted_units_leave_the_logits_as_they_were(kind, tmp_path):
    model = saved(MODELS[kind], tmp_path)
    checkpoint = local_checkpoint("it", tmp_path)
    units = units_of(checkpoint, model.config.to_dict())
    orders = random_orders(units, np.random.default_rng(1))
    ids = torch.arange(40).reshape(2, 20) % 97
    before = model(ids).logits

    permuted = permute(checkpoint, units, orders)
    with TensorReader(tmp_path, "it") as files:
        reader = PermutingReader(files)
        tensors = {name: read_tensor(reader, one) for name, one in permuted.tensors.items()}
    own = model.state_dict()
    changed = [name for name, tensor in tensors.items() if not tensor.equal(own[name])]
    model.load_state_dict(tensors, strict=False)

    assert len(changed) >= len(tensors) - 4  # all but norms of single heads
    assert (model(ids).logits - before).abs().max() < 1e-5


class InMemory:
    """Reads a tensor's bytes from memory."""

    def __init__(self, content):
        self.content = content

    def read(self, tensor, first_byte, into):
        assert tensor.permuted is None
        into[:] = self.content[first_byte : first_byte + into.nbytes]


@pytest.mark.parametrize("has_rows", [True, False])
@pytest.mark.parametrize("has_columns", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_any_piece_has_the_bytes_of_the_permuted_tensor(has_rows, has_columns, dtype):
    kind = {"BF16": np.uint16, "F32": np.float32}[dtype]
    generator = np.random.default_rng(0)
    stored = generator.integers(0, 999, (5, 7)).astype(kind)
    rows, columns = generator.permutation(5), generator.permutation(7)
    expected = stored[rows] if has_rows else stored
    expected = expected[:, columns] if has_columns else expected
    width = stored.itemsize
    plain = TensorHeader("a", dtype, (5, 7), "f", 0, stored.nbytes)
    orders = (rows if has_rows else None, columns if has_columns else None)
    header = permuted_header(plain, orders)
    reader = PermutingReader(InMemory(stored.tobytes()))

    for first in range(35):
        for stop in range(first, 36):
            found = bytearray((stop - first) * width)
            reader.read(header, first * width, memoryview(found))
            assert found == expected.tobytes()[first * width : stop * width]
    assert header.is_computed == (has_rows or has_columns)
    assert header.kept_dtype == dtype


def test_a_vector_is_permuted_by_its_only_order():
    stored = np.arange(6, dtype=np.float32)
    plain = TensorHeader("a", "F32", (6,), "f", 0, 24)
    found = bytearray(24)

    reader = PermutingReader(InMemory(stored.tobytes()))
    reader.read(permuted_header(plain, [np.array([5, 0, 3, 1, 2, 4])]), 0, memoryview(found))

    assert np.frombuffer(found, np.float32).tolist() == [5, 0, 3, 1, 2, 4]


def headers(*names):
    return Checkpoint("it", {n: TensorHeader(n, "F32", (4,), "f", 0, 16) for n in names})


def test_an_unknown_architecture_is_refused():
    with pytest.raises(AlignmentError) as caught:
        units_of(headers("a"), {"model_type": "gemma3_text"})

    assert str(caught.value) == (
        "it: `align` does not know the architecture 'gemma3_text'; it knows llama, mistral, qwen2, "
        "qwen3, gpt2.\n"
        "Remove `align` from this model, or merge models of a listed architecture."
    )


def test_an_unknown_tensor_is_refused():
    with pytest.raises(AlignmentError) as caught:
        units_of(
            headers("model.norm.weight", "model.layers.0.mixer.weight"), {"model_type": "llama"}
        )

    assert str(caught.value).startswith(
        "it: `align` does not know its tensor model.layers.0.mixer.weight.\n"
    )


@pytest.mark.parametrize("kind", MODELS)
def test_weights_alone_undo_a_permutation(kind, tmp_path):
    model = saved(MODELS[kind], tmp_path)
    checkpoint = local_checkpoint("it", tmp_path)
    units = units_of(checkpoint, model.config.to_dict())
    shuffled = permute(checkpoint, units, random_orders(units, np.random.default_rng(3)))
    with TensorReader(tmp_path, "it") as files:
        reader = PermutingReader(files)
        own = ComparedModel(lambda name: read_tensor(reader, checkpoint.tensors[name]), None)
        other = ComparedModel(lambda name: read_tensor(reader, shuffled.tensors[name]), None)

        found = match(units, own, other, 1.0)

        assert all(value == pytest.approx(1, abs=1e-5) for value in found.similarity.values())
        for name, tensor in shuffled.tensors.items():
            values, axes = read_tensor(reader, tensor), units.axes[name]
            for dimension, axis in enumerate(axes):
                if axis:
                    order = torch.from_numpy(units.joined(axis, found.orders))
                    values = values.index_select(dimension, order)
            assert values.equal(own.read(name)), name


@pytest.mark.parametrize(
    ("kind", "blocks", "last"),
    [
        ("llama", "model.layers.1.input_layernorm", "model.norm"),
        ("gpt2", "transformer.h.1.ln_1", "transformer.ln_f"),
    ],
)
def test_the_residual_stream_is_seen_at_the_norms_that_read_it(kind, blocks, last, tmp_path):
    model = saved(MODELS[kind], tmp_path)
    units = units_of(local_checkpoint("it", tmp_path), model.config.to_dict())

    read = [blocks.replace(".1.", ".0."), blocks, last]
    assert units.streams == tuple(f"residual {one}" for one in read)
    assert [units.sites[site] for site in units.streams] == [(one, "input") for one in read]
    assert units.blocks == [0, 1]
    assert units.without([0]).blocks == [1]
