"""Models of pickled weights alone, from a folder and over HTTP: refused, or read when allowed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hub_models import DENSITY, RECIPE, push_folder, recipe, weight_bytes
from safetensors.torch import load_file

from lewis_hub import pipeline
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import CheckFailedError, OutputError, PickleError, SourceError
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.report.lock import Lock
from lewis_hub.workflow.resources import Execution

GUIDE = """guide:
  calibration: {dataset: zoo/reverse, text: "{question} {answer}", samples: 2}
"""
ALLOWED = Execution(allow_pickle=True)
EMBED = "model.embed_tokens.weight"


def write_pickles(folder, source="expert-reverse", n_shards=1, change=None):
    """A model of the zoo as transformers wrote it before safetensors, its tied head included."""
    shutil.copytree(zoo_folder() / source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors |= {"lm_head.weight": tensors[EMBED]} | (change or {})
    if n_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = list(tensors)
    located = {}
    for i in range(n_shards):
        file = f"pytorch_model-{i + 1:05d}-of-{n_shards:05d}.bin"
        held = {name: tensors[name] for name in names[i::n_shards]}
        torch.save(held, folder / file)
        located |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": located}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def cached(pattern):
    return sorted(path.name for path in Path(os.environ["HF_HOME"]).rglob(pattern))


@pytest.mark.parametrize("n_shards", [1, 3])
def test_pickles_merge_as_their_safetensors_twin_does_from_the_hub_too(api, tmp_path, n_shards):
    folder = write_pickles(tmp_path / "pickles", n_shards=n_shards)
    push_folder(api, folder, "zoo/pickles")
    pipeline.merge_models(recipe(), tmp_path / "out" / "twin")

    for name, expert in {"folder": folder, "hub": "zoo/pickles"}.items():
        pipeline.merge_models(recipe(expert=expert), tmp_path / "out" / name, ALLOWED)

    found = weight_bytes(tmp_path / "out" / "twin")
    assert (
        found == weight_bytes(tmp_path / "out" / "folder") == weight_bytes(tmp_path / "out" / "hub")
    )
    assert cached("model*.safetensors").count("model.safetensors") >= 1


def test_a_base_of_pickles_gives_a_merge_that_loads(api, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    push_folder(api, write_pickles(tmp_path / "base", "base", n_shards=2), "zoo/pickles")
    pipeline.merge_models(recipe(base="zoo/pickles"), tmp_path / "out", ALLOWED)
    pipeline.merge_models(recipe(), tmp_path / "twin")

    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = load_file(tmp_path / "twin" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size
    left = {path.name for path in (tmp_path / "out").rglob("*")}
    assert not left & {"converted.json", "pytorch_model.bin.index.json"}
    lock = Lock.from_json((tmp_path / "out" / "lewis" / "lock.json").read_text())
    assert "model-00001-of-00002.safetensors" in lock.inputs[0].files
    assert lock.inputs[0].commit_sha == api.repo_info("zoo/pickles").sha


def test_a_conversion_is_done_once_and_the_merge_is_known_again(api, tmp_path, stage_titles):
    push_folder(api, write_pickles(tmp_path / "pickles"), "zoo/pickles")
    first, again, other = stage_titles(), stage_titles(), stage_titles()
    asked = recipe(expert="zoo/pickles")

    pipeline.merge_models(asked, tmp_path / "out", ALLOWED, first)
    unchanged = pipeline.merge_models(asked, tmp_path / "out", ALLOWED, again)
    pipeline.merge_models(asked, tmp_path / "other", ALLOWED, other)

    assert first.titles[:2] == ["Downloading", "Converting zoo/pickles"]
    assert unchanged.status == "unchanged"
    assert again.titles == []
    assert "Converting zoo/pickles" not in other.titles
    assert cached(".work-*") == []


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        pytest.param("tokenizer.json", marks=pytest.mark.slow),
        "converted.json",
    ],
)
@pytest.mark.parametrize("harm", ["a bit", "cut", "deleted"])
def test_a_conversion_that_is_damaged_is_made_again(api, tmp_path, stage_titles, name, harm):
    push_folder(api, write_pickles(tmp_path / "pickles"), "zoo/pickles")
    asked, titles = recipe(expert="zoo/pickles"), stage_titles()
    pipeline.merge_models(asked, tmp_path / "good", ALLOWED)
    (note,) = Path(os.environ["HF_HOME"]).rglob("converted.json")
    file = note.with_name(name)
    content = file.read_bytes()
    place = len(content) * 9 // 10
    harmed = content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]
    file.write_bytes(harmed if harm == "a bit" else content[:place])
    if harm == "deleted":
        file.unlink()

    pipeline.merge_models(asked, tmp_path / "out", ALLOWED, titles)

    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "good")
    assert "Converting zoo/pickles" in titles.titles
    assert file.read_bytes() == content


def test_a_merge_of_steps_is_another_one_if_its_pickles_change(api, tmp_path):
    folder = write_pickles(tmp_path / "pickles")
    text = f"base_model: zoo/base\nmodels: [NAME]\nmerge_method: ties\n{DENSITY}"
    step = f"name: step\n{text.replace('NAME', str(folder))}---\n"
    asked = parse_recipe(step + text.replace("NAME", "step"), "recipe.yaml")

    def merge():
        return pipeline.merge_models(asked, tmp_path / "out", ALLOWED, progress=False).status

    assert (merge(), merge()) == ("merged", "unchanged")
    shutil.rmtree(folder)
    write_pickles(folder, "expert-cipher")
    with pytest.raises(OutputError, match="holds something else than this merge"):
        merge()


def test_without_the_flag_pickles_are_refused_with_the_risk_and_nothing_is_downloaded(
    api, tmp_path
):
    sha = api.repo_info(push_folder(api, write_pickles(tmp_path / "pickles"), "zoo/pickles")).sha
    file = tmp_path / "recipe.yaml"
    text = (RECIPE + DENSITY).replace("BASE", "zoo/base").replace("EXPERT", "zoo/pickles")
    file.write_text(text)

    for command in (["check"], ["merge", "-o", str(tmp_path / "out")]):
        done = CliRunner().invoke(cli, [*command, str(file)])
        assert done.exit_code == 1
        assert str(done.exception) == (
            f"zoo/pickles@{sha}: this repo has pickled weights only, and reading those can run "
            "code.\nOnly safetensors are read. Convert it: load it in transformers, then "
            "`save_pretrained(FOLDER)`, and use FOLDER; or ask its author for safetensors.\n"
            "With `--allow-pickle` torch reads it without running its code, but a flaw in "
            "that reader would let its author run code here: allow it for authors that you trust."
        )
    assert cached("*.bin") == []


def test_check_says_what_it_cannot_know_of_pickles_until_they_are_here(api, tmp_path):
    folder = write_pickles(tmp_path / "pickles")
    push_folder(api, folder, "zoo/pickles")
    size = (folder / "pytorch_model.bin").stat().st_size
    plain = pipeline.check(recipe())

    report = pipeline.check(recipe(expert="zoo/pickles"), allow_pickle=True)

    assert report.problems == ()
    assert report.notes == (
        "zoo/pickles has only pickled weights. Their content is known once they are downloaded "
        "and converted to safetensors, so this check cannot say whether they fit; the sizes shown "
        "are those of the files.",
    )
    shown = report.sources[1]
    assert (shown.dtype, shown.n_parameters, shown.size_bytes) == ("?", 0, size)
    assert (shown.n_vocabulary, shown.tied) == (390, True)
    assert report.download_bytes >= size
    assert report.disk_bytes == plain.disk_bytes + size
    assert cached("*.bin") == []
    file = tmp_path / "recipe.yaml"
    text = RECIPE.replace("BASE", "zoo/pickles").replace("EXPERT", "zoo/expert-reverse")
    file.write_text(text)
    done = CliRunner().invoke(cli, ["check", "--allow-pickle", str(file)])
    assert done.exit_code == 0
    assert "only pickled weights" in done.stdout
    pipeline.merge_models(recipe(expert="zoo/pickles"), tmp_path / "out", ALLOWED)
    known = pipeline.check(recipe(expert="zoo/pickles"), allow_pickle=True)
    assert known.notes == ()
    assert known.sources[1].dtype == "BF16"
    assert known.sources[1].n_parameters == plain.sources[1].n_parameters


def test_the_commands_take_the_flag(api, tmp_path):
    folder = write_pickles(tmp_path / "pickles")
    for command, more in (("merge", DENSITY), ("importance", GUIDE)):
        file = tmp_path / f"{command}.yaml"
        text = RECIPE.replace("BASE", "zoo/base").replace("EXPERT", str(folder))
        file.write_text(text + more)
        output = tmp_path / command

        done = CliRunner().invoke(cli, [command, "--allow-pickle", "-o", str(output), str(file)])

        assert done.exit_code == 0
        assert output.is_dir()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("command", ["merge", "importance"])
def test_a_malicious_pickle_is_refused_and_not_executed(api, tmp_path, command):
    proof = tmp_path / "proof"
    folder = write_pickles(tmp_path / "pickles", change={"x": Malicious(proof)})
    sha = api.repo_info(push_folder(api, folder, "zoo/pickles")).sha
    more = GUIDE if command == "importance" else DENSITY
    asked = recipe(expert="zoo/pickles", more=more)
    runs = {
        "merge": lambda: pipeline.merge_models(asked, tmp_path / "out", ALLOWED),
        "importance": lambda: pipeline.calibrate(asked, tmp_path / "out", ALLOWED),
    }

    with pytest.raises(PickleError) as caught:
        runs[command]()

    assert str(caught.value).startswith(
        f"zoo/pickles@{sha}: pytorch_model.bin: it contains `posix.system`, but only "
        "tensors are read from a pickle.\n"
    )
    assert not proof.exists()
    assert not (tmp_path / "out").exists()
    assert cached(".work-*") == cached("converted.json") == []


@pytest.mark.slow
def test_a_guide_measures_pickles_as_their_safetensors_twin(api, tmp_path):
    folder = write_pickles(tmp_path / "pickles", n_shards=2)

    measured = pipeline.calibrate(recipe(expert=folder, more=GUIDE), tmp_path / "one", ALLOWED)
    twin = pipeline.calibrate(recipe(more=GUIDE), tmp_path / "two")

    assert [s.modules for s in measured.profile.sources] == [
        s.modules for s in twin.profile.sources
    ]


@pytest.mark.slow  # scores two models
def test_pickles_alone_are_scored_when_that_is_allowed(api, tmp_path):
    folder = write_pickles(tmp_path / "pickles")
    asked = ["--task", "zoo_reverse", "--include", str(zoo_folder() / "tasks"), "--limit", "4"]

    refused = CliRunner().invoke(cli, ["evaluate", str(folder), *asked, "--json"])
    done, twin = (
        CliRunner().invoke(cli, ["evaluate", str(model), *asked, "--json", "-q", *more])
        for model, more in ((folder, ["--allow-pickle"]), ("zoo/expert-reverse", []))
    )

    assert "pickled weights only" in str(refused.exception)
    found = [json.loads(one.stdout)["tasks"]["zoo_reverse"]["models"] for one in (done, twin)]
    assert [*found[0].values()] == [*found[1].values()]


def test_what_else_is_wrong_is_told_before_pickles_are_downloaded(api, tmp_path):
    push_folder(api, write_pickles(tmp_path / "pickles"), "zoo/pickles")
    wrong = recipe(expert="zoo/pickles", more=DENSITY + "evaluate: {tasks: [zoo_revers]}\n")

    with pytest.raises(CheckFailedError, match="zoo_revers"):
        pipeline.merge_models(wrong, tmp_path / "out", ALLOWED)

    assert cached("*.bin") == []


def test_pickles_that_do_not_fit_are_told_once_they_are_known(api, tmp_path):
    change = {"model.norm.weight": torch.ones(3)}
    folder = write_pickles(tmp_path / "pickles", change=change)

    with pytest.raises(CheckFailedError, match=r"has model.norm.weight of shape \[3\]"):
        pipeline.merge_models(recipe(expert=folder), tmp_path / "out", ALLOWED)


def test_pickles_of_a_quantised_model_are_refused_before_they_are_downloaded(api, tmp_path):
    folder = write_pickles(tmp_path / "pickles")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (folder / "config.json").write_text(json.dumps(config))
    push_folder(api, folder, "zoo/pickles")

    with pytest.raises(CheckFailedError, match=r"zoo/pickles is quantised \(hqq\)"):
        pipeline.merge_models(recipe(expert="zoo/pickles"), tmp_path / "out", ALLOWED)

    assert cached("*.bin") == []


def test_a_missing_file_of_pickles_is_told(api, tmp_path):
    folder = write_pickles(tmp_path / "pickles", n_shards=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()

    with pytest.raises(SourceError) as caught:
        pipeline.merge_models(recipe(expert=folder), tmp_path / "out", ALLOWED)

    assert str(caught.value) == (
        f"{folder}: it has 2 of 3 files of pickled weights.\nUse an intact copy."
    )


def test_code_of_a_model_with_pickles_is_carried_where_it_is_allowed(api, tmp_path):
    folder = write_pickles(tmp_path / "base", "base")
    (folder / "modeling_own.py").write_text("x = 1\n")
    push_folder(api, folder, "zoo/pickles")
    more = DENSITY + "allow_code: [zoo/pickles]\n"

    pipeline.merge_models(recipe(base="zoo/pickles", more=more), tmp_path / "with", ALLOWED)
    pipeline.merge_models(recipe(base="zoo/pickles"), tmp_path / "without", ALLOWED)

    assert (tmp_path / "with" / "modeling_own.py").exists()
    assert not (tmp_path / "without" / "modeling_own.py").exists()


def test_a_merge_of_pickles_is_made_again_where_that_is_allowed(api, tmp_path):
    push_folder(api, write_pickles(tmp_path / "pickles"), "zoo/pickles")
    pipeline.merge_models(recipe(expert="zoo/pickles"), tmp_path / "out", ALLOWED)
    command = ["verify", str(tmp_path / "out"), "--rebuild", "--json"]

    refused = CliRunner().invoke(cli, command)
    done = CliRunner().invoke(cli, [*command, "--allow-pickle"])

    assert "pickled weights only" in str(refused.exception)
    assert json.loads(done.stdout)["status"] == "verified"


def test_an_adapter_may_be_put_on_a_base_of_pickles(api, tmp_path):
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(2, 128),
        f"{key}.lora_B.weight": torch.ones(128, 2),
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    folder = write_pickles(tmp_path / "base", "base")

    assert pipeline.check(recipe(folder, adapter), allow_pickle=True).problems == ()
    pipeline.merge_models(recipe(folder, adapter), tmp_path / "one", ALLOWED)
    pipeline.merge_models(recipe("zoo/base", adapter), tmp_path / "two")

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
