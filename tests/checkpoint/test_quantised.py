"""What configurations say of quantisation: the kinds that people publish."""

import pytest

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.quantisation import Quantisation, read_quantisation
from lewis_hub.checkpoint.quantised import quantised_tensor
from lewis_hub.checkpoint.reader import Checkpoint

DEEPSEEK = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def compressed(kind="float", bits=8, form="float-quantized", **more):
    weights = {"num_bits": bits, "type": kind, "strategy": "channel", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        **more,
    }


READ = {
    "fp8": (DEEPSEEK, (128, 128)),
    "fp8, blocks of its own": (DEEPSEEK | {"weight_block_size": [64, 32]}, (64, 32)),
    "fp8 by tensor": (DEEPSEEK | {"weight_block_size": None}, (128, 128)),
    "AutoFP8": ({"quant_method": "fp8", "activation_scheme": "static"}, (128, 128)),
    "FBGEMM": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, (128, 128)),
    "compressed-tensors": (compressed(), (128, 128)),
    "compressed-tensors, older": (compressed(form="naive-quantized"), (128, 128)),
    "compressed-tensors by block": (
        compressed()
        | {
            "config_groups": {
                "g": {
                    "weights": {
                        "num_bits": 8,
                        "type": "float",
                        "strategy": "block",
                        "block_structure": [128, 64],
                    }
                }
            }
        },
        (128, 64),
    ),
    "ModelOpt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, (128, 128)),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, (128, 128)),
}
BY_COLUMNS = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, ("GPTQ", 4, 1)),
    "gptq, v1": ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq"}, ("GPTQ", 8, 1)),
    "gptq, v2": ({"quant_method": "gptq", "bits": 4, "format": "gptq_v2"}, ("GPTQ", 4, 0)),
    "awq": ({"quant_method": "awq", "bits": 4}, ("AWQ", 4, 0)),
    "awq, older": ({"quant_method": "awq", "w_bit": 4, "version": "GEMM"}, ("AWQ", 4, 0)),
    "mxfp4": ({"quant_method": "mxfp4"}, ("MXFP4", 4, 0)),
}
REFUSED = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "compressed-tensors of 3 bits": compressed(kind="int", bits=3, form="pack-quantized"),
    "compressed-tensors without groups": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
    },
    "compressed-tensors nvfp4": compressed(bits=4, form="nvfp4-pack-quantized"),
    "compressed-tensors mixed": compressed(form="mixed-precision"),
    "compressed-tensors sparse": compressed(sparsity_config={"format": "sparse-24-bitmask"}),
    "compressed-tensors rotated": compressed(transform_config={"config_groups": {"u": {}}}),
    "fp8 of another format": DEEPSEEK | {"fmt": "e5m2"},
    "unknown": {"bits": 4},
}


@pytest.mark.parametrize("kind", READ)
def test_8_bit_floats_with_scales_and_what_tells_of_itself_are_read(kind):
    told, block = READ[kind]

    found = read_quantisation({"model_type": "llama", "quantization_config": told})

    assert found == Quantisation(told["quant_method"], is_read=True, block=block)


@pytest.mark.parametrize("kind", BY_COLUMNS)
def test_the_configuration_tells_bits_layout_and_what_zeros_are_stored_less(kind):
    told, (layout, n_bits, offset) = BY_COLUMNS[kind]

    found = read_quantisation({"quantization_config": told})

    assert found == Quantisation(
        told["quant_method"], is_read=True, n_packed_bits=n_bits, layout=layout, offset=offset
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_every_other_quantisation_is_not(kind):
    found = read_quantisation({"quantization_config": REFUSED[kind]})

    assert found
    assert not found.is_read
    told = REFUSED[kind].get("quant_method", "unknown")
    form = f", {REFUSED[kind]['format']}" if told == "compressed-tensors" else ""
    assert found.method == told + form


INTEGERS = {
    "int-quantized": (compressed(kind="int", form="int-quantized"), None),
    "naive-quantized": (compressed(kind="int", form="naive-quantized"), None),
    "packed, 4 bits": (compressed(kind="int", bits=4, form="pack-quantized"), 4),
    "packed, 8 bits": (compressed(kind="int", form="pack-quantized"), 8),
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_compressed_tensors_are_read_with_their_bits(kind):
    told, n_bits = INTEGERS[kind]

    found = read_quantisation({"quantization_config": told})

    assert found == Quantisation(
        "compressed-tensors", is_read=True, integers=True, n_packed_bits=n_bits
    )


def test_groups_of_several_kinds_are_read_where_packed_ones_have_one_width():
    def groups(*bits):
        each = {"type": "int", "num_bits": 8}
        packed = [{"format": "pack-quantized", "weights": each | {"num_bits": n}} for n in bits]
        loose = {"format": "float-quantized", "weights": {"type": "float", "num_bits": 8}}
        return compressed(form="mixed-precision") | {
            "config_groups": {str(i): group for i, group in enumerate([loose, *packed])}
        }

    assert read_quantisation({"quantization_config": groups(4)}).n_packed_bits == 4
    mixed = read_quantisation({"quantization_config": groups(4, 8)})
    assert not mixed.is_read
    assert mixed.method == "compressed-tensors, float-quantized and pack-quantized"


@pytest.mark.parametrize("bits", [[4], 4.0, True, "4", None, {}])
def test_bits_that_are_no_number_are_not_read(bits):
    packed = compressed("int", bits, "pack-quantized")

    for told in (packed, {"quant_method": "gptq", "bits": bits}):
        assert not read_quantisation({"quantization_config": told}).is_read
    assert not read_quantisation({"quantization_config": compressed(form=["x"])}).is_read


def test_it_is_found_under_its_older_name_in_a_part_and_beside_the_configuration():
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}

    assert read_quantisation({"model_type": "llama"}) is None
    assert read_quantisation({"quantization_config": None}) is None
    assert read_quantisation({"compression_config": compressed()}).is_read
    assert read_quantisation({"text_config": {"quantization_config": DEEPSEEK}}).is_read
    assert read_quantisation({}, beside) == Quantisation("modelopt", is_read=True)
    assert not read_quantisation({}, {"quantization": {"quant_algo": "W4A8_AWQ"}}).is_read


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [128, 128.0]])
def test_blocks_that_make_no_sense_are_not_read(block):
    found = read_quantisation({"quantization_config": DEEPSEEK | {"weight_block_size": block}})

    assert found == Quantisation(f"fp8, blocks of {block}", is_read=False)


def checkpoint(**tensors):
    headers = {
        name: TensorHeader(name, dtype, shape, "model.safetensors", 0, 0)
        for name, (dtype, shape) in tensors.items()
    }
    return Checkpoint("me/model", headers)


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("a.q_proj.qweight", "I32", "a.q_proj.qweight, as in GPTQ and AWQ"),
        ("a.q_proj.qzeros", "I32", "a.q_proj.qzeros, as in GPTQ and AWQ"),
        ("a.q_proj.weight.absmax", "F32", "a.q_proj.weight.absmax, as in bitsandbytes"),
        ("a.q_proj.SCB", "F32", "a.q_proj.SCB, as in bitsandbytes"),
        (
            "a.q_proj.weight_packed",
            "I32",
            "a.q_proj.weight_packed, as in compressed-tensors",
        ),
        ("a.down_proj_blocks", "U8", "a.down_proj_blocks, as in gpt-oss (MXFP4)"),
        ("a.q_proj.weight", "I8", "a.q_proj.weight as I8"),
        ("a.q_proj.weight", "U8", "a.q_proj.weight as U8"),
    ],
)
def test_tensors_show_a_quantisation_that_the_configuration_is_silent_about(name, dtype, said):
    assert (
        quantised_tensor(checkpoint(**{"norm.weight": ("BF16", (4,)), name: (dtype, (4, 4))}))
        == said
    )


def test_counts_and_masks_show_none():
    plain = {"a.weight": ("BF16", (4, 4)), "a.position_ids": ("I64", (1, 4))}
    plain |= {"a.attn.bias": ("U8", (1, 1, 4, 4)), "norm.num_batches_tracked": ("I64", ())}

    assert quantised_tensor(checkpoint(**plain)) is None
