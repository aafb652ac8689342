import pytest
import yaml

from lewis_hub.errors import CheckFailedError, GuideError, MergeError, RecipeError, TuningError
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.tune.space import (
    Choice,
    Number,
    axes,
    candidate,
    corners,
    settled,
    short_name,
    space_of,
    warm_starts,
    written,
)

CALIBRATION = "{dataset: a/b, text: '{q}'}"


def recipe(method="ties", parameters="{}", first="{}", guide="{name: lewis, gamma: 0.2}"):
    guided = f"guide: {guide[:-1]}, calibration: {CALIBRATION}}}\n" if guide else ""
    return parse_recipe(
        f"base_model: o/base\nmodels:\n- {{model: o/one, parameters: {first}}}\n- model: o/two\n"
        f"merge_method: {method}\nparameters: {parameters}\n{guided}",
        "recipe.yaml",
    )


def calibrated(method, parameters="{}", first="{}"):
    """A recipe without a guide whose expert has texts."""
    return parse_recipe(
        f"base_model: o/base\nmerge_method: {method}\nparameters: {parameters}\n"
        f"models: [{{model: o/one, parameters: {first}, calibration: {CALIBRATION}}}]\n",
        "recipe.yaml",
    )


def told(space, method):
    return {axis.name: axis for axis in axes(space, {"merge_method": method})}


def test_a_space_holds_what_the_method_takes_and_starts_at_the_recipes_own_settings():
    asked = recipe(parameters="{normalize: false, lambda: 3.0}", first="{weight: 0.3333333}")

    assert axes(space_of(asked), {}) == (
        Choice("guide.name", ("lewis", "uniform"), "lewis"),
        Number("guide.gamma", 0.05, 1.0, 0.2),
        Number("guide.epsilon", 0.05, 1.0, 0.8),
        Number("models[0].weight", 0.1, 1.5, 0.3333333),
        Number("models[1].weight", 0.1, 1.5, 1.0),
        Choice("parameters.normalize", (False, True), False),
        Choice("parameters.rescale", (False, True), False),
        Number("parameters.lambda", 0.3, 3.0, 3.0),  # widened to what the recipe says
    )


def test_without_a_guide_one_density_is_searched_for_all_models():
    found = told(space_of(recipe(guide="", parameters="{density: 0.02}")), "ties")

    assert found["parameters.density"] == Number("parameters.density", 0.02, 1.0, 0.02)
    assert not [name for name in found if name.startswith("guide.")]


def test_gradients_conditions_and_settings_of_one_model_stay_as_they_are():
    asked = recipe("breadcrumbs", "{lambda: [0.5, 1.0]}", "{weight: [0, 1], gamma: 0.02}")
    values = warm_starts(space_of(asked))[0]

    assert {"guide.name", "guide.gamma", "guide.epsilon"} < values.keys()
    assert values.keys() - {"guide.name", "guide.gamma", "guide.epsilon"} == {
        "models[1].weight",
        "parameters.normalize",
        "parameters.rescale",
    }
    tried = candidate(space_of(asked), values)
    assert tried.parameters["lambda"] == (0.5, 1.0)
    assert tried.models[0].parameters == {"weight": (0.0, 1.0), "gamma": 0.02}


def test_each_method_is_given_its_own_settings_and_no_others():
    space = space_of(recipe(parameters="{lambda: 0.7}"), ["task_arithmetic", "della"])
    by_method = {method: set(told(space, method)) for method in space.methods}

    assert by_method["ties"] - by_method["task_arithmetic"] == {
        "parameters.rescale",
        "guide.name",
        "guide.gamma",
        "guide.epsilon",
    }
    assert by_method["della"] - by_method["ties"] == {"parameters.epsilon"}
    tried = corners(space)  # the guide does nothing for task arithmetic
    assert [(one.merge_method, one.guide.name if one.guide else None) for one in tried] == [
        *(("ties", "lewis"), ("ties", "uniform")),
        ("task_arithmetic", None),
        *(("della", "lewis"), ("della", "uniform")),
    ]
    assert tried[2].parameters["lambda"] == 0.7


def test_the_first_start_is_the_recipe_and_the_second_has_the_usual_densities():
    first, second = warm_starts(space_of(recipe()))

    assert (first["guide.gamma"], first["guide.epsilon"]) == (0.2, 0.8)
    assert second == first | {"guide.gamma": 0.3, "guide.epsilon": 0.8}
    assert len(warm_starts(space_of(recipe(guide="{name: lewis}")))) == 1


def test_the_lower_density_is_gamma_and_numbers_are_rounded_but_for_the_recipes_own():
    space = space_of(recipe(first="{weight: 0.3333333}"))
    values = warm_starts(space)[0] | {"guide.gamma": 0.87654321, "guide.epsilon": 0.1}

    found = settled(space, values)

    assert (found["guide.gamma"], found["guide.epsilon"]) == (0.1, 0.8765)
    assert found["models[0].weight"] == 0.3333333


def test_what_is_written_reads_back_as_what_was_tried():
    space = space_of(recipe(), ["della"])
    values = {a.name: a.start for a in axes(space, {"merge_method": "della"})}
    values |= {"merge_method": "della", "parameters.epsilon": 0.05, "models[1].weight": 0.4}

    tried = candidate(space, values)
    again = parse_recipe(written(tried), "recipe.tuned.yaml")

    assert again == parse_recipe(yaml.safe_dump(yaml.safe_load(written(tried))), "x")
    assert again.merge_method == "della"
    assert again.parameters["epsilon"] == 0.05
    assert again.models[1].parameters == {"weight": 0.4}
    assert again.guide == tried.guide


@pytest.mark.parametrize(
    ("error", "message", "methods", "guides"),
    [
        (MergeError, "method `tise`", ["tise"], []),
        (GuideError, "guide `leewis`", [], ["leewis"]),
        (TuningError, "`ties` takes a base, but `linear` takes no base", ["linear"], []),
    ],
)
def test_what_is_not_there_or_does_not_go_together_is_refused(error, message, methods, guides):
    with pytest.raises(error) as caught:
        space_of(recipe(), methods, guides)

    assert message in str(caught.value)


def test_a_guide_that_needs_texts_is_refused_where_the_recipe_has_none():
    asked = parse_recipe(
        "base_model: o/base\nmodels: [{model: o/one}]\nmerge_method: ties\n", "recipe.yaml"
    )

    with pytest.raises(RecipeError) as caught:
        space_of(asked, ["della"], ["lewis"])
    assert str(caught.value) == (
        "the recipe with `merge_method: ties` and `guide.name: lewis`: `guide`: no calibration "
        "data for `o/one`.\nAdd `guide.calibration`, or `calibration` to this model."
    )


def test_a_recipe_without_a_guide_comes_first_and_its_density_goes_with_no_guide():
    asked = calibrated("ties", "{density: 0.4}")
    space = space_of(asked, guides=["lewis"])
    own, usual = warm_starts(space)
    common = {"models[0].weight": 1.0, "parameters.lambda": 1.0}
    common |= {"parameters.normalize": True, "parameters.rescale": False}

    assert own == common | {"guide.name": "none", "parameters.density": 0.4}
    assert usual == common | {"guide.name": "lewis", "guide.gamma": 0.3, "guide.epsilon": 0.8}
    assert axes(space, {})[0] == Choice("guide.name", ("none", "lewis"), "none")
    first, second = corners(space)
    assert (first.guide, first.parameters["density"]) == (None, 0.4)
    assert (second.guide.name, second.parameters.get("density")) == ("lewis", None)
    assert "guide" not in yaml.safe_load(written(first))


def test_under_a_guide_that_is_tried_the_models_own_densities_are_left_out():
    asked = calibrated("ties", first="{density: [0.2, 0.6], weight: 0.5}")
    space = space_of(asked, guides=["lewis"])

    assert [one.models[0].parameters for one in corners(space)] == [
        {"density": (0.2, 0.6), "weight": 0.5},
        {"weight": 0.5},
    ]
    assert not {"guide.gamma", "parameters.density"} & warm_starts(space)[0].keys()


def test_no_guide_at_all_can_be_tried_of_a_recipe_that_has_one_with_the_texts_of_its_guide():
    space = space_of(recipe("regmean"), guides=["none"])

    guided, plain = corners(space)

    assert axes(space, {})[0] == Choice("guide.name", ("lewis", "none"), "lewis")
    assert plain.guide is None
    assert plain.parameters["density"] == 1.0
    assert plain.calibration == guided.guide.calibration


@pytest.mark.parametrize(
    ("mean", "own", "gamma", "epsilon", "n_starts"),
    [
        (0.9, (0.85, 0.9), (0.8, 0.9), (0.9, 1.0), 1),
        (0.2, (0.1, 0.3), (0.05, 0.2), (0.2, 0.35), 1),
        (0.6, (0.5, 0.7), (0.2, 0.6), (0.6, 1.0), 2),
        (0.9, (0.3, 0.8), (0.3, 0.9), (0.8, 1.0), 1),  # widened to its own
    ],
)
def test_a_mean_density_stays_and_gamma_and_epsilon_lie_about_it(
    mean, own, gamma, epsilon, n_starts
):
    guide = f"{{name: lewis, mean_density: {mean}, gamma: {own[0]}, epsilon: {own[1]}}}"
    space = space_of(recipe(guide=guide))

    found = told(space, "ties")

    assert {one.guide.mean_density for one in corners(space)} == {mean}
    assert found["guide.gamma"] == Number("guide.gamma", *gamma, own[0])
    assert found["guide.epsilon"] == Number("guide.epsilon", *epsilon, own[1])
    assert len(warm_starts(space)) == n_starts  # gamma 0.3 and epsilon 0.8 where both lie within


def test_a_guide_of_weights_is_tried_with_the_methods_that_it_weighs():
    of_weights = "{name: lewis, apply_to: weight}"
    first, *_ = corners(space_of(recipe("task_arithmetic", guide=of_weights)))

    assert (first.guide.name, first.guide.apply_to) == ("lewis", "weight")


def test_densities_are_searched_beside_a_guide_of_weights():
    space = space_of(recipe(parameters="{density: 0.3}", guide="{name: lewis, apply_to: weight}"))

    assert told(space, "ties")["parameters.density"] == Number("parameters.density", 0.05, 1.0, 0.3)
    assert [one.parameters["density"] for one in corners(space)] == [0.3, 0.3]


def test_the_recipes_own_method_keeps_even_what_it_does_not_know():
    space = space_of(recipe(parameters="{lambd: 0.4}"), ["della"])

    assert [one.parameters.get("lambd") for one in corners(space)] == [0.4, 0.4, None, None]


def test_a_guide_that_does_nothing_is_refused():
    with pytest.raises(CheckFailedError, match="`slerp` keeps every entry, so densities would ha"):
        space_of(recipe("slerp", "{t: 0.5}"))
    with pytest.raises(TuningError) as caught:
        space_of(calibrated("task_arithmetic"), guides=["lewis"])
    assert str(caught.value) == (
        "tune: `task_arithmetic` keeps every entry, so a guide would have no effect.\n"
        "Remove --guide, or add a --method that has densities, such as ties."
    )


def test_regmean_is_searched_over_what_it_takes():
    texts = f"calibration: {CALIBRATION}\n"
    asked = parse_recipe(
        f"base_model: o/base\nmodels: [{{model: o/one}}]\nmerge_method: regmean\n{texts}", "r.yaml"
    )
    space = space_of(asked, ["task_arithmetic"])

    assert axes(space, {})[1:] == (
        Number("models[0].weight", 0.1, 1.5, 1.0),
        Number("parameters.density", 0.05, 1.0, 1.0),
        Number("parameters.off_diagonal", 0.0, 1.0, 0.5),
        Number("parameters.lambda", 0.3, 2.0, 1.0),
        Choice("parameters.compensate", (False, True), True),
    )
    by_statistics, plain = corners(space)
    assert by_statistics.calibration == asked.calibration
    assert plain.calibration is None  # a recipe that measures nothing may have none


def test_trimming_by_activation_goes_with_the_methods_that_trim():
    asked = recipe(parameters="{trim: activation}")

    found = {one.merge_method: one.parameters for one in corners(space_of(asked, ["breadcrumbs"]))}

    assert found["ties"]["trim"] == "activation"
    assert "trim" not in found["breadcrumbs"]


def test_an_axis_has_a_short_name_for_columns():
    names = ["models[1].weight", "parameters.lambda", "guide.gamma", "merge_method"]

    assert list(map(short_name, names)) == ["weight[1]", "lambda", "guide.gamma", "merge_method"]
