"""Stacked blocks, from the recipe to a model that transformers loads, over HTTP."""

import json
import shutil

import pytest
import torch
import yaml
from hub_models import weight_bytes
from safetensors.torch import load_file, save_file

import lewis_hub
from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.report.lock import Lock
from lewis_hub.workflow.resources import Execution

STACK = """base_model: zoo/base
slices:
  - sources: [{model: zoo/base, layer_range: [0, 4]}]
  - sources:
      - model: zoo/expert-reverse
        layer_range: [2, 6]
        parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1.0}]}
merge_method: passthrough
"""
TIES = """base_model: zoo/base
slices:
  - sources:
      - {model: zoo/base, layer_range: [0, 4]}
      - {model: zoo/expert-reverse, layer_range: [0, 4], parameters: {density: [0.2, 0.8]}}
      - {model: zoo/expert-cipher, layer_range: [1, 5]}
    parameters: {weight: 0.5}
  - sources:
      - {model: zoo/expert-cipher, layer_range: [3, 6]}
      - {model: zoo/base, layer_range: [3, 6]}
merge_method: dare_ties
parameters: {density: 0.6}
"""
SCORED = f"evaluate: {{tasks: [zoo_reverse], include: {zoo_folder() / 'tasks'}, limit: 3}}\n"


def recipe(text):
    return parse_recipe(text, "recipe.yaml")


def zoo(name):
    return load_file(zoo_folder() / name / "model.safetensors")


def test_a_stack_is_told_before_a_download(api):
    report = pipeline.check(recipe(STACK))

    assert report.problems == report.notes == ()
    assert [source.role for source in report.sources] == ["base", "expert"]
    base = zoo("base")
    added = sum(tensor.nbytes for name, tensor in base.items() if ".layers.0." in name) * 2
    assert report.output_bytes == sum(tensor.nbytes for tensor in base.values()) + added
    assert report.disk_bytes == report.output_bytes
    scored = pipeline.check(recipe(STACK + SCORED))
    floats = sum(tensor.numel() for tensor in base.values()) + added // 2
    largest = max(tensor.numel() for tensor in base.values())
    held = (4 * 2 + 8 * 4) * largest  # two sources in float32, four copies in float64
    logits = 128 * 256 * 390 * 8  # at most 128 texts of 256 tokens, one and a half times
    assert scored.memory_bytes == 900_000_000 + max(4 * floats + 3 * logits // 2, held)


def test_a_stack_leaves_a_configuration_of_its_depth_and_a_recipe_that_makes_it_again(
    api, tmp_path
):
    merged = pipeline.merge_models(recipe(TIES), tmp_path / "out")

    config = json.loads((merged.output / "config.json").read_text())
    shipped = json.loads((zoo_folder() / "base" / "config.json").read_text())
    assert config["num_hidden_layers"] == 7
    assert {k for k in config if config[k] != shipped.get(k)} <= {
        "num_hidden_layers",
        "layer_types",
    }
    again = lewis_hub.read_recipe(merged.output / "lewis" / "recipe.yaml")
    assert [str(s.model).partition("@")[0] for s in again.slices[1].sources] == [
        "zoo/expert-cipher",
        "zoo/base",
    ]
    assert all(s.model.revision for one in again.slices for s in one.sources)
    assert pipeline.merge_models(recipe(TIES), tmp_path / "out").status == "unchanged"
    twice = pipeline.merge_models(again, tmp_path / "again", Execution(runner="inline"))
    assert weight_bytes(twice.output) == weight_bytes(merged.output)
    locks = [
        Lock.from_json((f / "lewis/lock.json").read_text()) for f in (merged.output, twice.output)
    ]
    assert locks[0].digest == locks[1].digest
    assert [one.name for one in locks[0].inputs] == [
        "zoo/base",
        "zoo/expert-reverse",
        "zoo/expert-cipher",
    ]


def test_a_lock_tells_apart_which_source_a_slice_takes(api, tmp_path):
    first = """slices:
  - sources: [{model: zoo/base, layer_range: [0, 2]}]
  - sources: [{model: zoo/expert-cipher, layer_range: [0, 2]}]
  - sources: [{model: zoo/base, layer_range: [0, 2]}]
merge_method: passthrough
"""
    head, mark, tail = first.rpartition("zoo/base")
    second = head + "zoo/expert-cipher" + tail
    assert mark

    made = pipeline.merge_models(recipe(first), tmp_path / "out")
    before = weight_bytes(made.output)
    other = pipeline.merge_models(recipe(second), tmp_path / "out", Execution(replace=True))

    assert other.status == "merged"
    assert weight_bytes(other.output) != before


def test_card_and_mergekit_configuration_tell_the_slices(api, tmp_path):
    folder = pipeline.merge_models(recipe(TIES + "dtype: bfloat16\n"), tmp_path / "out").output

    card = (folder / "README.md").read_text()
    assert "This language model stacks 7 blocks that are made from blocks of" in card
    shown = card[card.index("### Slices") : card.index("Tensors before the blocks")]
    rows = [line for line in shown.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 0–3", "| 4–6"]
    assert "0–3, " in rows[0]
    assert rows[0].endswith(" 1–4 |")
    assert rows[1].split(" | ")[1].startswith("base [`zoo/base`]")
    told = yaml.safe_load((folder / "mergekit_config.yml").read_text())
    assert "models" not in told
    assert told["base_model"] == told["slices"][0]["sources"][0]["model"]
    assert told["slices"][0]["parameters"] == {"weight": 0.5}
    second = told["slices"][0]["sources"][1]
    assert second["model"].startswith("zoo/expert-reverse@")
    assert (second["layer_range"], second["parameters"]) == ([0, 4], {"density": [0.2, 0.8]})
    assert told["parameters"] == {"density": 0.6}
    lines = (folder / "mergekit_config.yml").read_text().splitlines()
    assert "    layer_range: [3, 6]" in lines
    assert recipe((folder / "mergekit_config.yml").read_text()).slices[1].sources[
        1
    ].blocks == range(3, 6)


def test_a_model_stacked_on_itself_has_no_expert_and_a_card_all_the_same(api, tmp_path):
    text = STACK.replace("zoo/expert-reverse", "zoo/base")

    folder = pipeline.merge_models(recipe(text), tmp_path / "out").output

    merged, base = load_file(folder / "model.safetensors"), zoo("base")
    for number, block in enumerate((0, 1, 2, 3, 2, 3, 4, 5)):
        for component in ("self_attn.o_proj", "mlp.up_proj"):
            value = base[f"model.layers.{block}.{component}.weight"]
            value = value.float() / 2 if number > 3 and component.endswith("o_proj") else value
            found = merged[f"model.layers.{number}.{component}.weight"]
            assert torch.equal(found, value.bfloat16())
    assert "made from blocks of [`zoo/base`]" in (folder / "README.md").read_text()


def test_the_base_alone_may_be_passed_through_and_is_nothing_to_merge_otherwise(api, tmp_path):
    text = "base_model: zoo/base\nmodels: [{model: zoo/base}]\nmerge_method: passthrough\n"

    merged = pipeline.merge_models(recipe(text), tmp_path / "out")

    found, base = load_file(merged.output / "model.safetensors"), zoo("base")
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    assert one_problem(text.replace("passthrough", "ties")) == (
        "method `ties`: there is nothing to merge.\nList at least one expert."
    )


def test_an_adapter_may_be_a_source_of_a_slice(api, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    key = "base_model.model.model.layers.2.mlp.up_proj"
    a, b = torch.randn(4, 128), torch.randn(352, 4)
    save_file(
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, folder / "adapter_model.safetensors"
    )
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    text = STACK.replace("zoo/expert-reverse", f"zoo/base+{folder}")

    merged = pipeline.merge_models(recipe(text), tmp_path / "out").output

    found = load_file(merged / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    dense = zoo("base")[name.format(2)].float() + b @ a
    torch.testing.assert_close(found[name.format(4)].float(), dense, rtol=2**-7, atol=1e-3)
    assert torch.equal(found[name.format(2)], zoo("base")[name.format(2)])
    assert found[name.format(4)].dtype == torch.bfloat16


CALIBRATED = """guide:
  name: NAME
  calibration: {dataset: zoo/reverse, text: "{question} {answer}", samples: 2}
"""
WHOLE = """base_model: zoo/base
models: [{model: zoo/expert-reverse}, {model: zoo/expert-cipher}]
merge_method: dare_ties
"""


def in_slices(*ranges, experts=("reverse", "cipher")):
    """Blocks of base and experts, a slice for each range."""
    models = ["zoo/base", *(f"zoo/expert-{name}" for name in experts)]
    slices = [
        [{"model": model, "layer_range": [first, end]} for model in models] for first, end in ranges
    ]
    document = {
        "base_model": "zoo/base",
        "slices": [{"sources": sources} for sources in slices],
        "merge_method": "dare_ties",
    }
    return yaml.safe_dump(document)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["uniform", "lewis"])
def test_a_guide_on_slices_of_all_blocks_gives_the_merge_of_whole_models(api, tmp_path, guide):
    asked = CALIBRATED.replace("NAME", guide)

    whole = pipeline.merge_models(recipe(WHOLE + asked), tmp_path / "whole").output
    stacked = pipeline.merge_models(recipe(in_slices((0, 2), (2, 6)) + asked), tmp_path / "stacked")

    one, two = (load_file(f / "model.safetensors") for f in (whole, stacked.output))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    densities = [
        json.loads((f / "lewis/density.json").read_text()) for f in (whole, stacked.output)
    ]
    assert densities[0] == densities[1]
    assert len(list((stacked.output / "lewis").glob("maps-*.png"))) == 2
    assert (stacked.output / "lewis/importance.json").exists() == (guide == "lewis")


@pytest.mark.slow
def test_densities_of_a_guide_follow_the_blocks_that_are_stacked(api, tmp_path):
    asked = CALIBRATED.replace("NAME", "lewis")
    whole = pipeline.calibrate(recipe(WHOLE + asked), tmp_path / "whole").schedule
    text = in_slices((0, 4), (2, 6), experts=["cipher"]) + asked

    merged = pipeline.merge_models(recipe(text), tmp_path / "stacked").output

    found = json.loads((merged / "lewis/density.json").read_text())["experts"][0]["tensors"]
    given = next(one for one in whole.experts if "cipher" in one.source).tensors
    origins = [0, 1, 2, 3, 2, 3, 4, 5]
    for block, origin in enumerate(origins):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert found[name.format(block)] == given[name.format(origin)]
    assert len(found) == len(given) * 8 // 6
    told = yaml.safe_load((merged / "mergekit_config.yml").read_text())
    rows = told["slices"][1]["sources"][1]["parameters"]["density"]
    by_filter = {row.get("filter"): row["value"] for row in rows}
    assert (
        by_filter["model.layers.5.mlp.up_proj.weight"] == given["model.layers.5.mlp.up_proj.weight"]
    )
    assert "model.layers.6.mlp.up_proj.weight" not in by_filter
    assert by_filter[None] == 1.0
    again = lewis_hub.read_recipe(merged / "lewis" / "recipe.yaml")
    assert weight_bytes(pipeline.merge_models(again, tmp_path / "again").output) == weight_bytes(
        merged
    )


def test_a_guide_on_slices_needs_models_of_one_depth(api, tmp_path):
    text = STACK.replace("zoo/expert-reverse", "zoo/base").replace("        parameters", "#")
    deep = pipeline.merge_models(recipe(text), tmp_path / "deep").output
    shutil.rmtree(deep / "lewis")
    asked = in_slices((0, 4)).replace("zoo/expert-cipher", str(deep))

    (problem,) = pipeline.check(recipe(asked + CALIBRATED.replace("NAME", "lewis"))).problems

    assert problem == (
        f"guide: {deep} has 8 blocks and the base 6, so their importance cannot be compared block "
        "by block. Use guide `uniform`, or set `density`."
    )
    assert pipeline.check(recipe(asked + CALIBRATED.replace("NAME", "uniform"))).problems == ()


@pytest.mark.slow  # scores five models
def test_a_stack_is_scored_beside_its_uniform_twin(api, tmp_path):
    text = in_slices((0, 4), (2, 6), experts=["cipher"]) + CALIBRATED.replace("NAME", "lewis")

    merged = pipeline.merge_models(recipe(text + SCORED), tmp_path / "out")

    labels = [label.partition("@")[0] for label in merged.scores.tasks["zoo_reverse"].models]
    assert labels == ["base", "expert:zoo/expert-cipher", "uniform", "merged"]


@pytest.mark.slow  # scores three models
def test_a_stack_is_scored_beside_the_models_that_it_is_made_from(api, tmp_path):
    merged = pipeline.merge_models(recipe(STACK + SCORED), tmp_path / "out")

    labels = [label.partition("@")[0] for label in merged.scores.tasks["zoo_reverse"].models]
    assert labels == ["base", "expert:zoo/expert-reverse", "merged"]


# -- what check refuses


def one_problem(text):
    (problem,) = pipeline.check(recipe(text)).problems
    return problem


def test_a_range_outside_the_model_is_refused_before_a_download(api):
    sha = api.repo_info("zoo/expert-reverse").sha

    assert one_problem(STACK.replace("[2, 6]", "[2, 7]")) == (
        f"slices[1]: zoo/expert-reverse@{sha} has no blocks [2, 7].\n"
        "It has 6 blocks: [0, 6] are all of them."
    )


def test_a_slice_without_the_base_that_its_method_starts_from_is_refused(api):
    text = TIES.replace("      - {model: zoo/base, layer_range: [3, 6]}\n", "")
    assert one_problem(text) == (
        "slices[1]: the base `zoo/base` is not among the slice's sources.\n"
        "Add it to `sources` with its `layer_range`."
    )


def test_licences_of_all_sources_count(api, tmp_path):
    shutil.copytree(zoo_folder() / "expert-reverse", tmp_path / "mit")
    (tmp_path / "mit" / "README.md").write_text("---\nlicense: mit\n---\n")
    text = STACK.replace("zoo/expert-reverse", str(tmp_path / "mit"))

    assert "the parents' licences differ" in one_problem(text + "publish: {repo: me/stack}\n")


def test_a_configuration_that_does_not_count_its_blocks_is_refused(api, tmp_path):
    shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))

    assert one_problem(STACK.replace("zoo/base", str(tmp_path / "base"))).startswith(
        f"{tmp_path}/base: its config.json says nowhere that there are 6 blocks.\n"
    )


def test_a_wider_model_is_refused_in_one_message(api, tmp_path):
    tensors = zoo("base")
    name = "model.layers.3.mlp.up_proj.weight"
    shutil.copytree(zoo_folder() / "base", tmp_path / "wide")
    save_file(tensors | {name: torch.zeros(360, 128)}, tmp_path / "wide" / "model.safetensors")

    problem = one_problem(STACK.replace("zoo/expert-reverse", str(tmp_path / "wide")))

    sha = api.repo_info("zoo/base").sha
    assert problem == (
        f"slices[1]: {tmp_path}/wide has {name} of shape [360, 128], the base zoo/base@{sha} has "
        "[352, 128].\nA task vector needs equal shapes: use experts of the same size as the base."
    )


# -- the result, where users load it


@pytest.mark.parametrize("tied", [True, False])
def test_the_stack_computes_what_a_model_assembled_by_hand_computes(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "eos_token_id": None,
    }
    models = []
    for seed, label in enumerate("ab"):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(num_hidden_layers=4, **settings)
        models.append(transformers.LlamaForCausalLM(config).eval())
        models[-1].save_pretrained(tmp_path / label)
    text = f"""slices:
  - sources: [{{model: {tmp_path}/a, layer_range: [0, 3]}}]
  - sources: [{{model: {tmp_path}/b, layer_range: [1, 4]}}]
merge_method: passthrough
"""

    folder = pipeline.merge_models(recipe(text), tmp_path / "out").output
    stacked, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)

    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    first, second = models
    by_hand = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_hidden_layers=6, **settings)
    ).eval()
    by_hand.model.embed_tokens.load_state_dict(first.model.embed_tokens.state_dict())
    blocks = [*first.model.layers[:3], *second.model.layers[1:4]]
    for ours, theirs in zip(by_hand.model.layers, blocks, strict=True):
        ours.load_state_dict(theirs.state_dict())
    by_hand.model.norm.load_state_dict(second.model.norm.state_dict())
    if not tied:
        by_hand.lm_head.load_state_dict(second.lm_head.state_dict())
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        assert torch.equal(stacked(tokens).logits, by_hand(tokens).logits)
    written = stacked.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(
        written, by_hand.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    )
    assert written.shape == (1, 13)


SMALL = {"vocab_size": 96, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}
TYPES = ["sliding_attention", "full_attention"]
ARCHITECTURES = {
    "gpt2": {"n_layer": 4, "n_embd": 32, "n_head": 2},
    "gemma3_text": {
        **NARROW,
        "num_key_value_heads": 1,
        "num_hidden_layers": 4,
        "layer_types": TYPES * 2,
        "sliding_window": 4,
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures_load_with_each_block_as_it_was(tmp_path, architecture):
    transformers = pytest.importorskip("transformers")
    told = SMALL | ARCHITECTURES[architecture]
    config = transformers.AutoConfig.for_model(architecture, **told)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "a")
    text = f"""slices:
  - sources: [{{model: {tmp_path}/a, layer_range: [0, 3]}}]
  - sources: [{{model: {tmp_path}/a, layer_range: [2, 4]}}]
merge_method: passthrough
"""

    folder = pipeline.merge_models(recipe(text), tmp_path / "out").output
    stacked, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )

    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stacked.config.num_hidden_layers == 5
    if "layer_types" in told:
        sliding, full = TYPES
        assert stacked.config.layer_types == [sliding, full, sliding, sliding, full]
    find = "transformer.h" if architecture == "gpt2" else "model.layers"
    ours, theirs = stacked.get_submodule(find), model.get_submodule(find)
    for block, origin in zip(ours, (0, 1, 2, 2, 3), strict=True):
        for name, tensor in theirs[origin].state_dict().items():
            assert torch.equal(block.state_dict()[name], tensor)
    assert stacked.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3).shape == (1, 6)
