"""Every error that a user can act on, as one tree.

A message says what, where, expected and found, and what to do next. The fields are the arguments,
so an error pickles to a worker and back. The command line prints the message and exits with
`exit_code`; anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(eq=False)
class LewisHubError(Exception):
    """The root: catch this to catch all that a user can act on."""

    exit_code: ClassVar[int] = 1
    status: ClassVar[str] = "failed"  # in the document of --json

    def __reduce__(self) -> tuple[type[LewisHubError], tuple[Any, ...]]:
        """Pickle by fields, whether they were given by position or by name."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(eq=False)
class LocatedError(LewisHubError):
    """The usual shape of a message: where, what, and what to do next."""

    where: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}.\n{self.remedy}"


@dataclass(eq=False)
class ListedError(LewisHubError):
    """All that stands in the way at once, each with what to do about it."""

    problems: tuple[str, ...]

    @property
    def listed(self) -> str:
        """One line a problem."""
        return "\n".join(f"- {problem}" for problem in self.problems)


# -- the recipe


@dataclass(eq=False)
class RecipeError(LewisHubError):
    """A recipe says something that cannot be done; `field` is a path such as `guide.gamma`."""

    file: str
    field: str
    problem: str
    remedy: str
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.file}: `{self.field}`" if self.field else self.file
        return "\n".join((f"{where}: {self.problem}", self.remedy, *self.others))


# -- sources: repos, folders, datasets


class SourceError(LocatedError):
    """A model or dataset could not be found or read; `where` is the repo or path as written."""


# -- checkpoints

MERGE = "the merged model"  # in the place of a source, where the merge itself is at fault


class CheckpointError(LewisHubError):
    """Weight files that are broken, or that do not fit together."""


class BrokenCheckpointError(CheckpointError, LocatedError):
    """A weight file or its index is not what it should be; `where` is the source and the file."""


class PickleError(CheckpointError, LocatedError):
    """A pickle that holds more than tensors, or is damaged; `where` is the source and the file."""


class AdapterError(CheckpointError, LocatedError):
    """A LoRA adapter that cannot be put on the base; `where` is the adapter, or its file."""


@dataclass(eq=False)
class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity; `source` is whose, or MERGE."""

    tensor: str
    source: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.tensor} holds NaN or infinity in {self.source}.\n{self.remedy}"


# -- merging


class MergeError(LocatedError):
    """A merge that cannot be done as asked: method, parameter or schedule."""


class TokenizerError(LocatedError):
    """A tokenizer that cannot be read, or not be united with the others."""


class CheckFailedError(ListedError):
    """The sources do not fit together, or cannot be merged as asked."""

    def __str__(self) -> str:
        return f"this recipe cannot be merged:\n{self.listed}\n`lewis-hub check` shows the sources."


class ExtractionError(ListedError):
    """Two models of whose difference no adapter can be made."""

    def __str__(self) -> str:
        return f"no adapter can be extracted:\n{self.listed}"


class DeviceError(LocatedError):
    """A device that this machine does not have, or that is too small; `where` is the device."""


# -- calibration


class CalibrationError(LocatedError):
    """Calibration that cannot be done as asked: data, template, tokenizer or model."""


class EmptyCalibrationError(CalibrationError):
    """No token of the calibration data counts."""


class CalibrationModelError(CalibrationError):
    """A source that transformers cannot load, or that cannot be measured."""


class NotByBlockError(CalibrationModelError):
    """A source that cannot be measured block by block; it may be that it can be whole."""


class GuideError(CalibrationError):
    """A guide that is unknown, or whose statistics and bounds give no schedule."""


class ProfileError(CalibrationError):
    """An importance.json or density.json that cannot be read."""


# -- the output folder


@dataclass(eq=False)
class OutputError(LewisHubError):
    """The output folder cannot be written."""

    path: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}\n{self.remedy}"


# -- evaluation


@dataclass(eq=False)
class EvaluationError(LewisHubError):
    """A benchmark that is missing, unsafe or gave nothing; `subject` is a task, file or folder."""

    subject: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.problem}\n{self.remedy}"


class TuningError(LocatedError):
    """A search that cannot be done as asked; `where` is the study, a task or a method."""


# -- publishing


class PublishError(LocatedError):
    """A push that was refused; `where` is the repo, or the folder that was to be pushed."""


class GateRefusedError(LocatedError):
    """The quality gate was missed, and nothing was pushed; `where` is the merged model's folder."""

    exit_code = 3
    status = "refused"


class SignatureError(LocatedError):
    """A key that cannot be used; `where` is its file."""


# -- the embedded Hub, optional extras


class HubServerError(LocatedError):
    """The embedded Hub cannot serve; `where` is the address asked for."""


@dataclass(eq=False)
class ExtraMissingError(LewisHubError):
    """Something was asked for whose optional dependencies are not installed."""

    what: str
    extra: str

    def __str__(self) -> str:
        return f"{self.what} needs the {self.extra} extra: pip install 'lewis-hub[{self.extra}]'"
