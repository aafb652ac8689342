"""Stacks of blocks, held against loops over the slices that are written here."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lewis_hub.errors import MergeError, NonFiniteError
from lewis_hub.kernels import random_bits
from lewis_hub.merge.runners import Runner, threads
from lewis_hub.merge.slices import Blocks, MergeSlice, StackSettings, make_stacked_plan
from lewis_hub.methods import registry
from lewis_hub.recipe.schema import Conditional

OUTSIDE = {
    "model.embed_tokens.weight": (96, 32),
    "model.norm.weight": (32,),
    "lm_head.weight": (96, 32),
}
INSIDE = {"input_layernorm": (32,), "mlp.up_proj": (64, 32), "self_attn.q_proj": (32, 32)}
EMBEDDINGS, NORM, HEAD = OUTSIDE


def name(block, component):
    return f"model.layers.{block}.{component}.weight"


def model(seed, n_blocks, dtype=torch.bfloat16, shapes=INSIDE, outside=OUTSIDE):
    generator = torch.Generator().manual_seed(seed)
    named = {name(b, c): shape for b in range(n_blocks) for c, shape in shapes.items()}
    return {
        tensor: torch.randn(shape, generator=generator).to(dtype)
        for tensor, shape in {**outside, **named}.items()
    }


@pytest.fixture
def sources(zoo):
    """Of 6, 6, 6 and 4 blocks."""
    depths = {"base": 6, "x": 6, "y": 6, "short": 4}
    return {
        label: zoo.source(label, model(seed, n)) for seed, (label, n) in enumerate(depths.items())
    }


def blocks(source, start, stop, **parameters):
    return Blocks(replace(source, parameters=parameters), range(start, stop))


def one(start, stop, *experts, base=None, **parameters):
    """A slice of the same blocks of all its sources."""
    return MergeSlice(
        blocks(base, start, stop) if base else None,
        tuple(blocks(source, start, stop) for source in experts),
        parameters,
    )


def asked(method, slices, donor, **more):
    return StackSettings(method, tuple(slices), donor.checkpoint, **more)


def differing(found, expected):
    """Names of tensors that are not in both, or not the same."""
    common = found.keys() & expected.keys()
    unlike = {tensor for tensor in common if not torch.equal(found[tensor], expected[tensor])}
    return unlike | (found.keys() ^ expected.keys())


def message(call):
    with pytest.raises(MergeError) as caught:
        call()
    return str(caught.value)


# -- against a naive reference


def test_passthrough_writes_overlapping_blocks_out_in_full(zoo, sources):
    ranges = [("base", 0, 4), ("short", 1, 4), ("base", 3, 6)]
    slices = [one(start, stop, sources[label]) for label, start, stop in ranges]

    merged = zoo.stack(asked("passthrough", slices, sources["base"])).tensors

    expected, number = {EMBEDDINGS: zoo.tensors["base"][EMBEDDINGS]}, 0
    for label, start, stop in ranges:
        for block in range(start, stop):
            for component in INSIDE:
                expected[name(number, component)] = zoo.tensors[label][name(block, component)]
            number += 1
    assert number == 10
    assert (
        differing(
            merged, expected | {tensor: zoo.tensors["base"][tensor] for tensor in (NORM, HEAD)}
        )
        == set()
    )


def test_embeddings_are_the_first_slices_and_norm_and_head_the_lasts(zoo, sources):
    slices = [one(0, 1, sources["x"]), one(0, 1, sources["base"]), one(3, 4, sources["short"])]

    merged = zoo.stack(asked("passthrough", slices, sources["base"])).tensors

    assert torch.equal(merged[EMBEDDINGS], zoo.tensors["x"][EMBEDDINGS])
    assert torch.equal(merged[NORM], zoo.tensors["short"][NORM])
    assert torch.equal(merged[HEAD], zoo.tensors["short"][HEAD])


def test_a_scale_is_looked_up_by_the_names_of_the_source(zoo, sources):
    scale = (
        Conditional(filter="layers.1.mlp", value=0.0),
        Conditional(filter="self_attn", value=(1.0, 3.0)),
        Conditional(value=0.5),
    )
    slices = [
        one(2, 3, sources["x"]),
        MergeSlice(None, (blocks(sources["short"], 0, 3, scale=scale),)),
    ]

    merged = zoo.stack(asked("passthrough", slices, sources["base"])).tensors

    for number, block in enumerate(range(3), start=1):
        factors = {
            "input_layernorm": 0.5,
            "mlp.up_proj": 0.0 if block == 1 else 0.5,
            "self_attn.q_proj": [1.0, 2.0, 3.0][block],
        }
        for component, factor in factors.items():
            value = zoo.tensors["short"][name(block, component)].float() * factor
            assert torch.equal(merged[name(number, component)], value.bfloat16())
    assert torch.equal(merged[name(0, "mlp.up_proj")], zoo.tensors["x"][name(2, "mlp.up_proj")])
    assert torch.equal(merged[HEAD], (zoo.tensors["short"][HEAD].float() / 2).bfloat16())


def test_slerp_turns_by_filters_and_by_gradients_over_each_slice(zoo, sources):
    attention, rest = (0.0, 0.8, 0.4), (1.0, 0.2)
    t = (Conditional(filter="self_attn", value=attention), Conditional(value=rest))
    own = (Conditional(filter="mlp", value=0.9),)  # and for all else the recipe's
    slices = [
        one(0, 4, sources["x"], base=sources["base"]),
        MergeSlice(blocks(sources["base"], 4, 6), (blocks(sources["y"], 1, 3),), {"t": own}),
        one(5, 6, sources["x"], base=sources["base"], t=0.25),
    ]

    merged = zoo.stack(asked("slerp", slices, sources["base"], parameters={"t": t})).tensors

    def at(gradient, i, n):
        depth = i / (n - 1) if n > 1 else 1.0
        return float(np.interp(depth, np.linspace(0, 1, len(gradient)), gradient))

    def turned(expert, base_name, expert_name, share):
        base, other = zoo.tensors["base"][base_name], zoo.tensors[expert][expert_name]
        slerp = registry.find("slerp").function
        return slerp(base.float(), other.float()[None], t=share).bfloat16()

    expected = {EMBEDDINGS: turned("x", EMBEDDINGS, EMBEDDINGS, rest[0])}
    expected |= {n: turned("x", n, n, 0.25) for n in (NORM, HEAD)}
    for number in range(7):
        for component in INSIDE:
            gradient = attention if component.startswith("self_attn") else rest
            if number < 4:
                ours = theirs = name(number, component)
                expert, share = "x", at(gradient, number, 4)
            elif number < 6:
                ours, theirs = name(number, component), name(number - 3, component)
                expert, share = "y", at(gradient, number - 4, 2)
                share = 0.9 if component.startswith("mlp") else share
            else:
                ours = theirs = name(5, component)
                expert, share = "x", 0.25
            expected[name(number, component)] = turned(expert, ours, theirs, share)
    assert differing(merged, expected) == set()


# base's first block, [(expert, first block, densities, weight)], number of blocks
VECTORS = [
    (0, [("x", 0, (0.2, 0.6), 1.0), ("y", 2, (0.4,), 0.5)], 3),
    (4, [("y", 1, (0.9,), 0.7)], 2),
    (1, [("x", 5, (0.3,), 1.0)], 1),
]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs"])
def test_task_vectors_start_at_the_bases_block_in_each_slice(zoo, sources, method):
    slices = [
        MergeSlice(
            blocks(sources["base"], start, start + n),
            tuple(
                blocks(sources[label], first, first + n, density=densities, weight=weight)
                for label, first, densities, weight in experts
            ),
        )
        for start, experts, n in VECTORS
    ]
    merged = zoo.stack(asked(method, slices, sources["base"], seed=7)).tensors

    function, number = registry.find(method), 0
    for start, experts, n in VECTORS:
        for i in range(n):
            depth = i / (n - 1) if n > 1 else 1.0
            for component in INSIDE:
                output = name(number, component)
                base = zoo.tensors["base"][name(start + i, component)].float()
                others = [
                    zoo.tensors[label][name(first + i, component)].float()
                    for label, first, _, _ in experts
                ]
                given = {
                    "weights": torch.tensor([weight for *_, weight in experts]),
                    "densities": [
                        float(np.interp(depth, np.linspace(0, 1, len(d)), d))
                        for _, _, d, _ in experts
                    ],
                    "streams": [random_bits.stream(7, output, e) for e in range(len(experts))],
                    "outliers": [0.01] * len(experts),
                }
                keywords = {key: value for key, value in given.items() if function.takes(key)}
                keywords |= {function.keyword(o): v for o, v in function.options.items()}
                expected = function.function(base, torch.stack(others) - base, **keywords)
                assert torch.equal(merged[output], expected.bfloat16()), output
            number += 1


def test_a_slice_of_whole_models_is_the_merge_of_the_models(zoo, sources):
    parameters = {"density": (0.3, 0.9), "weight": (Conditional(filter="mlp", value=0.5),)}
    base, x, y = (sources[label] for label in ("base", "x", "y"))
    for method in ("dare_ties", "della", "model_stock", "linear"):
        common = parameters if registry.find(method).takes_density else {}
        whole = zoo.merge(zoo.settings(method, base, [x, y], parameters=common), f"whole {method}")
        experts = (x, y) if method != "linear" else (base, x, y)
        if method == "linear":
            whole = zoo.merge(zoo.settings(method, None, experts), "whole")
        slices = [one(0, 6, *experts, base=None if method == "linear" else base)]

        stacked = zoo.stack(asked(method, slices, base, parameters=common), f"stacked {method}")

        assert differing(stacked.tensors, whole.tensors) == set()


RANGES = st.lists(
    st.tuples(st.sampled_from(["base", "x", "y", "short"]), st.integers(0, 3), st.integers(1, 4)),
    min_size=1,
    max_size=4,
)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(RANGES)
def test_every_output_block_is_planned_from_the_block_that_its_slice_names(sources, ranges):
    cut = [(label, first, min(first + n, 4)) for label, first, n in ranges if first < 4]
    slices = [one(first, stop, sources[label]) for label, first, stop in cut]

    plan = make_stacked_plan(asked("passthrough", slices, sources["base"]), 10**9)

    (shard,) = plan.shards
    made = {t.output.name: (shard.labels[t.sources[0]], t.inputs[0].name) for t in shard.tensors}
    origins = [(label, block) for label, first, stop in cut for block in range(first, stop)]
    expected = {
        name(number, component): (label, name(block, component))
        for number, (label, block) in enumerate(origins)
        for component in INSIDE
    }
    outside = {EMBEDDINGS: cut[0][0], NORM: cut[-1][0], HEAD: cut[-1][0]}
    assert made == expected | {tensor: (label, tensor) for tensor, label in outside.items()}


def test_a_stack_has_no_more_tensors_than_a_model_may_have(sources, monkeypatch):
    monkeypatch.setattr("lewis_hub.merge.plan.MAX_TENSORS", 100)
    slices = [one(0, 6, sources["x"])] * 10

    assert message(
        lambda: make_stacked_plan(asked("passthrough", slices, sources["x"]), 10**9)
    ) == (
        "slices: the merge would have more than 100 tensors, the limit of a model.\n"
        "List fewer of them."
    )


def test_the_tensors_of_a_model_are_sorted_by_block_once(sources):
    named = {f"model.layers.0.mlp.experts.{i}.weight": (1,) for i in range(3000)}
    tensors = sources["x"].checkpoint.tensors
    some = {n: replace(tensors[NORM], name=n, shape=s) for n, s in named.items()}
    norm = name(1, "norm")
    some[norm] = replace(tensors[NORM], name=norm)
    large = replace(sources["x"], checkpoint=replace(sources["x"].checkpoint, tensors=some))
    slices = [one(1, 2, large)] * 1000

    began = time.process_time()
    make_stacked_plan(asked("passthrough", slices, large), 10**9)
    assert time.process_time() - began < 3  # 15 s if they are sorted again for each slice


# -- the same bytes


def test_the_bytes_are_the_same_on_every_runner_shard_size_and_after_resume(zoo, sources):
    slices = [
        one(0, 3, sources["x"], sources["y"], base=sources["base"], density=0.4),
        MergeSlice(blocks(sources["base"], 2, 4), (blocks(sources["short"], 1, 3, density=0.7),)),
    ]
    settings = asked("dare_ties", slices, sources["base"])
    runners = [Runner(), threads(2), Runner(3, large_elements=100)]

    first, *others = (
        zoo.stack(settings, str(i), shard=9_000, runner=r) for i, r in enumerate(runners)
    )

    assert len(first.results) > 4
    assert all(other.bytes == first.bytes for other in others)
    whole = zoo.stack(settings, "whole")
    assert differing(whole.tensors, first.tensors) == set()
    gone = min(name for name in first.bytes if name.endswith(".safetensors"))
    before = first.bytes
    (first.folder / gone).unlink()
    again = zoo.stack(settings, "0", shard=9_000)
    assert again.bytes == before
    assert [n for n, r in again.results.items() if r.is_kept and n.endswith("safetensors")] == [
        n for n in sorted(before) if n.endswith(".safetensors") and n != gone
    ]


def test_another_block_of_the_same_source_is_another_plan(sources):
    digests = {
        make_stacked_plan(asked("passthrough", [one(*r, sources["x"])], sources["x"]), 10**9).digest
        for r in ((0, 2), (1, 3), (0, 3))
    }

    assert len(digests) == 3


def test_counts_are_copied_from_the_slices_base_and_nan_names_the_source_in_it(zoo):
    tensors = {label: model(seed, 2) for seed, label in enumerate(("base", "x", "y"))}
    for seed, label in enumerate(tensors):
        for block in range(2):
            tensors[label][f"model.layers.{block}.steps"] = torch.tensor([seed, block])
    tensors["y"][name(1, "mlp.up_proj")][5, 5] = float("nan")
    base, x, y = (zoo.source(label, told) for label, told in tensors.items())
    fine = [one(0, 1, x, base=base), one(0, 1, y, base=x)]

    for method in ("ties", "model_stock"):
        slices = (
            fine if method == "ties" else [one(0, 1, x, y, base=base), one(0, 1, y, base, base=x)]
        )
        merged = zoo.stack(asked(method, slices, base), method).tensors
        assert merged["model.layers.0.steps"].tolist() == [0, 0]
        assert merged["model.layers.1.steps"].tolist() == [1, 0]
        broken = [*slices, replace(slices[-1], experts=(blocks(y, 1, 2), *slices[-1].experts[1:]))]
        with pytest.raises(NonFiniteError) as caught:
            zoo.stack(asked(method, broken, base), f"{method} broken")
        assert str(caught.value).startswith(f"{name(2, 'mlp.up_proj')} holds NaN or infinity in y.")


# -- what is refused


def test_a_range_outside_the_model_is_refused(sources):
    slices = [one(0, 2, sources["x"]), one(2, 5, sources["short"])]

    assert message(lambda: make_stacked_plan(asked("passthrough", slices, sources["x"]), 1)) == (
        "slices[1]: short has no blocks [2, 5].\nIt has 4 blocks: [0, 4] are all of them."
    )


WIDE = {**INSIDE, "mlp.up_proj": (80, 32)}
REFUSED = {
    "another shape within a slice": (
        lambda zoo, s: asked("linear", [one(0, 1, s["x"], s["wide"])], s["x"]),
        "slices[0], method `linear`: the sources do not fit together: wide has "
        "model.layers.0.mlp.up_proj.weight of shape [80, 32], the base x has [64, 32].\n"
        "A task vector needs equal shapes: use experts of the same size as the base.",
    ),
    "another shape than the configuration's": (
        lambda zoo, s: asked("passthrough", [one(0, 1, s["x"]), one(1, 2, s["wide"])], s["x"]),
        "slices[1]: wide has model.layers.1.mlp.up_proj.weight of shape [80, 32], the base x has "
        "[64, 32].\nA task vector needs equal shapes: use experts of the same size as the base.",
    ),
    "another component": (
        lambda zoo, s: asked("passthrough", [one(0, 1, s["x"]), one(0, 1, s["bare"])], s["x"]),
        "slices[1]: bare lacks model.layers.1.input_layernorm.weight of the base x.\n"
        "Stack blocks that hold the same tensors, as models of one architecture do.",
    ),
    "a head where the configuration ties it": (
        lambda zoo, s: asked("passthrough", [one(0, 1, s["tied"]), one(0, 1, s["x"])], s["tied"]),
        "slices[1]: x has a lm_head.weight of its own, the base tied ties its head to the "
        "embeddings.\nStack blocks that hold the same tensors, as models of one architecture do.",
    ),
    "several stacks of blocks": (
        lambda zoo, s: asked("passthrough", [one(0, 1, s["towers"])], s["towers"]),
        "slices: towers has several stacks of blocks (model.layers, vision.blocks), and slices cut "
        "one stack.\nList whole models under `models`.",
    ),
    "no blocks": (
        lambda zoo, s: asked("passthrough", [one(0, 1, s["flat"])], s["x"]),
        "slices: flat has no blocks, and slices cut one stack.\nList whole models under `models`.",
    ),
    "no base": (
        lambda zoo, s: asked("ties", [one(0, 1, s["x"])], s["x"]),
        "slices[0], method `ties`: it needs a base to start from.\nName a `base_model`.",
    ),
    "too many": (
        lambda zoo, s: asked("passthrough", [one(0, 1, s["x"]), one(0, 1, s["x"], s["y"])], s["x"]),
        "slices[1], method `passthrough`: it takes exactly 1 model, found 2.\n"
        "Remove 1 of them, or merge in several steps.",
    ),
    "too few": (
        lambda zoo, s: asked("slerp", [MergeSlice(blocks(s["x"], 0, 1), ())], s["x"]),
        "slices[0], method `slerp`: there is nothing to merge.\nList at least one expert.",
    ),
    "an unknown parameter": (
        lambda zoo, s: asked("passthrough", [one(0, 1, s["x"], scal=2.0)], s["x"]),
        "slices[0], parameter `scal`: `passthrough` has no such parameter.\n"
        "It knows scale. Did you mean `scale`?",
    ),
    "an option beside a source": (
        lambda zoo, s: asked(
            "ties",
            [MergeSlice(blocks(s["x"], 0, 1), (blocks(s["y"], 0, 1, trim="magnitude"),))],
            s["x"],
        ),
        "slices[0], parameter `trim`: `ties` takes one value for all models, not one per model.\n"
        "Move it to the recipe's own `parameters`.",
    ),
    "an option that is missing in one slice": (
        lambda zoo, s: asked(
            "slerp", [one(0, 1, s["x"], base=s["y"], t=0.5), one(1, 2, s["x"], base=s["y"])], s["x"]
        ),
        "slices[1], parameter `t`: `slerp` needs this parameter, and the recipe does not set it.\n"
        "Give it in the recipe's `parameters`.",
    ),
    "a filter that fits nothing": (
        lambda zoo, s: asked(
            "passthrough", [one(0, 1, s["x"], scale=(Conditional(filter="mpl", value=0),))], s["x"]
        ),
        "parameter `scale`: the filter `mpl` is part of no tensor's name.\nDid you mean `mlp`?",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_slice(zoo, sources, case):
    tied = {EMBEDDINGS: OUTSIDE[EMBEDDINGS], NORM: OUTSIDE[NORM]}
    bare = {c: shape for c, shape in INSIDE.items() if c != "input_layernorm"}
    more = {
        "wide": model(5, 2, shapes=WIDE),
        "bare": model(5, 2, shapes=bare),
        "tied": model(5, 2, outside=tied),
        "towers": model(5, 2) | {"vision.blocks.0.weight": torch.zeros(3)},
        "flat": {NORM: torch.zeros(32)},
    }
    for label, tensors in more.items():
        sources[label] = zoo.source(label, tensors)
    settings, expected = REFUSED[case]

    assert message(lambda: make_stacked_plan(settings(zoo, sources), 10**9)) == expected


def test_a_filter_for_the_embeddings_may_stand_in_any_slice(zoo, sources):
    scale = (Conditional(filter="embed_tokens", value=0.0), Conditional(value=1.0))
    slices = [one(0, 1, sources["x"], scale=scale), one(0, 1, sources["y"], scale=scale)]

    merged = zoo.stack(asked("passthrough", slices, sources["x"])).tensors

    assert not merged[EMBEDDINGS].any()
    assert torch.equal(merged[name(1, "mlp.up_proj")], zoo.tensors["y"][name(0, "mlp.up_proj")])
