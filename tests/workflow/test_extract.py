"""`extract-lora`: a fine-tuned model becomes an adapter that a merge can take back."""

import json
import resource
import shutil

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError, OutputError
from lewis_hub.recipe.read import parse_recipe

BASE = zoo_folder() / "base"


@pytest.fixture
def model(tmp_path):
    """Writes the zoo's base, with some tensors changed."""

    def write(name, change):
        folder = shutil.copytree(BASE, tmp_path / name)
        tensors = {key: t.float() for key, t in load_file(BASE / "model.safetensors").items()}
        save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder

    return write


def tuned(tensors):
    """A change of rank 3 to every q_proj, another norm, and a token that was learnt."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            left = torch.randn(tensor.shape[0], 3, generator=generator)
            right = torch.randn(3, tensor.shape[1], generator=generator)
            tensors[name] = tensor + left @ right / 50
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    tensors["model.embed_tokens.weight"][7] += 1
    return tensors


def extract(*words):
    done = CliRunner().invoke(cli, ["extract-lora", *map(str, words), "--json"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout)


def test_a_change_of_low_rank_is_extracted_and_merged_back(model, tmp_path):
    base, expert = model("base", lambda tensors: tensors), model("expert", tuned)
    adapter = tmp_path / "adapter"

    told = extract(expert, "--base", base, "--rank", 3, "-o", adapter)

    assert {fit["rank"] for fit in told["modules"].values()} == {3}
    assert max(fit["error"] for fit in told["modules"].values()) < 1e-4
    assert told["whole"] == ["model.embed_tokens.weight", "model.norm.weight"]
    recipe = parse_recipe(
        f"base_model: {base}\nmodels: [{{model: {adapter}, parameters: {{weight: 1.0}}}}]\n"
        "merge_method: task_arithmetic\n",
        "recipe.yaml",
    )
    lewis_hub.merge_models(recipe, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = load_file(expert / "model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged["model.norm.weight"], wanted["model.norm.weight"])


def test_tied_embeddings_are_stored_as_the_head_too_because_peft_unties_them(model, tmp_path):
    adapter = tmp_path / "adapter"

    extract(model("expert", tuned), "--base", BASE, "--rank", 3, "-o", adapter)

    held = load_file(adapter / "adapter_model.safetensors")
    embeddings = held["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(held["base_model.model.lm_head.weight"], embeddings)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.embed_tokens", "model.norm"]
    assert config["ensure_weight_tying"]


def test_names_have_the_prefix_that_a_file_leaves_out_and_peft_knows(model, tmp_path):
    def bare(tensors):
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    base, expert = model("base", bare), model("expert", lambda tensors: bare(tuned(tensors)))
    whole, plain = (model(name, change) for name, change in (("a", dict), ("b", tuned)))

    told = extract(expert, "--base", base, "--rank", 3, "-o", tmp_path / "adapter")
    extract(plain, "--base", whole, "--rank", 3, "-o", tmp_path / "wanted")

    found, wanted = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "wanted")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        | {"base_model_name_or_path": None}
        for name in ("adapter", "wanted")
    ]
    assert configs[0] == configs[1]
    assert "model.norm.weight" in told["whole"]
    text = f"{{base_model: {base}, models: [{tmp_path / 'adapter'}], merge_method: linear}}"
    lewis_hub.merge_models(parse_recipe(text, "recipe.yaml"), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(
        merged["norm.weight"], load_file(expert / "model.safetensors")["norm.weight"]
    )


def test_a_model_that_is_no_language_model_has_the_names_of_its_file(model, tmp_path):
    def bare(tensors):
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    base, expert = model("base", bare), model("expert", lambda tensors: bare(tuned(tensors)))
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    (base / "config.json").write_text(json.dumps(config))

    extract(expert, "--base", base, "--rank", 3, "-o", tmp_path / "adapter")

    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.norm.weight" in found


def test_the_bias_of_an_adapted_module_is_where_peft_looks_for_it(model, tmp_path):
    adapted, other = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.v_proj.bias"

    def biased(tensors, value):
        return tensors | {
            name: torch.full((len(tensors[name[:-4] + "weight"]),), value)
            for name in (adapted, other)
        }

    base = model("base", lambda tensors: biased(tensors, 0.5))
    expert = model("expert", lambda tensors: biased(tuned(tensors), 0.75))
    adapter = tmp_path / "adapter"

    told = extract(expert, "--base", base, "--rank", 3, "-o", adapter)

    held = load_file(adapter / "adapter_model.safetensors")
    biases = {name.removeprefix("base_model.model.") for name in held if name.endswith("bias")}
    assert biases == {"model.layers.0.self_attn.q_proj.base_layer.bias", other}
    assert {adapted, other} <= {*told["whole"]}
    assert json.loads((adapter / "adapter_config.json").read_text())["bias"] == "all"
    text = f"{{base_model: {base}, models: [{adapter}], merge_method: linear}}"
    lewis_hub.merge_models(parse_recipe(text, "recipe.yaml"), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {*merged[adapted].tolist(), *merged[other].tolist()} == {0.75}


@pytest.mark.parametrize("option", ["--exclude", "--include"])
def test_a_tied_head_is_not_stored_without_embeddings(model, tmp_path, option):
    pattern = "embed_tokens" if option == "--exclude" else "q_proj"

    extract(model("expert", tuned), "--base", BASE, option, pattern, "-o", tmp_path / "out")

    assert "base_model.model.lm_head.weight" not in load_file(
        tmp_path / "out" / "adapter_model.safetensors"
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "ensure_weight_tying" not in config


def test_an_error_bound_gives_each_module_its_own_rank(tmp_path):
    expert = zoo_folder() / "expert-reverse"

    told = extract(expert, "--base", BASE, "--error", 0.3, "-o", tmp_path / "out")

    fits = told["modules"].values()
    assert all(fit["error"] <= 0.3 for fit in fits)
    assert len({fit["rank"] for fit in fits}) > 1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == max(fit["rank"] for fit in fits)
    assert config["rank_pattern"] == config["alpha_pattern"]
    ranks = {module: config["rank_pattern"].get(module, config["r"]) for module in told["modules"]}
    assert ranks == {module: fit["rank"] for module, fit in told["modules"].items()}


def test_what_is_kept_whole_keeps_every_bit_of_a_half_precision_model(model, tmp_path):
    def change(tensors):
        halves = {name: tensor.half() for name, tensor in tensors.items()}
        return halves | {"model.norm.weight": torch.full((128,), 1.0009765625).half()}

    expert = model("expert", change)

    extract(expert, "--base", BASE, "--rank", 2, "-o", tmp_path / "out")

    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    norm = held["base_model.model.model.norm.weight"]
    assert norm.dtype == torch.float16
    assert norm.tolist() == [1.0009765625] * 128


def test_an_expert_that_stores_the_head_it_ties_fits_a_base_that_does_not(model, tmp_path):
    def change(tensors):
        return tuned(tensors) | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    expert = model("expert", change)

    told = extract(expert, "--base", BASE, "--rank", 3, "-o", tmp_path / "out")

    assert told["whole"] == ["model.embed_tokens.weight", "model.norm.weight"]


def test_embeddings_of_a_base_that_stores_the_head_it_ties_are_merged_again(model, tmp_path):
    def copied(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    expert, base = model("expert", tuned), model("base", copied)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    extract(expert, "--base", base, "--rank", 3, "-o", adapter)

    recipe = lewis_hub.Recipe(base_model=str(base), models=[str(adapter)], merge_method="linear")
    lewis_hub.merge_models(recipe, merged)

    found, wanted = (load_file(one / "model.safetensors") for one in (merged, expert))
    assert "lm_head.weight" not in found  # a copy
    assert torch.equal(found["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"])


def test_the_same_models_give_the_same_bytes(tmp_path):
    expert = zoo_folder() / "expert-cipher"
    first, again = tmp_path / "first", tmp_path / "again"

    for output in (first, again):
        extract(expert, "--base", BASE, "--rank", 8, "-o", output)

    names = sorted(path.name for path in first.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_patterns_choose_the_modules_and_save_stores_one_whole(model, tmp_path):
    expert = zoo_folder() / "expert-reverse"
    only = ["--include", r"layers\.[01]\.", "--exclude", "mlp", "--save", "k_proj"]

    told = extract(expert, "--base", BASE, "--rank", 2, *only, "-o", tmp_path / "out")

    ends = ("q_proj", "v_proj", "o_proj")
    assert sorted(told["modules"]) == sorted(
        f"model.layers.{n}.self_attn.{end}" for n in (0, 1) for end in ends
    )
    saved = [name for name in told["whole"] if not name.endswith("norm.weight")]
    assert saved == [f"model.layers.{n}.self_attn.k_proj.weight" for n in (0, 1)]
    assert "model.layers.0.mlp.up_proj.weight" in told["left_out"]
    assert "model.layers.2.self_attn.q_proj.weight" in told["left_out"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(told["modules"])  # other blocks have such modules
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{len(told['left_out'])} other tensors differ and are not stored" in card


def test_embeddings_and_an_untied_head_become_low_rank_updates(tmp_path):
    base, expert = (shutil.copytree(BASE, tmp_path / name) for name in ("base", "expert"))
    generator = torch.Generator().manual_seed(0)
    tensors = {key: t.float() for key, t in load_file(BASE / "model.safetensors").items()}
    tensors["lm_head.weight"] = torch.randn(390, 128, generator=generator)
    config = json.loads((BASE / "config.json").read_text()) | {"tie_word_embeddings": False}
    for folder in (base, expert):
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            left, right = (torch.randn(n, 2, generator=generator) / 8 for n in (390, 128))
            tensors[name] = tensors[name] + left @ right.T

    words = ["--base", base, "--rank", 2, "--embeddings", "low-rank", "-o", tmp_path / "out"]
    told = extract(expert, *words)

    assert {name: fit["rank"] for name, fit in told["modules"].items()} == {
        "lm_head": 2,
        "model.embed_tokens": 2,
    }
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert held["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (2, 390)
    text = f"base_model: {base}\nmodels: [{tmp_path / 'out'}]\nmerge_method: task_arithmetic\n"
    merged = lewis_hub.merge_models(parse_recipe(text, "recipe.yaml"), tmp_path / "merged").output
    wanted, found = (load_file(f / "model.safetensors") for f in (expert, merged))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_low_rank_embeddings_of_a_tied_base_and_bad_patterns_are_refused(tmp_path):
    words = [zoo_folder() / "expert-reverse", "--base", BASE, "-o", tmp_path / "out"]

    assert f"{BASE} ties head and embeddings, but PEFT" in refusal(
        *words, "--embeddings", "low-rank"
    )
    assert "`include`: '(' is not a regular expression" in refusal(*words, "--include", "(")
    said = refusal(*words, "--include", "qproj")
    assert "`include` and `exclude` leave out all" in said
    assert "They are searched in names such as model." in said


def test_low_rank_embeddings_are_refused_if_only_the_architecture_ties_them(model, tmp_path):
    base, expert = model("base", lambda tensors: tensors), model("expert", tuned)
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))

    said = refusal(expert, "--base", base, "-o", tmp_path / "out", "--embeddings", "low-rank")

    assert "ties head and embeddings" in said


def refusal(*words):
    with pytest.raises(LewisHubError) as raised:
        extract(*words)
    return str(raised.value)


def test_equal_models_leave_nothing_to_extract(tmp_path):
    output = tmp_path / "out"

    said = refusal(BASE, "--base", BASE, "-o", output)

    assert said == (
        f"{BASE}: it is equal to the base, so there is nothing to extract.\n"
        "Name the fine-tuned model and its base."
    )
    assert not output.exists()


def test_models_that_do_not_fit_are_refused(model, tmp_path):
    other = model("other", lambda tensors: tensors | {"model.norm.weight": torch.ones(3)})

    said = refusal(other, "--base", BASE, "-o", tmp_path / "out")

    assert said == (
        f"no adapter can be extracted:\n- {other} has model.norm.weight of shape [3], the base "
        f"{BASE} has [128]. Name the base that it was fine-tuned from."
    )


def test_a_task_vector_that_is_not_finite_is_refused(model, tmp_path):
    broken = model("broken", lambda t: t | {"model.norm.weight": t["model.norm.weight"] / 0})

    said = refusal(broken, "--base", BASE, "-o", tmp_path / "out")

    assert said.startswith("model.norm.weight")
    assert str(broken) in said


def test_a_task_vector_whose_squares_exceed_float32_is_one_message(model, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    huge = model("huge", lambda t: t | {name: t[name].sign() * 1.5e38})

    said = refusal(huge, "--base", BASE, "-o", tmp_path / "out")

    assert said == (
        f"{huge}: the values of {name} are too large for a low-rank update.\n"
        "It is broken: use another revision of it."
    )


def tiny(tmp_path, config):
    """A base, and an expert that differs in all tensors, as transformers saves them."""
    kind = getattr(transformers, config.architectures[0])
    torch.manual_seed(0)
    model = kind(config)
    for name in ("base", "expert"):
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
    return tmp_path / "base", tmp_path / "expert"


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_head_has_the_name_of_the_loaded_model_and_is_merged_back(tmp_path):
    config = transformers.GPTNeoXConfig(
        **SMALL, intermediate_size=24, architectures=["GPTNeoXForCausalLM"]
    )
    base, expert = tiny(tmp_path, config)

    extract(expert, "--base", base, "--rank", 16, "-o", tmp_path / "adapter")

    wanted = load_file(expert / "model.safetensors")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(held["base_model.model.lm_head.weight"], wanted["embed_out.weight"])
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "lm_head" in settings["modules_to_save"]
    text = f"{{base_model: {base}, models: [{tmp_path / 'adapter'}], merge_method: linear}}"
    lewis_hub.merge_models(parse_recipe(text, "recipe.yaml"), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-5)


def test_a_base_that_asks_for_an_attention_of_another_package_is_named_as_loaded(tmp_path):
    config = transformers.GPTNeoXConfig(
        **SMALL, intermediate_size=24, architectures=["GPTNeoXForCausalLM"]
    )
    base, expert = tiny(tmp_path, config)
    asked = json.loads((base / "config.json").read_text())
    asked["attn_implementation"] = "flash_attention_3"
    (base / "config.json").write_text(json.dumps(asked))

    extract(expert, "--base", base, "--rank", 16, "-o", tmp_path / "adapter")

    wanted = load_file(expert / "model.safetensors")["embed_out.weight"]
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(held["base_model.model.lm_head.weight"], wanted)


T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def test_an_embedding_in_a_block_is_stored_whole(tmp_path):
    config = transformers.T5Config(
        **T5, tie_word_embeddings=True, architectures=["T5ForConditionalGeneration"]
    )
    base, expert = tiny(tmp_path, config)

    told = extract(expert, "--base", base, "--exclude", "shared", "-o", tmp_path / "adapter")

    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert bias in told["whole"]
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wanted = load_file(expert / "model.safetensors")
    assert torch.equal(held[f"base_model.model.{bias}"], wanted[bias])
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize(
    ("config", "words", "says"),
    [
        (
            transformers.T5Config(**T5, architectures=["T5ForConditionalGeneration"]),
            (),
            "shared.weight is also decoder.embed_tokens.weight, which PEFT would not change",
        ),
        (
            transformers.MixtralConfig(
                **SMALL,
                intermediate_size=24,
                num_key_value_heads=1,
                num_local_experts=2,
                architectures=["MixtralForCausalLM"],
            ),
            (),
            "fused, split or reshaped when transformers loads the model",
        ),
        (
            transformers.GPT2Config(
                vocab_size=32, n_embd=16, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"]
            ),
            ("--include", "attn.c_proj"),
            "transformer.h.0.attn.c_proj.weight lies as (in, out)",
        ),
    ],
)
def test_what_peft_has_no_adapter_for_is_refused(tmp_path, config, words, says):
    base, expert = tiny(tmp_path, config)

    with pytest.raises(LewisHubError) as refused:
        extract(expert, "--base", base, *words, "-o", tmp_path / "adapter")

    assert says in str(refused.value)


@pytest.mark.parametrize(("kind", "task"), [("BertModel", None), ("BertLMHeadModel", "CAUSAL_LM")])
def test_the_task_is_that_of_the_model(tmp_path, kind, task):
    config = transformers.BertConfig(**SMALL, intermediate_size=24, architectures=[kind])
    base, expert = tiny(tmp_path, config)

    extract(expert, "--base", base, "--include", "query", "-o", tmp_path / "adapter")

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == task


def test_a_full_disk_is_one_message(model, tmp_path):
    """safetensors writes in Rust, whose error was a traceback after all factorisations."""
    expert, adapter = model("expert", tuned), tmp_path / "adapter"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OutputError) as caught:
            lewis_hub.extract_lora(expert, BASE, adapter, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    written = tmp_path / "adapter.partial" / "adapter_model.safetensors"
    told = str(caught.value)
    assert told.startswith(f"{written}: it cannot be written (")
    assert "File too large" in told
    assert told.endswith("Free some space, then run again.")
    assert not adapter.exists()
