"""GPTQ, AWQ and MXFP4: against transformers, or against their formats' descriptions in loops."""

import numpy as np
import pytest
import torch

from lewis_hub.checkpoint.quantisation import Quantisation
from lewis_hub.checkpoint.quantised import dequantise
from lewis_hub.checkpoint.reader import read_tensor
from lewis_hub.errors import BrokenCheckpointError
from lewis_hub.merge.plan import MergeSource
from lewis_hub.merge.quantised import BLOCK, PANEL
from lewis_hub.merge.runners import threads

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # row of each code of a word, from the lowest bits on


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def whole(high, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator)


def words(codes, n_bits):
    """(..., n) codes as words of 32 bits along the last axis, the first in the lowest bits."""
    shifts = torch.arange(0, 32, n_bits)
    together = (codes.long().unflatten(-1, (-1, 32 // n_bits)) << shifts).sum(dim=-1)
    return together.to(torch.uint32).view(torch.int32)


def gptq(codes, zeros, scales, n_bits, offset=1):
    """As GPTQ's files hold codes (rows, columns), zeros and scales (groups, rows)."""
    ones = sum(1 << at for at in range(0, 32, n_bits))  # of each word, and a zero of 0 borrows
    lessened = words(zeros, n_bits).numpy().view("u4") - np.uint32(offset * ones)
    return {
        "a.qweight": words(codes, n_bits).T.contiguous(),
        "a.qzeros": torch.from_numpy(lessened.view("i4")),
        "a.scales": scales,
    }


def awq(codes, zeros, scales):
    def ordered(of_rows):
        return words(of_rows.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2), 4)

    return {"a.qweight": ordered(codes.T), "a.qzeros": ordered(zeros), "a.scales": scales}


def mxfp4(n=3, n_rows=64, n_columns=40, seed=0):
    """Blocks and scales of some matrices as gpt-oss has them."""
    n_blocks = n_rows // 32
    return {
        "mlp.gate_up_proj_blocks": whole(256, n, n_columns, n_blocks, 16, seed=seed).byte(),
        "mlp.gate_up_proj_scales": whole(30, n, n_columns, n_blocks, seed=seed).byte() + 110,
    }


def opened(zoo, tensors, layout, n_bits=4, offset=0, label="source"):
    source = zoo.source(label, tensors)
    how = Quantisation(layout, is_read=True, n_packed_bits=n_bits, layout=layout, offset=offset)
    return MergeSource(dequantise(source.checkpoint, how, bytes), source.digest, {})


def values(zoo, source):
    with zoo.reader(source.label) as reader:
        return {name: read_tensor(reader, t) for name, t in source.checkpoint.tensors.items()}


def by_loops(codes, zeros, scales, groups):
    found = torch.empty(codes.shape)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            group = int(groups[column])
            steps = int(codes[row, column]) - int(zeros[group, row])
            found[row, column] = steps * float(scales[group, row])
    return found


def test_values_and_layout_of_mxfp4_are_those_that_transformers_reads(zoo):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = mxfp4()
    blocks, scales = tensors.values()
    wanted = convert_moe_packed_tensors(blocks, scales)

    source = opened(zoo, tensors | {"norm.weight": torch.ones(4)}, "MXFP4")

    assert set(source.checkpoint.tensors) == {"mlp.gate_up_proj", "norm.weight"}
    header = source.checkpoint.tensors["mlp.gate_up_proj"]
    assert (header.dtype, header.shape, header.kept_dtype) == ("F32", (3, 64, 40), "BF16")
    found = values(zoo, source)["mlp.gate_up_proj"]
    assert torch.equal(found, wanted.float())
    assert torch.equal(found.signbit(), wanted.signbit())  # -0 too


def test_every_code_and_every_scale_of_mxfp4_is_read_as_transformers_reads_it(zoo):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    pairs = torch.arange(256).byte()  # of codes
    tensors = {
        "x_blocks": pairs.view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous(),
        "x_scales": torch.arange(256).byte().view(1, 256, 1).expand(1, 256, 16).contiguous(),
    }
    wanted = convert_moe_packed_tensors(*tensors.values(), dtype=torch.float32)

    found = values(zoo, opened(zoo, tensors, "MXFP4"))["x"]

    assert found.numpy().tobytes() == wanted.numpy().tobytes()


def test_a_worked_example_of_each(zoo):
    # 0xB2: the first row has code 2, 1.0, the second 11, -1.5; times two to the power 128 - 127
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 0xB2
    tensors = {"x_blocks": blocks, "x_scales": torch.tensor([[[128]]]).byte()}
    found = values(zoo, opened(zoo, tensors, "MXFP4", label="mxfp4"))["x"]
    assert found.shape == (1, 32, 1)
    assert found.flatten()[:3].tolist() == [2.0, -3.0, 0.0]

    # a word of GPTQ holds 8 columns of a row; zeros of 7 are stored, and 8 is meant
    word = torch.tensor([0x76543210] * 8, dtype=torch.int32).view(1, 8)
    tensors = {
        "a.qweight": word,
        "a.qzeros": torch.tensor([[0x77777777]], dtype=torch.int32),
        "a.scales": torch.full((1, 8), 0.5).half(),
    }
    found = values(zoo, opened(zoo, tensors, "GPTQ", offset=1, label="gptq"))["a.weight"]
    assert found[0].tolist() == [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]

    # a word of AWQ holds 8 rows of a column: 0, 2, 4, 6, 1, 3, 5 and 7
    tensors = {
        "a.qweight": word[:, :1].contiguous(),
        "a.qzeros": torch.tensor([[0]], dtype=torch.int32),
        "a.scales": torch.ones(1, 8).half(),
    }
    found = values(zoo, opened(zoo, tensors, "AWQ", label="awq"))["a.weight"]
    assert found.T.tolist() == [[0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ["in order", "told in order", "by activation"])
@pytest.mark.parametrize(("n_bits", "offset"), [(4, 1), (4, 0), (8, 1)])
def test_values_of_gptq_are_those_of_its_description(zoo, n_bits, offset, order, dtype):
    n_rows, n_columns, n_groups, high = 24, 64, 4, 1 << n_bits
    codes, zeros = whole(high, n_rows, n_columns), whole(high, n_groups, n_rows, seed=1)
    scales = normal(n_groups, n_rows).abs().to(dtype)
    groups = torch.arange(n_columns, dtype=torch.int32) // 16
    if order == "by activation":
        groups = groups[torch.randperm(n_columns, generator=torch.Generator().manual_seed(2))]
    tensors = gptq(codes, zeros, scales, n_bits, offset)
    if order != "in order":
        tensors["a.g_idx"] = groups
    bits_told = n_bits if order == "in order" else 12 - n_bits  # the order tells better

    source = opened(zoo, tensors | {"a.bias": torch.ones(24)}, "GPTQ", bits_told, offset)

    assert set(source.checkpoint.tensors) == {"a.weight", "a.bias"}
    header = source.checkpoint.tensors["a.weight"]
    assert (header.dtype, header.shape, header.kept_dtype) == ("F32", (24, 64), "BF16")
    wanted = by_loops(codes, zeros, scales, groups)
    assert torch.equal(values(zoo, source)["a.weight"], wanted)


def test_values_of_awq_are_those_of_its_description(zoo):
    codes, zeros = whole(16, 40, 64), whole(16, 4, 40, seed=1)
    scales = normal(4, 40).half()

    source = opened(zoo, awq(codes, zeros, scales), "AWQ")

    assert source.checkpoint.tensors["a.weight"].shape == (40, 64)
    wanted = by_loops(codes, zeros, scales, torch.arange(64) // 16)
    assert torch.equal(values(zoo, source)["a.weight"], wanted)


def large(layout):
    """Tensors of a panel and a bit, and the name of what they are."""
    n_columns = 2048
    n_rows = PANEL // n_columns + 64
    if layout == "MXFP4":
        return mxfp4(1, n_rows, n_columns), "mlp.gate_up_proj"
    codes, zeros = whole(16, n_rows, n_columns), whole(16, 2, n_rows, seed=1)
    make = awq if layout == "AWQ" else (lambda *parts: gptq(*parts, 4, 0))
    return make(codes, zeros, normal(2, n_rows).half()), "a.weight"


@pytest.mark.parametrize("layout", ["GPTQ", "AWQ", "MXFP4"])
def test_the_bits_do_not_depend_on_the_pieces_or_panels(zoo, layout):
    tensors, name = large(layout)
    source = opened(zoo, tensors, layout)
    all_at_once = values(zoo, source)[name].numpy().tobytes()
    header = source.checkpoint.tensors[name]
    border = 4 * PANEL

    with zoo.reader("source") as reader:
        for start, size in (
            (0, 3),
            (border - 5, 9),
            (border, 4),
            (12, 70_001),
            (border - 9, 10**6),
        ):
            held = bytearray(min(size, header.n_bytes - start))
            reader.read(header, start, memoryview(held))
            assert held == all_at_once[start : start + size]


@pytest.mark.parametrize("layout", ["GPTQ", "AWQ", "MXFP4"])
def test_it_merges_as_the_float32_model_written_out_does(zoo, layout):
    shape, name = (2, 320, 260), "mlp.gate_up_proj"
    if layout == "MXFP4":
        tensors = mxfp4(*shape)
    else:
        shape, name = (320, 256), "a.weight"
        make = awq if layout == "AWQ" else (lambda *parts: gptq(*parts, 4, 1))
        tensors = make(whole(16, *shape), whole(16, 4, 320, seed=1), normal(4, 320).half())
    assert torch.Size(shape).numel() > BLOCK
    few = opened(zoo, tensors, layout, offset=int(layout == "GPTQ"), label="few")
    dense = zoo.source("dense", values(zoo, few), {"density": 0.4})
    base = zoo.source("base", {name: normal(*shape).bfloat16()})
    other = zoo.source("other", {name: zoo.tensors["base"][name] + 1})

    found, wanted = (
        zoo.merge(zoo.settings("ties", base, [one, other]), folder, runner=threads(2)).bytes
        for folder, one in (
            ("found", MergeSource(few.checkpoint, "d", {"density": 0.4})),
            ("wanted", dense),
        )
    )

    assert found == wanted


WORDS = gptq(whole(16, 8, 16), whole(16, 2, 8), torch.ones(2, 8).half(), 4)
BROKEN = {
    "words of another dtype": (
        "GPTQ",
        WORDS | {"a.qweight": torch.zeros(2, 8)},
        "`a.qweight` is F32 of shape [2, 8], expected I32 of two dimensions",
    ),
    "no scales": ("GPTQ", WORDS | {"a.scales": None}, "`a.scales` is missing"),
    "scales of other rows": (
        "GPTQ",
        WORDS | {"a.scales": torch.ones(2, 9)},
        "`a.scales` is F32 of shape [2, 9], which does not fit a.qweight of shape [2, 8]",
    ),
    "no zeros": (
        "AWQ",
        WORDS | {"a.qzeros": None, "a.scales": torch.ones(2, 64)},
        "`a.qzeros` is missing",
    ),
    "zeros of other groups": (
        "GPTQ",
        WORDS | {"a.qzeros": torch.zeros(3, 1, dtype=torch.int32)},
        "`a.qzeros` is I32 of shape [3, 1], which does not fit a.scales of shape [2, 8]",
    ),
    "an order of other columns": (
        "GPTQ",
        WORDS | {"a.g_idx": torch.zeros(15, dtype=torch.int32)},
        "`a.g_idx` is I32 of shape [15], which does not fit a.qweight of shape [2, 8]",
    ),
    "groups of no equal size": (
        "GPTQ",
        WORDS | {"a.scales": torch.ones(3, 8), "a.qzeros": torch.zeros(3, 1, dtype=torch.int32)},
        "`a.scales` is F32 of shape [3, 8], which does not divide 16 columns into equal groups",
    ),
    "blocks of one matrix": (
        "MXFP4",
        {"x_blocks": torch.zeros(4, 2, 16, dtype=torch.uint8)},
        "`x_blocks` is U8 of shape [4, 2, 16], expected U8 of four dimensions, the last of 16",
    ),
    "blocks without scales": (
        "MXFP4",
        {"x_blocks": torch.zeros(1, 4, 2, 16, dtype=torch.uint8)},
        "`x_scales` is missing",
    ),
    "scales of other blocks": (
        "MXFP4",
        {
            "x_blocks": torch.zeros(1, 4, 2, 16, dtype=torch.uint8),
            "x_scales": torch.zeros(1, 4, 3, dtype=torch.uint8),
        },
        "`x_scales` is U8 of shape [1, 4, 3], which does not fit x_blocks of shape [1, 4, 2, 16]",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_parts_that_do_not_fit_are_told_from_headers(zoo, kind):
    layout, tensors, said = BROKEN[kind]

    with pytest.raises(BrokenCheckpointError) as caught:
        opened(zoo, {name: t for name, t in tensors.items() if t is not None}, layout)

    assert str(caught.value).startswith(f"source: model.safetensors: {said}")
    assert str(caught.value).endswith(
        "\nUse an intact copy, or the model that it was quantised from."
    )


def test_columns_of_a_group_that_has_no_scale_are_told_when_they_are_read(zoo):
    source = opened(zoo, WORDS | {"a.g_idx": torch.full((16,), 2, dtype=torch.int32)}, "GPTQ")

    with pytest.raises(BrokenCheckpointError, match="`a.g_idx` names groups that have no scale"):
        values(zoo, source)
