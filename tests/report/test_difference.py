from dataclasses import replace

import pytest

from lewis_hub.report.difference import differences, recipe_differences
from lewis_hub.report.lock import Lock, LockedData, LockedInput, OutputFile


def locked(name, role, sha, **files):
    return LockedInput(name, role, None, sha * 40, {f"{path}.json": d for path, d in files.items()})


LOCK = Lock(
    inputs=(locked("a/base", "base", "1", config="x"), locked("a/code", "expert", "2", config="y")),
    calibration=(LockedData("a/data", None, "3" * 40, {"train": "z"}, None, "train", (3, 1)),),
    recipe={
        "models": [{"model": "a/code", "parameters": {"weight": 1.0, "density": [0.1, 0.5]}}],
        "parameters": {"normalize": True},
    },
    method="ties",
    method_version=1,
    guide=None,
    guide_version=None,
    seed=42,
    max_shard_bytes=5_000_000_000,
    outputs={"model.safetensors": OutputFile("a" * 64, 10), "config.json": OutputFile("b" * 64, 2)},
    software={},
)


def test_the_same_lock_differs_in_nothing():
    assert differences(LOCK, LOCK) == ()


def test_an_input_that_moved_is_told_with_what_changed_in_it():
    inputs = (LOCK.inputs[0], locked("a/code", "expert", "4", config="other", extra="new"))
    outputs = LOCK.outputs | {"model.safetensors": OutputFile("c" * 64, 10)}

    assert differences(LOCK, replace(LOCK, inputs=inputs, outputs=outputs)) == (
        "expert a/code: 222222222222 → 444444444444 (config.json, extra.json)",
        "weights: 1 of 1 files differ",
    )


def test_a_commit_that_changed_only_a_readme_says_so():
    moved = replace(LOCK, inputs=(LOCK.inputs[0], locked("a/code", "expert", "4", config="y")))

    assert differences(LOCK, moved) == (
        "expert a/code: 222222222222 → 444444444444, without a change of the files that are read",
        "none of these changes affects the weights",
    )


def test_each_revision_of_a_model_and_each_dataset_is_told_once():
    base, first, second = *LOCK.inputs, locked("a/code", "expert", "5", config="z")
    of_both = (*LOCK.calibration, *LOCK.calibration)
    both = replace(LOCK, inputs=(base, first, second), calibration=of_both)
    moved = locked("a/code", "expert", "4", config="other")

    assert differences(both, replace(both, inputs=(base, moved, second))) == (
        "expert a/code: 222222222222 → 444444444444 (config.json)",
    )
    assert differences(both, replace(both, calibration=LOCK.calibration)) == ()
    data = replace(LOCK.calibration[0], commit_sha="6" * 40, files={"train": "y"})
    assert differences(both, replace(both, calibration=(data, data))) == (
        "calibration a/data: 333333333333 → 666666666666 (train)",
    )


def test_inputs_come_and_go():
    other = replace(LOCK, inputs=(LOCK.inputs[0], locked("a/maths", "expert", "5")), calibration=())

    assert differences(LOCK, other)[:3] == (
        "expert a/code: no longer used",
        "expert a/maths: new, at 555555555555",
        "calibration a/data: no longer used",
    )


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"parameters": {"normalize": False}}, "parameters.normalize: true → false"),
        ({"merge_method": "ties"}, "merge_method: absent → ties"),
        ({"seed": 7}, "seed: absent → 7"),
        (
            {"models": [{"model": "b/code", "parameters": {"weight": 0.5, "density": [0.1, 0.5]}}]},
            "models[0].parameters.weight: 1 → 0.5",
        ),
        (
            {"models": [{"model": "a/code", "parameters": {"weight": 1.0, "density": [0.2, 0.5]}}]},
            "models[0].parameters.density: [0.1, 0.5] → [0.2, 0.5]",
        ),
        ({"parameters": {"normalize": 0.10000001}}, "parameters.normalize: true → 0.10000001"),
    ],
)
def test_a_field_of_the_recipe_is_told_by_its_path(recipe, told):
    assert differences(LOCK, replace(LOCK, recipe=LOCK.recipe | recipe)) == (told,)


def test_another_size_of_files_is_told():
    smaller = replace(LOCK, max_shard_bytes=1_000)

    assert differences(LOCK, smaller) == ("maximum shard size: 5,000,000,000 → 1,000 bytes",)


def test_a_method_that_works_otherwise_than_before_is_told():
    later = replace(LOCK, method_version=2)

    assert differences(LOCK, later) == ("method ties: version 1 → 2",)


def test_a_merge_that_is_only_planned_has_no_weights_to_differ():
    assert differences(LOCK, replace(LOCK, outputs={})) == ()


def test_inputs_that_change_places_are_told():
    expert = locked("a/maths", "expert", "5", config="q")
    places = [
        {"models": [{"model": f"{one}@{'2' * 40}"}, {"model": f"{other}@{'5' * 40}"}]}
        for one, other in (("a/code", "a/maths"), ("a/maths", "a/code"))
    ]
    base, code = LOCK.inputs
    before = replace(LOCK, inputs=(base, code, expert), recipe=places[0], outputs={})
    after = replace(LOCK, inputs=(base, expert, code), recipe=places[1], outputs={})

    assert differences(before, after) == (
        "models[0].model: a/code → a/maths",
        "models[1].model: a/maths → a/code",
    )


def test_of_two_recipes_the_models_are_told_too():
    before = {"models": [{"model": "a/code"}], "seed": 1}
    after = {"models": [{"model": "a/code@v2"}, {"model": "a/maths"}], "seed": 1}

    assert list(recipe_differences(before, after)) == [
        "models[0].model: a/code → a/code@v2",
        "models[1].model: absent → a/maths",
    ]
