import pickle
from dataclasses import replace

import pytest
import torch

from lewis_hub.errors import MergeError
from lewis_hub.merge.plan import make_plan
from lewis_hub.recipe.schema import Conditional

Q = "model.layers.0.q.weight"


def tensors(value=0.0):
    names = ["model.embed_tokens.weight", Q, "model.layers.1.q.weight"]
    floats = {name: torch.full((4, 2), value, dtype=torch.bfloat16) for name in names}
    return floats | {"steps": torch.arange(3)}


@pytest.fixture
def sources(zoo):
    return [zoo.source(label, tensors(i)) for i, label in enumerate(("base", "x", "y"))]


def plans(plan):
    return {tensor.output.name: tensor for shard in plan.shards for tensor in shard.tensors}


def message(call):
    with pytest.raises(MergeError) as caught:
        call()
    return str(caught.value)


def test_a_plan_says_per_tensor_dtype_weights_densities_and_options(zoo, sources):
    base, x, y = sources
    x = replace(x, parameters={"density": (0.2, 0.6), "weight": 0.5})
    settings = zoo.settings("ties", base, [x, y], parameters={"density": 0.9}, dtype="float32")

    found = plans(make_plan(settings, 10**9))

    assert found[Q].densities == (0.2, 0.9)
    assert found["model.layers.1.q.weight"].densities == (0.6, 0.9)
    assert found[Q].weights == (0.5, 1.0)
    assert found[Q].output.dtype == "F32"
    trim = {"trim": "magnitude", "trim_exponent": 1.0}
    assert found[Q].options == {"normalize": True, "rescale": False, "lambda": 1.0, **trim}
    assert found[Q].streams == ()
    assert (found["steps"].is_copied, found["steps"].output.dtype) == (True, "I64")


def test_without_a_dtype_each_tensor_keeps_that_of_the_base(zoo, sources):
    assert plans(make_plan(zoo.settings("ties", sources[0], sources[1:]), 1))[Q].output.dtype == (
        "BF16"
    )


def test_a_guides_weights_multiply_those_of_the_settings(zoo, sources):
    base, x, y = sources
    x = replace(x, parameters={"weight": (0.5, 1.0)}, weights={Q: 0.4})
    settings = zoo.settings("task_arithmetic", base, [x, y], parameters={"weight": 2.0})

    found = plans(make_plan(settings, 10**9))

    assert found[Q].weights == (0.2, 2.0)
    assert found["model.layers.1.q.weight"].weights == (1.0, 2.0)

    unknown = replace(settings, experts=(x, replace(y, weights={"model.layers.9.q.weight": 1.0})))
    assert message(lambda: make_plan(unknown, 10**9)) == (
        "guide: it sets a weight for model.layers.9.q.weight, which y does not have.\n"
        "Measure the importance of these sources anew."
    )


def test_a_schedule_goes_before_the_settings(zoo, sources):
    base, x, y = sources
    settings = zoo.settings("ties", base, [x, y], parameters={"density": 0.9})

    found = plans(make_plan(settings, 10**9, {"y": {Q: 0.25}}))

    assert found[Q].densities == (0.9, 0.25)
    assert found["model.layers.1.q.weight"].densities == (0.9, 0.9)


def test_shards_and_plans_pickle(zoo, sources):
    plan = make_plan(zoo.settings("dare_ties", sources[0], sources[1:]), 20)

    assert pickle.loads(pickle.dumps(plan)) == plan
    assert len(plan.shards) == 4


def test_a_digest_changes_with_all_that_fixes_the_bytes_and_with_nothing_else(zoo, sources):
    base, x, y = sources
    settings = zoo.settings("dare_ties", base, [x, y], parameters={"density": 0.5})
    changes = [
        settings,
        replace(settings, method="dare_linear"),
        replace(settings, seed=1),
        replace(settings, dtype="float32"),
        replace(settings, parameters={"density": 0.4}),
        replace(settings, parameters={"density": 0.5, "lambda": 0.4}),
        replace(settings, experts=(y, x)),
        replace(settings, experts=(replace(x, digest="other"), y)),
        replace(settings, base=replace(base, digest="other")),
    ]

    digests = [make_plan(one, 10**9).digest for one in changes]

    assert len(set(digests)) == len(changes)
    assert make_plan(replace(settings, parameters={"density": (0.5,)}), 10**9).digest == digests[0]


@pytest.mark.parametrize(
    ("method", "change", "schedule", "says"),
    [
        ("tie", {}, None, "method `tie`: it is not known"),
        ("ties", {"base": None}, None, "it needs a base to start from.\nName a `base_model`."),
        ("ties", {"experts": ()}, None, "there is nothing to merge"),
        ("ties", {"parameters": {"wieght": 1}}, None, "Did you mean `weight`?"),
        ("ties", {"parameters": {"weight": (Conditional(filter="mlq", value=1),)}}, None, "`mlq`"),
        ("task_arithmetic", {}, {"x": {}}, "so a guide's densities would do nothing"),
        (
            "ties",
            {},
            {"z": {}},
            "guide: it sets densities for z, which is not merged.\nExperts: x, y.",
        ),
        ("ties", {}, {"x": {"model.layers.9.q.weight": 1.0}}, "9.q.weight, which x does not have"),
        ("ties", {}, {"x": {Q: 1.5}}, "it gives model.layers.0.q.weight the density 1.5"),
        ("linear", {"parameters": {"weight": 0.0}}, None, "the weights of model.embed_tokens.we"),
        ("multislerp", {"parameters": {"weight": 0.0}}, None, "or set `normalize_weights: false`."),
        ("slerp", {"parameters": {"t": 1}, "base": None}, None, "it needs a base to start from"),
        ("model_stock", {}, {"x": {}}, "so a guide's densities would do nothing"),
    ],
)
def test_what_cannot_be_merged_is_refused(zoo, sources, method, change, schedule, says):
    settings = replace(zoo.settings(method, sources[0], sources[1:]), **change)

    assert says in message(lambda: make_plan(settings, 10**9, schedule))


@pytest.mark.parametrize(
    ("method", "n", "says"),
    [
        ("slerp", 2, "it takes exactly 1 model beside the base, found 2.\nRemove 1 of them"),
        ("nearswap", 2, "it takes exactly 1 model beside the base, found 2."),
        ("arcee_fusion", 2, "it takes exactly 1 model beside the base, found 2."),
        ("nuslerp", 1, "exactly 2 models beside the base, found 1.\nList 1 more."),
        ("model_stock", 1, "it takes at least 2 models beside the base, found 1."),
        ("sce", 1, "it takes at least 2 models beside the base, found 1."),
        ("passthrough", 2, "it takes exactly 1 model, found 2.\nRemove 1 of them, or merge"),
    ],
)
def test_another_number_of_models_than_a_method_takes_is_refused(zoo, sources, method, n, says):
    settings = zoo.settings(method, sources[0], sources[1 : 1 + n], parameters={"t": 0.5})

    assert says in message(lambda: make_plan(settings, 10**9))


def test_an_expert_may_have_settings_of_its_own_that_a_method_asks_for(zoo, sources):
    base, x, y = sources
    x = replace(x, parameters={"epsilon": (0.1, 0.3)})
    settings = zoo.settings("della", base, [x, y], parameters={"density": 0.5})

    found = plans(make_plan(settings, 10**9, {"y": {Q: 0.25}}))

    assert found[Q].own == {"spreads": (0.1, 0.15)}
    assert found["model.layers.1.q.weight"].own == {"spreads": (0.3, 0.15)}
    assert found[Q].densities == (0.5, 0.25)
    assert len(set(found[Q].streams)) == 2


def test_a_method_whose_base_is_optional_does_without_one(zoo, sources):
    base, *experts = sources

    alone = make_plan(zoo.settings("nuslerp", None, experts), 10**9)
    beside = make_plan(zoo.settings("nuslerp", base, experts), 10**9)

    assert alone.shards[0].labels == ("x", "y")
    assert beside.shards[0].labels == ("base", "x", "y")


def test_sources_that_do_not_fit_together_are_refused(zoo, sources):
    odd = zoo.source("odd", {"other": torch.zeros(1)})

    text = message(lambda: make_plan(zoo.settings("ties", sources[0], [odd]), 10**9))

    assert text.startswith("method `ties`: the sources do not fit together: odd lacks 4 tensors (")


def test_a_method_without_a_base_takes_its_experts_alone(zoo, sources):
    plan = make_plan(zoo.settings("linear", sources[0], sources[1:]), 10**9)

    assert plan.shards[0].labels == ("x", "y")
