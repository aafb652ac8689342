"""Calibrate and guide: calibration data to a profile, the profile to a density schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lewis_hub.errors import ProfileError
from lewis_hub.files import write_whole
from lewis_hub.guides import registry
from lewis_hub.guides.calibrate import SUMMARIES, CalibrationSet, Place, Subject, calibrate, missing
from lewis_hub.guides.density import Bounds, DensitySchedule, Use, schedule
from lewis_hub.guides.gram_files import Wanted
from lewis_hub.guides.importance import ImportanceProfile, Role, SourceImportance
from lewis_hub.guides.registry import OF_PAIRS, WITHOUT_TEXTS, Guide, Measure
from lewis_hub.hub.source import Source
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_calibration import Calibration
from lewis_hub.stages.bringing import brought
from lewis_hub.stages.changes import measure_task_vectors
from lewis_hub.stages.drawing import Drawing, Drawn, draw
from lewis_hub.stages.execution import Folders, Step
from lewis_hub.stages.merging import plan_of
from lewis_hub.stages.overlap import refuse_overlap
from lewis_hub.stages.slicing import restacked
from lewis_hub.stages.sources import calibrations, measures_on_texts
from lewis_hub.stages.translating import require_understood, translated
from lewis_hub.stages.writing_out import loadable

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
    Where neither guide nor method measures, no set is needed.

    Raises:
        SourceError, EvaluationError: a configuration or split is not there.
        CalibrationError: the template does not fit, no text is left, or items are scored.
    """
    sets = in_order(step.recipe, drawn_sets(step))
    if sets:
        require_understood(step, sets)
    return sets


def in_order(recipe: Recipe, drawn: Mapping[Calibration, Drawn]) -> tuple[CalibrationSet, ...]:
    """One set per expert, of what was drawn."""
    return tuple(drawn[one].tokens for one in calibrations(recipe) if one in drawn)


def drawn_sets(step: Step) -> dict[Calibration, Drawn]:
    """The same texts by what asks for them, each with what tells it from others."""
    recipe, inputs = step.recipe, step.inputs
    if not measures_on_texts(recipe):
        return {}
    how = Drawing(step.api, inputs.donor, recipe.seed, step.execution.allow_code)
    asked = dict.fromkeys(calibrations(recipe))
    drawn = {one: draw(how, one, inputs.data_of(one), step.progress) for one in asked}
    refuse_overlap(step, {one: found.values for one, found in drawn.items()})
    return drawn


def guide(
    step: Step,
    sets: Sets,
    folders: Folders,
    scratch: Path,
    stores: Sequence[Path],
    wanted: Sequence[Wanted] = (),
) -> Guidance:
    """Measure what is not known yet, and let the recipe's guide decide.

    Args:
        step: of a recipe with a guide.
        sets: from `calibration_sets`.
        folders: of all sources.
        scratch: for what measuring needs and nobody keeps.
        stores: files `importance.json`: the first is written after every source, from all of them
            measurements are taken. Those that are not there, or cannot be read, are passed over.
        wanted: one an expert, or none: second moments to leave where the same pass can.

    Raises:
        CalibrationError: a source cannot be measured, or the guide cannot decide.
    """
    asked, inputs = step.recipe.guide, step.inputs
    assert asked
    assert inputs.base
    chosen = registry.find(asked.name)
    profile = None
    if chosen.needs:
        profile = _measure(step, chosen, sets, folders, scratch, stores, wanted)
    tensors = step.examined.checkpoints[inputs.base.pinned].tensors
    decided = schedule(
        chosen,
        Bounds(asked.gamma, asked.epsilon, asked.default_density, asked.mean_density),
        [expert.pinned for expert in inputs.experts],
        {name: tensor.shape for name, tensor in tensors.items()},
        profile,
        Use(asked.apply_to, step.recipe.seed),
    )
    for note in decided.notes:
        step.progress.say(note)
    found = decided.schedule
    if step.recipe.slices:
        found = restacked(found, plan_of(step, None))
    rows = tuple(one.tokens.rows for one in sets)
    return Guidance(profile, found, decided.notes, rows)


def _subjects(
    step: Step, sets: Sets, folders: Folders, measure: Measure, wanted: Sequence[Wanted] = ()
) -> tuple[Subject, ...]:
    """The base with every distinct set, then each expert with its own, in its own ids.

    For a measure of pairs the experts alone, each against the base.
    """
    inputs, base = step.inputs, step.inputs.base
    assert base
    against_base = {"base": inputs.content(base)} if measure in OF_PAIRS else {}
    sets = [one.measured(measure, **against_base) for one in sets]
    measured: list[tuple[Source, Role, tuple[CalibrationSet, ...]]] = []
    if measure not in OF_PAIRS:
        distinct = tuple({id(one.tokens): one for one in sets}.values())
        measured.append((base, "base", distinct))
    for expert, one in zip(inputs.experts, sets, strict=True):
        measured.append((expert, "expert", (translated(step, expert, one),)))
    against = Place(base.pinned, folders[base.pinned]) if measure in OF_PAIRS else None
    left = [*[None] * (len(measured) - len(wanted)), *wanted]
    return tuple(
        Subject(
            *(source.pinned, inputs.content(source), role, folders[source.pinned], own, against),
            wanted=leave,
        )
        for (source, role, own), leave in zip(measured, left, strict=True)
    )


def _measure(  # noqa: PLR0913
    step: Step,
    chosen: Guide,
    sets: Sets,
    folders: Folders,
    scratch: Path,
    stores: Sequence[Path],
    wanted: Sequence[Wanted],
) -> ImportanceProfile:
    """Everything that the guide needs, one measure after the other."""
    known = _known(step, stores)
    entries: list[SourceImportance] = []

    def keep(now: ImportanceProfile) -> None:
        write_whole(stores[0], replace(now, sources=(*entries, *now.sources)).to_json())

    for measure in chosen.needs:
        if measure in WITHOUT_TEXTS:
            measured: tuple[SourceImportance, ...] = ()
            for one in measure_task_vectors(step, folders, known, scratch):
                measured = (*measured, one)
                keep(replace(known, sources=(*known.sources, *measured)))
        else:
            subjects = _subjects(step, sets, folders, measure, wanted)
            measured = _on_texts(step, measure, subjects, known, folders, scratch, keep).sources
        entries += measured
    return replace(known, sources=tuple(entries))


def _on_texts(  # noqa: PLR0913
    step: Step,
    measure: Measure,
    subjects: tuple[Subject, ...],
    known: ImportanceProfile,
    folders: Folders,
    scratch: Path,
    keep: Callable[[ImportanceProfile], None],
) -> ImportanceProfile:
    unknown = missing(subjects, known)
    left = {one.source for one in unknown}
    base = step.inputs.base
    if base and any(one.against for one in unknown):
        against = Place(base.pinned, loadable(step, base, folders, scratch))
        subjects = tuple(replace(one, against=against) for one in subjects)
    subjects = tuple(
        brought(step, one, folders, scratch) if one.source in left else one for one in subjects
    )
    n_tokens = sum(subject.n_tokens for subject in unknown)
    with step.progress.stage("Calibrating", n_tokens, "tokens") as advance:
        return calibrate(subjects, known, step.execution.device, advance, keep, measure)


def loaded_whole(
    step: Step, sets: Sets, folders: Folders, stores: Sequence[Path]
) -> tuple[str, ...]:
    """The sources that `guide` cannot measure block by block; of `folders` nothing is read."""
    asked, known = step.recipe.guide, _known(step, stores)
    assert asked
    return tuple(
        subject.source
        for measure in registry.find(asked.name).needs
        if measure not in {*SUMMARIES, *WITHOUT_TEXTS}
        for subject in missing(_subjects(step, sets, folders, measure), known)
    )


def _known(step: Step, stores: Sequence[Path]) -> ImportanceProfile:
    asked = step.recipe.guide
    assert asked
    found = [profile for path in stores if (profile := known_profile(path))]
    return ImportanceProfile(
        asked.name,
        asked.calibration.model_dump(mode="json", exclude_none=True) if asked.calibration else {},
        tuple(entry for profile in found for entry in profile.sources),
    )


def known_profile(path: Path) -> ImportanceProfile | None:
    """What an earlier run measured; None where there is nothing that can be read."""
    try:
        return ImportanceProfile.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ProfileError):
        return None
