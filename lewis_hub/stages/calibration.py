"""Calibrate and guide: calibration data to a profile, the profile to a density schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lewis_hub.errors import ProfileError
from lewis_hub.files import write_whole
from lewis_hub.guides import registry
from lewis_hub.guides.calibrate import CalibrationSet, Subject, calibrate, missing
from lewis_hub.guides.density import Bounds, DensitySchedule, schedule
from lewis_hub.guides.importance import ImportanceProfile, Role
from lewis_hub.hub.source import Source
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_calibration import Calibration
from lewis_hub.stages.drawing import Drawing, Drawn, draw
from lewis_hub.stages.execution import Folders, Step
from lewis_hub.stages.merging import loadable
from lewis_hub.stages.overlap import refuse_overlap
from lewis_hub.stages.sources import Inputs, merged_entries

Sets = Sequence[CalibrationSet]  # one an expert; none where nothing is measured


@dataclass(frozen=True)
class Guidance:
    """What was measured, what the guide made of it, and what a user should know about it.

    Attributes:
        profile: None where the guide measures nothing.
        rows: of each expert, the rows that it was measured on; none where nothing is measured.
    """

    profile: ImportanceProfile | None
    schedule: DensitySchedule
    notes: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]


def calibration_sets(step: Step) -> tuple[CalibrationSet, ...]:
    """Draw and tokenise each expert's calibration texts: one set per expert, equal ones shared.

    Nothing here needs a weight, so what is wrong with the data shows before a large download.
    A guide that measures nothing needs no set.

    Raises:
        SourceError, EvaluationError: a configuration or split is not there.
        CalibrationError: the template does not fit, no text is left, or items are scored.
    """
    return in_order(step.recipe, drawn_sets(step))


def in_order(recipe: Recipe, drawn: Mapping[Calibration, Drawn]) -> tuple[CalibrationSet, ...]:
    """One set per expert, of what was drawn."""
    asked = (recipe.calibration_of(entry) for entry in merged_entries(recipe))
    return tuple(drawn[one].tokens for one in asked if one and one in drawn)


def drawn_sets(step: Step) -> dict[Calibration, Drawn]:
    """The same texts by what asks for them, each with what tells it from others."""
    recipe, inputs = step.recipe, step.inputs
    if recipe.guide is None or "importance" not in registry.find(recipe.guide.name).needs:
        return {}
    how = Drawing(
        step.api,
        inputs.donor,
        recipe.seed,
        registry.find(recipe.guide.name).measure,
        step.execution.allow_code,
    )
    asked = [one for entry in merged_entries(recipe) if (one := recipe.calibration_of(entry))]
    drawn = {
        one: draw(how, one, inputs.data_of(one), step.progress) for one in dict.fromkeys(asked)
    }
    refuse_overlap(step, {one: found.values for one, found in drawn.items()})
    return drawn


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
    profile = _measure(step, sets, folders, scratch, stores) if sets else None
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
    rows = tuple(one.tokens.rows for one in sets)
    return Guidance(profile, decided.schedule, decided.notes, rows)


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
    found = [profile for path in stores if (profile := known_profile(path))]
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


def known_profile(path: Path) -> ImportanceProfile | None:
    """What an earlier run measured; None where there is nothing that can be read."""
    try:
        return ImportanceProfile.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ProfileError):
        return None
