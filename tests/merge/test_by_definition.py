"""Methods without a kernel: the engine gives the bytes of their definitions."""

import tempfile
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lewis_hub.errors import NonFiniteError
from lewis_hub.merge.chunks import AVERAGED, FUSED
from lewis_hub.merge.runners import Runner
from lewis_hub.methods.registry import find, methods
from lewis_hub.recipe.schema import Conditional

NAMES = [method.name for method in methods() if method.name not in {AVERAGED, *FUSED}]
SHAPES = {"model.layers.0.a": (40, 30), "model.layers.1.a": (7,), "b": (), "c": (0, 2)}


def tensors(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    floats = {name: torch.randn(s, generator=generator).to(dtype) for name, s in SHAPES.items()}
    return floats | {"steps": torch.arange(3)}


def settings(zoo, name, *, with_base=True):
    method = find(name)
    n = 1 if method.n_experts == (1, 1) else 2
    base = zoo.source("base", tensors(0, torch.bfloat16))
    own = {"gamma": 0.1} if name.startswith("breadcrumbs") else {}
    experts = [
        zoo.source(f"expert {i}", tensors(i + 1, torch.float32), own if i else {}) for i in range(n)
    ]
    parameters = {"t": (Conditional(filter="layers", value=(0.1, 0.9)), Conditional(value=0.5))}
    asked = parameters if "t" in method.options else {}
    asked |= {"density": (0.2, 0.7)} if method.takes_density else {}
    given = base if with_base else None
    return zoo.settings(name, given, experts, parameters=asked, dtype="bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_gives_the_bytes_of_the_definition_on_any_runner(zoo, name):
    asked = settings(zoo, name)

    found = zoo.merge(asked, "inline", runner=Runner())
    threaded = zoo.merge(asked, "threads", shard=1000, runner=Runner(3, large_elements=100))

    assert found.tensors.keys() == threaded.tensors.keys() == {*SHAPES, "steps"}
    for tensor, expected in zoo.by_definition(found.plan).items():
        assert torch.equal(found.tensors[tensor], expected)
        assert torch.equal(threaded.tensors[tensor], expected)
    assert torch.equal(found.tensors["steps"], torch.arange(3))


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@st.composite
def cases(draw):
    method = find(draw(st.sampled_from([name for name in NAMES if name != "regmean"])))
    least, most = method.n_experts
    n = draw(st.integers(least, most or 8))
    own = {"weight": st.sampled_from([1.0, 0.3, 2.5]), "density": st.floats(0, 1)}
    own |= {"gamma": st.sampled_from([0.0, 0.1]), "scale": st.sampled_from([1.0, -0.5])}
    return {
        "method": method.name,
        "own": [{name: draw(own[name]) for name in method.settings} for _ in range(n)],
        "common": {"t": draw(st.floats(0, 1))} if "t" in method.options else {},
        "dtypes": [draw(st.sampled_from(list(DTYPES))) for _ in range(n + 1)],
        "output": draw(st.sampled_from(list(DTYPES))),
        "shape": draw(st.sampled_from([(), (1,), (0, 2), (7,), (3, 5), (2, 3, 4), (130, 70)])),
        "coarse": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32)),
    }


@hypothesis_settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_of_any_dtypes_shapes_and_numbers_of_experts(zoo_class, case):
    generator = torch.Generator().manual_seed(case["seed"])
    steps = torch.tensor([0.0, -0.0, 1e-40, 6e-8, 0.01, 0.01, -0.01, 0.5])  # ties, denormals, zeros
    base = torch.randn(case["shape"], generator=generator)
    moved = [torch.zeros_like(base)]
    for _ in case["own"]:
        chosen = torch.randint(len(steps), case["shape"], generator=generator)
        noise = torch.randn(case["shape"], generator=generator) / 50
        moved.append(steps[chosen] if case["coarse"] else noise)
    with tempfile.TemporaryDirectory() as folder:
        zoo = zoo_class(Path(folder))
        first, *experts = (
            zoo.source(str(i), {"a": (base + move).to(DTYPES[dtype])}, own)
            for i, (move, dtype, own) in enumerate(
                zip(moved, case["dtypes"], [{}, *case["own"]], strict=True)
            )
        )
        asked = zoo.settings(
            case["method"],
            first if find(case["method"]).takes_base else None,
            experts,
            parameters=case["common"],
            dtype=case["output"],
        )

        merged = zoo.merge(asked)

        found, wanted = merged.tensors["a"], zoo.by_definition(merged.plan)["a"]
        assert (found.shape, found.dtype) == (case["shape"], DTYPES[case["output"]])
        as_bytes = [one.reshape(-1).view(torch.uint8).tolist() for one in (found, wanted)]
        assert as_bytes[0] == as_bytes[1]


def test_ties_that_rescales_is_made_by_its_definition(zoo):
    asked = settings(zoo, "ties")
    asked = replace(asked, parameters={**asked.parameters, "rescale": True})

    found = zoo.merge(asked, "inline", runner=Runner())
    threaded = zoo.merge(asked, "threads", shard=1000, runner=Runner(3, large_elements=100))

    for tensor, expected in zoo.by_definition(found.plan).items():
        assert torch.equal(found.tensors[tensor], expected)
        assert torch.equal(threaded.tensors[tensor], expected)
    plain = zoo.merge(settings(zoo, "ties"), "plain").tensors["model.layers.0.a"]
    assert not torch.equal(found.tensors["model.layers.0.a"], plain)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
def test_without_a_base_the_models_themselves_are_turned(zoo, name):
    asked = settings(zoo, name, with_base=False)

    found = zoo.merge(asked).tensors

    models = torch.stack([tensors(i, torch.float32)["model.layers.0.a"] for i in (1, 2)])
    zero = torch.zeros(SHAPES["model.layers.0.a"])
    expected = find(name).function(zero, models, weights=torch.ones(2)).bfloat16()
    assert torch.equal(found["model.layers.0.a"], expected)


@pytest.mark.parametrize(
    "name", [method.name for method in methods() if method.takes_density and method.name in NAMES]
)
def test_a_guides_schedule_is_heard(zoo, name):
    asked = settings(zoo, name)
    named = ("model.layers.0.a", "model.layers.1.a", "b", "c")
    nothing = {label: dict.fromkeys(named, 0.0) for label in ("expert 0", "expert 1")}

    found = zoo.merge(asked, schedule=nothing).tensors

    for tensor, value in tensors(0, torch.bfloat16).items():
        assert torch.equal(found[tensor], value)


def test_a_result_that_does_not_fit_is_refused(zoo):
    model = zoo.source("model", {"a": torch.full((3,), 6e4)})
    asked = zoo.settings("passthrough", None, [model], parameters={"scale": 2.0}, dtype="float16")

    with pytest.raises(NonFiniteError, match="It does not fit into F16"):
        zoo.merge(asked)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (n, place)
        for n in NAMES
        for place in ("base", "expert 0")
        if find(n).takes_base or "x" in place
    ],
)
def test_what_is_not_finite_is_told_by_tensor_and_source(zoo, name, place):
    asked = settings(zoo, name)
    broken = zoo.tensors[place] | {
        "model.layers.1.a": torch.tensor([0, 1, float("inf")] + [2.0] * 4)
    }
    again = zoo.source(place, broken)
    first = replace(asked.experts[0], checkpoint=again.checkpoint)
    base = again if place == "base" else asked.base
    experts = asked.experts if place == "base" else (first, *asked.experts[1:])
    without = not find(name).takes_base

    with pytest.raises(NonFiniteError) as caught:
        zoo.merge(replace(asked, base=None if without else base, experts=experts))

    assert str(caught.value).startswith(f"model.layers.1.a holds NaN or infinity in {place}.\n")


@pytest.mark.parametrize("name", NAMES)
def test_huge_weights_are_merged_or_refused_by_one_message(zoo, name):
    """Finite in float32, but their products are not."""
    asked = settings(zoo, name)
    huge = {
        key: 1e25 * t if t.is_floating_point() else t
        for key, t in tensors(5, torch.float32).items()
    }
    first, *others = asked.experts
    asked = replace(asked, experts=(zoo.source("huge", huge, first.parameters), *others))

    refused = pytest.raises(NonFiniteError, match="holds NaN or infinity in the merged model")
    with refused if name == "wudi" else nullcontext():
        found = zoo.merge(asked, "inline", runner=Runner()).tensors
        assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("name", [name for name in NAMES if find(name).takes_task_vectors])
@pytest.mark.parametrize("size", [3e38, 1.5e38])
def test_differences_of_huge_weights_are_refused_by_one_message(zoo, name, size):
    """They are infinite, or their sum is; LAPACK has an error of its own for such a matrix."""
    ends = (torch.full((40, 30), size), torch.full((40, 30), -size))
    base, expert = (
        zoo.source(f"huge {n}", tensors(0, torch.float32) | {"model.layers.0.a": one})
        for n, one in enumerate(ends)
    )
    asked = settings(zoo, name)
    experts = tuple(replace(one, checkpoint=expert.checkpoint) for one in asked.experts)

    refused = pytest.raises(NonFiniteError, match="model.layers.0.a holds NaN or infinity in the")
    with refused if size > 2e38 else suppress(NonFiniteError):
        zoo.merge(replace(asked, base=base, experts=experts))
