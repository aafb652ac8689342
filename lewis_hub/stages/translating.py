"""Calibration texts in the ids of each source: all see the same tokens, cut by the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lewis_hub.errors import CalibrationError
from lewis_hub.guides.calibrate import CalibrationSet
from lewis_hub.guides.tokens import CalibrationTokens
from lewis_hub.hub.source import Source
from lewis_hub.stages.execution import Step


def translated(step: Step, source: Source, one: CalibrationSet) -> CalibrationSet:
    """A set in the ids of a source; itself where they are the base's.

    Raises:
        CalibrationError: the texts have a token that the source lacks.
    """
    found = step.examined.tokens.translations.get(source.pinned)
    if found is None:
        return one
    used = dict.fromkeys(i for text in one.tokens.ids for i in text)
    base = step.inputs.donor.name
    if lacking := [found.lacking.get(i, f"number {i}") for i in used if i not in found.ids]:
        problem = f"{source.name} has no token {lacking[0]!r}"
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        remedy = "Both have to see the same tokens: choose other texts, use guide `uniform`, or "
        remedy += "leave this model out."
        where = f"calibration texts, cut by the tokenizer of {base}"
        raise CalibrationError(where, problem + more, remedy)
    tokens = one.tokens
    ids = tuple(tuple(found.ids[i] for i in text) for text in tokens.ids)
    end = None if tokens.end is None else found.ids.get(tokens.end)
    own: CalibrationTokens = replace(tokens, ids=ids, end=end)
    return replace(one, tokens=own)


def require_understood(step: Step, sets: Sequence[CalibrationSet]) -> None:
    """Refuse texts that an expert cannot read, before its weights are downloaded.

    Args:
        step: what is calibrated.
        sets: one an expert.

    Raises:
        CalibrationError: they have a token that it lacks.
    """
    for expert, one in zip(step.inputs.experts, sets, strict=True):
        translated(step, expert, one)
