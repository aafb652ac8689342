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


def test_without_the_policy_it_is_an_error_that_names_it(zoo):
    base, expert = zoo.source("base", model(0)), zoo.source("x", model(1, "b.weight"))

    with pytest.raises(MergeError, match="or set `missing: base` to keep the base's"):
        zoo.merge(zoo.settings("ties", base, [expert]))
