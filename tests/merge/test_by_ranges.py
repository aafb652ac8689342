"""Sources that come by ranges as they are needed: no thread may wait for what another has to do."""

import threading

import pytest
import torch

from lewis_hub.errors import NonFiniteError
from lewis_hub.merge.engine import run
from lewis_hub.merge.plan import make_plan
from lewis_hub.merge.runners import Backend, Runner
from lewis_hub.merge.runners import threads as in_threads

SHARD = 40_000  # bytes: two tensors, whose sources are larger
PATIENCE_S = 60


def from_afar(folder):
    def fetch(file, start, stop, take):
        take(start, (folder / file).read_bytes()[start:stop])

    return fetch


def planned(zoo, broken=()):
    sources = []
    for number, label in enumerate(("base", "first", "second")):
        generator = torch.Generator().manual_seed(number)
        tensors = {n: torch.randn(60, 130, generator=generator).bfloat16() for n in "abcdef"}
        for name in broken if label == "first" else ():
            tensors[name][0, 0] = float("nan")
        sources.append(zoo.source(label, tensors, {"density": 0.5} if number else {}))
    return make_plan(zoo.settings("ties", sources[0], sources[1:]), SHARD)


def merge(zoo, plan, means, name):
    """The merged files, or the error; what hangs fails."""
    output, ended = zoo.root / name, []
    output.mkdir()
    places = {label: from_afar(folder) for label, folder in zoo.folders.items()}

    def work():
        try:
            run(plan, places, output, means, lambda _: None)
            ended.append({path.name: path.read_bytes() for path in output.glob("*.safetensors")})
        except NonFiniteError as error:
            ended.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(PATIENCE_S)
    assert ended, "it hangs"
    return ended[0]


@pytest.mark.parametrize("means", [Backend(in_threads(3)), Backend(Runner(), "cpu")])
def test_what_does_not_fit_beside_the_last_tensor_comes_all_the_same(zoo, means):
    plan = planned(zoo)
    assert [len(shard.tensors) for shard in plan.shards] == [2, 2, 2]

    found = merge(zoo, plan, means, "found")

    assert found == merge(zoo, plan, Backend(Runner()), "expected")
    assert len(found) == 3


@pytest.mark.parametrize("means", [Backend(in_threads(2)), Backend(Runner(), "cpu")])
def test_a_source_that_is_broken_ends_the_work_of_every_thread(zoo, means):
    told = merge(zoo, planned(zoo, "a"), means, "found")

    assert str(told).startswith("a holds NaN or infinity in first.")
