"""Heads and tensors that not every source stores, from the recipe to a model that loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GemmaConfig

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import SourceError
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

    model.recipe, model.merged, model.folder = recipe, merged, tmp_path
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


def embedding(of):
    return load_file(zoo_folder() / of / "model.safetensors")[EMBEDDING]


def test_a_stored_head_that_is_tied_is_left_out_and_loads_as_the_embeddings(zoo):
    zoo("b", change={HEAD: embedding("base")})
    expert = zoo("e", "expert-reverse")

    notes = lewis_hub.check(zoo.recipe()).notes
    tensors, loaded = zoo.merged("")

    assert [note for note in notes if HEAD in note] == [
        f"{zoo.folder}/b stores `lm_head.weight`, which its config.json ties to the embeddings: "
        "the merge stores the embeddings alone."
    ]
    assert HEAD not in tensors
    assert torch.equal(loaded.lm_head.weight.bfloat16(), expert[EMBEDDING])


ALIKE = {
    "dare_ties": "merge_method: dare_ties\nparameters: {density: 0.5, weight: 0.5}\n",
    "regmean": "merge_method: regmean\nparameters: {embeddings: true}\nTEXTS",
    "in sequence": "merge_method: regmean\nparameters: {embeddings: true, inputs: merged}\nTEXTS",
}


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=pytest.mark.slow if how == "in sequence" else ()) for how in ALIKE],
)
def test_stored_copies_of_the_embeddings_change_nothing_of_a_merge(how, zoo, tmp_path):
    """Streams of random bits, filters and statistics go by the names of tensors."""
    (tmp_path / "texts.jsonl").write_text('{"text": "reverse abc"}\n{"text": "cipher bcd"}\n')
    texts = f'calibration: {{dataset: {tmp_path}/texts.jsonl, text: "{{text}}"}}\n'
    merged = []
    for stored in ("", "be", "bef"):
        parts = {"b": "base", "e": "expert-reverse", "f": "expert-cipher"}
        for name, of in parts.items():
            zoo(name + stored, of, {HEAD: embedding(of)} if name in stored else None)
        models = "".join(f"  - {{model: {tmp_path / name}{stored}}}\n" for name in "ef")
        text = f"base_model: {tmp_path}/b{stored}\nmodels:\n{models}"
        text += ALIKE[how].replace("TEXTS", texts)
        done = lewis_hub.merge_models(parse_recipe(text, "recipe.yaml"), tmp_path / f"to{stored}")
        merged.append(load_file(done.output / "model.safetensors"))

    assert HEAD not in merged[0]
    assert all(one.keys() == merged[0].keys() for one in merged)
    assert all(torch.equal(one[name], merged[0][name]) for one in merged for name in one)


def test_a_stack_of_tied_models_stores_the_embeddings_of_its_first_slice_alone(zoo, tmp_path):
    zoo("b", change={HEAD: embedding("base")})
    zoo("e", "expert-reverse", {HEAD: embedding("expert-reverse")})
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"- sources: [{{model: {tmp_path}/{name}, layer_range: [0, 2]}}]\n" for name in "be"
    )

    made = lewis_hub.merge_models(parse_recipe(text, "recipe.yaml"), tmp_path / "out").output

    tensors = load_file(made / "model.safetensors")
    assert HEAD not in tensors
    assert torch.equal(tensors[EMBEDDING], embedding("base"))


@pytest.mark.parametrize("n_rows", [0, 389], ids=["every row", "the last row"])
def test_a_stored_head_that_differs_from_the_embeddings_it_is_tied_to_is_refused(
    n_rows, zoo, tmp_path
):
    other = torch.cat([embedding("base")[:n_rows], head(1)[n_rows:]])
    zoo("b", change={HEAD: other})
    zoo("e", "expert-reverse")

    with pytest.raises(SourceError) as caught:
        lewis_hub.merge_models(zoo.recipe(), tmp_path / "out")

    assert str(caught.value) == (
        f"{tmp_path}/b: its config.json ties the head to the embeddings, but its file stores a "
        "`lm_head.weight` that differs from `model.embed_tokens.weight`, and programs disagree "
        "which of the two they load as the head.\nUse a copy of the model in which config.json "
        "says `tie_word_embeddings: false`, or whose file has no `lm_head.weight`."
    )
    assert not (tmp_path / "out").exists()
    if n_rows == 0:
        with pytest.raises(SourceError):
            lewis_hub.check(zoo.recipe())


def test_a_head_is_kept_if_no_configuration_says_that_it_is_tied(zoo):
    """By default transformers ties the head of some architectures, but not that of Llama."""
    zoo("b", change={HEAD: embedding("base")}, tied=None)
    zoo("e", "expert-reverse", tied=None)

    (problem,) = lewis_hub.check(zoo.recipe()).problems

    assert "has no lm_head.weight (its head is tied to the embeddings)" in problem


def test_a_copy_is_left_out_if_the_architecture_ties_heads_by_default(tmp_path):
    """Gemma's configurations do not say that it does; some that were trained on store a copy."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
    for name in "be":
        model = AutoModelForCausalLM.from_config(GemmaConfig(**sizes))
        model.save_pretrained(tmp_path / name)
        told = json.loads((tmp_path / name / "config.json").read_text())
        del told["tie_word_embeddings"]
        (tmp_path / name / "config.json").write_text(json.dumps(told))
    stored = load_file(tmp_path / "b" / "model.safetensors")
    copied = stored | {HEAD: stored[EMBEDDING].clone()}
    save_file(copied, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    text = f"merge_method: linear\nmodels: [{{model: {tmp_path}/b}}, {{model: {tmp_path}/e}}]\n"

    lewis_hub.merge_models(parse_recipe(text, "recipe.yaml"), tmp_path / "out")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    other = load_file(tmp_path / "e" / "model.safetensors")
    assert merged.keys() == other.keys() == stored.keys()
    assert torch.equal(merged[EMBEDDING], (stored[EMBEDDING] + other[EMBEDDING]) / 2)


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
    assert HEAD not in tensors
    assert torch.equal(tensors[EMBEDDING], head(1))
    assert torch.equal(loaded.lm_head.weight.bfloat16(), head(1))


def test_an_adapter_of_the_blocks_fits_a_tied_base_that_stores_its_head(zoo, tmp_path):
    zoo("b", change={HEAD: embedding("base")})
    (tmp_path / "e").mkdir()
    changed = torch.ones_like(load_file(zoo_folder() / "base" / "model.safetensors")[UP])
    stored = {f"base_model.model.{UP}": changed}
    save_file(stored, tmp_path / "e" / "adapter_model.safetensors")
    (tmp_path / "e" / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    tensors, _ = zoo.merged("dtype: bfloat16\n")

    assert HEAD not in tensors
    assert torch.equal(tensors[UP], changed)


def test_what_an_expert_lacks_is_refused_or_stays_as_in_the_base(zoo):
    base = zoo("b", change={HEAD: head(0)}, tied=False)
    zoo("e", "expert-reverse", without=(UP,))

    problems = "\n".join(lewis_hub.check(zoo.recipe()).problems)
    assert "has no lm_head.weight (its head is tied to the embeddings)" in problems
    assert f"lacks {UP} of the base" in problems
    tensors, _ = zoo.merged("missing: base\n")

    assert torch.equal(tensors[HEAD], base[HEAD])
    assert torch.equal(tensors[UP], base[UP])
