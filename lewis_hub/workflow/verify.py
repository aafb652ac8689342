"""Sign a merge, and verify its files and its signature against its lock."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import yaml
from huggingface_hub import HfApi

from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader, torch_dtypes
from lewis_hub.checkpoint.reader import Reader, TensorReader, local_header, read_tensor
from lewis_hub.display import Progress, to_html
from lewis_hub.documents import DocumentError, read_json, read_yaml
from lewis_hub.errors import ExtraMissingError, OutputError, SignatureError
from lewis_hub.evaluate.gate import FILE as GATE
from lewis_hub.files import is_hidden, sha256_of
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.publish import SIGNATURE
from lewis_hub.hub.source import COMMIT_SHA, Source, SourceFile
from lewis_hub.methods.numerics import within_tolerance
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.recipe.schema import Recipe
from lewis_hub.report import cost, difference, mergekit, page
from lewis_hub.report.lock import FILE as LOCK
from lewis_hub.report.lock import PROVENANCE_FILE as PROVENANCE
from lewis_hub.report.lock import Lock, LockedData, LockedInput, OutputFile, is_provenance_of
from lewis_hub.workflow.generated import FILE as GENERATED
from lewis_hub.workflow.report import RECIPE
from lewis_hub.workflow.resolve import (
    calibrates_on_own_tasks,
    depends_on_processor,
    sources_inside,
)

if TYPE_CHECKING:
    from model_signing.hashing import Config


TEXTS = f"lewis/{GENERATED}"
UNSIGNED = ("README.md", difference.FILE, SIGNATURE)
# model-signing's message, inside the repr of a list, where quotes may be escaped
MISMATCHED = re.compile(r"Hash mismatch for \\*'(.+?)\\*':")
MAX_SIGNATURE_VALUES = 10_000  # of model.sig, where the names of all files are one text
LONGEST_REASON = 500  # characters
MAKE = (
    "Make a pair: `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`, then"
    " `openssl ec -in key.pem -pubout -out key.pub`."
)


def sign(folder: Path, private_key: Path) -> None:
    """Write `model.sig`; a signature that is still valid for the key is kept unchanged.

    The key is a PEM file of an elliptic curve key (P-256, P-384 or P-521), not encrypted.
    """
    signer, public_half = _signer(private_key)
    found = {path: sha256_of(folder / path) for path in _files(folder)}
    if (folder / SIGNATURE).exists():
        with TemporaryDirectory() as scratch:
            public = Path(scratch) / "public.pem"
            public.write_bytes(public_half)
            if problem_with((folder / SIGNATURE).read_bytes(), found, public) is None:
                return
    signer.set_hashing_config(_known(found))
    new = folder / f".{SIGNATURE}.new"
    new.unlink(missing_ok=True)  # it may be a link
    signer.sign(folder, new)
    new.replace(folder / SIGNATURE)


def require_key(private_key: Path) -> None:
    """Refuse a key that cannot sign, before any work."""
    _signer(private_key)


def problem_with(signature: bytes, found: Mapping[str, str], public_key: Path) -> str | None:
    """Return why a signature is invalid, None if it is valid; unsigned files are ignored."""
    _require_installed()
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    try:
        check = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise _unusable(public_key, "public", error) from error
    try:
        read_json(signature, max_values=MAX_SIGNATURE_VALUES)
    except ValueError as error:
        return f"it is no signature: {error}"
    check.set_hashing_config(_known(found)).set_ignore_unsigned_files(True)
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / SIGNATURE
        file.write_bytes(signature)
        try:
            check.verify(PurePosixPath(), file)
        except InvalidSignature:
            return "it was made with another key, or changed"
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            files = dict.fromkeys(MISMATCHED.findall(message))
            if files:
                return f"it was made of other files: {', '.join(files)}"
            return message if len(message) <= LONGEST_REASON else f"{message[:LONGEST_REASON]}..."
    return None


def _signer(private_key: Path) -> tuple[Any, bytes]:
    """Return model-signing's signer for a key, and the public half of the key as PEM."""
    _require_installed()
    from cryptography.hazmat.primitives import serialization
    from model_signing import signing

    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key)
        key = serialization.load_pem_private_key(private_key.read_bytes(), None)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise _unusable(private_key, "private", error) from error
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return signer, public


def _known(found: Mapping[str, str]) -> Config:
    """Return a hashing configuration of known hashes, so that model-signing reads no files."""
    from model_signing import hashing, manifest

    with TemporaryDirectory() as folder:  # the class of its digests is not exported
        (Path(folder) / "file").touch()
        [item] = hashing.Config().hash(folder).resource_descriptors()
        digest = type(item.digest)
    settings = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    how = manifest.SerializationType.from_args(settings | {"ignore_paths": sorted(UNSIGNED)})

    class Known(hashing.Config):  # type: ignore[misc]
        def hash(
            self, model_path: Any, *, files_to_hash: Iterable[Any] | None = None
        ) -> manifest.Manifest:
            wanted = found if files_to_hash is None else {str(path) for path in files_to_hash}
            if LOCK not in wanted:
                raise ValueError(f"it does not cover {LOCK}")
            items = [
                how.new_item(path, digest("sha256", bytes.fromhex(found[path])))
                for path in sorted(found)
                if path in wanted
            ]
            return manifest.Manifest(Path(model_path).name or "model", items, how)

    return Known()


def _files(folder: Path) -> Iterable[str]:
    for path in sorted(folder.rglob("*")):
        part = path.relative_to(folder)
        hidden = any(piece.startswith(".") for piece in part.parts)
        if path.is_file() and not hidden and part.as_posix() not in UNSIGNED:
            yield part.as_posix()


def _require_installed() -> None:
    if find_spec("model_signing") is None:
        raise ExtraMissingError("Signing", "sign")


def _unusable(key: Path, half: str, error: Exception) -> SignatureError:
    if isinstance(error, OSError):
        return SignatureError(str(key), f"it cannot be read ({error.strerror})", MAKE)
    if "encrypted" in str(error):
        plain = "`openssl ec -in KEY -out PLAIN` writes one without."
        return SignatureError(str(key), "the key has a password", plain)
    return SignatureError(str(key), f"it holds no {half} key on P-256, P-384 or P-521", MAKE)


# Files that describe a merge, and pictures: their owner may change them, and nothing loads them.
UNLOCKED = frozenset({*UNSIGNED, LOCK, cost.FILE, GATE, PROVENANCE, page.FILE})
PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")


@dataclass(frozen=True)
class Verdict:
    """The result of a verification."""

    lock: Lock
    problems: tuple[str, ...]  # files that differ from the lock; empty if all files match
    n_files: int  # number of compared files
    # `unchecked` without a key; otherwise whether it is valid
    signature: Literal["none", "unchecked", "holds", "broken"]

    def __repr__(self) -> str:
        if self.problems:
            return "\n".join(f"problem: {problem}" for problem in self.problems)
        told = f"{self.n_files} files match the lock {self.lock.digest[:19]}…"
        return f"{told}; signature: {self.signature}"

    def _repr_html_(self) -> str:
        return to_html(*repr(self).splitlines())


def read_lock(source: Source, api: HfApi) -> Lock:
    """Read the lock of a merge."""
    content = read_small(api, source, LOCK)
    if content is None:
        problem = f"it has no {LOCK}, so lewis-hub did not make this merge."
        raise OutputError(source.pinned, problem, "Name a folder or repo that `merge` made.")
    return Lock.from_json(content.decode("utf-8", errors="replace"), f"{source.pinned}: {LOCK}")


def recipe_of(lock: Lock, source: Source, *, allow_code: bool) -> Recipe:
    """Return the recipe in a lock, with pinned sources and without scoring or publishing.

    Task files that came with the merge are code, so they need a folder and `allow_code`.
    """
    kept = {k: v for k, v in lock.recipe.items() if k not in ("evaluate", "publish")}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    recipe = parse_recipe(text, f"{source.pinned}: {LOCK}")
    if calibrates_on_own_tasks(recipe) and not (source.folder and allow_code):
        problem = "it was calibrated on its own task files, and those are code."
        remedy = "Read lewis/tasks, then verify its folder with `--allow-code-execution`."
        raise OutputError(source.pinned, problem, remedy)
    if source.folder is None:
        return recipe
    placed = recipe.placed_in(source.folder / "lewis")
    require_outside(source, sources_inside(placed, source.folder))
    return placed


def require_outside(source: Source, inside: Sequence[str]) -> None:
    """Refuse a merge with sources in its own folder: they would say nothing of their origin."""
    if inside:
        problem = f"its source `{inside[0]}` is a file or folder in the merge itself"
        remedy = "Move it out of there, if it is yours; else do not trust this merge."
        raise OutputError(source.pinned, problem, remedy)


def verify_files(
    source: Source, lock: Lock, api: HfApi, progress: Progress, public_key: Path | None
) -> Verdict:
    """Compare every file with the lock; weights on the Hub are compared by the Hub's digests.

    `public_key` is a PEM file; None: the signature is not checked.
    """
    problems: list[str] = []
    total = sum(file.n_bytes for file in lock.outputs.values())
    found: dict[str, str] = {}
    files = {file.path: file for file in source.files}
    with progress.stage("Verifying", total, "bytes") as advance:
        for path, expected in lock.outputs.items():
            if file := files.get(path):
                found[path] = _sha256(source, path, file.digest, api)
            problems += _problems(file, expected, path, found.get(path))
            advance(expected.n_bytes)
    problems += [
        f"{file.path}: it is not part of the merge."
        for file in source.files
        if file.path not in lock.outputs and not _may_be_added(file.path)
    ]
    problems += [f"{path}: it is a link to a folder." for path in _linked_folders(source)]
    if RECIPE in found and found[RECIPE] == lock.outputs[RECIPE].sha256:
        text = (read_small(api, source, RECIPE) or b"").decode("utf-8", "replace")
        problems += [] if _is_recipe_of(lock, text) else [f"{RECIPE}: it is not that of the lock."]
    statement = read_small(api, source, PROVENANCE)
    if statement is None:
        problems.append(f"{PROVENANCE}: it is missing.")
    elif not is_provenance_of(statement.decode("utf-8", "replace"), lock):
        problems.append(f"{PROVENANCE}: it does not match the lock.")
    if public_key is None:
        present: Literal["none", "unchecked"] = "unchecked" if source.file(SIGNATURE) else "none"
        return Verdict(lock, tuple(problems), len(lock.outputs), present)
    broken = _problem_with_signature(source, api, found, public_key)
    problems += [f"{SIGNATURE}: {broken}."] if broken else []
    return Verdict(lock, tuple(problems), len(lock.outputs), "broken" if broken else "holds")


def _is_recipe_of(lock: Lock, text: str) -> bool:
    """Whether a text is the recipe of a lock, however it is written."""
    try:
        return bool(read_yaml(text) == lock.recipe)
    except DocumentError:
        return False


def compare_models(lock: Lock, made: Lock, alike: Collection[str] = ()) -> tuple[str, ...]:
    """Return the files of a model that differ when the same merge is made again.

    Weights, configuration, tokenizer, code and the texts that experts wrote are compared. Other
    files in `lewis/` only describe the merge, and plots differ between library versions. Weight
    files in `alike` count as equal. Answers are part of a merge only if the prompts were public
    then: they are compared if both merges have them.
    """
    answers = '"answers": "model"' in json.dumps(lock.recipe)
    if answers and (TEXTS in lock.outputs) != (TEXTS in made.outputs):
        alike = {*alike, TEXTS}
    locked, again = (
        {
            path: file.sha256
            for path, file in one.outputs.items()
            if path == TEXTS or not (path.startswith("lewis/") or path == mergekit.FILE)
        }
        for one in (lock, made)
    )
    return tuple(
        f"{path}: made again it has sha256 {_short(again[path])}, the lock says "
        f"{_short(locked[path])}."
        if path in locked and path in again
        else f"{path}: the merge that was made again {'lacks' if path in locked else 'has'} it."
        for path in dict.fromkeys((*locked, *again))
        if locked.get(path) != again.get(path) and path not in alike
    )


def compare_origins(lock: Lock, made: Lock) -> tuple[str, ...]:
    """Return what a lock states of the origin of a merge that its recipe, run again, contradicts.

    The files of merges that a recipe makes on the way may be rounded differently, if other kinds of
    processors do so, and those of tasks lie elsewhere.
    """
    parts = map(Recipe.model_validate, lock.recipe.get("intermediate") or ())
    rounded = {part.name for part in parts if depends_on_processor(part)}
    facts: dict[str, list[Any]] = {
        "sources": [
            [
                (one.name, one.role, _commit(one), {} if one.name in rounded else one.files)
                for one in each.inputs
            ]
            for each in (lock, made)
        ],
        "calibration data": [
            [_data_facts(one) for one in each.calibration] for each in (lock, made)
        ],
        "method": [each.method for each in (lock, made)],
        "guide": [each.guide for each in (lock, made)],
        "seed": [each.seed for each in (lock, made)],
    }
    return tuple(
        f"{LOCK}: its {what} is not what its recipe leads to."
        for what, (stated, found) in facts.items()
        if stated != found
    )


def _data_facts(data: LockedData) -> tuple[Any, ...]:
    """What a lock states of the data of an expert, but for the place of a task's files."""
    facts = (data.name, data.config, data.split, data.rows)
    is_task = data.name.startswith("task ")
    return facts if is_task else (*facts, _commit(data), data.files)


def _commit(locked: LockedInput | LockedData) -> str | None:
    """The commit of a repo; None for a folder, whose digest also covers what changes nothing."""
    return locked.commit_sha if COMMIT_SHA.fullmatch(locked.commit_sha) else None


def weight_files_within_tolerance(stored: Path, rebuilt: Path) -> frozenset[str]:
    """Return the weight files of two folders whose tensors differ by rounding alone."""
    alike = set()
    with TensorReader(stored, "stored") as ours, TensorReader(rebuilt, "rebuilt") as theirs:
        for file in rebuilt.glob("*.safetensors"):
            if not (stored / file.name).exists():
                continue
            made = {tensor.name: tensor for tensor in local_header("rebuilt", file)}
            found = {tensor.name: tensor for tensor in local_header("stored", stored / file.name)}
            # by file: loaders also read a copy of a tensor that the index does not name
            if found.keys() == made.keys() and all(
                _is_alike((ours, found[name]), (theirs, made[name])) for name in made
            ):
                alike.add(file.name)
    return frozenset(alike)


def _is_alike(stored: tuple[Reader, TensorHeader], rebuilt: tuple[Reader, TensorHeader]) -> bool:
    first, second = stored[1], rebuilt[1]
    same = [(one.dtype, one.shape, one.shard) for one in (first, second)]
    if same[0] != same[1]:
        return False
    if first.dtype not in MERGEABLE:  # as float32, large integers would be equal to others
        return _content(*stored) == _content(*rebuilt)
    kind = torch_dtypes()[first.dtype]
    return within_tolerance(read_tensor(*rebuilt).to(kind), read_tensor(*stored).to(kind))


def _content(reader: Reader, tensor: TensorHeader) -> bytearray:
    content = bytearray(tensor.n_bytes)
    reader.read(tensor, 0, memoryview(content))
    return content


def _may_be_added(path: str) -> bool:
    """Return whether a file that is not in the lock may be in the folder or repo."""
    hidden = any(part.startswith(".") for part in path.split("/"))
    return path in UNLOCKED or hidden or path.lower().endswith(PICTURES)


def _linked_folders(source: Source) -> Iterator[str]:
    """Links to folders: by them, files of a merge have other names too, which loaders know."""
    for path in sorted(source.folder.rglob("*")) if source.folder else ():
        part = path.relative_to(source.place)
        if path.is_symlink() and path.is_dir() and not is_hidden(part):
            yield part.as_posix()


def _problems(
    file: SourceFile | None, expected: OutputFile, path: str, found: str | None
) -> Iterator[str]:
    if file is None or found is None:
        yield f"{path}: it is missing."
    elif file.size_bytes != expected.n_bytes:
        yield f"{path}: it has {file.size_bytes:,} bytes, the lock says {expected.n_bytes:,}."
    elif found != expected.sha256:
        yield f"{path}: its sha256 is {_short(found)}, the lock says {_short(expected.sha256)}."


def _problem_with_signature(
    source: Source, api: HfApi, found: dict[str, str], public_key: Path
) -> str | None:
    signature = read_small(api, source, SIGNATURE)
    if signature is None:
        return "it is missing, but a key was given"
    others = [file for file in source.files if file.path not in found]
    known = {file.path: _sha256(source, file.path, file.digest, api) for file in others}
    return problem_with(signature, found | known, public_key)


def _sha256(source: Source, path: str, digest: str, api: HfApi) -> str:
    if source.folder:
        return sha256_of(source.folder / path)  # of the bytes, as a remembered digest may be old
    if digest.startswith("sha256:"):
        return digest.removeprefix("sha256:")
    return hashlib.sha256(read_small(api, source, path) or b"").hexdigest()


def _short(sha256: str) -> str:
    return f"{sha256[:12]}…"
