"""A pinned source of weights or rows: the same `Source` always means the same bytes."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RepoType = Literal["model", "dataset"]
PICKLED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")  # as transformers calls them
PICKLED_INDEX = "pytorch_model.bin.index.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")  # of a LoRA, beside or alone


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    `digest` is `sha256:<hex>` (local, or LFS on the Hub) or `git-sha1:<oid>` (small Hub files).
    """

    path: str  # relative, with forward slashes
    size_bytes: int
    digest: str


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

    @property
    def local_folder(self) -> Path | None:
        """The folder with all files of a model, if it is outside of huggingface_hub's cache."""
        return self.converted or self.folder

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
        """The files whose path matches a shell pattern; `*` stays within one folder."""
        return tuple(
            file
            for file in self.files
            if any(
                fnmatch.fnmatchcase(file.path, pattern)
                and file.path.count("/") == pattern.count("/")
                for pattern in patterns
            )
        )

    def size_bytes(self, patterns: Sequence[str]) -> int:
        """The size of the files that match."""
        return sum(file.size_bytes for file in self.matching(patterns))
