"""The files of an embedding model, in a folder or still on the Hub, as its checks read them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi

from lewis_hub.documents import read_json
from lewis_hub.hub.fetch import SIDECAR_FILES, read_small
from lewis_hub.hub.source import ADAPTERS, PICKLED, SINGLE, Source

CONFIGURATION = "config.json"  # and what ends with it
WEIGHTS, PICKLE = ".safetensors", "pytorch_model.bin"


@dataclass(frozen=True)
class ModelFiles:
    """The names and sizes of a model's files, and how to read a small one."""

    where: str  # the folder or repo, for messages
    sizes: Mapping[str, int]  # path with forward slashes -> bytes
    read: Callable[[str], bytes | None]  # the content; None: it has no such file

    def document(self, path: str) -> Mapping[str, Any]:
        """The mapping in a JSON file; empty if there is none.

        Raises:
            ValueError: it is not JSON.
        """
        content = self.read(path)
        found = read_json(content) if content is not None else {}
        return found if isinstance(found, dict) else {}

    def configurations(self) -> Iterator[str]:
        """The paths of its configurations, in order."""
        yield from sorted(path for path in self.sizes if path.endswith(CONFIGURATION))

    def stored_bytes(self, folder: str | None = None) -> int:
        """The size of its weights in safetensors; of a folder only those in it."""
        return self._size(WEIGHTS, folder)

    def json_bytes(self, folder: str) -> int:
        """The size of the JSON files in a folder: settings and tokenizer."""
        return self._size(".json", folder)

    def _size(self, end: str, folder: str | None) -> int:
        return sum(
            size
            for path, size in self.sizes.items()
            if path.endswith(end) and folder in (None, folder_of(path))
        )

    def has_weights(self, folder: str) -> bool:
        """Whether a folder has any, pickled ones too."""
        return any(
            folder == folder_of(path) and path.endswith((WEIGHTS, PICKLE)) for path in self.sizes
        )


def folder_of(path: str) -> str:
    """The folder of a path; empty for that of the model."""
    return normal(str(PurePosixPath(path).parent))


def normal(path: str) -> str:
    """A path as the keys of `sizes` have it; empty for the folder of the model."""
    found = str(PurePosixPath(path))
    return "" if found == "." else found


def in_folder(folder: Path) -> ModelFiles:
    """The files in a folder; hidden ones, and those of links, too."""
    sizes = {
        (Path(place) / name).relative_to(folder).as_posix(): (Path(place) / name).stat().st_size
        for place, _, names in os.walk(folder, followlinks=False)
        for name in names
        if (Path(place) / name).exists()
    }

    def read(path: str) -> bytes | None:
        file = folder / path
        return file.read_bytes() if file.is_file() else None

    return ModelFiles(str(folder), sizes, read)


def of_source(api: HfApi, source: Source) -> ModelFiles:
    """The files of a pinned source; of a repo, only those that are fetched to score it are read.

    Pickled weights of its model count as safetensors: they are converted first.
    """
    used = source.files if source.folder else source.matching(SIDECAR_FILES)
    read = {file.path for file in used} - {*ADAPTERS}
    sizes = {
        file.path: file.size_bytes
        for file in source.files
        if file.path in read or not file.path.endswith(CONFIGURATION)
    }
    sizes.pop(PICKLE, None)
    if source.is_pickled:
        sizes[SINGLE] = source.size_bytes(PICKLED)
    return ModelFiles(source.name, sizes, partial(read_small, api, source))
