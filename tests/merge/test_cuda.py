"""On a device the methods' definitions run: on the CPU, by the same code, they give equal bytes."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load

from lewis_hub.errors import BrokenCheckpointError, DeviceError, NonFiniteError
from lewis_hub.merge.engine import run
from lewis_hub.merge.plan import make_plan
from lewis_hub.merge.runners import Backend, Runner, threads
from lewis_hub.methods.registry import find, methods
from lewis_hub.workflow.resources import Execution

NAMES = [method.name for method in methods()]
ELEMENTWISE = ["ties", "dare_ties", "dare_linear", "linear", "task_arithmetic", "della"]
SHAPES = {"model.layers.0.a": (120, 130), "model.layers.1.a": (7,), "b": (), "c": (0, 2)}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    floats = {name: torch.randn(s, generator=generator).to(dtype) for name, s in SHAPES.items()}
    return floats | {"steps": torch.arange(3)}


def settings(zoo, name):
    method = find(name)
    n = 1 if method.n_experts == (1, 1) else 2
    base, *experts = (zoo.source(f"model {i}", tensors(i)) for i in range(n + 1))
    asked = {"t": 0.3} if "t" in method.options else {}
    asked |= {"density": 0.4} if method.takes_density else {}
    given = base if method.takes_base else None
    return zoo.settings(name, given, experts, parameters=asked, dtype="bfloat16")


def merge(zoo, asked, device, output="on device", shard=20_000):
    (zoo.root / output).mkdir()
    told = []
    plan = make_plan(asked, shard)
    run(plan, zoo.folders, zoo.root / output, Backend(threads(2), device), told.append)
    assert sum(told) == plan.n_bytes
    return {path.name: path.read_bytes() for path in (zoo.root / output).glob("*.safetensors")}


@pytest.mark.parametrize("name", NAMES)
def test_by_the_way_of_a_device_every_method_gives_the_bytes_of_the_kernels(zoo, name):
    asked = settings(zoo, name)

    with_kernels = zoo.merge(asked, "kernels", shard=20_000, runner=Runner())

    found = merge(zoo, asked, "cpu")
    assert len(found) == 2
    assert found == {n: held for n, held in with_kernels.bytes.items() if n in found}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_gpu_gives_the_bytes_of_the_kernels(zoo, name):
    asked = settings(zoo, name)

    with_kernels = zoo.merge(asked, "kernels", shard=20_000).bytes

    found = merge(zoo, asked, "cuda")
    assert found == {n: held for n, held in with_kernels.items() if n in found}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELEMENTWISE])
def test_a_gpu_comes_within_one_rounding_of_every_other_method(zoo, name):
    asked = settings(zoo, name)
    defined = zoo.merge(asked, "defined").tensors

    found = merge(zoo, asked, "cuda", shard=10**9)

    on_device = load(found["model.safetensors"])
    assert on_device.keys() == defined.keys()
    for tensor, expected in defined.items():
        torch.testing.assert_close(on_device[tensor], expected, rtol=2**-7, atol=0)


def test_nan_on_a_device_names_tensor_and_source(zoo):
    broken = tensors(0)
    broken["b"] = torch.tensor(float("nan"))
    base, x = zoo.source("base", tensors(0)), zoo.source("x", broken)

    with pytest.raises(NonFiniteError, match="b holds NaN or infinity in x"):
        merge(zoo, zoo.settings("ties", base, [x]), "cpu")


def test_a_file_that_ends_too_early_is_told(zoo):
    asked = settings(zoo, "linear")
    os.truncate(zoo.folders["model 1"] / "model.safetensors", 10_000)

    with pytest.raises(BrokenCheckpointError, match="it ends inside"):
        merge(zoo, asked, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_told_before_any_work(device):
    with pytest.raises(DeviceError) as caught:
        Execution(device=device).require_usable()

    assert str(pickle.loads(pickle.dumps(caught.value))) == (
        f"device `{device}`: torch {torch.__version__} finds none.\n"
        "Use `--device cpu`, or install a driver and a torch that was built for CUDA."
    )
