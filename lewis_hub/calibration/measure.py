"""Measure sources on calibration sets, with one source in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lewis_hub.calibration.failures import run_refusals
from lewis_hub.calibration.grams import VERSION, GramFiles, GramRequest, read_grams, write_index
from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance, reusable
from lewis_hub.calibration.subject import CalibrationSet, Subject
from lewis_hub.calibration.summaries import SUMMARIES, Measure
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.progress import Advance


def missing(subjects: Sequence[Subject], known: ImportanceProfile) -> list[Subject]:
    """The subjects with the sets that no known measurement covers."""
    left = []
    for subject in subjects:
        sets = tuple(s for s in subject.sets if not reusable(known, subject.commit_sha, s.facts))
        if sets:
            left.append(replace(subject, sets=sets))
    return left


def calibrate(  # noqa: PLR0913
    subjects: Sequence[Subject],
    known: ImportanceProfile,
    device: str,
    advance: Advance,
    keep: Callable[[ImportanceProfile], None],
    how: Measure = "lewis",
) -> ImportanceProfile:
    """Measure all that is not known yet.

    Args:
        subjects: the base with every distinct set, then each expert with its own. For a measure of
            pairs: each expert with its own set, against the base, which the facts of its set name.
        known: earlier measurements; those of the same source, data and settings are reused.
        device: as torch names it.
        advance: called with the number of tokens done.
        keep: called with all measurements after each source, so that none is lost.
        how: the measure.

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
    from lewis_hub.calibration import output_shift, passes, reference  # torch: only here

    if how == "lewis_reference":
        return reference.measure_reference(subject.snapshot, tokens, device, advance)
    if subject.against:
        pair = subject.against, subject.snapshot
        return output_shift.measure_shifts(*pair, tokens, device, advance)
    summarise = SUMMARIES[how]
    request = None if subject.wanted and read_grams(subject.wanted) else subject.wanted
    return subject.measured(
        lambda w: passes.measure_by_block(w, tokens, device, advance, summarise, request),
        lambda snapshot: passes.measure_whole(snapshot, tokens, device, advance, summarise),
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


def gram_facts(subject: Subject, widest: int) -> dict[str, Any]:
    """All facts that fix the second moments of a source on its one calibration set."""
    (own,) = subject.sets
    content = subject.commit_sha
    return {"version": VERSION, "source": content, "calibration": {**own.facts}, "widest": widest}


def gather_grams(
    subject: Subject, request: GramRequest, device: str, advance: Advance
) -> GramFiles:
    """Run a source's calibration texts through it, and store the second moments of its Linears.

    Args:
        subject: with one calibration set; its model is freed on return.
        request: what is stored, and where.
        device: as torch names it.
        advance: called with the number of tokens done, as if there were one pass.

    Raises:
        CalibrationModelError: the source cannot be loaded or measured.
        EmptyCalibrationError: no token counts.
    """
    from lewis_hub.calibration.passes import gather_by_block, gather_whole

    tokens = subject.sets[0].tokens
    modules = subject.measured(
        lambda weights: gather_by_block(weights, tokens, request, device, advance),
        lambda snapshot: gather_whole(snapshot, tokens, request, device, advance),
    )
    return write_index(modules, request)
