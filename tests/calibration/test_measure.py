from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from lewis_hub.calibration.grams import WIDEST, GramRequest, read_grams
from lewis_hub.calibration.measure import calibrate
from lewis_hub.calibration.profile import ImportanceProfile
from lewis_hub.calibration.subject import CalibrationSet, Subject, in_folder, missing
from lewis_hub.errors import CalibrationModelError, NotByBlockError
from lewis_hub.guides.registry import find
from lewis_hub.guides.schedule import ScheduleSettings, schedule

from .conftest import N_TOKENS, tiny_model, tokens_of

NOTHING_KNOWN = ImportanceProfile("lewis", {"samples": 2}, ())
FIRST = CalibrationSet({"dataset": "a"}, tokens_of([[5, 6, 7], [8, 9]]))
SECOND = CalibrationSet({"dataset": "b"}, tokens_of([[10, 11, 12, 13]]))


@pytest.fixture
def subjects(tmp_path: Path) -> tuple[Subject, ...]:
    def subject(name: str, role: Any, seed: int, *sets: CalibrationSet) -> Subject:
        tiny_model("llama", seed).save_pretrained(tmp_path / name)
        return Subject(f"me/{name}", f"{name}-sha", role, tmp_path / name, sets)

    return (
        subject("base", "base", 0, FIRST, SECOND),
        subject("one", "expert", 1, FIRST),
        subject("two", "expert", 2, SECOND),
    )


def measure(subjects: tuple[Subject, ...], known: ImportanceProfile = NOTHING_KNOWN):
    tokens: list[int] = []
    kept: list[ImportanceProfile] = []
    profile = calibrate(subjects, known, "cpu", tokens.append, kept.append)
    return profile, sum(tokens), kept


def test_the_base_is_measured_on_every_set_and_each_expert_on_its_own(subjects):
    profile, n_tokens, kept = measure(subjects)

    assert [(s.source, s.role, s.n_tokens, s.calibration["dataset"]) for s in profile.sources] == [
        ("me/base", "base", 5, "a"),
        ("me/base", "base", 4, "b"),
        ("me/one", "expert", 5, "a"),
        ("me/two", "expert", 4, "b"),
    ]
    assert n_tokens == sum(subject.n_tokens for subject in subjects) == 18
    assert [len(profile.sources) for profile in kept] == [2, 3, 4]  # saved after every source
    assert kept[-1] == profile


def test_what_was_measured_before_is_not_measured_again(subjects):
    whole, _, kept = measure(subjects)
    _, base_and_one, _ = kept

    resumed, n_tokens, _ = measure(subjects, base_and_one)

    assert resumed == whole
    assert n_tokens == 4  # the second expert only
    assert [subject.source for subject in missing(subjects, base_and_one)] == ["me/two"]


def test_a_known_measurement_serves_whatever_its_role_and_name_were(subjects):
    whole, _, _ = measure(subjects)
    (base, one, _) = subjects
    swapped = (
        Subject("elsewhere/one", one.commit_sha, "base", one.folder, (FIRST,)),
        Subject("elsewhere/base", base.commit_sha, "expert", base.folder, (FIRST,)),
    )

    profile, n_tokens, _ = measure(swapped, whole)

    assert n_tokens == 0
    assert [(s.source, s.role) for s in profile.sources] == [
        ("elsewhere/one", "base"),
        ("elsewhere/base", "expert"),
    ]
    assert [s.modules for s in profile.sources] == [
        whole.sources[2].modules,
        whole.sources[0].modules,
    ]


def test_a_measured_profile_becomes_a_schedule_that_spans_the_bounds(subjects):
    profile, _, _ = measure(subjects)
    tensors = {n: tuple(p.shape) for n, p in tiny_model("llama").named_parameters()}

    guided = schedule(
        find("lewis"), ScheduleSettings(0.3, 0.8), ["me/one", "me/two"], tensors, profile
    )

    blocks = [n for n, s in tensors.items() if len(s) == 2 and ".layers." in n]
    for expert in guided.schedule.experts:
        assert list(expert.tensors) == blocks
        assert min(expert.tensors.values()) == 0.3
        assert max(expert.tensors.values()) == 0.8


def test_a_subject_with_weights_is_measured_without_loading_its_folder(subjects, tmp_path):
    whole = measure(subjects[:1])
    weights = in_folder("me/base", subjects[0].folder)

    found = measure((replace(subjects[0], folder=tmp_path / "nowhere", weights=weights),))

    assert found == whole


def test_second_moments_are_left_by_what_is_measured_block_by_block_and_once(subjects, tmp_path):
    whole = subjects[1]
    wanted = GramRequest(tmp_path / "grams", WIDEST, whole.gram_facts(WIDEST))
    whole = replace(whole, wanted=wanted)
    blocks = replace(whole, weights=in_folder("me/one", whole.folder))

    profile, _, _ = measure((whole,))
    assert read_grams(wanted) is None
    assert measure((blocks,), profile)[1] == 0  # known: nothing runs
    assert read_grams(wanted) is None

    assert measure((blocks,))[0] == profile
    assert read_grams(wanted).facts == wanted.facts
    kept = {path: path.stat().st_mtime_ns for path in wanted.folder.iterdir()}
    assert measure((blocks,))[0] == profile
    assert kept == {path: path.stat().st_mtime_ns for path in wanted.folder.iterdir()}


def test_what_cannot_be_measured_block_by_block_is_loaded_whole_if_it_may_be(tmp_path):
    small = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=N_TOKENS, decoder_start_token_id=0, **small)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    whole = Subject("me/t5", "sha", "base", tmp_path, (FIRST,))
    blocks = replace(whole, weights=in_folder("me/t5", tmp_path))

    assert measure((replace(blocks, may_be_whole=True),)) == measure((whole,))
    with pytest.raises(NotByBlockError, match="cannot be calibrated block by block"):
        measure((blocks,))


def test_importance_that_is_not_finite_is_refused_before_it_is_kept(tmp_path):
    """Activations and weights are finite, their products are not."""
    model = tiny_model("llama", 0)
    for parameter in model.parameters():
        parameter.data *= 1e30
    model.save_pretrained(tmp_path / "one")
    subject = Subject("me/one", "one-sha", "expert", tmp_path / "one", (FIRST,))

    with pytest.raises(CalibrationModelError, match="^me/one: the products .* are not finite"):
        measure((subject,))
