"""LoRA adapters of the zoo's base as experts, over HTTP, from the recipe to the scores."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lewis_hub
from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import AdapterError, CheckFailedError, SourceError
from lewis_hub.merge.workspace import SCRATCH
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.report.lock import Lock
from lewis_hub.workflow.resources import Execution

RECIPE = """base_model: zoo/base
models:
  - model: ADAPTER
    parameters: {weight: 1.0}
  - model: zoo/expert-cipher
    parameters: {weight: 0.5}
merge_method: ties
"""
DENSITY = "parameters: {density: 0.4}\n"
GUIDE = """guide:
  calibration: {dataset: zoo/reverse, text: "{question} {answer}", samples: 2}
"""


def write_adapter(folder, licence="apache-2.0", seed=0, **config):
    """A small random LoRA on two kinds of modules, as PEFT saves it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(zoo_folder() / "base" / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "down_proj")):
            key, (n_out, n_in) = f"base_model.model.{module}", weight.shape
            a, b = (torch.randn(s, generator=generator) / 8 for s in ((4, n_in), (n_out, 4)))
            tensors |= {f"{key}.lora_A.weight": a.bfloat16(), f"{key}.lora_B.weight": b.bfloat16()}
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "zoo/base"}
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return folder


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter")


def recipe(adapter, more=DENSITY):
    return parse_recipe(RECIPE.replace("ADAPTER", str(adapter)) + more, "recipe.yaml")


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def pushed(api, adapter, repo="zoo/lora"):
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=adapter)
    return repo


def test_check_shows_an_adapter_with_its_own_size_and_the_bases_vocabulary(api, adapter, hub):
    pushed(api, adapter)

    report = pipeline.check(recipe("zoo/lora"))

    assert report.problems == report.notes == ()
    base, shown, _ = report.sources
    assert (shown.role, shown.name, shown.dtype) == ("adapter", "zoo/lora", "BF16")
    assert shown.size_bytes == (adapter / "adapter_model.safetensors").stat().st_size
    assert shown.n_parameters == 6 * 4 * (128 + 128 + 352 + 128)
    assert (shown.n_vocabulary, shown.tied) == (base.n_vocabulary, base.tied) == (390, True)
    assert shown.licence == "apache-2.0"
    plain = pipeline.check(recipe("zoo/expert-reverse"))
    assert report.memory_bytes - plain.memory_bytes == 4 * shown.n_parameters
    assert report.disk_bytes == plain.disk_bytes == report.output_bytes


def test_check_counts_the_experts_that_are_written_out_to_be_loaded(api, adapter):
    base_bytes = sum(
        tensor.nbytes for tensor in load_file(zoo_folder() / "base" / "model.safetensors").values()
    )

    def disk_bytes(more):
        return pipeline.check(recipe(adapter, more)).disk_bytes

    uniform = GUIDE.replace("guide:", "guide:\n  name: uniform")
    scored = "evaluate: {tasks: [zoo_reverse], include: TASKS, compare: COMPARE}\n"
    scored = scored.replace("TASKS", str(zoo_folder() / "tasks"))
    plain = disk_bytes(DENSITY)
    assert disk_bytes(uniform) == plain
    assert disk_bytes(GUIDE) == plain + base_bytes
    assert disk_bytes(DENSITY + scored.replace("COMPARE", "[base]")) == plain
    assert disk_bytes(DENSITY + scored.replace("COMPARE", "[experts]")) == plain + base_bytes


def test_an_adapter_merges_as_its_float32_expert_does_and_from_the_hub_as_from_a_folder(
    api, adapter, tmp_path
):
    alone = RECIPE.partition("  - model: zoo/expert-cipher")[0].replace("ADAPTER", str(adapter))
    dense = parse_recipe(alone + "merge_method: linear\ndtype: float32\n", "recipe.yaml")
    pipeline.merge_models(dense, tmp_path / "dense")
    shutil.rmtree(tmp_path / "dense" / "lewis")
    pushed(api, adapter)

    for name, source in {
        "from a folder": adapter,
        "from the hub": "zoo/lora",
        "on its base": "zoo/base+zoo/lora",
        "whole": tmp_path / "dense",
    }.items():
        pipeline.merge_models(recipe(source), tmp_path / name)

    found = weights(tmp_path / "from a folder")
    assert found == weights(tmp_path / "from the hub")
    assert found == weights(tmp_path / "on its base")
    assert found == weights(tmp_path / "whole")
    merged = load_file(tmp_path / "whole" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_a_merge_with_an_adapter_leaves_a_recipe_and_a_mergekit_configuration_that_name_it(
    api, adapter, tmp_path
):
    sha = api.repo_info(pushed(api, adapter)).sha
    pipeline.merge_models(recipe("zoo/base+zoo/lora"), tmp_path / "out")

    again = lewis_hub.read_recipe(tmp_path / "out" / "lewis" / "recipe.yaml")
    assert str(again.models[0].model) == f"zoo/lora@{sha}"
    base = again.base_model
    assert f"- model: {base}+zoo/lora@{sha}" in (tmp_path / "out/mergekit_config.yml").read_text()
    lock = Lock.from_json((tmp_path / "out" / "lewis" / "lock.json").read_text())
    assert set(lock.inputs[1].files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert pipeline.merge_models(recipe("zoo/lora"), tmp_path / "out").status == "unchanged"
    assert pipeline.merge_models(again, tmp_path / "again").status == "merged"
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


def test_a_guide_measures_an_adapter_as_the_expert_that_it_makes(
    api, adapter, tmp_path, stage_titles
):
    alone = RECIPE.partition("  - model: zoo/expert-cipher")[0].replace("ADAPTER", str(adapter))
    dense = parse_recipe(alone + "merge_method: linear\n", "recipe.yaml")
    pipeline.merge_models(dense, tmp_path / "dense")
    shutil.rmtree(tmp_path / "dense" / "lewis")
    said = stage_titles()
    left = tmp_path / "one" / f"{SCRATCH}killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()

    measured = pipeline.calibrate(recipe(adapter, GUIDE), tmp_path / "one", progress=said)
    whole = pipeline.calibrate(recipe(tmp_path / "dense", GUIDE), tmp_path / "two")

    assert measured.profile.experts[0].modules == whole.profile.experts[0].modules
    title = f"Writing out {adapter} on its base"
    assert said.titles == ["Downloading", title, "Calibrating"]
    assert not list((tmp_path / "one").glob(f"{SCRATCH}*"))
    again = stage_titles()
    pipeline.calibrate(recipe(adapter, GUIDE), tmp_path / "one", progress=again)
    assert again.titles == ["Downloading", "Calibrating"]


def test_a_measurement_of_an_adapter_on_another_base_is_not_taken_for_its_own(
    api, adapter, tmp_path, stage_titles
):
    pipeline.calibrate(recipe(adapter, GUIDE), tmp_path / "out")
    text = RECIPE.replace("zoo/base", "zoo/expert-reverse").replace("ADAPTER", str(adapter))
    said = stage_titles()

    pipeline.calibrate(parse_recipe(text + GUIDE, "r.yaml"), tmp_path / "out", progress=said)

    assert f"Writing out {adapter} on its base" in said.titles


@pytest.mark.slow  # scores four models
def test_an_adapter_is_scored_as_an_expert_beside_the_merge(api, adapter, tmp_path, stage_titles):
    tasks = zoo_folder() / "tasks"
    more = f"{DENSITY}evaluate: {{tasks: [zoo_reverse], include: {tasks}, limit: 3}}\n"
    said = stage_titles()

    merged = pipeline.merge_models(recipe(adapter, more), tmp_path / "out", Execution(), said)

    labels = [label.partition("@")[0] for label in merged.scores.tasks["zoo_reverse"].models]
    assert labels == ["base", f"expert:{adapter}", "expert:zoo/expert-cipher", "merged"]
    assert f"Writing out {adapter} on its base" in said.titles
    assert not list((tmp_path / "out").rglob("adapters"))


def problem(recipe, error=SourceError):
    with pytest.raises(error) as caught:
        pipeline.check(recipe)
    return str(caught.value)


def test_an_adapter_needs_a_base_that_is_a_whole_model(api, adapter, tmp_path):
    needs = (
        f"{adapter}: this is a LoRA adapter, and its base model is not given.\n"
        "Its adapter_config.json names zoo/base: write `base_model: zoo/base`, and list the "
        "adapter under `models`."
    )
    without = RECIPE.replace("base_model: zoo/base\n", "").replace("ties", "linear")
    under = RECIPE.replace("base_model: zoo/base", f"base_model: {adapter}")

    assert problem(parse_recipe(without.replace("ADAPTER", str(adapter)), "r.yaml")) == needs
    assert problem(parse_recipe(under.replace("ADAPTER", "zoo/expert-reverse"), "r.yaml")) == needs
    with pytest.raises(SourceError) as caught:
        lewis_hub.evaluate_model(
            lewis_hub.ModelReference(name=str(adapter)),
            lewis_hub.Evaluation(tasks=("zoo_reverse",), include=str(zoo_folder() / "tasks")),
        )
    assert str(caught.value) == needs
    silent = write_adapter(tmp_path / "silent", base_model_name_or_path=None)
    assert problem(parse_recipe(without.replace("ADAPTER", str(silent)), "r.yaml")).endswith(
        "\nName its base as the recipe's `base_model`, and list the adapter under `models`."
    )


def test_a_model_with_an_adapter_on_it_is_not_scored_by_itself(api):
    tasks = lewis_hub.Evaluation(tasks=("zoo_reverse",), include=str(zoo_folder() / "tasks"))
    model = lewis_hub.ModelReference.model_validate("zoo/base+zoo/expert-reverse")

    with pytest.raises(SourceError) as caught:
        lewis_hub.evaluate_model(model, tasks)

    assert str(caught.value) == (
        "zoo/base+zoo/expert-reverse: `+` adds a LoRA adapter to a model, which only a merge can "
        "do.\nMerge it first: a recipe with `merge_method: linear` and the adapter alone."
    )


def test_only_an_adapter_is_put_on_a_base(api):
    text = problem(recipe("zoo/base+zoo/expert-reverse"))

    assert text.startswith("zoo/expert-reverse@")
    assert text.endswith(
        ": this is a whole model, but `+` adds a LoRA adapter to a model.\n"
        "Remove the part before the `+`."
    )


def test_a_quantised_base_is_told_before_its_adapters(api, adapter, tmp_path):
    shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    text = RECIPE.replace("zoo/base", str(tmp_path / "base")).replace("ADAPTER", str(adapter))

    assert "is quantised (hqq)" in problem(parse_recipe(text, "r.yaml"), CheckFailedError)


def test_an_adapter_that_asks_for_more_is_refused_with_nothing_downloaded(api, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", layer_replication=[[0, 2], [1, 3]])
    sha = api.repo_info(pushed(api, adapter)).sha

    text = problem(recipe("zoo/lora"), AdapterError)

    assert text.startswith(
        f"zoo/lora@{sha}: adapter_config.json: `layer_replication` is set, and this version does "
        "not know how it changes weights.\nMerge it into its base with peft"
    )


@pytest.mark.parametrize("told", ["zoo/base", "FOLDER", None])
def test_the_base_that_an_adapter_names_is_told_by_repo_or_folder(api, tmp_path, told):
    base = zoo_folder() / "base" if told == "FOLDER" else "zoo/base"
    named = told and str(base)
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=named)
    text = RECIPE.replace("base_model: zoo/base", f"base_model: {base}")

    report = pipeline.check(parse_recipe(text.replace("ADAPTER", str(adapter)) + DENSITY, "r.yaml"))

    assert report.notes == ()


def test_another_base_than_the_adapter_names_is_a_note(api, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path="other/base")

    report = pipeline.check(recipe(adapter))

    assert report.problems == ()
    assert report.notes == (
        f"{adapter} was trained on 'other/base' but is put on zoo/base. Every tensor fits, but an "
        "adapter works best on the model that it was trained on.",
    )


@pytest.mark.parametrize("told", ["\ud800", "a\0b", "a" * 300, "~nobody-here/base"])
def test_the_base_that_an_adapter_names_may_be_no_path_and_no_repo(api, tmp_path, told):
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=told)
    text = RECIPE.replace("base_model: zoo/base", f"base_model: {zoo_folder() / 'base'}")

    report = pipeline.check(parse_recipe(text.replace("ADAPTER", str(adapter)) + DENSITY, "r.yaml"))

    assert [note.startswith(f"{adapter} was trained on {told!r}") for note in report.notes] == [
        True
    ]


def test_embeddings_that_are_the_head_as_well_are_a_note(api, adapter):
    path = adapter / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens"
    tensors = load_file(path) | {
        f"{key}.lora_embedding_A": torch.ones(4, 390),
        f"{key}.lora_embedding_B": torch.ones(128, 4),
    }
    save_file(tensors, path)

    assert pipeline.check(recipe(adapter)).notes == (
        f"{adapter} changes model.embed_tokens.weight, which is the head of zoo/base as well: the "
        "merged head changes with it, as it does in peft's `merge_and_unload`.",
    )


@pytest.mark.parametrize("says_so", [True, False])
def test_saved_embeddings_that_are_the_head_as_well_are_a_note(api, adapter, tmp_path, says_so):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is True
    if not says_so:  # as in files of Gemma, where it is the default
        (base / "config.json").write_text(json.dumps(config))
    path = adapter / "adapter_model.safetensors"
    saved = {"base_model.model.model.embed_tokens.weight": torch.ones(390, 128)}
    save_file(load_file(path) | saved, path)
    text = RECIPE.replace("zoo/base", str(base)).replace("ADAPTER", str(adapter)) + DENSITY

    notes = pipeline.check(parse_recipe(text, "recipe.yaml")).notes

    assert notes[-1] == (
        f"{adapter} changes model.embed_tokens.weight, which is the head of {base} as well: the "
        "merged head changes with it, but in peft only with `ensure_weight_tying`."
    )


def test_licences_of_adapters_count(api, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", licence="mit")

    problems = pipeline.check(recipe(adapter, DENSITY + "publish: {repo: me/merge}\n")).problems

    assert len(problems) == 1
    assert "the parents' licences differ" in problems[0]
    assert f"{adapter}: mit" in problems[0]
