import time

import pytest

from lewis_hub.errors import MergeError
from lewis_hub.merge.settings import (
    depths,
    evaluate,
    look_up,
    options_of,
    require_filters_fit,
    require_valid,
)
from lewis_hub.methods.registry import find
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.recipe.schema import Conditional

Q = "model.layers.1.self_attn.q_proj.weight"
NAMES = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{c}.weight" for i in range(3) for c in ("self_attn.q_proj", "mlp.up")),
    "model.norm.weight",
]


def message(call):
    with pytest.raises(MergeError) as caught:
        call()
    return str(caught.value)


def test_blocks_go_from_zero_to_one_and_the_rest_lies_at_the_ends():
    found = depths(NAMES)

    assert found["model.embed_tokens.weight"] == 0.0
    assert [found[f"model.layers.{i}.mlp.up.weight"] for i in range(3)] == [0.0, 0.5, 1.0]
    assert found["model.norm.weight"] == found["lm_head.weight"] == 1.0


def test_each_stack_of_blocks_has_its_own_depth_and_a_single_block_lies_at_the_end():
    found = depths(["vision.layers.0.a", "vision.layers.4.a", "text.layers.2.a", "x.layers.0.a"])

    assert list(found.values()) == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("depth", "value"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0)]
)
def test_a_gradient_is_interpolated(depth, value):
    assert evaluate((0.0, 0.5, 1.0), Q, depth) == value
    assert evaluate((0.0, 1.0), Q, depth) == value


def test_a_gradient_of_one_value_is_that_value():
    assert evaluate((0.3,), Q, 0.7) == 0.3


def test_the_first_filter_that_is_part_of_the_name_counts():
    setting = (
        Conditional(filter="mlp", value=0.1),
        Conditional(filter="self_attn", value=(0.0, 1.0)),
        Conditional(filter="q_proj", value=0.2),
        Conditional(value=0.9),
    )

    assert evaluate(setting, Q, 0.25) == 0.25
    assert evaluate(setting, "model.layers.0.mlp.up.weight", 0.25) == 0.1
    assert evaluate(setting, "model.norm.weight", 1.0) == 0.9


def test_a_star_fits_any_tensor_and_no_filter_that_fits_means_nothing():
    assert evaluate((Conditional(filter="*", value=0.4),), Q, 0.0) == 0.4
    assert evaluate((Conditional(filter="mlp", value=0.4),), Q, 0.0) is None


def test_what_a_source_leaves_open_is_looked_up_in_the_recipe():
    own = {"weight": (Conditional(filter="mlp", value=0.1),)}
    common = {"weight": 0.7}

    assert look_up("weight", (own, common), "model.layers.0.mlp.up.weight", 0.0) == 0.1
    assert look_up("weight", (own, common), Q, 0.0) == 0.7
    assert look_up("weight", (own,), Q, 0.0) is None


def test_options_are_settings_too_and_have_defaults():
    common = {"normalize": (Conditional(filter="mlp", value=True),), "lambda": 1}
    others = {"rescale": True, "lambda": 1.0}

    assert options_of(find("dare_ties"), common, Q, 0.0) == {"normalize": False, **others}
    assert options_of(find("dare_ties"), common, "x.mlp.y", 0.0) == {"normalize": True, **others}


def test_a_filter_that_is_part_of_no_name_is_refused_with_the_nearest_component():
    common = {"density": (Conditional(filter="self_atn", value=0.1), Conditional(value=1.0))}

    text = message(lambda: require_filters_fit(common, [], NAMES))

    assert text == (
        "parameter `density`: the filter `self_atn` is part of no tensor's name.\n"
        "Did you mean `self_attn`?"
    )


def test_the_nearest_of_very_many_components_is_not_looked_for():
    """Among 20,000 long ones it took minutes."""
    common = {"weight": (Conditional(filter="a" * 199, value=0.1),)}
    many = [f"{'a' * 190}{number}.weight" for number in range(20_000)]
    began = time.process_time()

    assert "is part of no tensor's name" in message(lambda: require_filters_fit(common, [], many))
    assert time.process_time() - began < 3


def test_filters_of_sources_are_looked_at_too():
    own = {"weight": (Conditional(filter="xyzzy", value=0.1),)}

    text = message(lambda: require_filters_fit({}, [own], NAMES))

    assert text.endswith(
        "Components: lm_head, model.embed_tokens, self_attn.q_proj, mlp.up, model.norm."
    )


def settings_of(method, common, owns, name=Q, depth=0.5):
    """Every setting that experts may have of their own, expert by expert."""
    require_valid(find(method), common, owns)
    return {
        setting: [look_up(setting, (own, common), name, depth) for own in owns]
        for setting in find(method).settings
    }


def test_mergekits_options_are_read_as_they_are_meant():
    own = {"weight": (0.1, 0.5), "density": (Conditional(filter="mlp", value=0.5),)}
    common = {"int8_mask": True, "normalize": False, "lambda": 2, "density": 0.4}

    found = settings_of("ties", common, [own, {}])

    assert found == {"weight": [pytest.approx(0.3), None], "density": [0.4, 0.4]}
    told = options_of(find("ties"), common, Q, 0.5)
    assert told | {"normalize": False, "lambda": 2} == told
    assert "int8_mask" not in told
    in_mlp = settings_of("ties", common, [own, {}], "model.layers.0.mlp.up.weight")
    assert in_mlp["density"] == [0.5, 0.4]
    assert settings_of("breadcrumbs", {"gamma": 0.02}, [{"gamma": (0.0, 0.1)}, {}])["gamma"] == [
        0.05,
        0.02,
    ]
    assert settings_of("della", {"epsilon": 0.1}, [{"epsilon": 0.2}, {}])["epsilon"] == [0.2, 0.1]
    assert settings_of("sce", {}, [{"density": 0.5}, {}])["density"] == [0.5, None]
    scale = {"scale": (Conditional(filter="o", value=0.0),)}
    assert settings_of("passthrough", {}, [scale])["scale"] == [0.0]


def test_an_option_without_a_default_may_be_a_gradient_or_a_list_of_filters():
    common = {"t": (Conditional(filter="self_attn", value=(0.0, 1.0)), Conditional(value=0.5))}

    assert settings_of("slerp", common, [{}]) == {}
    assert options_of(find("slerp"), common, Q, 0.25) == {"t": 0.25}
    assert options_of(find("slerp"), common, "model.norm.weight", 1.0) == {"t": 0.5}


def test_an_option_without_a_default_needs_a_value_for_every_tensor():
    common = {"t": (Conditional(filter="self_attn", value=0.1),)}

    text = message(lambda: options_of(find("slerp"), common, "model.norm.weight", 1.0))

    assert text == (
        "parameter `t`: none of its filters fits model.norm.weight.\nAdd a value without a filter."
    )


@pytest.mark.parametrize(
    ("common", "own", "says"),
    [
        ({"normalise": True}, {}, "parameter `normalise`: `ties` has no such parameter"),
        ({}, {"weigth": 1.0}, "Did you mean `weight`?"),
        ({"normalize": 2.0}, {}, "expected true or false, found 2.0"),
        ({"normalize": (1.0, 0.0)}, {}, "expected true or false, found 1.0"),
        ({"lambda": True}, {}, "parameter `lambda`: True is no number"),
        ({"int8_mask": 3}, {}, "`ties` does not do `int8_mask: 3` in this version"),
        ({"density": 1.2}, {}, "parameter `density`: expected a value from 0 to 1, found 1.2"),
        (
            {},
            {"density": (0.5, -0.1)},
            "parameter `density`: expected a value from 0 to 1, found -0.1",
        ),
        ({}, {"weight": (Conditional(value="heavy"),)}, "'heavy' is no number"),
    ],
)
def test_parameters_that_the_method_cannot_take_are_refused(common, own, says):
    assert says in message(lambda: require_valid(find("ties"), common, [own]))


@pytest.mark.parametrize(
    ("method", "common", "own", "says"),
    [
        (
            "slerp",
            {},
            {},
            "parameter `t`: `slerp` needs this parameter, and the recipe does not set it.\n"
            "Give it in the recipe's",
        ),
        ("slerp", {"t": "half"}, {}, "parameter `t`: 'half' is no number.\nGive a number."),
        ("slerp", {"t": 0.5}, {"wight": 1.0}, "`slerp` has no such parameter.\nIt knows t"),
        ("karcher", {"max_iter": 2.5}, {}, "expected a whole number of at least 1, found 2.5"),
        ("karcher", {"max_iter": (1.0, 2.0)}, {}, "Give one number: it has no gradient."),
        ("cabs", {"group": 0}, {}, "parameter `group`: expected a whole number of at least 1"),
        (
            "breadcrumbs",
            {},
            {"gamma": 1.5},
            "expected a value from 0 to 1, found 1.5.\nIt is the fract",
        ),
        (
            "della",
            {"epsilon": 0.7},
            {},
            "parameter `epsilon`: expected a value from 0 to 0.5, found 0.7",
        ),
        ("model_stock", {"filter_wise": "1"}, {}, "expected true or false, found '1'"),
        ("passthrough", {"scale": "big"}, {}, "parameter `scale`: 'big' is no number"),
    ],
)
def test_what_a_method_cannot_take_is_refused_by_name(method, common, own, says):
    assert says in message(lambda: require_valid(find(method), common, [own]))


@pytest.mark.parametrize("value", [True, 1, 1.0, (Conditional(filter="mlp", value=0),)])
def test_numbers_stand_for_true_and_false(value):
    require_valid(find("ties"), {"normalize": value, "int8_mask": 1.0}, [])

    found = options_of(find("ties"), {"normalize": value}, "mlp.up_proj.weight", 0.5)
    assert found["normalize"] is (not isinstance(value, tuple))


def test_settings_of_other_methods_are_not_checked():
    require_valid(find("slerp"), {"t": 0.5, "density": 7}, [{"weight": "heavy", "t": True}])
    require_valid(find("ram"), {"epsilon": 0.7}, [])  # not della's, which is at most 0.5


FROM_BASE = "base_model: org/base\nmodels: [{model: org/x}, {model: org/y}]\n"
LISTED = "base_model: org/base\nmodels: [{model: org/base}, {model: org/x}]\n"
CONFIGURATIONS = {  # as mergekit's users write them
    "slerp": LISTED
    + """parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
""",
    "nearswap": LISTED + "parameters: {t: 1e-4}\n",
    "arcee_fusion": LISTED,
    "model_stock": FROM_BASE + "parameters: {filter_wise: true}\n",
    "nuslerp": """models:
- {model: org/x, parameters: {weight: [0, 1]}}
- {model: org/y, parameters: {weight: 0.5}}
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    "multislerp": FROM_BASE + "parameters: {weight: 0.5, eps: 1e-8, normalize_weights: false}\n",
    "karcher": "models: [{model: org/x}, {model: org/y}]\nparameters: {max_iter: 100, tol: 1e-9}\n",
    "della": """base_model: org/base
models:
- model: org/base
- {model: org/x, parameters: {weight: 0.6, density: [0.6, 0.4], epsilon: 0.1}}
- {model: org/y, parameters: {weight: 0.4, density: 0.5, epsilon: 0.2}}
parameters: {lambda: 1.1, normalize: true, int8_mask: true, rescale: true}
""",
    "della_linear": FROM_BASE + "parameters: {weight: 1, density: 0.7, epsilon: 0.05}\n",
    "breadcrumbs": FROM_BASE + "parameters: {weight: 1, density: 0.9, gamma: 0.01}\n",
    "breadcrumbs_ties": FROM_BASE
    + "parameters: {weight: 1, density: 0.9, gamma: 1e-2, lambda: 2}\n",
    "sce": FROM_BASE + "parameters: {select_topk: [0.1, 0.5], int8_mask: true}\n",
    "passthrough": """models:
- model: org/x
  parameters:
    scale:
      - {filter: o_proj, value: 0.0}
      - value: 1.0
""",
}


TRIM = {"trim": "magnitude", "trim_exponent": 1.0}  # not in mergekit
MEANT = {  # at a quarter of the depth of Q: options, and settings that some expert has
    "slerp": ({"t": 0.5}, {}),
    "nearswap": ({"t": 1e-4}, {}),
    "arcee_fusion": ({}, {}),
    "model_stock": ({"filter_wise": True}, {}),
    "nuslerp": ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"weight": [0.25, 0.5]}),
    "multislerp": ({"eps": 1e-8, "normalize_weights": False}, {"weight": [0.5, 0.5]}),
    "karcher": ({"max_iter": 100, "tol": 1e-9}, {}),
    "della": (
        {"lambda": 1.1, "normalize": True, "rescale": True, **TRIM},
        {"weight": [0.6, 0.4], "density": [0.55, 0.5], "epsilon": [0.1, 0.2]},
    ),
    "della_linear": (
        {"lambda": 1.0, "normalize": False, "rescale": True, **TRIM},
        {"weight": [1, 1], "density": [0.7, 0.7], "epsilon": [0.05, 0.05]},
    ),
    "breadcrumbs": (
        {"lambda": 1.0, "normalize": False, "rescale": False},
        {"weight": [1, 1], "density": [0.9, 0.9], "gamma": [0.01, 0.01]},
    ),
    "breadcrumbs_ties": (
        {"lambda": 2, "normalize": False, "rescale": False},
        {"weight": [1, 1], "density": [0.9, 0.9], "gamma": [0.01, 0.01]},
    ),
    "sce": ({"select_topk": 0.2}, {}),
    "passthrough": ({}, {"scale": [1.0]}),
}


@pytest.mark.parametrize("method", CONFIGURATIONS)
def test_mergekits_configurations_are_understood(method):
    recipe = parse_recipe(f"merge_method: {method}\n{CONFIGURATIONS[method]}", "config.yaml")
    options, settings = MEANT[method]

    owns = [one.parameters for one in recipe.experts]
    found = settings_of(method, recipe.parameters, owns, depth=0.25)

    said = {name: values for name, values in found.items() if set(values) != {None}}
    assert said == {name: pytest.approx(values) for name, values in settings.items()}
    assert options_of(find(method), recipe.parameters, Q, 0.25) == pytest.approx(options)
    least, most = find(method).n_experts
    assert least <= len(recipe.experts) <= (most or 2)
