"""Verify: whether the files of a merge are those that its lock says, here or on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from lewis_hub.checkpoint.reader import INDEX
from lewis_hub.errors import OutputError
from lewis_hub.files import sha256_of
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.source import Source
from lewis_hub.progress import Progress
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_file import parse_recipe
from lewis_hub.report.leaderboards import FOLDER as RESULTS
from lewis_hub.report.lock import Lock, OutputFile
from lewis_hub.report.page import FILE as REPORT

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOCK = "lewis/lock.json"
NOTHING = OutputFile("no such file", 0)
TOLD = ("lewis/cost.json", "lewis/gate.json", REPORT, "README.md")  # of one run, not of the merge
UNLOCKED = frozenset({LOCK, *TOLD, ".gitattributes"})


@dataclass(frozen=True)
class Verdict:
    """What was held against the lock.

    Attributes:
        problems: files that are not as the lock says; none means that all are.
        n_files: that were held against it.
    """

    lock: Lock
    problems: tuple[str, ...]
    n_files: int


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


def recipe_of(lock: Lock, source: Source) -> Recipe:
    """The recipe that a lock holds, every source at its commit, without scoring or publishing."""
    kept = {k: v for k, v in lock.recipe.items() if k not in ("evaluate", "publish")}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    return parse_recipe(text, f"{source.pinned}: {LOCK}")


def verify_files(source: Source, lock: Lock, api: HfApi, progress: Progress) -> Verdict:
    """Hold every file against the lock. No weight is downloaded: the Hub tells their digests."""
    problems: list[str] = []
    total = sum(file.n_bytes for file in lock.outputs.values())
    with progress.stage("Verifying", total, "bytes") as advance:
        for path, expected in lock.outputs.items():
            problems += _problems(source, path, expected, api)
            advance(expected.n_bytes)
    problems += [
        f"{file.path}: it is no part of the merge."
        for file in source.files
        if file.path not in (*lock.outputs, *UNLOCKED) and not file.path.startswith(f"{RESULTS}/")
    ]
    return Verdict(lock, tuple(problems), len(lock.outputs))


def compare_weights(lock: Lock, made: Lock) -> tuple[str, ...]:
    """Which weights came out otherwise when the same merge was made again."""
    weights = (".safetensors", INDEX)
    return tuple(
        f"{path}: made again it has sha256 {_short(again.sha256)}, the lock says "
        f"{_short(expected.sha256)}."
        for path, expected in lock.outputs.items()
        if path.endswith(weights)
        and (again := made.outputs.get(path, NOTHING)).sha256 != expected.sha256
    )


def _problems(source: Source, path: str, expected: OutputFile, api: HfApi) -> Iterator[str]:
    file = source.file(path)
    if file is None:
        yield f"{path}: it is missing."
        return
    if file.size_bytes != expected.n_bytes:
        yield f"{path}: it has {file.size_bytes:,} bytes, the lock says {expected.n_bytes:,}."
        return
    found = _sha256(source, path, file.digest, api)
    if found != expected.sha256:
        yield f"{path}: its sha256 is {_short(found)}, the lock says {_short(expected.sha256)}."


def _sha256(source: Source, path: str, digest: str, api: HfApi) -> str:
    if source.folder:
        return sha256_of(source.folder / path)  # not what was remembered: the bytes themselves
    if digest.startswith("sha256:"):
        return digest.removeprefix("sha256:")
    return hashlib.sha256(read_small(api, source, path) or b"").hexdigest()


def _short(sha256: str) -> str:
    return f"{sha256[:12]}…"
