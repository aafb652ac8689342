"""Heads and tensors that not every source stores, from the recipe to a model that loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.recipe.read import parse_recipe

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def zoo(tmp_path, hub):
    """Writes variants of the zoo's models, and recipes of them."""

    def model(name, of="base", change=None, *, without=(), tied=True):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("config.json", "generation_config.json", "tokenizer.json"):
            (folder / file).write_bytes((zoo_folder() / of / file).read_bytes())
        told = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
        if tied is None:
            del told["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(told))
        tensors = load_file(zoo_folder() / of / "model.safetensors")
        tensors = {n: t.clone() for n, t in (tensors | (change or {})).items() if n not in without}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return tensors

    def recipe(more=""):
        text = f"base_model: {tmp_path}/b\nmodels: [{{model: {tmp_path}/e}}]\nmerge_method: ties\n"
        return parse_recipe(text + more, "recipe.yaml")

    def merged(more=""):
        lewis_hub.merge_models(recipe(more), tmp_path / "out")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        return load_file(tmp_path / "out" / "model.safetensors"), loaded

    model.recipe, model.merged = recipe, merged
    return model


def head(seed):
    return torch.randn(390, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("tied", [True, None])
def test_a_tied_expert_that_stores_its_head_too_is_merged_as_a_tied_one(zoo, tmp_path, tied):
    zoo("b", tied=tied)
    own = load_file(zoo_folder() / "expert-reverse" / "model.safetensors")
    zoo("e", "expert-reverse", {HEAD: own[EMBEDDING]}, tied=tied)

    lewis_hub.merge_models(zoo.recipe(), tmp_path / "out")

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert HEAD not in tensors
    assert torch.equal(tensors[EMBEDDING], own[EMBEDDING])


def test_a_tied_base_that_stores_its_head_gets_the_expert_s_embedding_as_its_head(zoo):
    base = load_file(zoo_folder() / "base" / "model.safetensors")
    zoo("b", change={HEAD: base[EMBEDDING]})
    expert = zoo("e", "expert-reverse")

    tensors, loaded = zoo.merged()

    assert torch.equal(tensors[HEAD], expert[EMBEDDING])
    assert torch.equal(loaded.lm_head.weight.bfloat16(), expert[EMBEDDING])


ALIKE = {
    "dare_ties": "merge_method: dare_ties\nparameters: {density: 0.5, weight: 0.5}\n",
    "della": "merge_method: della\nparameters: {density: 0.5, weight: 0.5}\n",
    "by name": "merge_method: linear\n"
    "parameters: {weight: [{filter: head, value: 2}, {value: 1}]}\n",
    "regmean": "merge_method: regmean\nparameters: {embeddings: true}\nTEXTS",
    "in sequence": "merge_method: regmean\nparameters: {embeddings: true, inputs: merged}\nTEXTS",
}


@pytest.mark.parametrize("how", ALIKE)
def test_a_head_that_is_tied_in_all_sources_stays_so(how, zoo, tmp_path):
    """Streams of random bits, filters and statistics go by the names of tensors."""
    parts = {"b": "base", "e": "expert-reverse", "f": "expert-cipher"}
    for name, of in parts.items():
        own = load_file(zoo_folder() / of / "model.safetensors")[EMBEDDING]
        zoo(name, of, {HEAD: own} if name != "f" else None)
    (tmp_path / "texts.jsonl").write_text('{"text": "reverse abc"}\n{"text": "cipher bcd"}\n')
    texts = 'calibration: {dataset: texts.jsonl, text: "{text}"}\n'.replace(
        "texts.jsonl", f"{tmp_path}/texts.jsonl"
    )
    models = "".join(f"  - {{model: {tmp_path / name}}}\n" for name in "ef")
    text = f"base_model: {tmp_path}/b\nmodels:\n{models}" + ALIKE[how].replace("TEXTS", texts)

    lewis_hub.merge_models(parse_recipe(text, "recipe.yaml"), tmp_path / "out")

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors[HEAD], tensors[EMBEDDING])
    assert not torch.equal(tensors[HEAD], load_file(tmp_path / "b" / "model.safetensors")[HEAD])


def test_a_head_of_one_s_own_is_refused_or_left_out_as_the_recipe_says(zoo):
    zoo("b")
    expert = zoo("e", "expert-reverse", {HEAD: head(1)}, tied=False)

    (problem,) = lewis_hub.check(zoo.recipe()).problems
    assert "has a lm_head.weight of its own" in problem
    assert "set `missing: base` to leave its head out" in problem
    told = lewis_hub.check(zoo.recipe("missing: base\n"))
    assert told.problems == ()
    assert any("lm_head.weight of" in note and "left out" in note for note in told.notes)
    tensors, _ = zoo.merged("missing: base\n")

    assert set(tensors) == set(expert) - {HEAD}


HEAD_OF_ITS_OWN = "has a lm_head.weight of its own, the base"


def test_a_head_of_one_s_own_is_refused_too_if_the_tied_base_stores_a_copy(zoo, tmp_path):
    base = zoo(
        "b", change={HEAD: load_file(zoo_folder() / "base" / "model.safetensors")[EMBEDDING]}
    )
    zoo("e", "expert-reverse", {HEAD: head(1)}, tied=False)

    def stacked(first, last):
        sources = [f"[{{model: {tmp_path}/{name}, layer_range: [0, 4]}}]" for name in (first, last)]
        slices = "".join(f"- sources: {one}\n" for one in sources)
        text = f"base_model: {tmp_path}/b\nslices:\n{slices}merge_method: passthrough\n"
        return lewis_hub.check(parse_recipe(text, "recipe.yaml")).problems

    (problem,) = lewis_hub.check(zoo.recipe()).problems
    assert HEAD_OF_ITS_OWN in problem
    assert "lm_head.weight" in stacked("b", "e")[0]
    assert stacked("e", "b") == ()
    tensors, loaded = zoo.merged("missing: base\n")

    assert set(tensors) == set(base) - {HEAD}
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


@pytest.mark.parametrize("saved", ["its own", "the embeddings", "with the embeddings"])
def test_an_adapter_s_head_is_refused_unless_it_is_tied_as_the_base_s(zoo, tmp_path, saved):
    zoo("b", change={HEAD: load_file(zoo_folder() / "base" / "model.safetensors")[EMBEDDING]})
    (tmp_path / "e").mkdir()
    stored = {f"base_model.model.{HEAD}": head(1)}
    if saved != "its own":
        stored[f"base_model.model.{EMBEDDING}"] = head(1)
    save_file(stored, tmp_path / "e" / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "modules_to_save": ["lm_head"]}
    told |= {"ensure_weight_tying": True} if saved == "with the embeddings" else {}
    (tmp_path / "e" / "adapter_config.json").write_text(json.dumps(told))

    problems = lewis_hub.check(zoo.recipe()).problems

    if saved != "with the embeddings":
        assert HEAD_OF_ITS_OWN in problems[0]
        return
    tensors, loaded = zoo.merged("dtype: bfloat16\n")
    assert torch.equal(tensors[HEAD], head(1))
    assert torch.equal(loaded.lm_head.weight.bfloat16(), head(1))


def test_what_an_expert_lacks_is_refused_or_stays_as_in_the_base(zoo):
    base = zoo("b", change={HEAD: head(0)}, tied=False)
    zoo("e", "expert-reverse", without=(UP,))

    problems = "\n".join(lewis_hub.check(zoo.recipe()).problems)
    assert "has no lm_head.weight (its head is tied to the embeddings)" in problems
    assert f"lacks {UP} of the base" in problems
    tensors, _ = zoo.merged("missing: base\n")

    assert torch.equal(tensors[HEAD], base[HEAD])
    assert torch.equal(tensors[UP], base[UP])
