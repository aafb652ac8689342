"""Merges from Hub to Hub, over HTTP: the same bytes as the local way, and never a whole model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import lewis_hub
from lewis_hub.checkpoint import window
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import seed_hub, zoo_folder
from lewis_hub.errors import LewisHubError, RecipeError
from lewis_hub.files import sha256_of
from lewis_hub.hub.cache import cache_root
from lewis_hub.recipe_file import parse_recipe
from lewis_hub.stages.execution import Execution

REPO = "tests/streamed"
RECIPE = """base_model: tests/base
models:
  - {model: tests/reverse, parameters: {weight: 1.0}}
  - {model: zoo/expert-cipher, parameters: {weight: 0.5}}
merge_method: ties
parameters: {density: 0.4}
publish: {repo: tests/streamed}
"""
GUIDE = "guide: {name: uniform, gamma: 0.3, epsilon: 0.5}\n"
SMALL = Execution(runner="threads:2", max_shard_bytes=700_000)


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    """The zoo, two of its models in three shards each."""
    seed_hub(hub.api())
    for name, repo in (("base", "base"), ("expert-reverse", "reverse")):
        push(hub.api(), f"tests/{repo}", in_shards(zoo_folder() / name, tmp_path / repo))
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return hub.api()


def push(api, repo, folder):
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)


def in_shards(model, folder):
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    tensors = load_file(model / "model.safetensors")
    located = {}
    for i in range(3):
        name = f"model-0000{i + 1}-of-00003.safetensors"
        part = {key: tensor for j, (key, tensor) in enumerate(tensors.items()) if j % 3 == i}
        save_file(part, folder / name, {"format": "pt"})
        located |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": located}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stream(recipe, output, execution=SMALL, progress=None):
    target = lewis_hub.open_target(recipe.publish)
    return lewis_hub.stream(recipe, target, output, execution, progress)


def published(api, repo=REPO):
    """Path -> the sha256 of its bytes."""
    if not api.repo_exists(repo):
        return {}
    paths = [path for path in api.list_repo_files(repo) if path != ".gitattributes"]
    return {path: sha256_of(Path(api.hf_hub_download(repo, path))) for path in paths}


def on_disk(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def same_apart_from_costs(streamed, merged):
    told = {"README.md", "lewis/report.html", "lewis/cost.json", "lewis/provenance.json"}
    assert streamed.keys() == merged.keys()
    assert {p: s for p, s in streamed.items() if p not in told} == {
        p: s for p, s in merged.items() if p not in told
    }


@pytest.mark.parametrize(
    "more", ["", "tokenizer_source: union\n", pytest.param(GUIDE, marks=pytest.mark.slow)]
)
def test_the_bytes_are_those_of_a_local_merge(api, tmp_path, more):
    text = RECIPE.replace("parameters: {density: 0.4}\n", "") if more == GUIDE else RECIPE
    recipe = parse_recipe(text + more, "recipe.yaml")

    found = stream(recipe, tmp_path / "work")

    streamed = published(api)
    lewis_hub.merge_models(recipe, tmp_path / "merged", SMALL)
    merged = on_disk(tmp_path / "merged")
    assert found.changed
    assert len([path for path in merged if path.endswith(".safetensors")]) > 3
    same_apart_from_costs(streamed, merged)


STACK = """slices:
  - sources: [{model: tests/base, layer_range: [0, 2]}]
  - sources: [{model: tests/reverse, layer_range: [1, 3]}]
  - sources: [{model: tests/base, layer_range: [0, 3]}]
merge_method: passthrough
publish: {repo: tests/streamed}
"""


def test_blocks_that_are_stacked_twice_come_twice(api, tmp_path):
    recipe = parse_recipe(STACK, "recipe.yaml")

    stream(recipe, tmp_path / "work")

    streamed = published(api)
    lewis_hub.merge_models(recipe, tmp_path / "merged", SMALL)
    same_apart_from_costs(streamed, on_disk(tmp_path / "merged"))


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


class Watching:
    """A progress that looks at the disk each time that bytes are made."""

    def __init__(self, folder):
        self.folder, self.most = folder, 0

    @contextmanager
    def stage(self, title, total, unit):
        yield lambda _: self.look()

    def look(self):
        self.most = max(self.most, len(list(self.folder.rglob("*.safetensors"))))

    def say(self, text):
        pass


def test_two_shards_lie_on_the_disk_at_most(api, hub, tmp_path):
    hub.faults.delay_s = 0.02  # sending takes longer than making
    progress = Watching(tmp_path / "work.stream.partial")

    stream(parse_recipe(RECIPE, "recipe.yaml"), tmp_path / "work", progress=progress)

    assert progress.most == 2


def test_a_tensor_larger_than_the_window_comes_all_the_same(api, tmp_path, monkeypatch):
    monkeypatch.setattr(window, "WINDOW_BYTES", 60_000)
    monkeypatch.setattr(window, "REQUEST_BYTES", 20_000)
    recipe = parse_recipe(RECIPE, "recipe.yaml")

    stream(recipe, tmp_path / "work")

    streamed = published(api)
    lewis_hub.merge_models(recipe, tmp_path / "merged", SMALL)
    same_apart_from_costs(streamed, on_disk(tmp_path / "merged"))


def test_what_is_here_already_is_read_here(api, hub, tmp_path, monkeypatch):
    local = RECIPE.replace("tests/base", str(in_shards(zoo_folder() / "base", tmp_path / "local")))
    hub.fail("/lfs/[0-9a-f]+/model-0000._", 500, times=1000)
    recipe = parse_recipe(local.replace("tests/reverse", "zoo/expert-reverse"), "recipe.yaml")

    assert stream(recipe, tmp_path / "work").changed


class Counting:
    """A progress that keeps what each stage was told."""

    def __init__(self):
        self.done = {}

    @contextmanager
    def stage(self, title, total, unit):
        yield self.done.setdefault(title, []).append

    def say(self, text):
        pass


# -- trouble on the way

CALLS = [
    ("/resolve/[0-9a-f]+/model", "GET"),
    ("/lfs/", "GET"),
    ("/preupload/", "POST"),
    ("/objects/batch", "POST"),
    ("/lfs-upload/", "PUT"),
    ("/objects/verify", "POST"),
    ("/commit/main", "POST"),
]


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture(scope="module")
def expected():
    """What a merge publishes, by path; filled by the first test that needs it.

    The weights are always the same; the documents name commits, which have dates.
    """
    return {}


SOME = [(500, *CALLS[0]), ("cut", *CALLS[1]), ("drop", *CALLS[4]), (503, *CALLS[6])]
ALL = [(fault, *call) for call in CALLS for fault in (500, 503, 429, "drop", "cut")]


@pytest.mark.parametrize(
    ("fault", "path", "method"),
    [*SOME, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in SOME)],
)
def test_trouble_that_passes_costs_nothing(
    api, hub, tmp_path, no_pauses, expected, path, method, fault
):
    recipe = parse_recipe(RECIPE, "recipe.yaml")
    strike(hub, path, method, fault, 1)

    stream(recipe, tmp_path / "work")

    assert hub.faults.pending == []
    complete(api, recipe, tmp_path, expected)


@pytest.mark.parametrize(
    ("fault", "path", "method"),
    [
        ("drop", *CALLS[1]),
        (503, *CALLS[4]),
        *(pytest.param(503, *call, marks=pytest.mark.slow) for call in CALLS),
        *(pytest.param("drop", *call, marks=pytest.mark.slow) for call in CALLS),
    ],
)
def test_trouble_that_stays_is_one_message_and_a_rerun_completes(
    api, hub, tmp_path, no_pauses, expected, path, method, fault
):
    recipe = parse_recipe(RECIPE, "recipe.yaml")
    strike(hub, path, method, fault, 1000)

    with pytest.raises(LewisHubError) as raised:
        stream(recipe, tmp_path / "work")

    assert re.match(r"tests/[a-z]+|zoo/[a-z-]+", str(raised.value))
    assert published(api) == {}
    hub.faults.clear()
    stream(recipe, tmp_path / "work")
    complete(api, recipe, tmp_path, expected)


def strike(hub, path, method, fault, times):
    if fault == "drop":
        hub.drop(path, times=times, method=method)
    elif fault == "cut":
        hub.drop(path, times=times, method=method, after_bytes=100)
    else:
        hub.fail(path, fault, times=times, method=method)


def complete(api, recipe, tmp_path, expected):
    if not expected:
        lewis_hub.merge_models(recipe, tmp_path / "merged", SMALL)
        expected.update(on_disk(tmp_path / "merged"))
    found = published(api)
    assert found.keys() == expected.keys()
    weights = [path for path in expected if path.endswith((".safetensors", ".index.json"))]
    assert {path: found[path] for path in weights} == {path: expected[path] for path in weights}
    assert [c.title for c in api.list_repo_commits(REPO)].count("Merge with lewis-hub") == 1


def test_a_rerun_neither_makes_nor_sends_again_what_was_sent(api, hub, tmp_path, no_pauses):
    recipe = parse_recipe(RECIPE, "recipe.yaml")
    hub.fail("/commit/main", 500, times=6)
    with pytest.raises(LewisHubError):
        stream(recipe, tmp_path / "work")
    hub.fail("/lfs-upload/", 500, times=1000)
    told = Counting()

    assert stream(recipe, tmp_path / "work", progress=told).changed
    assert len(hub.faults.pending) == 1  # nothing was sent
    assert len(told.done["Merging on the way"]) == 1  # all was done from the beginning


def test_what_the_storage_lost_is_made_again(api, hub, tmp_path, no_pauses, expected):
    recipe = parse_recipe(RECIPE, "recipe.yaml")
    hub.fail("/commit/main", 500, times=6)
    with pytest.raises(LewisHubError):
        stream(recipe, tmp_path / "work")
    (note,) = tmp_path.rglob("model-00002-of-*.safetensors.done.json")
    hub.store.blobs.path(json.loads(note.read_text())["sha256"]).unlink()

    stream(recipe, tmp_path / "work")

    complete(api, recipe, tmp_path, expected)


# -- refusals


def test_a_recipe_that_asks_for_scores_is_refused_before_anything_is_read(hub, tmp_path):
    recipe = parse_recipe(RECIPE + "evaluate: {tasks: [gsm8k]}\n", "recipe.yaml")

    with pytest.raises(RecipeError) as raised:
        lewis_hub.stream(recipe, None, tmp_path / "work")

    assert str(raised.value) == (
        "recipe: `evaluate`: scoring needs whole models on the disk, and --stream keeps none.\n"
        "Add --no-eval, and score the result where it fits: `lewis-hub evaluate REPO`."
    )


@pytest.mark.slow  # it calibrates
def test_a_guide_that_has_to_measure_is_refused_and_a_profile_beside_the_recipe_will_do(
    api, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace("parameters: {density: 0.4}\n", "") + (
        "guide:\n  calibration: {dataset: zoo/reverse, text: '{question} {answer}', samples: 2}\n"
    )
    recipe = parse_recipe(text, "recipe.yaml")
    with pytest.raises(RecipeError) as raised:
        stream(recipe, tmp_path / "work")
    assert published(api) == {}

    lewis_hub.calibrate(recipe, "importance")
    stream(recipe, tmp_path / "work")

    base = api.model_info("tests/base").sha
    assert str(raised.value).startswith(
        f"recipe: `guide`: calibration has to load tests/base@{base}, tests/reverse@"
    )
    assert "lewis/importance.json" in published(api)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stream"], "--stream leaves nothing on this disk: give --push with it."),
        (
            ["--stream", "--push", "--allow-pickle"],
            "--stream reads byte ranges, which pickles do not have.",
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


def test_an_adapter_and_8_bit_floats_come_by_ranges_too(api, tmp_path):
    push(api, "tests/adapter", write_adapter(tmp_path / "adapter"))
    push(api, "tests/eight", in_eight_bit(zoo_folder() / "expert-cipher", tmp_path / "eight"))
    text = RECIPE.replace("tests/reverse", "tests/adapter").replace(
        "zoo/expert-cipher", "tests/eight"
    )
    recipe = parse_recipe(text, "recipe.yaml")

    stream(recipe, tmp_path / "work")

    streamed = published(api)
    lewis_hub.merge_models(recipe, tmp_path / "merged", SMALL)
    same_apart_from_costs(streamed, on_disk(tmp_path / "merged"))


def write_adapter(folder):
    """A LoRA with DoRA's magnitudes, for which the base is read twice."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(zoo_folder() / "base" / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (torch.randn(4, n, generator=generator) / 8 for n in reversed(weight.shape))
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b.T.contiguous()}
            tensors[f"{key}.lora_magnitude_vector"] = weight.float().norm(dim=1)
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def in_eight_bit(model, folder):
    """Its projections as 8-bit floats with a scale a tensor."""
    shutil.copytree(model, folder)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.endswith("proj.weight"):
            scale = weight.float().abs().max().reshape(1) / 448
            tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors[name + "_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the ray extra")
@pytest.mark.filterwarnings("default")  # Ray's own
def test_workers_on_other_machines_read_the_hub_themselves(api, tmp_path, monkeypatch, expected):
    folder = tempfile.mkdtemp(prefix="ray-")  # pytest's is too long for the names of sockets
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for repo in ("tests/base", "tests/reverse", "zoo/expert-cipher"):
        api.update_repo_settings(repo, private=True)  # they have the token of their environment
    recipe = parse_recipe(RECIPE, "recipe.yaml")

    stream(recipe, tmp_path / "work", Execution(runner="ray", max_shard_bytes=700_000))

    complete(api, recipe, tmp_path, expected)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_shards_go_by_xet_where_it_is_installed_and_a_rerun_completes(api, hub, tmp_path, expected):
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
    complete(api, parse_recipe(RECIPE, "recipe.yaml"), tmp_path, expected)
