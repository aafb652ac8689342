"""Gather: what a method that merges by statistics has to know of the inputs of its matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lewis_hub.errors import CalibrationError
from lewis_hub.guides.calibrate import CalibrationSet
from lewis_hub.guides.density import DensitySchedule
from lewis_hub.guides.gram_files import Wanted
from lewis_hub.recipe_rules import fits_in_sequence
from lewis_hub.stages import sequence, statistics
from lewis_hub.stages.execution import Folders, Step
from lewis_hub.stages.sources import needs_grams
from lewis_hub.stages.statistics import Gathered


def require_possible(step: Step) -> None:
    """Refuse, before any weight is downloaded, what a model's architecture does not allow.

    Raises:
        CalibrationError: its matrices cannot be fitted one after the other.
    """
    if fits_in_sequence(step.recipe):
        sequence.require_by_block(step)


def problems(step: Step) -> tuple[str, ...]:
    """What `require_possible` refuses, in one sentence after the other."""
    try:
        require_possible(step)
    except CalibrationError as error:
        return (" ".join(str(error).split("\n")),)
    return ()


def wanted(
    step: Step, sets: Sequence[CalibrationSet], folders: Folders, store: Path
) -> tuple[Wanted, ...]:
    """The second moments that `gather` will look for in a folder, one an expert, or none.

    A pass that measures the experts for a guide can leave them there.
    """
    if not needs_grams(step.recipe) or fits_in_sequence(step.recipe):
        return ()
    return statistics.wanted(step, sets, folders, store)


def gather(  # noqa: PLR0913
    step: Step,
    sets: Sequence[CalibrationSet],
    folders: Folders,
    scratch: Path,
    schedule: DensitySchedule | None = None,
    store: Path | None = None,
) -> Gathered:
    """Run each expert's calibration texts through what they have to run through.

    Args:
        step: of a merge that was examined.
        sets: one an expert.
        folders: of all sources.
        scratch: for what measuring needs and nobody keeps.
        schedule: what a guide decided; matrices that are fitted on the way are fitted with it.
        store: where statistics that do not depend on it stay, to be found by a later run; None: in
            `scratch`.

    Returns:
        Nothing where the recipe merges without statistics.

    Raises:
        CalibrationError: a model cannot be loaded or measured.
    """
    if not needs_grams(step.recipe):
        return Gathered()
    if fits_in_sequence(step.recipe):
        return sequence.fit(step, sets, folders, scratch, schedule)
    return statistics.gather(step, sets, folders, scratch, store)
