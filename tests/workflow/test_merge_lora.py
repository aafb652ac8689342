"""`merge-lora`: adapters become one adapter, which on its base is the merge of the adapters."""

import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import lewis_hub
from lewis_hub.checkpoint.lora import PREFIX
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError
from lewis_hub.hub.source import cache_root
from lewis_hub.merge import low_rank
from lewis_hub.recipe.read import parse_recipe

BASE = zoo_folder() / "base"
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
TWO = """base_model: BASE
models:
- {model: ONE, parameters: {weight: 0.5, density: 0.5}}
- {model: TWO, parameters: {weight: 0.25, density: 0.4}}
dtype: float32
merge_method: METHOD
"""
PLAIN = TWO.replace(", density: 0.5", "").replace(", density: 0.4", "")


def write_adapter(folder, rank, seed, modules=MODULES, more=None, **config):
    """Write a LoRA whose factor is alpha / rank = 4."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    base, tensors = load_file(BASE / "model.safetensors"), dict(more or {})
    for module in modules:
        n_out, n_in = base[f"{module}.weight"].shape
        a, b = (torch.randn(s, generator=generator) / 8 for s in ((rank, n_in), (n_out, rank)))
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 4 * rank, **config}
    told["base_model_name_or_path"] = str(BASE)
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture
def adapters(tmp_path):
    """An adapter of rank 3 of both modules, and one of rank 2 of the second."""
    write_adapter(tmp_path / "ONE", 3, 1)
    write_adapter(tmp_path / "TWO", 2, 2, MODULES[1:])
    return tmp_path


def recipe(folder, method, text=TWO):
    named = text.replace("METHOD", method).replace("BASE", str(BASE))
    for name in ("ONE", "TWO"):
        named = named.replace(f"model: {name}", f"model: {folder / name}")
    return parse_recipe(named, "recipe.yaml")


def update(folder, module):
    """The update of a module, as PEFT adds it to the weight."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
    rank = config.get("rank_pattern", {}).get(module, config["r"])
    assert a.shape[0] == b.shape[1] == rank
    alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
    return alpha / rank * (b @ a)


def on_base(folder, adapter):
    """The base with an adapter, by the merge that adds a task vector."""
    text = f"base_model: {BASE}\nmodels: [{adapter}]\ndtype: float32\n"
    merged = parse_recipe(f"{text}merge_method: task_arithmetic\n", "recipe.yaml")
    return load_file(lewis_hub.merge_models(merged, folder).output / "model.safetensors")


@pytest.mark.parametrize(("method", "numbers"), [("task_arithmetic", (0.5, 0.25)), ("linear", 0)])
def test_sums_of_updates_put_the_ranks_side_by_side(adapters, method, numbers):
    first, second = numbers or (2 / 3, 1 / 3)

    made = lewis_hub.merge_loras(recipe(adapters, method, PLAIN), adapters / "out")

    assert {module: fit.rank for module, fit in made.fits.items()} == dict(
        zip(MODULES, (3, 5), strict=True)
    )
    assert all(fit.error == 0 for fit in made.fits.values())
    one, two = adapters / "ONE", adapters / "TWO"
    expected = first * update(one, MODULES[1]) + second * update(two, MODULES[1])
    torch.testing.assert_close(update(adapters / "out", MODULES[1]), expected)
    torch.testing.assert_close(
        update(adapters / "out", MODULES[0]), first * update(one, MODULES[0])
    )
    card = (adapters / "out" / "README.md").read_text()
    assert "The ranks of the adapters stand side by side in 2 modules" in card
    assert "\npipeline_tag: text-generation\n" in card


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "task_arithmetic"])
def test_the_adapter_on_its_base_is_the_merge_of_the_adapters(adapters, method):
    text = PLAIN if method == "task_arithmetic" else TWO
    asked = recipe(adapters, method, text)
    dense = load_file(
        lewis_hub.merge_models(asked, adapters / "dense").output / "model.safetensors"
    )

    lewis_hub.merge_loras(asked, adapters / "out", rank=128)  # the highest that matrices can have

    merged = on_base(adapters / "again", adapters / "out")
    for name, tensor in dense.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", ["", "transformer."])
def test_the_factors_are_named_as_those_of_the_adapters(tmp_path, cut):
    GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=12)
    ).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    stored = {name.removeprefix(cut): one for name, one in load_file(file).items()}
    save_file(stored, file, {"format": "pt"})  # as GPT-2 was published, without its prefix
    module = f"{PREFIX}transformer.wpe"
    tensors = {
        f"{module}.lora_embedding_A": torch.arange(24.0).view(2, 12),
        f"{module}.lora_embedding_B": torch.arange(16.0).view(8, 2),
    }
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "adapter_model.safetensors")
    told = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    (tmp_path / "one" / "adapter_config.json").write_text(told)
    text = f"{{base_model: {tmp_path}/base, models: [{tmp_path}/one], merge_method: linear}}"

    lewis_hub.merge_loras(parse_recipe(text, "recipe.yaml"), tmp_path / "merged")

    held = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["transformer.wpe" if cut else "wpe"]


@pytest.mark.parametrize(("kind", "task"), [("BertModel", None), ("BertLMHeadModel", "CAUSAL_LM")])
def test_the_task_is_that_of_the_base(tmp_path, kind, task):
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [kind]}))
    (tmp_path / "one").mkdir()
    module = f"{PREFIX}encoder.layer.0.attention.self.query"
    factors = {
        f"{module}.lora_A.weight": torch.ones(2, 8),
        f"{module}.lora_B.weight": torch.ones(8, 2),
    }
    save_file(factors, tmp_path / "one" / "adapter_model.safetensors")
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    text = f"{{base_model: {tmp_path}/base, models: [{tmp_path}/one], merge_method: linear}}"

    lewis_hub.merge_loras(parse_recipe(text, "recipe.yaml"), tmp_path / "merged")

    told = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert told["task_type"] == task


def test_a_rank_or_an_error_cuts_the_update_down(adapters):
    asked = recipe(adapters, "ties")

    small = lewis_hub.merge_loras(asked, adapters / "small", rank=1)
    close = lewis_hub.merge_loras(asked, adapters / "close", error=0.1)
    plain = lewis_hub.merge_loras(asked, adapters / "plain")

    assert {fit.rank for fit in small.fits.values()} == {1}
    assert all(fit.error <= 0.1 for fit in close.fits.values())
    assert {fit.rank for fit in plain.fits.values()} == {3, 5}
    whole, cut = update(adapters / "close", MODULES[1]), update(adapters / "small", MODULES[1])
    expected = ((whole - cut).norm() / whole.norm()).item()
    assert abs(small.fits[MODULES[1]].error - expected) < 0.02
    card = (adapters / "small" / "README.md").read_text()
    assert "The mean error over 2 modules is" in card


def test_the_bases_weights_are_not_downloaded(api, adapters):
    for name in ("ONE", "TWO"):
        api.create_repo(f"tests/{name}")
        api.upload_folder(repo_id=f"tests/{name}", folder_path=adapters / name)
    text = "base_model: zoo/base\nmodels: [tests/ONE, tests/TWO]\nmerge_method: linear\n"
    (adapters / "recipe.yaml").write_text(text)
    words = ["merge-lora", str(adapters / "recipe.yaml"), "-o", str(adapters / "out"), "--json"]

    done = CliRunner().invoke(cli, words)

    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["status"] == "merged"
    assert {module: one["rank"] for module, one in told["modules"].items()} == dict(
        zip(MODULES, (3, 5), strict=True)
    )
    config = json.loads((adapters / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "zoo/base"
    assert config["target_modules"] == sorted(MODULES)  # other blocks have such modules, too
    held = [path for path in cache_root().rglob("*.safetensors") if "zoo--base" in str(path)]
    assert held == []


def refused(folder, method, text=TWO, **settings):
    with pytest.raises(LewisHubError) as caught:
        lewis_hub.merge_loras(recipe(folder, method, text), folder / "out", **settings)
    return str(caught.value)


def test_float64_and_several_steps_are_refused_by_name(adapters):
    assert refused(adapters, "linear", PLAIN.replace("dtype: float32", "dtype: float64")) == (
        "recipe: `dtype`: adapters are merged in float32 only.\n"
        "Write `float32`; or merge on the base with `merge`, which computes in float64."
    )
    first = f"name: first\n{PLAIN}---\n"
    last = "base_model: BASE\nmodels: [first]\nmerge_method: METHOD\n"
    assert "recipe: `name`: adapters are merged in one step only." in refused(
        adapters, "linear", first + last
    )


def test_what_is_no_low_rank_update_is_refused(adapters):
    assert "`slerp`: it takes exactly 1 model" in refused(adapters, "slerp", PLAIN)
    assert refused(adapters, "linear", f"{PLAIN}parameters: {{normalize: false}}\n") == (
        "parameter `normalize`: the weights do not add up to 1, so the base would be multiplied "
        "too.\nRemove `normalize: false`, or use `task_arithmetic`."
    )
    whole = PLAIN.replace("model: TWO", f"model: {zoo_folder() / 'expert-cipher'}")
    assert "only LoRA adapters make an adapter" in refused(adapters, "ties", whole)
    unweighed = re.sub(r", parameters: \{[^}]*\}", "", PLAIN)
    assert "`karcher`: its result is no sum of updates" in refused(adapters, "karcher", unweighed)
    shutil.rmtree(adapters / "TWO")
    norm = {f"{PREFIX}model.norm.weight": torch.ones(128)}
    write_adapter(adapters / "TWO", 2, 2, more=norm)
    assert "it stores model.norm.weight whole, so its update depends on the base" in refused(
        adapters, "ties"
    )


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_no_adapter_of_nan_or_infinity_is_written(adapters, method):
    file = adapters / "TWO" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"{PREFIX}{MODULES[1]}.lora_A.weight"
    tensors[name][1, 2] = float("nan")
    save_file(tensors, file)

    with pytest.raises(LewisHubError) as caught:
        lewis_hub.merge_loras(recipe(adapters, method, PLAIN), adapters / "out")

    assert str(caught.value) == (
        f"{name} holds NaN or infinity in {adapters / 'TWO'}.\n"
        "Use another revision of it, or leave it out."
    )
    assert not (adapters / "out").exists()


def test_an_adapter_that_float16_cannot_hold_is_refused(adapters):
    text = PLAIN.replace("dtype: float32", "dtype: float16").replace("0.25", "1.0e+6")

    with pytest.raises(LewisHubError) as caught:
        lewis_hub.merge_loras(recipe(adapters, "task_arithmetic", text), adapters / "out")

    assert str(caught.value) == (
        f"{MODULES[1]}.weight holds NaN or infinity in the merged model.\n"
        "It does not fit into F16: choose another `dtype`, or lower the weights."
    )


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_factor_of_an_adapter_is_a_number(adapters, number):
    file = adapters / "TWO" / "adapter_config.json"
    told = json.loads(file.read_text()) | {"alpha_pattern": {"down_proj": "NUMBER"}}
    file.write_text(json.dumps(told).replace('"NUMBER"', number))

    with pytest.raises(LewisHubError, match="`alpha_pattern.down_proj` is not what PEFT writes"):
        lewis_hub.merge_loras(recipe(adapters, "linear", PLAIN), adapters / "out")


def test_an_update_whose_squares_exceed_float32_is_one_message(adapters):
    file = adapters / "TWO" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}{MODULES[1]}.lora_A.weight"] *= 1e38
    save_file(tensors, file)

    with pytest.raises(LewisHubError) as caught:
        lewis_hub.merge_loras(recipe(adapters, "ties"), adapters / "out")

    assert str(caught.value).startswith(
        f"the merged model: the values of {MODULES[1]}.weight are too large for a low-rank update."
    )


@pytest.mark.parametrize(("method", "rank"), [("ties", None), ("linear", 2)])
def test_matrices_that_the_memory_cannot_hold_are_refused(adapters, monkeypatch, method, rank):
    """Adapters of 48 kB on a matrix of 12,000 x 12,000 took over 7.9 GB."""
    monkeypatch.setattr(low_rank, "memory_bytes", lambda: 100_000)
    text = TWO if method == "ties" else PLAIN

    with pytest.raises(LewisHubError) as refused:
        lewis_hub.merge_loras(recipe(adapters, method, text), adapters / "out", rank=rank)

    assert str(refused.value) == (
        "model.layers.1.mlp.down_proj.weight: its update takes up to 2.9 MB of memory, and this "
        "machine has 100.0 kB.\nMerge the adapters on their base instead: `lewis-hub merge` takes "
        "this recipe."
    )
    assert not (adapters / "out").exists()
    lewis_hub.merge_loras(recipe(adapters, "linear", PLAIN), adapters / "sums")
