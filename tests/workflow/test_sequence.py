"""Matrices fitted one after the other, `inputs: merged`, from the recipe to the card on the zoo."""

from __future__ import annotations

import json
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from statistical_merges import (
    DOWN,
    GUIDE,
    MODELS,
    NORM,
    Q,
    Recorder,
    merge,
    merge_whole_and_in_shards,
    of_three,
    recipe,
    weights,
    write_adapter,
    zoo_weights,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Olmo2Config,
    Olmo2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Zamba2Config,
    Zamba2ForCausalLM,
)

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import NonFiniteError, NotByBlockError, RecipeError
from lewis_hub.workflow.resources import Execution

METHOD = "merge_method: regmean\nparameters: {inputs: merged, off_diagonal: 0.9}\n"
RECIPE = MODELS + METHOD
OWN = RECIPE.replace("inputs: merged, ", "")
IN_BLOCKS = RECIPE.replace("merged,", "merged_block,")


def outputs(folder, skill):
    """Logits of a model on an expert's own texts, of which the first were calibrated on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(zoo_folder() / "base")
    lines = (zoo_folder() / "data" / skill / "train.jsonl").read_text().splitlines()[:40]
    texts = ["Question: {question}\nAnswer: {answer}".format(**json.loads(line)) for line in lines]
    with torch.no_grad():
        return torch.cat([model(**tokenizer(t, return_tensors="pt")).logits[0] for t in texts])


@pytest.mark.slow
def test_the_merge_is_nearer_to_each_expert_than_one_of_matrices_fitted_by_themselves(
    api, tmp_path
):
    merged, own = merge(tmp_path / "merged", RECIPE), merge(tmp_path / "own", OWN)

    for skill in ("reverse", "cipher"):
        expert = outputs(zoo_folder() / f"expert-{skill}", skill)
        distances = [(outputs(folder, skill) - expert).norm() for folder in (merged, own)]
        assert distances[0] < 0.8 * distances[1]
    found, by_itself = weights(merged), weights(own)
    assert torch.equal(found[NORM], by_itself[NORM])
    assert not torch.equal(found[DOWN], by_itself[DOWN])
    first = Q.replace("layers.1", "layers.0")
    mean = [w[first] for w in map(zoo_weights, ("expert-reverse", "expert-cipher"))]
    assert not torch.equal(found[first].float(), sum(mean) / 2)


@pytest.mark.parametrize(
    "text",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in (RECIPE, IN_BLOCKS)), RECIPE + GUIDE],
)
def test_the_bytes_are_the_same_on_any_runner_in_any_shards_and_on_any_number_of_threads(
    api, tmp_path, text
):
    whole, parts = merge_whole_and_in_shards(tmp_path, text)

    found = weights(parts)
    for name, tensor in weights(whole).items():
        assert torch.equal(found[name], tensor)


@pytest.mark.slow
def test_a_guides_densities_are_heard(api, tmp_path):
    plain, guided = (
        weights(merge(tmp_path / "plain", RECIPE)),
        weights(merge(tmp_path / "g", RECIPE + GUIDE)),
    )

    assert torch.equal(plain[NORM], guided[NORM])  # density 1
    assert not torch.equal(plain[Q], guided[Q])


@pytest.mark.slow
def test_norms_are_fitted_too_where_it_is_asked_for(api, tmp_path):
    text = RECIPE.replace(
        "off_diagonal", "affine: [{filter: layers.1., value: true}], off_diagonal"
    )

    output = merge(tmp_path / "affine", text)

    found, plain = weights(output), weights(merge(tmp_path / "plain", RECIPE))
    moved = {name for name in found if "norm" in name and not torch.equal(found[name], plain[name])}
    norms = ("input_layernorm", "post_attention_layernorm")
    assert moved == {f"model.layers.1.{norm}.weight" for norm in norms}
    verdict = lewis_hub.verify(lewis_hub.ModelReference(name=str(output)), rebuild=True)
    assert verdict.problems == ()


@pytest.mark.parametrize("text", [OWN, IN_BLOCKS])
def test_norms_are_fitted_in_sequence_only(text):
    with pytest.raises(RecipeError) as caught:
        recipe(text.replace("off_diagonal", "affine: true, off_diagonal"))

    said = str(caught.value)
    assert "`parameters.affine`: norms and biases are fitted in sequence only." in said
    assert "Write `inputs: merged` beside it, or remove it." in said


def test_experts_blocks_run_on_the_merged_models_hidden_states(api, tmp_path):
    output = merge(tmp_path / "out", IN_BLOCKS)

    card = " ".join((output / "README.md").read_text().split())
    assert "in a block of an expert, which gets the hidden states of the merged model" in card
    assert "nguyen2026regmean" in card
    assert "gu2026featcal" not in card
    verdict = lewis_hub.verify(lewis_hub.ModelReference(name=str(output)), rebuild=True)
    assert verdict.problems == ()


def test_an_interrupted_merge_goes_on_with_the_next_block(api, tmp_path):
    whole, first = (
        merge(tmp_path / "whole", RECIPE),
        Recorder("Fitting block by block", after=300),
    )
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", RECIPE, progress=first)
    done = list((tmp_path / "out.partial").rglob("fitted/*/*/*.safetensors"))

    again = merge(tmp_path / "out", RECIPE)

    assert 0 < len(done) < 6
    found = weights(again)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(whole).items())


@pytest.mark.slow
def test_fitted_matrices_are_taken_up_where_the_merge_was_interrupted(api, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", RECIPE, progress=Recorder("Merging"))
    told = Recorder()

    found = weights(merge(tmp_path / "out", RECIPE, progress=told))

    assert "Fitting block by block" not in told.totals
    whole = weights(merge(tmp_path / "whole", RECIPE))
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_what_was_fitted_for_other_settings_does_not_stay_on_the_disk(api, tmp_path):
    for text in (RECIPE, RECIPE.replace("0.9", "0.8")):
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "out", text, progress=Recorder("Merging"))

    left = list((tmp_path / "out.partial").rglob("fitted.json"))

    assert len(left) == 1
    found = weights(merge(tmp_path / "out", RECIPE))
    whole = weights(merge(tmp_path / "whole", RECIPE))
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_merge_can_be_made_again_from_its_lock(api, tmp_path):
    output = merge(tmp_path / "out", RECIPE)

    verdict = lewis_hub.verify(lewis_hub.ModelReference(name=str(output)), rebuild=True)

    assert verdict.problems == ()
    assert lewis_hub.merge_models(recipe(RECIPE), output).status == "unchanged"


def test_an_adapter_counts_as_the_expert_that_it_makes(api, tmp_path):
    change = write_adapter(tmp_path / "adapter")
    text = RECIPE.replace("zoo/expert-reverse", str(tmp_path / "adapter"))

    found = weights(merge(tmp_path / "out", text))

    assert (found[DOWN].float() - zoo_weights("base")[DOWN]).norm() > 0.1 * change.norm()


@pytest.mark.slow
def test_the_uniform_twin_is_fitted_with_its_own_densities(api, tmp_path):
    scored = f"evaluate: {{tasks: [zoo_reverse], include: {zoo_folder() / 'tasks'}, limit: 10, "
    scored += "compare: [uniform]}\n"

    merged = lewis_hub.merge_models(recipe(RECIPE + GUIDE + scored), tmp_path / "out")

    models = list(merged.scores.tasks["zoo_reverse"].models)
    assert models == ["uniform", "task_arithmetic", "merged"]


def test_the_card_tells_what_was_fitted_on_what(api, tmp_path):
    card = " ".join((merge(tmp_path / "out", RECIPE) / "README.md").read_text().split())

    assert (
        "The weight matrices in the blocks were fitted one after the other on calibration" in card
    )
    assert "on other tasks the merge may be far worse than a merge without them" in card
    assert "jin2023dataless" in card
    assert "nguyen2026regmean" in card
    assert "gu2026featcal" in card


def test_check_counts_the_texts_of_each_expert_though_they_are_the_same(api):
    data = "{dataset: zoo/reverse, text: '{question}', samples: 100_000, max_tokens: 10}"
    text = "base_model: zoo/base\nmodels: [{model: zoo/expert-reverse}"
    rest = f"]\n{METHOD}calibration: {data}\n"
    one, two = f"{text}{rest}", f"{text}, {{model: zoo/expert-cipher}}{rest}"

    alone, both = (lewis_hub.check(recipe(asked)) for asked in (one, two))

    states = 2 * 4 * 128 * 100_000 * 10  # of width 128, in both models: on the disk, not in memory
    assert (alone.states_bytes, both.states_bytes) == (states, 2 * states)
    assert both.disk_bytes - alone.disk_bytes == states
    assert both.memory_bytes - alone.memory_bytes < states // 10


def test_check_counts_what_is_fitted(api):
    merged, own = (lewis_hub.check(recipe(text)) for text in (RECIPE, OWN))

    assert merged.problems == own.problems == ()
    assert not any("compensate" in note for note in merged.notes)
    assert merged.disk_bytes < own.disk_bytes
    assert merged.memory_bytes > own.memory_bytes


def copied(name, folder, change):
    """A model of the zoo in a folder, with other weights."""
    copytree(zoo_folder() / name, folder)
    found = load_file(folder / "model.safetensors")
    save_file(change(found), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_check_counts_no_embedding_as_merged_whole(api, tmp_path):
    more = 100_000  # rows

    def longer(found):
        rows = found["model.embed_tokens.weight"]
        padding = rows.new_zeros(more, rows.shape[1])
        return found | {"model.embed_tokens.weight": torch.cat([rows, padding])}

    text = RECIPE
    for name in ("base", "expert-reverse", "expert-cipher"):
        folder = copied(name, tmp_path / name, longer)
        config = json.loads((folder / "config.json").read_text())
        config["vocab_size"] += more
        (folder / "config.json").write_text(json.dumps(config))
        text = text.replace(f"zoo/{name}", str(folder))

    wide, narrow = (lewis_hub.check(recipe(one)) for one in (text, RECIPE))

    assert wide.problems == ()
    embedding = 4 * more * 128
    assert wide.memory_bytes - narrow.memory_bytes == 4 * embedding  # one of each model


@pytest.mark.slow
def test_what_is_nan_in_a_tensor_that_is_made_for_the_measurement_is_told(api, tmp_path):
    def broken(found):
        found["model.embed_tokens.weight"][-1, 0] = torch.nan  # of a token that no text has
        return found

    expert, told = copied("expert-cipher", tmp_path / "odd", broken), Recorder()
    fitted = RECIPE.replace("off_diagonal", "embeddings: true, off_diagonal")
    text = fitted.replace("zoo/expert-cipher", str(expert))

    merge(tmp_path / "out", text, Execution(allow_nan=True), told)

    said = f"1 tensors of {expert} hold NaN or infinity; the base's values replace them."
    assert told.said.count(said) == 1
    with pytest.raises(NonFiniteError) as caught:
        merge(tmp_path / "other", text)
    assert "--allow-nan" in str(caught.value)


def test_an_expert_of_fewer_blocks_cannot_go_beside_the_merge(api, tmp_path):
    def shorter(found):
        return {name: one for name, one in found.items() if not name.startswith("model.layers.5.")}

    expert = copied("expert-cipher", tmp_path / "expert", shorter)
    config = json.loads((expert / "config.json").read_text()) | {"num_hidden_layers": 5}
    (expert / "config.json").write_text(json.dumps(config))
    text = RECIPE.replace("zoo/expert-cipher", str(expert)) + "missing: base\n"

    with pytest.raises(NotByBlockError) as caught:
        merge(tmp_path / "out", text)

    assert lewis_hub.check(recipe(text)).problems == (str(caught.value).replace("\n", " "),)
    assert not list(tmp_path.glob("out*"))  # nothing was begun
    assert str(caught.value) == (
        f"{expert}: its blocks have other matrices than the merge's, so they cannot go side by "
        "side.\nSet `inputs: own` in the recipe's `parameters`: then each matrix is fitted by "
        "itself."
    )


def test_blocks_that_share_weights_are_refused_before_a_download(tmp_path):
    small = {"vocab_size": 259, "hidden_size": 16, "num_attention_heads": 4, "n_mamba_heads": 2}
    small |= {"num_hidden_layers": 4, "num_mem_blocks": 1, "mamba_d_state": 4, "chunk_size": 4}
    kinds = {"layers_block_type": ["mamba", "hybrid"] * 2, "intermediate_size": 24}
    text = of_three(tmp_path, lambda: Zamba2ForCausalLM(Zamba2Config(**small, **kinds)))

    with pytest.raises(NotByBlockError) as caught:
        merge(tmp_path / "out", f"{text}{METHOD}")

    (problem,) = lewis_hub.check(recipe(f"{text}{METHOD}")).problems
    assert problem == str(caught.value).replace("\n", " ")
    assert str(caught.value) == (
        f"{tmp_path}/base: its blocks share weights, so it cannot be calibrated block by block.\n"
        "Set `inputs: own` in the recipe's `parameters`: then each matrix is fitted by itself."
    )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_all_matrices_of_an_encoder_decoder_are_fitted(tmp_path):
    small = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=259, decoder_start_token_id=0, **small)
    text = of_three(tmp_path, lambda: T5ForConditionalGeneration(config))

    assert lewis_hub.check(recipe(f"{text}{METHOD}")).problems == ()
    merge(tmp_path / "out", f"{text}{METHOD}")

    made, one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "one", "two"))
    average = {name: (one[name] + two[name]) / 2 for name in made}
    changed = {n for n in made if not torch.allclose(made[n], average[n], rtol=1e-5, atol=1e-6)}
    matrices = {name for name in made if ".block." in name and made[name].dim() == 2}
    assert changed == {name for name in matrices if "relative_attention_bias" not in name}
    merge(tmp_path / "own", f"{text}merge_method: regmean\n")


def test_check_tells_that_blocks_norm_what_they_add(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 259}
    config = Olmo2Config(**small, num_attention_heads=4, eos_token_id=2)
    text = of_three(tmp_path, lambda: Olmo2ForCausalLM(config))

    told, own = (
        lewis_hub.check(recipe(f"{text}{one}")) for one in (METHOD, "merge_method: regmean\n")
    )

    note = (
        f"the blocks of {tmp_path}/base norm what their last matrix gives "
        "(`post_feedforward_layernorm`), so it is fitted like the others: `compensate` has no "
        "effect."
    )
    assert told.problems == own.problems == ()
    assert note in told.notes
    assert note not in own.notes


def test_no_other_word_is_taken_for_inputs(api):
    (problem,) = lewis_hub.check(recipe(RECIPE.replace("merged,", "mergd,"))).problems

    assert "`inputs`" in problem
    assert "`own`" in problem
    assert "`merged`" in problem


def test_inputs_are_of_one_kind_for_all_matrices():
    with pytest.raises(RecipeError) as caught:
        recipe(RECIPE.replace("merged,", "[{filter: mlp, value: own}, {value: merged}],"))

    assert "`parameters.inputs`: `inputs` takes one value for all matrices." in str(caught.value)
