"""What a push would change: the folder beside what lies in the repo, by digest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from lewis_hub.hub.digests import digests_of, git_sha1_of
from lewis_hub.hub.failures import Asked, hub_failures
from lewis_hub.hub.retries import persist
from lewis_hub.hub.target import Target, look, read_text

Additions = Mapping[str, CommitOperationAdd]

LOCK = "lewis/lock.json"
SIGNATURE = "model.sig"  # of a former merge: it says nothing of this one
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True)
class Change:
    """What one commit does: from `target` to the folder, and to what was sent ahead of it."""

    target: Target
    files: Mapping[str, Path]  # all of the folder: path in the repo -> file
    sent: Additions  # on the Hub already, in no commit yet, and no longer here
    digests: Mapping[str, str]  # of all of them
    stale: Sequence[str]  # what a former merge left and this one lacks

    @property
    def added(self) -> list[str]:
        """Paths that are new or have other bytes."""
        there = self.target.digests
        return [path for path in self.digests if there.get(path) != self.digests[path]]

    def done_in(self, target: Target) -> bool:
        """Whether a repo holds just this already."""
        same = all(self._equal(path, target.digests.get(path)) for path in self.digests)
        return same and not any(path in target.digests for path in self.stale)

    def _equal(self, path: str, there: str | None) -> bool:
        hashed = self.digests[path].startswith("sha256:") and path in self.files
        if there and there.startswith("git-sha1:") and hashed:
            return there == git_sha1_of(self.files[path])
        return there == self.digests[path]


def compare(asked: Asked, target: Target, files: Mapping[str, Path], sent: Additions) -> Change:
    """Find what differs; a file that the Hub keeps in git is compared by its git sha1."""
    in_git = [path for path in files if target.digests.get(path, "").startswith("git-sha1:")]
    others = [path for path in files if path not in in_git]
    digests = dict(zip(others, digests_of([files[path] for path in others]), strict=True))
    digests |= {path: git_sha1_of(files[path]) for path in in_git}
    digests |= {path: f"sha256:{one.upload_info.sha256.hex()}" for path, one in sent.items()}
    ours = {path for path in target.digests if WEIGHTS.fullmatch(path) or path == SIGNATURE}
    ours |= _left_by_former_merge(asked, target) & set(target.digests)
    return Change(target, files, sent, digests, sorted(ours - set(digests)))


def open_pull_request(asked: Asked, change: Change) -> tuple[str, str] | None:
    """The address and commit sha of an open pull request that makes just this change."""
    for url, proposed in open_pull_requests(asked):
        if change.done_in(proposed):
            return url, str(proposed.head)
    return None


def open_pull_requests(asked: Asked) -> Iterator[tuple[str, Target]]:
    """The address of each open pull request, and what the repo would hold with it."""
    with hub_failures(asked):
        pull_requests = persist(
            lambda: list(
                asked.api.get_repo_discussions(
                    asked.repo, discussion_type="pull_request", discussion_status="open"
                )
            )
        )
    for one in pull_requests:
        yield one.url, look(asked, f"refs/pr/{one.num}")


def _left_by_former_merge(asked: Asked, target: Target) -> set[str]:
    """The files that the merge now on the Hub says it left there."""
    try:
        lock = json.loads(read_text(asked, target, LOCK) or "")
    except ValueError:
        return set()
    outputs = lock.get("outputs") if isinstance(lock, dict) else None
    return set(outputs) if isinstance(outputs, dict) else set()
