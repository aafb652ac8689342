"""Files of one architecture whose tensors have other names: prefixes, and constants."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
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
