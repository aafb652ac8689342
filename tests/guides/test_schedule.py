from __future__ import annotations

import time
from dataclasses import replace

import pytest

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.errors import GuideError, ProfileError
from lewis_hub.guides.registry import Decision, RegisteredGuide, find
from lewis_hub.guides.schedule import (
    DensitySchedule,
    ExpertSchedule,
    ScheduleSettings,
    checkpoint_tensor,
    notes,
    schedule,
)

SHAPES = {
    "model.embed_tokens.weight": (10, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 6),
    "model.layers.0.mlp.down_proj.bias": (4,),
    "model.layers.0.norm.weight": (4,),
    "model.layers.1.mlp.down_proj.weight": (4, 6),
    "lm_head.weight": (10, 4),
}
DOWN = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def measured(source: str, role: str, importance: tuple[float, float], data: str = "a"):
    modules = dict(zip(DOWN, importance, strict=True))
    return SourceImportance(source, f"{source}-sha", role, 9, {"dataset": data}, modules)


PROFILE = ImportanceProfile(
    "lewis",
    {},
    (
        measured("base", "base", (1.0, 1.0)),
        measured("base", "base", (5.0, 5.0), data="b"),
        measured("one", "expert", (2.0, 4.0)),
        measured("two", "expert", (8.0, 6.0), data="b"),
    ),
)
SETTINGS = ScheduleSettings(0.3, 0.8)


def test_every_expert_is_held_against_the_base_on_its_own_calibration_set():
    guided = schedule(find("lewis"), SETTINGS, ["one", "two"], SHAPES, PROFILE)

    assert guided.schedule == DensitySchedule(
        (
            ExpertSchedule("one", 1.0, {f"{DOWN[0]}.weight": 0.3, f"{DOWN[1]}.weight": 0.8}),
            ExpertSchedule("two", 1.0, {f"{DOWN[0]}.weight": 0.8, f"{DOWN[1]}.weight": 0.3}),
        )
    )


def test_a_schedule_keeps_the_order_in_which_the_guide_went_through_the_model():
    backwards = dict(reversed(SHAPES.items()))  # the order of a file says nothing

    guided = schedule(find("lewis"), SETTINGS, ["one", "two"], backwards, PROFILE)

    assert [list(expert.tensors) for expert in guided.schedule.experts] == [
        [f"{DOWN[0]}.weight", f"{DOWN[1]}.weight"]
    ] * 2


def test_tensors_that_the_guide_leaves_alone_have_the_default_density():
    settings = ScheduleSettings(0.3, 0.8, default_density=0.9)

    [expert] = schedule(find("uniform"), settings, ["one"], SHAPES).schedule.experts

    assert {name: expert.density(name) for name in SHAPES} == {
        "model.embed_tokens.weight": 0.9,
        "model.layers.0.mlp.down_proj.weight": 0.55,
        "model.layers.0.mlp.down_proj.bias": 0.9,
        "model.layers.0.norm.weight": 0.9,
        "model.layers.1.mlp.down_proj.weight": 0.55,
        "lm_head.weight": 0.9,
    }


def test_a_dominating_block_is_noted():
    profile = ImportanceProfile(
        "lewis", {}, (measured("base", "base", (1, 1)), measured("one", "expert", (1, 99)))
    )

    guided = schedule(find("lewis"), SETTINGS, ["one"], SHAPES, profile)

    assert guided.notes == (
        "one: model.layers.1.mlp.down_proj alone sets the range: all other blocks lie in the "
        "lowest 0% of [gamma, epsilon]. A block with massive activations does this; the schedule "
        "then is close to gamma everywhere else.",
    )


@pytest.mark.parametrize(
    ("module", "tensors", "expected"),
    [
        ("model.layers.0.q", ["model.layers.0.q.weight"], "model.layers.0.q.weight"),
        ("transformer.h.0.attn.c_attn", ["h.0.attn.c_attn.weight"], "h.0.attn.c_attn.weight"),
        ("model.layers.0.q", ["text.model.layers.0.q.weight"], "text.model.layers.0.q.weight"),
        ("model.layers.0.q", ["layers.0.q.weight", "q.weight"], "layers.0.q.weight"),
    ],
)
def test_a_module_finds_its_tensor_under_another_prefix(module, tensors, expected):
    assert checkpoint_tensor(module, tensors) == expected


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            ["model.layers.0.mlp.experts.3.w1.weight", "q_proj.weight"],
            "schedule: a density is given to model.layers.0.mlp.up_proj.weight, which no tensors "
            "match.\nThe nearest is model.layers.0.mlp.experts.3.w1.weight. The checkpoint stores "
            "this architecture otherwise: use guide `uniform`.",
        ),
        (
            ["a.model.layers.0.mlp.up_proj.weight", "b.model.layers.0.mlp.up_proj.weight"],
            "schedule: a density is given to model.layers.0.mlp.up_proj.weight, which several "
            "tensors match.\nThe nearest is b.model.layers.0.mlp.up_proj.weight. The checkpoint "
            "stores this architecture otherwise: use guide `uniform`.",
        ),
        (
            ["lm_head"],
            "schedule: a density is given to model.layers.0.mlp.up_proj.weight, which no tensors "
            "match.\nThe checkpoint stores this architecture otherwise: use guide `uniform`.",
        ),
    ],
)
def test_a_density_for_a_tensor_that_no_checkpoint_has_is_an_error(tensors, message):
    with pytest.raises(GuideError) as caught:
        checkpoint_tensor("model.layers.0.mlp.up_proj", tensors)

    assert str(caught.value) == message


def test_the_mean_is_weighted_by_parameters_over_scheduled_tensors_of_all_experts():
    both = DensitySchedule(
        (ExpertSchedule("one", 1.0, {"a": 0.2, "b": 0.8}), ExpertSchedule("two", 1.0, {"a": 0.4}))
    )

    assert both.mean({"a": 30, "b": 10, "c": 999}) == pytest.approx((6 + 8 + 12) / 70)


def test_the_uniform_twin_keeps_tensors_and_mean_and_nothing_else():
    sizes = {"a": 30, "b": 10, "c": 999}
    guided = DensitySchedule((ExpertSchedule("one", 0.9, {"a": 0.2, "b": 0.8}),))

    twin = guided.uniform_twin(sizes)

    assert twin == DensitySchedule((ExpertSchedule("one", 0.9, {"a": 0.35, "b": 0.35}),))
    assert twin.mean(sizes) == guided.mean(sizes) == 0.35


def test_the_mean_of_equal_densities_is_that_density_to_the_bit():
    sizes = {str(i): 3 * i + 1 for i in range(50)}
    equal = DensitySchedule((ExpertSchedule("one", 1.0, dict.fromkeys(sizes, 0.55)),))

    assert equal.mean(sizes) == 0.55
    assert equal.uniform_twin(sizes) == equal


def test_a_schedule_of_nothing_has_no_mean():
    with pytest.raises(GuideError) as caught:
        DensitySchedule((ExpertSchedule("one", 1.0, {}),)).mean({})

    assert str(caught.value) == (
        "schedule: no tensor is scheduled, so there is no mean density.\n"
        "Check that the guide applies to this model."
    )


def test_a_guide_that_leaves_the_bounds_is_told_so():
    wild = RegisteredGuide("wild", lambda statistics, gamma, epsilon: {DOWN[0]: 0.9})

    with pytest.raises(GuideError) as caught:
        schedule(wild, SETTINGS, ["one"], SHAPES)

    assert str(caught.value) == (
        "guide `wild`: it gives model.layers.0.mlp.down_proj the density 0.9, outside gamma and "
        "epsilon.\nThis is a fault of the guide."
    )


def fails(statistics, gamma, epsilon):
    return 1 / 0


@pytest.mark.parametrize(
    ("decide", "problem", "remedy"),
    [
        (
            fails,
            "it failed on one: ZeroDivisionError: division by zero (test_schedule.py, line {line})",
            "This is a fault of the guide.",
        ),
        (
            lambda s, gamma, epsilon: {"model.embed_tokens": 0.5},
            "it decides model.embed_tokens, which is no matrix of a block",
            "A guide decides the modules in `Measurements.matrices`, and those alone.",
        ),
        (
            lambda s, gamma, epsilon: {DOWN[0]: float("nan")},
            "it gives model.layers.0.mlp.down_proj the density nan, outside gamma and epsilon",
            "This is a fault of the guide.",
        ),
        (
            lambda s, gamma, epsilon: Decision({DOWN[0]: 0.5}, {DOWN[0]: float("inf")}),
            "it gives model.layers.0.mlp.down_proj the weight inf",
            "This is a fault of the guide.",
        ),
    ],
)
def test_a_guide_that_fails_or_decides_nonsense_is_one_message(decide, problem, remedy):
    with pytest.raises(GuideError) as caught:
        schedule(RegisteredGuide("bad", decide), SETTINGS, ["one"], SHAPES)

    problem = problem.format(line=fails.__code__.co_firstlineno + 1)
    assert str(caught.value) == f"guide `bad`: {problem}.\n{remedy}"


def test_a_guide_that_returns_no_mapping_is_told_so():
    empty = RegisteredGuide("empty", lambda statistics, gamma, epsilon: None)

    with pytest.raises(GuideError, match="guide `empty`: it failed on one: AttributeError: 'None"):
        schedule(empty, SETTINGS, ["one"], SHAPES)


def test_what_was_measured_of_other_tensors_moves_no_density():
    others = {"model.layers.0.mixer.conv1d": 99.0, "model.visual.blocks.0.attn.qkv": 1e9}
    shapes = SHAPES | {f"{name}.weight": (4, 1, 3) for name in others}
    sources = tuple(
        replace(s, modules={**s.modules, **others}, calibration={"measure": "outliers"})
        for s in PROFILE.sources
    )
    profile = ImportanceProfile("owl", {}, sources)

    guided = schedule(find("owl"), SETTINGS, ["one", "two"], shapes, profile)

    assert [list(expert.tensors.values()) for expert in guided.schedule.experts] == [
        [0.3, 0.8],
        [0.8, 0.3],
    ]


def test_what_was_measured_under_the_models_names_is_decided_under_the_files():
    shapes = {name.removeprefix("model."): shape for name, shape in SHAPES.items()}

    guided = schedule(find("lewis"), SETTINGS, ["one", "two"], shapes, PROFILE)

    assert guided.schedule.experts[0].tensors == {
        "layers.0.mlp.down_proj.weight": 0.3,
        "layers.1.mlp.down_proj.weight": 0.8,
    }
    assert not any("measures nothing" in note for note in guided.notes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("visual.blocks.0.qkv.weight", (4, 4)), ("model.layers.0.mlp.down_proj.weight", (4, 0))],
)
def test_a_checkpoint_without_a_matrix_in_a_block_is_refused(name, shape):
    with pytest.raises(GuideError) as caught:
        schedule(find("uniform"), SETTINGS, ["one"], {name: shape})

    assert str(caught.value) == (
        "guide `uniform`: by names and shapes, none of the base's tensors is a matrix of a block.\n"
        "Leave `guide` out, and give `density` in `parameters`."
    )


def test_the_names_of_a_schedule_of_others_have_a_limit():
    written = DensitySchedule((ExpertSchedule("a/b", 1.0, {"n" * 1001: 0.5}),)).to_json()

    with pytest.raises(ProfileError, match=r"at most 1000 characters\.\n"):
        DensitySchedule.from_json(written)


def test_an_expert_that_was_not_measured_is_an_error():
    for profile in (None, ImportanceProfile("lewis", {}, PROFILE.sources[:3])):
        with pytest.raises(ProfileError) as caught:
            schedule(find("lewis"), SETTINGS, ["one", "two"], SHAPES, profile)
        number = 1 if profile is None else 2
        assert str(caught.value) == (
            f"importance.json: expert {number} was not measured, and guide `lewis` needs it.\n"
            "Delete the file to have it made again."
        )


JSON = """{
  "version": 1,
  "experts": [
    {
      "source": "me/é@0a",
      "default_density": 1.0,
      "tensors": {
        "b": 0.1,
        "a": 0.30000000000000004
      }
    }
  ]
}
"""


def test_a_schedule_is_written_in_order_and_reads_back_equal():
    written = DensitySchedule((ExpertSchedule("me/é@0a", 1.0, {"b": 0.1, "a": 0.1 + 0.2}),))

    assert written.to_json() == JSON
    assert DensitySchedule.from_json(JSON) == written


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("{", "[", "Invalid JSON: expected `,` or `]` at line 2 column 12"),
        ('"experts"', '"expert"', "`experts`: Field required"),
        (
            '"source": "me/é@0a"',
            '"source": 3',
            "`experts.0.source`: Input should be a valid string",
        ),
        ("0.1", "1.5", "`experts.0.tensors.b`: Input should be less than or equal to 1"),
        ("0.1", '"0.1"', "`experts.0.tensors.b`: Input should be a valid number"),
        ("0.1", "NaN", "`experts.0.tensors.b`: Input should be a finite number"),
        ("0.1", "true", "`experts.0.tensors.b`: Input should be a valid number"),
        (
            '"default_density": 1.0',
            '"default_density": 0',
            "`experts.0.default_density`: Input should be greater than 0",
        ),
    ],
)
def test_a_broken_schedule_is_an_error_naming_the_field(old, new, problem):
    with pytest.raises(ProfileError) as caught:
        DensitySchedule.from_json(JSON.replace(old, new, 1), "lewis/density.json")

    assert str(caught.value) == (
        f"lewis/density.json: {problem}.\nDelete the file to have it made again."
    )


def test_weights_are_written_beside_the_densities_and_read_back():
    weights = {"a": 0.5}
    written = DensitySchedule(
        (ExpertSchedule("me/é@0a", 1.0, {"b": 0.1, "a": 0.1 + 0.2}, weights),)
    )

    text = written.to_json()

    assert text == JSON.replace(
        "0.30000000000000004\n      }\n",
        '0.30000000000000004\n      },\n      "weights": {\n        "a": 0.5\n      }\n',
    )
    assert DensitySchedule.from_json(text) == written


def test_the_uniform_twin_has_each_experts_mean_weight():
    sizes = {"a": 30, "b": 10}
    guided = DensitySchedule(
        (
            ExpertSchedule("one", 1.0, {}, {"a": 0.2, "b": 0.8}),
            ExpertSchedule("two", 1.0, {}, {"a": 1.0, "b": 2.0}),
        )
    )

    assert [expert.weights for expert in guided.uniform_twin(sizes).experts] == [
        {"a": 0.35, "b": 0.35},
        {"a": 1.25, "b": 1.25},
    ]


WEIGHING = RegisteredGuide(
    "weighing",
    lambda statistics, gamma, epsilon: Decision(dict.fromkeys(DOWN, gamma), {DOWN[0]: 3.0}),
)


@pytest.mark.parametrize(
    ("guide", "apply_to", "densities", "weights"),
    [
        ("uniform", "density", [0.55, 0.55], {}),
        ("uniform", "weight", [], {f"{name}.weight": 0.55 for name in DOWN}),
        ("uniform", "both", [0.55, 0.55], {f"{name}.weight": 0.55 for name in DOWN}),
        (WEIGHING, "density", [0.3, 0.3], {}),
        (WEIGHING, "weight", [], {f"{name}.weight": 3.0 for name in DOWN}),
        (WEIGHING, "both", [0.3, 0.3], {f"{name}.weight": 3.0 for name in DOWN}),
    ],
)
def test_a_guide_is_applied_to_densities_or_weights_or_both(guide, apply_to, densities, weights):
    guide = find(guide) if isinstance(guide, str) else guide

    settings = replace(SETTINGS, apply_to=apply_to)
    [expert] = schedule(guide, settings, ["one"], SHAPES).schedule.experts

    assert list(expert.tensors.values()) == densities
    assert expert.weights == weights


def test_a_mean_density_moves_the_bounds_of_each_expert():
    settings = ScheduleSettings(0.3, 0.5, mean=0.2)

    guided = schedule(find("lewis"), settings, ["one", "two"], SHAPES, PROFILE)

    down = [f"{name}.weight" for name in DOWN]  # of one size: the middle is the mean
    assert [expert.tensors for expert in guided.schedule.experts] == [
        {down[0]: pytest.approx(0.1), down[1]: pytest.approx(0.3)},
        {down[0]: pytest.approx(0.3), down[1]: pytest.approx(0.1)},
    ]


def test_a_guide_is_given_every_measure_that_it_needs_and_a_seed_of_the_expert():
    told = []
    needy = RegisteredGuide(
        "needy", lambda s, gamma, epsilon: told.append(s) or {}, ("lewis", "task_vector")
    )
    moved = [
        SourceImportance(
            name, f"{name}-sha", "expert", 0, {"measure": "task_vector"}, {DOWN[0]: size}
        )
        for name, size in (("one", 0.1), ("two", 0.2))
    ]
    profile = ImportanceProfile("needy", {}, (*PROFILE.sources, *moved))

    for seed in (1, 1, 2):
        schedule(needy, replace(SETTINGS, seed=seed), ["one", "two"], SHAPES, profile)

    first, second, *_ = told
    assert (first.expert["task_vector"], second.expert["task_vector"]) == (
        {DOWN[0]: 0.1},
        {DOWN[0]: 0.2},
    )
    assert second.base == {"lewis": dict.fromkeys(DOWN, 5.0)}
    assert first.matrices == DOWN
    seeds = [statistics.seed for statistics in told]
    assert seeds[:2] == seeds[2:4]
    assert len(set(seeds)) == 4


def test_many_matrices_that_no_token_reached_are_counted_at_once():
    routed = [f"model.layers.{i // 100}.mlp.experts.{i % 100}.w" for i in range(20_000)]
    others = [f"model.layers.{i}.q" for i in range(1000)]

    began = time.process_time()
    unseen, rest = notes({routed[0]: 0.5}, [*routed, *others])

    assert time.process_time() - began < 1  # 6 s if all are listed again for each
    assert unseen.startswith("no calibration token reached 19999 of the routed MoE matrices")
    assert rest.startswith("the guide has no measurement of 1000 of the 21000 matrices")
