"""Servers that say nothing, stop in the middle of an answer, or name next pages without end."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from time import sleep as wait  # not the one that tests replace

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, close_session
from running_server import running

from lewis_hub.errors import PublishError, SourceError
from lewis_hub.hub import answers
from lewis_hub.hub.failures import CERTIFICATES, PROXIES, HubRepo, call_hub, limit_waiting
from lewis_hub.hub.resolve import MAX_FILES
from lewis_hub.hub.target import account, open_pull_requests

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"


@pytest.fixture(params=[b"", HEAD], ids=["says nothing", "stops"])
def silent(request):
    """The address of a server that keeps every connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve():
            with suppress(OSError):
                while True:
                    kept.append(server.accept()[0])
                    kept[-1].sendall(request.param)

        threading.Thread(target=serve, daemon=True).start()
        yield "http://{}:{}".format(*server.getsockname())
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


@pytest.fixture
def impatient(monkeypatch, no_pauses):
    """Wait for a moment only."""
    monkeypatch.setattr(answers, "LONGEST_SILENCE_S", 0.03)
    monkeypatch.setattr(answers, "LONGEST_WORK_S", 0.03)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "ALL_PROXY",
            "socks5://me:secret@127.0.0.1:9",
            ": a SOCKS proxy needs the package socksio.\nInstall it: `pip install socksio`.",
        ),
        (
            "HTTP_PROXY",
            "http://me:secret@127.0.0.1:x",
            ".\nCorrect these variables, or unset them.",
        ),
        ("HTTP_PROXY", "ftp://me:secret@127.0.0.1", ".\nCorrect these variables, or unset them."),
        ("SSL_CERT_FILE", "/nothing/secret", ".\nCorrect these variables, or unset them."),
    ],
)
def test_settings_that_allow_no_connection_are_one_message(name, value, told, monkeypatch):
    """They were tracebacks of httpx."""
    for other in os.environ:
        if other.upper() in {*PROXIES, *CERTIFICATES}:
            monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    close_session()
    try:
        with pytest.raises(SourceError) as caught:
            limit_waiting()
    finally:
        monkeypatch.undo()
        close_session()

    assert str(caught.value) == f"the environment: no connection can be made with {name}{told}"


def test_a_call_without_a_limit_of_its_own_is_given_up(silent, impatient):
    asked = HubRepo.to_publish(HfApi(endpoint=silent, token="hf_test"), "me/merge")
    calls = (
        lambda: account(asked),
        lambda: list(open_pull_requests(asked)),
    )
    for call in calls:
        began = time.monotonic()
        with pytest.raises(PublishError) as error:
            call()
        assert str(error.value) == (
            f"me/merge: cannot reach {silent} (no answer in time).\n"
            "Check the network and HF_ENDPOINT, then run the same command again: finished work "
            "is kept."
        )
        assert time.monotonic() - began < 20


@pytest.mark.parametrize(("method", "limit_s"), [("GET", 60.0), ("PUT", 60.0), ("POST", 300.0)])
def test_limits_of_callers_stay(method, limit_s):
    limit_waiting()
    request = answers.httpx2.Request(method, "http://hub", extensions={"timeout": {"read": 7.0}})
    answers.limit_silence(request)
    assert request.extensions["timeout"] == {
        "connect": 60.0,
        "pool": 60.0,
        "read": 7.0,
        "write": limit_s,
    }


class Later(BaseHTTPRequestHandler):
    """Each call is to be repeated later."""

    def do_POST(self):
        self.server.n_asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503)
        self.send_header("Retry-After", self.server.after_s)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def later():
    """A server that does not answer until it is activated, and then with 503."""
    server = HTTPServer(("127.0.0.1", 0), Later, bind_and_activate=False)
    server.server_bind()
    server.n_asked, server.address = 0, f"http://127.0.0.1:{server.socket.getsockname()[1]}"
    with ExitStack() as stack:

        def start():
            server.server_activate()
            stack.enter_context(running(server))

        server.start = start
        yield server


def refusal_of_an_upload(server):
    """The error of a call that huggingface_hub itself repeats."""
    api, addition = HfApi(endpoint=server.address, token="hf_test"), CommitOperationAdd("x", b"x")
    with pytest.raises(PublishError) as error:
        call_hub(
            HubRepo.to_publish(api, "me/merge"),
            lambda: api.preupload_lfs_files("me/merge", [addition]),
        )
    return str(error.value)


def test_the_limits_hold_after_a_connection_was_refused(later, monkeypatch):
    later.after_s, pauses = "86400", []

    def wait(pause_s):
        if not pauses:
            later.start()
        pauses.append(pause_s)

    monkeypatch.setattr("time.sleep", wait)
    assert refusal_of_an_upload(later) == (
        f"me/merge: {later.address} answers 503 and requires a pause of 86,400 s.\n"
        "Calls wait at most 60 s. Wait that long, then run the same command again: finished work "
        "is kept."
    )
    assert (pauses, later.n_asked) == ([1], 1)


@pytest.mark.parametrize("digits", ["٨٦٤٠٠", "８６４００"])
def test_a_pause_in_digits_of_another_script_is_not_slept(later, no_pauses, digits):
    later.after_s = digits.encode().decode("latin-1")  # as http.server writes it
    later.start()

    assert "answers 503 and requires a pause of 86,400 s" in refusal_of_an_upload(later)
    assert later.n_asked == 1


def test_what_huggingface_hub_repeats_is_not_repeated_once_more(later, no_pauses):
    later.after_s = "59"
    later.start()
    assert refusal_of_an_upload(later) == (
        f"me/merge: {later.address} still fails with 503 after several attempts.\n"
        "This is usually temporary: wait a little, then run the same command again: finished work "
        "is kept."
    )
    assert later.n_asked == 6


class Endless(BaseHTTPRequestHandler):
    """Each page of a list names another one, maybe one that is elsewhere."""

    def do_GET(self):
        self.server.n_asked += 1
        here = f"http://{self.headers['Host']}"
        if self.server.moves and self.path.startswith("/api/"):
            self.send_response(302)
            self.send_header("Location", f"{here}/elsewhere?x={self.server.n_asked}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        following = f"{here}/api/models/a/b/tree/main?x={self.server.n_asked}{self.server.end}"
        self.send_header("Link", f'<{following}>; rel="next"')
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_):
        """Say nothing."""


@pytest.mark.parametrize(("moves", "end"), [(False, ""), (True, ""), (False, "#"), (True, "?")])
def test_a_list_without_end_is_given_up(monkeypatch, no_pauses, moves, end):
    monkeypatch.setattr(answers, "MAX_PAGES", 5)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.n_asked, server.moves, server.end = 0, moves, end
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = "http://{}:{}".format(*server.server_address)
        api = HfApi(endpoint=url, token=False)
        with pytest.raises(PublishError) as error:
            call_hub(HubRepo.to_publish(api, "a/b"), lambda: [*api.list_repo_tree("a/b")])
        server.shutdown()
    assert str(error.value).startswith(f"a/b: cannot reach {url} (a list has more than 5 pages).\n")
    assert server.n_asked == 6 * (1 + moves)


class Listing(BaseHTTPRequestHandler):
    """Pages of a list, compressed: each names the next one, until there is none."""

    def do_GET(self):
        self.server.asked.append(self.path)
        here = f"http://{self.headers['Host']}"
        if self.server.moves and self.path.startswith("/api/"):
            self.answer(b"", 302, {"Location": f"{here}/elsewhere{self.path}"})
            return
        number = int((re.findall(r"page=(\d+)", self.path) or ["0"])[0])
        following = f"{here}/api/models/a/b/tree/main?page={number + 1}"
        is_last = number + 1 == self.server.n_pages
        link = {} if is_last else {"Link": f'<{following}>; rel="next"'}
        self.answer(self.server.body, 200, link)

    def answer(self, body, status, headers):
        """Answer with a body that is compressed."""
        body = gzip.compress(body)
        self.send_response(status)
        told = {"Content-Encoding": "gzip", "Content-Length": str(len(body))} | headers
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def listing(entries, n_pages, *, moves=False, pad=b"", handler=Listing):
    """A server, and a client for it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.n_pages, server.moves = [], n_pages, moves
        server.body = json.dumps(entries).encode() + pad
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server, HfApi(endpoint="http://{}:{}".format(*server.server_address), token=False)
        server.shutdown()


MIB = 1 << 20


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(
    ("entries", "pad", "told"),
    [
        ([], b" " * (MIB - 2), "3 MiB"),
        ([{"type": "directory", "path": "d", "oid": ""}] * 29, b"", "100 objects and lists"),
    ],
)
def test_the_pages_of_a_list_have_a_limit_together(
    monkeypatch, no_pauses, moves, entries, pad, told
):
    monkeypatch.setattr(answers, "MAX_LIST_BYTES", 3 * MIB)
    monkeypatch.setattr(answers, "MAX_OBJECTS", 100)
    with (
        listing(entries, 20, pad=pad, moves=moves) as (server, api),
        pytest.raises(PublishError) as error,
    ):
        call_hub(HubRepo.to_publish(api, "a/b"), lambda: [*api.list_repo_tree("a/b")])
    problem = f"cannot reach {api.endpoint} (a list has more than {told})"
    assert str(error.value).startswith(f"a/b: {problem}.\n")
    assert len(server.asked) == 4 * (1 + moves)  # three pages are within each limit


def test_a_repo_may_have_as_many_files_as_are_allowed(monkeypatch):
    """A hundredth of them, and of the limits; twice, since another list counts anew."""
    entry = {
        "type": "file",
        "oid": "0" * 40,
        "size": 4_965_799_096,
        "lfs": {"oid": "0" * 64, "size": 4_965_799_096, "pointerSize": 135},
        "xetHash": "0" * 64,
        "path": "data/train/" + "0" * 100 + ".safetensors",
    }
    assert len(json.dumps(entry)) > 400
    n_files = MAX_FILES // 100
    monkeypatch.setattr(answers, "MAX_LIST_BYTES", answers.MAX_LIST_BYTES // 100)
    monkeypatch.setattr(answers, "MAX_OBJECTS", answers.MAX_OBJECTS // 100)
    with listing([entry] * 100, n_files // 100) as (server, api):
        for _ in range(2):
            asked = HubRepo.to_publish(api, "a/b")
            files = call_hub(asked, lambda: [*api.list_repo_tree("a/b", recursive=True)])
            assert len(files) == n_files
    assert len(server.asked) == 2 * n_files // 100


class PullRequests(Listing):
    """One open pull request on each of very many pages; all answers have the same size."""

    def do_GET(self):
        self.server.asked.append(self.path)
        number = len(self.server.asked)
        page = {"discussions": [{"num": number}], "start": number, "count": 10**9}
        description = {"id": "a/b", "sha": "0" * 40, "siblings": []}
        found = page if "/discussions?" in self.path else description
        body = json.dumps([] if "/tree/" in self.path else found).encode()
        self.answer(body.ljust(10_001), 200, {})


@pytest.mark.parametrize(
    ("n_siblings", "n_answers", "n_found"), [(1, 2, 5), (0, 3, 3)], ids=["described", "listed"]
)
def test_pull_requests_are_compared_as_far_as_their_answers_have_the_size_of_a_list(
    monkeypatch, n_siblings, n_answers, n_found
):
    monkeypatch.setattr(answers, "MAX_LIST_BYTES", 100_000)
    monkeypatch.setattr("lewis_hub.hub.resolve.MAX_SIBLINGS", n_siblings)
    with listing([], 1, handler=PullRequests) as (server, api):
        found = [*open_pull_requests(HubRepo.to_publish(api, "a/b"))]
    numbers = range(1, n_found * n_answers, n_answers)
    pages = [f"{api.endpoint}/a/b/discussions/{number}" for number in numbers]
    assert [url for url, _ in found] == pages
    assert len(server.asked) == n_found * n_answers + 1  # and the page of the next one


def heads(content, pause_s):
    """A server that first reads a request, and then sends pieces without end."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with suppress(OSError):
            while True:
                connection = server.accept()[0]
                threading.Thread(target=send, args=(connection,), daemon=True).start()

    def send(connection):
        with suppress(OSError), connection:
            connection.recv(1 << 16)
            for piece in content():
                connection.sendall(piece)
                wait(pause_s)

    threading.Thread(target=serve, daemon=True).start()
    return server, "http://{}:{}".format(*server.getsockname())


PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
ANSWER = (
    b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"name":"me"}'
)


@pytest.mark.parametrize(
    ("content", "pause_s"),
    [
        (lambda: itertools.repeat(PROCESSING), 0.02),
        (lambda: itertools.repeat(PROCESSING * 1000), 0),
        (lambda: itertools.repeat(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"), 0.02),
        (lambda: itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"a: b\r\n")), 0.02),
    ],
    ids=["processing", "flood", "hints", "one line at a time"],
)
def test_a_head_that_does_not_end_is_given_up(monkeypatch, no_pauses, content, pause_s):
    monkeypatch.setattr(answers, "LONGEST_SILENCE_S", 0.2)
    server, url = heads(content, pause_s)
    began = time.monotonic()
    with server, pytest.raises(PublishError) as error:
        account(HubRepo.to_publish(HfApi(endpoint=url, token="hf_test"), "me/merge"))
    assert str(error.value).startswith(f"me/merge: cannot reach {url} (no answer in time).\n")
    assert time.monotonic() - began < 15


def test_a_server_may_say_that_it_works_before_it_answers(monkeypatch, no_pauses):
    """Its body may also take longer than its head."""
    monkeypatch.setattr(answers, "LONGEST_SILENCE_S", 0.4)
    body = [ANSWER[i : i + 1] for i in range(len(ANSWER) - 13, len(ANSWER))]
    pieces = [PROCESSING, PROCESSING, ANSWER[:20], ANSWER[20:-13], *body]
    server, url = heads(lambda: pieces, 0.05)
    with server:
        asked = HubRepo.to_publish(HfApi(endpoint=url, token="hf_test"), "me/merge")
        assert account(asked).name == "me"
