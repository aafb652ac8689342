from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lewis_hub.calibration.profile import (
    ImportanceProfile,
    SourceImportance,
    calibration_facts,
    reusable,
)
from lewis_hub.calibration.summaries import module_importance
from lewis_hub.errors import ProfileError
from lewis_hub.recipe.schema import Calibration


def test_importance_is_the_frobenius_norm_of_weight_times_activation():
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])

    # (1 * 2)² + (2 * .5)² + (3 * 2)² + (4 * .5)² = 4 + 1 + 36 + 4
    assert module_importance(weight, torch.tensor([2.0, 0.5])) == pytest.approx(math.sqrt(45))


def test_importance_of_bfloat16_weights_is_that_of_their_float32_values():
    weight = torch.randn(700, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = torch.rand(9)

    exact = (weight.double().abs() * norm.double()).norm().item()
    assert module_importance(weight, norm) == pytest.approx(exact, rel=1e-6)
    assert module_importance(weight.T.contiguous().T, norm) == pytest.approx(exact, rel=1e-6)


FACTS = {"measure": "lewis"} | calibration_facts(
    Calibration(dataset="me/data@v1", text="{q} {a}", samples=4),
    {"dataset": "me/data@abc", "dataset_sha": "abc"},
    42,
    "me/t@f",
)
FOUND = {"rows_digest": "sha256:0", "n_truncated": 1}
BASE = SourceImportance("me/base@1", "1", "base", 7, FACTS | FOUND, {"l.0.q": 1.5})
EXPERT = SourceImportance("me/expert@2", "2", "expert", 7, FACTS | FOUND, {"l.0.q": 0.1 + 0.2})
PROFILE = ImportanceProfile("lewis", {"samples": 4}, (BASE, EXPERT))


def test_the_facts_hold_all_that_fixes_a_measurement():
    assert FACTS == {
        "measure": "lewis",
        "measuring": 4,
        "dataset": "me/data@abc",
        "dataset_sha": "abc",
        "config": None,
        "split": "train",
        "text": "{q} {a}",
        "samples": 4,
        "max_tokens": 512,
        "seed": 42,
        "tokenizer": "me/t@f",
    }


def test_a_measurement_is_reused_for_equal_content_data_and_settings():
    assert reusable(PROFILE, "2", FACTS) == EXPERT
    assert reusable(PROFILE, "2", FACTS | FOUND) == EXPERT
    assert reusable(PROFILE, "3", FACTS) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("measure", "lewis_reference"),
        ("dataset_sha", "abd"),
        ("config", "main"),
        ("split", "test"),
        ("text", "{q}"),
        ("samples", 5),
        ("max_tokens", 511),
        ("seed", 43),
        ("tokenizer", "me/t@e"),
        ("rows_digest", "sha256:1"),
        ("unheard_of", None),
    ],
)
def test_a_measurement_is_not_reused_when_one_fact_differs(key, value):
    assert reusable(PROFILE, "2", FACTS | FOUND | {key: value}) is None


def test_an_expert_finds_the_base_on_its_own_calibration_set():
    other = replace(BASE, calibration=FACTS | {"seed": 1}, modules={"l.0.q": 9.0})
    profile = replace(PROFILE, sources=(other, BASE, EXPERT))

    assert profile.base_of(EXPERT) == BASE
    assert profile.experts == (EXPERT,)
    with pytest.raises(ProfileError) as caught:
        replace(PROFILE, sources=(other, EXPERT)).base_of(EXPERT)
    assert str(caught.value) == (
        "importance.json: the base was not measured on the calibration set of me/expert@2.\n"
        "Measure again: delete the file."
    )


def test_a_profile_reads_back_equal():
    assert ImportanceProfile.from_json(PROFILE.to_json()) == PROFILE


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        (replace(PROFILE, sources=(EXPERT,) * 1001), "`sources`: Tuple should have at most 1000"),
        (
            replace(PROFILE, sources=(replace(EXPERT, modules=dict.fromkeys(map(str, range(9)))),)),
            "it has 70 values, the limit is 50",
        ),
    ],
)
def test_a_profile_of_others_has_limits(profile, says, monkeypatch):
    if "limit" in says:
        monkeypatch.setattr("lewis_hub.calibration.profile.MAX_VALUES", 50)

    with pytest.raises(ProfileError, match=says):
        ImportanceProfile.from_json(profile.to_json())


def test_a_name_of_a_module_is_no_longer_than_that_of_a_tensor():
    long, longest = "n " * 501, "n" * 1000
    kept = replace(PROFILE, sources=(replace(BASE, modules={longest: 1.0}),))
    assert ImportanceProfile.from_json(kept.to_json()) == kept

    with pytest.raises(ProfileError) as caught:
        ImportanceProfile.from_json(
            replace(PROFILE, sources=(replace(BASE, modules={long: 1.0}),)).to_json()
        )

    shown = long[:197] + "..."
    assert str(caught.value) == (
        f"importance.json: `sources.0.modules.{shown}.[key]`: String should have at most 1000 "
        "characters.\nDelete the file to have it made again."
    )


def test_a_profile_is_written_in_the_models_order():
    lines = PROFILE.to_json().splitlines()

    assert [
        line.strip().split('"')[1] for line in lines if line.startswith("  ") and line[2] == '"'
    ] == [
        "version",
        "guide",
        "calibration",
        "sources",
    ]
    assert '        "l.0.q": 0.30000000000000004' in lines


def test_a_profile_loads_without_torch():
    code = (
        "import sys; from lewis_hub.calibration.profile import ImportanceProfile;"
        "from lewis_hub.guides.schedule import schedule;"
        "ImportanceProfile.from_json(sys.stdin.read());"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=PROFILE.to_json(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "False False\n"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"version": 1,', "", "`version`: Field required"),
        (
            '"role": "base"',
            '"role": "boss"',
            "`sources.0.role`: Input should be 'base' or 'expert'",
        ),
        (
            '"n_tokens": 7',
            '"n_tokens": 7.5',
            "`sources.0.n_tokens`: Input should be a valid integer",
        ),
        ("1.5", "null", "`sources.0.modules.l.0.q`: Input should be a valid number"),
        ("1.5", "Infinity", "`sources.0.modules.l.0.q`: Input should be a finite number"),
    ],
)
def test_a_broken_profile_is_an_error_naming_the_field(old, new, problem):
    with pytest.raises(ProfileError) as caught:
        ImportanceProfile.from_json(PROFILE.to_json().replace(old, new, 1), "lewis/importance.json")

    assert str(caught.value) == (
        f"lewis/importance.json: {problem}.\nDelete the file to have it made again."
    )


def test_a_list_is_no_profile():
    with pytest.raises(ProfileError) as caught:
        ImportanceProfile.from_json("[]")

    assert str(caught.value) == (
        "importance.json: Input should be an object.\nDelete the file to have it made again."
    )


def test_a_profile_of_a_later_version_says_to_upgrade():
    later = PROFILE.to_json().replace('"version": 1', '"version": 2')

    with pytest.raises(ProfileError) as caught:
        ImportanceProfile.from_json(later)

    assert str(caught.value) == (
        "importance.json: it has version 2, this program reads version 1.\n"
        "Upgrade lewis-hub, or delete the file to measure again."
    )
