"""`--allow-nan`: an entry that is not finite of an expert counts as the base's."""

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


@pytest.mark.parametrize("method", ["linear", "multislerp", "karcher", "passthrough"])
def test_where_no_base_is_read_odd_entries_are_an_error_all_the_same(zoo, method):
    """No value is right there: 0 made a norm, and all that followed it, 0."""
    odd, other = zoo.source("odd", {"a": broken(tensors(0))}), zoo.source("x", {"a": tensors(1)})
    experts = [odd] if method == "passthrough" else [other, odd]

    with pytest.raises(NonFiniteError) as raised:
        merged(zoo, zoo.settings(method, None, experts), "found")

    assert str(raised.value) == (
        "a holds NaN or infinity in odd.\nUse another revision of that model, or leave it out."
    )


@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_the_bases_odd_entries_are_an_error_all_the_same(zoo, method):
    experts = [zoo.source("x", {"a": tensors(1)})]
    options = {"parameters": {"t": 0.5}} if method == "slerp" else {}

    odd = zoo.source("odd", {"a": broken(tensors(0))})

    with pytest.raises(NonFiniteError) as raised:
        merged(zoo, zoo.settings(method, odd, experts, **options), "found")

    assert str(raised.value) == (
        "a holds NaN or infinity in odd.\nUse another revision of that model."
    )


def test_a_bases_value_that_does_not_fit_an_experts_dtype_is_an_error(zoo):
    base = zoo.source("base", {"a": torch.full((4,), 1e5)})
    odd = zoo.source("odd", {"a": torch.full((4,), torch.inf, dtype=torch.float16)})

    with pytest.raises(NonFiniteError) as raised:
        merged(zoo, zoo.settings("ties", base, [odd]), "found")

    assert str(raised.value) == (
        "a holds NaN or infinity in odd.\nUse another revision of that model, or leave it out."
    )


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
