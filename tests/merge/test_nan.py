"""`--allow-nan`: an entry that is not finite counts as the base's, in every way of merging."""

import pytest
import torch
from safetensors.torch import load_file

from lewis_hub.errors import NonFiniteError
from lewis_hub.merge.engine import run
from lewis_hub.merge.plan import make_plan
from lewis_hub.merge.runners import Backend, Runner
from lewis_hub.merge.slices import Blocks, MergeSlice, StackSettings, make_stacked_plan

METHODS = ["ties", "dare_ties", "della", "task_arithmetic", "breadcrumbs", "model_stock"]
ODD = [0, 7, 130, 4_999]


def tensors(seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(100, 50, generator=generator).to(dtype)


def broken(tensor):
    """With NaN, both infinities and a NaN with its sign set."""
    flat = tensor.clone().flatten()
    flat[ODD] = torch.tensor([float("nan"), float("inf"), float("-inf"), -float("nan")]).to(flat)
    return flat.view(tensor.shape)


def merged(zoo, settings, name, runner=None):
    folder = zoo.root / name
    folder.mkdir()
    plan = make_plan(settings, 10**9).allowing_nan
    results = run(plan, zoo.folders, folder, Backend(runner or Runner()), lambda _: None)
    return results["model.safetensors"], (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_experts_odd_entries_count_as_the_bases(zoo, method, dtype):
    base, other = tensors(0), tensors(2)
    expert, whole = broken(tensors(1, dtype)), tensors(1, dtype).flatten()
    whole[ODD] = base.flatten()[ODD].to(dtype)
    own = {"density": 0.4} if method != "model_stock" and method != "task_arithmetic" else {}
    start = zoo.source("base", {"a": base})
    others = [zoo.source("other", {"a": other}, own)]
    odd = zoo.source("odd", {"a": expert}, own)
    mended = zoo.source("mended", {"a": whole.view(expert.shape)}, own)

    expected = zoo.merge(zoo.settings(method, start, [mended, *others]), "expected")
    result, found = merged(zoo, zoo.settings(method, start, [odd, *others]), "found")
    again = merged(
        zoo, zoo.settings(method, start, [odd, *others]), "again", Runner(3, large_elements=100)
    )

    assert found == expected.bytes["model.safetensors"] == again[1]
    assert result.replaced_nan == {"odd": 1}


def test_the_bases_odd_entries_are_zero(zoo):
    base, expert = tensors(0), tensors(1)
    mended = base.flatten().clone()
    mended[ODD] = 0
    odd, whole = (
        zoo.source(name, {"a": tensor})
        for name, tensor in (("odd", broken(base)), ("whole", mended.view(base.shape)))
    )
    experts = [zoo.source("x", {"a": expert}, {"density": 0.4})]

    expected = zoo.merge(zoo.settings("ties", whole, experts), "expected")
    result, found = merged(zoo, zoo.settings("ties", odd, experts), "found")

    assert found == expected.bytes["model.safetensors"]
    assert result.replaced_nan == {"odd": 1}


def test_without_a_base_odd_entries_are_zero(zoo):
    first, second = tensors(0), tensors(1)
    mended = first.flatten().clone()
    mended[ODD] = 0
    sources = [zoo.source("first", {"a": broken(first)}), zoo.source("second", {"a": second})]
    whole = [zoo.source("mended", {"a": mended.view(first.shape)}), sources[1]]

    expected = zoo.merge(zoo.settings("linear", None, whole), "expected")
    _, found = merged(zoo, zoo.settings("linear", None, sources), "found")

    assert found == expected.bytes["model.safetensors"]


def test_a_spherical_mean_without_a_base_takes_zero_and_not_the_first_model(zoo):
    first, second = tensors(0), tensors(1)
    mended = second.flatten().clone()
    mended[ODD] = 0
    sources = [zoo.source("first", {"a": first}), zoo.source("second", {"a": broken(second)})]
    whole = [sources[0], zoo.source("mended", {"a": mended.view(second.shape)})]

    expected = zoo.merge(zoo.settings("multislerp", None, whole), "expected")
    _, found = merged(zoo, zoo.settings("multislerp", None, sources), "found")

    assert found == expected.bytes["model.safetensors"]


def test_in_a_stack_each_block_has_the_stand_ins_of_its_own_base(zoo):
    """Two bases, and one block of the expert against two of a base: in one shard and in several."""
    names = [f"model.layers.{i}.q.weight" for i in range(2)]
    bases = [
        zoo.source(f"base {b}", {name: tensors(10 * b + i) for i, name in enumerate(names)})
        for b in range(2)
    ]
    odd = {name: broken(tensors(50 + i)) for i, name in enumerate(names)}
    expert = zoo.source("odd", odd, {"density": 0.4})
    asked = [(bases[0], 0), (bases[1], 0), (bases[1], 1)]  # the expert's first block, thrice
    slices = [
        MergeSlice(Blocks(base, range(i, i + 1)), (Blocks(expert, range(1)),), {})
        for base, i in asked
    ]
    plan = make_stacked_plan(
        StackSettings("ties", tuple(slices), bases[0].checkpoint), 10**9
    ).allowing_nan
    (zoo.root / "out").mkdir()

    results = run(plan, zoo.folders, zoo.root / "out", Backend(Runner()), lambda _: None)

    found = load_file(zoo.root / "out" / "model.safetensors")
    for number, (base, i) in enumerate(asked):
        start = zoo.tensors[base.label][names[i]]
        whole = odd[names[0]].flatten().clone()
        whole[ODD] = start.flatten()[ODD]
        mended = zoo.source(f"mended {number}", {"a": whole.view(100, 50)}, {"density": 0.4})
        alone = zoo.settings("ties", zoo.source(f"start {number}", {"a": start}), [mended])
        expected = zoo.merge(alone, f"expected {number}").tensors["a"]
        assert torch.equal(found[f"model.layers.{number}.q.weight"], expected)
    assert results["model.safetensors"].replaced_nan == {"odd": 1}


def test_finite_sources_give_the_same_bytes_and_nothing_is_mended(zoo):
    base, *experts = (zoo.source(str(i), {"a": tensors(i)}, {"density": 0.4}) for i in range(3))
    settings = zoo.settings("ties", base, experts)

    result, found = merged(zoo, settings, "found")

    assert found == zoo.merge(settings, "plain").bytes["model.safetensors"]
    assert result.replaced_nan == {}


def test_a_result_that_does_not_fit_is_an_error_all_the_same(zoo):
    only = zoo.source("only", {"a": torch.full((4,), 1e5)})
    plan = make_plan(zoo.settings("linear", None, [only], dtype="float16"), 10**9).allowing_nan
    (zoo.root / "out").mkdir()

    with pytest.raises(NonFiniteError) as raised:
        run(plan, zoo.folders, zoo.root / "out", Backend(Runner()), lambda _: None)

    assert "the merged model" in str(raised.value)
