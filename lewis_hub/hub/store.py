"""The embedded Hub's repositories on disk: settings, refs and commits.

``repos/<kind>/<namespace>/<name>/`` holds ``repo.json`` (settings), ``refs.json`` (full ref name ->
commit sha), ``commits/<sha>.json`` (one commit with its whole file list) and ``discussions.json``.
Every file is replaced atomically and a ref moves last, so a killed server restarts on the last
finished commit. Changes take `Store.lock`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lewis_hub.hub.blobs import Blobs, git_oid, lfs_pointer, write_json

Kind = Literal["models", "datasets"]
KINDS: tuple[Kind, ...] = ("models", "datasets")
NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class File:
    """One file of a commit.

    Attributes:
        oid: git's SHA-1 of what git would store: the content, or the LFS pointer.
    """

    sha256: str
    size_bytes: int
    oid: str
    lfs: bool


@dataclass(frozen=True)
class Commit:
    """A commit with its whole file list, by path."""

    sha: str
    parents: tuple[str, ...]
    author: str
    date: str
    title: str
    message: str
    files: Mapping[str, File]


@dataclass(frozen=True)
class Repo:
    """A repository's settings.

    Attributes:
        gated: readers need a grant; "auto" and "manual" as on the Hub.
        granted: users who may read it although it is gated.
    """

    kind: Kind
    namespace: str
    name: str
    created_at: str
    private: bool = False
    gated: Literal[False, "auto", "manual"] = False
    granted: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"


def now() -> str:
    """This moment as the Hub writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def lfs_file(sha256: str, size_bytes: int) -> File:
    """A file that git knows by its pointer."""
    return File(sha256, size_bytes, git_oid(lfs_pointer(sha256, size_bytes)), lfs=True)


class Store:
    """All repositories below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root / "blobs")
        self.lock = threading.RLock()

    def folder(self, repo: Repo) -> Path:
        """Where a repository lies."""
        return self.root / "repos" / repo.kind / repo.namespace / repo.name

    def find(self, kind: Kind, namespace: str, name: str) -> Repo | None:
        """A repository by name; None if there is none, or no such name can be."""
        if not (NAME.fullmatch(namespace) and NAME.fullmatch(name)):
            return None
        try:
            document = read_json(self.root / "repos" / kind / namespace / name / "repo.json")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Repo(**{**document, "granted": tuple(document["granted"])})

    def repos(self, kind: Kind) -> Iterator[Repo]:
        """All repositories of a kind, in order of name."""
        for path in sorted((self.root / "repos" / kind).glob("*/*/repo.json")):
            repo = self.find(kind, path.parent.parent.name, path.parent.name)
            if repo is not None:
                yield repo

    def save(self, repo: Repo) -> None:
        """Write a repository's settings."""
        write_json(self.folder(repo) / "repo.json", asdict(repo))

    def sweep(self, repo: Repo) -> None:
        """Remove what a deletion that was killed may have left in a repository's place."""
        shutil.rmtree(self.folder(repo), ignore_errors=True)

    def delete(self, repo: Repo) -> None:
        """Remove a repository; contents stay, for others may share them."""
        with self.lock:
            (self.folder(repo) / "repo.json").unlink()  # gone at once, the rest can take its time
            shutil.rmtree(self.folder(repo))

    def clear(self) -> None:
        """Remove everything: repositories, contents and unfinished uploads."""
        with self.lock:
            for name in ("repos", "blobs", "uploads", "xet"):
                shutil.rmtree(self.root / name, ignore_errors=True)

    def refs(self, repo: Repo) -> dict[str, str]:
        """Full ref name (``refs/heads/main``) -> commit sha, in order of creation."""
        refs: dict[str, str] = read_json(self.folder(repo) / "refs.json")
        return refs

    def set_ref(self, repo: Repo, ref: str, sha: str | None) -> None:
        """Point a ref at a commit, atomically; None removes it."""
        with self.lock:
            path = self.folder(repo) / "refs.json"
            refs = self.refs(repo) if path.exists() else {}
            if sha is None:
                refs.pop(ref, None)
            else:
                refs[ref] = sha
            write_json(path, refs)

    def find_ref(self, repo: Repo, revision: str) -> str | None:
        """The full name of a branch, tag or pull request; None if there is none."""
        refs = self.refs(repo)
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in refs), None)

    def resolve(self, repo: Repo, revision: str) -> Commit | None:
        """The commit that a branch, tag, full ref or sha stands for."""
        ref = self.find_ref(repo, revision)
        sha = self.refs(repo)[ref] if ref else revision
        path = self.folder(repo) / "commits" / f"{sha}.json"
        if not SHA.fullmatch(sha) or not path.exists():
            return None
        return _commit(sha, read_json(path))

    def add_commit(self, repo: Repo, commit: Commit, ref: str) -> Commit:
        """Write a commit and move a ref to it; its sha is computed here, whatever is given."""
        document = asdict(commit)
        del document["sha"]
        encoded = json.dumps(document, sort_keys=True).encode()
        sha = hashlib.sha1(encoded, usedforsecurity=False).hexdigest()
        with self.lock:
            write_json(self.folder(repo) / "commits" / f"{sha}.json", document)
            self.set_ref(repo, ref, sha)
        return replace(commit, sha=sha)

    def history(self, repo: Repo, commit: Commit) -> Iterator[Commit]:
        """A commit, its first parent, and so on."""
        following: Commit | None = commit
        while following is not None:
            yield following
            parents = following.parents
            following = self.resolve(repo, parents[0]) if parents else None


def read_json(path: Path) -> Any:
    """The document in a JSON file."""
    return json.loads(path.read_text("utf-8"))


def _commit(sha: str, document: dict[str, Any]) -> Commit:
    files = {path: File(**file) for path, file in document.pop("files").items()}
    return Commit(sha=sha, files=files, parents=tuple(document.pop("parents")), **document)
