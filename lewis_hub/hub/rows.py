"""Rows of a pinned dataset, read by `datasets`; only the selected rows are decoded."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants

from lewis_hub.display import shortened
from lewis_hub.errors import LewisHubError, SourceError
from lewis_hub.files import is_hidden, raise_if_of_the_disk, require_inside
from lewis_hub.hub.answers import LISTED
from lewis_hub.hub.cached_rows import (
    DATASET_INFO,
    name_by_content,
    of_named_files,
    require_as_written,
)
from lewis_hub.hub.changes import require_unchanged
from lewis_hub.hub.dataset_cards import require_own_files
from lewis_hub.hub.failures import LONGEST_PART, HubRepo, hub_failures, retry
from lewis_hub.hub.fetch import fetch_files
from lewis_hub.hub.origins import asking
from lewis_hub.hub.resolve import require_listed, resolve_dataset
from lewis_hub.hub.source import Source
from lewis_hub.limits import TooMuchError, limited
from lewis_hub.system import limited_memory, memory_bytes

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
READERS = ("json", "parquet", "csv", "text", "arrow", "cache")  # of `datasets`
# None: whatever is asked for; else only tables, and of these repos only the files that are listed
TABLES_OF: ContextVar[tuple[Source, ...] | None] = ContextVar("TABLES_OF", default=None)
SCRIPTS = "Dataset scripts are no longer supported"
NO_ROWS = ("its files have no rows", "Use another.")
# `datasets` unpacks it to the disk, without a limit, and by its path it has it for ever
ARCHIVE = (
    "is an archive, or is compressed though its name does not say so; .jsonl, .jsonl.gz, .csv and "
    ".parquet are read"
)
ROWS_AT_ONCE = 1000
MAX_MEMORY_BYTES = max(4 << 30, (memory_bytes() or 0) // 2)  # that it takes to read tables
MAX_EXPANSION = 200  # bytes of rows for a byte of their files
MAX_SMALL_BYTES = 1 << 30  # of rows, whatever the size of their files
CELL_BYTES = 16  # of a value in a row: in a table it may have no byte
VALUE_BYTES = 32  # of a value in a list, a mapping or JSON of a row, in Python
EMPTY_BYTES = 100  # of one that has no byte in a table
EMPTY = ("null", "bool")
TEXTS = ("string", "large_string")
JSON_MARKS = (",", ":", "[", "{")  # as `documents.count_values` counts them
MAX_ARRAY = 100_000  # values of a row that has a shape
MAX_TABLE_S = 300  # of one table: 10 MB of lines, or a whole list of JSON
MAX_DEPTH = 1000  # of JSON
# where a line, or a block of Arrow, begins
NULL_ROW = re.compile(rb"(?:^|\r|\xef\xbb\xbf)[ \t]*+null", re.MULTILINE)
# brackets and null outside of texts, one without an end too; to go back would be quadratic
OUTSIDE_OF_TEXTS = re.compile(
    rb'(?:[^"\[\]{}n]++|n(?!ull)|"[^"\\\r\n]*+(?:\\[^\r\n][^"\\\r\n]*+)*+"?)*+'
    rb"([\[\]{}]|null|\Z)"
)
STEPS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
ONLY_SPLIT = "train"  # the split of a single file in `datasets`


@dataclass(frozen=True)
class Rows:
    """The rows of one split, on disk and memory-mapped."""

    source: str  # the dataset, pinned
    columns: tuple[str, ...]
    table: Any  # datasets.Dataset

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at `indices`, in that order.

        Raises:
            SourceError: a row is not what the card of its dataset says.
        """
        try:
            found: list[dict[str, Any]] = self.table.select(list(indices)).to_list()
        except (ValueError, TypeError, ArithmeticError, LookupError, MemoryError) as error:
            said = " ".join(str(error).split())[:300]
            problem = f"its rows could not be read ({said})"
            raise SourceError(self.source, problem, "Repair the file it names.") from error
        return found


def load_rows(api: HfApi, source: Source, config: str | None, split: str) -> Rows:
    """Load one split of a dataset at its pinned commit; rows keep the order of the files.

    A split may be a slice such as `train[:100]`. `datasets` takes the endpoint from HF_ENDPOINT.

    Raises:
        SourceError: no such configuration or split, no readable data files, or no rows.
    """
    datasets = library()
    require_own_files(api, source)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # a failure becomes one SourceError
    call = _dataset_call(source, config, split)
    with _dataset_failures(api, source, config, split), only_pinned(api, source):
        table = retry(lambda: datasets.load_dataset(**call, split=split, token=api.token))
    if not len(table):
        raise SourceError(source.pinned, f"split `{split}` has no rows", "Name another split.")
    return Rows(source.pinned, tuple(table.column_names), table)


@contextmanager
def only_pinned(api: HfApi, source: Source) -> Iterator[None]:
    """Inside the block `datasets` reads tables, and of a source only what is pinned.

    Raises:
        SourceError: in the block or at its end: a file is another one.
    """
    with only_tables(source):
        yield
    if source.folder:
        require_unchanged(source)
        return
    try:
        require_listed(api, source)
    except SourceError:
        shutil.rmtree(commit_cache(source.commit_sha), ignore_errors=True)
        raise


@contextmanager
def at_commit(repo: str, commit_sha: str, *, token: str | bool | None = None) -> Iterator[None]:
    """Inside the block `datasets` has the cache of a commit, which is the revision that is loaded.

    Raises:
        SourceError: as `only_pinned`.
    """
    config: Any = library().config
    before, own = config.HF_DATASETS_CACHE, commit_cache(commit_sha)
    api = HfApi(token=token)
    with only_pinned(api, resolve_dataset(api, repo, commit_sha)):
        config.HF_DATASETS_CACHE = Path(own)
        try:
            yield
        finally:
            config.HF_DATASETS_CACHE = before


def library() -> Any:
    """`datasets`, which tells only the Hub the names of what it loads.

    It would count downloads at another host, those of a private Hub too.
    """
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    _limit_readers()
    return datasets


@contextmanager
def only_tables(*sources: Source) -> Iterator[None]:
    """Inside the block `datasets` refuses what is no table, or far larger than its file.

    Of the repos of `sources` it reads the files at their commits. Only the Hub gets a token.
    """
    library()
    listed = dict(LISTED.get() or {})
    for source in sources:
        if source.folder is None:
            address = httpx2.URL(HubRepo.of(HfApi(), source).file_url("")).raw_path
            listed[address] = {file.path: file for file in source.files}
    tables = TABLES_OF.set((*(TABLES_OF.get() or ()), *sources))
    files = LISTED.set(listed)
    try:
        with asking(constants.ENDPOINT):  # `datasets` asks no other one
            yield
    finally:
        TABLES_OF.reset(tables)
        LISTED.reset(files)


@cache
def _limit_readers() -> None:
    """Let `datasets` read tables only, in limited memory and up to a limit, if it is asked to.

    The files of a repo choose what reads them. HDF5 may name any file of this machine, and an
    archive may hold pickles. What is refused is a ValueError.
    """
    import datasets.builder

    name_by_content()
    _refuse_archives()
    every: Any = datasets.builder.DatasetBuilder
    prepare, stream = every.download_and_prepare, every.as_streaming_dataset
    read = every.as_dataset

    def prepare_tables(self: Any, *args: Any, **options: Any) -> None:
        sources = TABLES_OF.get()
        if sources is None:
            prepare(self, *args, **options)
            return
        reader = type(self).__module__.rpartition(".")[2]
        if reader not in READERS:
            problem = f"they are read by `{reader}`; tables are read by {', '.join(READERS)}"
            raise ValueError(problem)
        for source in sources:
            _fetch_rows(source, self)
        if os.path.isdir(self.base_path or ""):  # noqa: PTH112 - it may be an address
            _require_visible(Path(self.base_path).resolve(), self.config.data_files or {})
        with of_named_files(self), limited_memory(MAX_MEMORY_BYTES):
            prepare(self, *args, **options)
        self.info.features = _undecoded(self.info.features)

    def read_as_written(self: Any, *args: Any, **options: Any) -> Any:
        if TABLES_OF.get() is not None:
            require_as_written(Path(self.cache_dir))
        return read(self, *args, **options)

    def stream_nothing(self: Any, *args: Any, **options: Any) -> Any:
        if TABLES_OF.get() is not None:
            raise ValueError("they would be read while they come: without `streaming` they are")
        return stream(self, *args, **options)

    every.download_and_prepare, every.as_streaming_dataset = prepare_tables, stream_nothing
    every.as_dataset = read_as_written
    for reader in READERS:
        module: Any = import_module(f"datasets.packaged_modules.{reader}.{reader}")
        builder = getattr(module, reader.capitalize())
        builder._generate_tables = _limited(builder._generate_tables)
        if reader == "json":
            module.paj = _guarded(module.paj, module.pa.ArrowInvalid)


def _refuse_archives() -> None:
    manager: Any = import_module("datasets.utils.extract").ExtractManager
    unpack = manager.extract

    def unpack_no_tables(self: Any, path: str, *args: Any, **options: Any) -> Any:
        if TABLES_OF.get() is not None and self.extractor.infer_extractor_format(path):
            raise ValueError(f"{Path(path).name} {ARCHIVE}")
        return unpack(self, path, *args, **options)

    manager.extract = unpack_no_tables


def _guarded(arrow_json: Any, refused: type[Exception]) -> Any:
    """The reader of JSON of Arrow, which refuses what would end the process with SIGSEGV.

    `datasets` reads what is refused in another way, which has errors of its own.
    """

    def read_json(file: io.BytesIO, read_options: Any) -> Any:
        text, depth = file.getvalue(), 0
        for found in OUTSIDE_OF_TEXTS.finditer(text):
            depth = max(0, depth + STEPS.get(found[1], 0))
            if depth > MAX_DEPTH:
                raise refused(f"JSON has more than {MAX_DEPTH:,} levels")
            if not depth and found[1] == b"null":
                raise refused("a row is null")
        if NULL_ROW.search(text):  # inside a row: no block may begin with it
            read_options.block_size = len(text)
        return arrow_json.read_json(file, read_options)

    return SimpleNamespace(read_json=read_json, ReadOptions=arrow_json.ReadOptions)


def _limited(generate: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A method of a reader that yields tables, each in limited time, and refuses too many bytes.

    Equal rows take no room: 20 million fit into 250 kB of parquet, and in JSON a row that is
    empty has a place in each column. Columns of mixed types take time that grows with the cube of
    their number.
    """

    def generate_some(self: Any, **options: Any) -> Iterator[Any]:
        if TABLES_OF.get() is None:
            yield from generate(self, **options)
            return
        self.config.batch_size = ROWS_AT_ONCE  # of parquet, whatever its card says
        files = {*map(Path, options.get("base_files") or options["files"])}  # before decompression
        stored = sum(file.stat().st_size for file in files if file.is_file())
        left = max(MAX_SMALL_BYTES, MAX_EXPANSION * stored)
        tables = generate(self, **options)
        while found := _next(tables):
            left -= found[1].nbytes + CELL_BYTES * found[1].num_rows * found[1].num_columns
            left -= inner_bytes(found[1], left)
            if left < 0:
                raise ValueError(f"its rows have over {MAX_EXPANSION} times the bytes of the file")
            yield found

    return generate_some


def inner_bytes(table: Any, limit: int) -> int:
    """What values in lists, mappings and JSON of a table take in Python, counted until `limit`.

    JSON is a text in a table, which a card may declare so, too: each text is taken for it.
    """
    count: Any = import_module("pyarrow.compute").count_substring
    n_bytes, left = 0, [chunk for column in table.columns for chunk in column.chunks]
    while left and n_bytes <= limit:
        array = left.pop()
        if hasattr(array, "storage"):  # of a type of `datasets`
            left.append(array.storage)
        elif hasattr(array, "dictionary"):
            left.append(array.dictionary)
        elif hasattr(array, "field"):  # of a struct
            n_bytes += VALUE_BYTES * len(array) * array.type.num_fields
            left += array.flatten()
        elif hasattr(array, "keys"):  # of a map, which `datasets` refuses
            continue
        elif hasattr(array, "value_lengths"):
            per_value = EMPTY_BYTES if str(array.type.value_type) in EMPTY else VALUE_BYTES
            n_bytes += per_value * (array.value_lengths().sum().as_py() or 0)
            if n_bytes <= limit:
                left.append(array.flatten())
        elif str(array.type) in TEXTS:
            counts = (count(array, mark).sum().as_py() or 0 for mark in JSON_MARKS)
            n_bytes += VALUE_BYTES * sum(counts)
    return n_bytes


def _next(tables: Iterator[Any]) -> Any:
    """The next table with its key, or None."""
    try:
        with limited(MAX_TABLE_S, "one of its tables"):
            return next(tables, None)
    except TooMuchError as error:
        raise ValueError(str(error)) from None


def _undecoded(features: Any) -> Any:
    """Features whose rows keep images and the like as they are.

    To decode them would open what rows name: any file of this machine, and any host.

    Raises:
        ValueError: rows are arrays of a very large shape, of which an empty one has all values.
    """
    from datasets import Json
    from datasets.features.features import _visit

    def leave(feature: Any) -> Any:
        shape = getattr(feature, "shape", ())
        if (n_values := math.prod(filter(None, shape))) > MAX_ARRAY:  # None: as many as a row has
            raise ValueError(f"an array has {n_values:,} values, the limit is {MAX_ARRAY:,}")
        is_media = getattr(feature, "decode", False) and not isinstance(feature, Json)
        return replace(feature, decode=False) if is_media else feature

    return features and _visit(features, leave)


def _fetch_rows(source: Source, builder: Any) -> None:
    """Download what a builder of `datasets` will read of a repo, unless its rows are in the cache.

    `datasets` would take as many bytes as are answered. Addresses of other files than the repo had
    when it was resolved are refused.
    """
    api, repo = HfApi(token=builder.token), f"hf://datasets/{source.name}@"
    listed = {f"{repo}{source.commit_sha}/{file.path}": file for file in source.files}
    addresses = chain.from_iterable((builder.config.data_files or {}).values())
    named = [address for address in addresses if address.startswith(repo)]
    if others := [address for address in named if address not in listed]:
        raise HubRepo.of(api, source).another_file(others[0].removeprefix(repo))
    if not Path(builder.cache_dir, DATASET_INFO).is_file():
        fetch_files(api, source, [listed[address] for address in named])


def _require_visible(folder: Path, data_files: Mapping[str, Sequence[str]]) -> None:
    """Refuse files of a folder that are not pinned: hidden ones, and what leads out of it."""
    for named in map(Path, chain.from_iterable(data_files.values())):
        path = named.parent.resolve() / named.name  # a link may lead to the folder
        if not path.is_relative_to(folder) or is_hidden(path.relative_to(folder)):
            problem = f"its card names {path}, which is hidden or not in the folder"
            raise SourceError(str(folder), problem, "Name visible files in its card.")
        require_inside(folder, path, SourceError)


@dataclass(frozen=True)
class DatasetDescription:
    """Splits and columns of one configuration; empty if the dataset does not state them."""

    splits: tuple[str, ...]
    columns: tuple[str, ...]


def describe_dataset(
    api: HfApi, source: Source, config: str | None, split: str
) -> DatasetDescription:
    """Read splits and columns from a dataset's card and file names, without reading a row.

    Raises:
        SourceError: no such configuration or split, or no data files.
    """
    datasets = library()
    require_own_files(api, source)
    datasets.logging.set_verbosity(logging.CRITICAL)
    call = _dataset_call(source, config, split)
    if source.folder and source.folder.is_file():
        return DatasetDescription((ONLY_SPLIT,), ())
    with _dataset_failures(api, source, config, split), only_tables(source):
        builder = retry(lambda: datasets.load_dataset_builder(**call, token=api.token))
        splits = tuple(builder.info.splits or builder.config.data_files or ())
        columns = tuple(builder.info.features or ())
        if splits and re.split(r"\W", split)[0] not in splits:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(splits)}.")
    return DatasetDescription(splits, columns)


def _dataset_call(source: Source, config: str | None, split: str) -> dict[str, Any]:
    if source.folder is None:
        cache = commit_cache(source.commit_sha)
        pinned = {"revision": source.commit_sha, "cache_dir": cache}
        return {"path": source.name, "name": config, **pinned}
    if source.folder.is_dir():
        return {"path": str(source.folder.resolve()), "name": config}
    if config is not None:
        remedy = "Leave out `config`."
        raise SourceError(source.name, f"a file has no configuration `{config}`", remedy)
    if re.split(r"\W", split)[0] != ONLY_SPLIT:
        remedy = f"Leave out `split`, or write `{ONLY_SPLIT}`, which is the whole file."
        raise SourceError(source.name, f"a file has no split `{split}`", remedy)
    return {"path": LOADERS[source.folder.suffix], "data_files": str(source.folder.resolve())}


def commit_cache(commit_sha: str) -> str:
    """The cache folder of a commit of this Hub.

    Each commit has its own: if a repo cannot be read, `datasets` uses any commit in its cache. So
    has each Hub, since nothing says whether rows are those that another one lists.
    """
    from datasets.config import HF_DATASETS_CACHE

    endpoint = hashlib.sha256(constants.ENDPOINT.encode()).hexdigest()[:12]
    return str(Path(HF_DATASETS_CACHE) / "lewis-hub" / endpoint / commit_sha)


@contextmanager
def _dataset_failures(api: HfApi, source: Source, config: str | None, split: str) -> Iterator[None]:
    """Turn errors of `datasets`, which only differ in their text, into a `SourceError`."""
    try:
        with hub_failures(HubRepo.of(api, source)):
            yield
    except StopIteration:  # the error of `datasets` for a file without rows
        raise SourceError(source.pinned, *NO_ROWS) from None
    except LewisHubError:
        raise
    except Exception as error:  # of any class, where cards and files have values of other types
        raise_if_of_the_disk(error)  # of the cache that rows are written to
        raise _unloadable(source, config, split, error) from error


def _unloadable(source: Source, config: str | None, split: str, error: Exception) -> SourceError:
    text = " ".join(str(error).split())
    choices = ", ".join(re.findall(r"'([^']+)'", text[text.rfind("[") : text.rfind("]")]))
    if "Config name is missing" in text:
        choices = ", ".join(re.findall(r"'([^']+)'", text[text.find("[") : text.find("]")]))
        problem, remedy = "it has several configurations", f"Set `config` to one of {choices}."
    elif "BuilderConfig" in text and "not found" in text:
        problem, remedy = f"it has no configuration `{config}`", f"It has: {choices}."
    elif "Unknown split" in text:
        problem, remedy = f"it has no split `{split}`", f"It has: {choices}."
    elif "corresponds to no data" in text:
        problem, remedy = NO_ROWS
    elif SCRIPTS in text:
        problem = "it is a loading script, and those are not run"
        remedy = "Look on its page for a branch with .parquet files and write it after `@`"
        remedy += " (often `refs/convert/parquet`), or use another."
    elif "data files found" in text or isinstance(error, FileNotFoundError):
        problem = "it has no readable data files, or one that it names is missing"
        remedy = "Use one with .jsonl, .parquet or .csv files."
    elif isinstance(error.__cause__, httpx2.HTTPError) or isinstance(error, ConnectionError):
        problem = f"it could not be fetched ({text[:200]})"
        remedy = "Check the network and HF_ENDPOINT, then run the same command again."
    else:
        cause = error.__cause__ or error
        said = " ".join(str(cause).split())[:300] or type(cause).__name__
        problem, remedy = f"its rows could not be read ({said})", "Repair the file it names."
        if isinstance(cause, MemoryError) or "out of memory" in said:
            remedy = f"Reading them takes over {MAX_MEMORY_BYTES >> 30} GiB of memory: use .jsonl "
            remedy += "or .parquet files with shorter rows."
    return SourceError(source.pinned, problem, shortened(remedy, LONGEST_PART))
