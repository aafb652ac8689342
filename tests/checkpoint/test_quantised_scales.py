"""Which scale belongs to which tensor, from headers alone."""

import pytest

from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.quantisation import Quantisation
from lewis_hub.checkpoint.quantised import dequantise
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import BrokenCheckpointError

WEIGHT = ("a.weight", "F8_E4M3", (300, 200))


def read(checkpoint):
    return dequantise(checkpoint, None, bytes)


def checkpoint(*tensors):
    headers = {}
    for name, dtype, shape in tensors:
        header = TensorHeader(name, dtype, shape, "model.safetensors", 0, 0)
        n_bytes = header.n_elements * WIDTHS[dtype]
        headers[name] = TensorHeader(name, dtype, shape, "model.safetensors", 0, n_bytes)
    return Checkpoint("me/model", headers)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((3, 2), (128, 128)),
        ((300, 1), (1, 200)),
        ((300,), (1, 200)),
        ((300, 5), (1, 40)),
        ((1,), (60_000, 200)),
        ((), (60_000, 200)),
        ((1, 1), (60_000, 200)),
    ],
)
def test_the_shape_of_a_scale_says_what_it_is_for(shape, block):
    found = read(checkpoint(WEIGHT, ("a.weight_scale", "F32", shape)))

    (tensor,) = found.tensors.values()
    assert tensor.scaled.block == block
    assert tensor.scaled.stored.dtype == "F8_E4M3"
    assert (tensor.dtype, tensor.kept_dtype, tensor.n_bytes) == ("F32", "BF16", 240_000)
    assert found.is_computed


@pytest.mark.parametrize(
    ("block", "shape", "found"),
    [
        ((1 << 63, 128), (1, 2), (300, 128)),  # the kernels count in 64 bits
        (((1 << 64) - 1, 128), (1, 2), (300, 128)),
        ((2, 1 << 40), (150, 1), (2, 200)),  # and columns in 32
    ],
)
def test_no_block_is_larger_than_its_tensor(block, shape, found):
    stored = checkpoint(WEIGHT, ("a.weight_scale_inv", "F32", shape))

    read = dequantise(stored, Quantisation("fp8", is_read=True, block=block), bytes)

    assert read.tensors["a.weight"].scaled.block == found


def test_a_checkpoint_without_scales_stays_as_it_is():
    plain = checkpoint(("a.weight", "BF16", (4, 4)), ("a.input_scale", "F32", ()))
    unscaled = checkpoint(WEIGHT)

    assert read(plain) is plain
    assert read(unscaled) is unscaled
    assert not plain.is_computed


def test_scales_of_activations_and_caches_leave_with_those_of_the_weights():
    names = ["a.input_scale", "a.activation_scale", "attn.k_scale", "k_proj.k_scale"]
    more = [(name, "F32", (1,)) for name in names]

    found = read(checkpoint(WEIGHT, ("a.weight_scale_inv", "BF16", (3, 2)), *more))

    assert list(found.tensors) == ["a.weight"]


@pytest.mark.parametrize("shape", [(2, 3), (1, 200), (200,), (300, 3), (300, 0), (3, 2, 1)])
def test_a_scale_that_does_not_fit_is_told(shape):
    with pytest.raises(BrokenCheckpointError) as caught:
        read(checkpoint(WEIGHT, ("a.weight_scale_inv", "F32", shape)))

    assert str(caught.value) == (
        f"me/model: model.safetensors: `a.weight_scale_inv` has shape {list(shape)}, which fits "
        "a.weight of shape [300, 200] neither by tensor, by row, by group, nor by blocks of "
        "[128, 128].\n"
        "Use an intact copy, or the model that it was quantised from."
    )


def test_a_scale_of_another_kind_is_told():
    with pytest.raises(BrokenCheckpointError) as caught:
        read(checkpoint(WEIGHT, ("a.weight_scale_inv", "F8_E8M0", (3, 2))))

    assert str(caught.value) == (
        "me/model: model.safetensors: `a.weight_scale_inv` is F8_E8M0, which is not read as a "
        "scale.\n"
        "Use the model that it was quantised from, in bfloat16, float16 or float32."
    )
