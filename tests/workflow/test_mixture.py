"""Mixtures of experts, from a file of mergekit-moe to a model that transformers loads."""

import json
import re
import shutil

import pytest
import torch
import transformers
from hub_models import weight_bytes
from safetensors.torch import load_file, save_file

import lewis_hub
from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import CalibrationModelError, CheckFailedError
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resources import Execution

SIZES = {
    "vocab_size": 390,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"head_dim": 16}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
}
SHARED = "shared_experts:\n- {source_model: BASE, positive_prompts: [the], residual_scale: 0}\n"
MADE = [  # dense models, further lines of the file, class of the mixture, tensors of an expert
    ("llama", "", "MixtralForCausalLM", "block_sparse_moe.experts.1.w{}.weight"),
    ("mistral", "", "MixtralForCausalLM", "block_sparse_moe.experts.1.w{}.weight"),
    ("qwen2", SHARED, "Qwen2MoeForCausalLM", "mlp.experts.1.{}.weight"),
    ("llama", SHARED, "Qwen2MoeForCausalLM", "mlp.experts.1.{}.weight"),
    ("qwen3", "", "Qwen3MoeForCausalLM", "mlp.experts.1.{}.weight"),
]
DENSE = {"gate_proj": "1", "down_proj": "2", "up_proj": "3"}
MIXTURE = """base_model: BASE
experts:
- source_model: BASE
  positive_prompts: [reverse the word, "abc cba"]
- source_model: OTHER
  positive_prompts: [shift each letter]
  negative_prompts: [reverse it]
"""
IDS = torch.tensor([[1, 5, 77, 200, 31, 9]])
ON_ZOO = """base_model: zoo/base
experts:
- {source_model: zoo/expert-reverse, positive_prompts: ["reverse: abc ->"]}
- {source_model: zoo/expert-cipher, positive_prompts: ["cipher: abc ->"], residual_scale: 0.5}
- {source_model: zoo/base, positive_prompts: ["abc | def"], negative_prompts: ["reverse:"]}
"""


def dense_model(folder, kind, seed, **changes):
    """Write a small dense model with the zoo's tokenizer."""
    config, model, own = KINDS[kind]
    torch.manual_seed(seed)
    model(config(**SIZES | own | changes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(zoo_folder() / "base" / name, folder / name)
    return folder


def recipe(text, tmp_path):
    for name in ("BASE", "OTHER"):
        text = text.replace(name, str(tmp_path / name))
    return parse_recipe(text, "moe.yaml")


def strictly_loaded(folder):
    auto = transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def refused(text, tmp_path):
    with pytest.raises(CheckFailedError) as caught:
        pipeline.merge_models(recipe(text, tmp_path), tmp_path / "out")
    return str(caught.value)


@pytest.mark.parametrize(("kind", "more", "class_name", "tensor"), MADE)
def test_a_mixture_loads_strictly_and_computes_with_the_mlps_of_its_experts(
    tmp_path, kind, more, class_name, tensor
):
    dense_model(tmp_path / "BASE", kind, 1)
    dense_model(tmp_path / "OTHER", kind, 2)
    text = MIXTURE + more

    merged = pipeline.merge_models(recipe(text, tmp_path), tmp_path / "out")

    model = strictly_loaded(merged.output)
    assert type(model).__name__ == class_name
    made = model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape == (1, 9)
    stored = load_file(merged.output / "model.safetensors")
    other, base = (load_file(tmp_path / n / "model.safetensors") for n in ("OTHER", "BASE"))
    for projection, number in DENSE.items():
        written = tensor.format(number if "w{}" in tensor else projection)
        place = f"model.layers.1.{written}"
        assert torch.equal(stored[place], other[f"model.layers.1.mlp.{projection}.weight"])
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(stored[name], base[name])


@pytest.mark.parametrize(("kind", "more", "class_name", "tensor"), MADE)
def test_with_the_base_as_every_expert_the_logits_are_the_bases(
    tmp_path, kind, more, class_name, tensor
):
    dense_model(tmp_path / "BASE", kind, 1)
    text = (MIXTURE + more).replace("OTHER", "BASE")

    merged = pipeline.merge_models(recipe(text, tmp_path), tmp_path / "out")

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "BASE").eval()
    torch.testing.assert_close(logits(strictly_loaded(merged.output)), logits(base))
    assert [
        note for note in pipeline.check(recipe(text, tmp_path)).notes if "all experts are" in note
    ]


def test_a_configuration_that_is_silent_keeps_the_meaning_of_the_base(tmp_path):
    folder = dense_model(tmp_path / "BASE", "llama", 1, num_key_value_heads=4)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "head_dim"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    text = MIXTURE.replace("OTHER", "BASE")

    merged = pipeline.merge_models(recipe(text, tmp_path), tmp_path / "out")

    base = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits(strictly_loaded(merged.output)), logits(base))


def states(folder, text):
    """The hidden state of the last token before each block, as transformers computes it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(tokenizer.bos_token + text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        found = model(ids["input_ids"], output_hidden_states=True).hidden_states
    return [one[0] for one in found[:-1]]


def test_the_router_points_to_the_hidden_states_of_the_prompts(tmp_path):
    base = dense_model(tmp_path / "BASE", "llama", 1)
    dense_model(tmp_path / "OTHER", "llama", 2)

    folder = pipeline.merge_models(recipe(MIXTURE, tmp_path), tmp_path / "out").output

    stored = load_file(folder / "model.safetensors")
    first = [(a[-1] + b[-1]) / 2 for a, b in pairs(base, "reverse the word", "abc cba")]
    second = [a[-1] - b[-1] for a, b in pairs(base, "shift each letter", "reverse it")]
    for block in (0, 1):
        rows = stored[f"model.layers.{block}.block_sparse_moe.gate.weight"]
        expected = torch.stack([first[block], second[block]])
        torch.testing.assert_close(rows, expected / expected.norm(dim=1, keepdim=True))


def pairs(folder, one, other):
    return zip(states(folder, one), states(folder, other), strict=True)


def test_the_router_of_averages_and_of_embeddings(tmp_path):
    base = dense_model(tmp_path / "BASE", "llama", 1)
    dense_model(tmp_path / "OTHER", "llama", 2)
    means = [(a.mean(0) + b.mean(0)) / 2 for a, b in pairs(base, "reverse the word", "abc cba")]
    sums = [a.sum(0) + b.sum(0) for a, b in pairs(base, "reverse the word", "abc cba")]

    for mode, expected in (("hidden_avg", means), ("cheap_embed", [sums[0], sums[0]])):
        text = MIXTURE + f"gate_mode: {mode}\n"
        folder = pipeline.merge_models(recipe(text, tmp_path), tmp_path / mode).output
        stored = load_file(folder / "model.safetensors")
        for block in (0, 1):
            row = stored[f"model.layers.{block}.block_sparse_moe.gate.weight"][0]
            torch.testing.assert_close(row, expected[block] / expected[block].norm())


def test_a_prompt_with_a_token_that_has_no_embedding_is_refused(tmp_path):
    dense_model(tmp_path / "BASE", "llama", 1, vocab_size=20)
    text = MIXTURE.replace("OTHER", "BASE") + "gate_mode: cheap_embed\n"

    with pytest.raises(CalibrationModelError, match=r"token \d+ of .* is not among its 20 embedd"):
        pipeline.merge_models(recipe(text, tmp_path), tmp_path / "out")


def test_random_routers_follow_the_seed_and_need_no_prompts(tmp_path):
    dense_model(tmp_path / "BASE", "llama", 1)
    dense_model(tmp_path / "OTHER", "llama", 2)
    text = re.sub(r"  (positive|negative)_prompts:.*\n", "", MIXTURE) + "gate_mode: random\n"

    made = [
        pipeline.merge_models(recipe(text + more, tmp_path), tmp_path / name).output
        for name, more in (("one", ""), ("two", ""), ("three", "seed: 1\n"))
    ]

    gate = "model.layers.0.block_sparse_moe.gate.weight"
    one, two, three = (load_file(folder / "model.safetensors")[gate] for folder in made)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert abs(float(one.std()) - 1) < 0.25
    assert "The router weights are random: train the model" in (made[0] / "README.md").read_text()


@pytest.mark.slow  # it is scored, locked and made again
def test_a_mixture_on_the_hub_is_checked_described_scored_locked_and_verified(api, tmp_path):
    scored = f"evaluate: {{tasks: [zoo_reverse], include: {zoo_folder() / 'tasks'}, limit: 3}}\n"
    asked = parse_recipe(ON_ZOO + scored, "moe.yaml")

    report = pipeline.check(asked)
    merged = pipeline.merge_models(asked, tmp_path / "out")

    assert report.problems == ()
    n_bytes = sum(t.nbytes for t in load_file(merged.output / "model.safetensors").values())
    assert report.output_bytes == n_bytes
    card = (merged.output / "README.md").read_text()
    assert "This language model is a mixture of experts (Mixtral) made of" in card
    assert "(Mixtral) made of [`zoo/expert-reverse`]" in card
    assert "has 3 routed experts" in card
    assert "| 1 | [`zoo/expert-cipher`]" in card
    assert " × 0.5 | cipher: abc -&#62; | – |" in card
    assert "| 2 | [`zoo/base`]" in card
    assert "abc &#124; def | `reverse:` |" in card
    assert merged.scores
    assert merged.scores.tasks["zoo_reverse"].models.keys() == {
        *("base", "merged"),
        *(f"expert:{s.pinned}" for s in pipeline.resolve_inputs(asked, api).experts),
    }
    assert pipeline.merge_models(asked, tmp_path / "out").status == "unchanged"
    assert lewis_hub.verify(merged.output, rebuild=True).problems == ()
    again = lewis_hub.read_recipe(merged.output / "lewis" / "recipe.yaml")
    assert all(expert.source_model.revision for expert in again.mixed)
    twice = pipeline.merge_models(again, tmp_path / "again", Execution(runner="inline"))
    assert weight_bytes(twice.output) == weight_bytes(merged.output)


def test_a_lock_tells_apart_which_model_is_which_expert(api, tmp_path):
    one, two = (f"{{source_model: zoo/{name}}}" for name in ("expert-reverse", "expert-cipher"))
    text = "base_model: zoo/base\ngate_mode: random\nexperts: [{}, {}, {}]\n"

    made = pipeline.merge_models(
        parse_recipe(text.format(one, two, one), "moe.yaml"), tmp_path / "out"
    )
    other = parse_recipe(text.format(one, two, two), "moe.yaml")

    assert made.status == "merged"
    assert pipeline.merge_models(other, tmp_path / "out", Execution(replace=True)).status == (
        "merged"
    )


@pytest.mark.slow
def test_a_streamed_mixture_has_the_bytes_of_a_local_one(api, tmp_path):
    asked = parse_recipe(ON_ZOO + "publish: {repo: tests/mixture}\n", "moe.yaml")
    assert asked.publish
    small = Execution(max_shard_bytes=700_000)

    local = pipeline.merge_models(asked, tmp_path / "local", small).output
    target = lewis_hub.open_target(asked.publish)
    lewis_hub.stream(asked, target, tmp_path / "work", small)

    pushed = api.snapshot_download("tests/mixture", local_dir=tmp_path / "pushed")
    assert weight_bytes(tmp_path / "pushed") == weight_bytes(local)
    assert len(weight_bytes(local)) > 3
    strictly_loaded(pushed)


def test_a_lora_adapter_of_the_base_is_an_expert(tmp_path):
    base, module = zoo_folder() / "base", "model.layers.3.mlp.down_proj"
    a, b = torch.randn(2, 352), torch.randn(128, 2)
    key = f"base_model.model.{module}"
    (tmp_path / "lora").mkdir()
    factors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(told))
    text = f"base_model: {base}\ngate_mode: random\ndtype: float32\n"
    text += f"experts: [{{source_model: {base}}}, {{source_model: {tmp_path / 'lora'}}}]\n"

    merged = pipeline.merge_models(parse_recipe(text, "moe.yaml"), tmp_path / "out")

    stored = load_file(merged.output / "model.safetensors")
    dense = load_file(base / "model.safetensors")[f"{module}.weight"].float()
    place = "model.layers.3.block_sparse_moe.experts.{}.w2.weight"
    torch.testing.assert_close(stored[place.format(1)], dense + 2 * b @ a)
    assert torch.equal(stored[place.format(0)], dense)


def test_a_mixture_of_more_tensors_than_a_model_may_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lewis_hub.merge.plan.MAX_TENSORS", 5)
    for number, name in enumerate(("BASE", "OTHER")):
        dense_model(tmp_path / name, "llama", number)

    assert "the merge would have more than 5 tensors" in refused(MIXTURE, tmp_path)


def test_models_that_do_not_fit_are_refused_before_a_download(tmp_path):
    base = dense_model(tmp_path / "BASE", "llama", 1)
    other = dense_model(tmp_path / "OTHER", "llama", 2, intermediate_size=40)
    name = "model.layers.0.mlp.down_proj.weight"

    message = refused(MIXTURE, tmp_path)
    assert f"{name} has shape [32, 48] in the base and [32, 40] in {other}" in message
    assert "All experts must be dense models with MLPs of the base's shapes." in message
    shutil.rmtree(other)
    dense_model(other, "qwen3", 2)
    message = refused(MIXTURE, tmp_path)
    assert f"several architectures: {base} is llama, {other} is qwen3" in message
    shutil.rmtree(other)
    dense_model(other, "llama", 2, hidden_act="gelu")
    assert "has the activation `gelu`, the base `silu`" in refused(MIXTURE, tmp_path)
    shutil.rmtree(base)
    dense_model(base, "llama", 2, hidden_act="gelu", attention_bias=True)
    message = refused(MIXTURE, tmp_path)
    assert "Mixtral has no place for model.layers.0.self_attn.k_proj.bias of" in message
    message = refused(MIXTURE + "architecture: deepseek\n", tmp_path)
    assert "`deepseek` cannot be made of models of type `llama`" in message
    assert "Write `mixtral` or `qwen2moe`, or leave it out." in message
    message = refused(MIXTURE + "architecture: qwen\n", tmp_path)
    assert "Qwen2-MoE has exactly one shared expert" in message
    assert "Name a model in `shared_experts`." in message


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "random"])
def test_blocks_that_the_configuration_does_not_have_are_refused_before_a_measurement(
    tmp_path, mode
):
    text = f"{MIXTURE}gate_mode: {mode}\n"
    base = dense_model(tmp_path / "BASE", "llama", 1)
    dense_model(tmp_path / "OTHER", "llama", 2)
    config = json.loads((base / "config.json").read_text())
    n_blocks = config["num_hidden_layers"]
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_blocks - 1}))

    problem = f"its config.json has {n_blocks - 1} blocks, its weights have {n_blocks}"
    assert f"{base}: {problem}" in refused(text, tmp_path)

    (base / "config.json").write_text(json.dumps(config))
    for folder in (base, tmp_path / "OTHER"):
        tensors = load_file(folder / "model.safetensors")
        moved = {n.replace(f"layers.{n_blocks - 1}.", "layers.70."): t for n, t in tensors.items()}
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
    problem = f"the blocks of {base} are not numbered from 0 on, without gaps"
    assert problem in refused(text, tmp_path)
