"""Calibrate and guide: calibration data to a profile, the profile to a density schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lewis_hub.errors import ProfileError
from lewis_hub.files import write_whole
from lewis_hub.guides import registry
from lewis_hub.guides.calibrate import CalibrationSet, Subject, calibrate, missing
from lewis_hub.guides.density import Bounds, DensitySchedule, schedule
from lewis_hub.guides.importance import ImportanceProfile, Role, calibration_facts
from lewis_hub.guides.tokens import CalibrationTokens, calibration_tokens, load_tokenizer
from lewis_hub.hub.rows import load_rows
from lewis_hub.hub.source import Source
from lewis_hub.recipe import Calibration
from lewis_hub.stages.downloading import small_files
from lewis_hub.stages.execution import Folders, Step
from lewis_hub.stages.merging import loadable
from lewis_hub.stages.sources import Inputs, merged_entries, needs_grams

Sets = Sequence[CalibrationSet]  # one an expert; none where nothing is measured


@dataclass(frozen=True)
class Guidance:
    """What was measured, what the guide made of it, and what a user should know about it."""

    profile: ImportanceProfile | None  # None: the guide measures nothing
    schedule: DensitySchedule
    notes: tuple[str, ...]


def calibration_sets(step: Step) -> tuple[CalibrationSet, ...]:
    """Draw and tokenise each expert's calibration texts: one set per expert, equal ones shared.

    Nothing here needs a weight, so what is wrong with the data shows before a large download.
    Where neither guide nor method measures, no set is needed.

    Raises:
        SourceError: a configuration or split is not there.
        CalibrationError: the template does not fit, or no text is left.
    """
    recipe, inputs = step.recipe, step.inputs
    guide = registry.find(recipe.guide.name) if recipe.guide else None
    measures = guide is not None and "importance" in guide.needs
    if not measures and not needs_grams(recipe):
        return ()
    tokenizer = load_tokenizer(str(small_files(step.api, inputs.donor)), inputs.donor.name)
    drawn: dict[Calibration, CalibrationTokens] = {}
    sets = []
    for entry in merged_entries(recipe):
        calibration = recipe.calibration_of(entry)
        assert calibration  # a recipe without one does not read
        dataset = inputs.datasets[calibration.dataset]
        if calibration not in drawn:
            rows = load_rows(step.api, dataset, calibration.config, calibration.split)
            drawn[calibration] = calibration_tokens(rows, calibration, tokenizer, recipe.seed)
            for note in drawn[calibration].notes:
                step.progress.say(f"{calibration.dataset}: {note}.")
        tokens = drawn[calibration]
        facts = calibration_facts(
            calibration,
            dataset.pinned,
            dataset.commit_sha,
            recipe.seed,
            _tokenizer_digest(inputs.donor),
            guide.measure if guide else "lewis",
        )
        sets.append(CalibrationSet(facts | tokens.facts, tokens))
    return tuple(sets)


def guide(
    step: Step,
    sets: Sets,
    folders: Folders,
    scratch: Path,
    stores: Sequence[Path],
) -> Guidance:
    """Measure what is not known yet, and let the recipe's guide decide.

    Args:
        step: of a recipe with a guide.
        sets: from `calibration_sets`.
        folders: of all sources.
        scratch: for what measuring needs and nobody keeps.
        stores: files `importance.json`: the first is written after every source, from all of them
            measurements are taken. Those that are not there, or cannot be read, are passed over.

    Raises:
        CalibrationError: a source cannot be measured, or the guide cannot decide.
    """
    asked, inputs = step.recipe.guide, step.inputs
    assert asked
    assert inputs.base
    measures = "importance" in registry.find(asked.name).needs
    profile = _measure(step, sets, folders, scratch, stores) if measures else None
    tensors = step.examined.checkpoints[inputs.base.pinned].tensors
    decided = schedule(
        registry.find(asked.name),
        Bounds(asked.gamma, asked.epsilon, asked.default_density),
        [expert.pinned for expert in inputs.experts],
        {name: tensor.shape for name, tensor in tensors.items()},
        profile,
    )
    for note in decided.notes:
        step.progress.say(note)
    return Guidance(profile, decided.schedule, decided.notes)


def _subjects(inputs: Inputs, sets: Sets, folders: Folders) -> tuple[Subject, ...]:
    """The base with every distinct set, then each expert with its own."""
    assert inputs.base
    distinct = tuple({id(one.tokens): one for one in sets}.values())
    measured: list[tuple[Source, Role, tuple[CalibrationSet, ...]]] = [
        (inputs.base, "base", distinct)
    ]
    measured += [(e, "expert", (one,)) for e, one in zip(inputs.experts, sets, strict=True)]
    return tuple(
        Subject(source.pinned, inputs.content(source), role, folders[source.pinned], own)
        for source, role, own in measured
    )


def _measure(
    step: Step, sets: Sets, folders: Folders, scratch: Path, stores: Sequence[Path]
) -> ImportanceProfile:
    asked = step.recipe.guide
    assert asked
    found = [profile for path in stores if (profile := _read(path))]
    known = ImportanceProfile(
        asked.name,
        asked.calibration.model_dump(mode="json", exclude_none=True) if asked.calibration else {},
        tuple(entry for profile in found for entry in profile.sources),
    )
    subjects = _subjects(step.inputs, sets, folders)
    unknown = missing(subjects, known)
    for source in step.inputs.models:
        if any(subject.source == source.pinned for subject in unknown):
            whole = loadable(step, source, folders, scratch)
            subjects = tuple(
                replace(subject, folder=whole) if subject.source == source.pinned else subject
                for subject in subjects
            )
    n_tokens = sum(subject.n_tokens for subject in unknown)
    with step.progress.stage("Calibrating", n_tokens, "tokens") as advance:
        return calibrate(
            subjects,
            known,
            step.execution.device,
            advance,
            lambda now: write_whole(stores[0], now.to_json()),
            registry.find(asked.name).measure,
        )


def _read(path: Path) -> ImportanceProfile | None:
    try:
        return ImportanceProfile.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ProfileError):
        return None


def _tokenizer_digest(source: Source) -> str:
    """Over the tokenizer's files: what fixes token ids, wherever the files lie."""
    files = [file for file in source.files if "token" in file.path or "vocab" in file.path]
    told = "\n".join(f"{file.path} {file.digest}" for file in files)
    return "sha256:" + hashlib.sha256(told.encode()).hexdigest()
