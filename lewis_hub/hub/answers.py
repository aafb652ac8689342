"""Limits on the bodies of answers: how slowly they may arrive, and how large a lookup may be."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import httpx2

MIN_BYTES_PER_S = 1024  # a slower answer is given up
SPEED_AFTER_S = 30.0  # the speed is measured over so long
MAX_LOOKUP_BYTES = 64 << 20  # of an answer that is not a file, decompressed
COMPRESSION = "gzip"  # the only one that lookups ask for
PIECE_BYTES = 1 << 16  # decompressed at a time


def limit_body(answer: httpx2.Response) -> None:
    """Limit the speed of an answer, and its size if it is not that of a file.

    Raises:
        RemoteProtocolError: a file is compressed. Who asks for one asks for `identity`, and checks
            its length.
    """
    assert isinstance(answer.stream, httpx2.SyncByteStream)
    encoding = answer.headers.get("Content-Encoding", "identity").lower()
    pieces = fast_enough(answer.stream)
    if answer.is_success and answer.request.headers.get("Accept-Encoding") == "identity":
        if answer.request.method == "GET" and encoding != "identity":
            problem = f"compressed bytes ({encoding[:40]}) came in place of the file's"
            raise httpx2.RemoteProtocolError(problem)
    else:
        answer.headers.pop("Content-Encoding", None)  # httpx2 would decompress without a limit
        pieces = _limited(_decompressed(pieces, encoding))
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


def _decompressed(pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
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


def _limited(pieces: Iterator[bytes]) -> Iterator[bytes]:
    n_bytes = 0
    for piece in pieces:
        n_bytes += len(piece)
        if n_bytes > MAX_LOOKUP_BYTES:
            problem = f"an answer to a lookup has more than {MAX_LOOKUP_BYTES >> 20} MiB"
            raise httpx2.DecodingError(problem)
        yield piece
