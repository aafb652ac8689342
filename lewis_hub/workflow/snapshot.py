"""A recipe as it was run, with the user's task files: both become part of the merge."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lewis_hub.files import sha256_of
from lewis_hub.report.lock import OutputFile


@dataclass(frozen=True)
class RecipeSnapshot:
    """A recipe as it was run."""

    # plain data with all defaults and pinned revisions. It can be read as a recipe beside the
    # copied task files.
    document: Mapping[str, Any]
    task_files: Mapping[str, Path]  # the user's files that its tasks use, by path beside it

    def to_yaml(self) -> str:
        """Return the document as text."""
        return str(yaml.safe_dump(self.document, sort_keys=False, allow_unicode=True, width=100))

    @property
    def outputs(self) -> dict[str, OutputFile]:
        """Return what a lock states of the task files."""
        return {
            f"lewis/{path}": OutputFile(sha256_of(file), file.stat().st_size)
            for path, file in self.task_files.items()
        }

    def copy_tasks(self, own: Path) -> list[str]:
        """Copy the user's task files into a merge's folder; return their paths in it."""
        for path, file in self.task_files.items():
            (own / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, own / path)
        return [*self.task_files]
