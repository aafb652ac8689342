from __future__ import annotations

import os
import pickle
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from running_server import running

from lewis_hub.errors import SourceError
from lewis_hub.hub.ranges import RemoteFiles
from lewis_hub.hub.resolve import resolve_model

WEIGHTS = os.urandom(300_000)


@pytest.fixture
def files(api, push):
    push("tests/model", {"config.json": b"{}", "model.safetensors": WEIGHTS})
    return RemoteFiles(resolve_model(api, "tests/model"), api.endpoint)


def fetched(files, start, stop, path="model.safetensors"):
    found = bytearray(stop - start)

    def take(position, piece):
        found[position - start : position - start + len(piece)] = piece

    files.fetch(path, start, stop, take)
    return bytes(found)


def test_a_range_comes_as_it_lies(files):
    assert fetched(files, 1000, 200_000) == WEIGHTS[1000:200_000]


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", ["/resolve/", "/lfs/"])
def test_trouble_that_passes_costs_nothing(files, hub, no_pauses, path, status):
    hub.fail(path, status, times=3)

    assert fetched(files, 0, 300_000) == WEIGHTS
    assert hub.faults.pending == []


def test_what_breaks_off_goes_on_behind_the_bytes_that_came(files, hub, no_pauses):
    for _ in range(10):  # more often than one call is tried again
        hub.fail("/lfs/", "drop", after_bytes=20_000)
    taken = []

    files.fetch("model.safetensors", 0, 300_000, lambda at, piece: taken.append((at, len(piece))))

    assert hub.faults.pending == []
    assert sum(n for _, n in taken) == files.received.n_bytes == 300_000
    assert [at for at, _ in taken] == [sum(n for _, n in taken[:i]) for i in range(len(taken))]


def test_a_hub_that_stays_down_is_one_message(files, hub, no_pauses):
    hub.fail("/lfs/", 503, times=100)

    with pytest.raises(SourceError) as raised:
        fetched(files, 0, 10)

    assert str(raised.value) == (
        f"{files.source.pinned}: {files.endpoint} still fails with 503 after several "
        "attempts: injected fault.\n"
        "This is usually temporary: wait a little, then run the same command again: finished "
        "work is kept."
    )


def test_where_the_bytes_lie_is_asked_once_and_again_when_the_address_is_outdated(
    files, hub, no_pauses
):
    fetched(files, 0, 10)
    hub.fail("/resolve/", 500, times=1)

    assert fetched(files, 10, 20) == WEIGHTS[10:20]
    assert len(hub.faults.pending) == 1  # nobody asked

    hub.faults.clear()
    hub.fail("/lfs/", 403)
    assert fetched(files, 20, 30) == WEIGHTS[20:30]
    assert hub.faults.pending == []


def test_what_travels_to_a_worker_holds_no_token_and_no_signed_address(files, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    fetched(files, 0, 10)

    sent = pickle.dumps(files.fetch)

    assert hub.write_token.encode() not in sent
    assert b"signature" not in sent
    found = []
    pickle.loads(sent)("model.safetensors", 5, 15, lambda _, piece: found.append(piece))
    assert b"".join(found) == WEIGHTS[5:15]


@contextmanager
def answering(status, headers, body):
    """A server that says the same to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 - as the library calls it
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with running(HTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


def test_a_server_that_ignores_ranges_is_refused(files):
    with answering(200, {}, b"x" * 50) as url, pytest.raises(SourceError) as raised:
        fetched(RemoteFiles(files.source, url), 0, 10)

    assert str(raised.value) == (
        f"{files.source.pinned}: the server does not serve byte ranges of `model.safetensors`"
        " (status 200).\nMerge without --stream: it downloads whole files."
    )


@pytest.mark.parametrize("told", ["bytes 0-8/300000", "bytes 1-10/300000", "bytes 0-9/299999"])
def test_other_bytes_than_were_asked_for_are_refused(files, told):
    headers = {"Content-Range": told}
    with answering(206, headers, b"x" * 10) as url, pytest.raises(SourceError) as raised:
        fetched(RemoteFiles(files.source, url), 0, 10)

    assert str(raised.value) == (
        f"{files.source.pinned}: bytes 0-9/300000 of `model.safetensors` were requested, "
        f"{told.removeprefix('bytes ')} received.\n"
        "A proxy may be broken: merge without --stream."
    )
