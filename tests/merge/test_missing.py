import pytest
import torch

from lewis_hub.errors import MergeError
from lewis_hub.merge.runners import Runner, threads

METHODS = ("ties", "task_arithmetic", "dare_ties", "linear")


def model(seed, *without):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (40, 33), "b.weight": (300,), "c": (), "lm_head.weight": (50, 33)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: t.bfloat16() for name, t in drawn.items() if name not in without}


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_an_expert_lacks_is_merged_as_if_it_had_the_base_s(zoo, method):
    lacks = ("b.weight", "c", "lm_head.weight")
    given = {} if method in ("linear", "task_arithmetic") else {"density": 0.5}
    base, full = zoo.source("base", model(0)), zoo.source("x", model(1), given)
    partial = zoo.source("y", {**model(2, *lacks), "extra": torch.ones(3)}, given)
    filled = zoo.source("z", model(2) | {name: model(0)[name] for name in lacks}, given)

    def merged(first, *others, **more):
        return zoo.merge(zoo.settings(method, base, [first, *others]), "out", **more)

    experts = [base, full] if method == "linear" else [full]
    settings = zoo.settings(method, base, [*experts, partial], missing="base")
    found = [
        zoo.merge(settings, str(i), runner=runner).tensors
        for i, runner in enumerate((Runner(), threads(2), Runner(3, large_elements=100)))
    ]
    expected = zoo.merge(zoo.settings(method, base, [*experts, filled]), "filled").tensors

    assert "extra" not in expected
    for one in found:
        assert set(one) == set(expected)
        assert all(torch.equal(one[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("listed", [False, True])
def test_a_base_that_the_method_does_not_take_stands_in_for_every_model(zoo, listed):
    lacks = ("b.weight", "c", "lm_head.weight")
    base, filling = zoo.source("base", model(0)), {name: model(0)[name] for name in lacks}
    others = [base] if listed else []
    x = zoo.source("x", {**model(1, *lacks), "extra": torch.ones(3)}, {"weight": 0.3})
    y = zoo.source("y", model(2, "a.weight"))
    full = [
        zoo.source("full x", model(1) | filling, {"weight": 0.3}),
        zoo.source("full y", model(2) | {"a.weight": model(0)["a.weight"]}),
    ]

    found = zoo.merge(zoo.settings("linear", base, [x, y, *others], missing="base"), "out").tensors
    expected = zoo.merge(zoo.settings("linear", base, [*full, *others]), "full").tensors

    assert set(found) == set(model(0))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_merge_has_the_dtypes_of_a_base_that_the_method_does_not_take(zoo):
    counts = {"steps": torch.arange(3)}
    base = zoo.source("base", model(0) | counts)
    wide = {name: tensor.float() for name, tensor in model(1).items()}
    experts = [zoo.source(label, wide | {"steps": torch.arange(3).int()}) for label in "xy"]

    found = zoo.merge(zoo.settings("linear", base, experts)).tensors

    for name, tensor in model(1).items():
        assert (found[name].dtype, found[name].tolist()) == (torch.bfloat16, tensor.tolist())
    assert found["steps"].tolist() == [0, 1, 2]


def test_without_the_policy_it_is_an_error_that_names_it(zoo):
    base, expert = zoo.source("base", model(0)), zoo.source("x", model(1, "b.weight"))

    with pytest.raises(MergeError, match="or set `missing: base` to keep the base's"):
        zoo.merge(zoo.settings("ties", base, [expert]))
