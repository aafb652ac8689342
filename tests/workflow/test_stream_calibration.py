"""Streams of recipes that measure: no model is on the disk, and the bytes are the local ones."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from hub_models import push_folder, watch_requests
from streamed_merges import (
    MODEL_BYTES,
    MOST_BYTES,
    SHARD_BYTES,
    SMALL,
    fetched_bytes,
    hub_digests,
    local_digests,
    quantise_to_fp8,
    read_published,
    record_disk_bytes,
    seed,
    stream,
    without_costs,
    write_adapter,
)

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import OutputError, RecipeError
from lewis_hub.hub.source import cache_root
from lewis_hub.recipe.read import parse_recipe

TEXT = '"Question: {question}\\nAnswer: {answer}"'
RECIPE = f"""base_model: tests/base
models:
  - model: tests/reverse
    calibration: {{dataset: zoo/reverse, text: {TEXT}, samples: 4}}
  - model: zoo/expert-cipher
    calibration: {{dataset: zoo/cipher, text: {TEXT}, samples: 4}}
publish: {{repo: tests/streamed}}
"""
WAYS = {
    "lewis": "merge_method: ties\nguide: {name: lewis}\n",
    "magnitude": "merge_method: ties\nguide: {name: magnitude}\n",
    "regmean": "merge_method: regmean\n",
    "guided regmean": "merge_method: regmean\nguide: {name: lewis}\n",
    "in sequence": "merge_method: regmean\nparameters: {inputs: merged}\n",
    "trim": "merge_method: ties\nparameters: {density: 0.3, trim: activation}\n",
}

BLOCKS_BYTES = 2 * 6 * 184_320  # of the matrices in the blocks
BLOCK_BYTES = 2 * 184_320 + 4_096  # and of the norms
FITTING_BYTES = 5 * BLOCK_BYTES + MOST_BYTES  # each expert's, and of the merge each source's
MEASURED = {  # what is fetched for that
    "lewis": {"calibrate": 3 * MODEL_BYTES},
    "magnitude": {"calibrate": 2 * 2 * BLOCKS_BYTES},  # of each expert and the base
    "regmean": {"gather": 2 * MODEL_BYTES},
    "guided regmean": {"calibrate": 3 * MODEL_BYTES, "gather": 0},
    "in sequence": {  # experts, and the merge of base and experts; then all but the matrices
        "gather": 5 * MODEL_BYTES,
        "merge": 3 * (MODEL_BYTES - BLOCKS_BYTES),
    },
    "trim": {"gather": 2 * MODEL_BYTES},
}


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return seed(hub, tmp_path)


def recipe(way, text=RECIPE):
    return parse_recipe(text + WAYS[way], "recipe.yaml")


@pytest.mark.parametrize(
    "way",
    [
        "in sequence",
        *(
            pytest.param(way, marks=pytest.mark.slow)
            for way in ("lewis", "guided regmean", "magnitude", "regmean", "trim")
        ),
    ],
)
def test_what_is_measured_on_the_way_gives_the_bytes_of_a_local_merge(api, hub, tmp_path, way):
    with record_disk_bytes(hub, tmp_path / "work") as seen:
        stream(recipe(way), tmp_path / "work")

    assert 0 < max(seen) <= (FITTING_BYTES if way == "in sequence" else MOST_BYTES)
    assert list(cache_root().rglob("*.safetensors")) == []
    assert list(tmp_path.glob("work*")) == []
    assert fetched_bytes(hub) == {"merge": 3 * MODEL_BYTES} | MEASURED[way]
    assert "downloaded in ranges" in read_published(hub, "README.md").decode()
    lewis_hub.merge_models(recipe(way), tmp_path / "merged", SMALL)
    merged = local_digests(tmp_path / "merged")
    assert hub_digests(hub).keys() == merged.keys()
    assert without_costs(hub_digests(hub)) == without_costs(merged)
    assert ("lewis/importance.json" in merged) == (way in {"lewis", "magnitude", "guided regmean"})


@pytest.mark.slow
def test_an_adapter_and_8_bit_floats_are_measured_as_they_are_written_out(api, hub, tmp_path):
    push_folder(api, write_adapter(tmp_path / "adapter"), "tests/adapter")
    push_folder(
        api, quantise_to_fp8(zoo_folder() / "expert-cipher", tmp_path / "eight"), "tests/eight"
    )
    text = RECIPE.replace("tests/reverse", "tests/adapter").replace(
        "zoo/expert-cipher", "tests/eight"
    )

    with record_disk_bytes(hub, tmp_path / "work") as seen:
        stream(recipe("lewis", text), tmp_path / "work")

    lewis_hub.merge_models(recipe("lewis", text), tmp_path / "merged", SMALL)
    assert without_costs(hub_digests(hub)) == without_costs(local_digests(tmp_path / "merged"))
    assert max(seen) <= MOST_BYTES


# -- interrupted


def killed(hub, folder, text, when):
    """Run the command, and kill it at the first request when `when(its scratch folder)` is so."""
    (folder / "recipe.yaml").write_text(text)
    command = [sys.executable, "-m", "lewis_hub", "merge", "--stream", "--push", "-q"]
    command += ["--max-shard-size", f"{SHARD_BYTES // 1000}KB"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    scratch = folder / "merged.stream.partial" / ".scratch"

    def hear(*_):
        if process.poll() is None and when(scratch):
            process.kill()

    with watch_requests(hub, hear):
        told = process.communicate(timeout=300)[1]
    assert process.returncode == -signal.SIGKILL, told


def n_measured(scratch):
    """How many measurements are kept."""
    with suppress(OSError):
        return len(json.loads((scratch / "importance.json").read_text())["sources"])
    return 0


def is_sent(scratch):
    """Whether a shard was sent: its note is left."""
    notes = (scratch / "shards").glob("*.safetensors.done.json")
    return any(not note.with_name(note.name.removesuffix(".done.json")).exists() for note in notes)


INTERRUPTED = {  # way, when it is killed, what a rerun fetches to measure what is left
    "measuring": ("lewis", lambda scratch: n_measured(scratch) >= 2, 2 * MODEL_BYTES),
    "measured": ("lewis", is_sent, 0),
    "changes": ("magnitude", lambda scratch: n_measured(scratch) >= 1, 2 * BLOCKS_BYTES),
    "gathering": ("regmean", lambda scratch: any(scratch.rglob("grams.json")), MODEL_BYTES),
    "gathered": ("regmean", is_sent, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_killed_run_goes_on_and_measures_nothing_again(api, hub, tmp_path, monkeypatch, name):
    way, when, left = INTERRUPTED[name]
    monkeypatch.chdir(tmp_path)
    killed(hub, tmp_path, RECIPE + WAYS[way], when)
    before = hub_digests(hub)

    stream(lewis_hub.read_recipe(tmp_path / "recipe.yaml"), tmp_path / "merged")

    assert before == {}
    came = fetched_bytes(hub)
    merged_bytes = came.pop("merge")
    assert came == {"gather" if way == "regmean" else "calibrate": left}
    assert (merged_bytes < 3 * MODEL_BYTES) == (when is is_sent)
    lewis_hub.merge_models(recipe(way), tmp_path / "local", SMALL)
    assert without_costs(hub_digests(hub)) == without_costs(local_digests(tmp_path / "local"))


# -- refused


@pytest.mark.slow  # it calibrates whole models
@pytest.mark.parametrize("guide", ["lewis_reference", "activation_shift"])
def test_a_guide_that_runs_whole_models_is_refused_and_a_profile_beside_the_recipe_will_do(
    api, hub, tmp_path, monkeypatch, guide
):
    monkeypatch.chdir(tmp_path)
    short = RECIPE.replace("samples: 4", "samples: 4, max_tokens: 64")
    asked = parse_recipe(short + WAYS["lewis"].replace("lewis", guide), "recipe.yaml")
    with pytest.raises(RecipeError) as told:
        stream(asked, tmp_path / "work")
    before = hub_digests(hub)

    lewis_hub.calibrate(asked, "importance")
    stream(asked, tmp_path / "work")

    names = ("tests/base", "tests/reverse", "zoo/expert-cipher")
    pinned = [f"{name}@{api.model_info(name).sha}" for name in names]
    whole = ", ".join(pinned if guide == "lewis_reference" else pinned[1:])
    assert str(told.value) == (
        f"recipe: `guide`: it has to load {whole} as whole models, and --stream keeps no whole "
        "model.\nRun `lewis-hub importance` on a machine with enough room: this run uses the "
        "folder importance/ that it writes beside the recipe. Or name a guide that measures block "
        "by block, such as `lewis`."
    )
    assert before == {}
    assert fetched_bytes(hub)["calibrate"] == 0


def test_statistics_that_do_not_fit_are_told_before_a_weight_is_fetched(
    api, hub, tmp_path, monkeypatch
):
    found = shutil.disk_usage(tmp_path)
    small = found._replace(free=5_000_000)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: small if str(tmp_path) in str(path) else found
    )

    with pytest.raises(OutputError) as raised:
        stream(recipe("regmean"), tmp_path / "work")

    assert str(raised.value) == (
        f"{tmp_path}/work.stream.partial/.scratch: the statistics of all experts and two shards "
        "need 0.01 GB, 0.01 GB are free.\nFree some space, or use a larger disk, or a method that "
        "merges without statistics."
    )
    assert hub_digests(hub) == {}
