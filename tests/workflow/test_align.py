"""Models without a common base: their units are matched, and the merge reads them permuted."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lewis_hub
from lewis_hub.checkpoint.reader import TensorReader, local_checkpoint, read_tensor
from lewis_hub.errors import NonFiniteError, RecipeError
from lewis_hub.merge.permutation import PermutingReader
from lewis_hub.merge.symmetries import permute, units_of
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resolve import require_streamable
from lewis_hub.workflow.resources import Execution
from tests.unit_orders import random_orders

N_TOKENS = 390  # of the zoo's tokenizer
TEXTS = 'calibration: {dataset: texts.jsonl, text: "{text}", samples: 6}\n'
RECIPE = """models:
  - model: one
  - model: two
    align: dual_space
merge_method: linear
"""


def write_model(folder, seed=0, tie=True, **others):
    """A tiny random Llama with the zoo's tokenizer."""
    settings = {
        "vocab_size": N_TOKENS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tie,
        "initializer_range": 0.2,
    }
    config = transformers.LlamaConfig(**{**settings, **others})
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lewis_hub.zoo_folder() / "base" / name, folder / name)


def permuted_copy(folder, copy, seed=1):
    """The same model with its units in a random order."""
    shutil.copytree(folder, copy)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    checkpoint = local_checkpoint("it", folder)
    units = units_of(checkpoint, config)
    orders = random_orders(units, np.random.default_rng(seed))
    permuted = permute(checkpoint, units, orders)
    with TensorReader(folder, "it") as files:
        reader = PermutingReader(files)
        tensors = {name: read_tensor(reader, one) for name, one in permuted.tensors.items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return orders


@pytest.fixture
def models(tmp_path):
    """Two models of which one is the other with its units in another order, and texts."""
    write_model(tmp_path / "one")
    permuted_copy(tmp_path / "one", tmp_path / "two")
    lines = [json.dumps({"text": f"reverse BAKOT{n} and encode OZUN{n * n}"}) for n in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def recipe(folder, text=RECIPE + TEXTS):
    return parse_recipe(text, "recipe.yaml").placed_in(folder)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_merge_with_its_own_permuted_copy_is_the_model_itself(models, monkeypatch):
    assert lewis_hub.check(recipe(models)).problems == ()

    merged = lewis_hub.merge_models(recipe(models), models / "merged", progress=False)

    own, found = weights(models / "one"), weights(merged.output)
    assert all(found[name].equal(own[name]) for name in own)
    aligned = json.loads((merged.output / "lewis/alignment.json").read_text(encoding="utf-8"))
    [two] = aligned["models"]
    assert (two["source"], two["reference"], two["weight_similarity"]) == ("two", "one", 0.5)
    assert sorted(two["orders"]["residual"]) == list(range(32))
    assert two["similarity"]["residual"]["after"] == pytest.approx(1, abs=1e-4)
    lock = json.loads((merged.output / "lewis/lock.json").read_text(encoding="utf-8"))
    assert "lewis/alignment.json" in lock["outputs"]
    card = (merged.output / "README.md").read_text(encoding="utf-8")
    assert "`two` was trained from another start than `one`." in card
    assert "| residual stream | 32 | " in card
    assert "xu2024training" in card
    monkeypatch.chdir(models)  # a rebuild finds local folders as the recipe names them
    assert lewis_hub.verify(merged.output, rebuild=True).problems == ()


@pytest.mark.slow
def test_a_guide_measures_the_permuted_model(models):
    """Guided and aligned, the copy gives the bytes of the model that it was made from."""
    write_model(models / "expert", seed=5)
    both = {
        n: 0.9 * a + 0.1 * b
        for (n, a), b in zip(
            weights(models / "one").items(), weights(models / "expert").values(), strict=True
        )
    }
    save_file(both, models / "expert" / "model.safetensors", metadata={"format": "pt"})
    permuted_copy(models / "expert", models / "shuffled")
    text = """base_model: one
models:
  - model: NAME
merge_method: ties
guide: {name: lewis, gamma: 0.3, epsilon: 0.8}
"""
    aligned = text.replace("NAME", "shuffled\n    align: dual_space")

    plain = lewis_hub.merge_models(
        recipe(models, text.replace("NAME", "expert") + TEXTS), models / "plain", progress=False
    )
    merged = lewis_hub.merge_models(
        recipe(models, aligned + TEXTS), models / "merged", progress=False
    )

    own, found = weights(plain.output), weights(merged.output)
    assert all(found[name].equal(own[name]) for name in own)


def test_weights_alone_need_no_texts(models):
    alone = "align: {method: dual_space, weight_similarity: 1}"
    text = RECIPE.replace("align: dual_space", alone)

    merged = lewis_hub.merge_models(recipe(models, text), models / "merged", progress=False)

    assert all(
        found.equal(own)
        for found, own in zip(
            weights(merged.output).values(), weights(models / "one").values(), strict=True
        )
    )


def test_two_copies_of_a_model_are_both_aligned(models):
    """The second one takes the orders of the first, which has another name."""
    shutil.copytree(models / "two", models / "copy")
    alone = "align: {method: dual_space, weight_similarity: 1}"
    text = RECIPE.replace("align: dual_space", f"{alone}\n  - model: copy\n    {alone}")

    merged = lewis_hub.merge_models(recipe(models, text), models / "merged", progress=False)

    found = weights(merged.output)
    for name, own in weights(models / "one").items():
        assert torch.allclose(found[name], own, rtol=0, atol=1e-6), name
    told = json.loads((merged.output / "lewis/alignment.json").read_text(encoding="utf-8"))
    assert [one["source"] for one in told["models"]] == ["two", "copy"]


def test_models_of_another_size_are_refused(models):
    write_model(models / "three", seed=2)
    config = json.loads((models / "three/config.json").read_text(encoding="utf-8"))
    config["num_key_value_heads"] = 4
    (models / "three/config.json").write_text(json.dumps(config), encoding="utf-8")
    text = RECIPE.replace("two", "three") + TEXTS

    problems = lewis_hub.check(recipe(models, text)).problems

    assert problems == (
        "three: its architecture (llama, 2 blocks, 4 heads of 8, 4 with keys) is not that of one "
        "(llama, 2 blocks, 4 heads of 8, 2 with keys). Merge models of one architecture and size.",
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            RECIPE.replace("model: one", "model: one\n    align: dual_space") + TEXTS,
            "`one` is the model that the others are aligned with.",
        ),
        (RECIPE, "`align` needs calibration data, but `one` has none."),
        (
            RECIPE.replace("dual_space", "{method: dual_space, weight_similarity: 1.5}"),
            "expected less than or equal to 1, found 1.5.",
        ),
    ],
)
def test_a_recipe_that_cannot_be_aligned_is_refused_when_it_is_read(text, problem):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe.yaml")

    assert problem in str(caught.value)


NARROW = {"hidden_size": 4, "head_dim": 1, "num_hidden_layers": 1}
USUAL = "Align models with blocks of the usual proportions, or remove `align`."


def slow_to_align(name, n_bytes, n_units, n_heads):
    return (
        f"{name} takes very long to align: its {n_bytes} of weights have 1 blocks, up to "
        f"{n_units} units in a group, and {n_heads} groups of heads. {USUAL}"
    )


def test_small_models_that_take_hours_or_gigabytes_to_align_are_refused(models):
    """292 kB each took two minutes, and 580 kB each 9.4 GB, of which `check` told 2."""
    for name in ("wide", "other"):
        write_model(models / name, intermediate_size=12_000, **NARROW)
    heads = {"hidden_size": 400, "num_attention_heads": 400, "num_key_value_heads": 400}
    for name in ("many", "more"):
        write_model(models / name, **NARROW | heads)
    alone = "align: {method: dual_space, weight_similarity: 1}"
    text = RECIPE.replace("align: dual_space", alone)

    def problems(one, two):
        asked = text.replace("model: one", f"model: {one}").replace("model: two", f"model: {two}")
        return lewis_hub.check(recipe(models, asked)).problems

    assert problems("wide", "other") == (
        "other takes 2.9 GB of memory to align with wide: both together have 1.2 MB of weights. "
        + USUAL,
        slow_to_align("wide", "582.5 kB", "12,000", 2),
        slow_to_align("other", "582.5 kB", "12,000", 2),
    )
    assert problems("many", "more") == (
        slow_to_align("many", "3.4 MB", "400", 400),
        slow_to_align("more", "3.4 MB", "400", 400),
    )


def test_a_small_model_of_very_many_blocks_is_not_aligned_by_activations(models):
    """The products over tokens of all its blocks took 6.8 GB."""
    write_model(models / "deep", **NARROW | {"num_hidden_layers": 300, "head_dim": 8})
    asked = "{depth: segment_wise, width: neuron_matching}"
    text = RECIPE.replace("two", "deep").replace("dual_space", asked)

    assert lewis_hub.check(recipe(models, text + TEXTS)).problems == (
        "deep takes 5.1 GB of memory to align with one: both together have 1.3 MB of weights. "
        + USUAL,
    )


def test_what_cannot_align_says_so(models):
    scored = RECIPE + TEXTS + "evaluate: {tasks: [zoo_reverse]}\n"
    with pytest.raises(RecipeError, match="`tune` merges models as they are"):
        lewis_hub.tune_recipe(recipe(models, scored), lewis_hub.Search(), models / "tuning")
    with pytest.raises(RecipeError, match="`align` runs whole models, and --stream keeps none"):
        require_streamable(recipe(models))


def test_other_tokenizers_are_refused(models):
    file = models / "two" / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(document), encoding="utf-8")

    problems = lewis_hub.check(
        recipe(models, RECIPE + TEXTS + "tokenizer_source: union\n")
    ).problems

    assert problems[0].startswith("two cannot be aligned with one: `align` compares both on the ")


BY_WEIGHTS = RECIPE.replace("dual_space", "{method: dual_space, weight_similarity: 1}")


@pytest.mark.parametrize("allow_nan", [False, True])
def test_weights_that_are_not_finite_are_one_message(models, tmp_path, allow_nan):
    name, found = "model.layers.1.mlp.up_proj.weight", weights(models / "two")
    found[name][3, 4] = float("nan")
    save_file(found, models / "two" / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(NonFiniteError, match=f"{name} holds NaN or infinity in two"):
        lewis_hub.merge_models(
            recipe(models, BY_WEIGHTS), tmp_path / "out", Execution(allow_nan=allow_nan)
        )


def test_weights_whose_products_overflow_are_aligned_by_the_others(models, tmp_path):
    for folder in (models / "one", models / "two"):
        found = weights(folder)
        for name in found:
            if "mlp" in name:
                found[name] *= 1e25
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    merged = lewis_hub.merge_models(recipe(models, BY_WEIGHTS), tmp_path / "out").output

    assert weights(merged).keys() == weights(models / "one").keys()


def test_a_tensor_that_one_of_two_models_lacks_is_named(models):
    found = weights(models / "two")
    found["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(32)
    save_file(found, models / "two" / "model.safetensors", metadata={"format": "pt"})
    asked = recipe(models, BY_WEIGHTS + "missing: base\n")

    [problem] = lewis_hub.check(asked).problems

    assert problem == (
        "one: it lacks model.layers.0.self_attn.o_proj.bias, which two has. "
        "Remove `align` from the model."
    )
