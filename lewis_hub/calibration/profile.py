"""The profile of a merge: what was measured of each module of each source.

A profile is read and written without torch, so that plots and merges can use one without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from lewis_hub.errors import ProfileError
from lewis_hub.recipe.schema import Calibration

VERSION = 1


def write_document(document: Mapping[str, Any]) -> str:
    """A document as JSON, in its own order."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_document(text: str, file: str) -> dict[str, Any]:
    """Parse a document and check its version.

    Raises:
        ProfileError: not JSON, no version, or another one.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise broken_document(file, f"not JSON: {error}") from error
    version = take(document, "version", int, file)
    if version != VERSION:
        problem = f"it has version {version}, this program reads version {VERSION}"
        raise ProfileError(file, problem, "Upgrade lewis-hub, or delete the file to measure again.")
    return cast("dict[str, Any]", document)


def take(document: Any, key: str, kind: type, file: str) -> Any:
    """A field of a document, with a check of its type."""
    value = _value(document, key, file)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise broken_document(file, f"`{key}` is a {type(value).__name__}, not a {kind.__name__}")
    return value


def take_number(document: Any, key: str, file: str) -> float:
    """A field of a document that is a finite number."""
    value = _value(document, key, file)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise broken_document(file, f"`{key}` is {value!r}, not a number")
    return float(value)


def _value(document: Any, key: str, file: str) -> Any:
    if not isinstance(document, dict):
        raise broken_document(file, f"a {type(document).__name__} stands where an object belongs")
    if key not in document:
        raise broken_document(file, f"`{key}` is missing")
    return document[key]


def take_numbers(document: Any, key: str, file: str) -> dict[str, float]:
    """A field of a document that maps names to finite numbers."""
    named = take(document, key, dict, file)
    return {name: take_number(named, name, file) for name in named}


def broken_document(file: str, problem: str) -> ProfileError:
    """The error for a file that this version did not write, or that was changed."""
    return ProfileError(file, problem, "Delete the file to have it made again.")


MEASURING = 4  # raised when the same source and texts give other numbers
Role = Literal["base", "expert"]


@dataclass(frozen=True)
class SourceImportance:
    """One source, measured on one calibration set: one number per module."""

    source: str  # repo@sha, or the folder as written
    commit_sha: str  # which content it was: 40 hex digits, or a folder's digest
    role: Role
    n_tokens: int
    modules: Mapping[str, float]  # module -> its number, in the model's order
    calibration: Mapping[str, Any]  # all facts that fix the tokens, and counts

    @property
    def measure(self) -> str:
        """The measure of the numbers."""
        return str(self.calibration.get("measure", "lewis"))


@dataclass(frozen=True)
class ImportanceProfile:
    """All sources of a merge, measured the same way."""

    guide: str
    calibration: Mapping[str, Any]  # the guide's; each source has its own facts
    sources: tuple[SourceImportance, ...]

    def base_of(self, expert: SourceImportance) -> SourceImportance:
        """The base, measured on the same calibration set as `expert`.

        Raises:
            ProfileError: the profile holds no such measurement.
        """
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
        written = {
            "version": VERSION,
            "guide": self.guide,
            "calibration": dict(self.calibration),
            "sources": [
                {
                    "source": entry.source,
                    "commit_sha": entry.commit_sha,
                    "role": entry.role,
                    "n_tokens": entry.n_tokens,
                    "calibration": dict(entry.calibration),
                    "modules": dict(entry.modules),
                }
                for entry in self.sources
            ],
        }
        return write_document(written)

    @classmethod
    def from_json(cls, text: str, file: str = "importance.json") -> ImportanceProfile:
        """Parse the output of `to_json`; `file` is for messages.

        Raises:
            ProfileError: not JSON, another version, or a field is missing or has another type.
        """
        read = read_document(text, file)
        return cls(
            guide=take(read, "guide", str, file),
            calibration=take(read, "calibration", dict, file),
            sources=tuple(_source(s, file) for s in take(read, "sources", list, file)),
        )


def _source(read: Any, file: str) -> SourceImportance:
    role = take(read, "role", str, file)
    if role not in ("base", "expert"):
        raise broken_document(file, f"`role` is {role!r}, not base or expert")
    return SourceImportance(
        source=take(read, "source", str, file),
        commit_sha=take(read, "commit_sha", str, file),
        role=cast("Role", role),
        n_tokens=take(read, "n_tokens", int, file),
        modules=take_numbers(read, "modules", file),
        calibration=take(read, "calibration", dict, file),
    )


def calibration_facts(
    calibration: Calibration, data: Mapping[str, str], seed: int, tokenizer: str
) -> dict[str, Any]:
    """All facts that fix the tokens and are known before any row is read.

    Args:
        calibration: the recipe's.
        data: the pinned `dataset` (repo@sha, or the path as written) and its `dataset_sha`, and for
            a task the `task_digest` over its files.
        seed: the recipe's.
        tokenizer: the digest of the tokenizer.
    """
    template = {
        "text": calibration.text,
        "messages": calibration.messages,
        "task": calibration.task,
        "chat_template": calibration.chat_template or None,
    }
    return {
        "measuring": MEASURING,
        **data,
        "config": calibration.config,
        "split": calibration.split,
        **{kind: value for kind, value in template.items() if value is not None},
        "samples": calibration.samples,
        "max_tokens": calibration.max_tokens,
        "seed": seed,
        "tokenizer": tokenizer,
    }


def reusable(
    profile: ImportanceProfile, commit_sha: str, facts: Mapping[str, Any]
) -> SourceImportance | None:
    """Find a measurement of the same source and texts; None if there is none.

    Args:
        profile: from an earlier merge.
        commit_sha: of the source, whose name and role may differ.
        facts: from `calibration_facts`, optionally with the counts.
    """
    for entry in profile.sources:
        known = entry.calibration
        if entry.commit_sha == commit_sha and all(
            key in known and known[key] == value for key, value in facts.items()
        ):
            return entry
    return None
