"""A file of mergekit-moe is a recipe, and its contradictions are found on reading."""

import re
from pathlib import Path

import pytest

from lewis_hub.errors import RecipeError
from lewis_hub.recipe.parts import parts_of, with_made
from lewis_hub.recipe.read import parse_recipe

PAGE = Path(__file__).parents[2] / "docs" / "moe.md"
GOOD = """base_model: a/base
gate_mode: hidden
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: a/one@main
    positive_prompts: [code, "def f"]
    negative_prompts: poems
  - source_model: a/base
    positive_prompts:
      - poems
"""


def refused(old, new):
    assert old in GOOD
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD.replace(old, new), "moe.yaml")
    return str(caught.value)


def test_a_file_of_mergekit_moe_is_read_with_its_defaults():
    recipe = parse_recipe(GOOD.replace("gate_mode: hidden\n", ""), "moe.yaml")

    assert recipe.routed
    assert [str(one.source_model) for one in recipe.routed] == ["a/one@main", "a/base"]
    assert recipe.routed[0].positive_prompts == ("code", "def f")
    assert recipe.routed[0].negative_prompts == ("poems",)
    assert (recipe.gate_mode, recipe.experts_per_token) == ("hidden", 2)
    assert recipe.merge_method == "passthrough"
    assert [str(entry.model) for entry in recipe.experts] == ["a/one@main"]
    written = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert written["experts"][1] == {
        "source_model": "a/base",
        "positive_prompts": ["poems"],
        "negative_prompts": [],
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "gate_mode: hidden",
            "gate_mode: mean",
            "moe.yaml:2: `gate_mode`: expected 'hidden', 'hidden_avg', 'hidden_last', "
            "'cheap_embed', 'random' or 'uniform_random', found 'mean'.",
        ),
        (
            "experts_per_token: 2",
            "experts_per_token: 3",
            "moe.yaml:4: `experts_per_token`: each token would pass 3 of 2 experts.\n"
            "Give a number from 1 to 2, or list more experts.",
        ),
        (
            "    positive_prompts:\n      - poems\n",
            "",
            "moe.yaml:9: `experts[1].positive_prompts`: `a/base` has no prompts, but the router "
            "weights of `gate_mode: hidden` are computed from them.\n"
            "Add some texts that this expert should get, or set `gate_mode: random`.",
        ),
        (
            '[code, "def f"]\n    negative_prompts: poems',
            "[poems]",
            "moe.yaml:5: `experts`: all experts have the same prompts, so the router could not "
            "tell them apart.",
        ),
        (
            "dtype: bfloat16",
            "merge_method: ties",
            "moe.yaml:3: `merge_method`: `ties` cannot be used with `experts`.\nLeave it out.",
        ),
        (
            "dtype: bfloat16",
            "guide: {name: uniform}",
            "moe.yaml:3: `guide`: `guide` cannot be used with `experts`.",
        ),
        (
            "negative_prompts: poems",
            "noise_scale: 0.1",
            "moe.yaml:8: `experts[0].noise_scale`: random noise on the weights is not supported.",
        ),
        ("base_model: a/base\n", "", "`base_model`: a mixture needs a `base_model`."),
        (
            "negative_prompts",
            "negative_prompt",
            "unknown key `negative_prompt`.\nDid you mean `negative_prompts`?",
        ),
    ],
)
def test_a_contradiction_is_refused_with_its_line_and_a_remedy(old, new, message):
    assert message in refused(old, new)


def test_settings_of_a_mixture_without_experts_are_refused():
    text = "base_model: a/b\nmodels: [a/c]\nmerge_method: ties\ngate_mode: hidden\n"

    with pytest.raises(RecipeError, match="`gate_mode` belongs to a mixture, but there are no"):
        parse_recipe(text, "recipe.yaml")


def test_the_recipes_of_the_page_are_valid():
    recipes = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)

    assert [bool(parse_recipe(text, "moe.yaml").shared_experts) for text in recipes] == [
        False,
        True,
    ]


def test_a_mixture_uses_merges_of_the_same_file_as_experts(tmp_path):
    first = "name: first\nbase_model: a/base\nmodels: [a/x, a/y]\nmerge_method: linear\n---\n"
    recipe = parse_recipe(first + GOOD.replace("a/one@main", "first"), "moe.yaml")

    (part,) = parts_of(recipe)
    whole = with_made(recipe, {"first": tmp_path})

    assert (part.name, part.merge_method) == ("first", "linear")
    assert not parts_of(whole)
    assert [str(one.source_model) for one in whole.mixed] == ["first", "a/base"]
    assert whole.locate("first") == str(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "base_model: a/base",
            "base_model: a/base+a/lora",
            "moe.yaml:1: `base_model`: the base must be a whole model, not an adapter on a model.\n"
            "Name the whole model, and list the adapter under `experts`.",
        ),
        (
            "a/one@main",
            "c/d+a/lora",
            "moe.yaml:6: `experts[0].source_model`: the adapter's base is `c/d`, but `base_model` "
            "is `a/base`.\nMerge it into its base first, and list the result.",
        ),
        (
            "dtype: bfloat16",
            "dtype: float64",
            "moe.yaml:3: `dtype`: `float64` cannot be used with `experts`.\n"
            "Write `float32`: its tensors are copied or multiplied by a number.",
        ),
    ],
)
def test_what_other_merges_take_and_a_mixture_does_not(old, new, message):
    assert refused(old, new) == message
