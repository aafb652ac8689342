"""A new recipe from Python; tests/cli/test_recipes.py has its variants, by `init`."""

import pytest
from click.testing import CliRunner

import lewis_hub
from lewis_hub.cli.main import cli

EXPERTS = ("zoo/expert-reverse", "zoo/expert-cipher")


def test_python_and_the_command_line_write_the_same_recipe(tmp_path):
    datasets = ("zoo/reverse", "zoo/cipher")
    outline = lewis_hub.Outline("zoo/base", EXPERTS, datasets=datasets, text="{question}")
    words = ["init", "--base", "zoo/base", "-o", str(tmp_path / "recipe.yaml")]
    words += [word for name in EXPERTS for word in ("--expert", name)]
    words += [word for name in datasets for word in ("--calibration", name)]

    draft = lewis_hub.draft_recipe(outline)
    CliRunner().invoke(cli, [*words, "--text", "{question}"], catch_exceptions=False)

    assert draft.note is None
    assert draft.text == (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert lewis_hub.read_recipe(tmp_path / "recipe.yaml").merge_method == "regmean"


def test_two_datasets_for_three_experts_are_refused():
    outline = lewis_hub.Outline("zoo/base", (*EXPERTS, "zoo/third"), datasets=("a/b", "c/d"))

    with pytest.raises(lewis_hub.LewisHubError) as caught:
        lewis_hub.draft_recipe(outline)

    assert str(caught.value) == (
        "recipe: `calibration`: expected one --calibration for all experts or one for each of the "
        "3, found 2.\nName one dataset, or all."
    )
