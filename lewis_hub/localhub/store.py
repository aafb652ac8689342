"""The embedded Hub's repositories: kept in memory and written to disk with every change.

``repos/<kind>/<namespace>/<name>.json`` holds a repository with its refs, commits and pull
requests, ``blobs/`` the contents of files. Files are replaced atomically, so a killed server
restarts with the last finished change. Only the server's thread changes the store: it needs no
locks.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, Literal

from pydantic import TypeAdapter

Kind = Literal["models", "datasets"]
MAX_TEXT_BYTES = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class File:
    """One file of a commit; `oid` is git's SHA-1 of its content, or of its LFS pointer."""

    sha256: str
    size_bytes: int
    oid: str
    lfs: bool

    @property
    def lfs_entry(self) -> dict[str, Any]:
        """The part of an answer about an LFS file; empty for another."""
        n_pointer = len(lfs_pointer(self.sha256, self.size_bytes))
        entry = {"oid": self.sha256, "sha256": self.sha256, "size": self.size_bytes}
        return {"lfs": {**entry, "pointerSize": n_pointer}} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    """A commit with its whole file list, by path."""

    sha: str
    parent: str | None
    author: str
    date: str
    title: str
    message: str
    files: dict[str, File]


@dataclass(frozen=True)
class PullRequest:
    """A pull request against main; its branch is ``refs/pr/<number>``."""

    number: int
    title: str
    description: str
    author: str
    created_at: str


@dataclass
class Repo:
    """A repository; `refs` has full names such as ``refs/heads/main``, in order of creation."""

    kind: Kind
    namespace: str
    name: str
    created_at: str
    private: bool = False
    gated: Literal[False, "auto", "manual"] = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    @property
    def id(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @property
    def noun(self) -> str:
        """``model`` or ``dataset``."""
        return self.kind.removesuffix("s")

    @property
    def page(self) -> str:
        """The path of its page on the Hub."""
        return f"/datasets/{self.id}" if self.kind == "datasets" else f"/{self.id}"

    def find_ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request; None if there is none."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str) -> Commit | None:
        """The commit of a branch, tag, full ref or sha; None if there is none."""
        ref = self.find_ref(revision)
        return self.commits.get(self.refs[ref] if ref else revision)

    def history(self, commit: Commit) -> Iterator[Commit]:
        """A commit, its parent, and so on."""
        yield commit
        while commit.parent:
            commit = self.commits[commit.parent]
            yield commit


REPO = TypeAdapter(Repo)


@dataclass(frozen=True)
class Blobs:
    """A folder of file contents, each stored once under the SHA-256 of its bytes."""

    folder: Path

    def path(self, sha256: str) -> Path:
        """Where the content with this digest is stored, or would be."""
        return self.folder / sha256[:2] / sha256

    def size_bytes(self, sha256: str) -> int | None:
        """Size of a stored content; None if it is not stored."""
        path = self.path(sha256)
        return path.stat().st_size if path.exists() else None

    def add(self, content: bytes) -> str:
        """Store bytes; returns their SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        with replacing(self.path(sha256)) as file:
            file.write(content)
        return sha256


class Store:
    """All repositories of a Hub, and the contents of their files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root / "blobs")
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind and id
        for path in sorted((root / "repos").glob("*/*/*.json")):  # a namespace may end so, too
            repo = REPO.validate_json(path.read_bytes())
            self.repos[repo.kind, repo.id] = repo

    def find(self, kind: str, repo_id: str) -> Repo | None:
        """A repository by name."""
        return self.repos.get((kind, repo_id))

    def save(self, repo: Repo) -> None:
        """Add a repository, or write its changes to disk."""
        self.repos[repo.kind, repo.id] = repo
        with replacing(self.root / "repos" / repo.kind / f"{repo.id}.json") as file:
            file.write(REPO.dump_json(repo))

    def add_commit(self, repo: Repo, commit: Commit, ref: str) -> Commit:
        """Add a commit and move a ref to it; its sha is computed here, whatever is given."""
        encoded = json.dumps(asdict(replace(commit, sha="")), sort_keys=True).encode()
        commit = replace(commit, sha=short_digest(encoded))
        repo.commits[commit.sha] = commit
        repo.refs[ref] = commit.sha
        self.save(repo)
        return commit

    def read_text(self, commit: Commit, path: str) -> str:
        """A text file of a commit, at most its first MAX_TEXT_BYTES; empty if it has none."""
        file = commit.files.get(path)
        if file is None:
            return ""
        with self.blobs.path(file.sha256).open("rb") as stored:
            return stored.read(MAX_TEXT_BYTES).decode("utf-8", "replace")

    def clear(self) -> None:
        """Remove everything: repositories, contents and uploads."""
        self.repos.clear()
        for name in ("repos", "blobs", "xet"):
            shutil.rmtree(self.root / name, ignore_errors=True)


def files_below(paths: Iterable[str]) -> dict[str, list[str]]:
    """Folder -> the paths below it."""
    found: dict[str, list[str]] = {}
    for path in paths:
        folder = path.rpartition("/")[0]
        while folder:
            found.setdefault(folder, []).append(path)
            folder = folder.rpartition("/")[0]
    return found


def git_file(content: bytes, sha256: str) -> File:
    """A stored content as a file that git holds itself."""
    header = f"blob {len(content)}\0".encode()
    return File(sha256, len(content), short_digest(header + content), lfs=False)


def lfs_file(sha256: str, size_bytes: int) -> File:
    """A stored content as a file of which git holds the pointer."""
    return File(sha256, size_bytes, git_file(lfs_pointer(sha256, size_bytes), "").oid, lfs=True)


def lfs_pointer(sha256: str, size_bytes: int) -> bytes:
    """The small text that git stores in place of a large file."""
    version = "version https://git-lfs.github.com/spec/v1"
    return f"{version}\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


def short_digest(content: bytes) -> str:
    """The SHA-1 of some bytes, as 40 hex digits."""
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def object_id(text: str) -> str:
    """24 hex digits, which the Hub uses as keys."""
    return short_digest(text.encode())[:24]


def now() -> str:
    """The present time as the Hub writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=".partial-", delete=False) as file:
        try:
            yield file
            file.close()  # Windows renames and deletes no open file
            Path(file.name).replace(path)
        except BaseException:
            file.close()
            Path(file.name).unlink(missing_ok=True)
            raise
