"""Resolves a repo and revision, or a folder, to a pinned `Source`.

From the Hub only names, sizes and digests are read, and an index where these leave open which files
are weights; the files of a local folder are hashed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from lewis_hub.display import Progress
from lewis_hub.errors import SourceError
from lewis_hub.files import path_of, starts_like_path, visible_files
from lewis_hub.hub.cache import damaged_files, remove
from lewis_hub.hub.digests import content_sha, digests_of, git_sha1_of, remember_digests
from lewis_hub.hub.facts import quantised_from
from lewis_hub.hub.failures import HubRepo, call_hub, hub_failures, retry
from lewis_hub.hub.fetch import with_shards
from lewis_hub.hub.source import (
    ADAPTERS,
    FETCH_AGAIN,
    Access,
    RepoType,
    Source,
    SourceFile,
    cache_folder,
    cached_sha,
    listed_file,
    listed_sha,
    local_reading,
    remember_revision,
    state_of,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile, RepoSibling


MAX_SIBLINGS = 1000  # of so many files the Hub may leave out some, where it describes a repo
MAX_FILES = 250_000  # of a repo: each takes memory, and its name is compared with patterns
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
PATTERN = re.compile(r"[*?[]|::")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
ALLOW = (
    "\nWith `--allow-pickle` torch reads it without running its code, but a flaw in that reader "
    "would let its author run code here: allow it for authors that you trust."
)


def resolve_model(
    api: HfApi, name: str, revision: str | None = None, *, allow_pickle: bool = False
) -> Source:
    """Pin a model with safetensors weights, or a LoRA adapter.

    A name that exists here or looks like a path is a folder, which has no revision. With
    `allow_pickle` the weights may all be pickled.

    Raises:
        SourceError: it cannot be found, may not be read, or has no safetensors weights.
    """
    path = _local_path(name, revision)
    source = _folder(name, path) if path else _repo(HubRepo(api, name, "model", revision))
    if not (allow_pickle and source.is_pickled):
        _require_weights(api, source)
    return with_shards(api, source)


def read_local_folders(names: Iterable[str], progress: Progress) -> None:
    """Hash those of the models that are folders here, with progress, and store the digests.

    `resolve_model` needs them, and tells what is wrong with a name or a folder.
    """
    with suppress(SourceError, OSError):
        folders = [path for name in dict.fromkeys(names) if (path := path_of(name)).is_dir()]
        files = [file for folder in folders for file in visible_files(folder, SourceError)]
        remember_digests(files, progress)


def resolve_dataset(api: HfApi, name: str, revision: str | None = None) -> Source:
    """Pin a dataset: a repo, a folder, or one .jsonl, .json, .parquet or .csv file.

    Raises:
        SourceError: it cannot be found or may not be read.
    """
    path = _local_path(name, revision)
    if path is None:
        return _repo(HubRepo(api, name, "dataset", revision))
    if PATTERN.search(str(path.resolve())):
        problem = "its path has one of `*?[` or `::`, which `datasets` takes for a pattern"
        raise SourceError(name, problem, "Rename the file, or the folder that it is in.")
    if path.is_dir():
        return _folder(name, path, repo_type="dataset")
    if not path.is_file():
        raise SourceError(name, "this is a FIFO, a socket or a device", "Name a file.")
    if path.suffix not in DATA_SUFFIXES:
        remedy = f"Give a {', '.join(DATA_SUFFIXES)} file, a folder of them, or a dataset's repo."
        raise SourceError(name, f"`{path.suffix}` files are not read as rows", remedy)
    files = _hashed([path], path.parent)
    if not files[0].size_bytes:
        raise SourceError(name, "the file is empty", "Write one row per line into it.")
    return Source(name, "dataset", None, _content_sha(files), files, path)


def is_path(written: str) -> bool:
    """Whether a name can only be a path, by its first letter, slashes or ending.

    With a revision, a name that ends like a file is a repo: `me/rows.json@main`. A revision may
    have slashes: `me/rows@refs/convert/parquet`.
    """
    is_file = Path(written).suffix in DATA_SUFFIXES
    has_folders = written.partition("@")[0].count("/") > 1
    return is_file or starts_like_path(written) or has_folders


def missing_path_error(written: str, places: Iterable[Path]) -> SourceError:
    """The error for a path that does not exist; it names all paths that were tried."""
    looked_at = " and ".join(dict.fromkeys(str(place.absolute()) for place in places))
    problem = f"no such file or folder: looked for {looked_at}"
    return SourceError(written, problem, "Check the path; a repo is written owner/name.")


def _local_path(name: str, revision: str | None) -> Path | None:
    path = path_of(name)
    if path.exists():
        return path
    if is_path(f"{name}@{revision}" if revision else name):
        raise missing_path_error(name, [path])
    return None


def _folder(name: str, path: Path, repo_type: RepoType = "model") -> Source:
    if not path.is_dir():
        raise SourceError(name, "this is a file, not a folder", "Name the folder it is in.")
    with local_reading(name):
        files = _hashed(visible_files(path, SourceError), path)
    if not files:
        raise SourceError(name, "the folder is empty", "Check the path.")
    return Source(name, repo_type, None, _content_sha(files), files, path)


def _hashed(paths: Sequence[Path], root: Path) -> tuple[SourceFile, ...]:
    states = [*map(state_of, paths)]  # before they are read: a later write changes them
    return tuple(
        SourceFile(path.relative_to(root).as_posix(), path.stat().st_size, digest, state)
        for path, digest, state in zip(paths, digests_of(paths), states, strict=True)
    )


def _content_sha(files: Sequence[SourceFile]) -> str:
    return content_sha((file.path, file.digest) for file in files)


def _repo(hub_repo: HubRepo) -> Source:
    try:
        validate_repo_id(hub_repo.name)
    except HFValidationError:
        raise SourceError(
            hub_repo.name,
            "this is neither an existing folder nor the name of a repo",
            "Write owner/name (letters, digits, `-`, `_`, `.`), or the path of a folder.",
        ) from None
    if is_offline_mode():
        return _from_cache(hub_repo)
    api, name, repo_type = hub_repo.api, hub_repo.name, hub_repo.repo_type
    info = call_hub(
        hub_repo,
        lambda: api.repo_info(
            name,
            repo_type=repo_type,
            revision=hub_repo.revision,
            files_metadata=True,
            timeout=30,
        ),
    )
    with hub_failures(hub_repo):
        sha = listed_sha(info.sha)
        files = listed_files(hub_repo, sha, getattr(info, "siblings", None) or ())
    _forget_others(hub_repo, cache_folder(name, repo_type) / "snapshots" / sha, files)
    remember_revision(name, repo_type, hub_repo.revision, sha)
    access: Access = "private" if getattr(info, "private", False) else "public"
    if getattr(info, "gated", False):  # anyone may list its files, but not read them
        call_hub(hub_repo, lambda: api.auth_check(name, repo_type=repo_type))
        access = "gated"
    return Source(name, repo_type, hub_repo.revision, sha, files, None, access=access)


def listed_files(
    hub_repo: HubRepo, sha: str, siblings: Sequence[RepoSibling]
) -> tuple[SourceFile, ...]:
    """The files of a commit, of which the description of a repo may have some only.

    Raises:
        SourceError, PublishError: there are too many.
    """
    found: Iterable[RepoSibling | RepoFile] = siblings
    if len(siblings) >= MAX_SIBLINGS:
        found = retry(lambda: _tree(hub_repo, sha))
    files = map(listed_file, found)
    return tuple(file for file in files if _is_below(PurePath(file.path)))


def _tree(hub_repo: HubRepo, sha: str) -> list[RepoFile]:
    """All files of a commit, page by page."""
    from huggingface_hub.hf_api import RepoFile

    entries = hub_repo.api.list_repo_tree(
        hub_repo.name, recursive=True, revision=sha, repo_type=hub_repo.repo_type
    )
    listed = list(islice(entries, MAX_FILES + 1))
    if len(listed) > MAX_FILES:
        problem = f"it has more than {MAX_FILES:,} files and folders"
        raise hub_repo.failed(problem, "Use a repo, or a folder, with only the files that count.")
    files = (entry for entry in listed if isinstance(entry, RepoFile))
    return sorted(files, key=lambda file: file.path)


def _is_below(path: PurePath) -> bool:
    """Whether a path stays below the folder that it is in, as this system reads it."""
    return ".." not in path.parts and not path.anchor


def _forget_others(hub_repo: HubRepo, snapshot: Path, files: Iterable[SourceFile]) -> None:
    """Remove from the cache what is in the place of a file of this commit and is another one.

    Hubs share the cache: another one may have claimed the same commit, also with more files, which
    transformers would read. Only links are removed that the commit does not have.
    """
    digests = {snapshot / file.path: file.digest for file in files}
    for path in snapshot.rglob("*"):
        expected = digests.get(path, "")
        if not path.is_file() or not (expected or path.is_symlink()):
            continue
        found = _cached_digest(path)
        if expected.startswith("git-sha1:") and found.startswith("sha256:"):  # it is no link
            found = git_sha1_of(path)
        if found == expected:
            continue
        try:
            path.unlink()
        except OSError as error:
            problem = f"{path} is another file than {hub_repo.api.endpoint} lists"
            remedy = f"Delete it ({error.strerror}), or set HF_HUB_CACHE to another folder."
            raise hub_repo.failed(problem, remedy) from None


def require_listed(api: HfApi, source: Source) -> None:
    """Refuse files of a repo that `datasets` fetched, if they are not those that the Hub lists.

    It compares no digests, and what it fetches is named as an answer says.

    Raises:
        SourceError: a file is another one; it is not in the cache any more.
    """
    if others := damaged_files(source.snapshot, source.files):
        remove(source, others)
        hub_repo = HubRepo.of(api, source)
        problem = f"`{others[0].path}` is another file than {hub_repo.api.endpoint} lists"
        raise hub_repo.failed(problem, FETCH_AGAIN)


def _from_cache(hub_repo: HubRepo) -> Source:
    sha = cached_sha(hub_repo.name, hub_repo.repo_type, hub_repo.revision)
    if sha is None:
        with hub_failures(hub_repo):
            raise OfflineModeIsEnabled
    source = Source(hub_repo.name, hub_repo.repo_type, hub_repo.revision, sha, (), None)
    folder = source.snapshot
    files = (
        SourceFile(path.relative_to(folder).as_posix(), path.stat().st_size, _cached_digest(path))
        for path in visible_files(folder, SourceError)
    )
    return replace(source, files=tuple(files))


def _cached_digest(path: Path) -> str:
    """The digest that names a file of the cache.

    Its blob may be a link in turn: to the store that the cache has for files from Xet.
    """
    etag = path.readlink().name if path.is_symlink() else ""
    if not ETAG.fullmatch(etag):  # a cache without symbolic links
        return digests_of([path])[0]
    return f"git-sha1:{etag}" if len(etag) == 40 else f"sha256:{etag}"


def _require_weights(api: HfApi, source: Source) -> None:
    names = [file.path for file in source.files if "/" not in file.path]
    weights = [file.path for file in source.matching(("*.safetensors",))]
    if source.is_adapter or [name for name in weights if name not in ADAPTERS]:
        return
    if is_offline_mode() and source.folder is None:
        with hub_failures(HubRepo(api, source.name, "model", source.revision)):
            raise OfflineModeIsEnabled
    kind = "folder" if source.folder else "repo"
    if any(name in ADAPTERS for name in names):
        problem = f"this is a LoRA adapter without {' and '.join(sorted({*ADAPTERS} - {*names}))}"
        remedy = "Save it again with peft: `save_pretrained(FOLDER)` writes both files."
    elif any(name.endswith(PICKLES) for name in names):
        problem = f"this {kind} has pickled weights only, and reading those can run code"
        remedy = "Only safetensors are read. Convert it: load it in transformers, then"
        remedy += " `save_pretrained(FOLDER)`, and use FOLDER; or ask its author for safetensors."
        remedy += ALLOW if source.is_pickled else ""
    elif any(file.path.endswith(".gguf") for file in source.files):
        problem = f"this {kind} has GGUF weights only"
        remedy = "Use the safetensors model that they were quantised from"
        parent = quantised_from(api, source)
        remedy += f": its card names {parent}." if parent else "."
    else:
        problem = f"this {kind} has no .safetensors file"
        remedy = "A model needs model.safetensors, or shards and their index, beside config.json."
    raise SourceError(source.pinned, problem, remedy)
