"""Second moments of what each expert's matrices are handed on its own texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lewis_hub.calibration.grams import GramFiles, Wanted, facts_of, gather_grams, read_grams
from lewis_hub.calibration.measure import CalibrationSet, Subject
from lewis_hub.calibration.model import run_refusals
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import local_header
from lewis_hub.merge.plan import Gram, Known, Statistics, informed, unknown
from lewis_hub.methods import registry
from lewis_hub.progress import Advance
from lewis_hub.report.facts import Measured
from lewis_hub.workflow.calibrate import brought, translated
from lewis_hub.workflow.job import Folders, Step
from lewis_hub.workflow.merge import plan_of
from lewis_hub.workflow.resolve import widest_input

N_SHOWN = 3  # tensors that a note names


@dataclass(frozen=True)
class Gathered:
    """What was gathered of each expert, in the recipe's order; nothing where nothing is needed.

    Attributes:
        statistics: of each expert, or what was fitted by them.
        folders: label of the statistics -> folder with their files.
        measured: what they were gathered on.
        rows: of each expert, the rows of its data.
        notes: what a user should know about them.
    """

    statistics: Known = ()
    folders: Folders = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()


def gather(
    step: Step,
    sets: Sequence[CalibrationSet],
    folders: Folders,
    scratch: Path,
    store: Path | None = None,
) -> Gathered:
    """Run each expert's calibration texts through it, unless an earlier run did.

    Args:
        step: of a merge that was examined, by a method that needs them.
        sets: one an expert.
        folders: of all sources.
        scratch: for what measuring needs and nobody keeps.
        store: where the files stay, to be found by a later run; None: in `scratch`.

    Raises:
        CalibrationError: an expert cannot be loaded or measured.
    """
    subjects = subjects_of(step, sets, folders)
    asked = wanted(step, sets, folders, store or scratch)
    found = [read_grams(one) for one in asked]
    whole = [  # before the stage begins, for writing out is one of its own
        subject if files else brought(step, subject, folders, scratch)
        for subject, files in zip(subjects, found, strict=True)
    ]
    n_tokens = sum(s.n_tokens for s, files in zip(whole, found, strict=True) if not files)
    with step.progress.stage("Gathering statistics", n_tokens, "tokens") as advance:
        gathered = [
            files or _gather(step, subject, one, advance)
            for subject, one, files in zip(whole, asked, found, strict=True)
        ]
    known = tuple(
        _statistics(step, subject.source, one.folder, files)
        for subject, one, files in zip(subjects, asked, gathered, strict=True)
    )
    notes = _notes(step, known)
    for note in notes:
        step.progress.say(note)
    return Gathered(
        known,
        {own.label: one.folder for own, one in zip(known, asked, strict=True)},
        measured(subjects),
        tuple(one.tokens.rows for one in sets),
        notes,
    )


def wanted(
    step: Step, sets: Sequence[CalibrationSet], folders: Folders, store: Path
) -> tuple[Wanted, ...]:
    """What `gather` looks for, one an expert."""
    widest = widest_input(step.recipe)
    facts = [facts_of(subject, widest) for subject in subjects_of(step, sets, folders)]
    return tuple(Wanted(_place(store, one), widest, one) for one in facts)


def _gather(step: Step, subject: Subject, one: Wanted, advance: Advance) -> GramFiles:
    with run_refusals(subject.source, f"method `{step.recipe.merge_method}`"):
        return gather_grams(subject, one, step.execution.device, advance)


def subjects_of(
    step: Step, sets: Sequence[CalibrationSet], folders: Folders
) -> tuple[Subject, ...]:
    """Each expert, with its own texts in its own ids."""
    inputs = step.inputs
    return tuple(
        Subject(
            *(e.pinned, inputs.content(e), "expert", folders[e.pinned]),
            (translated(step, e, own),),
        )
        for e, own in zip(inputs.experts, sets, strict=True)
    )


def measured(subjects: Sequence[Subject]) -> tuple[Measured, ...]:
    """What each expert was measured on, for the card."""
    return tuple(Measured(subject.source, subject.sets[0].facts) for subject in subjects)


def _place(store: Path, facts: Mapping[str, Any]) -> Path:
    """A folder that changes with all that fixes its files."""
    told = json.dumps(facts, sort_keys=True)
    return store / "statistics" / hashlib.sha256(told.encode()).hexdigest()[:32]


def _statistics(step: Step, source: str, place: Path, files: GramFiles) -> Statistics:
    """The files in the words of the checkpoint."""
    tensors = step.examined.checkpoints[step.inputs.donor.pinned].tensors
    label = f"statistics of {source}"
    headers: dict[str, TensorHeader] = {
        f"{file}/{tensor.name}": tensor
        for file in files.files
        for tensor in local_header(label, place / file)
    }
    grams: dict[str, Gram] = {}
    for module, gram in files.modules.items():
        named = names.find(f"{module}.weight", tensors)
        if len(named) == 1:
            grams[named[0]] = Gram(headers[f"{gram.file}/{gram.tensor}"], gram.transposed)
    return Statistics(label, files.digest, grams)


def _notes(step: Step, known: Sequence[Statistics]) -> tuple[str, ...]:
    """Which matrices of the blocks the method has to do without statistics of."""
    tensors = step.examined.checkpoints[step.inputs.donor.pinned].tensors
    asked = matrices({name: tensor.shape for name, tensor in tensors.items()})
    lacking = unknown(informed(plan_of(step, None), known), asked)
    regmean = registry.find(step.recipe.merge_method).needs_grams
    then = "their task vectors are averaged" if regmean else "they are trimmed by magnitude"
    return unknown_note(lacking, then)


def matrices(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Those of some tensors that are matrices of a block, or stacks of them."""
    return [
        name
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) >= 2 and names.block(name) is not None
    ]


def unknown_note(lacking: Sequence[str], then: str) -> tuple[str, ...]:
    """What to say of matrices without statistics; nothing of none."""
    if not lacking:
        return ()
    shown = ", ".join(lacking[:N_SHOWN]) + (", ..." if len(lacking) > N_SHOWN else "")
    return (
        f"{len(lacking)} weight matrices of the blocks have no statistics ({shown}): no token "
        f"reached them, or they are stored otherwise than they are run. So {then}.",
    )
