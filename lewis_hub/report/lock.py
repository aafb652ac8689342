"""What was merged, exactly: `lewis/lock.json`.

The digest is "sha256:" and the hexadecimal SHA-256 of one JSON document in UTF-8: keys sorted, no
white space, no escapes but those that JSON demands, numbers as Python's `repr` writes them and
whole ones without a fraction. The document holds all that fixes the bytes of the weights and of the
files beside them, and nothing else. Where an input lies, what it is called and which commit it came
from do not fix them: the digests of its files do. So a commit upstream that touches only a README
changes nothing, and neither do the scores, the versions of libraries, the machine or the date. Nor
do the rows that calibration drew: they follow from the data, the split and the seed.

The seal is a digest of the same form over all of the lock but itself. It finds what was changed by
accident; whoever means to forge a lock makes a new seal, and a signature finds that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lewis_hub.errors import OutputError

FILE = "lewis/lock.json"
VERSION = 1
SCHEMA = f"urn:lewis-hub:lock:{VERSION}"
ARITHMETIC = 2  # raised when the same inputs and recipe come out as other bytes

UNREAD_NAMES = frozenset({"README.md"})
UNREAD_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".gguf", ".gif", ".h5", ".jpeg", ".jpg", ".msgpack", ".onnx"}
    | {".pdf", ".png", ".pt", ".pth", ".svg", ".webp"}
)
NAMING = frozenset(
    {"model", "base_model", "dataset", "include", "revision"}
)  # inputs by name, not content
LATER = frozenset({"evaluate", "publish", "allow_overlap"})  # about scores, not about the bytes
CHANGED = "It was changed after the merge: take the file that the merge wrote."


CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=CLOSED)
class LockedInput:
    """A model as it was read.

    Attributes:
        name: as the recipe writes it.
        revision: what was asked; None is the default branch.
        commit_sha: what it resolved to; of a folder the digest of its contents.
        files: path -> digest, of those that can change the result.
    """

    name: str
    role: Literal["base", "expert"]
    revision: str | None
    commit_sha: str
    files: Mapping[str, str]


@dataclass(frozen=True, config=CLOSED)
class LockedData:
    """What an expert was calibrated on; the first four as of `LockedInput`.

    Attributes:
        rows: index of each row that was measured, in the order of the data; None before they
            are drawn.
    """

    name: str
    revision: str | None
    commit_sha: str
    files: Mapping[str, str]
    config: str | None
    split: str
    rows: tuple[int, ...] | None


@dataclass(frozen=True, config=CLOSED)
class OutputFile:
    """A file of the merge."""

    sha256: str
    n_bytes: int


@dataclass(frozen=True, config=CLOSED)
class Lock:
    """What was merged and what came out.

    Attributes:
        inputs: base first, then the experts in the recipe's order.
        calibration: the dataset of each expert, in the same order; none where nothing is measured.
        recipe: as run, revisions pinned, as plain JSON.
        method_version, guide_version: raised when what they make of the same inputs changes.
        max_shard_bytes: how the weights were cut into files.
        outputs: path -> file, of all that the merge left behind but what only tells of it: the
            lock, the card, costs, provenance, changelog and signature.
        software: name -> version; for the record, outside the digest.
    """

    inputs: tuple[LockedInput, ...]
    calibration: tuple[LockedData, ...]
    recipe: Mapping[str, Any]
    method: str
    method_version: int
    guide: str | None
    guide_version: int | None
    seed: int
    max_shard_bytes: int
    outputs: Mapping[str, OutputFile]
    software: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Over all that fixes the bytes: equal digests, equal weights."""
        fixed = {
            "arithmetic": ARITHMETIC,
            "inputs": [{"role": one.role, "files": dict(one.files)} for one in self.inputs],
            "calibration": [dict(one.files) for one in self.calibration],
            "recipe": _fixing(self.recipe),
            "method": [self.method, self.method_version],
            "guide": [self.guide, self.guide_version],
            "seed": self.seed,
            "max_shard_bytes": self.max_shard_bytes,
        }
        if "slices" in self.recipe:
            fixed["slices"] = _numbered(self.recipe)
        return _sha256(fixed)

    def to_json(self) -> str:
        """The text of `lock.json`; the same merge gives the same text."""
        document = {"version": VERSION, "digest": self.digest, **asdict(self)}
        for unordered in ("outputs", "software"):
            document[unordered] = dict(sorted(document[unordered].items()))
        document["seal"] = _sha256(document)
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, file: str = FILE) -> Lock:
        """Read what `to_json` wrote, to the byte; `file` is named in messages.

        Raises:
            OutputError: another version, no such document, or one that was changed.
        """
        try:
            document = json.loads(text)
            if document["version"] != VERSION:
                problem = f"it has version {document['version']}, expected {VERSION}."
                raise OutputError(file, problem, "Use the version of lewis-hub that wrote it.")
            stated = {key: document.pop(key) for key in ("version", "digest", "seal")}
            lock = TypeAdapter(cls).validate_python(document)
            written = lock.to_json()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            problem = f"it is no lock of a merge ({_told(error)})."
            raise OutputError(file, problem, "Take the file that the merge wrote.") from None
        if stated["digest"] != lock.digest:
            problem = f"it states the digest {stated['digest']}, its contents have {lock.digest}."
            raise OutputError(file, problem, CHANGED)
        if written != text:
            problem = "it is not as it was sealed: something in it was changed."
            raise OutputError(file, problem, CHANGED)
        return lock


def schema() -> str:
    """The lock's JSON Schema."""
    told = TypeAdapter(Lock).json_schema()
    own, digest = told.pop("properties"), {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
    first = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA}
    told["properties"] = {"version": {"const": VERSION}, "digest": digest, **own, "seal": digest}
    told["required"] = list(told["properties"])
    return json.dumps(first | told, indent=2) + "\n"


def can_change_the_result(path: str) -> bool:
    """Whether a model's file belongs in the lock: neither hidden, a card, a picture nor unread."""
    pure = PurePosixPath(path)
    hidden = any(part.startswith(".") for part in pure.parts)
    return not hidden and pure.name not in UNREAD_NAMES and pure.suffix not in UNREAD_SUFFIXES


def canonical(document: Any) -> bytes:
    """The one way to write a JSON document that digests are taken over."""
    return json.dumps(
        _plain(document),
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    ).encode()


def _sha256(document: Any) -> str:
    return "sha256:" + hashlib.sha256(canonical(document)).hexdigest()


def _told(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
    return f"{type(error).__name__}: {error}"


def _plain(value: Any) -> Any:
    """The same value whichever way it was written: 1.0 is 1, a tuple a list."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _fixing(recipe: Any) -> Any:
    """The recipe without what comes later and without the names of inputs."""
    if isinstance(recipe, Mapping):
        dropped = NAMING | LATER
        return {
            key: _fixing(value)
            for key, value in recipe.items()
            if key not in dropped and value is not None
        }
    if isinstance(recipe, (list, tuple)):
        return [_fixing(item) for item in recipe]
    return recipe


def _numbered(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Which input each slice has where: numbers in the order of `inputs`, for names fix nothing."""
    numbers: dict[str, int] = {}

    def number(name: str | None) -> int | None:
        return None if name is None else numbers.setdefault(name, len(numbers))

    number(recipe.get("base_model"))
    return [
        {
            "sources": [number(source["model"]) for source in one["sources"]],
            "base": number(one.get("base_model")),
        }
        for one in recipe["slices"]
    ]


PROVENANCE_FILE = "lewis/provenance.json"
BUILDER = "https://pypi.org/project/lewis-hub/"
BUILD_TYPE = f"{BUILDER}#merge-v1"
GIT_SHA_DIGITS = 40


@dataclasses.dataclass(frozen=True)
class Run:
    """When the run that finished a merge began and ended, both with a time zone."""

    began: datetime
    ended: datetime


def provenance(lock: Lock, run: Run) -> str:
    """The text of `provenance.json`; the same lock and run give the same text."""
    told = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": list(_subjects(lock)),
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": lock.recipe},
                "internalParameters": {
                    "digest": lock.digest,
                    "max_shard_bytes": lock.max_shard_bytes,
                    "versions": {"method": lock.method_version, "guide": lock.guide_version},
                },
                "resolvedDependencies": [
                    descriptor
                    for kind, locked in (("", lock.inputs), ("datasets/", lock.calibration))
                    for one in {(one.name, one.commit_sha): one for one in locked}.values()
                    for descriptor in _dependencies(kind, one)
                ],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": dict(sorted(lock.software.items()))},
                "metadata": {
                    "invocationId": lock.digest,
                    "startedOn": run.began.isoformat(timespec="seconds"),
                    "finishedOn": run.ended.isoformat(timespec="seconds"),
                },
            },
        },
    }
    return json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def is_provenance_of(text: str, lock: Lock) -> bool:
    """Whether a text says of a lock what `provenance` does, whatever its dates."""
    try:
        told = json.loads(text)["predicate"]["runDetails"]["metadata"]
        dates = [datetime.fromisoformat(told[key]) for key in ("startedOn", "finishedOn")]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return provenance(lock, Run(*dates)) == text


def _subjects(lock: Lock) -> Iterator[dict[str, Any]]:
    for path, file in sorted(lock.outputs.items()):
        yield {"name": path, "digest": {"sha256": file.sha256}}
    own = hashlib.sha256(lock.to_json().encode()).hexdigest()
    yield {"name": FILE, "digest": {"sha256": own}}


def _dependencies(kind: str, one: LockedInput | LockedData) -> Iterator[dict[str, Any]]:
    """The commit, where there is one, and each file that was read of it."""
    on_hub = len(one.commit_sha) == GIT_SHA_DIGITS
    place = f"hf://{kind}{one.name.partition('@')[0]}@{one.commit_sha}"
    if on_hub:
        asked = {"annotations": {"revision": one.revision}} if one.revision else {}
        yield {"uri": place, "digest": {"gitCommit": one.commit_sha}, **asked}
    for path, digest in sorted(one.files.items()):
        where = {"uri": f"{place}/{path}"} if on_hub else {"name": f"{one.name}/{path}"}
        yield {**where, "digest": _digest(digest)}


def _digest(written: str) -> Mapping[str, str]:
    algorithm, _, digits = written.partition(":")
    return {"gitBlob" if algorithm == "git-sha1" else algorithm: digits}
