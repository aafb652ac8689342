"""What was merged, exactly: `lewis/lock.json`.

The digest is "sha256:" and the hexadecimal SHA-256 of one JSON document in UTF-8: keys sorted, no
white space, no escapes but those that JSON demands, numbers as Python's `repr` writes them and
whole ones without a fraction. The document holds all that fixes the bytes of the weights and of the
files beside them, and nothing else. Where an input lies, what it is called and which commit it came
from do not fix them: the digests of its files do. So a commit upstream that touches only a README
changes nothing, and neither do the scores, the versions of libraries, the machine or the date.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from lewis_hub.errors import OutputError

VERSION = 1
ARITHMETIC = 1  # raised when the same inputs and recipe come out as other bytes

UNREAD_NAMES = frozenset({"README.md"})
UNREAD_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".gguf", ".gif", ".h5", ".jpeg", ".jpg", ".msgpack", ".onnx"}
    | {".pdf", ".png", ".pt", ".pth", ".svg", ".webp"}
)
NAMING = frozenset(
    {"model", "base_model", "dataset", "include", "revision"}
)  # inputs by name, not content
LATER = frozenset({"evaluate", "publish", "allow_overlap"})  # about scores, not about the bytes


@dataclass(frozen=True)
class LockedInput:
    """A model or dataset as it was read.

    Attributes:
        name: as the recipe writes it.
        revision: what was asked; None is the default branch.
        commit_sha: what it resolved to; of a folder the digest of its contents.
        files: path -> digest, of those that can change the result.
    """

    name: str
    role: Literal["base", "expert", "calibration"]
    revision: str | None
    commit_sha: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class OutputFile:
    """A file of the merge."""

    sha256: str
    n_bytes: int


@dataclass(frozen=True)
class Lock:
    """What was merged and what came out.

    Attributes:
        inputs: base first, then the experts in the recipe's order.
        calibration: the dataset of each expert, in the same order; none where nothing is measured.
        recipe: as run, revisions pinned, as plain JSON.
        max_shard_bytes: how the weights were cut into files.
        outputs: path -> file, of all that the merge left behind but the lock.
        software: name -> version; for the record, outside the digest.
    """

    inputs: tuple[LockedInput, ...]
    calibration: tuple[LockedInput, ...]
    recipe: Mapping[str, Any]
    method: str
    guide: str | None
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
            "method": self.method,
            "guide": self.guide,
            "seed": self.seed,
            "max_shard_bytes": self.max_shard_bytes,
        }
        if "slices" in self.recipe:
            fixed["slices"] = _numbered(self.recipe)
        return "sha256:" + hashlib.sha256(canonical(fixed)).hexdigest()

    def to_json(self) -> str:
        """The text of `lock.json`; the same merge gives the same text."""
        document = {
            "version": VERSION,
            "digest": self.digest,
            "inputs": [asdict(one) for one in self.inputs],
            "calibration": [asdict(one) for one in self.calibration],
            "recipe": dict(self.recipe),
            "method": self.method,
            "guide": self.guide,
            "seed": self.seed,
            "max_shard_bytes": self.max_shard_bytes,
            "outputs": {path: asdict(self.outputs[path]) for path in sorted(self.outputs)},
            "software": {name: self.software[name] for name in sorted(self.software)},
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, file: str = "lewis/lock.json") -> Lock:
        """Read what `to_json` wrote; `file` is named in messages.

        Raises:
            OutputError: another version, no such document, or a digest that is not that of the
                contents.
        """
        try:
            document = json.loads(text)
            if document["version"] != VERSION:
                problem = f"it has version {document['version']}, expected {VERSION}."
                raise OutputError(file, problem, "Use the version of lewis-hub that wrote it.")
            lock = _lock(document)
            stated = document["digest"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"it is no lock of a merge ({type(error).__name__}: {error})."
            raise OutputError(file, problem, "Take the file that the merge wrote.") from None
        if stated != lock.digest:
            problem = f"it states the digest {stated}, its contents have {lock.digest}."
            remedy = "It was changed after the merge: take the file that the merge wrote."
            raise OutputError(file, problem, remedy)
        return lock


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


def _lock(document: Mapping[str, Any]) -> Lock:
    return Lock(
        inputs=tuple(LockedInput(**one) for one in document["inputs"]),
        calibration=tuple(LockedInput(**one) for one in document["calibration"]),
        recipe=document["recipe"],
        method=document["method"],
        guide=document["guide"],
        seed=document["seed"],
        max_shard_bytes=document["max_shard_bytes"],
        outputs={path: OutputFile(**one) for path, one in document["outputs"].items()},
        software=document["software"],
    )
