"""SIGKILL at drawn moments of a merge, a stream and a push: the same command completes it.

What is there after the kill is as before or complete; after the rerun there are equal bytes, and
one commit. A kill is not a loss of power: the page cache survives it.
"""

from __future__ import annotations

import random
import time

import pytest
from effort import SEED, times
from file_calls import below
from hub_models import push_folder, tiny
from statistical_merges import MODELS
from streamed_merges import hub_digests
from warm_commands import kill_after, run_command, start_command
from zoo_hub import put_zoo

TITLE = "Merge with lewis-hub"
TIES = """base_model: tests/base
models: [{model: tests/expert}]
merge_method: ties
parameters: {density: 0.5}
"""
REGMEAN = MODELS.replace("samples: 32", "samples: 4") + "merge_method: regmean\n"
ALIGNED = """base_model: zoo/base
models: [{model: zoo/expert-reverse, align: dual_space}]
merge_method: linear
dtype: bfloat16
calibration: {dataset: zoo/reverse, text: "{question}", samples: 4}
export: [gguf:q8_0, gguf:f16]
"""
# when a run was and what it cost differs, and card and report tell it
TOLD = {"README.md", "lewis/cost.json", "lewis/provenance.json", "lewis/report.html"}


@pytest.fixture
def environment(hub, tmp_path):
    """What every command gets; the cache is kept from one to the next."""
    put_zoo(hub)
    for seed, name in enumerate(("base", "expert")):
        push_folder(hub.api(), tiny(tmp_path / name, seed), f"tests/{name}")
    return {"HF_TOKEN": hub.write_token, "OMP_NUM_THREADS": "1"}


def run(folder, words, environment):
    code, told = run_command(folder, words, **environment)
    assert code == 0, told


def moments(folder, words_of, environment):
    """Start the same work and kill it, at moments drawn from how long it takes; at night 100."""
    n_kills = times(1, 100)
    run(folder, words_of("warm"), environment)  # the cache is filled
    begun = time.perf_counter()
    run(folder, words_of("timed"), environment)
    draw, seconds = random.Random(SEED), time.perf_counter() - begun
    n_killed = n_begun = 0
    while n_killed < n_kills:
        assert n_begun < 3 * n_kills + 10, "it ends before it can be killed"
        name, n_begun = f"killed-{n_begun}", n_begun + 1
        begun = time.perf_counter()
        process = start_command(folder, words_of(name), **environment)
        if kill_after(process, draw.uniform(0, seconds)):
            n_killed += 1
        else:
            seconds = min(seconds, time.perf_counter() - begun)  # the machine was busy before
        yield name


def model(folder):
    """The files of a merge with their bytes; None is the content where equal merges differ."""
    return {path: None if path in TOLD else content for path, content in below(folder).items()}


@pytest.mark.parametrize(
    "recipe", [REGMEAN, pytest.param(ALIGNED, marks=pytest.mark.slow)], ids=["regmean", "aligned"]
)
def test_a_merge_ends_in_the_same_bytes(tmp_path, environment, recipe):
    work = tmp_path / "work"
    work.mkdir()
    (work / "recipe.yaml").write_text(recipe)

    def words(name):
        return ["merge", "-q", "--max-shard-size", "500KB", "-o", name]

    for name in moments(work, words, environment):
        expected, output = model(work / "warm"), work / name
        assert not output.exists() or model(output) == expected
        run(work, words(name), environment)
        assert model(output) == expected
        assert not [path for path in work.iterdir() if path.name.startswith(f"{name}.")]


def digests(hub, repo):
    """The digest of each file that equal merges have in common; without documents on commits."""
    found = hub_digests(hub, repo)
    return found, {path: sha for path, sha in found.items() if "safetensors" in path}


def assert_as_before_or_complete(hub, repo, expected):
    found, weights = digests(hub, repo)
    assert not found or (found.keys(), weights) == (expected[0].keys(), expected[1])


def assert_complete(hub, repo, expected):
    found, weights = digests(hub, repo)
    assert (found.keys(), weights) == (expected[0].keys(), expected[1])
    titles = [commit.title for commit in hub.api().list_repo_commits(repo)]
    assert titles.count(TITLE) == 1
    assert len(titles) == 2  # the other is the empty repo's


def test_a_stream_ends_in_the_same_bytes_and_one_commit(hub, tmp_path, environment):
    work = tmp_path / "work"
    work.mkdir()
    (work / "recipe.yaml").write_text(TIES)

    def words(name):
        told = ["merge", "--stream", "--push", "-q", "--max-shard-size", "6KB"]
        return [*told, "--repo", f"tests/{name}", "-o", name]

    for name in moments(work, words, environment):
        expected = digests(hub, "tests/warm")
        assert_as_before_or_complete(hub, f"tests/{name}", expected)
        run(work, words(name), environment)
        assert_complete(hub, f"tests/{name}", expected)
        assert not [path for path in work.iterdir() if path.name.startswith(name)]


def test_a_push_ends_in_the_same_bytes_and_one_commit(hub, tmp_path, environment):
    work = tmp_path / "work"
    work.mkdir()
    (work / "recipe.yaml").write_text(TIES)
    run(work, ["merge", "-q", "--max-shard-size", "6KB"], environment)

    def words(name):
        return ["push", "-q", "merged", f"tests/{name}"]

    for name in moments(work, words, environment):
        expected = digests(hub, "tests/warm")
        assert_as_before_or_complete(hub, f"tests/{name}", expected)
        run(work, words(name), environment)
        assert_complete(hub, f"tests/{name}", expected)
