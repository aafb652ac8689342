"""Ray: whole shards on workers of a cluster. The slow tests start one on the loopback address."""

import importlib.util
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lewis_hub.errors import BrokenCheckpointError, ExtraMissingError, MergeError, NonFiniteError
from lewis_hub.merge.engine import run
from lewis_hub.merge.plan import make_plan
from lewis_hub.merge.runners import Backend, Ray, Runner, _start, parse_runner, threads
from lewis_hub.workflow.resources import Execution

HAS_RAY = importlib.util.find_spec("ray") is not None
N_SHARDS = 6


def test_without_ray_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(ExtraMissingError) as caught:
        Execution(runner="ray").require_usable()

    assert str(caught.value) == (
        "The runner `ray` needs the ray extra: pip install 'lewis-hub[ray]'"
    )
    with pytest.raises(ExtraMissingError):
        next(Ray().map(str, [1]))


@pytest.mark.parametrize("address", ["auto", "head.local:6379", "10.0.0.1:6379", "[::1]:6379"])
def test_an_address_goes_with_the_runner(address):
    assert parse_runner("ray", address) == Ray(address)


@pytest.mark.parametrize("address", ["", "head", "head:", "head:port", "ray://head:1", "a b:1"])
def test_what_cannot_be_an_address_is_refused(address):
    with pytest.raises(MergeError) as caught:
        parse_runner("ray", address)

    assert str(pickle.loads(pickle.dumps(caught.value))) == (
        f"ray address: `{address}` is not the address of a Ray cluster.\n"
        "Write `auto` on a machine of the cluster, or HOST:PORT such as head.local:6379."
    )


@pytest.mark.parametrize("name", ["inline", "threads:2", "nonsense"])
def test_an_address_is_refused_with_any_other_runner(name):
    with pytest.raises(MergeError) as caught:
        parse_runner(name, "auto")

    assert str(caught.value) == (
        f"ray address: `auto` was given for the runner `{name}`.\n"
        "Choose the runner `ray`, or give no address."
    )


@pytest.mark.parametrize("n_lost", [0, 1, 2])
def test_a_ray_that_does_not_answer_in_time_is_started_once_more(n_lost):
    asked = []

    def init(*_, **__):
        asked.append("init")
        if asked.count("init") <= n_lost:
            raise RuntimeError("Timed out waiting for file")

    stand_in = SimpleNamespace(init=init, shutdown=lambda: asked.append("shutdown"))
    with pytest.raises(RuntimeError) if n_lost == 2 else nullcontext():
        _start(stand_in)

    assert asked == ["init", "shutdown", "init", "shutdown"][: max(2 * n_lost, 1) + (n_lost == 1)]


@pytest.fixture(scope="module")
def cluster():
    """A Ray with two workers, as `Ray.map` starts one, whose files are gone afterwards."""
    folder = tempfile.mkdtemp(prefix="ray-")  # pytest's is too long for the names of sockets
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray

        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


on_ray = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(not HAS_RAY, reason="needs the ray extra"),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


def model(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}.w": torch.randn(1000, 1000, generator=generator).bfloat16()
        for i in range(N_SHARDS)
    }


@pytest.fixture
def settings(zoo):
    """Shards that take a worker a second or so each, by a method without a kernel."""
    base, *experts = (zoo.source(label, model(i)) for i, label in enumerate(("base", "x", "y")))
    return zoo.settings("pcb", base, experts, parameters={"density": 0.4})


def merge(zoo, settings, runner, output, told=None, shard=2_000_000):
    (zoo.root / output).mkdir(exist_ok=True)
    plan = make_plan(settings, shard)
    advance = told.append if told is not None else lambda _: None
    results = run(plan, zoo.folders, zoo.root / output, Backend(runner), advance)
    return results, {path.name: path.read_bytes() for path in (zoo.root / output).glob("model*")}


class Killer(threading.Thread):
    """Kills one worker while it has a shard open that it has not finished."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self.output, self.killed = output, None

    def run(self):
        until = time.monotonic() + 60
        while self.killed is None and time.monotonic() < until:
            for pid, shard in self.at_work():
                os.kill(pid, signal.SIGSTOP)
                if (pid, shard) in self.at_work() and not self.is_noted(shard):
                    self.killed = shard
                    os.kill(pid, signal.SIGKILL)
                    return
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.01)

    def is_noted(self, shard):
        return shard.with_name(shard.name + ".done.json").exists()

    def at_work(self):
        found = []
        for opened in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                target, pid = opened.readlink(), int(opened.parts[2])
            except OSError:
                continue
            if target.parent == self.output and target.suffix == ".safetensors":
                found.append((pid, target))
        return [(pid, target) for pid, target in found if pid != os.getpid()]


class TestOnRay:
    pytestmark = on_ray

    def test_a_worker_that_is_killed_midway_costs_no_byte(self, zoo, settings, cluster):
        results, expected = merge(zoo, settings, Runner(), "inline")
        killer, told = Killer(zoo.root / "ray"), []
        killer.start()

        redone, found = merge(zoo, settings, Ray(), "ray", told)

        killer.join()
        assert killer.killed is not None
        assert killer.killed.name in found
        assert found == expected
        assert redone == results
        assert list(redone) == list(results)
        assert sum(told) == sum(len(held) for n, held in found.items() if n.endswith("safetensors"))

    def test_the_tensors_are_the_same_in_any_shards_and_on_threads(self, zoo, settings, cluster):
        asked = zoo.settings(
            "dare_ties", settings.base, settings.experts, parameters={"density": 0.4}
        )
        for shard in (1, 5_000_000, 10**9):
            _, threaded = merge(zoo, asked, threads(2), f"threads-{shard}", shard=shard)
            _, found = merge(zoo, asked, Ray(), f"ray-{shard}", shard=shard)

            assert found == threaded

    def test_what_an_earlier_run_finished_is_kept(self, zoo, settings, cluster):
        _, expected = merge(zoo, settings, Runner(), "out")
        lost = zoo.root / "out" / f"model-00002-of-0000{N_SHARDS}.safetensors"
        lost.unlink()

        results, found = merge(zoo, settings, Ray(), "out")

        assert found == expected
        assert [name for name, r in results.items() if not r.is_kept][0] == lost.name
        assert sum(result.is_kept for result in results.values()) == N_SHARDS - 1

    def test_a_workers_error_comes_back_as_it_was(self, zoo, settings, cluster):
        broken = model(1)
        broken["model.layers.3.w"][5, 5] = float("inf")
        asked = zoo.settings("ties", settings.base, [zoo.source("bad", broken)])

        with pytest.raises(NonFiniteError) as caught:
            merge(zoo, asked, Ray(), "out")

        assert type(caught.value) is NonFiniteError
        assert (caught.value.tensor, caught.value.source) == ("model.layers.3.w", "bad")

    def test_a_file_that_changed_is_told_as_on_one_machine(self, zoo, settings, cluster):
        os.truncate(zoo.folders["y"] / "model.safetensors", 10_000)

        with pytest.raises(BrokenCheckpointError, match="y: model.safetensors: it ends inside"):
            merge(zoo, settings, Ray(), "out")

    def test_folders_that_a_worker_does_not_see_are_told(self, zoo, settings, cluster):
        folders = zoo.folders | {"y": zoo.root / "elsewhere"}
        (zoo.root / "out").mkdir()

        with pytest.raises(MergeError, match="does not see .*elsewhere"):
            run(
                make_plan(settings, 10**9),
                folders,
                zoo.root / "out",
                Backend(Ray()),
                lambda _: None,
            )

    def test_any_other_failure_is_one_message(self, cluster):
        with pytest.raises(MergeError) as caught:
            list(Ray().map(int, ["7", "x"]))

        assert str(caught.value) == (
            "runner `ray`: a worker failed with ValueError: invalid literal for int() with base "
            "10: 'x'.\nRun again, and finished shards are kept; or try `--runner threads`."
        )

    def test_a_worker_that_is_always_lost_is_one_message(self, cluster):
        with pytest.raises(MergeError, match="a worker was lost 4 times on the same shard"):
            list(Ray().map(os._exit, [1]))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not HAS_RAY, reason="needs the ray extra")
def test_workers_import_nothing_from_the_working_folder(tmp_path):
    (tmp_path / "lewis_hub").mkdir()
    (tmp_path / "lewis_hub" / "__init__.py").write_text("raise SystemError('of the folder')")
    code = "from lewis_hub.merge.runners import Ray\nprint(*Ray().map(abs, [-7]))"
    files = tempfile.mkdtemp(prefix="ray-")  # see `cluster`

    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "RAY_TMPDIR": files},
        capture_output=True,
        text=True,
        check=False,
    )

    shutil.rmtree(files, ignore_errors=True)
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr
