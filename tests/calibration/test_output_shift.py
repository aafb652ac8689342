from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lewis_hub.calibration.measure import measure_shifts, output_shifts
from lewis_hub.calibration.model import block_linears
from lewis_hub.calibration.subject import Snapshot
from lewis_hub.errors import CalibrationModelError
from lewis_hub.guides.baselines import activation_shift
from lewis_hub.guides.registry import Measurements, find

from .conftest import tiny_model, tokens_of


def nothing(_: int) -> None:
    pass


def naive(base, expert, texts) -> dict[str, float]:
    """Every output kept, then summed number by number."""

    def outputs(model, ids) -> dict[str, Tensor]:
        kept = {}

        def keep(path, _module, _inputs, y) -> None:
            kept[path] = y[0].clone()

        modules = block_linears(model, "m")
        hooks = [m.register_forward_hook(partial(keep, path)) for path, m in modules.items()]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        return kept

    sums: dict[str, list[float]] = {}
    for ids in texts:
        before, after = outputs(base, ids), outputs(expert, ids)
        for path in before:
            pair = sums.setdefault(path, [0.0, 0.0])
            numbers = (kept[path].flatten().tolist() for kept in (before, after))
            for b, e in zip(*numbers, strict=True):
                pair[0] += (e - b) ** 2
                pair[1] += b**2
    return {path: math.sqrt(d / b) for path, (d, b) in sums.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gpt_neox", "mamba"])
def test_it_is_what_a_loop_over_all_outputs_finds(architecture, texts):
    base, expert = tiny_model(architecture, 0), tiny_model(architecture, 1)

    found = output_shifts(base, expert, "me/expert", texts, nothing)

    expected = naive(base, expert, texts.ids)  # not of modules whose weight is used without a call
    assert list(found) == [path for path in block_linears(base, "m") if path in expected]
    assert found == pytest.approx(expected, rel=1e-4)


def test_only_what_comes_after_a_changed_module_differs(llama, texts):
    expert = copy.deepcopy(llama)
    with torch.no_grad():
        expert.model.layers[1].mlp.down_proj.weight.mul_(1.5)

    found = output_shifts(llama, expert, "me/expert", texts, nothing)

    changed = "model.layers.1.mlp.down_proj"
    paths = list(found)
    assert all(found[path] == 0 for path in paths[: paths.index(changed)])
    assert found[changed] == pytest.approx(0.5, rel=1e-5)
    assert all(found[path] > 0 for path in paths if ".layers.2." in path)


def test_a_model_against_itself_has_not_shifted_and_is_left_as_it_was(llama, texts):
    llama.train()

    found = output_shifts(llama, llama, "me/base", texts, nothing)

    assert set(found.values()) == {0.0}
    assert llama.training
    assert not any(module._forward_hooks for module in llama.modules())


def test_a_module_that_sees_other_tokens_is_left_out(llama, texts):
    class Halved(nn.Module):  # its Linear is handed every other token
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[:, ::2]).repeat_interleave(2, dim=1)[:, : x.shape[1]]

    llama.model.layers[1].mlp.up_proj = Halved(llama.model.layers[1].mlp.up_proj)

    found = output_shifts(llama, llama, "me/base", tokens_of([texts.ids[0]]), nothing)

    assert "model.layers.1.mlp.up_proj.inner" not in found
    assert "model.layers.1.mlp.gate_proj" in found


def test_models_are_measured_from_disk_on_each_set(tmp_path, texts):
    base, expert = tiny_model("llama", 0), tiny_model("llama", 1)
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    sets = [texts, tokens_of([[5, 6, 7]])]
    seen: list[int] = []

    found = measure_shifts(
        Snapshot("b", tmp_path / "base"),
        Snapshot("e", tmp_path / "expert"),
        sets,
        "cpu",
        seen.append,
    )

    expected = [output_shifts(base, expert, "e", one, nothing) for one in sets]
    assert found == [pytest.approx(one, rel=1e-5) for one in expected]
    assert sum(seen) == sum(one.n_tokens for one in sets)


def test_outputs_that_are_not_finite_are_refused(llama, texts):
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.layers[0].self_attn.v_proj.weight.fill_(float("inf"))

    with pytest.raises(CalibrationModelError) as caught:
        output_shifts(llama, broken, "me/broken", texts, nothing)

    assert str(caught.value).startswith(
        "me/broken: the outputs of model.layers.0.self_attn.v_proj are not finite.\n"
    )


@settings(max_examples=50)
@given(st.lists(st.floats(0, 10), min_size=2, max_size=9, unique=True))
def test_densities_follow_the_shift_and_span_the_bounds(shifts):
    measured = {f"l.{i}.q": value for i, value in enumerate(shifts)}
    found = activation_shift(Measurements((), {}, {"output_shift": measured}), 0.3, 0.8)

    assert min(found.values()) == 0.3
    assert max(found.values()) == 0.8
    order = sorted(measured, key=lambda module: measured[module])
    assert [found[module] for module in order] == sorted(found.values())
    assert find("activation_shift").needs == ("output_shift",)
