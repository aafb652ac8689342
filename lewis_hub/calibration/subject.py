"""What is measured, and on which texts. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lewis_hub.calibration import grams
from lewis_hub.calibration.grams import GramRequest
from lewis_hub.calibration.profile import ImportanceProfile, Role, reusable
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint, TensorReader, local_checkpoint, read_tensor
from lewis_hub.errors import NotByBlockError

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = "Calibrate it whole, where there is memory for it: leave out `--max-memory`."

HELD_BYTES = 64 << 20  # of hidden states in memory, all texts together; more is kept on disk
KEPT_BYTES = 256 << 20  # of a block's inputs and outputs that fitting in sequence keeps in memory
STATES = "the hidden states of all calibration texts"
FEWER = "lower `samples` or `max_tokens` of the calibration"

Measured = TypeVar("Measured")
# takes lists of tensors and yields each as tensor -> values in float32, which the caller owns; the
# next list may be read in the background, so the generator has to be closed
Parts = Callable[[Sequence[Sequence[TensorHeader]]], "Generator[dict[str, Tensor], None, None]"]


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration tokens and all facts that fix them; sets with equal facts are equal."""

    facts: Mapping[str, Any]
    tokens: CalibrationTokens

    def measured(self, how: str, **against: str) -> CalibrationSet:
        """The same tokens for one measure; `against` names the base of a measure of pairs."""
        return replace(self, facts={"measure": how, **self.facts, **against})


@dataclass(frozen=True)
class Snapshot:
    """A complete model folder, and the name that messages use for it."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Weights:
    """Where a model's weights come from."""

    folder: Path  # contains its configuration
    checkpoint: Checkpoint  # its headers, labelled with the name that the user gave
    parts: Parts
    remedy: str = WHOLE  # what the user can do if the model cannot be measured part by part
    scratch: Path | None = None  # for hidden states beyond HELD_BYTES; None: the system's default


def in_folder(name: str, folder: Path, scratch: Path | None = None) -> Weights:
    """The weights of a complete local snapshot; `name` is the name that the user gave."""

    def parts(
        lists: Sequence[Sequence[TensorHeader]],
    ) -> Generator[dict[str, Tensor], None, None]:
        with TensorReader(folder, name) as reader:
            for tensors in lists:
                yield {tensor.name: read_tensor(reader, tensor) for tensor in tensors}

    return Weights(folder, local_checkpoint(name, folder), parts, scratch=scratch)


@dataclass(frozen=True)
class Subject:
    """A source, and the sets that it is measured on."""

    source: str  # repo@sha, or the folder as written
    commit_sha: str
    role: Role
    folder: Path  # a complete local snapshot, if the model is loaded whole
    sets: tuple[CalibrationSet, ...]
    against: Snapshot | None = None  # the base, for a measure of pairs
    weights: Weights | None = None  # to measure it block by block, if it can be; None: whole
    may_be_whole: bool = False  # whether it may be loaded whole if it cannot
    wanted: GramRequest | None = None  # what a pass block by block over a single set also writes

    @property
    def snapshot(self) -> Snapshot:
        """Its folder, with its name."""
        return Snapshot(self.source, self.folder)

    @property
    def n_tokens(self) -> int:
        """The number of tokens of all sets."""
        return sum(one.tokens.n_tokens for one in self.sets)

    def gram_facts(self, widest: int) -> dict[str, Any]:
        """All facts that fix the second moments of a source on its one calibration set."""
        (own,) = self.sets
        facts = {"source": self.commit_sha, "calibration": {**own.facts}, "widest": widest}
        return {"version": grams.VERSION, **facts}

    def measured(self, measure: Callable[[Snapshot | Weights], Measured]) -> Measured:
        """Call a function with the weights, block by block, if possible, else with the folder.

        It is a NotByBlockError if the first is not possible and it must not be loaded whole.
        """
        if self.weights:
            try:
                return measure(self.weights)
            except NotByBlockError:
                if not self.may_be_whole:
                    raise
        return measure(self.snapshot)


def missing(subjects: Sequence[Subject], known: ImportanceProfile) -> list[Subject]:
    """The subjects with the sets that no known measurement covers."""
    left = []
    for subject in subjects:
        sets = tuple(s for s in subject.sets if not reusable(known, subject.commit_sha, s.facts))
        if sets:
            left.append(replace(subject, sets=sets))
    return left
