"""Read an importance profile from wherever it lies: a file, a folder, a repo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.errors import SourceError
from lewis_hub.guides.importance import ImportanceProfile
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.recipe import ModelReference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PROFILE = "importance.json"
IN_A_MERGE = f"lewis/{PROFILE}"


def read_profile(api: HfApi, name: str) -> ImportanceProfile:
    """The profile in a file, in a folder that `merge` or `importance` made, or in a merge's repo.

    Raises:
        SourceError: there is none.
        ProfileError: the file cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return ImportanceProfile.from_json(path.read_text(encoding="utf-8"), name)
    if path.is_dir():
        found = next((path / p for p in (PROFILE, IN_A_MERGE) if (path / p).is_file()), None)
        if found:
            return ImportanceProfile.from_json(found.read_text(encoding="utf-8"), str(found))
        raise _without(name)
    reference = ModelReference.model_validate(name)
    source = resolve_model(api, reference.name, reference.revision)
    told = read_small(api, source, IN_A_MERGE)
    if told is None:
        raise _without(source.pinned)
    where = f"{source.pinned}: {IN_A_MERGE}"
    return ImportanceProfile.from_json(told.decode("utf-8", errors="replace"), where)


def _without(name: str) -> SourceError:
    remedy = f"Name an {PROFILE}, a merge with a guide that measures, or run "
    remedy += "`lewis-hub importance MODEL --task TASK` first."
    return SourceError(name, f"it has no {PROFILE}", remedy)
