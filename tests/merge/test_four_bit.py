"""What bitsandbytes writes: against the package itself, and against the definition."""

import json
import tracemalloc

import pytest
import torch

from lewis_hub.checkpoint.quantised import dequantise
from lewis_hub.checkpoint.reader import TensorReader, read_tensor
from lewis_hub.errors import BrokenCheckpointError
from lewis_hub.merge.plan import MergeSource
from lewis_hub.merge.quantised import BLOCK

SHAPE = (33, 2176)  # several pieces; rows of whole blocks, as the package reads on a CPU
STATE = "a.weight.quant_state.bitsandbytes__nf4"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def opened(zoo, tensors, label="source"):
    source = zoo.source(label, tensors)

    def read(tensor):
        with TensorReader(zoo.folders[label], label) as files:
            held = bytearray(tensor.n_bytes)
            files.read(tensor, 0, memoryview(held))
            return bytes(held)

    return MergeSource(dequantise(source.checkpoint, None, read), source.digest, {})


def values(zoo, source):
    with zoo.reader(source.label) as reader:
        return {name: read_tensor(reader, t) for name, t in source.checkpoint.tensors.items()}


def packed(document):
    return torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [64, 128])
def test_values_are_those_that_bitsandbytes_reads(zoo, size, kind, nested, storage):
    functional = pytest.importorskip("bitsandbytes.functional", reason="not installed")
    weight = normal(*SHAPE)
    codes, state = functional.quantize_4bit(
        weight, blocksize=size, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    parts = {f"a.weight.{name}": part for name, part in state.as_dict(packed=True).items()}

    source = opened(zoo, {"a.weight": codes, **parts, "norm.weight": normal(8).bfloat16()})

    header = source.checkpoint.tensors["a.weight"]
    assert set(source.checkpoint.tensors) == {"a.weight", "norm.weight"}
    assert (header.dtype, header.shape, header.kept_dtype) == ("F32", SHAPE, "BF16")
    found = values(zoo, source)["a.weight"]
    wanted = functional.dequantize_4bit(codes, state)
    if nested:  # the package may fuse the scale's product and sum
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(found, wanted)


def test_of_many_states_only_the_numbers_are_kept(zoo):
    tensors, _ = by_hand()
    large = packed({"blocksize": 8, "shape": [2], "more": [[]] * 15_000})
    for i in range(100):
        few = {"": torch.zeros(1, 1).byte(), ".absmax": torch.ones(1), ".quant_map": torch.ones(16)}
        tensors |= {f"b{i}.weight{part}": tensor for part, tensor in few.items()}
        tensors[f"b{i}.weight.quant_state.bitsandbytes__nf4"] = large.clone()

    tracemalloc.start()
    source = opened(zoo, tensors)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert source.checkpoint.tensors["b99.weight"].shape == (2,)
    assert most < 50 << 20  # 100 MB with all of each


def test_8_bits_are_codes_times_the_largest_of_their_row_in_127ths(zoo):
    functional = pytest.importorskip("bitsandbytes.functional", reason="not installed")
    codes, largest, _ = functional.int8_vectorwise_quant(normal(20, 30).half())
    tensors = {"a.weight": codes, "a.SCB": largest, "a.weight_format": torch.tensor(0).byte()}

    source = opened(zoo, tensors)

    assert list(source.checkpoint.tensors) == ["a.weight"]
    wanted = functional.int8_vectorwise_dequant(codes, largest)
    torch.testing.assert_close(values(zoo, source)["a.weight"], wanted, rtol=3e-7, atol=0)


def test_8_bits_in_tiles_are_refused_before_weights_are_read(zoo):
    tensors = {"a.weight": torch.zeros(32, 32, dtype=torch.int8), "a.SCB": torch.ones(32)}

    with pytest.raises(BrokenCheckpointError) as caught:
        opened(zoo, tensors | {"a.weight_format": torch.tensor(2).byte()})  # col_turing

    said = "`a.weight_format` says that its matrix is stored in tiles, not in rows."
    assert str(caught.value).startswith(f"source: model.safetensors: {said}\n")


def by_hand(shape=(5, 26), size=8, n_scales=3):
    """Codes and scales that are easy to say, and what they stand for."""
    n = shape[0] * shape[1]
    codes = torch.arange(n) * 7 % 16
    table = torch.linspace(-1, 1, 16)
    nested_table, nested_scales = normal(256), normal(-(-17 // n_scales)).abs()
    coded = (torch.arange(17) * 31 % 256).to(torch.uint8)
    scales = nested_table[coded.long()] * nested_scales.repeat_interleave(n_scales)[:17] + 0.25
    told = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": shape}
    told |= {"nested_blocksize": n_scales, "nested_dtype": "float32", "nested_offset": 0.25}
    tensors = {
        "a.weight": (codes[::2] * 16 + codes[1::2]).to(torch.uint8).view(-1, 1),
        "a.weight.absmax": coded,
        "a.weight.quant_map": table,
        "a.weight.nested_absmax": nested_scales,
        "a.weight.nested_quant_map": nested_table,
        STATE: packed(told),
    }
    return tensors, (table[codes] * scales.repeat_interleave(size)[:n]).view(shape)


def test_values_are_entries_of_the_table_times_the_scale_of_their_block(zoo):
    tensors, wanted = by_hand()

    assert torch.equal(values(zoo, opened(zoo, tensors))["a.weight"], wanted)


def test_blocks_that_are_larger_than_the_tensor_take_no_more_memory_than_it(zoo):
    state = {"shape": [2, 4], "blocksize": 10**12}
    state |= {"nested_blocksize": 10**12, "nested_offset": 0.5}
    table, nested_table = torch.linspace(-1, 1, 16), normal(256)
    tensors = {
        "a.weight": torch.tensor([0x01, 0x23, 0x45, 0x67], dtype=torch.uint8),
        "a.weight.absmax": torch.tensor([3], dtype=torch.uint8),
        "a.weight.quant_map": table,
        "a.weight.nested_absmax": torch.tensor([2.0]),
        "a.weight.nested_quant_map": nested_table,
        STATE: packed(state),
    }

    source = opened(zoo, tensors)

    described = source.checkpoint.tensors["a.weight"].scaled
    assert (described.n_a_block, described.nested.n_a_block) == (8, 1)
    wanted = (table[:8] * (nested_table[3] * 2.0 + 0.5)).view(2, 4)
    assert torch.equal(values(zoo, source)["a.weight"], wanted)


def test_the_bits_do_not_depend_on_the_pieces(zoo):
    n = BLOCK + 5002
    tensors = {
        "a.weight": (torch.arange(n // 2) * 97 % 256).to(torch.uint8),
        "a.weight.absmax": normal(-(-n // 64)),
        "a.weight.quant_map": normal(16),
        STATE: packed({"blocksize": 64, "shape": [2, n // 2]}),
    }
    source = opened(zoo, tensors)
    whole = values(zoo, source)["a.weight"].numpy().tobytes()

    with zoo.reader("source") as reader:
        header = source.checkpoint.tensors["a.weight"]
        for start, size in ((0, 3), (5, 9), (4, 4), (12, 70_001), (4 * 65_535, 40), (9, 280_000)):
            held = bytearray(min(size, header.n_bytes - start))
            reader.read(header, start, memoryview(held))
            assert held == whole[start : start + size]


BROKEN = {
    "no table": ({"a.weight.quant_map": None}, "`a.weight.quant_map` is missing"),
    "scales of other blocks": (
        {"a.weight.absmax": torch.zeros(16, dtype=torch.uint8)},
        "`a.weight.absmax` is U8 of 16 elements, expected U8 of 17",
    ),
    "another shape": (
        {STATE: packed({"blocksize": 8, "shape": [5, 28]})},
        "`a.weight` has 65 bytes, its state has the shape [5, 28]",
    ),
    "no shape": ({STATE: packed({"blocksize": 8})}, f"`{STATE}` has no `shape` and `blocksize`"),
    "no offset": (
        {STATE: packed({"blocksize": 8, "shape": [5, 26]})},
        "the state of `a.weight` has no `nested_blocksize` and `nested_offset`",
    ),
    "an offset that is no number": (
        {
            STATE: packed(
                {"blocksize": 8, "shape": [5, 26], "nested_blocksize": 3, "nested_offset": 10**400}
            )
        },
        "the state of `a.weight` has no `nested_blocksize` and `nested_offset`",
    ),
    "nested without end": (
        {STATE: torch.frombuffer(bytearray(b"[" * 60_000), dtype=torch.uint8)},
        f"`{STATE}` is not JSON",
    ),
    "many dimensions": (
        {STATE: packed({"blocksize": 8, "shape": [1] * 10_000 + [5, 26]})},
        f"`{STATE}` has no `shape` and `blocksize`",
    ),
    "no JSON": ({STATE: torch.zeros(4, dtype=torch.uint8)}, f"`{STATE}` is not JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_parts_that_do_not_fit_are_told_before_weights_are_read(zoo, kind):
    change, said = BROKEN[kind]
    tensors = {name: t for name, t in (by_hand()[0] | change).items() if t is not None}

    with pytest.raises(BrokenCheckpointError) as caught:
        opened(zoo, tensors)

    assert str(caught.value) == (
        f"source: model.safetensors: {said}.\n"
        "Use an intact copy, or the model that it was quantised from."
    )


def test_scales_of_other_rows_are_told(zoo):
    tensors = {"a.weight": torch.zeros(4, 3, dtype=torch.int8), "a.SCB": torch.ones(3)}

    with pytest.raises(
        BrokenCheckpointError, match=r"`a.SCB` is F32 of shape \[3\], which does not fit a"
    ):
        opened(zoo, tensors)
