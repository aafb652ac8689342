"""Numbers of a configuration that would have transformers build modules for ever."""

import re

import pytest

from lewis_hub.checkpoint.configuration import require_buildable
from lewis_hub.errors import SourceError

REMEDY = "The file is damaged: use an intact copy of the model."


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 1001}, "`num_hidden_layers`"),
        ({"a": {"b": {"encoder_layers": 10**6}}}, "`encoder_layers`"),
        ({"depth": 5000}, "`depth`"),
        ({"inner_group_num": 80_000}, "`inner_group_num`"),
        ({"n_layer": float("inf")}, "`n_layer`"),
        ({"num_blocks": 10**400}, "`num_blocks`"),
    ],
)
def test_a_number_of_layers_beyond_all_models_is_refused(config, said):
    with pytest.raises(SourceError) as caught:
        require_buildable("me/model", config)

    assert (
        str(caught.value)
        == f"me/model: {said} of its config.json is above the limit of 1,000.\n{REMEDY}"
    )


@pytest.mark.parametrize(
    ("key", "limit", "usual"),
    [
        ("max_seq_len", "200,000", 65_536),
        ("n_heads", "1,000", 64),
        ("num_attention_heads", "1,000", 128),
    ],
)
def test_positions_and_heads_of_mpt_have_limits(key, limit, usual):
    """It makes a number for each of both: a tiny model with 2 ** 31 positions took 8.6 GB."""
    require_buildable("me/model", {key: usual})
    with pytest.raises(SourceError) as caught:
        require_buildable("me/model", {key: 2**31})

    said = f"me/model: `{key}` of its config.json is above the limit of {limit}."
    assert str(caught.value) == f"{said}\n{REMEDY}"


def test_each_layer_has_tensors():
    require_buildable("me/model", {"num_hidden_layers": 240}, 240)
    with pytest.raises(SourceError) as caught:
        require_buildable("me/model", {"num_hidden_layers": 240}, 239)

    assert str(caught.value) == (
        "me/model: `num_hidden_layers` of its config.json is 240, but it has 239 tensors.\n"
        f"{REMEDY}"
    )


def test_what_models_have_is_within_the_limits():
    require_buildable(
        "me/model",
        {
            **{"num_hidden_layers": 1000, "num_local_experts": 16_384, "num_labels": 21_000},
            **{"vocab_size": 262_144, "max_position_embeddings": 10_485_760, "layer_types": ["a"]},
            **{"text_config": {"num_layers": 126, "hidden_size": 18_432}, "layers": None},
        },
        9000,
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"configuration_files": ["config.4.0.0.json"]}, "another configuration, ['config.4.0.0."),
        ({"attribute_map": {"size": "num_hidden_layers"}}, "other keys for its values, {'size': "),
        ({"a": {"architecture": "hf-hub:evil/model"}}, "a model elsewhere, hf-hub:evil/model"),
        ({"backbone": "local-dir:/home/me"}, "a model elsewhere, local-dir:/home/me"),
        ({"speculators_config": {"verifier": {"name_or_path": "a/b"}}}, "another model, {'verifi"),
        ({"model_args": {"checkpoint_path": "a.pth"}}, "a file, a.pth"),
        ({"transformers_weights": "b.safetensors"}, "other weights, b.safetensors"),
        ({"attn_implementation": "evil/kernel"}, "code of the Hub, evil/kernel"),
    ],
)
def test_a_configuration_leads_nowhere_else(config, said):
    """transformers read another file, other keys, another folder: none of it was checked."""
    with pytest.raises(SourceError, match=f" of its config.json names {re.escape(said)}"):
        require_buildable("me/model", config)


def test_what_models_name_is_no_obstacle():
    require_buildable(
        "me/model",
        {
            **{"architecture": "mobilenetv5_300m_enc", "backbone": "microsoft/resnet-50"},
            **{"vision_config": {"backbone": {"a": "b:c"}, "model_args": None}},
            **{"attribute_map": {}, "attn_implementation": "sdpa", "configuration_files": None},
        },
    )


def test_a_configuration_of_very_many_values_is_refused():
    """transformers copies it again and again: 1.9 million empty mappings took a minute."""
    require_buildable("me/model", {"a": [{}] * 299_998})

    with pytest.raises(SourceError) as caught:
        require_buildable("me/model", {"a": [{}] * 299_999})

    told = "its config.json has more than 300,000 values"
    assert str(caught.value) == f"me/model: {told}.\n{REMEDY}"


def test_a_configuration_of_very_many_keys_is_refused():
    """Of each transformers makes an attribute: 290,000 took minutes where a merge was scored."""
    labels = {str(number): "a" for number in range(100_000)}
    many = {f"k{number}": number for number in range(19_997)}
    known = {"id2label": labels, "quantization_config": {"modules": labels}}
    require_buildable("me/model", {**known, "per_layer_config": many})

    with pytest.raises(SourceError) as caught:
        require_buildable("me/model", {**known, "per_layer_config": [{**many, "k": 0}]})

    told = "its config.json has more than 20,000 keys"
    assert str(caught.value) == f"me/model: {told}.\n{REMEDY}"
