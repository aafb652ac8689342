"""8-bit floats against torch: whole tensors times scales that are spread over them."""

import numpy as np
import pytest
import torch

from lewis_hub.checkpoint.quantisation import Quantisation
from lewis_hub.checkpoint.quantised import dequantise
from lewis_hub.checkpoint.reader import read_tensor
from lewis_hub.errors import NonFiniteError
from lewis_hub.kernels.calls import Decoding, scale_up
from lewis_hub.merge.plan import MergeSource
from lewis_hub.merge.quantised import BLOCK, VALUES
from lewis_hub.merge.runners import Runner, threads

E4M3 = torch.float8_e4m3fn


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def naive(values, scale, block):
    """The definition: every scale spread over its block, ragged ones cut off."""
    if scale.numel() == 1:
        return values.float() * scale.float().reshape(())
    if block is None:
        return values.float() * scale.float().reshape(-1, 1)
    spread = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return values.float() * spread[: values.shape[0], : values.shape[1]]


def blocks(shape, block, dtype, seed=3):
    n = [-(-size // length) for size, length in zip(shape, block, strict=True)]
    return (normal(*n, seed=seed).abs() / 50 + 1e-3).to(dtype)


# name -> (shape of the weight, block or None, ending of the scale's name, the scale)
LAYOUTS = {
    "blocks": ((256, 384), (128, 128), "_scale_inv", blocks((256, 384), (128, 128), torch.float32)),
    "ragged blocks": (
        (300, 333),
        (128, 128),
        "_scale_inv",
        blocks((300, 333), (128, 128), torch.float32),
    ),
    "scales in bfloat16": (
        (130, 140),
        (128, 128),
        "_scale_inv",
        blocks((130, 140), (128, 128), torch.bfloat16),
    ),
    "small blocks": ((10, 7), (4, 3), "_scale", blocks((10, 7), (4, 3), torch.float16)),
    "a tensor": ((20, 30), None, "_scale", torch.tensor([0.03])),
    "a tensor, 0-d": ((20, 30), None, "_scale_inv", torch.tensor(0.03, dtype=torch.bfloat16)),
    "a stack of matrices": ((3, 5, 7), None, "_scale", torch.tensor(0.7)),
    "rows": ((20, 30), None, "_scale", normal(20, 1).abs()),
    "rows, 1-d": ((20, 30), None, "_scale", normal(20).abs().bfloat16()),
    "one row": ((1, 300), None, "_scale", torch.tensor([[0.5]])),
}


def eight_bit(zoo, label, tensors, block=(128, 128), parameters=None):
    source = zoo.source(label, tensors)
    how = Quantisation("fp8", is_read=True, block=block)
    checkpoint = dequantise(source.checkpoint, how, bytes)
    return MergeSource(checkpoint, source.digest, parameters or {})


def materialised(zoo, source):
    with zoo.reader(source.label) as reader:
        return {name: read_tensor(reader, t) for name, t in source.checkpoint.tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_value_is_the_8_bit_float_times_its_scale_to_the_last_bit(zoo, layout):
    shape, block, ending, scale = LAYOUTS[layout]
    values = (normal(*shape) * 20).to(E4M3)
    tensors = {"a.weight": values, f"a.weight{ending}": scale, "a.input_scale": torch.ones(1)}
    tensors |= {"norm.weight": normal(8).bfloat16()}

    source = eight_bit(zoo, "source", tensors, block or (128, 128))

    dtypes = {name: t.dtype for name, t in source.checkpoint.tensors.items()}
    assert dtypes == {"a.weight": "F32", "norm.weight": "BF16"}
    assert source.checkpoint.tensors["a.weight"].n_bytes == 4 * values.numel()
    found = materialised(zoo, source)
    assert torch.equal(found["a.weight"], naive(values, scale, block))
    assert torch.equal(found["norm.weight"], tensors["norm.weight"].float())


def test_every_pattern_is_what_torch_says():
    every = torch.arange(256, dtype=torch.uint8)

    found = torch.from_numpy(VALUES.copy())

    wanted = every.view(E4M3).float()
    assert torch.equal(found.view(torch.int32) & 0x7FFFFFFF == 0, wanted == 0)
    assert torch.equal(found.nan_to_num(nan=1e9), wanted.nan_to_num(nan=1e9))
    assert found.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert torch.equal(found.signbit()[[0, 128]], wanted.signbit()[[0, 128]])


@pytest.mark.parametrize("block", [(128, 128), (1, 333), (99_900, 333), (7, 5)])
@pytest.mark.parametrize("first", [0, 1, 332, 40_001])
def test_the_kernel_reads_codes_as_numpy_does(block, first):
    codes = (torch.arange(50_000) * 7919 % 256).to(torch.uint8).numpy()
    n = [-(-300 // block[0]), -(-333 // block[1])]
    scales, zeros = normal(*n).numpy(), normal(*n, seed=1).numpy()
    groups = (np.arange(333) // block[1]).astype(np.int32)[::-1].copy()
    decoding = Decoding(VALUES, block[0], groups, scales, zeros)
    found = np.empty(50_000, np.float32)

    scale_up(codes, first, decoding, found)

    places = first + np.arange(codes.size)
    rows, columns = places // 333 // block[0], groups[places % 333]
    other = (VALUES[codes] - zeros[rows, columns]) * scales[rows, columns]
    np.testing.assert_array_equal(found, other)
    assert np.isnan(found).any()
    assert (np.signbit(found) == np.signbit(other))[~np.isnan(found)].all()


@pytest.fixture
def pair(zoo):
    """A bf16 base and an fp8 expert, with tensors of several pieces, ragged."""
    shape = (300, 333)
    assert shape[0] * shape[1] > BLOCK
    base = {f"layers.{i}.q.weight": (normal(*shape, seed=i) / 9).bfloat16() for i in range(2)}
    base["norm.weight"] = normal(333).bfloat16()
    expert = {"norm.weight": base["norm.weight"] + 1}
    for i in range(2):
        scale = blocks(shape, (128, 128), torch.float32, seed=i)
        moved = base[f"layers.{i}.q.weight"].float() + normal(*shape, seed=9 + i) / 20
        spread = naive(torch.ones(shape), scale, (128, 128))
        expert[f"layers.{i}.q.weight"] = (moved / spread).clamp(-448, 448).to(E4M3)
        expert[f"layers.{i}.q.weight_scale_inv"] = scale
    return zoo.source("base", base), eight_bit(zoo, "expert", expert, parameters={"density": 0.4})


def test_the_bits_do_not_depend_on_the_pieces(zoo, pair):
    _, expert = pair
    whole = materialised(zoo, expert)

    with zoo.reader("expert") as reader:
        for header in expert.checkpoint.tensors.values():
            for size in (3, 1000, 4 * 333, 65_537 * 4, 10**6):
                held = bytearray(header.n_bytes)
                starts = range(0, header.n_bytes, size) if size > 3 else range(1, 600, 47)
                for start in starts:
                    reader.read(header, start, memoryview(held)[start : start + size])
                    stored = torch.bfloat16 if header.dtype == "BF16" else torch.float32
                    tensor = whole[header.name].to(stored).view(torch.uint8).numpy().tobytes()
                    assert held[start : start + size] == tensor[start : start + size]


def test_the_merge_is_the_same_on_every_runner_and_shard_size(zoo, pair):
    settings = zoo.settings("ties", pair[0], [pair[1]])
    runners = [Runner(), threads(2), Runner(3, large_elements=100)]

    first, *others = (zoo.merge(settings, str(i), runner=r).bytes for i, r in enumerate(runners))
    small = zoo.merge(settings, "small", shard=1, runner=threads(2)).tensors

    assert all(other == first for other in others)
    whole = zoo.merge(settings, "0").tensors
    assert all(torch.equal(small[name], tensor) for name, tensor in whole.items())


METHODS = ["ties", "dare_ties", "task_arithmetic", "linear", "sce"]


def same(found, wanted):
    """The order of the bytes follows the first source's file, their values do not."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in found
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("role", ["base", "expert", "both"])
def test_it_merges_as_the_float32_model_written_out_does(zoo, pair, method, role):
    base, expert = pair
    dense = zoo.source("dense", materialised(zoo, expert))
    one = MergeSource(expert.checkpoint, "d")
    other = zoo.source("other", {n: t + 1 for n, t in zoo.tensors["base"].items()})
    merges = {
        "base": [(one, [base, other]), (dense, [base, other])],
        "expert": [(base, [one, other]), (base, [dense, other])],
        "both": [(one, [one, other]), (dense, [dense, other])],
    }

    found, wanted = (
        zoo.merge(zoo.settings(method, *sources, dtype="bfloat16"), f"{i}", runner=threads(2))
        for i, sources in enumerate(merges[role])
    )

    assert same(found.tensors, wanted.tensors)
    if role == "expert" and method != "linear":
        assert found.bytes == wanted.bytes


def test_what_starts_from_8_bit_floats_is_bfloat16_unless_a_dtype_is_asked_for(zoo, pair):
    base, expert = pair

    kept = zoo.merge(zoo.settings("ties", expert, [base])).tensors
    asked = zoo.merge(zoo.settings("ties", expert, [base], dtype="float16"), "asked").tensors
    started = zoo.merge(zoo.settings("ties", base, [expert]), "started").tensors

    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in asked.values()} == {torch.float16}
    assert {tensor.dtype for tensor in started.values()} == {torch.bfloat16}
    assert set(kept) == set(zoo.tensors["base"])


@pytest.mark.parametrize("pattern", [0x7F, 0xFF])
@pytest.mark.parametrize("method", ["ties", "sce"])
def test_a_pattern_that_is_no_number_is_told_with_tensor_and_source(zoo, method, pattern):
    values = torch.zeros(4, 4, dtype=torch.uint8)
    values[2, 1] = pattern
    tensors = {"a.weight": values.view(E4M3), "a.weight_scale": torch.ones(1)}
    expert = eight_bit(zoo, "expert", tensors)
    base = zoo.source("base", {"a.weight": normal(4, 4).bfloat16()})
    other = zoo.source("other", {"a.weight": normal(4, 4, seed=1).bfloat16()})

    with pytest.raises(NonFiniteError) as caught:
        zoo.merge(zoo.settings(method, base, [expert, other]))

    assert str(caught.value).startswith("a.weight holds NaN or infinity in expert.\n")


def test_a_scale_that_is_no_number_is_told_too(zoo):
    values = torch.ones(4, 4).to(E4M3)
    expert = eight_bit(zoo, "expert", {"a.weight": values, "a.weight_scale": torch.tensor(1e39)})
    base = zoo.source("base", {"a.weight": normal(4, 4).bfloat16()})

    with pytest.raises(NonFiniteError, match=r"a\.weight holds NaN or infinity in expert"):
        zoo.merge(zoo.settings("ties", base, [expert]))


def test_an_adapter_may_be_put_on_8_bit_floats(zoo, pair):
    _, expert = pair
    prefix = "base_model.model.layers.0.q"
    tensors = {f"{prefix}.lora_A.weight": normal(4, 333), f"{prefix}.lora_B.weight": normal(300, 4)}
    dense = zoo.source("dense", materialised(zoo, expert))
    on_dense = zoo.adapter("on dense", dense, tensors, r=4, lora_alpha=4)
    adapter = zoo.adapter("adapter", expert, tensors, r=4, lora_alpha=4)

    with zoo.reader("adapter", "expert") as reader:
        header = adapter.checkpoint.tensors["layers.0.q.weight"]
        update = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        wanted = materialised(zoo, expert)["layers.0.q.weight"] + update
        torch.testing.assert_close(read_tensor(reader, header), wanted, rtol=1e-5, atol=1e-5)
    merged = zoo.merge(zoo.settings("ties", expert, [adapter]))
    twin = zoo.merge(zoo.settings("ties", dense, [on_dense], dtype="bfloat16"), "twin")
    assert same(merged.tensors, twin.tensors)


def test_the_plan_tells_8_bit_floats_from_plain_ones(zoo, pair):
    base, expert = pair
    plan = zoo.merge(zoo.settings("ties", base, [expert])).plan
    tensors = {"a.weight": normal(256, 256).to(E4M3), "a.weight_scale_inv": torch.ones(2, 2)}
    one, two = (eight_bit(zoo, "one", tensors, block) for block in ((128, 128), (200, 200)))

    plans = [zoo.merge(zoo.settings("ties", source, [source])).plan for source in (one, two)]

    assert any(t.inputs[1].is_computed for t in plan.shards[0].tensors)
    assert plans[0].digest != plans[1].digest
