"""Limits on answers: how long they may be silent, how slowly arrive, how large a lookup may be.

What the first request of a call asks for decides; a redirect cannot make a file of a lookup.
"""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urljoin

import httpx2

from lewis_hub.documents import MAX_JSON_VALUES, DocumentError, count_values, read_json
from lewis_hub.hub.origins import is_asked, place

if TYPE_CHECKING:
    from lewis_hub.hub.source import SourceFile

MIN_BYTES_PER_S = 1024  # a slower answer is given up
SPEED_AFTER_S = 30.0  # the speed is measured over so long
LONGEST_SILENCE_S = 60.0  # before an answer, and between its pieces
LONGEST_WORK_S = 300.0  # before the answer to a request for work, such as a commit
MAX_LOOKUP_BYTES = 64 << 20  # of an answer that is not a file, decompressed
MAX_LIST_BYTES = 4 * MAX_LOOKUP_BYTES  # of all pages of a list: 250,000 files have 1 kB each
MAX_OBJECTS = 600_000  # in an answer, and in all pages of a list: 250,000 files have two each
MAX_LINE_BYTES = 16 << 20  # of a line of a log
COMPRESSION = "gzip"  # the only one that lookups ask for
PIECE_BYTES = 1 << 16  # decompressed at a time
PAUSE_DIGITS = 9  # of the seconds that an answer asks for: 30 years
LONG_PAUSE = re.compile(rf"\d{{{PAUSE_DIGITS},}}")
MAX_PARTS = 10_000  # that an upload of one file is cut into: more are not possible in S3
MAX_PAGES = 1000  # of a list, such as that of a repo's files
# of a file that huggingface_hub downloads itself, in this context; None: what it announces
FILE_BYTES: ContextVar[int | None] = ContextVar("FILE_BYTES", default=None)
PURPOSE = "lewis_hub.purpose"  # of a request: the key of its note
LOOKUP = re.compile(
    rb"/api/(models|datasets|spaces|jobs|scheduled-jobs|buckets|repos|whoami|organizations|users"
    rb"|agent-harnesses)"  # which huggingface_hub asks for once a day
)
AT_COMMIT = re.compile(rb"/resolve/([0-9a-f]{40})/")
PLAIN_TAG = re.compile(r"(?!\.\.?$)[^/\\:\x00]+")
BATCH = re.compile(rb"\.git/info/lfs/objects/batch(\?|$)")  # where files are uploaded to
LOG = re.compile(rb"/api/jobs/[^/?]+/[^/?]+/logs(\?|$)")

# `checked`: of a file, by who checks its length; `log`: the lines of a Job, which come as they are
# printed
Purpose = Literal["lookup", "file", "checked", "log"]


def note_purpose(request: httpx2.Request) -> None:
    """Note what a request asks for, unless it is the redirection of one that has a note."""
    purpose = request.extensions.setdefault(PURPOSE, _purpose(request))
    if purpose == "file":
        request.headers["Accept-Encoding"] = "identity"


@dataclass
class Received:
    """What one or more answers to lookups have together, decompressed."""

    n_bytes: int = 0
    n_objects: int = 0

    def add(self, piece: bytes) -> None:
        """Count a piece of an answer."""
        self.n_bytes += len(piece)
        self.n_objects += piece.count(b"{") + piece.count(b"[")

    @property
    def exceeded(self) -> str | None:
        """The limit of a list that is exceeded, if one is."""
        if self.n_bytes > MAX_LIST_BYTES:
            return f"{MAX_LIST_BYTES >> 20} MiB"
        return f"{MAX_OBJECTS:,} objects and lists" if self.n_objects > MAX_OBJECTS else None


# In this context: who counts the lookups, beside the list that each of them belongs to
COUNTED: ContextVar[Received | None] = ContextVar("COUNTED", default=None)


@contextmanager
def counted(received: Received) -> Iterator[None]:
    """Count what the lookups inside the block receive: some lists name what is asked for next."""
    before = COUNTED.set(received)
    try:
        yield
    finally:
        COUNTED.reset(before)


@dataclass(frozen=True)
class _Page:
    """A page of a list: how many are before it, and what all of them have together."""

    number: int = 0
    received: Received = field(default_factory=Received)


PAGES: dict[str, _Page] = {}  # by the address that the page before names
PAGE = "lewis_hub.page"  # of a request: the key of its page


def limit_pages(request: httpx2.Request) -> None:
    """Refuse the next page of a list that does not end: huggingface_hub asks for what it is told.

    Raises:
        DecodingError: it has too many pages, or it goes on where no Hub is.
    """
    # a redirection of a page has its note, and no address of a page
    if str(request.url) in PAGES and not is_asked(request.url):
        raise httpx2.DecodingError(f"a list goes on elsewhere, at {place(request.url)}")
    page = request.extensions.get(PAGE) or PAGES.get(str(request.url)) or _Page()
    request.extensions[PAGE] = page
    if page.number > MAX_PAGES:
        raise httpx2.DecodingError(f"a list has more than {MAX_PAGES:,} pages")


def note_next_page(answer: httpx2.Response) -> None:
    """Note the page that an answer names."""
    following = answer.links.get("next", {}).get("url")
    if following:
        if len(PAGES) > 100 * MAX_PAGES:
            PAGES.clear()
        address = str(httpx2.URL(following))  # as it is asked for: huggingface_hub joins nothing
        page = _page(answer)
        PAGES[address] = _Page(page.number + 1, page.received)


def _page(answer: httpx2.Response) -> _Page:
    page: _Page = answer.request.extensions.get(PAGE) or _Page()
    return page


def limit_silence(request: httpx2.Request) -> None:
    """Limit how long a request waits, where its caller sets no limit: huggingface_hub sets few."""
    longest_s = LONGEST_WORK_S if request.method == "POST" else LONGEST_SILENCE_S
    limits = dict.fromkeys(("connect", "pool"), LONGEST_SILENCE_S)
    limits |= dict.fromkeys(("read", "write"), longest_s)
    asked = request.extensions.get("timeout") or {}
    set_by_caller = {kind: limit for kind, limit in asked.items() if limit is not None}
    request.extensions["timeout"] = limits | set_by_caller


# In this context, of some datasets: address of the files of a commit -> its files by path
LISTED: ContextVar[Mapping[bytes, Mapping[str, SourceFile]] | None] = ContextVar(
    "LISTED", default=None
)
TREE = re.compile(rb"/api(/datasets/[^/]+(?:/[^/]+)?)/tree/([0-9a-f]{40})(?:/(.*))?")


def hide_unlisted(answer: httpx2.Response) -> None:
    """Let a dataset have the files that it was resolved with, and no others, whatever is answered.

    `datasets` lists them again, and asks for cards and the like by name.
    """
    path, _, query = answer.request.url.raw_path.partition(b"?")
    listed, is_missing = LISTED.get(), answer.status_code == httpx2.codes.NOT_FOUND
    if not listed or (answer.is_error and not is_missing):
        return
    if found := TREE.search(path):
        files = listed.get(path[: found.start()] + found[1] + b"/resolve/" + found[2] + b"/")
        if files is not None:
            folder = unquote((found[3] or b"").decode())
            _answer_tree(answer, _tree(files, folder, recursive=b"recursive=true" in query.lower()))
    elif found := AT_COMMIT.search(path):
        repo, commit = path[: found.start(1)], path[: found.end()]
        is_known = any(address.startswith(repo) for address in listed)
        if is_known and unquote(path[found.end() :].decode()) not in listed.get(commit, ()):
            _hide(answer)


def _hide(answer: httpx2.Response) -> None:
    answer.status_code = httpx2.codes.NOT_FOUND
    answer.headers["X-Error-Code"] = "EntryNotFound"


def _answer_tree(answer: httpx2.Response, entries: Sequence[Mapping[str, object]]) -> None:
    if not entries:
        _hide(answer)
        return
    assert isinstance(answer.stream, httpx2.SyncByteStream)
    content = json.dumps(entries).encode()
    for name in ("Link", "Content-Encoding", "Transfer-Encoding"):
        answer.headers.pop(name, None)
    answer.headers |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    answer.status_code, answer.stream = httpx2.codes.OK, _Body(answer.stream, iter([content]))


def _tree(
    files: Mapping[str, SourceFile], folder: str, *, recursive: bool
) -> list[dict[str, object]]:
    """The files and folders in a folder, and maybe in those, as the Hub lists them."""
    inside = PurePosixPath(folder)
    below = [path for path in map(PurePosixPath, files) if inside in path.parents]
    folders = {one for path in below for one in path.parents if inside in one.parents}
    shown = [path for path in (*folders, *below) if recursive or path.parent == inside]
    return [_entry(str(path), files.get(str(path))) for path in sorted(shown)]


def _entry(path: str, file: SourceFile | None) -> dict[str, object]:
    if file is None:
        return {"type": "directory", "path": path, "oid": "", "size": 0}
    kind, _, oid = file.digest.partition(":")
    lfs = {"oid": oid, "size": file.size_bytes, "pointerSize": 0}
    entry: dict[str, object] = {"type": "file", "path": path, "oid": oid, "size": file.size_bytes}
    return entry | ({"lfs": lfs} if kind == "sha256" else {})


def limit_pauses(answer: httpx2.Response) -> None:
    """Shorten the numbers of headers that ask for a pause: huggingface_hub takes them as they are.

    One of 400 digits cannot be a float, and one of 5,000 no int.
    """
    for name in ("RateLimit", "RateLimit-Policy", "Retry-After"):
        if value := answer.headers.get(name):
            answer.headers[name] = LONG_PAUSE.sub("9" * PAUSE_DIGITS, value)


REDIRECTED: dict[str, str] = {}  # address that a HEAD was redirected to -> the commit that it asked


def require_true_names(answer: httpx2.Response) -> None:
    """Refuse names that do not name the file of a HEAD: huggingface_hub writes files by them.

    It follows redirections itself; the commit that was asked for stays the same.

    Raises:
        DecodingError: the ETag is empty, has a slash or is a folder's name; or it is a file of
            another commit.
    """
    if answer.request.method != "HEAD":
        return
    for header in ("X-Linked-Etag", "ETag"):
        tag = answer.headers.get(header)
        name = None if tag is None else tag.lstrip("W/").strip('"')
        if name is not None and not PLAIN_TAG.fullmatch(name):
            raise httpx2.DecodingError(f"an answer has the {header} {name[:100]!r}")
    url = answer.request.url
    found = AT_COMMIT.search(url.raw_path)
    asked = REDIRECTED.pop(str(url), None) or (found and found[1].decode())
    commit = answer.headers.get("X-Repo-Commit")
    if asked and commit is not None and commit != asked:
        raise httpx2.DecodingError(f"a file of another commit came, {commit[:100]!r}")
    if asked and answer.has_redirect_location:
        if len(REDIRECTED) > MAX_PAGES:  # most were not followed: they lead to the storage
            REDIRECTED.clear()
        following = urljoin(str(url), answer.headers["Location"])
        REDIRECTED[str(httpx2.URL(following))] = asked


def _purpose(request: httpx2.Request) -> Purpose:
    if request.headers.get("Accept-Encoding") == "identity":
        return "checked"
    if LOG.search(request.url.raw_path):
        return "log"
    is_lookup = request.method != "GET" or LOOKUP.search(request.url.raw_path)
    return "lookup" if is_lookup else "file"  # in a repo, or where the storage has it


def limit_body(answer: httpx2.Response) -> None:
    """Limit the speed and the size of an answer, as its request's purpose allows.

    A file is as long as it announces, or has at most FILE_BYTES.

    Raises:
        RemoteProtocolError: a file is compressed.
    """
    assert isinstance(answer.stream, httpx2.SyncByteStream)
    purpose: Purpose = answer.request.extensions.get(PURPOSE, "lookup")
    encoding = answer.headers.get("Content-Encoding", "identity").lower()
    is_whole = purpose == "checked" or "Content-Length" in answer.headers
    if answer.is_success and purpose in ("file", "checked"):
        if answer.request.method == "GET" and encoding != "identity":
            problem = f"compressed bytes ({encoding[:40]}) came in place of the file's"
            raise httpx2.RemoteProtocolError(problem)
        pieces = fast_enough(answer.stream)
        if (max_bytes := FILE_BYTES.get()) is not None:
            pieces = _limited(pieces, f"a file has more than {max_bytes:,} bytes", max_bytes)
        elif not is_whole:
            pieces = _limited(pieces, _too_large("a file without a length"), MAX_LOOKUP_BYTES)
    else:
        answer.headers.pop("Content-Encoding", None)  # httpx2 would decompress without a limit
        if answer.is_success and purpose == "log":
            pieces = _limited_lines(_decompressed(answer.stream, encoding))
        else:
            pieces = _decompressed(fast_enough(answer.stream), encoding)
            pieces = _limited(pieces, _too_large("an answer to a lookup"), MAX_LOOKUP_BYTES)
            pieces = _of_short_list(_of_few_values(pieces), _page(answer).received)
            if BATCH.search(answer.request.url.raw_path):
                pieces = _of_few_parts(pieces)
    answer.stream = _Body(answer.stream, pieces)


@dataclass(frozen=True)
class _Body(httpx2.SyncByteStream):
    """A body whose pieces are checked."""

    body: httpx2.SyncByteStream
    pieces: Iterator[bytes]

    def __iter__(self) -> Iterator[bytes]:
        return self.pieces

    def close(self) -> None:
        self.body.close()


def fast_enough(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces; an error if they arrive too slowly. The time of the receiver does not count."""
    waited_s, n_bytes, asked_s = 0.0, 0, time.monotonic()
    for piece in pieces:
        waited_s += time.monotonic() - asked_s
        n_bytes += len(piece)
        if waited_s >= SPEED_AFTER_S:
            if n_bytes < MIN_BYTES_PER_S * waited_s:
                problem = f"less than {MIN_BYTES_PER_S} bytes/s arrived"
                raise httpx2.RemoteProtocolError(problem)
            waited_s, n_bytes = 0.0, 0
        yield piece
        asked_s = time.monotonic()


def _decompressed(pieces: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    if encoding == "identity":
        yield from pieces
        return
    if encoding != COMPRESSION:
        problem = f"an answer came compressed by {encoding[:40]!r}, which was not asked for"
        raise httpx2.RemoteProtocolError(problem)
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 16)
    for piece in pieces:
        rest = piece
        while rest and not decompressor.eof:
            try:
                yield decompressor.decompress(rest, PIECE_BYTES)
            except zlib.error as error:
                problem = f"an answer is not compressed as it says: {error}"
                raise httpx2.DecodingError(problem) from error
            rest = decompressor.unconsumed_tail


def _limited(pieces: Iterable[bytes], problem: str, max_bytes: int) -> Iterator[bytes]:
    n_bytes = 0
    for piece in pieces:
        n_bytes += len(piece)
        if n_bytes > max_bytes:
            raise httpx2.DecodingError(problem)
        yield piece


def _of_few_values(pieces: Iterable[bytes]) -> Iterator[bytes]:
    n_values, received = 0, Received()
    for piece in pieces:
        n_values += count_values(piece)
        received.add(piece)
        if n_values > MAX_JSON_VALUES or received.n_objects > MAX_OBJECTS:
            what, limit = ("values", MAX_JSON_VALUES)
            if received.n_objects > MAX_OBJECTS:
                what, limit = "objects and lists", MAX_OBJECTS
            problem = f"an answer to a lookup has more than {limit:,} {what}"
            raise httpx2.DecodingError(problem)
        yield piece


def _of_short_list(pieces: Iterable[bytes], received: Received) -> Iterator[bytes]:
    """The pieces of a page; an error if it and those before it have too much together."""
    also = COUNTED.get()
    for piece in pieces:
        received.add(piece)
        if also is not None:
            also.add(piece)
        if received.exceeded:
            raise httpx2.DecodingError(f"a list has more than {received.exceeded}")
        yield piece


def _of_few_parts(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces, once all are there; an error if a file is to be uploaded in too many parts."""
    content = b"".join(pieces)
    try:
        told = read_json(content, MAX_LOOKUP_BYTES)
    except DocumentError as error:
        raise httpx2.DecodingError(f"an answer to a lookup: {error}") from None
    except ValueError:
        told = None  # huggingface_hub refuses it
    files = told.get("objects") if isinstance(told, dict) else None
    n_parts = max(map(_n_parts, files), default=0) if isinstance(files, list) else 0
    if n_parts > MAX_PARTS:
        problem = f"a file is to be uploaded in {n_parts:,} parts, and {MAX_PARTS:,} are allowed"
        raise httpx2.DecodingError(problem)
    yield content


def _n_parts(file: object) -> int:
    """In how many parts a file is to be uploaded, as huggingface_hub counts them."""
    for key in ("actions", "upload", "header"):
        file = file.get(key) if isinstance(file, dict) else None
    return sum(map(str.isdigit, file)) if isinstance(file, dict) else 0


def _limited_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    n_bytes = 0  # of the line that has not ended
    for piece in pieces:
        end = piece.rfind(b"\n")
        n_bytes = n_bytes + len(piece) if end < 0 else len(piece) - end - 1
        if n_bytes > MAX_LINE_BYTES:
            problem = f"a line of a log has more than {MAX_LINE_BYTES >> 20} MiB"
            raise httpx2.DecodingError(problem)
        yield piece


def _too_large(what: str) -> str:
    return f"{what} has more than {MAX_LOOKUP_BYTES >> 20} MiB"
