"""compressed-tensors' integers: against the package itself, and against the definition."""

import numpy as np
import pytest
import torch

from lewis_hub.checkpoint.quantisation import Quantisation
from lewis_hub.checkpoint.quantised import dequantise
from lewis_hub.checkpoint.reader import read_tensor
from lewis_hub.errors import BrokenCheckpointError
from lewis_hub.merge.plan import MergeSource
from lewis_hub.merge.quantised import BLOCK
from lewis_hub.merge.runners import threads

SHAPE = (52, 1536)  # rows that fill no word of 4-bit zeros; several pieces
STRATEGIES = ["tensor", "channel", "group"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def codes_of(shape, n_bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = -(1 << n_bits - 1)
    return torch.randint(low, -low, shape, generator=generator).to(torch.int8)


def n_scales(strategy, size=128):
    return {"tensor": (1,), "channel": (SHAPE[0], 1), "group": (SHAPE[0], SHAPE[1] // size)}[
        strategy
    ]


def pack(codes, n_bits):
    """Words of 32 bits by the definition: shifted codes, the first in the lowest bits."""
    words = np.zeros((codes.shape[0], -(-codes.shape[1] * n_bits // 32)), np.uint32)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            code = int(codes[row, column]) + (1 << n_bits - 1)
            words[row, column * n_bits // 32] |= np.uint32(code << column * n_bits % 32)
    return torch.from_numpy(words.view(np.int32))


def opened(zoo, tensors, n_bits, label="source", parameters=None):
    source = zoo.source(label, tensors)
    how = Quantisation("integers", is_read=True, integers=True, n_packed_bits=n_bits)
    found = dequantise(source.checkpoint, how, bytes)
    return MergeSource(found, source.digest, parameters or {})


def values(zoo, source):
    with zoo.reader(source.label) as reader:
        return {name: read_tensor(reader, t) for name, t in source.checkpoint.tensors.items()}


def by_package(scheme_form, strategy, n_bits, *, symmetric, dtype):
    """A quantised module as the package writes it, and what the package reads from it."""
    compressed_tensors = pytest.importorskip("compressed_tensors", reason="not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    assert compressed_tensors
    size = 128 if strategy == "group" else None
    arguments = QuantizationArgs(
        num_bits=n_bits, type="int", strategy=strategy, group_size=size, symmetric=symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    zeros = codes_of(n_scales(strategy), n_bits, seed=5)
    state = {
        "weight": (normal(*SHAPE) / 9).to(dtype),
        "weight_scale": (normal(*n_scales(strategy)).abs() / 50 + 1e-3).to(dtype),
        "weight_zero_point": torch.zeros_like(zeros) if symmetric else zeros,
    }
    compressor = BaseCompressor.get_value_from_registry(scheme_form)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("form", "n_bits"), [("int-quantized", 8), ("pack-quantized", 4), ("pack-quantized", 8)]
)
def test_values_are_those_that_compressed_tensors_reads(
    zoo, form, n_bits, strategy, symmetric, dtype
):
    stored, wanted = by_package(form, strategy, n_bits, symmetric=symmetric, dtype=dtype)
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    tensors["a.input_scale"] = torch.ones(1)

    source = opened(zoo, tensors, n_bits if form == "pack-quantized" else None)

    (header,) = source.checkpoint.tensors.values()
    assert (header.name, header.dtype, header.shape) == ("a.weight", "F32", SHAPE)
    assert header.kept_dtype == "BF16"
    found = values(zoo, source)["a.weight"]
    assert torch.equal(found.to(dtype), wanted)


@pytest.mark.parametrize("n_bits", [4, 8])
def test_values_are_codes_less_zeros_times_scales_of_the_group_that_a_column_has(zoo, n_bits):
    shape, n_groups = (13, 64), 4
    codes, zeros = codes_of(shape, n_bits), codes_of((13, n_groups), n_bits, seed=1)
    scales = normal(13, n_groups).abs()
    groups = torch.arange(64, dtype=torch.int32) * 7 % n_groups
    tensors = {
        "a.weight_packed": pack(codes, n_bits),
        "a.weight_scale": scales,
        "a.weight_zero_point": pack(zeros.T, n_bits).T.contiguous(),
        "a.weight_shape": torch.tensor(shape),
    }

    acted = values(zoo, opened(zoo, tensors | {"a.weight_g_idx": groups}, n_bits, "acted"))
    in_order = torch.arange(64) // 16
    unused = tensors | {"a.weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}

    def wanted(order):
        each = order.long()
        return (codes.float() - zeros.float()[:, each]) * scales[:, each]

    assert torch.equal(acted["a.weight"], wanted(groups))
    for label, these in (("plain", tensors), ("unused", unused)):
        assert torch.equal(
            values(zoo, opened(zoo, these, n_bits, label))["a.weight"], wanted(in_order)
        )


def test_a_worked_example():
    from lewis_hub.merge.quantised import halves

    # -8 + 8 = 0, 7 + 8 = 15, 0 + 8 = 8: the first code lies in the lowest four bits
    word = pack(torch.tensor([[-8, 7, 0, 0, 0, 0, 0, 1]]), 4).numpy().view(np.uint32)

    assert hex(word[0, 0]) == "0x988888f0"
    assert halves(word.view(np.uint8)).tolist() == [[0, 15, 8, 8, 8, 8, 8, 9]]


@pytest.fixture
def packed(zoo):
    """An expert of packed integers whose tensor takes several pieces."""
    shape = (300, 336)
    assert shape[0] * shape[1] > BLOCK
    tensors = {
        "layers.0.q.weight_packed": pack(codes_of(shape, 4), 4),
        "layers.0.q.weight_scale": (normal(300, 21).abs() / 20).bfloat16(),
        "layers.0.q.weight_shape": torch.tensor(shape),
        "norm.weight": normal(336).bfloat16(),
    }
    return opened(zoo, tensors, 4, "expert", {"density": 0.4})


def test_the_bits_do_not_depend_on_the_pieces(zoo, packed):
    whole = values(zoo, packed)["layers.0.q.weight"].numpy().tobytes()
    header = packed.checkpoint.tensors["layers.0.q.weight"]

    with zoo.reader("expert") as reader:
        for start, size in ((0, 3), (5, 9), (4, 4), (12, 70_001), (4 * 65_535, 40), (9, 400_000)):
            held = bytearray(min(size, header.n_bytes - start))
            reader.read(header, start, memoryview(held))
            assert held == whole[start : start + size]


@pytest.mark.parametrize("method", ["ties", "linear", "sce"])
def test_it_merges_as_the_float32_model_written_out_does(zoo, packed, method):
    base = {"layers.0.q.weight": normal(300, 336).bfloat16(), "norm.weight": normal(336).bfloat16()}
    base = zoo.source("base", base)
    other = zoo.source("other", {n: t + 1 for n, t in zoo.tensors["base"].items()})
    dense = zoo.source("dense", values(zoo, packed))

    found, wanted = (
        zoo.merge(zoo.settings(method, base, [one, other]), name, runner=threads(2)).bytes
        for name, one in (("found", MergeSource(packed.checkpoint, "d")), ("wanted", dense))
    )

    if method == "linear":  # its bytes follow the order of the first source's file
        assert sorted(found) == sorted(wanted)
    else:
        assert found == wanted


PARTS = {
    "a.weight_packed": torch.zeros(8, 4, dtype=torch.int32),
    "a.weight_scale": torch.ones(8, 2),
}
BROKEN = {
    "without a scale": ({"a.weight_scale": None}, "`a.weight` has no tensor of scales"),
    "a scale for nothing": (
        {"a.weight_scale": torch.ones(8, 5)},
        "`a.weight_scale` has shape [8, 5], which fits a.weight of shape [8, 32] neither by tensor",
    ),
    "zeros for nothing": (
        {"a.weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)},
        "`a.weight_zero_point` is I32 of shape [2, 2], which does not fit "
        "a.weight_scale of shape [8, 2]",
    ),
    "an order of other columns": (
        {"a.weight_g_idx": torch.zeros(31, dtype=torch.int32)},
        "`a.weight_g_idx` is I32 of shape [31], expected I32 of 32 columns",
    ),
    "one number": (
        {
            "a.weight_packed": None,
            "a.weight": torch.tensor(1, dtype=torch.int8),
            "a.weight_scale": torch.ones(()),
            "a.weight_g_idx": torch.zeros(1, dtype=torch.int32),
        },
        "`a.weight_g_idx` is I32 of shape [1], expected I32 of columns, and there are none",
    ),
    "a shape in bytes": (
        {"a.weight_shape": torch.tensor([8, 32, 1], dtype=torch.uint8)},
        "`a.weight_shape` is U8 of shape [3], which does not fit a.weight of shape [8, 32]",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_parts_that_do_not_fit_are_told_from_headers(zoo, kind):
    change, said = BROKEN[kind]
    tensors = {name: t for name, t in (PARTS | change).items() if t is not None}

    with pytest.raises(BrokenCheckpointError) as caught:
        opened(zoo, tensors, 4)

    assert str(caught.value).startswith(f"source: model.safetensors: {said}")


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("a.weight_shape", torch.tensor([8, 30]), "`a.weight_shape` gives the shape [8, 30], but"),
        (
            "a.weight_g_idx",
            torch.full((32,), 2, dtype=torch.int32),
            "`a.weight_g_idx` names groups that have no scale",
        ),
    ],
)
def test_what_only_values_show_is_told_when_they_are_read(zoo, name, tensor, said):
    source = opened(zoo, PARTS | {name: tensor}, 4)

    with pytest.raises(BrokenCheckpointError, match="model.safetensors") as caught:
        values(zoo, source)

    assert said in str(caught.value)


def test_tensors_without_values_or_dimensions_are_read_or_refused(zoo):
    empty = {"a.weight": torch.zeros(4, 0, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}
    number = {"a.weight": torch.tensor(3, dtype=torch.int8), "a.weight_scale": torch.ones(1)}
    word = {"a.weight_packed": torch.tensor(3, dtype=torch.int32), "b": torch.ones(1)}
    zero = number | {"a.weight_zero_point": torch.zeros(1, 1, dtype=torch.int32)}

    assert values(zoo, opened(zoo, empty, 4))["a.weight"].shape == (4, 0)
    assert values(zoo, opened(zoo, number, 4))["a.weight"] == 3
    assert opened(zoo, word, 4).checkpoint.tensors.keys() == word.keys()
    with pytest.raises(BrokenCheckpointError, match="does not fit a.weight_scale"):
        opened(zoo, zero, 4)
