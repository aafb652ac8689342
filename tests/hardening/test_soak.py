"""Many merges and pushes in one process, and many processes at one cache."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import pytest
from effort import times
from file_calls import below
from hub_models import push_folder, tiny
from warm_commands import n_descriptors, resident_bytes, run_command, start, start_command

from lewis_hub.hub.source import cache_root

RECIPE = """base_model: tests/base
models: [{model: tests/expert}]
merge_method: ties
parameters: {density: DENSITY}
"""
REPO = "tests/soaked"
FLAT_BYTES = 24_000_000  # the memory that an allocator may keep back, however many merges there are
N_AT_ONCE = 8
TOLD = {"README.md", "lewis/cost.json", "lewis/provenance.json", "lewis/report.html"}


@pytest.fixture
def work(hub, tmp_path):
    """A working folder; two models are on the Hub."""
    for seed, name in enumerate(("base", "expert")):
        push_folder(hub.api(), tiny(tmp_path / name, seed), f"tests/{name}")
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.replace("DENSITY", "0.5"))
    return folder


def soak(folder, token, n_merges):
    """Merge and push again and again; write down files and memory after each, in a process."""
    os.environ["HF_TOKEN"] = token
    os.chdir(folder)
    import lewis_hub
    from lewis_hub.recipe.read import parse_recipe

    seen = []
    for number in range(n_merges):
        density = f"0.{2 + number % 2 * 5}"  # another merge each time, so that each is a commit
        recipe = parse_recipe(RECIPE.replace("DENSITY", density), "recipe.yaml")
        output = Path(f"merged-{number}")
        target = lewis_hub.open_target(lewis_hub.Publishing(repo=REPO))
        lewis_hub.merge_models(recipe, output, progress=False)
        assert lewis_hub.publish(output, target, progress=False).changed
        shutil.rmtree(output)
        gc.collect()
        seen.append((n_descriptors(), resident_bytes()))
        Path("seen.json").write_text(json.dumps(seen))


def test_merges_and_pushes_in_a_row_keep_no_memory_and_no_files(hub, work):
    n_merges = times(6, 200)
    process = start(soak, str(work), hub.write_token, n_merges)
    process.join(60 + 10 * n_merges)

    assert process.exitcode == 0
    seen = json.loads((work / "seen.json").read_text())
    assert len(seen) == n_merges
    files, memory = zip(*seen[n_merges // 4 :], strict=True)
    assert max(files) - min(files) <= 2  # a connection of the pool comes or goes
    assert memory[-1] - memory[0] < FLAT_BYTES, memory
    assert len(hub.api().list_repo_commits(REPO)) == n_merges + 1  # the first made the repo


def test_eight_processes_share_one_cold_cache(hub, work):
    words = ["merge", "-q", "--max-shard-size", "6KB"]
    environment = {"HF_TOKEN": hub.write_token, "OMP_NUM_THREADS": "1"}
    assert run_command(work, [*words, "-o", "alone"], **environment) == (0, "")
    expected = model(work / "alone")
    for number in range(times(1, 10)):
        shutil.rmtree(cache_root())
        places = [work / f"{number}-{i}" for i in range(N_AT_ONCE)]
        for place in places:
            place.mkdir()
            shutil.copy(work / "recipe.yaml", place)
        running = [start_command(place, words, **environment) for place in places]
        for place, process in zip(places, running, strict=True):
            process.join(300)
            assert process.exitcode == 0, (place / "stderr.txt").read_text()
            assert model(place / "merged") == expected
        assert not [path for path in cache_root().rglob("*.partial")]
        assert not [path for path in cache_root().rglob("*.incomplete")]


def model(folder):
    return {path: None if path in TOLD else content for path, content in below(folder).items()}
