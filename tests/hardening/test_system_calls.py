"""Every call of the system that a command makes on its files fails once, with eight errors.

The run ends with one message and exit code 1, or does not need the call; the output is whole or
absent, and the same command completes it to the same bytes.
"""

from __future__ import annotations

import errno
import random
import shutil
import sys

import pytest
from effort import EFFORT, SEED
from file_calls import below, failing, recorded
from hub_models import push_folder, tiny

from lewis_hub.checkpoint.writer import OutputTensor, ShardWriter, lay_out
from lewis_hub.cli import main
from lewis_hub.cli.main import disk_failure
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError
from lewis_hub.files import write_whole
from lewis_hub.hub.source import cache_root
from lewis_hub.merge.workspace import open_workspace

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EINTR)
NUMBERS += (errno.ENOTCONN, errno.ETIMEDOUT)  # a disk in a network is gone, or does not answer
LAYOUTS = lay_out([OutputTensor(name, "F32", (100,)) for name in "abcd"], 800)
RECIPE = """base_model: BASE
models: [{model: EXPERT}]
merge_method: ties
parameters: {density: 0.5}
"""
EXPORTABLE = [zoo_folder() / name for name in ("base", "expert-reverse")]
EXPORT = "tokenizer_source: base\nexport: [gguf:q8_0]\n"
LOCK = ".merged.lock"
DRAWN = 3  # of the calls of a merge, in the gate
# a run says when it was and what it cost, and so do card and report
TOLD = {"README.md", "lewis/cost.json", "lewis/provenance.json", "lewis/report.html"}


def write_output(output):
    """What the writer does for two shards, a document and the end of a merge."""
    with open_workspace(output, replace=False) as work:
        for layout in LAYOUTS:
            with ShardWriter(work.folder, layout, stays_cached=False) as shard:
                for start in reversed(layout.starts):  # so that bytes are read back
                    shard.write(start, memoryview(bytes(range(200)) * 2))
                shard.finish()
        (work.folder / "lewis").mkdir(exist_ok=True)
        write_whole(work.folder / "lewis" / "lock.json", "{}\n")
        work.finish([*(layout.name for layout in LAYOUTS), "lewis/lock.json"])


def pairs(calls):
    """Each call with one of the errors in turn; at night with every error."""
    if EFFORT > 1:
        return [(call, number) for call in calls for number in NUMBERS]
    return [(call, NUMBERS[i % len(NUMBERS)]) for i, call in enumerate(calls)]


def test_each_call_of_the_writer_may_fail_once(tmp_path):
    calls = recorded([tmp_path], lambda: write_output(tmp_path / "merged"))
    expected = below(tmp_path)
    assert {call.name for call in calls} >= {"open", "posix_fallocate", "pwrite", "preadv", "fsync"}
    assert {call.name for call in calls} >= {"write", "mkdir", "rename", "replace", "flock"}
    n_failed = n_tried = 0
    for call, number in pairs(calls):
        n_tried, folder = n_tried + 1, tmp_path / f"try-{n_tried}"
        folder.mkdir()
        told = None
        struck = type(call)(call.name, call.path.replace(str(tmp_path), str(folder)), call.before)
        with failing([folder], struck, number):
            try:
                write_output(folder / "merged")
            except (LewisHubError, OSError) as error:
                told = error
        n_failed += told is not None
        assert not isinstance(told, OSError) or disk_failure(told), call
        if (folder / "merged").exists():
            assert below(folder / "merged").items() == below(tmp_path / "merged").items(), call
        else:
            write_output(folder / "merged")
        found = {path: content for path, content in below(folder).items() if path != LOCK}
        assert found == expected, call  # an empty lock may stay, which the next run takes
    assert n_failed > n_tried / 2


def test_shards_and_folder_are_flushed_before_the_folder_gets_its_name(tmp_path):
    calls = recorded([tmp_path], lambda: write_output(tmp_path / "merged"))
    made = f"{tmp_path}/merged.partial"
    (renamed,) = (i for i, one in enumerate(calls) if (one.name, one.path) == ("rename", made))
    for layout in LAYOUTS:
        own = [one.name for one in calls[:renamed] if one.path == f"{made}/{layout.name}"]
        assert max(i for i, name in enumerate(own) if name == "pwrite") < own.index("fsync")
    flushed = [
        [one.path for one in part if one.name == "fsync"]
        for part in (calls[:renamed], calls[renamed:])
    ]
    assert (flushed[0][-1], flushed[1]) == (made, [str(tmp_path)])


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A working folder with two models; the caches are elsewhere."""
    made = [tiny(tmp_path / name, seed) for seed, name in enumerate(("base", "expert"))]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return made


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command as `main` does; gives its exit code and what it says on stderr."""

    def ran(*words):
        monkeypatch.setattr(sys, "argv", ["lewis-hub", *words])
        capsys.readouterr()
        code = main._run()
        return code, capsys.readouterr().err

    return ran


def merge(run, output):
    words = ("merge", "../recipe.yaml", "--no-eval", "-q", "--runner", "inline")
    return run(*words, "--max-shard-size", "6KB", "-o", str(output))


def drawn(calls):
    """Some of the calls with one error each; at night all pairs of a call and an error."""
    return pairs(calls if EFFORT > 1 else random.Random(SEED).sample(calls, DRAWN))


def recipe_of(models):
    text = RECIPE
    for kind, folder in zip(("BASE", "EXPERT"), models, strict=True):
        text = text.replace(kind, str(folder))
    return text


@pytest.mark.parametrize("more", ["", EXPORT], ids=["weights", "export"])
def test_each_call_of_a_merge_on_its_output_may_fail_once(tmp_path, models, run, more):
    used = EXPORTABLE if more else models
    (tmp_path / "recipe.yaml").write_text(recipe_of(used) + more)
    work = tmp_path / "work"
    assert merge(run, "merged") == (0, "")  # kernels are loaded
    expected = whole(work / "merged")
    calls = recorded([work / "again"], lambda: merge(run, "again"))
    assert len(calls) > 100

    for i, (call, number) in enumerate(drawn(calls)):
        output = work / f"run-{i}"
        struck = type(call)(call.name, call.path.replace("/again", f"/run-{i}"), call.before)
        with failing([output], struck, number):
            code, told = merge(run, output)
        assert_told_and_completed(run, output, (code, told, call), expected)


def test_each_call_of_a_download_on_the_cache_may_fail_once(
    hub, tmp_path, models, run, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    text = RECIPE
    for model in models:
        text = text.replace(
            model.name.upper(), push_folder(hub.api(), model, f"tests/{model.name}")
        )
    (tmp_path / "recipe.yaml").write_text(text)
    work = tmp_path / "work"
    assert merge(run, "merged") == (0, "")
    expected = whole(work / "merged")
    shutil.rmtree(cache_root())
    calls = recorded([cache_root()], lambda: merge(run, "again"))
    assert len(calls) > 50

    for i, (call, number) in enumerate(drawn(calls)):
        shutil.rmtree(cache_root())
        output = work / f"run-{i}"
        with failing([cache_root()], call, number):
            code, told = merge(run, output)
        assert_told_and_completed(run, output, (code, told, call), expected)


BASE, EXPERT = map(str, EXPORTABLE)
COMMANDS = {
    "export": ("export", "merged", "--to", "gguf:q8_0", "-q"),
    "export elsewhere": ("export", "merged", "--to", "gguf:q8_0", "-q", "-o", "out"),
    "transplant": ("transplant-tokenizer", EXPERT, BASE, "-q", "--runner", "inline", "-o", "out"),
    "extract": ("extract-lora", EXPERT, "--base", BASE, "--rank", "4", "-q", "-o", "out"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_each_call_of_another_command_may_fail_once(tmp_path, run, command, monkeypatch):
    begin, work = tmp_path / "begin", tmp_path / "work"
    begin.mkdir()
    monkeypatch.chdir(begin)
    (tmp_path / "recipe.yaml").write_text(recipe_of(EXPORTABLE))
    assert merge(run, "merged") == (0, "")

    def start():
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(begin, work)
        monkeypatch.chdir(work)

    start()
    before = whole(work)
    assert run(*command) == (0, "")
    expected = whole(work)
    start()
    calls = recorded([work], lambda: run(*command))
    for call, number in drawn(calls):
        start()
        with failing([work], call, number):
            code, told = run(*command)
        assert told.startswith("lewis-hub: ") if code else told == "", (call, told)
        found = whole(work)
        kept = {item for item in found.items() if ".partial/" not in item[0]}
        assert kept <= set(expected.items()) | set(before.items()), call
        assert code == 1 or found == expected, call
        if found != expected:
            assert run(*command) == (0, ""), call
            assert whole(work) == expected, call


def whole(folder):
    """The files below a folder; None is the content of those that differ from run to run."""
    found = below(folder)
    names = [path for path in found if not path.endswith(".lock")]
    return {path: None if path.endswith((*TOLD,)) else found[path] for path in names}


def assert_told_and_completed(run, output, failed, expected):
    code, told, call = failed
    assert code in (0, 1), call
    assert told.startswith("lewis-hub: ") == bool(code), (call, told)
    assert "Traceback" not in told
    assert not output.exists() or whole(output) == expected, call
    assert bool(code) or output.exists(), call

    assert merge(run, output)[0] == 0, call

    assert whole(output) == expected, call
    assert not [path for path in output.parent.iterdir() if path.name.startswith(f"{output.name}.")]
