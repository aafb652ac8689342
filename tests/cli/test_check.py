"""The message of `lewis-hub check` for valid recipes that cannot be merged."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from zoo_hub import put_zoo

from lewis_hub import pipeline
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import size
from lewis_hub.errors import LewisHubError, SourceError, SourcesError
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow import resolve

RECIPE = """base_model: zoo/base
models:
  - model: zoo/expert-reverse
    parameters: {weight: 1.0}
merge_method: ties
"""
GUIDE = 'guide: {calibration: {dataset: zoo/reverse, text: "{question} {answer}"}}\n'
PUBLISH = "publish: {repo: someone/merge}\n"

# problem -> (recipe, part of the message); `TMP` is replaced by a folder
BROKEN = {
    "base is not there": (
        RECIPE.replace("zoo/base", "zoo/bse"),
        "zoo/bse: no model of this name on http://127.0.0.1",
    ),
    "expert is not there": (RECIPE.replace("expert-reverse", "expert"), "zoo/expert"),
    "revision is not there": (
        RECIPE.replace("expert-reverse", "expert-reverse@v9"),
        "v9",
    ),
    "expert is a dataset": (RECIPE.replace("zoo/expert-reverse", "zoo/reverse"), "dataset"),
    "dataset is a model": (RECIPE + GUIDE.replace("zoo/reverse", "zoo/base"), "model"),
    "dataset is not there": (RECIPE + GUIDE.replace("zoo/reverse", "zoo/nothing"), "zoo/nothing"),
    "folder is not there": (
        RECIPE.replace("zoo/expert-reverse", "./nothing"),
        "no such file or folder",
    ),
    "rows are not there": (
        RECIPE + GUIDE.replace("zoo/reverse", "data/missing.jsonl"),
        "data/missing.jsonl: no such file or folder: looked for TMP/data/missing.jsonl",
    ),
    "folder is empty": (RECIPE.replace("zoo/expert-reverse", "TMP/empty"), "the folder is empty"),
    "name is no repo": (RECIPE.replace("zoo/expert-reverse", "'a b c'"), "neither an existing"),
    "gated": (RECIPE.replace("expert-reverse", "gated"), "gated"),
    "private": (RECIPE.replace("zoo/expert-reverse", "other/private"), "other/private"),
    "pickles only": (RECIPE.replace("zoo/expert-reverse", "TMP/pickles"), "pickled weights only"),
    "adapter is broken": (
        RECIPE.replace("zoo/expert-reverse", "TMP/adapter"),
        "adapter_model.safetensors: it has 1 bytes",
    ),
    "adapter of another kind": (
        RECIPE.replace("zoo/expert-reverse", "TMP/ia3"),
        "adapter_config.json: it is an adapter of type 'IA3'",
    ),
    "adapter as base": (RECIPE.replace("zoo/base", "TMP/adapter"), "its base model is not given"),
    "adapter on another base": (
        RECIPE.replace("zoo/expert-reverse", "zoo/other+TMP/ia3"),
        "zoo/other: no model of this name",
    ),
    "quantised": (RECIPE.replace("zoo/expert-reverse", "TMP/quantised"), "is quantised (hqq)"),
    "no configuration": (RECIPE.replace("zoo/expert-reverse", "TMP/bare"), "no config.json"),
    "broken header": (RECIPE.replace("zoo/expert-reverse", "TMP/broken"), "model.safetensors"),
    "other shape": (RECIPE.replace("zoo/expert-reverse", "TMP/wide"), "of shape [2, 2]"),
    "other depth": (RECIPE.replace("zoo/expert-reverse", "TMP/shallow"), "lacks"),
    "other vocabulary": (RECIPE.replace("zoo/expert-reverse", "TMP/words"), "a vocabulary of"),
    "other tokens": (
        RECIPE.replace("zoo/expert-reverse", "TMP/renamed"),
        "id 4 is '<|renamed|>' in TMP/renamed and '<|assistant|>' in zoo/base, so the rows of",
    ),
    "tokenizer that cannot be united": (
        RECIPE.replace("zoo/expert-reverse", "TMP/slow") + "tokenizer_source: union\n",
        "TMP/slow: it has no tokenizer.json, which is needed to add tokens",
    ),
    "tokenizer of no model": (RECIPE + "tokenizer_source: zoo/nothing\n", "not one of the models"),
    "method is not there": (RECIPE.replace("ties", "tise"), "Did you mean `ties`?"),
    "method of a later version": (RECIPE.replace("ties", "emr"), "it is not known in this version"),
    "parameter is unknown": (
        RECIPE.replace("weight: 1.0", "wieght: 1.0"),
        "Did you mean `weight`?",
    ),
    "trim where there is none": (
        RECIPE.replace("ties", "linear") + "parameters: {trim: magnitude}\n",
        "`linear` has no such parameter",
    ),
    "filter fits nothing": (
        RECIPE.replace("weight: 1.0", "weight: [{filter: mpl, value: 1}, {value: 0.5}]"),
        "mpl",
    ),
    "no base for ties": (RECIPE.replace("base_model: zoo/base\n", ""), "needs a base"),
    "guide without densities": (
        RECIPE.replace("ties", "task_arithmetic") + GUIDE,
        "keeps every entry, so densities would have no effect",
    ),
    "task is unknown": (RECIPE + "evaluate: {tasks: [zoo_revers]}\n", "zoo_revers"),
    "include is not there": (
        RECIPE + "evaluate: {tasks: [a], include: TMP/nothing}\n",
        "nothing",
    ),
    "licences differ": (
        RECIPE.replace("zoo/expert-reverse", "TMP/mit") + PUBLISH,
        "the parents' licences differ",
    ),
}


@pytest.fixture
def folders(tmp_path):
    tensors = load_file(zoo_folder() / "base" / "model.safetensors")
    names = list(tensors)
    norm = next(name for name in names if name.endswith("input_layernorm.weight"))
    embedding = next(name for name in names if "embed" in name)

    def model(name, change=None, **config):
        folder = tmp_path / name
        folder.mkdir()
        told = json.loads((zoo_folder() / "base" / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(told))
        save_file(tensors | (change or {}), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    for name, kind in (("adapter", "LORA"), ("ia3", "IA3")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"x")
    model("quantised", quantization_config={"quant_method": "hqq"})
    (model("bare") / "config.json").unlink()
    (model("broken") / "model.safetensors").write_bytes(b"\xff" * 64)
    model("wide", {norm: torch.zeros(2, 2)})
    n_rows, width = tensors[embedding].shape
    told = (zoo_folder() / "base" / "tokenizer.json").read_text(encoding="utf-8")
    renamed = told.replace("<|assistant|>", "<|renamed|>")
    (model("renamed") / "tokenizer.json").write_text(renamed, encoding="utf-8")
    (model("slow") / "vocab.json").write_text('{"neverseen": 0}')
    model("words", {embedding: torch.zeros(n_rows + 8, width)})
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".5." not in name},
        model("shallow") / "model.safetensors",
    )
    (model("mit") / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path


@pytest.fixture
def seeded(hub):
    put_zoo(hub)
    api = hub.api()
    api.create_repo("zoo/gated")
    api.upload_folder(repo_id="zoo/gated", folder_path=zoo_folder() / "base")
    api.update_repo_settings("zoo/gated", gated="auto")
    hub.add_token("hf_other", "other", "write")
    hub.api("hf_other").create_repo("other/private", private=True)
    return hub


def test_check_reports_the_problem_of_each_broken_recipe(seeded, folders, monkeypatch):
    seeded.add_token("hf_reader", "reader", "read")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    monkeypatch.chdir(folders)
    wrong = {}
    for kind, (text, message) in BROKEN.items():
        text = text.replace("TMP", str(folders))
        try:
            said = "\n".join(pipeline.check(parse_recipe(text, "recipe.yaml")).problems)
        except LewisHubError as error:
            said = str(error)
        message = message.replace("TMP", str(folders))
        if not (re.search(message, said) or message in said):
            wrong[kind] = said
        assert "hf_reader" not in said
        assert "Traceback" not in said

    assert wrong == {}


def test_check_shows_the_sources_and_exits_with_1_if_there_is_a_problem(
    seeded, folders, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", seeded.write_token)
    recipe = folders / "recipe.yaml"
    recipe.write_text(RECIPE.replace("zoo/expert-reverse", str(folders / "wide")))

    done = CliRunner().invoke(cli, ["check", str(recipe)])

    assert done.exit_code == 1
    assert "problem: " in done.stdout
    recipe.write_text(RECIPE)
    done = CliRunner().invoke(cli, ["check", str(recipe)])
    assert done.exit_code == 0
    assert "No problems found." in done.stdout
    assert "apache-2.0" in done.stdout


def test_check_tells_which_benchmarks_need_permission(seeded, folders, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", seeded.write_token)
    recipe = folders / "recipe.yaml"
    recipe.write_text(f"{RECIPE}\nevaluate: {{tasks: [humaneval]}}\n")

    done = CliRunner().invoke(cli, ["check", str(recipe)])

    assert done.exit_code == 0
    expected = "note: humaneval: runs code that the model writes. Allow it with "
    assert f"{expected}`--allow-code-execution`" in " ".join(done.stdout.split())


def test_all_models_that_cannot_be_used_are_reported_at_once(seeded, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", seeded.write_token)
    text = RECIPE.replace("zoo/base", "zoo/bse").replace("zoo/expert-reverse", "./nothing")

    with pytest.raises(SourcesError) as caught:
        pipeline.check(parse_recipe(text, "recipe.yaml"))

    first, *rest = str(caught.value).splitlines()
    assert first == "2 models of the recipe cannot be used:"
    assert rest[0].startswith(f"- zoo/bse: no model of this name on {seeded.url}")
    assert rest[1] == "  Check the spelling, and whose token this is: `hf auth whoami`."
    assert rest[2].startswith("- ./nothing: no such file or folder")


def test_a_hub_that_does_not_answer_is_reported_once():
    recipe = parse_recipe(RECIPE, "recipe.yaml")

    with pytest.raises(SourceError, match="^zoo/base: cannot reach"):
        resolve.resolve_inputs(recipe, HfApi(endpoint="http://127.0.0.1:9"))


def test_the_document_has_everything_that_the_table_has(seeded, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", seeded.write_token)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    report = pipeline.check(parse_recipe(RECIPE, "recipe.yaml"))

    done = CliRunner().invoke(cli, ["check", str(tmp_path / "recipe.yaml"), "--json"])

    document = json.loads(done.stdout)
    for row, source in zip(report.table.rows, document["sources"], strict=True):
        assert row == (
            source["role"],
            source["name"],
            source["commit_sha"][:8],
            size(source["size_bytes"]),
            source["dtype"],
            f"{source['n_parameters']:,}",
            f"{source['n_vocabulary']:,}",
            "yes" if source["tied"] else "no",
            source["licence"],
        )
    needs = ("download_bytes", "disk_bytes", "memory_bytes", "output_bytes")
    assert report.lines[0] == "download {}, disk {}, memory at most {}, merged model {}".format(
        *(size(document[name]) for name in needs)
    )
    assert (document["notes"], document["problems"]) == (list(report.notes), [])
