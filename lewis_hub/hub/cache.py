"""The files of a repo in huggingface_hub's cache on this machine.

The layout is huggingface_hub's: `snapshots/<commit sha>/<path>` links to `blobs/<etag>`, where the
etag is the file's sha256 (LFS) or its git sha1; `refs/<revision>` names a commit sha.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

COMMIT_SHA = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def cache_root() -> Path:
    """The folder of the cache; it may not exist yet."""
    return Path(constants.HF_HUB_CACHE)


def cache_folder(repo: str, repo_type: str) -> Path:
    """The folder in which the cache stores a repo."""
    return cache_root() / repo_folder_name(repo_id=repo, repo_type=repo_type)


def snapshot_folder(repo: str, repo_type: str, commit_sha: str) -> Path:
    """The folder in which the cache stores a commit; it may hold some of its files or none."""
    return cache_folder(repo, repo_type) / "snapshots" / commit_sha


def cached_sha(repo: str, repo_type: str, revision: str | None) -> str | None:
    """The commit sha that a revision resolved to last time, if the cache has that commit."""
    wanted = revision or constants.DEFAULT_REVISION
    ref = cache_folder(repo, repo_type) / "refs" / wanted
    sha = wanted if COMMIT_SHA.fullmatch(wanted) else ref.read_text() if ref.is_file() else ""
    return sha if sha and snapshot_folder(repo, repo_type, sha).is_dir() else None


def remember_revision(repo: str, repo_type: str, revision: str | None, commit_sha: str) -> None:
    """Store the commit sha of a revision, so that it can be resolved offline."""
    name = revision or constants.DEFAULT_REVISION
    ref = cache_folder(repo, repo_type) / "refs" / name
    if (
        COMMIT_SHA.fullmatch(name)
        or ".." in name
        or (ref.is_file() and ref.read_text() == commit_sha)
    ):
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit_sha)


def cached_revisions(repo: str, repo_type: str) -> list[str]:
    """Branches, tags and commit shas whose files are in the cache."""
    folder = cache_folder(repo, repo_type)
    snapshots = {path.name for path in folder.glob("snapshots/*")}
    refs = [path for path in sorted(folder.glob("refs/**/*")) if path.is_file()]
    named = {str(ref.relative_to(folder / "refs")): ref.read_text() for ref in refs}
    unnamed = snapshots - set(named.values())
    return [name for name, sha in named.items() if sha in snapshots] + sorted(unnamed)
