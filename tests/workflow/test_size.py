"""Models of another depth and width: their blocks are matched, then the units of those blocks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import lewis_hub
from lewis_hub.errors import RecipeError
from lewis_hub.merge.aligned import AlignedModel, MatchedBlocks, MatchedWidths
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resolve import require_streamable
from tests.statistical_merges import Recorder
from tests.workflow.test_depth import (
    WRITERS,
    deepened,
    folder,
    logits,
    merge,
    merged_by,
    numbers,
    recipe,
    weights,
    write_model,
    write_weights,
    written,
)
from tests.workflow.test_width import SIZES, WIDE, aligned, kinds, sized, widened

__all__ = ["folder"]  # a fixture

BOTH = "{depth: segment_wise, width: neuron_matching}"
ZIPPED = "{depth: segment_wise, width: neuron_zipping}"
NARROW = {"hidden": 24, "mlp": 60, "groups": 3}  # fewer hidden units, but more of the others


def grown(folder, copy, blocks, identity):
    """A wider and deeper model with the same outputs: its other units and blocks add nothing."""
    wide = folder.parent / f"{copy.name}-wide"
    widened(folder, wide, WIDE, np.random.default_rng(0))
    deepened(wide, copy, blocks, identity)
    assert (logits(folder) - logits(copy)).abs().max() < 1e-5


def base_and_grown_expert(folder):
    """A model `one`, an `expert` that is near to it, and the expert with more blocks and units."""
    for name, seed in (("one", 0), ("expert", 1)):
        write_model(folder / name, 2, seed=seed, kind=sized(**SIZES))
    own = weights(folder / "one")
    near = {n: 0.9 * own[n] + 0.1 * t for n, t in weights(folder / "expert").items()}
    write_weights(folder / "expert", near)
    grown(folder / "expert", folder / "big", [0, 0, 1, 1], [1, 3])


def test_a_deeper_and_wider_expert_is_merged_as_what_it_was_made_from(folder):
    """The mean is that of both small models, which were never told apart from a naive mean."""
    base_and_grown_expert(folder)

    output = merge(folder, "one", "big", align=BOTH)

    assert numbers(output) == [0, 2]
    base, expert, found = (weights(folder / n) for n in ("one", "expert", "merged"))
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        assert (tensor - (base[name] + expert[name]) / 2).abs().max() < 1e-5, name


def test_in_the_places_of_a_deeper_and_wider_model_it_has_the_outputs_that_it_had(folder):
    """The larger model's own blocks and units beyond the smaller one's put out nothing."""
    base_and_grown_expert(folder)

    output = merge(folder, "big", "one", share=0, align=BOTH)

    assert numbers(output) == [0, None, 1, None]
    assert (logits(output) - logits(folder / "one")).abs().max() < 1e-5
    found = aligned(output)["widths"]
    assert {group.split(".")[0] for group in found["places"]} == {"residual", "0", "2"}
    blocks = [f"model.layers.{n}.{kind}_layernorm" for n in (0, 2) for kind in NORMS]
    assert found["norm_scales"].keys() == {"model.norm", *blocks}
    assert [*found["norm_scales"].values()] == pytest.approx([(32 / 48) ** 0.5] * 5)


NORMS = ("input", "post_attention")


def naive(reference, own, document):
    """The model in the places of the reference, one entry after the other, by the definition."""
    places, scales = document["widths"]["places"], document["widths"]["norm_scales"]
    found = {}
    for name, base in reference.items():
        parts = name.split(".")
        place = int(parts[2]) if parts[1] == "layers" else None
        number = place if place is None else document["blocks"]["numbers"][place]
        found[name] = base.clone()
        if place is not None and number is None:
            if WRITERS.search(name):  # the identity block adds nothing to the units of the model
                found[name][[row for row in places["residual"] if row >= 0]] = 0
            continue
        parts[2:3] = [str(number)] if place is not None else parts[2:3]
        stored = own[".".join(parts)] * scales.get(name.removesuffix(".weight"), 1)
        members = [along(kind, place, places, size) for kind, size in zip_kinds(name, base)]
        for entry in np.ndindex(*base.shape):
            taken = [one[n] for one, n in zip(members, entry, strict=True)]
            if all(taken):
                values = stored[np.ix_(*taken)]
                found[name][entry] = values.mean() if base.dim() == 1 else values.mean(0).sum()
    return found


def zip_kinds(name, tensor):
    named = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    group = named.get(name.split(".")[-2], "")
    found = [group if kind in ("query", "key") else kind for kind in kinds(name)]
    return list(zip(found, tensor.shape, strict=True))


def along(kind, place, places, size):
    """For each place along a dimension the model's own numbers that go there."""
    if kind is None:
        return [[n] for n in range(size)]
    went = np.array(places["residual" if kind == "hidden" else f"{place}.{kind}"])
    return [np.flatnonzero(went == n).tolist() for n in range(size)]


@pytest.mark.parametrize("align", [BOTH, pytest.param(ZIPPED, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [((4, SIZES), (2, NARROW)), ((2, SIZES), (4, NARROW)), ((3, NARROW), (2, WIDE))],
)
def test_any_two_sizes_are_merged_as_a_naive_reference_does(ours, theirs, align, folder):
    for seed, (name, (n_blocks, sizes)) in enumerate((("one", ours), ("two", theirs))):
        write_model(folder / name, n_blocks, seed=seed, kind=sized(**sizes))

    output = merge(folder, "one", "two", share=0.25, align=align)

    base, found = weights(folder / "one"), weights(output)
    moved = naive(base, weights(folder / "two"), aligned(output))
    for name, tensor in found.items():
        assert (tensor - (0.25 * base[name] + 0.75 * moved[name])).abs().max() < 1e-6, name


def test_card_lock_and_rebuild_know_depth_and_width(folder, monkeypatch):
    base_and_grown_expert(folder)

    output = merge(folder, "big", "one", align=BOTH)

    card = (output / "README.md").read_text(encoding="utf-8")
    assert (
        "`one` has 2 blocks and `big` has 4. Its blocks were first put in the places of those that "
        "they resemble most, in their order. Places 1, 3 got identity blocks, which add nothing.\n"
    ) in card
    assert (
        "Similarity (100 % CKA of what they add) of the blocks of big (rows) and one (columns)."
    ) in card
    assert (
        "`one` also has another width than `big`. So the units of matched blocks were then put in "
        "the places of those of `big` that they resemble most, by their activations on the "
        "calibration texts (50 %) and their weights (50 %). Where it has no unit, the values of "
        "`big` stay. The scales of its norms were multiplied by 0.816 to 0.816"
    ) in card
    assert "| MLP units | 120 | 96 | 96 | 0 | 0 | " in card
    caption = "by kind and block of big. Columns of identity blocks are empty."
    assert caption in card
    lock = json.loads((output / "lewis/lock.json").read_text(encoding="utf-8"))
    for kind in ("blocks", "units"):
        assert f'src="lewis/{kind}-one-light.png"' in card
        assert {f"lewis/{kind}-one-{theme}.png" for theme in ("light", "dark")} <= {
            *lock["outputs"]
        }
    monkeypatch.chdir(folder)  # a rebuild finds local folders as the recipe names them
    assert lewis_hub.verify(output, rebuild=True).problems == ()


def test_a_second_merge_has_the_same_bytes(folder):
    base_and_grown_expert(folder)
    asked = recipe(folder, "one", "big", align=BOTH)

    outputs = [
        lewis_hub.merge_models(asked, folder / name, progress=False).output for name in ("a", "b")
    ]

    for file in ("model.safetensors", "lewis/alignment.json", "lewis/lock.json"):
        first, second = ((output / file).read_bytes() for output in outputs)
        assert first == second, file


def test_an_interrupted_merge_takes_up_what_was_matched(folder):
    """Each model is run once for its blocks and its units."""
    base_and_grown_expert(folder)

    def interrupted(align):
        told = Recorder("Merging")
        with pytest.raises(KeyboardInterrupt):
            lewis_hub.merge_models(
                recipe(folder, "one", "big", align=align), folder / "out", progress=told
            )
        starts = ("Running", "Comparing", "Aligning")
        return [title for title in told.totals if title.startswith(starts)]

    stages = ["Running one", "Running big", "Comparing updates of big", "Comparing blocks of big"]
    assert interrupted(BOTH) == [*stages, "Aligning big"]
    assert interrupted(BOTH) == []
    assert interrupted(ZIPPED) == [*stages, "Aligning big"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "merge_method: ties\nguide: {name: lewis, gamma: 0.3, epsilon: 0.8}",
        "merge_method: regmean\nparameters: {inputs: merged}",
    ],
)
def test_what_measures_models_reads_the_model_in_its_places(method, folder):
    """The merge is that with the small expert, which the large one was made from."""
    base_and_grown_expert(folder)
    entries = ("expert", f"big\n    align: {BOTH}")

    found = [weights(merged_by(method, folder, "one", entry)) for entry in entries]

    apart = {name: (found[0][name] - tensor).abs() for name, tensor in found[1].items()}
    assert max(float(one.median()) for one in apart.values()) < 1e-5
    moved = torch.cat([one.flatten() for one in apart.values()])
    assert (moved > 1e-4).float().mean() < 0.01  # at the threshold of a trim


def test_check_says_which_blocks_and_units_are_lost(folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "two", 3, seed=1, kind=sized(**WIDE))

    report = lewis_hub.check(recipe(folder, "one", "two", align=BOTH))
    other = lewis_hub.check(recipe(folder, "two", "one", align=BOTH))

    assert report.problems == other.problems == ()
    lost = [note for note in report.notes if "changes what it computes" in note]
    assert lost == [
        "two has 3 blocks, one has 2: 1 of them are left out, which changes what it computes. Name "
        "the deeper model first, or as `base_model`, to keep all.",
        "two has 48 hidden units, 60 MLP units and 6 heads, one has 32 hidden units, 48 MLP units "
        "and 4 heads: units without a partner are left out or zipped, which changes what it "
        "computes. Name the wider model first, or as `base_model`, to keep all.",
    ]
    assert not [note for note in other.notes if "changes what it computes" in note]


def test_check_counts_the_activations_and_the_model_that_is_written_out(folder):
    """Of 6 texts of 512 tokens at most, 2,048 tokens are kept."""
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "two", 3, seed=1, kind=sized(**WIDE))
    widths = 2 * (2 * 32 + 48 + 48 * 2) + 32 + 3 * (2 * 48 + 60 + 48 * 3) + 48
    guided = written("one", "two", align=BOTH).replace("linear", "ties") + "guide: {name: lewis}\n"
    guided = "base_model: one\n" + guided

    both = lewis_hub.check(recipe(folder, "one", "two", align=BOTH))
    with_guide = lewis_hub.check(parse_recipe(guided, "recipe.yaml").placed_in(folder))

    assert both.disk_bytes == both.output_bytes + 4 * 2048 * widths
    assert with_guide.disk_bytes == both.disk_bytes + with_guide.output_bytes
    assert both.memory_bytes == 900_000_000 + 4 * 2048**2 * (2 + 3)


REMEDY = (
    "Use models of one family that differ in their number of blocks, their hidden size, the size "
    "of their MLPs or their number of groups of heads only, or remove `align`."
)


def with_heads(n_heads, n_kv_heads, head_dim):
    def kind(n_blocks):
        config = sized(**WIDE)(n_blocks)
        config.update(
            {
                "num_attention_heads": n_heads,
                "num_key_value_heads": n_kv_heads,
                "head_dim": head_dim,
            }
        )
        return config

    return kind


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ((4, 2, 16), "4 heads of 16, 2 with keys"),
        ((6, 2, 8), "6 heads of 8, 2 with keys"),
    ],
)
def test_heads_of_another_width_or_in_larger_groups_are_refused(heads, words, folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "two", 3, kind=with_heads(*heads))

    problems = lewis_hub.check(recipe(folder, "one", "two", align=BOTH)).problems

    assert problems == (
        f"two: its architecture (llama, 3 blocks, {words}) is not that of one (llama, 2 blocks, "
        f"4 heads of 8, 2 with keys). {REMEDY}",
    )


def test_a_model_whose_blocks_are_not_alike_is_refused(folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "two", 3, kind=sized(**WIDE))
    tensors = weights(folder / "two")
    for kind in ("up", "gate"):
        name = f"model.layers.1.mlp.{kind}_proj.weight"
        tensors[name] = tensors[name][:40].clone()
    write_weights(folder / "two", tensors)

    [problem] = lewis_hub.check(recipe(folder, "one", "two", align=BOTH)).problems

    assert problem == (
        "two: model.layers.1.mlp.gate_proj.weight has the shape [40, 48], in its first block "
        "[60, 48]. `depth` matches blocks with the same tensors, of the same shapes."
    )


def test_another_vocabulary_and_other_tensors_are_refused(folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "longer", 3, kind=sized(**WIDE))
    write_model(folder / "biased", 3, kind=sized(**WIDE))
    tensors = weights(folder / "longer")
    name = "model.embed_tokens.weight"
    write_weights(folder / "longer", tensors | {name: torch.cat([tensors[name]] * 2)})
    bias = {f"model.layers.{n}.self_attn.q_proj.bias": torch.zeros(48) for n in range(3)}
    write_weights(folder / "biased", weights(folder / "biased") | bias)

    longer, biased = (
        lewis_hub.check(recipe(folder, "one", name, align=BOTH)).problems
        for name in ("longer", "biased")
    )

    assert (
        f"longer: {name} has the shape [780, 48], in one [390, 32]. Give it the other tokenizer "
        "first: `lewis-hub transplant-tokenizer`."
    ) in longer
    assert biased == (
        "one: it lacks model.layers.0.self_attn.q_proj.bias, which biased has. `width` matches "
        "models of one architecture that differ in their numbers of units only.",
    )


def test_without_one_of_both_the_message_names_it(folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "two", 3, kind=sized(**WIDE))

    depth, width = (
        lewis_hub.check(recipe(folder, "one", "two", align=align)).problems
        for align in ("segment_wise", "neuron_matching")
    )

    assert [one.endswith("add `width: neuron_matching`.") for one in depth] == [True]
    assert [one.endswith("add `depth: segment_wise`.") for one in width] == [True]


def test_a_limit_of_memory_is_not_met_by_weights_alone(folder):
    write_model(folder / "one", 2, kind=sized(**SIZES))
    write_model(folder / "two", 3, kind=sized(**WIDE))
    align = "{depth: segment_wise, width: neuron_matching, weight_similarity: 1}"

    report = lewis_hub.check(recipe(folder, "one", "two", align=align), max_memory_bytes=100_000)

    found = [problem for problem in report.problems if problem.startswith("`align`")]
    for name, problem in zip(("one", "two"), found, strict=True):
        assert problem.startswith(f"`align` runs whole models, and {name} takes ")
        assert problem.endswith("more than `--max-memory` allows. Raise the limit.")


def test_a_stream_does_not_match_sizes():
    with pytest.raises(RecipeError, match="`align` runs whole models, and --stream keeps none"):
        require_streamable(parse_recipe(written("one", "two", align=BOTH), "recipe"))


def test_what_was_matched_is_read_back_from_its_document():
    blocks = MatchedBlocks((0, None, 1), ((1.0, 0.5), (0.7, 0.6), (0.25, 0.75)), 0.0)
    widths = MatchedWidths({"2.mlp": np.array([1, -1, 0])}, {"model.norm": 1.25})
    order, similar = {"2.mlp": np.array([2, 0])}, {"2.mlp": 0.5}
    model = AlignedModel("two", "one", 0.5, {}, order, similar, similar, blocks, widths)

    found = AlignedModel.from_document(json.loads(json.dumps(model.document())))

    assert found.document() == model.document()
    assert found.digest == model.digest
    others = replace(model, blocks=replace(blocks, numbers=(0, 1, None)))
    assert len({model.digest, others.digest, replace(model, blocks=None).digest}) == 3
