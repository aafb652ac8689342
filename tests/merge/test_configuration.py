import pytest

from lewis_hub.errors import MergeError
from lewis_hub.merge.slices import Model, stacked_config

TYPES = ["full", "sliding", "full", "sliding"]
LLAMA = {
    "architectures": ["A"],
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "layer_types": TYPES,
    "eos_token_id": [1, 2, 3, 4],
}


def stacked(config, blocks, other=None):
    donor = Model("donor", config, 4)
    origins = [(donor, block) for block in blocks]
    return stacked_config(donor, origins + ([(other, 0)] if other else []))


def test_the_number_of_blocks_and_lists_by_block_follow_the_blocks():
    assert stacked(LLAMA, [0, 1, 1, 3, 2, 3]) == LLAMA | {
        "num_hidden_layers": 6,
        "layer_types": ["full", "sliding", "sliding", "sliding", "full", "sliding"],
    }


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_architectures_count_by_several_names(key):
    assert stacked({key: 4, "n_head": 4}, [0, 1, 2]) == {key: 3, "n_head": 4}


def test_a_count_of_something_else_stays():
    assert stacked({"num_hidden_layers": 4, "num_layers": 2}, [0]) == {
        "num_hidden_layers": 1,
        "num_layers": 2,
    }


def test_the_language_part_of_a_model_of_several_parts_is_meant_too():
    config = {"text_config": LLAMA, "vision_config": {"num_hidden_layers": 4}}

    assert stacked(config, [1, 0]) == {
        "text_config": LLAMA | {"num_hidden_layers": 2, "layer_types": ["sliding", "full"]},
        "vision_config": {"num_hidden_layers": 4},
    }


def test_a_block_brings_the_entry_of_its_own_model():
    other = Model("other", {"layer_types": ["linear", "full"]}, 2)

    assert stacked(LLAMA, [3], other)["layer_types"] == ["sliding", "linear"]


def test_where_all_entries_are_alike_a_model_need_not_have_the_list():
    alike = LLAMA | {"layer_types": ["full"] * 4}

    found = stacked(alike, [3], Model("other", {}, 9))

    assert found["layer_types"] == ["full", "full"]


def test_a_list_that_cannot_follow_is_refused():
    with pytest.raises(MergeError) as caught:
        stacked({"text_config": LLAMA}, [3], Model("other", {}, 9))

    assert str(caught.value) == (
        "other: its config.json has no `text_config.layer_types` with one entry per block, the "
        "base's has.\nStack models of one architecture."
    )


def test_a_configuration_that_counts_no_blocks_is_refused():
    with pytest.raises(MergeError) as caught:
        stacked({"num_hidden_layers": 5}, [0])

    assert str(caught.value) == (
        "donor: its config.json says nowhere that there are 4 blocks.\n"
        "One of num_hidden_layers, num_layers, n_layer, n_layers, decoder_layers, encoder_layers, "
        "depth has to: mend it, or use another `base_model`."
    )
