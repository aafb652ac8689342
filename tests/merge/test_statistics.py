"""Merging by second moments: the definition's bytes on every way, and plans that know them."""

import pickle
import subprocess
import sys

import pytest
import torch

from lewis_hub.merge.plan import lacking_statistics, make_plan, with_statistics
from lewis_hub.merge.runners import Runner

LAYER = "model.layers.0."
SHAPES = {
    f"{LAYER}q_proj.weight": (6, 8),
    f"{LAYER}down_proj.weight": (8, 12),
    f"{LAYER}c_attn.weight": (8, 6),  # (in, out)
    f"{LAYER}norm.weight": (8,),
    "embed.weight": (11, 8),
}
PARTS = {f"{LAYER}q_proj.weight": (1, 8), f"{LAYER}down_proj.weight": (2, 6)}
CONV = {f"{LAYER}c_attn.weight"}


def tensors(seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in SHAPES.items()}


def grams(seed):
    generator = torch.Generator().manual_seed(seed)
    parts = {**PARTS, **dict.fromkeys(CONV, (1, 8))}
    drawn = {n: torch.randn(k, w + 5, w, generator=generator) for n, (k, w) in parts.items()}
    return {name: x.mT @ x / x.shape[1] for name, x in drawn.items()}


def asked(zoo, method="regmean", **parameters):
    base = zoo.source("base", tensors(0))
    experts = [zoo.source(f"expert {i}", tensors(i), {"weight": i}) for i in (1, 2, 3)]
    return zoo.settings(method, base, experts, parameters=parameters)


def known(zoo):
    return [zoo.statistics(f"moments {i}", grams(i), CONV) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("regmean", {}),
        ("regmean", {"density": 0.4, "trim": "activation", "lambda": 0.8}),
        ("ties", {"density": 0.4, "trim": "activation", "trim_exponent": 0.5}),
        ("della", {"density": 0.4, "epsilon": 0.3, "trim": "activation"}),
        ("della_linear", {"density": 0.4, "epsilon": 0.3, "trim": "activation"}),
    ],
)
def test_the_engine_gives_the_bytes_of_the_definition_on_any_runner(zoo, method, parameters):
    settings, statistics = asked(zoo, method, **parameters), known(zoo)

    found = zoo.merge(settings, "inline", runner=Runner(), statistics=statistics)
    runner = Runner(3, large_elements=50)
    threaded = zoo.merge(settings, "threads", shard=300, runner=runner, statistics=statistics)

    assert len(threaded.plan.shards) > 2
    for tensor, expected in zoo.by_definition(found.plan).items():
        assert torch.equal(found.tensors[tensor], expected)
        assert torch.equal(threaded.tensors[tensor], expected)
    plain = zoo.merge(settings, "plain").tensors
    differing = {name for name in SHAPES if not torch.equal(plain[name], found.tensors[name])}
    ranks_rows = method.startswith("della")  # a row of what lies as (in, out) has one input
    assert differing == ({*PARTS} if ranks_rows else {*PARTS, *CONV})


def test_what_has_no_second_moments_is_averaged(zoo):
    found = zoo.merge(asked(zoo), statistics=known(zoo)).tensors["embed.weight"]

    base, *experts = (tensors(i)["embed.weight"].float() for i in range(4))
    mean = sum((i + 1) * (expert - base) for i, expert in enumerate(experts)) / 6
    torch.testing.assert_close(found.float(), base + mean, rtol=1e-2, atol=1e-2)


PEAK = """
import pickle, sys
from pathlib import Path

from lewis_hub.merge.engine import run
from lewis_hub.merge.runners import Backend, Runner

plan, folders, output = pickle.load(sys.stdin.buffer)
run(plan, folders, output, Backend(Runner()), lambda _: None)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["regmean", "ties", "della"])
def test_a_large_tensor_without_second_moments_is_merged_in_pieces(zoo, tmp_path, method):
    n = 10_000_000
    base, *experts = (
        zoo.source(name, {"embed.weight": torch.full((n // 100, 100), value).bfloat16()}, own)
        for name, value, own in [("base", 1, {}), ("one", 2, {"weight": 1}), ("two", 3, {})]
    )
    parameters = {"density": 0.5, "trim": "activation"}
    plan = make_plan(zoo.settings(method, base, experts, parameters=parameters), 10**9)
    told = pickle.dumps((plan, zoo.folders, tmp_path))

    done = subprocess.run([sys.executable, "-c", PEAK], input=told, capture_output=True, check=True)

    assert int(done.stdout) * 1024 < 300_000_000  # by the definition: 12 bytes an entry and more


def test_a_rerun_keeps_what_fits_and_makes_anew_what_was_measured_otherwise(zoo):
    settings, statistics = asked(zoo), known(zoo)
    zoo.merge(settings, statistics=statistics)

    again = zoo.merge(settings, statistics=statistics)
    other = zoo.merge(
        settings, statistics=[*statistics[:2], zoo.statistics("else", grams(9), CONV)]
    )

    assert all(result.is_kept for result in again.results.values())
    assert not any(result.is_kept for result in other.results.values())
    assert other.plan.digest != again.plan.digest


def test_a_plan_says_what_has_no_second_moments(zoo):
    settings, statistics = asked(zoo), known(zoo)
    lacking = {name: g for name, g in statistics[1].grams.items() if name not in CONV}
    statistics[1] = zoo.statistics("lacking", {n: grams(2)[n] for n in lacking})
    plan = with_statistics(make_plan(settings, 10**9), statistics)

    assert lacking_statistics(plan, [*PARTS, *CONV]) == sorted(CONV)
    assert with_statistics(plan, ()) == plan


def test_a_matrix_that_is_stored_otherwise_than_it_was_run_has_none(zoo):
    settings = asked(zoo)
    statistics = [zoo.statistics(f"moments {i}", grams(i)) for i in (1, 2, 3)]  # not transposed

    plan = with_statistics(make_plan(settings, 10**9), statistics)
    assert lacking_statistics(plan, [*PARTS, *CONV]) == sorted(CONV)


@pytest.mark.parametrize("method", ["regmean", "wudi"])
@pytest.mark.parametrize(("weights", "says"), [((1, -1, 1), "1, -1, 1"), ((0, 0, 0), "0, 0, 0")])
def test_weights_that_share_nothing_out_are_refused(zoo, method, weights, says):
    from lewis_hub.errors import MergeError

    base = zoo.source("base", tensors(0))
    experts = [zoo.source(f"e{i}", tensors(i), {"weight": w}) for i, w in enumerate(weights)]

    with pytest.raises(
        MergeError, match=f"with the weights {says}.\nSet all weights to 0 or more, and"
    ):
        make_plan(zoo.settings(method, base, experts), 10**9)


def test_a_word_that_the_method_does_not_know_is_refused(zoo):
    from lewis_hub.errors import MergeError

    with pytest.raises(MergeError, match="Write `magnitude` or `activation`"):
        make_plan(asked(zoo, trim="size"), 10**9)
    with pytest.raises(MergeError, match="`dare_ties` has no such parameter"):
        make_plan(asked(zoo, "dare_ties", trim="activation"), 10**9)
