"""Merges of sentence-transformers models: pooling and dense layers behind the transformer."""

from __future__ import annotations

import json

import pytest
import yaml
from sentence_models import SETTINGS, embedder

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import CheckFailedError, SourceError
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.merge.modules import module_problems


def recipe(tmp_path, base, expert):
    document = {
        "base_model": str(base),
        "models": [{"model": str(expert), "parameters": {"weight": 0.5}}],
        "merge_method": "task_arithmetic",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    return lewis_hub.read_recipe(tmp_path / "recipe.yaml")


def test_a_merge_has_the_modules_and_gives_embeddings_of_their_size(tmp_path):
    sentences = pytest.importorskip("sentence_transformers")
    base, expert = embedder(tmp_path / "base", 0), embedder(tmp_path / "expert", 1)

    merged = lewis_hub.merge_models(recipe(tmp_path, base, expert), tmp_path / "out").output

    for path, settings in SETTINGS.items():
        assert json.loads((merged / path / "config.json").read_text()) == settings
    layer = "2_Dense/model.safetensors"
    assert (merged / layer).read_bytes() == (base / layer).read_bytes()
    found, ends = (
        sentences.SentenceTransformer(str(folder), device="cpu").encode(["a cat", "a dog"])
        for folder in (merged, base)
    )
    assert found.shape == (2, 8)
    assert (found != ends).any()


def test_other_weights_of_a_module_are_a_problem_before_any_download(tmp_path):
    base, expert = embedder(tmp_path / "base", 0), embedder(tmp_path / "expert", 1, dense=1)
    asked = recipe(tmp_path, base, expert)

    with pytest.raises(CheckFailedError) as caught:
        lewis_hub.merge_models(asked, tmp_path / "out")

    problem = (
        f"{expert} and {base} have different weights in 2_Dense/model.safetensors, which are not "
        "merged. Merge models that share these layers, or their transformers without "
        "`modules.json`."
    )
    assert lewis_hub.check(asked).problems == (problem,)
    assert problem in str(caught.value)


def test_the_weights_of_a_module_that_is_listed_very_often_are_compared_once(api, tmp_path):
    base, expert = embedder(tmp_path / "base", 0), embedder(tmp_path / "expert", 1, dense=1)
    sources = [resolve_model(api, str(folder), None) for folder in (base, expert)]
    read = []

    def content(source, path):
        read.append(path)
        listed = json.dumps([{"path": "2_Dense"}] * 1000).encode()
        return listed if path == "modules.json" else source.name.encode()

    assert len(module_problems(sources, content)) == 1
    assert read == ["modules.json", *["2_Dense/model.safetensors"] * 2]


def test_pickled_weights_of_a_module_are_a_problem(tmp_path):
    base, expert = embedder(tmp_path / "base", 0), embedder(tmp_path / "expert", 1)
    weights = base / "2_Dense" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    (expert / "2_Dense" / "model.safetensors").unlink()

    [problem] = lewis_hub.check(recipe(tmp_path, base, expert)).problems

    assert problem == (
        f"{base}: the weights of its module 2_Dense are in 2_Dense/pytorch_model.bin only, which "
        "is not read. Load it in sentence-transformers and save it again."
    )


@pytest.mark.parametrize(
    "file", ["router_config.json", "lstm_config.json", "vocab.txt", "query_0_Dense/config.json"]
)
def test_a_module_with_other_files_is_refused(file, api, tmp_path):
    """The merge had no such file, and could not be loaded."""
    base, expert = embedder(tmp_path / "base", 0), embedder(tmp_path / "expert", 1)
    (base / "2_Dense" / file).parent.mkdir(exist_ok=True)
    (base / "2_Dense" / file).write_text("{}")
    (base / "2_Dense" / "pytorch_model.bin").write_bytes(b"")  # other files are no part of it

    with pytest.raises(SourceError) as caught:
        lewis_hub.merge_models(recipe(tmp_path, base, expert), tmp_path / "out")

    assert str(caught.value) == (
        f"{base}: its module 2_Dense needs 2_Dense/{file}, which is not carried.\n"
        "Merge models whose modules have a config.json and a model.safetensors only, such as Dense."
    )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ('[{"path": "pooling"}]', "names the folder 'pooling', whose files are not carried"),
        ('[{"path": "../1_Dense"}]', "names the folder '../1_Dense', whose files are not carried"),
        ('{"path": 1}', "`modules.json` is no list of modules: "),
        ("[", "`modules.json` is no list of modules: "),
    ],
)
def test_a_list_of_modules_that_cannot_be_carried_is_refused(api, tmp_path, listed, said):
    base, expert = embedder(tmp_path / "base", 0), embedder(tmp_path / "expert", 1)
    (base / "modules.json").write_text(listed)

    with pytest.raises(SourceError) as caught:
        lewis_hub.merge_models(recipe(tmp_path, base, expert), tmp_path / "out")

    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{base}: ")
    assert not list(tmp_path.glob("out*"))


def test_a_model_without_modules_has_no_problem_with_them(api):
    source = resolve_model(api, str(zoo_folder() / "base"), None)

    assert module_problems([source, source], lambda *_: None) == []
