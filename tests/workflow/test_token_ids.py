"""Ids of special tokens in the configuration of a model with a donor's tokenizer."""

import pytest

from lewis_hub.errors import TokenizerError
from lewis_hub.workflow.token_ids import Configuration, new_ids

ROLES = {"bos": 5, "eos": 6, "mask": 7}


def ids(model, donor, moved=None):
    told = Configuration("model", *model), Configuration("donor", *donor)
    return new_ids(*told, ROLES, (moved or {}).get)


def test_the_donors_configuration_counts_then_its_tokenizer():
    model = ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}, {"eos_token_id": [2, 3]})
    donor = ({"bos_token_id": 5, "eos_token_id": 6}, {"eos_token_id": [6, 7], "pad_token_id": 7})

    found = ids(model, donor)

    # the configuration names no padding, but texts are generated with one
    assert found.config == {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7}
    assert found.generation == {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 7}
    silent = ids(model, ({}, {}))
    assert silent.config == silent.generation
    assert silent.config == {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": None}


def test_without_a_generation_config_the_configuration_has_all_ends_of_a_text():
    found = ids(({"eos_token_id": 2}, {}), ({"eos_token_id": 6}, {"eos_token_id": [6, 7]}))

    assert found.config["eos_token_id"] == [6, 7]


def test_the_donors_text_part_counts():
    found = ids(({}, {}), ({"text_config": {"bos_token_id": 3, "eos_token_id": 4}}, {}))

    assert (found.config["bos_token_id"], found.config["eos_token_id"]) == (3, 4)


def test_other_ids_follow_their_tokens():
    config = {
        "decoder_start_token_id": 9,
        "unk_token_id": 4,
        "mask_token_id": 3,
        "image_token_index": None,
        "text_config": {"image_token_id": 8},
        "token_id": 1,
    }
    generation = {"forced_bos_token_id": [8, 9]}
    found = ids((config, generation), ({}, {}), {9: 0, 8: 2})

    special = {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": None}
    assert found.config == special | {
        "decoder_start_token_id": 0,
        "unk_token_id": None,
        "mask_token_id": 7,
        "image_token_id": 2,
    }
    assert found.generation == special | {"forced_bos_token_id": [2, 0]}


def test_a_token_that_the_donor_lacks_is_refused():
    with pytest.raises(TokenizerError) as caught:
        ids(({"image_token_id": 8}, {}), ({}, {}))

    assert str(caught.value) == (
        "model: config.json: image_token_id: it is token 8, which the tokenizer of donor lacks.\n"
        "Choose a donor whose tokenizer has it."
    )


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "m2m_100"])
def test_another_padding_is_refused_where_positions_are_counted_from_it(kind):
    model = ({"model_type": kind, "pad_token_id": 1}, {})

    with pytest.raises(TokenizerError, match="the id of its padding, 1, which would be 0"):
        ids(model, ({"pad_token_id": 0}, {}))

    assert ids(model, ({"pad_token_id": 1}, {})).config["pad_token_id"] == 1
    other = ({"model_type": "bert", "pad_token_id": 1}, {})
    assert ids(other, ({"pad_token_id": 0}, {})).config["pad_token_id"] == 0
