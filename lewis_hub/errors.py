"""All errors that a user can act on.

A message says what is wrong and where, what was expected and found, and what to do next. The fields
are the constructor's arguments, so an error can be pickled to a worker. The command line prints the
message and exits with `exit_code`. Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(eq=False)
class LewisHubError(Exception):
    """The base class of all errors that a user can act on."""

    exit_code: ClassVar[int] = 1
    status: ClassVar[str] = "failed"  # in the output of --json

    def __reduce__(self) -> tuple[type[LewisHubError], tuple[Any, ...]]:
        """Pickle by fields, so that keyword arguments survive too."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(eq=False)
class LocatedError(LewisHubError):
    """A message of three parts: where, what is wrong, and what to do next.

    The problem needs no full stop at its end.
    """

    where: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        where = self.where.replace("\n", "\\n")  # a name that someone else chose
        return f"{where}: {self.problem.removesuffix('.')}.\n{self.remedy}"


@dataclass(eq=False)
class ListedError(LewisHubError):
    """Several problems at once, each with what to do about it."""

    problems: tuple[str, ...]

    @property
    def listed(self) -> str:
        """The problems as a list, each on its own line."""
        return "\n".join(f"- {problem}" for problem in self.problems)


# -- the recipe


@dataclass(eq=False)
class RecipeError(LewisHubError):
    """A recipe is not valid, or cannot be run; `field` is a path such as `guide.gamma`."""

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
    """A model or dataset cannot be found or read; `where` is the repo or path as written."""


@dataclass(eq=False)
class SourcesError(ListedError):
    """Several models of a recipe cannot be found or read."""

    def __str__(self) -> str:
        return f"{len(self.problems)} models of the recipe cannot be used:\n{self.listed}"


# -- checkpoints

MERGE = "the merged model"  # the `source` of an error in the result


class CheckpointError(LewisHubError):
    """Weight files are broken, or do not fit together."""


class BrokenCheckpointError(CheckpointError, LocatedError):
    """A weight file or an index is damaged or missing; `where` is the source and the file."""


class PickleError(CheckpointError, LocatedError):
    """A pickle contains more than tensors, or is damaged; `where` is the source and the file."""


class AlignmentError(CheckpointError, LocatedError):
    """The units of a model cannot be matched with another's; `where` is the model."""


class AdapterError(CheckpointError, LocatedError):
    """A LoRA adapter cannot be applied to its base; `where` is the adapter or its file."""


@dataclass(eq=False)
class NonFiniteError(CheckpointError):
    """A tensor contains NaN or infinity; `source` is its source, or MERGE."""

    tensor: str
    source: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.tensor} holds NaN or infinity in {self.source}.\n{self.remedy}"


# -- merging


class MergeError(LocatedError):
    """The method, a parameter or the schedule of a merge is wrong."""


class TokenizerError(LocatedError):
    """A tokenizer cannot be read, or cannot be united with the others."""


class CheckFailedError(ListedError):
    """The sources do not fit together, or cannot be merged as the recipe says."""

    def __str__(self) -> str:
        return f"this recipe cannot be merged:\n{self.listed}\n`lewis-hub check` shows the sources."


class ExtractionError(ListedError):
    """The difference of two models cannot be written as an adapter."""

    def __str__(self) -> str:
        return f"no adapter can be extracted:\n{self.listed}"


class DeviceError(LocatedError):
    """A device does not exist on this machine, or has too little memory; `where` is the device."""


# -- calibration


class CalibrationError(LocatedError):
    """The data, template, tokenizer or model of a calibration is wrong."""


class EmptyCalibrationError(CalibrationError):
    """The calibration data has no token that counts."""


class CalibrationModelError(CalibrationError):
    """transformers cannot load a source, or it cannot be measured."""


class NotByBlockError(CalibrationModelError):
    """A source cannot be measured block by block; it may still be measured as a whole."""


class GuideError(CalibrationError):
    """A guide is unknown, or cannot make a schedule of its statistics and settings."""


class ProfileError(CalibrationError):
    """An importance.json or density.json cannot be read."""


# -- the output folder


class OutputError(LocatedError):
    """The output folder cannot be written."""


class OtherOutputError(OutputError):
    """The output folder exists, and holds something else than what is to be written."""


class ExportError(LocatedError):
    """A model cannot be written in another format; `where` is the model."""


# -- evaluation


class EvaluationError(LocatedError):
    """A benchmark is missing, unsafe or without result; `where` is a task, file or folder."""


class UnscorableAnswerError(EvaluationError):
    """A model gives a text the likelihood NaN, or writes far too much: `where` is its folder."""


class TuningError(LocatedError):
    """A search cannot be run; `where` is the study, a task or a method."""


class SearchRefusedError(ListedError):
    """A search cannot be run with these options, models and texts."""

    def __str__(self) -> str:
        return f"this search cannot be run:\n{self.listed}"


# -- publishing


class PublishError(LocatedError):
    """A push was refused; `where` is the repo, or the folder to push."""


class GateRefusedError(LocatedError):
    """The merge failed the quality gate and was not pushed; `where` is its folder."""

    exit_code = 3
    status = "refused"


class SignatureError(LocatedError):
    """A signing key cannot be used; `where` is its file."""


# -- the embedded Hub, optional extras


class HubServerError(LocatedError):
    """The embedded Hub cannot start; `where` is its address."""


@dataclass(eq=False)
class ExtraMissingError(LewisHubError):
    """A feature needs optional dependencies that are not installed."""

    feature: str
    extra: str

    def __str__(self) -> str:
        return f"{self.feature} needs the {self.extra} extra: pip install 'lewis-hub[{self.extra}]'"
