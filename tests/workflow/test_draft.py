"""A new recipe from Python; tests/cli/test_recipes.py has its variants, by `init`."""

import pytest
from click.testing import CliRunner

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.recipe.read import parse_recipe

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


TASK = """\
task: own
dataset_path: json
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: "acc%spublish: {repo: tests/other} #"}]
"""


@pytest.mark.parametrize("line_break", [r"\N", r"\L", r"\P", r"\n"])
def test_the_name_of_a_metric_adds_no_line_to_a_recipe(tmp_path, line_break):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(TASK % line_break)
    outline = lewis_hub.Outline("zoo/base", EXPERTS, tasks=("own",), include="tasks")

    draft = lewis_hub.draft_recipe(outline, tmp_path)

    assert parse_recipe(draft.text, "recipe.yaml").publish is None


def test_every_line_break_of_a_text_is_kept():
    text = "{question}\n\x85\u2028\u2029{answer}"
    outline = lewis_hub.Outline("zoo/base", EXPERTS, datasets=("zoo/reverse",), text=text)

    draft = lewis_hub.draft_recipe(outline)

    guide = parse_recipe(draft.text, "recipe.yaml").guide
    assert guide.calibration.text == text
