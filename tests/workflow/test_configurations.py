"""Models whose weights mean something else than the donor's, as their `config.json` files say."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, RobertaConfig

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import CheckFailedError
from lewis_hub.recipe.read import parse_recipe

NLI = ["contradiction", "neutral", "entailment"]


@pytest.fixture
def classifiers(tmp_path, hub):
    """Writes a classifier with labels into a folder; returns the recipe of a merge of all."""
    tokenizer = (zoo_folder() / "base" / "tokenizer.json").read_bytes()

    def make(**labels):
        for seed, (name, own) in enumerate(labels.items()):
            torch.manual_seed(seed)
            config = RobertaConfig(
                **dict(vocab_size=390, hidden_size=16, intermediate_size=16, num_hidden_layers=1),
                **dict(num_attention_heads=2, id2label=dict(enumerate(own))),
            )
            AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / name)
            (tmp_path / name / "tokenizer.json").write_bytes(tokenizer)
        models = ", ".join(f"{{model: {tmp_path / name}}}" for name in labels)
        text = f"models: [{models}]\nmerge_method: linear\n"
        return parse_recipe(text, "recipe.yaml")

    return make


def test_heads_whose_rows_mean_other_labels_are_not_merged(classifiers, tmp_path):
    recipe = classifiers(first=NLI, second=[label.upper() for label in NLI[::-1]])

    (problem,) = lewis_hub.check(recipe).problems

    assert problem == (
        f"{tmp_path / 'second'}: its label `contradiction` is number 2 in its config.json, but "
        f"number 0 in that of {tmp_path / 'first'}: the rows of their heads mean different labels. "
        "Reorder the rows of its head and its labels, or leave it out."
    )
    with pytest.raises(CheckFailedError, match="is number 2 in its config.json"):
        lewis_hub.merge_models(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("second", "notes"),
    [
        (NLI, 0),
        ([label.upper() for label in NLI], 0),
        (["LABEL_0", "LABEL_1", "LABEL_2"], 0),
        (["no", "maybe", "yes"], 1),
    ],
)
def test_labels_in_one_order_and_labels_without_meaning_are_merged(
    classifiers, tmp_path, second, notes
):
    report = lewis_hub.check(classifiers(first=NLI, second=second))

    assert report.problems == ()
    expected = (
        f"label 0 is `no` in the config.json of {tmp_path / 'second'}, and `contradiction` in that "
        f"of {tmp_path / 'first'}, which the merge has."
    )
    assert [note for note in report.notes if "which the merge has" in note] == [expected] * notes


def test_a_very_long_name_of_an_architecture_is_read_in_no_time(classifiers, tmp_path):
    """A pattern was matched in quadratic time: 60 kB took a minute."""
    recipe = classifiers(first=NLI, second=NLI)
    for name in ("first", "second"):
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text()) | {"architectures": ["For" * 500_000]}
        file.write_text(json.dumps(config))

    assert not [note for note in lewis_hub.check(recipe).notes if "label" in note]


def checked(tmp_path, **changes):
    """The notes on a merge of the zoo with an expert whose `config.json` is changed."""
    folder = tmp_path / "expert"
    folder.mkdir()
    for file in (zoo_folder() / "expert-reverse").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    text = f"base_model: zoo/base\nmodels: [{{model: {folder}}}]\nmerge_method: ties\n"
    report = lewis_hub.check(parse_recipe(text, "recipe.yaml"))
    assert report.problems == ()
    return [note.replace(str(folder), "it") for note in report.notes if "config.json" in note]


def test_another_setting_of_the_computation_is_a_note(api, tmp_path):
    rope = {"rope_theta": 1e6, "rope_type": "default"}

    notes = checked(tmp_path, rope_parameters=rope, hidden_act="relu", rms_norm_eps=0.5)

    base = json.loads((zoo_folder() / "base" / "config.json").read_text())
    theta = base["rope_parameters"]["rope_theta"]
    assert notes == [
        f"`{key}` is {found} in the config.json of it, and {kept} in that of zoo/base, which the "
        "merge has."
        for key, found, kept in [
            ("rope_theta", "1000000.0", json.dumps(theta)),
            ("hidden_act", '"relu"', '"silu"'),
            ("rms_norm_eps", "0.5", json.dumps(base["rms_norm_eps"])),
        ]
    ]


def test_the_same_settings_in_the_words_of_an_older_configuration_are_no_note(api, tmp_path):
    base = json.loads((zoo_folder() / "base" / "config.json").read_text())
    old = {"rope_parameters": None, "rope_theta": base["rope_parameters"]["rope_theta"]}

    assert checked(tmp_path, **old) == []
