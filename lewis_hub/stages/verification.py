"""Verify: whether the files of a merge are those that its lock says, here or on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from lewis_hub.errors import OutputError
from lewis_hub.evaluate.gate import FILE as GATE
from lewis_hub.files import sha256_of
from lewis_hub.hub.change import SIGNATURE
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.source import Source, SourceFile
from lewis_hub.progress import Progress
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_file import parse_recipe
from lewis_hub.report.changelog import FILE as CHANGELOG
from lewis_hub.report.cost import FILE as COSTS
from lewis_hub.report.lock import FILE as LOCK
from lewis_hub.report.lock import Lock, OutputFile
from lewis_hub.report.mergekit import FILE as MERGEKIT
from lewis_hub.report.page import FILE as REPORT
from lewis_hub.report.provenance import FILE as PROVENANCE
from lewis_hub.report.provenance import is_provenance_of
from lewis_hub.stages.signing import problem_with
from lewis_hub.stages.sources import calibrations

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What only tells of a merge, and pictures: their owner may change them, and nothing loads them.
UNLOCKED = frozenset({LOCK, COSTS, GATE, CHANGELOG, PROVENANCE, REPORT, SIGNATURE, "README.md"})
PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")


@dataclass(frozen=True)
class Verdict:
    """What was held against the lock.

    Attributes:
        problems: files that are not as the lock says; none means that all are.
        n_files: that were held against it.
        signature: whether there is one and, where a key was given, that it holds.
    """

    lock: Lock
    problems: tuple[str, ...]
    n_files: int
    signature: Literal["none", "unchecked", "holds", "broken"]


def read_lock(source: Source, api: HfApi) -> Lock:
    """The lock that a merge left behind.

    Raises:
        OutputError: there is none, or it was changed.
    """
    found = read_small(api, source, LOCK)
    if found is None:
        problem = f"it has no {LOCK}, so it is no merge by lewis-hub."
        raise OutputError(source.pinned, problem, "Name a folder or repo that `merge` made.")
    return Lock.from_json(found.decode("utf-8", errors="replace"), f"{source.pinned}: {LOCK}")


def recipe_of(lock: Lock, source: Source, *, allow_code: bool) -> Recipe:
    """The recipe that a lock holds, every source at its commit, without scoring or publishing.

    Args:
        lock: of the merge.
        source: the merge.
        allow_code: whether task files that came with it may be used: they are code.

    Raises:
        OutputError: it calibrates on such files, and they may not be used or are not here.
    """
    kept = {k: v for k, v in lock.recipe.items() if k not in ("evaluate", "publish")}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    recipe = parse_recipe(text, f"{source.pinned}: {LOCK}")
    if any(one.include for one in calibrations(recipe)) and not (source.folder and allow_code):
        problem = "it was calibrated on task files that came with it, and those are code."
        remedy = "Read lewis/tasks, then verify its folder with `--allow-code-execution`."
        raise OutputError(source.pinned, problem, remedy)
    return recipe.placed_in(source.folder / "lewis") if source.folder else recipe


def verify_files(
    source: Source, lock: Lock, api: HfApi, progress: Progress, public_key: Path | None
) -> Verdict:
    """Hold every file against the lock. No weight is downloaded: the Hub tells their digests.

    Args:
        source: what a merge made.
        lock: its own.
        api: the Hub.
        progress: told how far it is.
        public_key: PEM file; None: a signature is not looked into.

    Raises:
        SignatureError: the key cannot be used.
        ExtraMissingError: there is a key, and model-signing is not installed.
    """
    problems: list[str] = []
    total = sum(file.n_bytes for file in lock.outputs.values())
    found: dict[str, str] = {}
    with progress.stage("Verifying", total, "bytes") as advance:
        for path, expected in lock.outputs.items():
            if file := source.file(path):
                found[path] = _sha256(source, path, file.digest, api)
            problems += _problems(file, expected, path, found.get(path))
            advance(expected.n_bytes)
    problems += [
        f"{file.path}: it is no part of the merge."
        for file in source.files
        if file.path not in lock.outputs and not _may_be_added(file.path)
    ]
    told = read_small(api, source, PROVENANCE)
    if told is None or not is_provenance_of(told.decode("utf-8", "replace"), lock):
        what = "missing" if told is None else "not what the lock says"
        problems.append(f"{PROVENANCE}: it is {what}.")
    if public_key is None:
        return Verdict(lock, tuple(problems), len(lock.outputs), _signature_in(source))
    broken = _problem_with_signature(source, api, found, public_key)
    problems += [f"{SIGNATURE}: {broken}."] if broken else []
    return Verdict(lock, tuple(problems), len(lock.outputs), "broken" if broken else "holds")


def compare_models(lock: Lock, made: Lock) -> tuple[str, ...]:
    """What of a model came out otherwise when the same merge was made again.

    That is all that is loaded: weights, configuration, tokenizer, code. What lies in `lewis/` only
    tells of the merge, and drawings differ from one library to the next.
    """
    told, again = (
        {path: file.sha256 for path, file in one.outputs.items() if _is_loaded(path)}
        for one in (lock, made)
    )
    return tuple(
        f"{path}: made again it has sha256 {_short(again[path])}, the lock says "
        f"{_short(told[path])}."
        if path in told and path in again
        else f"{path}: the merge that was made again {'lacks' if path in told else 'has'} it."
        for path in dict.fromkeys((*told, *again))
        if told.get(path) != again.get(path)
    )


def _is_loaded(path: str) -> bool:
    return not path.startswith("lewis/") and path != MERGEKIT


def _may_be_added(path: str) -> bool:
    """Whether a file that the merge did not make may lie beside it."""
    hidden = any(part.startswith(".") for part in path.split("/"))
    return path in UNLOCKED or hidden or path.lower().endswith(PICTURES)


def _problems(
    file: SourceFile | None, expected: OutputFile, path: str, found: str | None
) -> Iterator[str]:
    if file is None or found is None:
        yield f"{path}: it is missing."
    elif file.size_bytes != expected.n_bytes:
        yield f"{path}: it has {file.size_bytes:,} bytes, the lock says {expected.n_bytes:,}."
    elif found != expected.sha256:
        yield f"{path}: its sha256 is {_short(found)}, the lock says {_short(expected.sha256)}."


def _signature_in(source: Source) -> Literal["none", "unchecked"]:
    return "none" if source.file(SIGNATURE) is None else "unchecked"


def _problem_with_signature(
    source: Source, api: HfApi, found: dict[str, str], public_key: Path
) -> str | None:
    signature = read_small(api, source, SIGNATURE)
    if signature is None:
        return "there is none, and a key was given"
    others = [file for file in source.files if file.path not in found]
    known = {file.path: _sha256(source, file.path, file.digest, api) for file in others}
    return problem_with(signature, found | known, public_key)


def _sha256(source: Source, path: str, digest: str, api: HfApi) -> str:
    if source.folder:
        return sha256_of(source.folder / path)  # not what was remembered: the bytes themselves
    if digest.startswith("sha256:"):
        return digest.removeprefix("sha256:")
    return hashlib.sha256(read_small(api, source, path) or b"").hexdigest()


def _short(sha256: str) -> str:
    return f"{sha256[:12]}…"
