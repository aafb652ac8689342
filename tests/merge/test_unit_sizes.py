"""Tensors and configuration of a model that is aligned, both by others, have to fit each other."""

import math

import pytest

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.symmetries import units_of
from lewis_hub.merge.unit_sizes import require_units

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
}
BLOCK = {
    "input_layernorm": (8,),
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "post_attention_layernorm": (8,),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}
SHAPES = {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,)} | {
    f"model.layers.{n}.{name}.weight": shape for n in range(2) for name, shape in BLOCK.items()
}
UP, VALUE = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"


def require(config=(), shapes=()):
    found = {name: shape for name, shape in (SHAPES | dict(shapes)).items() if shape is not None}
    tensors = {
        name: TensorHeader(name, "F32", shape, "", 0, 4 * math.prod(shape))
        for name, shape in found.items()
    }
    require_units("it", units_of(Checkpoint("it", tensors), CONFIG | dict(config)))


def test_a_model_whose_tensors_fit_is_accepted():
    require()
    require({"head_dim": None})
    require(
        {"num_key_value_heads": None},
        {f"model.layers.{n}.self_attn.{k}_proj.weight": (8, 8) for n in range(2) for k in "kv"},
    )


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"num_key_value_heads": 1}, "it has 4 units `0.key`, and its config.json 2"),
        ({"num_key_value_heads": 10**6}, "it has 8 units `0.query`, and its config.json 0"),
        ({"num_key_value_heads": 0}, "it has 4 units `0.key`, and its config.json 8"),
        ({"num_key_value_heads": -2}, "it has 4 units `0.key`, and its config.json 8"),
        ({"num_key_value_heads": "2"}, "it has 4 units `0.key`, and its config.json 8"),
        ({"num_key_value_heads": math.inf}, "it has 4 units `0.key`, and its config.json 8"),
        ({"head_dim": 10**9}, "it has 8 units `0.query`, and its config.json 4000000000"),
        ({"num_attention_heads": [4]}, "it has 8 units `0.query`, and its config.json 0"),
    ],
)
def test_numbers_of_heads_that_do_not_fit_are_refused(config, problem):
    with pytest.raises(AlignmentError) as caught:
        require(config)

    assert str(caught.value).startswith(f"it: {problem}.\nRemove `align` from this model")


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({UP: (14, 8)}, f"{UP} has the shape [14, 8], which does not fit its other tensors"),
        ({UP: (1, 12, 8)}, f"{UP} has the shape [1, 12, 8], expected 2 dimensions"),
        ({"model.norm.weight": ()}, "model.norm.weight has the shape [], expected 1 dimensions"),
        ({VALUE: None}, "it has no tensors with the units `1.value`"),
        (
            {UP.replace("1", "900000000"): (12, 8)},
            "its blocks are numbered up to 900000000, and there are 3",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(shapes, problem):
    with pytest.raises(AlignmentError) as caught:
        require(shapes=shapes)

    assert str(caught.value).startswith(f"it: {problem}.\n")
