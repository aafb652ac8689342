"""`lewis/lock.json`, the exact inputs and outputs of a merge, and `lewis/provenance.json` from it.

The digest is "sha256:" and the hexadecimal SHA-256 of a JSON document in UTF-8: sorted keys, no
white space, only the escapes that JSON requires, numbers as Python's `repr` writes them, whole
numbers without a fraction. The document contains all inputs and settings that determine the bytes
of the weights and of the files beside them, and nothing else. The name, place and commit of an
input do not determine them; the digests of its files do. So an upstream commit that changes only a
README changes nothing, nor do scores, versions of libraries, the machine or the date. The rows that
calibration draws are left out: they follow from the data, the split and the seed.

The seal is a digest of the same form over the whole lock without the seal. It detects accidental
changes. A forger can make a new seal; a signature detects that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lewis_hub.documents import read_json
from lewis_hub.errors import OutputError

FILE = "lewis/lock.json"
VERSION = 1
SCHEMA = f"urn:lewis-hub:lock:{VERSION}"
ARITHMETIC = 2  # increased when the same inputs and recipe give other bytes

PROVENANCE_FILE = "lewis/provenance.json"
BUILDER = "https://pypi.org/project/lewis-hub/"
BUILD_TYPE = f"{BUILDER}#merge-v1"
GIT_SHA_DIGITS = 40
MAX_CHARACTERS = 100_000_000  # of the values of a lock and the names around each
# of a lock of 250,000 files; pydantic takes a kB to tell what is wrong with each
MAX_VALUES = 1_600_000

UNREAD_NAMES = frozenset({"README.md", "mergekit_config.yml"})
UNREAD_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".gguf", ".gif", ".h5", ".jpeg", ".jpg", ".msgpack", ".onnx"}
    | {".pdf", ".png", ".pt", ".pth", ".svg", ".webp"}
)
# Keys of a recipe that do not determine the weights: names of inputs, and settings of later stages.
NAMES = frozenset({"model", "source_model", "base_model", "dataset", "include", "revision"})
LATER = frozenset({"evaluate", "export", "publish", "allow_overlap"})
EMBEDDINGS = "tokens"  # of a recipe's `tokenizer`
MODELS = frozenset({"base_model", "model", "source_model"})  # keys that name an input
# keys that may name one of these again, and words that name none there
GIVERS = frozenset({"tokenizer_source", "chat_template", "source"})
KEYWORDS = frozenset({"base", "union"})
NO_STATEMENT = (ValueError, TypeError, KeyError)
CHANGED = "It was changed after the merge. Use the file that the merge wrote."
CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=CLOSED)
class LockedInput:
    """A source model."""

    name: str  # as the recipe writes it
    role: Literal["base", "expert", "donor"]  # a donor gives its tokenizer
    revision: str | None  # as the recipe writes it; None is the default branch
    commit_sha: str  # of that revision; for a folder, the digest of its contents
    files: Mapping[str, str]  # path -> digest, for files that can change the result


@dataclass(frozen=True, config=CLOSED)
class LockedData:
    """The calibration data of an expert; the first four fields are as in `LockedInput`."""

    name: str
    revision: str | None
    commit_sha: str
    files: Mapping[str, str]
    config: str | None
    split: str
    # measured, in the order of the data; None before they are drawn
    rows: Annotated[tuple[int, ...], Field(fail_fast=True)] | None


@dataclass(frozen=True, config=CLOSED)
class OutputFile:
    """A file that the merge wrote."""

    sha256: str
    n_bytes: int


@dataclass(frozen=True, config=CLOSED)
class Lock:
    """The inputs, settings and outputs of a merge."""

    # the base, then the experts in the recipe's order
    inputs: Annotated[tuple[LockedInput, ...], Field(fail_fast=True)]
    # of each expert; empty if nothing is measured
    calibration: Annotated[tuple[LockedData, ...], Field(fail_fast=True)]
    recipe: Mapping[str, Any]  # as run, with pinned revisions, as plain JSON
    method: str
    method_version: int  # increased when results for the same inputs change
    guide: str | None
    guide_version: int | None
    seed: int
    max_shard_bytes: int  # largest file of weights
    outputs: Mapping[str, OutputFile]  # by path, but for files that only describe the merge
    software: Mapping[str, str]  # name -> version; not part of the digest

    @property
    def digest(self) -> str:
        """Digest of all that determines the bytes: equal digests mean equal weights."""
        fixed = {
            "arithmetic": ARITHMETIC,
            "inputs": [
                {"role": source.role, "files": dict(source.files)} for source in self.inputs
            ],
            "calibration": [dict(data.files) for data in self.calibration],
            "recipe": _determining(self.recipe, _numbers(self.recipe)),
            "method": [self.method, self.method_version],
            "guide": [self.guide, self.guide_version],
            "seed": self.seed,
            "max_shard_bytes": self.max_shard_bytes,
        }
        if "slices" in self.recipe:
            fixed["slices"] = _numbered(self.recipe)
        if "experts" in self.recipe:
            fixed["experts"] = _numbered_experts(self.recipe)
        if place := _place_of_base(self.recipe):
            fixed["base_at"] = place
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
        """Read exactly what `to_json` wrote; messages name `file`.

        Raises:
            OutputError: the text has another version, is no such document, or was changed.
        """
        try:
            document = read_json(text, max_values=MAX_VALUES)
            if document["version"] != VERSION:
                problem = f"it has version {document['version']}, expected {VERSION}."
                raise OutputError(file, problem, "Use the version of lewis-hub that wrote it.")
            sealed = {key: part for key, part in document.items() if key != "seal"}
            _, digest, seal = (document.pop(key) for key in ("version", "digest", "seal"))
            lock = TypeAdapter(cls).validate_python(document)
            _require_few_characters(lock)
            _require_possible(lock)
            written = lock.to_json()
        except (ValueError, TypeError, KeyError) as error:
            problem = f"it is not the lock of a merge ({_reason(error)})."
            raise OutputError(file, problem, "Use the file that the merge wrote.") from None
        if digest != lock.digest and seal == _sha256(sealed):
            problem = "it is whole, but its digest is by the rules of another version of lewis-hub."
            by = lock.software.get("lewis_hub", "unknown")
            raise OutputError(file, problem, f"Use that version ({by}), or merge again.")
        if digest != lock.digest:
            problem = f"it states the digest {digest}, but its contents have {lock.digest}."
            raise OutputError(file, problem, CHANGED)
        if written != text:
            problem = "its contents do not match its seal."
            raise OutputError(file, problem, CHANGED)
        return lock


def schema() -> str:
    """The lock's JSON Schema."""
    document = TypeAdapter(Lock).json_schema()
    digest = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
    own = {"version": {"const": VERSION}, "digest": digest, **document.pop("properties")}
    first = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA}
    document["properties"] = {**own, "seal": digest}
    document["required"] = list(document["properties"])
    return json.dumps(first | document, indent=2) + "\n"


def can_change_the_result(path: str) -> bool:
    """Whether a model's file belongs in the lock: hidden files, cards and pictures do not."""
    pure = PurePosixPath(path)
    hidden = any(part.startswith(".") for part in pure.parts)
    return not hidden and pure.name not in UNREAD_NAMES and pure.suffix not in UNREAD_SUFFIXES


def canonical(document: Any) -> bytes:
    """Write a JSON document in the form that digests are computed over."""
    return json.dumps(
        _plain(document),
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    ).encode()


def _sha256(document: Any) -> str:
    return "sha256:" + hashlib.sha256(canonical(document)).hexdigest()


def _require_few_characters(lock: Lock) -> None:
    """Refuse a lock that would take too long to write out, to compare or to describe.

    Indentation and differences repeat the keys around each value, the provenance repeats the name
    of an input for each of its files.
    """
    models, data = ([{one.name: one.files} for one in of] for of in (lock.inputs, lock.calibration))
    if (n := _n_characters([lock.recipe, models, data])) > MAX_CHARACTERS:
        raise ValueError(f"{n:,} characters with the names around each value")


def _require_possible(lock: Lock) -> None:
    if not lock.inputs:
        raise ValueError("it has no inputs")
    for path, file in lock.outputs.items():
        if not 0 <= file.n_bytes < 2**63:
            raise ValueError(f"no file has the size of `{path[:100]}`")


def _n_characters(value: Any, above: int = 0) -> int:
    """The characters of all values and of the keys around each."""
    if isinstance(value, Mapping):
        return sum(_n_characters(item, above + 2 + len(key)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return sum(_n_characters(item, above + 2) for item in value)
    return above + len(str(value))


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _plain(value: Any) -> Any:
    """The same value for equal numbers and lists: 1.0 becomes 1, a tuple becomes a list."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _numbers(recipe: Any) -> dict[str, int]:
    """The number of each model that a recipe and its steps name."""
    names = enumerate(dict.fromkeys(_models(recipe)))
    return {name: number for number, name in names if name not in KEYWORDS}


def _models(recipe: Any) -> Iterator[str]:
    if isinstance(recipe, Mapping):
        for key in sorted(recipe.keys() - LATER - {EMBEDDINGS}):
            value = recipe[key]
            if key in MODELS and isinstance(value, str):
                yield value
            else:
                yield from _models(value)
    elif isinstance(recipe, (list, tuple)):
        for item in recipe:
            yield from _models(item)


def _determining(recipe: Any, numbers: Mapping[str, int]) -> Any:
    """The recipe without the names of inputs and without settings of later stages.

    A model that gives the tokenizer, the chat template or an embedding has no other place in the
    document: there its number stands for its name. The text of a token may be `model`.
    """
    if isinstance(recipe, Mapping):
        reads = {**dict.fromkeys(GIVERS, _giver), EMBEDDINGS: _embeddings}
        return {
            key: reads.get(key, _determining)(value, numbers)
            for key, value in recipe.items()
            if key not in NAMES | LATER and value is not None
        }
    if isinstance(recipe, (list, tuple)):
        return [_determining(item, numbers) for item in recipe]
    return recipe


def _embeddings(tokens: Any, numbers: Mapping[str, int]) -> Any:
    """The settings of single tokens, by their text."""
    if not isinstance(tokens, Mapping):
        return tokens
    return {text: _giver(one, numbers) for text, one in tokens.items()}


def _giver(place: Any, numbers: Mapping[str, int]) -> Any:
    """A model that gives something, by its number, also below `source` and `model`."""
    if isinstance(place, Mapping):
        return {
            key: _giver(value, numbers) if key in ("source", "model") else value
            for key, value in place.items()
        }
    return numbers.get(place, place) if isinstance(place, str) else place


def _numbered(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of each slice as numbers in the order of `inputs`, instead of names."""
    numbers: dict[str, int] = {}

    def number(name: str | None) -> int | None:
        return None if name is None else numbers.setdefault(name, len(numbers))

    number(recipe.get("base_model"))
    return [
        {
            "sources": [number(source["model"]) for source in part["sources"]],
            "base": number(part.get("base_model")),
        }
        for part in recipe["slices"]
    ]


def _place_of_base(recipe: Mapping[str, Any]) -> int:
    """The place of the base among `models`, whose entries have no names here; 0 also without it."""
    models = [entry["model"] for entry in recipe.get("models", ())]
    base = recipe.get("base_model")
    return models.index(base) if base in models else 0


def _numbered_experts(recipe: Mapping[str, Any]) -> list[int]:
    """The source of each expert of a mixture as its number among all sources, the base first."""
    experts = (*recipe["experts"], *recipe.get("shared_experts", ()))
    models = [recipe["base_model"], *(expert["source_model"] for expert in experts)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(models))}
    return [numbers[name] for name in models[1:]]


def provenance(lock: Lock, began: datetime, ended: datetime) -> str:
    """The text of `provenance.json`; the times are those of the run that finished the merge."""
    statement = {
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
                    for source in {(one.name, one.commit_sha): one for one in locked}.values()
                    for descriptor in _dependencies(kind, source)
                ],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": dict(sorted(lock.software.items()))},
                "metadata": {
                    "invocationId": lock.digest,
                    "startedOn": began.isoformat(timespec="seconds"),
                    "finishedOn": ended.isoformat(timespec="seconds"),
                },
            },
        },
    }
    return json.dumps(statement, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def is_provenance_of(text: str, lock: Lock) -> bool:
    """Whether a text is the provenance of a lock, whatever its dates."""
    try:
        return provenance_again(text, lock) == text
    except NO_STATEMENT:
        return False


def provenance_again(text: str, lock: Lock) -> str:
    """The provenance of a lock, with the times of an earlier statement `text`.

    The text may be no such statement, which raises one of NO_STATEMENT.
    """
    metadata = read_json(text)["predicate"]["runDetails"]["metadata"]
    began, ended = (datetime.fromisoformat(metadata[k]) for k in ("startedOn", "finishedOn"))
    return provenance(lock, began, ended)


def _subjects(lock: Lock) -> Iterator[dict[str, Any]]:
    for path, file in sorted(lock.outputs.items()):
        yield {"name": path, "digest": {"sha256": file.sha256}}
    own = hashlib.sha256(lock.to_json().encode()).hexdigest()
    yield {"name": FILE, "digest": {"sha256": own}}


def _dependencies(kind: str, source: LockedInput | LockedData) -> Iterator[dict[str, Any]]:
    """The commit, if there is one, and each file that was read."""
    on_hub = len(source.commit_sha) == GIT_SHA_DIGITS
    place = f"hf://{kind}{source.name.partition('@')[0]}@{source.commit_sha}"
    if on_hub:
        revision = {"annotations": {"revision": source.revision}} if source.revision else {}
        yield {"uri": place, "digest": {"gitCommit": source.commit_sha}, **revision}
    for path, digest in sorted(source.files.items()):
        where = {"uri": f"{place}/{path}"} if on_hub else {"name": f"{source.name}/{path}"}
        algorithm, _, digits = digest.partition(":")
        kind_of_digest = "gitBlob" if algorithm == "git-sha1" else algorithm
        yield {**where, "digest": {kind_of_digest: digits}}
