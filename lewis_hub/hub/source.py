"""A pinned source of weights or rows: the same `Source` always means the same bytes.

Files of a repo are in huggingface_hub's cache, whose layout is huggingface_hub's:
`snapshots/<commit sha>/<path>` links to `blobs/<etag>`, where the etag is the file's sha256 (LFS)
or its git sha1; `refs/<revision>` names a commit sha.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from huggingface_hub import constants
from huggingface_hub.errors import FileMetadataError
from huggingface_hub.file_download import repo_folder_name

from lewis_hub.documents import SURROGATE
from lewis_hub.errors import SourceError
from lewis_hub.files import is_hidden

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile, RepoSibling

RepoType = Literal["model", "dataset"]
Access = Literal["public", "gated", "private"]
SINGLE = "model.safetensors"
MODULES = "modules.json"  # of sentence-transformers
EMBEDDER = "config_sentence_transformers.json"
MODULE_FOLDER = re.compile(r"[0-9]_\w+", re.ASCII)  # as sentence-transformers names them
PICKLED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")  # as transformers calls them
PICKLED_INDEX = "pytorch_model.bin.index.json"
LICENCES = tuple(  # texts that many licences want to be passed on
    f"{name}{suffix}"
    for name in ("LICENSE", "LICENCE", "License", "license", "NOTICE", "Notice", "USE_POLICY")
    for suffix in ("", ".txt", ".md")
)
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")  # of a LoRA, beside or alone
COMMIT_SHA = re.compile(r"[0-9a-f]{40}")
RESTORE = "Restore it, then run again."
FETCH_AGAIN = "Run the same command again: it fetches the file again."
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|git-sha1:[0-9a-f]{40}")


@contextmanager
def local_reading(name: str) -> Iterator[None]:
    """Inside the block files of a local source are read, which others may remove or replace.

    Raises:
        SourceError: a file is not there any more, or is a folder.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        problem = f"`{Path(error.filename or name).name}` changed while it was read"
        raise SourceError(name, problem, RESTORE) from None


def state_of(path: Path) -> str:
    """The size and times of a file, which change with each write."""
    seen = path.stat()
    return f"{seen.st_size} {seen.st_mtime_ns} {seen.st_ctime_ns}"


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: str  # relative, with forward slashes
    size_bytes: int
    digest: str  # `sha256:<hex>` (local, or LFS on the Hub), `git-sha1:<oid>` (small Hub files)
    state: str = field(default="", compare=False)  # of a local file, as `state_of` says


@dataclass(frozen=True)
class Source:
    """A repo at one commit, or a local folder at one content."""

    name: str  # as the user wrote it
    repo_type: RepoType
    revision: str | None  # as the user wrote it: a branch, tag, commit sha, or None
    commit_sha: str  # 40 hex digits on the Hub; `sha256:<hex>` over a folder's names and contents
    files: tuple[SourceFile, ...]
    folder: Path | None  # a local folder, or a local dataset's one file; None: a repo on the Hub
    converted: Path | None = None  # the model with its pickled weights as safetensors
    # what the index names, read only if other files than `model*.safetensors` may be weights, too
    shards: frozenset[str] = field(default=frozenset(), compare=False)
    # who may read the repo; None: unknown, as offline, or a folder. It does not change the bytes.
    access: Access | None = field(default=None, compare=False)

    @property
    def local_folder(self) -> Path | None:
        """The folder with all files of a model, if it is outside of huggingface_hub's cache."""
        return self.converted or self.folder

    @property
    def snapshot(self) -> Path:
        """The folder in which the cache stores this commit; it may hold some of its files."""
        return cache_folder(self.name, self.repo_type) / "snapshots" / self.commit_sha

    @property
    def place(self) -> Path:
        """The folder with its files on this disk, which may hold others too."""
        return self.local_folder or self.snapshot

    @property
    def is_pickled(self) -> bool:
        """Whether all its weights are pickles."""
        return bool(self.matching(PICKLED)) and not self.matching(("*.safetensors",))

    @property
    def is_adapter(self) -> bool:
        """Whether its only weights are those of a LoRA adapter."""
        weights = tuple(file.path for file in self.matching(("*.safetensors",)))
        return weights == ADAPTERS[1:] and self.file(ADAPTERS[0]) is not None

    @property
    def pinned(self) -> str:
        """Its name with the revision pinned: `repo@<commit sha>`, or the folder as written."""
        return self.name if self.folder else f"{self.name}@{self.commit_sha}"

    def file(self, path: str) -> SourceFile | None:
        """The file at `path`, if the source has it."""
        return next((file for file in self.files if file.path == path), None)

    def matching(self, patterns: Sequence[str]) -> tuple[SourceFile, ...]:
        """The files whose path matches a shell pattern; `*` stays within one folder.

        As in a shell, it stands for no hidden file, which a lock would not name either.
        """
        return tuple(
            file
            for file in self.files
            if any(
                fnmatch.fnmatchcase(file.path, pattern)
                and file.path.count("/") == pattern.count("/")
                for pattern in patterns
            )
            and not is_hidden(PurePosixPath(file.path))  # last: there may be very many files
        )

    def size_bytes(self, patterns: Sequence[str]) -> int:
        """The size of the files that match."""
        return sum(file.size_bytes for file in self.matching(patterns))


def listed_file(file: RepoSibling | RepoFile) -> SourceFile:
    """A file of a repo as the Hub lists it.

    Raises:
        FileMetadataError: its name, size or digest is none.
    """
    path, size_bytes = file.rfilename, file.size or 0
    if not isinstance(path, str) or not path or "\0" in path or SURROGATE.search(path):
        raise FileMetadataError(f"{path!r} is not the name of a file")
    if not isinstance(size_bytes, int) or size_bytes < 0:
        raise FileMetadataError(f"{path}: {size_bytes!r} is not a size")
    return SourceFile(path, size_bytes, listed_digest(file))


def listed_digest(file: RepoSibling | RepoFile) -> str:
    """The digest of a file as the Hub lists it.

    Raises:
        FileMetadataError: it is not one. Files of the cache are named by it.
    """
    digest = f"sha256:{file.lfs.sha256}" if file.lfs else f"git-sha1:{file.blob_id}"
    if not DIGEST.fullmatch(digest):
        raise FileMetadataError(f"{file.rfilename}: {digest!r} is not a digest")
    return digest


def listed_sha(sha: object) -> str:
    """The sha of a commit as the Hub names it; a `FileMetadataError` if it is not one."""
    if not isinstance(sha, str) or not COMMIT_SHA.fullmatch(sha):
        raise FileMetadataError(f"{sha!r} is not the sha of a commit")
    return sha


def digest_like(digest: str, content: bytes) -> str:
    """The digest of a content, of the same kind as another digest."""
    if digest.startswith("sha256:"):
        return f"sha256:{hashlib.sha256(content).hexdigest()}"
    blob = b"blob %d\0" % len(content) + content
    return f"git-sha1:{hashlib.sha1(blob, usedforsecurity=False).hexdigest()}"


def cache_root() -> Path:
    """The folder of the cache; it may not exist yet."""
    return Path(constants.HF_HUB_CACHE)


def cache_folder(repo: str, repo_type: str) -> Path:
    """The folder in which the cache stores a repo."""
    return cache_root() / repo_folder_name(repo_id=repo, repo_type=repo_type)


def cached_sha(repo: str, repo_type: str, revision: str | None) -> str | None:
    """The commit sha that a revision resolved to last time, if the cache has that commit."""
    wanted = revision or constants.DEFAULT_REVISION
    folder = cache_folder(repo, repo_type)
    ref = folder / "refs" / wanted
    is_known = ref.is_relative_to(folder) and ".." not in wanted and ref.is_file()
    sha = wanted if COMMIT_SHA.fullmatch(wanted) else _sha_in(ref) if is_known else ""
    return sha if sha and (folder / "snapshots" / sha).is_dir() else None


def _sha_in(ref: Path) -> str:
    return ref.read_text(encoding="ascii")


def remember_revision(repo: str, repo_type: str, revision: str | None, commit_sha: str) -> None:
    """Store the commit sha of a revision, so that it can be resolved offline."""
    name = revision or constants.DEFAULT_REVISION
    refs = cache_folder(repo, repo_type) / "refs"
    ref = refs / name
    if COMMIT_SHA.fullmatch(name) or ".." in name or not ref.is_relative_to(refs):
        return
    if ref.is_file() and _sha_in(ref) == commit_sha:
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_bytes(commit_sha.encode())


def cached_revisions(repo: str, repo_type: str) -> list[str]:
    """Branches, tags and commit shas whose files are in the cache."""
    folder = cache_folder(repo, repo_type)
    snapshots = {path.name for path in folder.glob("snapshots/*")}
    refs = [path for path in sorted(folder.glob("refs/**/*")) if path.is_file()]
    named = {ref.relative_to(folder / "refs").as_posix(): _sha_in(ref) for ref in refs}
    unnamed = snapshots - set(named.values())
    return [name for name, sha in named.items() if sha in snapshots] + sorted(unnamed)
