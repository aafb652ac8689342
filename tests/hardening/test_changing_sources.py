"""A source that is truncated, replaced or deleted while it is read: one message, never a signal."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from effort import SEED, times
from hub_models import altering, tiny, weight_bytes
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from zoo_hub import put_zoo

import lewis_hub
from lewis_hub import pipeline
from lewis_hub.calibration.model import load_model
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import Silent
from lewis_hub.errors import SourceError
from lewis_hub.evaluate.backends import EvaluationSettings, load_backend
from lewis_hub.evaluate.embeddings import load_embedder
from lewis_hub.hub.changes import local_states, require_unchanged
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.ranges import read_range
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resources import Execution

TESTS = Path(__file__).parents[1]


def test_a_source_that_changes_while_it_is_merged_is_one_message(tmp_path):
    n_merges = times(4, 240)
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "hardening.changing", tmp_path, str(n_merges), str(SEED)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    sys.stdout.write("\n".join(" ".join(one) for one in outcomes))  # pytest -rP shows it
    ends = ("refused", "as before", "pinned after the change")
    assert [one for one in outcomes if one[1] not in ends] == []
    assert len(outcomes) == n_merges
    assert [one for one in outcomes if one[1] == "refused"]


class AtStages(Silent):
    """Calls functions when stages begin or end; `calls` and `ends` are title -> function."""

    def __init__(self, calls, ends=None):
        self.calls, self.ends = calls, ends or {}

    @contextmanager
    def stage(self, title, total, unit):
        if title in self.calls:
            self.calls[title]()
        with super().stage(title, total, unit) as advance:
            yield advance
        if title in self.ends:
            self.ends[title]()


def test_weights_that_are_replaced_before_they_are_read_are_refused_and_read_again(tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    weights, kept = base / "model.safetensors", (base / "model.safetensors").read_bytes()
    text = f"{{base_model: {base}, models: [{zoo_folder() / 'expert-reverse'}], "
    recipe = parse_recipe(text + "merge_method: linear}", "recipe.yaml")
    clean = pipeline.merge_models(recipe, tmp_path / "clean").output / "model.safetensors"

    def change():
        weights.write_bytes(kept[:-64] + bytes(64))

    with pytest.raises(SourceError) as caught:
        pipeline.merge_models(recipe, tmp_path / "merged", progress=AtStages({"Merging": change}))
    assert not (tmp_path / "merged").exists()
    weights.write_bytes(kept)
    again = pipeline.merge_models(recipe, tmp_path / "merged").output / "model.safetensors"

    assert str(caught.value) == (
        f"{base}: `model.safetensors` changed while it was read.\nRestore it, then run again."
    )
    assert again.read_bytes() == clean.read_bytes()


def test_pickles_that_are_replaced_before_they_are_converted_are_refused_and_read_again(tmp_path):
    model = shutil.copytree(zoo_folder() / "base", tmp_path / "model")
    tensors, pickle = load_file(model / "model.safetensors"), model / "pytorch_model.bin"
    (model / "model.safetensors").unlink()
    text = f"{{models: [{model}], merge_method: linear}}"

    def write(weights):
        torch.save(weights, pickle)

    def merge(progress):
        allowed = Execution(allow_pickle=True)
        recipe = parse_recipe(text, "recipe.yaml")
        return pipeline.merge_models(recipe, tmp_path / "merged", allowed, progress).output

    def change():
        write({name: 2 * tensor for name, tensor in tensors.items()})

    write(tensors)
    with pytest.raises(SourceError) as caught:
        merge(AtStages({f"Converting {model}": change}))
    write(tensors)

    assert str(caught.value) == (
        f"{model}: `pytorch_model.bin` changed while it was read.\nRestore it, then run again."
    )
    found = load_file(merge(Silent()) / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_stream_uploads_again_what_it_made_of_weights_that_were_replaced(
    hub, monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    base, expert = (tiny(tmp_path / name, seed) for seed, name in enumerate(("base", "expert")))
    weights, kept = expert / "model.safetensors", (expert / "model.safetensors").read_bytes()
    text = f"{{base_model: {base}, models: [{expert}], merge_method: linear, "
    recipe = parse_recipe(text + "publish: {repo: tests/streamed}}", "recipe.yaml")

    def stream(progress):
        target = lewis_hub.open_target(recipe.publish)
        return lewis_hub.stream(recipe, target, tmp_path / "work", progress=progress)

    def change():
        weights.write_bytes(kept[:-2000] + bytes(2000))

    with pytest.raises(SourceError, match="changed while it was read"):
        stream(AtStages({"Merging and uploading": change}))
    weights.write_bytes(kept)

    assert stream(Silent()).changed
    assert lewis_hub.verify("tests/streamed", progress=False, rebuild=True).problems == ()


def test_a_model_gets_no_tokenizer_while_its_weights_are_replaced(hub, tmp_path):
    model = shutil.copytree(zoo_folder() / "base", tmp_path / "model")
    donor = shutil.copytree(zoo_folder() / "base", tmp_path / "donor")
    weights, kept = model / "model.safetensors", (model / "model.safetensors").read_bytes()

    def change():
        weights.write_bytes(kept[:-64] + bytes(64))

    def transplant(name, calls):
        progress = AtStages(calls)
        return lewis_hub.transplant_tokenizer(model, donor, tmp_path / name, progress=progress)

    with pytest.raises(SourceError, match="changed while it was read"):
        transplant("made", {"Writing the model": change})
    weights.write_bytes(kept)

    again, clean = transplant("made", {}), transplant("clean", {})
    assert weight_bytes(again.output) == weight_bytes(clean.output)


@pytest.fixture
def measured(tmp_path):
    """A local base whose weights can be changed and restored, a recipe with it and its texts."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "reverse abc{n}"}}\n' for n in range(8)))
    recipe = parse_recipe(
        f"{{base_model: {base}, models: [{zoo_folder() / 'expert-reverse'}], merge_method: ties, "
        f"guide: {{name: lewis, calibration: {{dataset: {texts}, text: '{{text}}', samples: 4}}}}"
        "}",
        "recipe.yaml",
    )
    weights = base / "model.safetensors"
    kept = weights.read_bytes()

    def change():
        weights.write_bytes(kept[:-9000] + bytes(9000))

    def restore():
        weights.write_bytes(kept)

    return recipe, change, restore


@pytest.mark.parametrize("is_restored_at_once", [False, True])
def test_no_profile_is_kept_of_weights_that_changed_while_they_were_measured(
    is_restored_at_once, measured, tmp_path
):
    recipe, change, restore = measured
    clean = lewis_hub.calibrate(recipe, tmp_path / "clean", progress=False).profile
    ends = {"Calibrating": restore} if is_restored_at_once else {}
    progress = AtStages({"Calibrating": change}, ends)

    with pytest.raises(SourceError, match="while it was read"):
        lewis_hub.calibrate(recipe, tmp_path / "importance", progress=progress)
    assert not (tmp_path / "importance" / "importance.json").exists()
    restore()
    again = lewis_hub.calibrate(recipe, tmp_path / "importance", progress=False).profile

    assert again == clean
    assert not (tmp_path / "importance" / ".measured").exists()


def test_no_profile_of_a_model_alone_is_kept_of_weights_that_changed(measured, tmp_path):
    recipe, change, restore = measured
    asked = (recipe.base_model, recipe.guide.calibration)
    clean = lewis_hub.measure_model(*asked, tmp_path / "clean", progress=False)

    progress = AtStages({"Calibrating": change})
    with pytest.raises(SourceError, match="while it was read"):
        lewis_hub.measure_model(*asked, tmp_path / "one", progress=progress)
    restore()

    assert not (tmp_path / "one" / "importance.json").exists()
    assert lewis_hub.measure_model(*asked, tmp_path / "one", progress=False) == clean


def test_no_trial_is_kept_of_weights_that_changed_while_they_were_tuned(measured, tmp_path):
    recipe, change, restore = measured
    search = lewis_hub.Search(n_trials=2, samples=4, objective="drift")

    def tune(calls):
        return lewis_hub.tune_recipe(recipe, search, tmp_path / "tuned", progress=AtStages(calls))

    with pytest.raises(SourceError, match="while it was read"):
        tune({"Calibrating": change})
    restore()
    again = tune({})
    clean = lewis_hub.tune_recipe(recipe, search, tmp_path / "clean", progress=False)

    assert again.n_begun == 2
    assert [trial.value for trial in again.trials] == [trial.value for trial in clean.trials]
    assert tune({}).n_begun == 0


LOADED = {
    "scored": lambda base: load_backend(base, EvaluationSettings()).model,
    "measured": lambda base: load_model(base, "cpu", str(base)),
    "embedding": lambda base: load_embedder(base, EvaluationSettings(backend="mteb")),
}


@pytest.mark.parametrize("load_base", LOADED.values(), ids=LOADED)
def test_no_weights_of_a_model_that_runs_are_mapped(load_base, tmp_path):
    """A file that was truncated while its model was scored ended the process by a signal."""
    if load_base is LOADED["embedding"]:
        pytest.importorskip("sentence_transformers")
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    weights = base / "model.safetensors"
    tensors = {name: one.float() for name, one in load_file(weights).items()}
    for n in range(64):  # until the values begin at a cache line: else some are copied at once
        save_file(tensors, weights, {"format": "pt", "padding": "x" * n})
        if int.from_bytes(weights.read_bytes()[:8], "little") % 64 == 56:
            break
    model = load_base(base)
    before = {name: one.clone() for name, one in model.named_parameters()}

    with weights.open("rb+") as file:
        file.write(bytes(weights.stat().st_size))

    assert before
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters())


TEXTS = "calibration: {dataset: texts.jsonl, text: '{text}', samples: 6}"
EXPERTS = f"[expert, {zoo_folder()}/expert-cipher]"
METHODS = {
    "Merging": "merge_method: ties\nparameters: {density: 0.5}\n",
    "Calibrating": f"merge_method: ties\nguide: {{name: lewis, {TEXTS}}}\n",
    "Gathering statistics": f"merge_method: regmean\n{TEXTS}\n",
}


@pytest.fixture
def place(tmp_path):
    """A folder with a local expert and with texts."""
    lines = [json.dumps({"text": f"reverse BAKOT{n} and encode OZUN{n}"}) for n in range(6)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shutil.copytree(zoo_folder() / "expert-reverse", tmp_path / "expert")
    return tmp_path


def merge_in(place, name, title, calls=None, ends=None):
    text = f"base_model: {zoo_folder()}/base\nmodels: {EXPERTS}\n{METHODS[title]}"
    recipe = parse_recipe(text, "recipe.yaml").placed_in(place)
    progress = AtStages(calls or {}, ends)
    return lewis_hub.merge_models(recipe, place / name, progress=progress).output


@pytest.mark.parametrize(
    "title", [pytest.param("Calibrating", marks=pytest.mark.slow), "Gathering statistics"]
)
def test_a_rerun_measures_again_if_weights_were_changed_and_restored(place, title):
    weights = place / "expert" / "model.safetensors"
    clean = weight_bytes(merge_in(place, "clean", title))
    change, restore = altering(weights)

    def stop():
        raise KeyboardInterrupt

    for name, calls in (("refused", {}), ("stopped", {"Merging": stop})):
        with pytest.raises((SourceError, KeyboardInterrupt)):
            merge_in(place, name, title, {title: change, **calls})
        restore()
        assert (place / f"{name}.partial").exists()

    for name in ("refused", "stopped"):
        assert weight_bytes(merge_in(place, name, title)) == clean


@pytest.mark.parametrize("title", [*METHODS][1:])
def test_a_configuration_that_is_edited_while_its_model_is_measured_is_refused(place, title):
    """Only the weights were compared: other measurements came with the lock of the clean merge."""
    config = place / "expert" / "config.json"
    kept = config.read_bytes()
    clean = weight_bytes(merge_in(place, "clean", title))

    def edit():
        config.write_text(json.dumps({**json.loads(kept), "rms_norm_eps": 0.5}))

    with pytest.raises(SourceError) as caught:
        merge_in(place, "merged", title, {title: edit})
    assert not (place / "merged").exists()
    config.write_bytes(kept)

    assert str(caught.value) == (
        "expert: `config.json` changed while it was read.\nRestore it, then run again."
    )
    assert weight_bytes(merge_in(place, "merged", title)) == clean


@pytest.mark.parametrize("title", METHODS)
def test_weights_that_are_changed_and_restored_while_they_are_read_are_refused(place, title):
    """Only the content at the end was compared."""
    weights = place / "expert" / "model.safetensors"
    clean = weight_bytes(merge_in(place, "clean", title))
    change, restore = altering(weights)

    with pytest.raises(SourceError, match=r"`model\.safetensors` was written or linked while"):
        merge_in(place, "merged", title, {title: change}, {title: restore})
    assert not (place / "merged").exists()

    assert weight_bytes(merge_in(place, "merged", title)) == clean


def test_no_score_is_told_of_weights_that_changed_while_they_were_scored(hub, place, monkeypatch):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    shutil.copytree(zoo_folder() / "tasks", place / "tasks")
    weights = place / "expert" / "model.safetensors"
    asked = "{tasks: [zoo_reverse], include: tasks, limit: 2, compare: [experts]}"
    text = f"{{base_model: zoo/base, models: [expert], merge_method: linear, evaluate: {asked}}}"
    recipe = parse_recipe(text, "recipe.yaml").placed_in(place)
    change, restore = altering(weights)

    def scored(progress):
        asked = recipe.evaluate.model_copy(update={"include": str(place / "tasks")})
        return lewis_hub.evaluate_model(place / "expert", asked, progress=progress)

    def merge(progress):
        lewis_hub.merge_models(recipe, place / "merged", progress=progress)

    for run in (scored, merge):
        with pytest.raises(SourceError, match=r"`model\.safetensors` was written or linked while"):
            run(AtStages({"Evaluating": change}, {"Evaluating": restore}))
    assert not (place / "merged").exists()
    merge(Silent())

    assert (place / "merged").is_dir()


@pytest.mark.parametrize(
    "file",
    [
        "2_Router/document_0_Dense/model.safetensors",
        "2_Router/router_config.json",
        "12_Dense/model.safetensors",
        "head/vocab.txt",
    ],
)
def test_files_of_modules_of_an_embedding_model_are_compared(file, tmp_path):
    """`modules.json` and routers name folders: what they changed to was scored, without a word."""
    folder = shutil.copytree(zoo_folder() / "base", tmp_path / "model")
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text("first")
    (folder / "modules.json").write_text("[]")
    source = resolve_model(HfApi(endpoint="http://127.0.0.1:9"), str(folder))
    require_unchanged(source)
    states = local_states([source])

    (folder / "README.md").write_text("Better words.")
    require_unchanged(source)
    (folder / file).write_text("other")

    with pytest.raises(SourceError, match=rf"`{file}` changed while it was read"):
        require_unchanged(source)
    assert local_states([source]) != states


def test_a_card_that_its_author_edits_meanwhile_stops_no_merge(place):
    def edit():
        (place / "expert" / "README.md").write_text("Better words.")

    assert merge_in(place, "merged", "Merging", {"Merging": edit}).is_dir()


@pytest.mark.parametrize("is_restored", [False, True])
def test_no_adapter_is_made_of_weights_that_changed_while_they_were_read(place, is_restored):
    expert, base = place / "expert", zoo_folder() / "base"
    settings = lewis_hub.LoraSettings(rank=2, include="proj")

    def extract(name, calls, ends):
        progress = AtStages(calls, ends)
        lewis_hub.extract_lora(expert, base, place / name, settings, progress=progress)
        return weight_bytes(place / name)

    def merge(name, calls, ends):
        text = f"{{base_model: {base}, models: [clean], merge_method: linear}}"
        recipe = parse_recipe(text, "recipe.yaml").placed_in(place)
        lewis_hub.merge_loras(recipe, place / name, progress=AtStages(calls, ends))
        return weight_bytes(place / name)

    def refused(run, title, path):
        change, restore = altering(path)
        with pytest.raises(SourceError) as caught:
            run("refused", {title: change}, {title: restore} if is_restored else {})
        restore()
        return str(caught.value).partition(": ")[2]

    told = "{} changed while it was read.\nRestore it, then run again."
    if is_restored:
        told = "{} was written or linked while it was read.\nRun again when nothing writes it."
    extract("clean", {}, {})
    found = refused(extract, "Extracting", expert / "model.safetensors")
    assert found == told.format("`model.safetensors`")
    adapter = place / "clean" / "adapter_model.safetensors"
    merged = merge("merged", {}, {})
    found = refused(merge, "Merging adapters", adapter)
    assert found == told.format("`adapter_model.safetensors`")
    assert not (place / "refused").exists()
    assert merge("again", {}, {}) == merged


@pytest.mark.parametrize("read", [read_range, read_small])
@pytest.mark.parametrize(
    ("becomes", "problem"),
    [
        ("a folder", "`model.safetensors` changed while it was read.\nRestore it, then run again."),
        (
            "nothing",
            "`model.safetensors` is a link to outside of the folder, or to nothing.\n"
            "Put the file itself in its place.",
        ),
    ],
)
def test_a_local_file_that_is_gone_is_one_message_and_not_asked_for_on_the_hub(
    tmp_path, becomes, problem, read
):
    folder = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    source = resolve_model(HfApi(endpoint="http://127.0.0.1:9"), str(folder))
    (folder / "model.safetensors").unlink()
    if becomes == "a folder":
        (folder / "model.safetensors").mkdir()

    part = (0, 8) if read is read_range else ()
    with pytest.raises(SourceError) as caught:
        read(HfApi(endpoint="http://127.0.0.1:9"), source, "model.safetensors", *part)

    assert str(caught.value).endswith(f": {problem}")
