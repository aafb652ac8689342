"""Models of different depth: their blocks are matched, and the merge has those of the reference."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lewis_hub
from lewis_hub.errors import NonFiniteError, RecipeError
from lewis_hub.merge.aligned import AlignedModel, MatchedBlocks
from lewis_hub.recipe.read import parse_recipe
from tests.workflow.test_align import N_TOKENS, permuted_copy

IDS = torch.arange(40).reshape(2, 20) % N_TOKENS
WRITERS = re.compile(r"(?:o_proj|down_proj|c_proj)\.(?:weight|bias)$")
RECIPE = """models:
  - model: FIRST
    parameters: {weight: SHARE}
  - model: SECOND
    parameters: {weight: REST}
    align: ALIGN
merge_method: linear
calibration: {dataset: texts.jsonl, text: "{text}", samples: 6}
"""


def llama(n_blocks):
    return transformers.LlamaConfig(
        vocab_size=N_TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )


def gpt2(n_blocks):
    return transformers.GPT2Config(
        vocab_size=N_TOKENS,
        n_layer=n_blocks,
        n_embd=32,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )


def write_model(folder, n_blocks, seed=0, kind=llama):
    """A tiny random model with the zoo's tokenizer."""
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(kind(n_blocks)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lewis_hub.zoo_folder() / "base" / name, folder / name)


def deepened(folder, copy, blocks, identity=()):
    """The same model with blocks repeated; those at the places `identity` put out nothing."""
    shutil.copytree(folder, copy)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    number = "n_layer" if "n_layer" in config else "num_hidden_layers"
    config[number] = len(blocks)
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors, own = {}, weights(folder)
    for name, tensor in own.items():
        found = re.search(r"(.*\.)(\d+)(\..*)", name)
        places = [place for place, one in enumerate(blocks) if found and one == int(found[2])]
        for place in places:
            is_zero = place in identity and WRITERS.search(name)
            tensors[f"{found[1]}{place}{found[3]}"] = tensor * 0 if is_zero else tensor.clone()
        if not found:
            tensors[name] = tensor
    write_weights(copy, tensors)


def write_weights(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def weights(folder):
    return load_file(folder / "model.safetensors")


def read(folder):
    return weights(folder).items()


@torch.no_grad()
def logits(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")(IDS).logits


@pytest.fixture
def folder(tmp_path):
    """Calibration texts, beside which a test writes its models."""
    lines = [json.dumps({"text": f"reverse BAKOT{n} and encode OZUN{n * n}"}) for n in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def written(first, second, share=0.5, align="segment_wise"):
    found = RECIPE.replace("FIRST", first).replace("SECOND", second).replace("ALIGN", align)
    return found.replace("SHARE", str(share)).replace("REST", str(1 - share))


def recipe(folder, first, second, share=0.5, align="segment_wise"):
    text = written(first, second, share, align)
    return parse_recipe(text, "recipe.yaml").placed_in(folder)


def merge(folder, *args, **options):
    asked = recipe(folder, *args, **options)
    assert lewis_hub.check(asked).problems == ()
    return lewis_hub.merge_models(asked, folder / "merged", progress=False).output


def merged_by(method, folder, base, entry):
    """Merge one model onto the base by a method that measures both; return the output."""
    text = f"""base_model: {base}
models:
  - model: {entry}
{method}
calibration: {{dataset: texts.jsonl, text: "{{text}}", samples: 6}}
"""
    asked = parse_recipe(text, "recipe.yaml").placed_in(folder)
    output = folder / f"merged-{len([*folder.glob('merged-*')])}"
    return lewis_hub.merge_models(asked, output, progress=False).output


def numbers(output):
    [one] = json.loads((output / "lewis/alignment.json").read_text(encoding="utf-8"))["models"]
    return one["blocks"]["numbers"]


@pytest.mark.slow
def test_a_model_merged_with_itself_stays_as_it_is(folder):
    write_model(folder / "one", 3)
    shutil.copytree(folder / "one", folder / "two")

    output = merge(folder, "one", "two")

    assert numbers(output) == [0, 1, 2]
    own, found = weights(folder / "one"), weights(output)
    assert all(found[name].equal(own[name]) for name in own)


def test_a_model_with_repeated_blocks_is_matched_with_the_original(folder, monkeypatch):
    write_model(folder / "one", 3)
    deepened(folder / "one", folder / "two", [0, 0, 1, 2, 2])

    output = merge(folder, "one", "two")

    assert [[0, 0, 1, 2, 2][number] for number in numbers(output)] == [0, 1, 2]
    own, found = weights(folder / "one"), weights(output)
    assert found.keys() == own.keys()
    assert all(found[name].equal(own[name]) for name in own)
    card = (output / "README.md").read_text(encoding="utf-8")
    [first, second] = sorted({0, 1, 2, 3, 4} - set(numbers(output)))
    assert (
        "`two` has 5 blocks and `one` has 3. Its blocks were first put in the places of those that "
        f"they resemble most, in their order. Its blocks {first}, {second} had no place and were "
        "left out, which changes its outputs."
    ) in card
    assert (
        "Similarity (50 % cosine of weights, 50 % CKA of outputs) of the blocks of one (rows) and "
        "two (columns). Framed pairs were matched."
    ) in card
    assert 'src="lewis/blocks-two-light.png"' in card
    assert "xu2024heterogeneous" in card
    assert "xu2024training" not in card
    lock = json.loads((output / "lewis/lock.json").read_text(encoding="utf-8"))
    files = ("lewis/alignment.json", "lewis/blocks-two-light.png", "lewis/blocks-two-dark.png")
    assert all(file in lock["outputs"] for file in files)
    monkeypatch.chdir(folder)  # a rebuild finds local folders as the recipe names them
    assert lewis_hub.verify(output, rebuild=True).problems == ()


@pytest.mark.parametrize("kind", [pytest.param(llama, marks=pytest.mark.slow), gpt2])
def test_in_the_places_of_a_deeper_model_it_has_the_outputs_that_it_had(kind, folder):
    write_model(folder / "deep", 5, seed=1, kind=kind)
    write_model(folder / "small", 3, kind=kind)

    output = merge(folder, "deep", "small", share=0)

    assert (logits(output) - logits(folder / "small")).abs().max() < 1e-5
    own, found = weights(folder / "deep"), weights(output)
    empty = [place for place, number in enumerate(numbers(output)) if number is None]
    assert len(empty) == 2
    for name, tensor in own.items():
        if re.search(rf"\.(?:{'|'.join(map(str, empty))})\.", name):
            expected = tensor * 0 if WRITERS.search(name) else tensor
            assert found[name].equal(expected), name


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0, 1])
def test_the_places_may_depend_on_outputs_or_weights_alone(weight, folder):
    write_model(folder / "small", 2)
    deepened(folder / "small", folder / "deep", [0, 0, 1, 1], identity=[1, 2])
    align = f"{{depth: segment_wise, weight_similarity: {weight}}}"
    text = written("small", "deep", align=align)
    text = text[: text.index("calibration")] if weight else text
    asked = parse_recipe(text, "recipe.yaml").placed_in(folder)

    output = lewis_hub.merge_models(asked, folder / "merged", progress=False).output

    assert numbers(output) == [0, 3]
    own, found = weights(folder / "small"), weights(output)
    assert all(found[name].equal(own[name]) for name in own)


@pytest.mark.slow
def test_the_mean_adds_half_of_a_block_that_the_other_model_lacks(folder):
    write_model(folder / "small", 3)
    deepened(folder / "small", folder / "deep", [0, 1, 1, 2])

    output = merge(folder, "deep", "small")

    own, found = weights(folder / "deep"), weights(output)
    empty = numbers(output).index(None)
    assert empty in (1, 2)
    for name, tensor in own.items():
        halved = f".{empty}." in name and WRITERS.search(name)
        assert found[name].equal(tensor / 2 if halved else tensor), name


@pytest.mark.slow
def test_units_are_matched_after_the_blocks(folder):
    """A permuted copy of a model, beside that model with a block that puts out nothing."""
    write_model(folder / "small", 2)
    permuted_copy(folder / "small", folder / "shuffled")
    deepened(folder / "small", folder / "deep", [0, 0, 1], identity=[1])

    both = "{method: dual_space, depth: segment_wise}"
    output = merge(folder, "deep", "shuffled", align=both)

    assert numbers(output) == [0, None, 1]
    own, found = weights(folder / "deep"), weights(output)
    assert all(found[name].equal(own[name]) for name in own)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "Place 1 got an identity block, which adds nothing, so that its outputs stay" in card
    assert "`shuffled` was trained from another start than `deep`." in card


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "merge_method: ties\nguide: {name: lewis, gamma: 0.3, epsilon: 0.8}",
        "merge_method: regmean\nparameters: {inputs: merged}",
    ],
)
def test_what_measures_models_reads_the_model_in_its_places(method, folder):
    """The merge has the bytes of that with the same model, put into its places beforehand."""
    write_model(folder / "small", 2)
    write_model(folder / "expert", 2, seed=1)
    near = {n: 0.9 * t + 0.1 * weights(folder / "expert")[n] for n, t in read(folder / "small")}
    write_weights(folder / "expert", near)
    deepened(folder / "small", folder / "deep", [0, 0, 1], identity=[1])
    deepened(folder / "expert", folder / "deeper", [0, 0, 1])
    mixed = weights(folder / "deeper") | {n: t for n, t in read(folder / "deep") if ".1." in n}
    write_weights(folder / "deeper", mixed)
    entries = ("deeper", "expert\n    align: segment_wise")

    found = [merged_by(method, folder, "deep", entry) for entry in entries]

    assert numbers(found[1]) == [0, None, 1]
    placed, aligned = map(weights, found)
    assert all(placed[name].equal(aligned[name]) for name in mixed)


def test_the_deeper_model_loses_blocks_beside_a_shallower_one_and_check_says_so(folder):
    write_model(folder / "small", 3)
    write_model(folder / "deep", 5, seed=1)

    report = lewis_hub.check(recipe(folder, "small", "deep"))

    assert report.problems == ()
    assert (
        "deep has 5 blocks, small has 3: 2 of them are left out, which changes what it computes. "
        "Name the deeper model first, or as `base_model`, to keep all."
    ) in report.notes


def test_models_that_differ_in_more_than_depth_are_refused(folder):
    write_model(folder / "one", 3)
    write_model(folder / "other", 2, kind=gpt2)
    write_model(folder / "wide", 2)
    tensors = weights(folder / "wide")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 32)
    write_weights(folder / "wide", tensors)

    assert lewis_hub.check(recipe(folder, "one", "other")).problems == (
        "other: its architecture (gpt2, 2 blocks, 4 heads of 8, 4 with keys) is not that of one "
        "(llama, 3 blocks, 4 heads of 8, 2 with keys). Use models of one family that differ in "
        "depth only, or remove `depth`. For another width, add `width: neuron_matching`.",
    )
    [problem] = lewis_hub.check(recipe(folder, "one", "wide")).problems
    assert problem == (
        "wide: model.layers.1.mlp.up_proj.weight has the shape [40, 32], in one [48, 32]. `depth` "
        "matches the blocks of models that differ in their number only. For another width, add "
        "`width: neuron_matching`."
    )


def test_blocks_that_differ_within_a_model_are_refused(folder):
    write_model(folder / "one", 3)
    write_model(folder / "odd", 2)
    tensors = weights(folder / "odd")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_weights(folder / "odd", tensors)
    differ = "`depth` matches the blocks of models that differ in their number only."
    alike = "`depth` matches blocks with the same tensors, of the same shapes."

    for pair, other, remedy in (
        (("one", "odd"), "one", differ),
        (("odd", "one"), "its first block", alike),
    ):
        problem = f"odd: it lacks model.layers.1.mlp.up_proj.weight of {other}. {remedy}"
        assert lewis_hub.check(recipe(folder, *pair)).problems == (problem,)


def test_a_matrix_with_nan_is_named(folder):
    write_model(folder / "one", 3)
    write_model(folder / "two", 2)
    tensors = weights(folder / "two")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    write_weights(folder / "two", tensors)
    text = written("one", "two", align="{depth: segment_wise, weight_similarity: 1}")
    asked = parse_recipe(text[: text.index("calibration")], "recipe.yaml").placed_in(folder)

    with pytest.raises(NonFiniteError) as caught:
        lewis_hub.merge_models(asked, folder / "merged", progress=False)

    assert str(caught.value) == (
        "model.layers.1.mlp.up_proj.weight holds NaN or infinity in two.\n"
        "It cannot be compared: use an intact copy, or remove `align` from the model."
    )


def test_another_vocabulary_is_refused(folder):
    write_model(folder / "one", 3)
    write_model(folder / "two", 2)
    tensors = weights(folder / "two")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(8, 32)])
    write_weights(folder / "two", tensors)

    problems = lewis_hub.check(recipe(folder, "one", "two")).problems

    assert (
        "two: lm_head.weight has the shape [398, 32], in one [390, 32]. Give it the other "
        "tokenizer first: `lewis-hub transplant-tokenizer`."
    ) in problems


def test_what_was_matched_is_read_back_from_its_document():
    blocks = MatchedBlocks((0, None, 1), ((1.0, 0.5), (0.7, 0.6), (0.25, 0.75)), 0.5)
    model = AlignedModel("two", "one", 0.5, {"dataset": "d"}, {}, {}, {}, blocks)

    found = AlignedModel.from_document(json.loads(json.dumps(model.document())))

    assert found == model
    assert (found.blocks.identity, found.blocks.left_out) == ((1,), ())
    other = replace(model, blocks=replace(blocks, numbers=(0, 1, None)))
    assert found.digest == model.digest != other.digest


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("calibration:", "#", "`align` needs calibration data, but `one` has none."),
        ("segment_wise", "{weight_similarity: 1}", "expected `method: dual_space`, `depth: "),
        (
            "segment_wise",
            "layers",
            "expected `dual_space`, `segment_wise`, `neuron_matching` or `neuron_zipping`, found "
            "'layers'",
        ),
    ],
)
def test_a_recipe_that_cannot_be_aligned_is_refused_when_it_is_read(old, new, problem):
    text = written("one", "two").replace(old, new)

    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe.yaml")

    assert problem in str(caught.value)
