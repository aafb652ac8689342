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


def test_the_tokens_of_words_that_are_forbidden_forced_or_weighed_are_moved():
    generation = {
        "bad_words_ids": [[8], [9, 8]],
        "force_words_ids": [[[8, 9], [9]]],
        "sequence_bias": [[[8, 9], 9], [[9], -2.5]],
        "forced_decoder_ids": [[8, 9], [9, None]],  # positions 8 and 9
        "lang_to_id": {"<|de|>": 9},
        "max_length": 9,
    }
    found = ids(({"bad_words_ids": [[9]]}, generation), ({}, {}), {9: 0, 8: 2})

    special = {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": None}
    assert found.config == special | {"bad_words_ids": [[0]]}
    assert found.generation == special | {
        "bad_words_ids": [[2], [0, 2]],
        "force_words_ids": [[[2, 0], [0]]],
        "sequence_bias": [[[2, 0], 9], [[0], -2.5]],
        "forced_decoder_ids": [[8, 0], [9, None]],
        "lang_to_id": {"<|de|>": 0},
    }


def test_a_suppressed_token_that_the_donor_lacks_needs_no_id():
    generation = {"suppress_tokens": [8, 3, 9], "begin_suppress_tokens": [3, -1]}
    found = ids(({}, generation), ({}, {}), {9: 0, 8: 2})

    assert found.generation["suppress_tokens"] == [2, 0]
    assert found.generation["begin_suppress_tokens"] == [-1]


@pytest.mark.parametrize(
    "value", [None, "a", 3, [None], ["a"], [[], [3]], [{"a": "b"}], [[3.5, "a"]]]
)
@pytest.mark.parametrize(
    "name", ["bad_words_ids", "sequence_bias", "forced_decoder_ids", "a_to_id"]
)
def test_a_setting_without_ids_stays_as_it_is(name, value):
    found = ids(({}, {name: value}), ({}, {}), {3: 3})

    assert found.generation.get(name, value) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_token_id", 8), ("bad_words_ids", [[8]]), ("sequence_bias", [[[8], 1]])],
)
def test_a_token_that_the_donor_lacks_is_refused(name, value):
    with pytest.raises(TokenizerError) as caught:
        ids(({name: value}, {}), ({}, {}))

    assert str(caught.value) == (
        f"model: config.json: {name}: it is token 8, which the tokenizer of donor lacks.\n"
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
