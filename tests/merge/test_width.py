"""Units of another width: matched, put in their places and read, against naive references."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lewis_hub.checkpoint.reader import TensorReader, local_checkpoint, read_tensor
from lewis_hub.errors import AlignmentError
from lewis_hub.merge.depth import in_places
from lewis_hub.merge.matching import ComparedModel, best_order, match, match_heads, nearest_units
from lewis_hub.merge.plan import MergeSettings, MergeSource, make_plan
from lewis_hub.merge.quantised import read_floats
from lewis_hub.merge.readers import open_source, rows_by_place
from lewis_hub.merge.symmetries import units_of
from lewis_hub.merge.width import in_widths, norm_scales, places_of, require_same_names
from tests.merge.test_permutation import saved

COMMON = {"vocab_size": 37, "num_hidden_layers": 2, "max_position_embeddings": 64, "head_dim": 4}
ONE = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4}
TWO = {"hidden_size": 18, "intermediate_size": 26, "num_attention_heads": 6}
NORMS = ("input", "post_attention")
WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
KINDS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
}


def models(kind, folder):
    """Two models of different width: their headers and units."""
    found = []
    for name, sizes in (("one", ONE), ("two", TWO)):
        n_groups = sizes["num_attention_heads"] // 2
        config = KINDS[kind](**COMMON, **sizes, num_key_value_heads=n_groups)
        saved(config, folder / name, seed=len(found))
        checkpoint = local_checkpoint(name, folder / name)
        found.append((checkpoint, units_of(checkpoint, config.to_dict())))
    return found


def test_a_best_order_of_fewer_units_beats_all_others():
    wide = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))

    order, other = best_order(wide), best_order(wide.T)

    best = max(permutations(range(5), 3), key=lambda p: sum(wide[i, j] for i, j in enumerate(p)))
    assert order.tolist() == list(best)
    assert [other.tolist().index(i) for i in range(3)] == list(best)
    assert sorted(other.tolist()) == [-1, -1, 0, 1, 2]


def test_the_nearest_unit_is_one_with_a_similarity_above_zero():
    similarity = torch.tensor([[0.5, -1.0, 0.0, 0.2], [0.4, -0.5, -0.1, 0.3]])

    assert nearest_units(similarity).tolist() == [0, -1, -1, 1]


def test_places_undo_an_order_and_zip_what_has_no_partner():
    order = np.array([3, -1, 0])

    assert places_of(order, 5).tolist() == [2, -1, -1, 0, -1]
    assert places_of(order, 5, np.array([0, 1, -1, 1, 2])).tolist() == [2, 1, -1, 0, 2]


@pytest.mark.parametrize("n_theirs", [1, 3])
def test_groups_of_heads_without_a_partner_are_left_out(n_theirs):
    sizes = {"query": 4, "key": 2, "value": 2, "output": 4}
    n_ours, generator = 2, torch.Generator().manual_seed(4)
    similarity = {
        kind: torch.randn(n * n_ours, n * n_theirs, generator=generator) * 0.1
        for kind, n in sizes.items()
    }
    ours, theirs = (0, 2) if n_theirs == 3 else (1, 0)  # two groups that are alike
    for kind, n in sizes.items():
        similarity[kind][n * ours : n * (ours + 1), n * theirs : n * (theirs + 1)] += torch.eye(n)

    found = match_heads(similarity, (n_ours, 2, 2), rotary=True)

    for kind, n in sizes.items():
        order = found[kind].reshape(n_ours, n)
        assert order[ours].tolist() == [n * theirs + i for i in range(n)], kind
        assert (order[1 - ours] >= 0).all() == (n_theirs == 3)
        assert (order[1 - ours] < 0).all() == (n_theirs == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_read_as_the_definition_says(kind, tmp_path):
    """Mean over rows, sum over columns, mean over entries of a vector; else the reference's."""
    (one, units), (two, others) = models(kind, tmp_path)
    generator = np.random.default_rng(0)
    places = {
        group: generator.integers(-1, units.sizes[group], size)  # several go to one place
        for group, size in others.sizes.items()
    }
    scales = {"model.norm": 1.25, "model.layers.1.input_layernorm": 0.75}

    fitted = in_widths(one, two, units, places, scales)

    assert fitted.tensors.keys() == one.tensors.keys()
    with TensorReader(tmp_path / "one", "one") as ours, TensorReader(tmp_path / "two", "t") as own:
        files = {"one": ours, "two": own}
        with open_source("two", fitted.base, lambda label: nullcontext(files[label])) as reader:
            for name, header in fitted.tensors.items():
                base, stored = (
                    read_tensor(files[label], model.tensors[name]).double()
                    for label, model in (("one", one), ("two", two))
                )
                stored *= scales.get(name.removesuffix(".weight"), 1)
                expected = by_definition(base, stored, units.axes[name], places)
                found = read_tensor(reader, header)
                assert header.shape == one.tensors[name].shape
                assert (found - expected).abs().max() < 1e-6, name
                piece = read_floats(reader, header, 1, header.n_elements - 3)
                assert np.array_equal(piece, found.flatten()[1:-2].numpy()), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_identity_block_adds_nothing_to_the_units_of_a_model_of_another_width(kind, tmp_path):
    """Block 1 of the model is in place 1; place 0 is the reference's block but for those rows."""
    (one, units), (two, others) = models(kind, tmp_path)
    generator = np.random.default_rng(0)
    places = {
        group: generator.integers(-1, units.sizes[group], size)
        for group, size in others.sizes.items()
        if not group.startswith("0.")
    }
    places["residual"] = np.where(np.arange(18) < 15, np.arange(18), -1)

    moved = in_places(one, two, (None, 1), units)
    fitted = in_widths(one, moved, units, places, {})

    assert {n for n in moved.tensors if ".0." in n} == {f"model.layers.0.{n}" for n in WRITERS}
    with TensorReader(tmp_path / "one", "one") as ours, TensorReader(tmp_path / "two", "t") as own:
        files = {"one": ours, "two": own}
        with open_source("two", fitted.base, lambda label: nullcontext(files[label])) as reader:
            for name, header in fitted.tensors.items():
                base = read_tensor(ours, one.tensors[name])
                if ".0." in name:
                    expected = base.clone()
                    expected[: 15 if name.endswith(WRITERS) else 0] = 0
                else:
                    stored = read_tensor(own, two.tensors[name]).double()
                    expected = by_definition(base.double(), stored, units.axes[name], places)
                found = read_tensor(reader, header)
                assert (found - expected).abs().max() < 1e-6, name
                piece = read_floats(reader, header, 1, header.n_elements - 3)
                assert np.array_equal(piece, found.flatten()[1:-2].numpy()), name


@pytest.mark.parametrize("n_rows", [0, 1, 40, 400])
def test_rows_of_many_places_are_found_at_once(n_rows):
    rows = np.random.default_rng(n_rows).integers(-1, 60, n_rows)

    for places in (range(60), range(7, 30), range(59, 64), range(5, 5)):
        expected = [np.flatnonzero(rows == place).tolist() for place in places]
        assert rows_by_place(rows, places) == expected
    assert rows_by_place(None, range(3, 6)) == [[3], [4], [5]]


def test_a_sum_beyond_float32_is_infinite_without_a_warning(tmp_path):
    (one, units), (two, others) = models("llama", tmp_path)
    huge = {n: t + 3e38 for n, t in load_file(tmp_path / "two" / "model.safetensors").items()}
    save_file(huge, tmp_path / "two" / "model.safetensors", metadata={"format": "pt"})
    places = {group: np.zeros(size, np.int64) for group, size in others.sizes.items()}
    fitted = in_widths(one, two, units, places, {})
    header = fitted.tensors["model.layers.0.mlp.down_proj.weight"]

    with TensorReader(tmp_path / "one", "one") as ours, TensorReader(tmp_path / "two", "t") as own:
        files = {"one": ours, "two": own}
        with open_source("two", fitted.base, lambda label: nullcontext(files[label])) as reader:
            found = read_tensor(reader, header)

    assert found.isinf().nonzero().tolist() == [[0, 0]]


def by_definition(base, stored, axes, places):
    """Entry by entry; a vector is one row of entries whose mean is taken."""
    found = base.clone()
    for place in np.ndindex(*base.shape):
        members = [
            np.flatnonzero(places[axis[0]] == n) if axis else [n]
            for axis, n in zip(axes, place, strict=True)
        ]
        if all(len(one) for one in members):
            values = stored[np.ix_(*members)]
            found[place] = values.mean(dim=0).sum()
    return found


def test_the_scale_of_a_norm_is_the_ratio_of_both_root_mean_squares(tmp_path):
    (_, units), (_, others) = models("llama", tmp_path)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, size, generator=generator) for size in (10, 12))
    order = np.array([3, -1, 0, 1, 2, 9, -1, -1, 8, -1, 7, -1])

    found = norm_scales(units, order, lambda _: y, lambda _: x)

    ratios = []
    for token in range(9):
        kept = [float(y[token, i] if j < 0 else x[token, j]) ** 2 for i, j in enumerate(order)]
        whole = [float(value) ** 2 for value in x[token]]
        ratios.append((sum(kept) / 12 / (sum(whole) / 10)) ** 0.5)
    blocks = [f"model.layers.{n}.{kind}_layernorm" for n in (0, 1) for kind in NORMS]
    assert found.keys() == {"model.norm", *blocks}
    assert all(value == pytest.approx(np.mean(ratios), abs=1e-6) for value in found.values())


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_matching_does_not_depend_on_the_number_of_threads(weight, tmp_path):
    (one, units), (two, others) = models("llama", tmp_path)
    before, found = torch.get_num_threads(), []

    def seen(own, seed):
        def of_site(site):
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(40, own.width_at(site), generator=generator)

        return of_site

    with TensorReader(tmp_path / "one", "one") as ours, TensorReader(tmp_path / "two", "t") as own:
        compared = (
            ComparedModel(lambda name: read_tensor(ours, one.tensors[name]), seen(units, 0)),
            ComparedModel(lambda name: read_tensor(own, two.tensors[name]), seen(others, 1)),
        )
        try:
            for n_threads in (1, 2):
                torch.set_num_threads(n_threads)
                found.append(match(units, *compared, weight))
        finally:
            torch.set_num_threads(before)

    assert found[0].similarity == found[1].similarity
    for group, order in found[0].orders.items():
        assert len(order) == units.sizes[group]
        assert (order >= 0).sum() == min(units.sizes[group], others.sizes[group])
        assert np.array_equal(order, found[1].orders[group])
    assert all(len(one) == 26 for one in found[0].nearest.values())


def test_other_places_or_scales_are_another_plan(tmp_path):
    (one, units), (two, others) = models("llama", tmp_path)
    places = {group: np.arange(size) % units.sizes[group] for group, size in others.sizes.items()}

    def digest(places, scales):
        fitted = MergeSource(in_widths(one, two, units, places, scales), "two")
        experts = (MergeSource(one, "one"), fitted)
        return make_plan(MergeSettings("linear", None, experts), 1 << 20).digest

    moved = places | {"0.mlp": places["0.mlp"][::-1].copy()}
    assert len({digest(places, {}), digest(moved, {}), digest(places, {"model.norm": 0.5})}) == 3
    assert digest(places, {}) == digest(places | {}, {})


def test_headers_that_widths_do_not_explain_are_refused(tmp_path):
    (one, units), (two, _) = models("llama", tmp_path)
    name, remedy = "model.layers.1.mlp.up_proj.weight", "`width` matches models of one architecture"
    fewer = {n: tensor for n, tensor in two.tensors.items() if n != name}
    rows = two.tensors["lm_head.weight"]
    longer = {**two.tensors, rows.name: replace(rows, shape=(40, 18))}

    for tensors, problem in (
        (fewer, f"two: it lacks {name}, which one has.\n{remedy}"),
        (longer, "two: lm_head.weight has the shape [40, 18], in one [37, 24].\nGive it the other"),
    ):
        with pytest.raises(AlignmentError) as caught:
            require_same_names(one, replace(two, tensors=tensors), units)
        assert str(caught.value).startswith(problem)
    require_same_names(one, two, units)
