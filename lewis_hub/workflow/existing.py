"""What stands already: whether this merge is there, in the output folder or in the target repo."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.errors import LewisHubError, OutputError
from lewis_hub.evaluate.scores import Scores
from lewis_hub.files import write_whole
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.source import Source, SourceFile
from lewis_hub.hub.target import Target
from lewis_hub.report import difference
from lewis_hub.report.lock import FILE as LOCK
from lewis_hub.report.lock import Lock

if TYPE_CHECKING:
    from huggingface_hub import HfApi


IMPORTANCE = "lewis/importance.json"
SCORES = "lewis/scores.json"
LATER = ("evaluate", "publish")  # what is asked for beside the bytes


@dataclass(frozen=True)
class PreviousMerge:
    """The merge that lies in the target repo now.

    Attributes:
        source: the repo at the commit that was looked at.
        changes: what its changelog tells; none where it cannot be read.
    """

    source: Source
    lock: Lock
    changes: tuple[difference.ChangelogEntry, ...]

    def holds(self, planned: Lock) -> bool:
        """Whether it is the planned merge, and every file is there as far as the Hub tells."""
        found = {file.path: file.digest for file in self.source.files}
        return same_merge(self.lock, planned) and all(
            path in found and found[path].startswith(("git-sha1:", f"sha256:{file.sha256}"))
            for path, file in self.lock.outputs.items()
        )

    def read(self, path: str, api: HfApi) -> str | None:
        """A small file of it as text; None where it is not there or not as the lock says."""
        content = read_small(api, self.source, path)
        expected = self.lock.outputs.get(path)
        if content is None or expected is None:
            return None
        if hashlib.sha256(content).hexdigest() != expected.sha256:
            return None
        return content.decode("utf-8", errors="replace")


def previous_merge(target: Target, api: HfApi) -> PreviousMerge | None:
    """The merge that a push would replace: lock and changelog are read, no weights.

    A repo without a lock that can be read has none.
    """
    if target.head is None or LOCK not in target.digests:
        return None
    files = tuple(SourceFile(path, 0, digest) for path, digest in target.digests.items())
    source = Source(target.repo, "model", None, target.head, files, None)
    try:
        lock = Lock.from_json((read_small(api, source, LOCK) or b"").decode("utf-8", "replace"))
    except OutputError:
        return None
    try:
        told = (read_small(api, source, difference.FILE) or b"").decode("utf-8", "replace")
        changes = difference.from_json(told)
    except OutputError:
        changes = ()
    return PreviousMerge(source, lock, changes)


def same_merge(found: Lock, planned: Lock) -> bool:
    """Whether a finished merge is the planned one, scored and published as the recipe asks."""
    return found.digest == planned.digest and all(
        planned.recipe.get(key) in (None, found.recipe.get(key)) for key in LATER
    )


def without_scores(planned: Lock) -> Lock:
    """Return the lock of the same merge, if it is not scored."""
    recipe = {key: value for key, value in planned.recipe.items() if key != "evaluate"}
    return replace(planned, recipe=recipe)


def published_scores(previous: PreviousMerge | None, api: HfApi) -> Scores | None:
    """The scores of the merge in the target repo."""
    told = previous.read(SCORES, api) if previous else None
    return Scores.from_json(told) if told else None


def published_importance(previous: PreviousMerge | None, api: HfApi, scratch: Path) -> list[Path]:
    """A file with what the merge in the target repo measured; none where it measured nothing."""
    told = previous.read(IMPORTANCE, api) if previous else None
    if told is None:
        return []
    file = scratch / "published-importance.json"
    write_whole(file, told)
    return [file]


def lock_in(folder: Path) -> Lock | None:
    """The lock of a folder; None where it has none that can be read."""
    try:
        return Lock.from_json((folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, LewisHubError):
        return None


def is_this_merge(output: Path, planned: Lock) -> bool:
    """Whether a folder holds this very merge, scored as the recipe asks."""
    found = lock_in(output)
    return found is not None and same_merge(found, planned)


def read_scores(output: Path) -> Scores | None:
    """The scores of a finished merge, where it was scored."""
    file = output / SCORES
    return Scores.from_json(file.read_text(encoding="utf-8")) if file.exists() else None
