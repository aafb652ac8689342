"""Where huggingface_hub's cache has a file: its blob, named by its digest, and a link to it."""

from __future__ import annotations

import os
import shutil
import threading
from typing import TYPE_CHECKING

from huggingface_hub.file_download import are_symlinks_supported

from lewis_hub.files import sha256_of, size_of
from lewis_hub.hub.digests import digests_of
from lewis_hub.hub.source import Source, SourceFile, cache_folder, cache_root, digest_like

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lewis_hub.hub.failures import HubRepo

MAX_SMALL_BYTES = 100_000_000  # of a file that is read whole, such as a card or a tokenizer


def blob_path(repo: str, repo_type: str, file: SourceFile) -> Path:
    """The file that holds the bytes of a file, in whatever commits it is."""
    return cache_folder(repo, repo_type) / "blobs" / file.digest.partition(":")[2]


def partial_path(blob: Path) -> Path:
    """The file that holds the bytes of a blob until the download is complete."""
    return blob.with_name(f"{blob.name}.partial")


def digest_of(part: Path, file: SourceFile) -> str:
    """The digest of a downloaded file, of the kind that the Hub lists for it."""
    if file.digest.startswith("sha256:"):
        return f"sha256:{sha256_of(part)}"
    return digest_like(file.digest, part.read_bytes())  # git stores small files only


def has_digest(blob: Path, file: SourceFile) -> bool:
    """Whether a file of the cache is the one that the Hub lists; a small one is not read if not."""
    is_large = file.digest.startswith("sha256:")
    return (is_large or size_of(blob) <= MAX_SMALL_BYTES) and digest_of(blob, file) == file.digest


def damaged_files(folder: Path, files: Iterable[SourceFile]) -> list[SourceFile]:
    """Files that a folder of the cache has with other bytes than their digests say.

    Their names do not tell: other programs write into the cache, too, and a disk may lose bits.
    """
    cached = [file for file in files if (folder / file.path).is_file()]
    large = [file for file in cached if file.digest.startswith("sha256:")]
    paths = [folder / file.path for file in large]
    digests = dict(zip(large, digests_of(paths), strict=True))
    same = {file for file, digest in digests.items() if digest == file.digest}
    small = (file for file in cached if file not in digests)
    same |= {file for file in small if has_digest(folder / file.path, file)}
    return [file for file in cached if file not in same]


def remove(source: Source, files: Iterable[SourceFile]) -> None:
    """Remove files of a repo from the cache; what a link to elsewhere names stays."""
    blobs = cache_folder(source.name, source.repo_type) / "blobs"
    for path in (source.snapshot / file.path for file in files):
        blob = blobs / path.readlink().name if path.is_symlink() else path
        path.unlink(missing_ok=True)  # another run was faster
        blob.unlink(missing_ok=True)


def link(hub_repo: HubRepo, file: SourceFile) -> Path:
    """Let the cache have a blob at its path in the commit, as huggingface_hub does.

    That would name the blob by the ETag that it is answered, and fetch it again under that name.
    """
    blob, path = blob_path(hub_repo.name, hub_repo.repo_type, file), snapshot_path(hub_repo, file)
    if path.exists() and path.samefile(blob):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # in one step, as another run may read the path at any moment; and it removes unknown links
    made = blob.with_name(f".{blob.name}.{os.getpid()}-{threading.get_ident()}")
    if are_symlinks_supported(cache_root()):
        made.unlink(missing_ok=True)  # of a process of the same number that was killed
        made.symlink_to(os.path.relpath(blob, path.parent))
    else:
        shutil.copyfile(blob, made)
    made.replace(path)
    return path


def snapshot_path(hub_repo: HubRepo, file: SourceFile) -> Path:
    """The path of a file in the snapshot of the commit."""
    commit = str(hub_repo.revision)
    return cache_folder(hub_repo.name, hub_repo.repo_type) / "snapshots" / commit / file.path
