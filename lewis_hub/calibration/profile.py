"""The profile of a merge: what was measured of each module of each source.

A profile is read and written without torch, so that plots and merges can use one without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, FiniteFloat, StringConstraints, TypeAdapter, ValidationError

from lewis_hub.checkpoint.header import MAX_NAME
from lewis_hub.display import shortened
from lewis_hub.documents import DocumentError, require_few_values
from lewis_hub.errors import ProfileError
from lewis_hub.recipe.schema import Calibration

VERSION = 1
MAX_SOURCES = 1000  # of a profile
MAX_VALUES = 3_000_000  # pydantic takes half a kB to tell what is wrong with each
Document = TypeVar("Document")
ModuleName = Annotated[str, StringConstraints(max_length=MAX_NAME)]  # or a tensor's


def write_document(document: Mapping[str, Any]) -> str:
    """A document as JSON, in its own order."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_document(text: str, file: str, kind: type[Document]) -> Document:
    """Parse a document, or refuse its JSON, size, version or fields with a ProfileError."""
    try:
        require_few_values(text, MAX_VALUES)
        version = TypeAdapter(_Versioned).validate_json(text, strict=True).version
        if version != VERSION:
            problem = f"it has version {version}, this program reads version {VERSION}"
            remedy = "Upgrade lewis-hub, or delete the file to measure again."
            raise ProfileError(file, problem, remedy)
        return TypeAdapter(kind).validate_json(text, strict=True)
    except DocumentError as error:
        raise broken_document(file, str(error)) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        parts = (shortened(str(part)) for part in first["loc"])
        where = f"`{'.'.join(parts)}`: " if first["loc"] else ""
        raise broken_document(file, f"{where}{first['msg']}") from error


@dataclass(frozen=True)
class _Versioned:
    version: int


def broken_document(file: str, problem: str) -> ProfileError:
    """The error for a file that this version did not write, or that was changed."""
    return ProfileError(file, problem, "Delete the file to have it made again.")


MEASURING = 4  # raised when the same source and texts give other numbers
Role = Literal["base", "expert"]
Measure = Literal[  # a number for each module, and where it is defined
    "lewis",  # importance: `summaries.module_importance`
    "lewis_reference",  # importance with the published code's arithmetic: `reference`
    "outliers",  # the share of a block's entries far above their mean: `summaries.outlier_ratios`
    "evenness",  # of a module's input channels: `summaries.evenness`
    "output_shift",  # of a module's outputs, from base to expert: `measure.output_shifts`
    "task_vector",  # its size relative to the base's weight: `merge.task_vectors`
]
OF_WHOLE_MODELS: frozenset[Measure] = frozenset({"lewis_reference", "output_shift"})
WITHOUT_TEXTS: frozenset[Measure] = frozenset({"task_vector"})  # they need weights alone
OF_PAIRS: frozenset[Measure] = frozenset({"output_shift", "task_vector"})  # they compare two models


@dataclass(frozen=True)
class SourceImportance:
    """One source, measured on one calibration set: one number per module."""

    source: str  # repo@sha, or the folder as written
    commit_sha: str  # which content it was: 40 hex digits, or a folder's digest
    role: Role
    n_tokens: int
    calibration: Mapping[str, Any]  # all facts that fix the tokens, and counts
    modules: Mapping[ModuleName, FiniteFloat]  # module -> its number, in the model's order

    @property
    def measure(self) -> str:
        """The measure of the numbers."""
        return str(self.calibration.get("measure", "lewis"))


@dataclass(frozen=True)
class ImportanceProfile:
    """All sources of a merge, measured the same way."""

    guide: str
    calibration: Mapping[str, Any]  # the guide's; each source has its own facts
    sources: Annotated[tuple[SourceImportance, ...], Field(max_length=MAX_SOURCES, fail_fast=True)]

    def base_of(self, expert: SourceImportance) -> SourceImportance:
        """The base on the calibration set of `expert`, or a ProfileError."""
        for entry in self.sources:
            if entry.role == "base" and entry.calibration == expert.calibration:
                return entry
        problem = f"the base was not measured on the calibration set of {expert.source}"
        raise ProfileError("importance.json", problem, "Measure again: delete the file.")

    def by(self, measure: str) -> ImportanceProfile:
        """The profile with the entries of one measure."""
        chosen = tuple(entry for entry in self.sources if entry.measure == measure)
        return replace(self, sources=chosen)

    @property
    def measures(self) -> tuple[str, ...]:
        """All measures of the entries, each once."""
        return tuple(dict.fromkeys(entry.measure for entry in self.sources))

    @property
    def experts(self) -> tuple[SourceImportance, ...]:
        """The sources other than the base, in the recipe's order."""
        return tuple(entry for entry in self.sources if entry.role == "expert")

    def to_json(self) -> str:
        """The text of `lewis/importance.json`."""
        return write_document({"version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, file: str = "importance.json") -> ImportanceProfile:
        """Parse the output of `to_json`; raises a ProfileError that names `file`."""
        return read_document(text, file, cls)


def calibration_facts(
    calibration: Calibration, data: Mapping[str, str], seed: int, tokenizer: str
) -> dict[str, Any]:
    """All facts that fix the tokens and are known before any row is read.

    `data` are the pinned `dataset` (repo@sha, or the path as written) and its `dataset_sha`, and
    for a task the `task_digest` over its files; of texts that a model samples only a `dataset` that
    says so. `tokenizer` is a digest.
    """
    template = {
        "text": calibration.text,
        "messages": calibration.messages,
        "task": calibration.task,
        "chat_template": calibration.chat_template or None,
        "answers": calibration.answers,
        "from": calibration.source,
        "prompt": calibration.prompt,
        "temperature": calibration.temperature,
        "top_p": calibration.top_p,
    }
    place = {"config": calibration.config, "split": calibration.split}
    return {
        "measuring": MEASURING,
        **data,
        **({} if calibration.source else place),
        **{kind: value for kind, value in template.items() if value is not None},
        "samples": calibration.samples,
        "max_tokens": calibration.max_tokens,
        "seed": seed,
        "tokenizer": tokenizer,
    }


def reusable(
    profile: ImportanceProfile, commit_sha: str, facts: Mapping[str, Any]
) -> SourceImportance | None:
    """Find a measurement of the same content and texts; None if there is none.

    The source's name and role may differ; `facts` are from `calibration_facts`, with counts or not.
    """
    for entry in profile.sources:
        known = entry.calibration
        if entry.commit_sha == commit_sha and all(
            key in known and known[key] == value for key, value in facts.items()
        ):
            return entry
    return None
