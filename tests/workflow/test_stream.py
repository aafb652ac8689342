"""Merges from Hub to Hub, over HTTP: the same bytes as the local way, and never a whole model."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from click.testing import CliRunner
from hub_models import push_folder
from streamed_merges import (
    MODEL_BYTES,
    MOST_BYTES,
    REPO,
    SMALL,
    fetched_bytes,
    hub_digests,
    local_digests,
    quantise_to_fp8,
    record_disk_bytes,
    seed,
    shard_model,
    stream,
    without_costs,
    write_adapter,
)

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import RecipeError
from lewis_hub.hub.source import cache_root
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resources import Execution

RECIPE = """base_model: tests/base
models:
  - {model: tests/reverse, parameters: {weight: 1.0}}
  - {model: zoo/expert-cipher, parameters: {weight: 0.5}}
merge_method: ties
parameters: {density: 0.4}
publish: {repo: tests/streamed}
"""
GUIDE = "guide: {name: uniform, gamma: 0.3, epsilon: 0.5}\n"


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    """The zoo, two of its models in three shards each."""
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return seed(hub, tmp_path)


@pytest.mark.parametrize(
    "more", ["", "tokenizer_source: union\n", pytest.param(GUIDE, marks=pytest.mark.slow)]
)
def test_the_bytes_are_those_of_a_local_merge(api, hub, tmp_path, more):
    text = RECIPE.replace("parameters: {density: 0.4}\n", "") if more == GUIDE else RECIPE
    recipe = parse_recipe(text + more, "recipe.yaml")

    found = stream(recipe, tmp_path / "work")

    lewis_hub.merge_models(recipe, tmp_path / "merged", SMALL)
    merged = local_digests(tmp_path / "merged")
    assert found.changed
    assert len([path for path in merged if path.endswith(".safetensors")]) > 3
    assert hub_digests(hub).keys() == merged.keys()
    assert without_costs(hub_digests(hub)) == without_costs(merged)


STACK = """slices:
  - sources: [{model: tests/base, layer_range: [0, 2]}]
  - sources: [{model: tests/reverse, layer_range: [1, 3]}]
  - sources: [{model: tests/base, layer_range: [0, 3]}]
merge_method: passthrough
publish: {repo: tests/streamed}
"""


def test_blocks_that_are_stacked_twice_come_twice(api, hub, tmp_path):
    recipe = parse_recipe(STACK, "recipe.yaml")

    stream(recipe, tmp_path / "work")

    lewis_hub.merge_models(recipe, tmp_path / "merged", SMALL)
    assert without_costs(hub_digests(hub)) == without_costs(local_digests(tmp_path / "merged"))


def test_no_weight_is_kept_and_the_work_leaves_nothing(api, tmp_path):
    (tmp_path / "here").mkdir()

    stream(parse_recipe(RECIPE, "recipe.yaml"), tmp_path / "here" / "work")

    cached = [path.name for path in cache_root().rglob("*.safetensors")]
    assert cached == []
    assert list((tmp_path / "here").iterdir()) == []
    assert sorted(c.title for c in api.list_repo_commits(REPO)) == [
        "Merge with lewis-hub",
        "initial commit",
    ]


def test_what_a_run_left_that_published_and_was_cut_off_then_goes_with_the_next(api, tmp_path):
    recipe, work = parse_recipe(RECIPE, "recipe.yaml"), tmp_path / "here" / "work"
    work.parent.mkdir()
    stream(recipe, work)
    left = work.with_name("work.stream.partial")
    (left / ".scratch").mkdir(parents=True)
    (left / ".scratch" / "importance.json").write_text("{}")

    assert not stream(recipe, work).changed

    assert list(work.parent.iterdir()) == []


def shard_sizes(hub):
    found = {path: sha for path, sha in hub_digests(hub).items() if path.endswith(".safetensors")}
    return [len(hub.store.blobs.path(sha256).read_bytes()) for sha256 in found.values()]


def test_shards_and_what_is_fetched_ahead_take_two_shards_at_most(api, hub, tmp_path):
    with record_disk_bytes(hub, tmp_path / "work") as seen:
        stream(parse_recipe(RECIPE, "recipe.yaml"), tmp_path / "work")

    assert max(shard_sizes(hub)) < max(seen) <= MOST_BYTES


@pytest.mark.slow
def test_a_tensor_that_needs_more_than_two_shards_comes_all_the_same(api, hub, tmp_path):
    recipe = parse_recipe(RECIPE, "recipe.yaml")
    tiny = Execution(runner="threads:2", max_shard_bytes=60_000)

    with record_disk_bytes(hub, tmp_path / "work") as seen:
        stream(recipe, tmp_path / "work", tiny)

    largest = max(shard_sizes(hub))  # of one tensor: it has to lie here, and its three sources
    assert largest > 60_000
    assert max(seen) <= 4 * largest
    lewis_hub.merge_models(recipe, tmp_path / "merged", tiny)
    assert without_costs(hub_digests(hub)) == without_costs(local_digests(tmp_path / "merged"))


def test_what_is_here_already_is_read_here(api, hub, tmp_path, monkeypatch):
    local = RECIPE.replace(
        "tests/base", str(shard_model(zoo_folder() / "base", tmp_path / "local"))
    )
    hub.fail("/lfs/[0-9a-f]+/model-0000._", 500, times=1000)
    recipe = parse_recipe(local.replace("tests/reverse", "zoo/expert-reverse"), "recipe.yaml")

    assert stream(recipe, tmp_path / "work").changed
    assert fetched_bytes(hub) == {"merge": 2 * MODEL_BYTES}


# -- refusals


def test_a_recipe_that_asks_for_scores_is_refused_before_anything_is_read(hub, tmp_path):
    recipe = parse_recipe(RECIPE + "evaluate: {tasks: [gsm8k]}\n", "recipe.yaml")

    with pytest.raises(RecipeError) as raised:
        lewis_hub.stream(recipe, None, tmp_path / "work")

    assert str(raised.value) == (
        "recipe: `evaluate`: scoring needs whole models on the disk, and --stream keeps none.\n"
        "Add --no-eval, and score the result on a larger disk: `lewis-hub evaluate REPO`."
    )


def test_a_quality_gate_is_refused_with_the_ways_out(hub, tmp_path):
    gate = "gate: {task: gsm8k, metric: 'exact_match,none', not_worse_than: [base]}"
    recipe = parse_recipe(RECIPE + f"evaluate: {{tasks: [gsm8k], {gate}}}\n", "recipe.yaml")

    with pytest.raises(RecipeError) as raised:
        lewis_hub.stream(recipe, None, tmp_path / "work")

    assert str(raised.value) == (
        "recipe: `evaluate.gate`: scoring needs whole models on the disk, and --stream keeps none."
        "\nA gate needs the scores before the push. Merge without --stream on a machine with "
        "enough disk, for example with `--on jobs`; or remove the gate, then add --no-eval."
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stream"], "--stream does not keep the merge on this disk: add --push."),
        (
            ["--stream", "--push", "--allow-pickle"],
            "--stream cannot read pickle files: remove --allow-pickle.",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, words, told):
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    done = CliRunner().invoke(cli, ["merge", str(tmp_path / "recipe.yaml"), *words])

    assert done.exit_code == 2
    assert told in done.output


def test_the_command_tells_where_the_merge_is(api, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    done = CliRunner().invoke(
        cli, ["merge", str(tmp_path / "recipe.yaml"), "--stream", "--push", "--json", "-q"]
    )

    document = json.loads(done.stdout)
    assert document["status"] == "merged"
    assert document["output"] is None
    assert document["url"] == f"{api.endpoint}/{REPO}"
    assert [path.name for path in tmp_path.glob("*.partial")] == []


# -- other sources, other machines


def test_an_adapter_and_8_bit_floats_come_by_ranges_too(api, hub, tmp_path):
    push_folder(api, write_adapter(tmp_path / "adapter"), "tests/adapter")
    push_folder(
        api, quantise_to_fp8(zoo_folder() / "expert-cipher", tmp_path / "eight"), "tests/eight"
    )
    text = RECIPE.replace("tests/reverse", "tests/adapter").replace(
        "zoo/expert-cipher", "tests/eight"
    )
    recipe = parse_recipe(text, "recipe.yaml")

    stream(recipe, tmp_path / "work")

    lewis_hub.merge_models(recipe, tmp_path / "merged", SMALL)
    assert without_costs(hub_digests(hub)) == without_costs(local_digests(tmp_path / "merged"))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the ray extra")
@pytest.mark.filterwarnings("default")  # Ray's own
def test_workers_on_other_machines_read_the_hub_themselves(api, hub, tmp_path, monkeypatch):
    folder = tempfile.mkdtemp(prefix="ray-")  # pytest's is too long for the names of sockets
    monkeypatch.setenv("RAY_TMPDIR", folder)
    for repo in ("tests/base", "tests/reverse", "zoo/expert-cipher"):
        api.update_repo_settings(repo, private=True)  # they have the token of their environment
    recipe = parse_recipe(RECIPE, "recipe.yaml")

    stream(recipe, tmp_path / "work", Execution(runner="ray", max_shard_bytes=700_000))

    lewis_hub.merge_models(recipe, tmp_path / "merged", SMALL)
    assert without_costs(hub_digests(hub)) == without_costs(local_digests(tmp_path / "merged"))
    assert fetched_bytes(hub) == {}  # the workers do not count
    shutil.rmtree(folder)


@pytest.mark.slow
def test_shards_go_by_xet_where_it_is_installed_and_a_rerun_completes(api, hub, tmp_path):
    pytest.importorskip("hf_xet")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "lewis_hub", "merge", "--stream", "--push"]
    command += ["--max-shard-size", "700KB", "--json", "-q"]
    environment = os.environ | {"HF_HUB_DISABLE_XET": "0"}
    hub.fail("/commit/main", 403, times=1)

    refused = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)

    assert refused.returncode == 1
    assert done.returncode == 0, done.stderr.decode()
    lewis_hub.merge_models(parse_recipe(RECIPE, "recipe.yaml"), tmp_path / "merged", SMALL)
    assert without_costs(hub_digests(hub)) == without_costs(local_digests(tmp_path / "merged"))
