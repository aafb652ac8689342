"""Sources and calibration sets to measurements, one source in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lewis_hub.calibration.grams import Wanted, read_grams
from lewis_hub.calibration.meta_model import Weights
from lewis_hub.calibration.model import run_refusals
from lewis_hub.calibration.profile import (
    ImportanceProfile,
    Role,
    SourceImportance,
    importances,
    reusable,
)
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.errors import NotByBlockError
from lewis_hub.guides.aim import evenness
from lewis_hub.guides.owl import outlier_ratios
from lewis_hub.guides.registry import Measure
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from lewis_hub.calibration.hooks import Summary


Found = TypeVar("Found")

SUMMARIES: Mapping[Measure, Summary] = {  # what is made of one pass's activation norms
    "lewis": importances,
    "outliers": outlier_ratios,
    "evenness": evenness,
}


@dataclass(frozen=True)
class CalibrationSet:
    """Tokens to measure on, and all that fixes them: two sets are one if their facts are equal."""

    facts: Mapping[str, Any]
    tokens: CalibrationTokens

    def measured(self, how: Measure, **against: str) -> CalibrationSet:
        """The same tokens, for one measure; `against` says which base a measure of pairs takes."""
        return replace(self, facts={"measure": how, **self.facts, **against})


@dataclass(frozen=True)
class Place:
    """A source on disk: what messages call it, and a complete local snapshot."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Subject:
    """A source to be measured on some sets.

    Attributes:
        against: its base, for a measure of pairs.
        weights: of one that is measured block by block where that can be; not for all measures.
            None: it is loaded whole from `folder`.
        may_be_whole: whether it is loaded whole where it cannot be measured so.
        wanted: second moments that the pass of one with a single set leaves too, where it goes
            block by block and they are not there.
    """

    source: str  # repo@sha, or the folder as written
    commit_sha: str
    role: Role
    folder: Path  # a complete local snapshot, where it is loaded whole
    sets: tuple[CalibrationSet, ...]
    against: Place | None = None
    weights: Weights | None = None
    may_be_whole: bool = False
    wanted: Wanted | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens that will run through it."""
        return sum(one.tokens.n_tokens for one in self.sets)

    def measured(self, by_block: Callable[[Weights], Found], whole: Callable[[], Found]) -> Found:
        """What one of two ways finds, which find the same.

        Raises:
            NotByBlockError: it cannot be measured block by block, and must not be loaded whole.
        """
        if self.weights:
            try:
                return by_block(self.weights)
            except NotByBlockError:
                if not self.may_be_whole:
                    raise
        return whole()


def missing(subjects: Sequence[Subject], known: ImportanceProfile) -> list[Subject]:
    """What is left to measure: subjects with the sets that no known measurement answers."""
    left = []
    for subject in subjects:
        sets = tuple(s for s in subject.sets if not reusable(known, subject.commit_sha, s.facts))
        if sets:
            left.append(replace(subject, sets=sets))
    return left


def calibrate(
    subjects: Sequence[Subject],
    known: ImportanceProfile,
    device: str,
    advance: Advance,
    keep: Callable[[ImportanceProfile], None],
    how: Measure = "lewis",
) -> ImportanceProfile:
    """Measure what is not known yet.

    Args:
        subjects: the base with every distinct set, then each expert with its own. For a measure of
            pairs: each expert with its own, against the base, which the facts of its sets name.
        known: earlier measurements; those of the same source, data and settings are taken over.
        device: as torch names it.
        advance: called with the number of tokens done.
        keep: called with all that is known after each source, so that it is never lost.
        how: what is measured of each module.

    Returns:
        The profile of exactly the subjects, in their order.

    Raises:
        CalibrationModelError: a source cannot be loaded or measured.
    """
    for subject in missing(subjects, known):
        tokens = [one.tokens for one in subject.sets]
        with run_refusals(subject.source, f"guide `{known.guide}`"):
            found = _measured(how, subject, tokens, device, advance)
        added = (
            _measurement(subject, one, modules)
            for one, modules in zip(subject.sets, found, strict=True)
        )
        known = ImportanceProfile(known.guide, known.calibration, (*known.sources, *added))
        keep(known)
    return ImportanceProfile(known.guide, known.calibration, tuple(_in_order(subjects, known)))


def _measured(
    how: Measure,
    subject: Subject,
    tokens: Sequence[CalibrationTokens],
    device: str,
    advance: Advance,
) -> list[dict[str, float]]:
    from lewis_hub.calibration import blockwise, hooks, reference  # torch: only here

    if how == "lewis_reference":
        return reference.measure(subject.folder, subject.source, tokens, device, advance)
    if subject.against:
        expert = Place(subject.source, subject.folder)
        return reference.measure_shifts(subject.against, expert, tokens, device, advance)
    name, summarise = subject.source, SUMMARIES[how]
    wanted = None if subject.wanted and read_grams(subject.wanted) else subject.wanted
    return subject.measured(
        lambda weights: blockwise.measure(weights, tokens, device, advance, summarise, wanted),
        lambda: hooks.measure(subject.folder, name, tokens, device, advance, summarise),
    )


def _measurement(
    subject: Subject, one: CalibrationSet, modules: Mapping[str, float]
) -> SourceImportance:
    pads = one.facts.get("measure") == "lewis_reference"
    return SourceImportance(
        source=subject.source,
        commit_sha=subject.commit_sha,
        role=subject.role,
        n_tokens=one.tokens.n_padded if pads else one.tokens.n_tokens,
        modules=modules,
        calibration=one.facts,
    )


def _in_order(subjects: Sequence[Subject], known: ImportanceProfile) -> list[SourceImportance]:
    ordered = []
    for subject in subjects:
        for one in subject.sets:
            entry = reusable(known, subject.commit_sha, one.facts)
            assert entry is not None  # measured above, or known before
            ordered.append(_measurement(subject, one, entry.modules))
    return ordered
