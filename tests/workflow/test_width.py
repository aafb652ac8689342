"""Models of different width: their units are matched, and the merge has those of the reference."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import lewis_hub
from lewis_hub.errors import RecipeError
from lewis_hub.merge.aligned import AlignedModel, MatchedWidths
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resolve import require_streamable
from tests.statistical_merges import Recorder
from tests.workflow.test_align import N_TOKENS
from tests.workflow.test_depth import (
    folder,
    gpt2,
    logits,
    merge,
    recipe,
    weights,
    write_model,
    write_weights,
    written,
)

__all__ = ["folder"]  # a fixture

HEAD = 8  # the width of a head
SIZES = {"hidden": 32, "mlp": 48, "groups": 2}  # with two query heads in a group
WIDE = {"hidden": 48, "mlp": 60, "groups": 3}


def sized(hidden, mlp, groups, tie_word_embeddings=True):
    """The configuration of a model by its width; no `eps` to speak of, so that scales are exact."""

    def llama(n_blocks):
        return transformers.LlamaConfig(
            vocab_size=N_TOKENS,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=n_blocks,
            num_attention_heads=2 * groups,
            num_key_value_heads=groups,
            head_dim=HEAD,
            max_position_embeddings=64,
            initializer_range=0.2,
            rms_norm_eps=1e-12,
            tie_word_embeddings=tie_word_embeddings,
        )

    return llama


def kinds(name):
    """The units along each dimension of a tensor."""
    module = name.split(".")[-2]
    return {
        "embed_tokens": (None, "hidden"),
        "lm_head": (None, "hidden"),
        "q_proj": ("query", "hidden"),
        "k_proj": ("key", "hidden"),
        "v_proj": ("key", "hidden"),
        "o_proj": ("hidden", "query"),
        "gate_proj": ("mlp", "hidden"),
        "up_proj": ("mlp", "hidden"),
        "down_proj": ("hidden", "mlp"),
    }.get(module, ("hidden",))


def count(sizes, kind):
    heads = {"query": 2 * HEAD, "key": HEAD}
    return sizes["groups"] * heads[kind] if kind in heads else sizes[kind]


def silent(name, dimension, kind):
    """Whether more units along a dimension put out nothing if their weights there are zero."""
    writes_residual = kind == "hidden" and (
        "embed_tokens" in name or (dimension == 0 and name.endswith("_proj.weight"))
    )
    return writes_residual or kind == "mlp" or (kind == "query" and dimension == 1)


def widened(folder, copy, sizes, generator, **options):
    """A wider model with the same outputs: its other units put out nothing, and all are shuffled.

    The norms divide by a mean over more units, and their scales make up for it.
    """
    write_model(copy, 2, kind=sized(**sizes, **options))
    own, wide = weights(folder), weights(copy)
    orders = {kind: generator.permutation(count(sizes, kind)) for kind in ("hidden", "mlp")}
    groups = generator.permutation(sizes["groups"])
    for kind, n in (("key", HEAD), ("query", 2 * HEAD)):
        orders[kind] = np.concatenate([np.arange(n) + n * group for group in groups])
    for name, tensor in wide.items():
        inside = tuple(slice(0, n) for n in own[name].shape)
        for dimension, kind in enumerate(kinds(name)):
            if kind and silent(name, dimension, kind):
                more = [slice(None)] * tensor.dim()
                more[dimension] = slice(own[name].shape[dimension], None)
                tensor[tuple(more)] = 0
        tensor[inside] = own[name]
        if tensor.dim() == 1:
            tensor[inside] *= (SIZES["hidden"] / sizes["hidden"]) ** 0.5
        for dimension, kind in enumerate(kinds(name)):
            if kind:
                tensor = tensor.index_select(dimension, torch.from_numpy(orders[kind]))
        wide[name] = tensor.contiguous()
    write_weights(copy, wide)


def aligned(output):
    [one] = json.loads((output / "lewis/alignment.json").read_text(encoding="utf-8"))["models"]
    return one


def wider_pair(folder, tie=True):
    """A model, and a wider copy of it with the same outputs."""
    write_model(folder / "one", 2, kind=sized(**SIZES, tie_word_embeddings=tie))
    generator = np.random.default_rng(0)
    widened(folder / "one", folder / "wide", WIDE, generator, tie_word_embeddings=tie)
    assert (logits(folder / "one") - logits(folder / "wide")).abs().max() < 1e-5


@pytest.mark.parametrize("width", ["neuron_matching", "neuron_zipping"])
@pytest.mark.parametrize("tie", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_wider_copy_of_a_model_becomes_that_model(width, tie, folder):
    wider_pair(folder, tie)

    output = merge(folder, "one", "wide", share=0, align=width)

    assert (logits(output) - logits(folder / "wide")).abs().max() < 1e-5
    own, found = weights(folder / "one"), weights(output)
    assert all((found[name] - own[name]).abs().max() < 1e-5 for name in own)


def test_card_lock_and_rebuild_know_the_width(folder, monkeypatch):
    wider_pair(folder)

    output = merge(folder, "one", "wide", align="neuron_matching")

    card = (output / "README.md").read_text(encoding="utf-8")
    assert (
        "`wide` has another width than `one`. So its units were first put in the places of those "
        "of `one` that they resemble most, by their activations on the calibration texts (50 %) "
        "and their weights (50 %). Units without a partner were left out, which changes its "
        "outputs. The scales of its norms were multiplied by 1.225 to 1.225, as the mean square "
        "of the hidden state is over other units."
    ) in card
    assert "| MLP units | 96 | 120 | 96 | 0 | 24 | 1.000 |" in card
    assert "| keys | 32 | 48 | 32 | 0 | 16 | 1.000 |" in card
    assert "was trained from another start" not in card
    assert 'src="lewis/units-wide-light.png"' in card
    assert "Mean similarity of the matched units of wide and one, by kind and block." in card
    assert "xu2024heterogeneous" in card
    assert "xu2024training" in card
    scales = aligned(output)["widths"]["norm_scales"]
    assert [*scales.values()] == pytest.approx([(48 / 32) ** 0.5] * 5, abs=1e-6)
    lock = json.loads((output / "lewis/lock.json").read_text(encoding="utf-8"))
    files = ("lewis/alignment.json", "lewis/units-wide-light.png", "lewis/units-wide-dark.png")
    assert all(file in lock["outputs"] for file in files)
    monkeypatch.chdir(folder)  # a rebuild finds local folders as the recipe names them
    assert lewis_hub.verify(output, rebuild=True).problems == ()


def duplicated(folder, copy):
    """The same model with each of the first MLP units twice, which share its outputs."""
    write_model(copy, 2, kind=sized(**SIZES | {"mlp": 60}))
    tensors = weights(folder)
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = torch.cat([tensor, tensor[:12]])
        if "down_proj" in name:
            twice = torch.cat([tensor[:, :12] * 0.75, tensor[:, 12:], tensor[:, :12] * 0.25], 1)
            tensors[name] = twice.contiguous()
    write_weights(copy, tensors)


def test_equal_mlp_units_are_exact_if_they_are_zipped(folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    duplicated(folder / "one", folder / "twice")
    assert (logits(folder / "one") - logits(folder / "twice")).abs().max() < 1e-5

    apart = {}
    for width in ("neuron_zipping", "neuron_matching"):
        output = merge(folder, "one", "twice", share=0, align=width)
        apart[width] = (logits(output) - logits(folder / "twice")).abs().max()
        card = (output / "README.md").read_text(encoding="utf-8")
        zipped = "MLP units without a partner were averaged onto the most similar ones." in card
        assert zipped == (width == "neuron_zipping")
        shutil.rmtree(output)

    assert apart["neuron_zipping"] < 1e-5
    assert apart["neuron_matching"] > 0.1


def test_a_narrower_model_leaves_the_values_of_the_reference_where_it_has_none(folder):
    """A narrow model beside a wide one, whose other units put out nothing."""
    wider_pair(folder)
    own = weights(folder / "wide")

    output = merge(folder, "wide", "one", share=0, align="neuron_matching")

    found, wide = aligned(output), weights(output)
    assert [*found["widths"]["norm_scales"].values()] == pytest.approx([(32 / 48) ** 0.5] * 5)
    lacking = [place for place, unit in enumerate(found["orders"]["0.mlp"]) if unit < 0]
    assert len(lacking) == 12
    name = "model.layers.0.mlp.up_proj.weight"
    assert wide[name][lacking].equal(own[name][lacking])
    assert (logits(output) - logits(folder / "one")).abs().max() < 1e-5
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "(50 %). Where it has no unit, the values of `wide` stay. The scales of its" in card


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "merge_method: ties\nguide: {name: lewis, gamma: 0.3, epsilon: 0.8}",
        "merge_method: regmean\nparameters: {inputs: merged}",
    ],
)
def test_what_measures_models_reads_the_expert_in_its_places(method, folder):
    """An unrelated expert: wider in its hidden state, narrower in MLPs and heads."""
    write_model(folder / "base", 2, kind=sized(**WIDE))
    write_model(folder / "expert", 2, seed=1, kind=sized(hidden=64, mlp=40, groups=2))
    text = """base_model: base
models:
  - model: expert
    align: neuron_zipping
METHOD
calibration: {dataset: texts.jsonl, text: "{text}", samples: 6}
""".replace("METHOD", method)
    asked = parse_recipe(text, "recipe.yaml").placed_in(folder)

    output = lewis_hub.merge_models(asked, folder / "merged", progress=False).output

    own, found, places = weights(folder / "base"), weights(output), aligned(output)["orders"]
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in own.items()}
    lacking = [place for place, unit in enumerate(places["0.mlp"]) if unit < 0]
    assert len(lacking) == 20
    name = "model.layers.0.mlp.up_proj.weight"
    assert not found[name].equal(own[name])
    if "ties" in method:  # the task vector is zero where the expert has no unit
        assert found[name][lacking].equal(own[name][lacking])


def test_units_of_an_interrupted_merge_are_taken_up_if_nothing_else_is_asked(folder):
    """Zipped they are asked for in another way, and are matched again."""
    wider_pair(folder)
    asked = {
        w: recipe(folder, "one", "wide", align=w) for w in ("neuron_matching", "neuron_zipping")
    }

    def interrupted(width, stage):
        told = Recorder(stage)
        with pytest.raises(KeyboardInterrupt):
            lewis_hub.merge_models(asked[width], folder / "out", progress=told)
        return {title for title in told.totals if title.startswith(("Running", "Aligning"))}

    stages = {"Running one", "Running wide", "Aligning wide"}
    assert interrupted("neuron_matching", "Merging") == stages
    assert interrupted("neuron_matching", "Merging") == set()
    assert interrupted("neuron_zipping", "Merging") == stages


def test_activations_that_a_killed_merge_left_are_no_obstacle(folder, monkeypatch):
    wider_pair(folder)
    asked = recipe(folder, "one", "wide", align="neuron_matching")
    with monkeypatch.context() as patched:
        patched.setattr("lewis_hub.workflow.align.shutil.rmtree", lambda *_args, **_options: None)
        with pytest.raises(KeyboardInterrupt):
            lewis_hub.merge_models(asked, folder / "out", progress=Recorder("Aligning wide"))
    left = folder / "out.partial/.scratch/aligned"
    assert [len([*one.iterdir()]) for one in left.glob("*.activations")] == [2]

    with pytest.raises(KeyboardInterrupt):
        lewis_hub.merge_models(asked, folder / "out", progress=Recorder("Merging"))
    assert [*left.glob("*.activations")] == []


def test_check_says_which_units_are_lost(folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "two", 2, seed=1, kind=sized(**SIZES | {"mlp": 60}))

    report = lewis_hub.check(recipe(folder, "one", "two", align="neuron_matching"))
    other = lewis_hub.check(recipe(folder, "two", "one", align="neuron_matching"))

    assert report.problems == other.problems == ()
    assert (
        "two has 32 hidden units, 60 MLP units and 4 heads, one has 32 hidden units, 48 MLP units "
        "and 4 heads: units without a partner are left out or zipped, which changes what it "
        "computes. Name the wider model first, or as `base_model`, to keep all."
    ) in report.notes
    assert not [note for note in other.notes if "without a partner" in note]


def changed(folder, **values):
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps(config), encoding="utf-8")


REMEDY = (
    "Use models of one family that differ in their hidden size, the size of their MLPs or their "
    "number of groups of heads only, or remove `width`. For another number of blocks, add "
    "`depth: segment_wise`."
)


@pytest.mark.parametrize(
    ("n_blocks", "kind", "values", "problem"),
    [
        (
            3,
            sized(**SIZES),
            {},
            "its architecture (llama, 3 blocks, 4 heads of 8, 2 with keys) is not that of one "
            "(llama, 2 blocks, 4 heads of 8, 2 with keys)",
        ),
        (
            2,
            sized(**SIZES),
            {"num_key_value_heads": 4},
            "its architecture (llama, 2 blocks, 4 heads of 8, 4 with keys) is not that of one "
            "(llama, 2 blocks, 4 heads of 8, 2 with keys)",
        ),
        (
            2,
            sized(**SIZES),
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
            'its rotary positions ({"rope_theta": 500000.0, "rope_type": "default"}) are not those '
            'of one ({"rope_theta": 10000.0, "rope_type": "default"})',
        ),
        (
            2,
            gpt2,
            {},
            "its architecture (gpt2, 2 blocks, 4 heads of 8, 4 with keys) is not that of one "
            "(llama, 2 blocks, 4 heads of 8, 2 with keys)",
        ),
    ],
)
def test_what_widths_do_not_explain_is_refused(n_blocks, kind, values, problem, folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "two", n_blocks, kind=kind)
    changed(folder / "two", **values)

    problems = lewis_hub.check(recipe(folder, "one", "two", align="neuron_matching")).problems

    assert problems == (f"two: {problem}. {REMEDY}",)


def test_a_limit_of_memory_is_not_met_by_weights_alone(folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "two", 2, kind=sized(**SIZES | {"mlp": 60}))
    align = "{width: neuron_matching, weight_similarity: 1}"

    report = lewis_hub.check(recipe(folder, "one", "two", align=align), max_memory_bytes=100_000)

    found = [problem for problem in report.problems if problem.startswith("`align`")]
    for name, problem in zip(("one", "two"), found, strict=True):
        assert problem.startswith(f"`align` runs whole models, and {name} takes ")
        assert problem.endswith("more than `--max-memory` allows. Raise the limit.")


def test_positions_that_are_not_rotary_are_refused(folder):
    for name in ("one", "two"):
        write_model(folder / name, 2, kind=gpt2)

    problems = lewis_hub.check(recipe(folder, "one", "two", align="neuron_matching")).problems

    assert problems == (f"one: `width` matches heads with rotary positions only. {REMEDY}",)


def test_without_width_another_width_is_refused(folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "two", 2, kind=sized(**SIZES | {"mlp": 60}))

    problems = lewis_hub.check(recipe(folder, "one", "two", align="dual_space")).problems

    assert any("mlp.down_proj.weight" in problem for problem in problems)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("calibration:", "#", "`align` needs calibration data, but `one` has none."),
        ("ALIGN", "{width: neuron_zipping, method: dual_space}", "`width: neuron_matching` or"),
        ("ALIGN", "{width: zipping}", "expected 'neuron_matching' or 'neuron_zipping'"),
        (
            "ALIGN",
            "wider",
            "expected `dual_space`, `segment_wise`, `neuron_matching` or `neuron_zipping`, found "
            "'wider'",
        ),
    ],
)
def test_a_recipe_that_cannot_be_aligned_is_refused_when_it_is_read(old, new, problem):
    text = written("one", "two", align="ALIGN").replace(old, new)
    text = text.replace("ALIGN", "{width: neuron_matching, weight_similarity: 1}")

    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipe.yaml")

    assert problem in str(caught.value)


def test_a_stream_does_not_match_widths():
    with pytest.raises(RecipeError, match="`align` runs whole models, and --stream keeps none"):
        require_streamable(parse_recipe(written("one", "two", align="neuron_matching"), "recipe"))


def test_what_was_matched_is_read_back_from_its_document():
    widths = MatchedWidths({"residual": np.array([1, -1, 0])}, {"model.norm": 1.25})
    order = {"residual": np.array([2, 0])}
    similar = {"residual": 0.5}
    model = AlignedModel("two", "one", 0.5, {}, order, similar, similar, widths=widths)

    found = AlignedModel.from_document(json.loads(json.dumps(model.document())))

    assert found.document() == model.document()
    [kind] = found.kinds
    assert (kind.n_units, kind.n_own, kind.n_matched, kind.n_left_out) == (2, 3, 2, 1)
    places = {"residual": np.array([1, 1, 0])}
    for other in ({"places": places}, {"norm_scales": {"model.norm": 1.5}}):
        assert replace(model, widths=replace(widths, **other)).digest != model.digest
