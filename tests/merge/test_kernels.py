"""The compiled kernels give the bytes of the definitions."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llvmlite import binding

from lewis_hub.kernels import machine_code
from lewis_hub.kernels.calls import BLOCK, F16, F32, Piece, average
from lewis_hub.kernels.random_bits import halves, stream
from lewis_hub.merge import tensor as trimming
from lewis_hub.merge.runners import Runner

METHODS = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della_linear",
    "della",
    "regmean",  # of what has no second moments
]
RANDOM = ("dare", "della")
WITHOUT_DENSITY = ("linear", "task_arithmetic")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RUNNERS = [Runner(), *(Runner(n, large_elements=1000) for n in (1, 2, 4))]
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


@contextmanager
def by_sample():
    """As of tensors so large that thresholds are looked for by a sample."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trimming, "N_PLACES", 16)
        patch.setattr(trimming, "SAMPLED", 4000)
        yield


@contextmanager
def on_a_plain_processor():
    """As where a processor has nothing but what all of its kind have: no AVX, no fused products."""
    target = binding.Target.from_default_triple()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_code, "_machine", lambda: target.create_target_machine(opt=3))
        patch.setattr(machine_code, "_places", lambda _: [])
        patch.setattr(machine_code, "_functions", {})
        yield


@st.composite
def cases(draw):
    n_experts = draw(st.integers(1, 8))
    method = draw(st.sampled_from(METHODS))
    density = st.just(1.0) | st.just(0.0) | st.floats(0.01, 0.99)
    parameters = []
    for _ in range(n_experts):
        least = 0.1 if method == "regmean" else -2
        weights = [weight for weight in (1.0, 0.3, -0.7, 0.0, 2.5) if weight >= least]
        own = {"weight": draw(st.sampled_from(weights) | st.floats(least, 2))}
        if method not in {"linear", "task_arithmetic"}:
            own["density"] = draw(density)
        if method.startswith("della"):
            own["epsilon"] = draw(st.sampled_from([0.0, 0.15, 0.5]))
        parameters.append(own)
    common = {} if method == "regmean" else {"normalize": draw(st.booleans())}
    if method != "linear":
        common["lambda"] = draw(st.sampled_from([1.0, 0.37, -1.5]))
    elif abs(sum(own["weight"] for own in parameters)) < 0.1:
        common["normalize"] = False
    if method.startswith(RANDOM):
        common["rescale"] = draw(st.booleans())
    return {
        "method": method,
        "parameters": parameters,
        "common": common,
        "dtypes": [draw(st.sampled_from(DTYPES)) for _ in range(n_experts + 1)],
        "output": draw(st.sampled_from(DTYPES)),
        "shape": draw(st.sampled_from([(), (1,), (0, 2), (7,), (3, 5), (2, 2049), (4096,)])),
        "coarse": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32)),
    }


def tensors_of(case):
    """Values with many ties, zeros, signed zeros and denormals among them."""
    generator = torch.Generator().manual_seed(case["seed"])
    base = torch.randn(case["shape"], generator=generator)
    step = torch.tensor([0.0, -0.0, 1e-40, 6e-8, 0.01, 0.01, -0.01, 0.5])
    found = []
    for i, dtype in enumerate(case["dtypes"]):
        noise = torch.randn(case["shape"], generator=generator) * 0.01
        if case["coarse"]:
            noise = step[torch.randint(len(step), case["shape"], generator=generator)]
            base = base.bfloat16().float()
        found.append((base + (noise if i else 0)).to(dtype))
    return found


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_a_kernel_gives_the_bytes_of_its_definition(zoo_class, case):
    with tempfile.TemporaryDirectory() as folder:
        zoo = zoo_class(Path(folder))
        base, *experts = (
            zoo.source(str(i), {"a": tensor}, {} if i == 0 else case["parameters"][i - 1])
            for i, tensor in enumerate(tensors_of(case))
        )
        asked = zoo.settings(
            case["method"],
            base,
            experts,
            parameters=case["common"],
            dtype=NAMES[case["output"]],
            seed=case["seed"],
        )

        merged = zoo.merge(asked)
        with by_sample():
            sampled = zoo.merge(asked, "sampled")

        assert sampled.bytes == merged.bytes
        assert bits(merged.tensors["a"]) == bits(zoo.by_definition(merged.plan)["a"])
        assert merged.tensors["a"].shape == case["shape"]


@pytest.mark.slow  # compiles all kernels
def test_a_plain_processor_gives_the_same_bytes(zoo):
    case = {"shape": (60, 431), "dtypes": DTYPES, "seed": 3, "coarse": True}
    merges = {}
    for method in METHODS:
        own = {"weight": 0.6} | ({} if method in WITHOUT_DENSITY else {"density": 0.37})
        base, *experts = (
            zoo.source(f"{method} {i}", {"a": tensor}, own if i else {})
            for i, tensor in enumerate(tensors_of(case))
        )
        asked = zoo.settings(method, base, experts)
        merges[method] = asked, zoo.merge(asked, f"{method} out").bytes

    with on_a_plain_processor():
        for method, (asked, expected) in merges.items():
            assert zoo.merge(asked, f"{method} plainly").bytes == expected
            with by_sample():
                assert zoo.merge(asked, f"{method} sampled").bytes == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_a_large_tensor_is_the_same_in_one_span_and_in_several(zoo, method, runner):
    case = {"shape": (600, 431), "dtypes": [torch.bfloat16] * 3, "seed": 3, "coarse": True}
    own = {"weight": 0.6} | ({} if method in {"linear", "task_arithmetic"} else {"density": 0.37})
    base, *experts = (
        zoo.source(str(i), {"a": tensor, "b": tensor[0].clone()}, own if i else {})
        for i, tensor in enumerate(tensors_of(case))
    )

    asked = zoo.settings(method, base, experts)
    merged = zoo.merge(asked, runner=runner)
    defined = zoo.by_definition(merged.plan)
    assert bits(merged.tensors["a"]) == bits(defined["a"])
    assert bits(merged.tensors["b"]) == bits(defined["b"])


def all_halves():
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_half_is_read_exactly_and_written_back(zoo, dtype):
    values = all_halves().view(dtype)
    values = values[values.isfinite()]
    only = zoo.source("only", {"a": values})

    wide = zoo.merge(zoo.settings("linear", None, [only], dtype="float32"), "wide").tensors["a"]
    back = zoo.merge(zoo.settings("linear", None, [only]), "back").tensors["a"]

    # a sum begins with +0, so that -0 becomes +0
    assert torch.equal(wide, values.float())
    assert torch.equal(back, values)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.half)])
def test_rounding_is_to_nearest_even_everywhere(zoo, name, dtype):
    near = all_halves().view(dtype)
    near = near[near.isfinite()].float()
    steps = torch.tensor([-1, 0, 1], dtype=torch.int32)
    between = ((near[1:] + near[:-1]) / 2).view(torch.int32)[:, None] + steps
    values = between.flatten().view(torch.float32)
    values = values[values.to(dtype).isfinite()]
    only = zoo.source("only", {"a": values})

    merged = zoo.merge(zoo.settings("linear", None, [only], dtype=name)).tensors["a"]

    assert torch.equal(merged, values.to(dtype))


def test_the_kernel_draws_the_documented_bits(zoo):
    n = 3 * BLOCK + 5
    base = zoo.source("base", {"a": torch.zeros(n)})
    expert = zoo.source("expert", {"a": torch.ones(n)}, {"density": 0.3})
    asked = zoo.settings("dare_linear", base, [expert], seed=7, parameters={"rescale": False})

    kept = zoo.merge(asked).tensors["a"].bool().numpy()

    assert np.array_equal(kept, halves(stream(7, "a", 0), n) < round(0.3 * 2**32))


@pytest.mark.parametrize("place", [0, BLOCK, 2 * BLOCK + 36])
@pytest.mark.parametrize("source", [0, 1, 2])
def test_an_entry_that_is_not_finite_is_told_by_its_source_wherever_it_lies(place, source):
    n = 2 * BLOCK + 37
    values = np.ones((3, n), np.float32)
    out = np.zeros(4 * n, np.uint8)
    piece = Piece(tuple(values.view(np.uint8)), np.full(3, F32), n, 0, BLOCK, out, F16)
    weights, one = np.full(3, 0.25, np.float32), np.float32(1)

    assert average(piece, weights, one) == -1
    values[source, place] = 65520  # in float16 it is infinite
    assert average(piece, np.full(3, 1, np.float32), one) == 3
    values[source, place] = np.nan
    assert average(piece, weights, one) == source


def test_products_and_sums_are_rounded_one_by_one():
    value = np.float32(1 + 2**-12)
    sources = np.full((2, 40), value, np.float32)
    sources[0] = 1
    out = np.zeros(4 * 40, np.uint8)
    piece = Piece(tuple(sources.view(np.uint8)), np.full(2, F32), 40, 0, BLOCK, out, F32)

    assert average(piece, np.array([-1, value], np.float32), np.float32(1)) == -1

    # a fused operation would keep the last bit of the square: 2**-11 + 2**-24
    assert out.view(np.float32).tolist() == [2**-11] * 40
