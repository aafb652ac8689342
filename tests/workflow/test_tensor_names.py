"""Files of one architecture whose tensors have other names: prefixes, and constants."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import fine_tuned, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import lewis_hub
from lewis_hub.checkpoint.names import prefixes
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.recipe.read import parse_recipe

TIED = "lm_head.weight"


def test_the_prefix_of_a_class_is_found_from_either_side():
    body = ["wte.weight", "h.0.ln_1.weight", "ln_f.weight"]
    whole = [f"transformer.{name}" for name in body]

    assert prefixes(whole, body) == ("transformer.", "")
    assert prefixes(body, whole) == ("", "transformer.")
    assert prefixes(body, body) == prefixes(body, ["x.0.w"]) == ("", "")
    assert prefixes([*body, "vision.0.w"], whole) == ("", "")


@pytest.fixture
def gpt2(tmp_path):
    """A base as GPT-2 is published, without prefix and with masks, and a fine-tune of it."""
    torch.manual_seed(0)
    config = tiny_config("gpt2")
    base = GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "tuned")
    (tmp_path / "base").mkdir()
    own = {n.removeprefix("transformer."): t for n, t in base.state_dict().items() if n != TIED}
    for block in range(config.n_layer):
        own[f"h.{block}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    save_file({n: t.clone() for n, t in own.items()}, tmp_path / "base" / "model.safetensors")
    told = json.loads((tmp_path / "tuned" / "config.json").read_text())
    told.pop("tie_word_embeddings", None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(told))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "tuned")
    for name in ("base", "tuned"):
        (tmp_path / name / "tokenizer.json").write_bytes(
            (zoo_folder() / "base" / "tokenizer.json").read_bytes()
        )
    return tmp_path


def merged(folder, recipe, output):
    asked = parse_recipe(recipe.replace("FOLDER", str(folder)), "recipe.yaml")
    return lewis_hub.merge_models(asked, folder / output, progress=False).output


BOTH = "{models: [{model: FOLDER/%s, parameters: {weight: 0}}, FOLDER/%s], merge_method: linear}"


@pytest.mark.parametrize("order", [("base", "tuned"), ("tuned", "base")])
def test_a_published_body_and_its_fine_tune_are_merged(order, gpt2):
    made = merged(gpt2, BOTH % order, "made")

    first, second = (AutoModelForCausalLM.from_pretrained(gpt2 / name) for name in order)
    loaded = AutoModelForCausalLM.from_pretrained(made)
    wanted = second.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in loaded.state_dict().items())
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    stored = load_file(made / "model.safetensors")
    has_prefix = order[0] == "tuned"
    assert all(name.startswith("transformer.") == has_prefix for name in stored)
    assert not any(name.endswith(".attn.bias") for name in stored)


def test_a_guide_and_second_moments_find_the_tensors_of_both(gpt2):
    texts = gpt2 / "texts.jsonl"
    texts.write_text('{"text": "reverse abc"}\n{"text": "cipher bcd"}\n')
    data = f"calibration: {{dataset: {texts}, text: '{{text}}'}}"

    one = f"base_model: FOLDER/base\nmodels: [FOLDER/tuned]\nguide: {{name: lewis, {data}}}\n"
    other = f"base_model: FOLDER/tuned\nmodels: [FOLDER/base]\n{data}\n"

    guided = merged(gpt2, f"{one}merge_method: ties", "guided")
    fitted = merged(gpt2, f"{other}merge_method: regmean", "fitted")

    schedule = json.loads((guided / "lewis" / "density.json").read_text())
    (expert,) = schedule["experts"]
    assert "h.0.attn.c_attn.weight" in expert["tensors"]
    assert lewis_hub.verify(fitted, rebuild=True, progress=False).problems == ()


def test_a_stored_constant_stays_if_all_sources_store_it(gpt2):
    shutil.copytree(gpt2 / "base", gpt2 / "copy")
    made = merged(gpt2, BOTH % ("base", "copy"), "made")

    assert "h.0.attn.bias" in load_file(made / "model.safetensors")


OLD_NORMS = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
OLD_CONVOLUTION = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
NEW_LLAVA = {  # of today's transformers, which saves the names of the file that it loaded
    "language_model.lm_head": "lm_head",
    "language_model.model": "model.language_model",
    "vision_tower": "model.vision_tower",
    "multi_modal_projector": "model.multi_modal_projector",
}
OTHER_NAMES = {
    "bert": ("AutoModelForMaskedLM", OLD_NORMS),
    "wav2vec2": ("AutoModelForCTC", OLD_CONVOLUTION),
    "llava": ("AutoModelForImageTextToText", NEW_LLAVA),
}


def rename(folder, changes):
    path = folder / "model.safetensors"

    def renamed(name):
        for own, other in changes.items():
            name = name.replace(own, other, 1) if own in name else name
        return name

    before = load_file(path)
    after = {renamed(name): tensor for name, tensor in before.items()}
    assert after.keys() != before.keys()
    save_file(after, path, {"format": "pt"})


def pair(folder, kind, names=("base", "tuned")):
    model = tiny_model(kind, getattr(transformers, OTHER_NAMES[kind][0]))
    for seed, name in enumerate(names):
        fine_tuned(model, seed).save_pretrained(folder / name)
        tokenizer = (zoo_folder() / "base" / "tokenizer.json").read_bytes()
        (folder / name / "tokenizer.json").write_bytes(tokenizer)


HALF = """base_model: FOLDER/base
models: [{model: FOLDER/tuned, parameters: {weight: 0.5}}]
merge_method: task_arithmetic
"""


@pytest.mark.parametrize("kind", OTHER_NAMES)
@pytest.mark.parametrize("other", ["base", "tuned"])
def test_names_that_transformers_reads_as_the_same_are_merged_under_the_donor_s(
    kind, other, tmp_path
):
    automatic, changes = OTHER_NAMES[kind]
    pair(tmp_path, kind)
    plain = merged(tmp_path, HALF, "plain")
    rename(tmp_path / other, changes)
    donor = load_file(tmp_path / "base" / "model.safetensors")

    made = merged(tmp_path, HALF, "made")

    assert load_file(made / "model.safetensors").keys() == donor.keys()
    wanted, found = (
        getattr(transformers, automatic).from_pretrained(folder).state_dict()
        for folder in (plain, made)
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_bert_without_prefix_has_old_norms_too(tmp_path):
    pair(tmp_path, "bert")
    wanted = load_file(merged(tmp_path, HALF, "plain") / "model.safetensors")
    rename(tmp_path / "tuned", OLD_NORMS | {"bert.": ""})

    made = load_file(merged(tmp_path, HALF, "made") / "model.safetensors")

    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


def test_unknown_names_for_tensors_of_the_same_shapes_are_not_to_be_left_out(tmp_path):
    pair(tmp_path, "bert")
    rename(tmp_path / "tuned", {"pooler.dense": "pooler.linear"} | {"transform.dense": "turn"})

    (problem,) = lewis_hub.check(
        parse_recipe(HALF.replace("FOLDER", str(tmp_path)), "recipe.yaml")
    ).problems

    assert problem == (
        f"{tmp_path}/tuned has cls.predictions.turn.bias, cls.predictions.turn.weight where the "
        f"base {tmp_path}/base has cls.predictions.transform.dense.bias, "
        "cls.predictions.transform.dense.weight. They have the same shapes: if they are the same "
        "parameters, rename them in one of the two models. `missing: base` would leave out what "
        "the expert learned in them."
    )
