import pytest
import torch

from lewis_hub.errors import NonFiniteError
from lewis_hub.merge.engine import tensors_in_memory
from lewis_hub.merge.plan import make_plan
from lewis_hub.merge.runners import Backend, Runner, threads


@pytest.mark.parametrize("runner", [Runner(), threads(2)], ids=["inline", "threads"])
@pytest.mark.parametrize("most_bytes", [9_000, 10**9])
def test_tensors_in_memory_are_those_of_the_files(zoo, settings, tmp_path, runner, most_bytes):
    written = zoo.merge(settings, "written").tensors

    held = tensors_in_memory(
        make_plan(settings, most_bytes), zoo.folders, tmp_path, Backend(runner)
    )

    assert held.keys() == written.keys()
    for name, tensor in written.items():
        assert held[name].dtype == tensor.dtype
        assert torch.equal(held[name], tensor)


def test_a_source_with_nan_is_named(zoo, tmp_path):
    broken = zoo.mixed(1) | {"model.layers.2.q.weight": torch.full((64, 33), torch.nan).bfloat16()}
    sources = [zoo.source("base", zoo.mixed(0)), zoo.source("x", broken, {"density": 0.4})]
    plan = make_plan(zoo.settings("ties", sources[0], sources[1:]), 10**9)

    with pytest.raises(NonFiniteError, match="model.layers.2.q.weight"):
        tensors_in_memory(plan, zoo.folders, tmp_path, Backend(Runner()))
