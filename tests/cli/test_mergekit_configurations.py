"""A mergekit configuration runs as it is, with mergekit's spelling of the command."""

import json

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit_configurations import CONFIGURATIONS, write_models
from safetensors.torch import load_file

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.errors import RecipeError
from lewis_hub.methods.ties import ties
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.report.lock import Lock
from lewis_hub.workflow.resolve import hub_api, require_streamable, resolve_inputs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def merge(models, monkeypatch, name, output):
    monkeypatch.chdir(models)
    config = models / "config.yaml"
    config.write_text(CONFIGURATIONS[name])
    run = CliRunner().invoke(cli, ["merge", "config.yaml", str(output)])
    assert run.exit_code == 0, run.output
    return run, load_file(output / "model.safetensors")


def test_there_are_28_configurations():
    assert len(CONFIGURATIONS) == 28


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_of_mergekit_runs_as_it_is(models, monkeypatch, tmp_path, name):
    _, merged = merge(models, monkeypatch, name, tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    blocks = {key.split(".")[2] for key in merged if key.startswith("model.layers.")}
    assert config["num_hidden_layers"] == len(blocks)
    assert {str(tensor.dtype) for tensor in merged.values()} == {f"torch.{config['dtype']}"}
    assert not list(tmp_path.glob("out.*"))  # nothing is left of merges on the way


def test_parameters_without_effect_are_noted_by_name(models, monkeypatch, tmp_path):
    run, _ = merge(models, monkeypatch, "model_stock, weight", tmp_path / "out")

    assert (
        "note: `model_stock` does not use `normalize` in `parameters`: it has no effect.\n"
        "note: `model_stock` does not use `weight` in `models[0].parameters`: it has no effect.\n"
    ) in run.stderr


def test_the_name_of_a_merge_is_the_title_of_its_card(models, monkeypatch, tmp_path):
    merge(models, monkeypatch, "ties, numbers for true", tmp_path / "out")

    assert "\n# blend\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_setting_of_all_models_has_no_effect_on_one(models, monkeypatch, tmp_path):
    run, _ = merge(models, monkeypatch, "ties, numbers for true", tmp_path / "out")

    assert (
        "note: `ties` does not use `normalize` in `models[1].parameters`: it has no effect. "
        "It takes one value for all models: write it in the recipe's `parameters`.\n"
    ) in run.stderr


def test_several_documents_are_merged_in_order_of_need(models, monkeypatch, tmp_path):
    run, merged = merge(models, monkeypatch, "several documents", tmp_path / "out")

    told = [line for line in run.stderr.splitlines() if line.startswith("Merging ")]
    assert [line.split(" (")[0] for line in told if "before" in line] == [
        *("Merging first", "Merging org/base+org/lora-code", "Merging second"),
    ]
    recipe = yaml.safe_load((tmp_path / "out" / "lewis" / "recipe.yaml").read_text())
    assert [one["name"] for one in recipe["intermediate"]] == ["first", "second"]
    assert [one["model"] for one in recipe["models"]] == ["first", "second"]
    lock = Lock.from_json((tmp_path / "out" / "lewis" / "lock.json").read_text())
    assert [one.name for one in lock.inputs] == ["org/base", "first", "second"]
    assert not (tmp_path / "out" / "mergekit_config.yml").exists()


def test_finished_steps_of_an_interrupted_run_are_kept(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    config, text = models / "config.yaml", CONFIGURATIONS["several documents"]
    config.write_text(text.replace("weight: 0.25", "weight: {filter: no_such, value: 0.25}"))
    words = ["merge", "config.yaml", str(tmp_path / "out")]

    failed = CliRunner().invoke(cli, words)

    assert "filter `no_such`" in str(failed.exception)
    assert len(list((tmp_path / "out.parts").glob("*/model.safetensors"))) == 2
    config.write_text(text)
    again = CliRunner().invoke(cli, words)
    assert again.exit_code == 0, again.output
    assert again.stderr.count("Merging: done") == 1  # the last merge
    assert "org/lora-code" not in again.stderr  # the base of a finished step is not made again
    assert not (tmp_path / "out.parts").exists()
    assert "Nothing changed" in CliRunner().invoke(cli, words).stdout


def test_a_step_that_was_edited_after_an_interrupted_run_is_made_anew(
    models, monkeypatch, tmp_path
):
    monkeypatch.chdir(models)
    step = "name: NAME\nbase_model: org/base\nmodels: [{model: MODEL, parameters: {weight: 0.5}}]\n"
    step += "merge_method: task_arithmetic\ndtype: bfloat16\n---\n"
    first = step.replace("NAME", "first").replace("MODEL", "org/math")
    second = step.replace("NAME", "second").replace("MODEL", "first")
    last = step.replace("name: NAME\n", "").replace("MODEL", "second").replace("---\n", "")

    def run(text, output):
        (models / "config.yaml").write_text(text)
        return CliRunner().invoke(cli, ["merge", "config.yaml", str(tmp_path / output)])

    failed = run(first + second + last.replace("0.5", "{filter: no_such, value: 0.5}"), "out")
    assert "filter `no_such`" in str(failed.exception)
    edited = first.replace("0.5", "0.25") + second + last

    assert run(edited, "out").exit_code == run(edited, "clean").exit_code == 0
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "clean"))
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())


def test_a_step_with_an_adapter_of_its_own_keeps_the_steps_before_it(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    first, second = (
        f"models: [{{model: org/math}}, {{model: org/{other}}}]\nmerge_method: linear\nname: {name}"
        for name, other in (("first", "code"), ("second", "base+org/lora-code"))
    )
    last = "models: [{model: first}, {model: second}]\nmerge_method: linear\n"
    (models / "config.yaml").write_text("\n---\n".join([first, second, last]))

    run = CliRunner().invoke(cli, ["merge", "config.yaml", str(tmp_path / "out")])

    assert run.exit_code == 0, run.output
    math, code = (load_file(models / f"org/{one}/model.safetensors") for one in ("math", "code"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"  # without an adapter
    base = load_file(models / "org/base/model.safetensors")[name]
    expected = ((math[name] + code[name]) / 2 + (math[name] + base) / 2) / 2
    torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("base_model: org/base", "base_model: org/bse", "org/bse: no model of this name"),
        ("weight: 0.25", "wight: 0.25", "the last merge: parameter `wight`: `task_arithmetic` has"),
    ],
)
def test_a_mistake_in_the_last_document_is_found_before_the_first_merge(
    hub, models, monkeypatch, tmp_path, right, wrong, says
):
    monkeypatch.chdir(models)
    text = CONFIGURATIONS["several documents"].replace(right, wrong)
    (models / "config.yaml").write_text(text)

    failed = CliRunner().invoke(cli, ["merge", "config.yaml", str(tmp_path / "out")])

    assert says in str(failed.exception)
    assert not list(tmp_path.iterdir())


def test_a_check_of_several_documents_looks_at_those_that_need_no_other(models, monkeypatch):
    monkeypatch.chdir(models)
    config, text = models / "config.yaml", CONFIGURATIONS["several documents"]
    config.write_text(text)

    fine = CliRunner().invoke(cli, ["check", "config.yaml"])
    config.write_text(text.replace("weight: 0.25", "wight: 0.25"))
    wrong = CliRunner().invoke(cli, ["check", "config.yaml"])

    assert fine.exit_code == 0, fine.output
    note = "note: what uses first is checked when that is merged; the sizes are those of first."
    assert note in fine.stdout
    assert wrong.exit_code == 1
    assert "problem: the last merge: parameter `wight`: `task_arithmetic` has no" in wrong.stdout


def test_only_a_merge_on_this_disk_goes_through_several_documents():
    recipe = parse_recipe(CONFIGURATIONS["several documents"], "config.yaml")

    with pytest.raises(RecipeError) as streamed:
        require_streamable(recipe)
    with pytest.raises(RecipeError) as resolved:
        resolve_inputs(recipe, hub_api())

    assert "--stream keeps no model on this disk, but first is merged before." in str(
        streamed.value
    )
    assert str(resolved.value) == (
        "recipe: `models`: it uses `first`, `second`, which is a merge itself.\n"
        "Only `lewis-hub merge` makes it on the way: make it first, and name its folder."
    )


def test_the_output_is_named_once(models, monkeypatch):
    monkeypatch.chdir(models)

    run = CliRunner().invoke(cli, ["merge", "config.yaml", "out", "-o", "other"])

    assert run.exit_code == 2
    assert "OUT and --output both name the folder for the merged model: give one." in run.output


@pytest.mark.parametrize(
    "name",
    [pytest.param("several documents", marks=pytest.mark.slow), "adapters on several bases"],
)
def test_a_merge_in_several_steps_is_repeated_from_its_own_recipe(
    models, monkeypatch, tmp_path, name
):
    _, merged = merge(models, monkeypatch, name, tmp_path / "out")
    words = ["merge", str(tmp_path / "out" / "lewis" / "recipe.yaml"), str(tmp_path / "again")]

    run = CliRunner().invoke(cli, words)

    assert run.exit_code == 0, run.output
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in merged.items())
    locks = [tmp_path / folder / "lewis" / "lock.json" for folder in ("out", "again")]
    assert len({Lock.from_json(lock.read_text()).digest for lock in locks}) == 1
    assert lewis_hub.verify(tmp_path / "out", rebuild=True).problems == ()


def test_an_adapter_on_its_base_is_the_sum_of_both(models, monkeypatch, tmp_path):
    """The base of the task vectors is `org/chat` with its adapter, computed by hand."""
    _, merged = merge(models, monkeypatch, "adapters on several bases", tmp_path / "out")

    def whole(base, adapter):
        tensors = load_file(models / "org" / base / "model.safetensors")
        lora = load_file(models / "org" / adapter / "adapter_model.safetensors")
        for key in [key for key in lora if "lora_A" in key]:
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            tensors[name] += 8 / 4 * lora[key.replace("lora_A", "lora_B")] @ lora[key]
        return tensors

    base = whole("chat", "lora-math")
    experts = [whole("base", "lora-math"), whole("code", "lora-code")]
    for key, tensor in merged.items():
        vectors = torch.stack([expert[key] - base[key] for expert in experts])
        expected = ties(base[key], vectors, weights=torch.full((2,), 0.5), densities=[0.5] * 2)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_float64_computes_in_float64(models, monkeypatch, tmp_path):
    _, merged = merge(models, monkeypatch, "modules in float64", tmp_path / "out")
    name = "model.layers.5.mlp.up_proj.weight"  # of the last block, where the gradient is 1

    base, math, code = (
        load_file(models / "org" / one / "model.safetensors")[name].double()
        for one in ("base", "math", "code")
    )
    expected = ties(
        base,
        torch.stack([math, code]) - base,
        weights=torch.tensor([0.5, 1.0], dtype=torch.float64),
        densities=[0.5, 0.5],
        lambda_=0.9,
    )
    assert torch.equal(merged[name], expected.float())
    exported = yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())
    assert (exported["dtype"], exported["out_dtype"]) == ("float64", "float32")
