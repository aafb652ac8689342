"""What a recipe says of its guide is held against the guides there are, on reading."""

import pytest

from lewis_hub.errors import RecipeError
from lewis_hub.recipe.schema import Recipe
from lewis_hub.workflow.resolve import read_recipe, resolve_inputs

GOOD = """base_model: a/b
models:
  - model: a/c@main
merge_method: ties
guide: """
CALIBRATION = "calibration: {dataset: x/y, text: '{q}'}"


@pytest.fixture
def read(tmp_path):
    def read(guide):
        (tmp_path / "r.yaml").write_text(GOOD + guide)
        return read_recipe(tmp_path / "r.yaml")

    return read


def message(call):
    with pytest.raises(RecipeError) as caught:
        call()
    return str(caught.value)


def test_an_unknown_guide_is_refused_with_its_line_and_the_nearest_known_name(read, tmp_path):
    assert message(lambda: read(f"{{name: lewi, {CALIBRATION}}}")) == (
        f"{tmp_path / 'r.yaml'}:5: `guide.name`: guide `lewi`: it is not known in this version.\n"
        "Guides: activation_shift, aim, inverse, lewis, lewis_reference, magnitude, owl, random, "
        "uniform. Did you mean `lewis`?"
    )


@pytest.mark.parametrize("name", ["lewis", "activation_shift", "aim", "owl", "random", "inverse"])
def test_a_guide_that_measures_on_texts_needs_them(read, name, tmp_path):
    assert message(lambda: read(f"{{name: {name}}}")) == (
        f"{tmp_path / 'r.yaml'}:5: `guide`: no calibration data for `a/c@main`.\n"
        "Add `guide.calibration`, or `calibration` to this model."
    )
    assert read(f"{{name: {name}, {CALIBRATION}}}").guide.name == name


def test_blocks_that_are_stacked_need_texts_too(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "base_model: a/b\nslices:\n  - sources:\n      - {model: a/b, layer_range: [0, 4]}\n"
        "      - {model: a/c, layer_range: [0, 4]}\nmerge_method: ties\nguide: {name: lewis}\n"
    )

    assert message(lambda: read_recipe(tmp_path / "r.yaml")) == (
        f"{tmp_path / 'r.yaml'}:7: `guide`: no calibration data for `a/c`.\n"
        "Add `guide.calibration`, or `calibration` to this model."
    )


@pytest.mark.parametrize("name", ["magnitude", "uniform"])
def test_a_guide_that_measures_no_texts_does_without_them(read, name):
    assert read(f"{{name: {name}}}").guide.calibration is None


def test_a_recipe_that_was_made_in_python_is_refused_before_anything_is_looked_up():
    recipe = Recipe.model_validate(
        {
            "base_model": "a/b",
            "models": [{"model": "a/c"}],
            "merge_method": "ties",
            "guide": {"name": "lewi"},
        }
    )

    said = message(lambda: resolve_inputs(recipe, None))

    assert said.startswith("recipe: `guide.name`: guide `lewi`: it is not known in this version.\n")


def test_a_guide_for_weights_leaves_the_densities_to_the_recipe(read):
    weights = "{name: magnitude, apply_to: weight}\nparameters: {density: 0.5}\n"

    assert read(weights).parameters == {"density": 0.5}
    assert message(lambda: read(weights.replace("weight", "both"))).endswith(
        "`parameters.density`: both a guide and a density are given.\nRemove one of the two."
    )
