"""The embedded Hub under requests that no client sends: no answer is a 500, memory is bounded."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from effort import SEED, times
from huggingface_hub import CommitOperationAdd

from lewis_hub.localhub import jobs
from lewis_hub.localhub.routes import API, REPO_API, REPO_SITE
from lewis_hub.localhub.server import serve
from lewis_hub.localhub.store import Store

MOST_BYTES = 300_000_000  # that the process may grow: the largest body is 256 MiB, and none is sent
CARD = b"---\nlicense: mit\n---\n# A model\n"
FILES = {"README.md": CARD, "config.json": b"{}", "model.safetensors": b"\0" * 3000}
WEIGHTS = "9" * 64

ODD_TEXTS = ("", ".", "..", "%2e%2e%2f%2e%2e", "%00", "%ff", "a" * 3000, "%F0%9F%A6%99", "a%0d%0ab")
ODD_TEXTS += ("1e999", "-1", "%25", "refs%2Fpr%2F1", "refs/heads/main", "?", "*", "null", "{x}")
PARTS = {
    "namespace": ("acme", "lewis"),
    "name": ("base", "gated", "private", "new", "base.git"),
    "revision": ("main", "v1", "refs%2Fpr%2F1", "0" * 40),
    "path": ("README.md", "model.safetensors", "a/b", "", "README.md/x"),
    "number": ("1", "2"),
    "branch": ("main", "b"),
    "id": ("0" * 24,),
    "rest": ("x", "models", "models/acme"),
    "oid": (WEIGHTS, "0" * 64),
}
QUERIES = ("create_pr=1", "recursive=true", "expand=true", "limit=-1", "limit=x", "cursor=%ff")
QUERIES += ("signature=x", "type=a", "status=open", "p=1e9", "&&=&", "%00=%00", "recursive=1&x=[]")
COMMIT = (
    {"key": "header", "value": {"summary": "Change", "description": "", "parentCommit": None}},
    {"key": "file", "value": {"path": "a.txt", "content": "eA==", "encoding": "base64"}},
    {"key": "lfsFile", "value": {"path": "m.bin", "oid": WEIGHTS, "size": 3000, "algo": "sha256"}},
    {"key": "deletedFile", "value": {"path": "config.json"}},
)
JOB = {"dockerImage": "x", "command": ["true"], "environment": {"A": "b"}, "timeoutSeconds": 5}
BODIES = (
    {"name": "made", "organization": "acme", "type": "model", "private": True},
    {"grant_type": "x", "resource": "acme/base", "subject_token": "x"},
    {"content": CARD.decode()},
    {"private": False, "gated": "auto", "visibility": "public"},
    {"startingPoint": "main", "overwrite": True, "tag": "v2", "message": "x"},
    {"paths": ["README.md", "a"], "expand": True},
    {"files": [{"path": "a", "size": 3, "sample": "eA=="}]},
    {"title": "x", "description": "y", "pullRequest": True},
    {"operation": "upload", "objects": [{"oid": WEIGHTS, "size": 3000}], "hash_algo": "sha256"},
    {"oid": WEIGHTS, "size": 3000},
    {"schedule": "@daily", "jobSpec": JOB},
    JOB,
)
ODD_VALUES = (None, -1, 10**400, float("nan"), float("inf"), "\ud800", "", [], {}, True, "a" * 2000)
ODD_VALUES += ("../../x", "a\0b", [[[[]]]], {"a": {"b": {}}}, 1.5, "1e999", ["main"], 2**63)
RANGES = ("bytes=0-", "bytes=5-2", "bytes=-1", "bytes=99999-", "bytes=0-0,2-3", "bytes=a-b", "x")
RANGES += (f"bytes=0-{'9' * 400}", "bytes=-0", "bytes=", "bytes=0-1," * 200 + "5-6")
HEADERS = ("Content-Type: x/y", "If-Range: x", "Accept: */*;q=a", "Cookie: " + "a" * 3000)
HEADERS += ("If-None-Match: *", "X: \xff\xfe", "Content-Encoding: gzip", "Expect: 100-continue")


@pytest.fixture
def running(tmp_path):
    """A Hub with a public, a gated and a private model, which runs Jobs."""
    with serve(tmp_path / "hub", jobs=True) as hub:
        api = hub.api()
        for name in ("base", "gated", "private"):
            repo = api.create_repo(f"acme/{name}").repo_id
            additions = [CommitOperationAdd(path, content) for path, content in FILES.items()]
            api.create_commit(repo, additions, commit_message="Put files")
        api.create_tag("acme/base", tag="v1")
        proposed = [CommitOperationAdd("more.txt", b"x")]
        api.create_commit("acme/base", proposed, commit_message="Ask", create_pr=True)
        api.update_repo_settings("acme/gated", gated="auto")
        api.update_repo_settings("acme/private", visibility="private")
        yield hub


def addresses():
    """Method and template of each address of the Hub."""
    prefixes = ("/api/models", "/api/datasets"), ("", "/datasets")
    repo = "/{namespace}/{name}"
    known = [(method, path) for method, path, _ in API]
    for table, places in zip((REPO_API, REPO_SITE), prefixes, strict=True):
        known += [(method, f"{at}{repo}{path}") for at in places for method, path, _ in table]
    known += [(method, path) for method, path, _ in jobs.Jobs(Path(), "").routes()]
    return [*known, ("GET", "/lfs/{oid}/{name}"), ("PUT", "/lfs-upload/{oid}"), ("GET", "/{rest}")]


def odd_json(draw, value):
    """A value of JSON with some of its parts replaced."""
    if draw.random() < 0.15:
        return draw.choice(ODD_VALUES)
    if isinstance(value, dict):
        return {name: odd_json(draw, one) for name, one in value.items() if draw.random() < 0.95}
    if isinstance(value, list):
        return [odd_json(draw, one) for one in value] * draw.choice((1, 1, 1, 2))
    return value


def body(draw, path):
    """A body that fits an address nearly, or not at all."""
    if draw.random() < 0.1:
        return draw.choice((b"", b"{", b"[" * 50_000, b"\xff\xfe", b"null", b'"a"', b"0" * 5000))
    if "/commit/" in path or "/batch" in path:
        lines = draw.sample(COMMIT, draw.randint(1, len(COMMIT)))
        content = b"\n".join(json.dumps(odd_json(draw, line)).encode() for line in lines)
    else:
        content = json.dumps(odd_json(draw, draw.choice(BODIES))).encode()
    if draw.random() < 0.2 and content:
        place = draw.randrange(len(content))
        content = content[:place] + draw.randbytes(draw.randint(0, 3)) + content[place + 1 :]
    return content


def request(draw, known, tokens):
    """The bytes of a request, and whether its body is as long as it says."""
    method, template = draw.choice(known)
    if draw.random() < 0.1:
        method = draw.choice(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"))

    def part(found):
        values = PARTS[found[1].removesuffix(":path")]
        return draw.choice(ODD_TEXTS if draw.random() < 0.2 else values)

    path = re.sub(r"\{([\w:]+)\}", part, template)
    if draw.random() < 0.3:
        path += "?" + draw.choice(QUERIES)
    content = body(draw, path) if method != "GET" or draw.random() < 0.1 else b""
    headers = [f"Host: {draw.choice(('127.0.0.1', 'localhost:1'))}"]
    token = draw.choice(tokens)
    headers += [f"Authorization: Bearer {token}"] if token is not None else []
    headers += [f"Range: {draw.choice(RANGES)}"] if draw.random() < 0.3 else []
    headers += [draw.choice(HEADERS)] if draw.random() < 0.3 else []
    length = len(content)
    if draw.random() < 0.03:
        length = draw.choice((length + 10, max(0, length - 1)))
    headers += [f"Content-Length: {length}", "Connection: close"]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *headers]) + "\r\n\r\n"
    return head.encode("latin-1") + content, length <= len(content)


def send(url, content, is_whole=True):
    """The bytes of the answer; a client whose body is too short hangs up."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
        with suppress(ConnectionError):  # refused before all of it was read
            connection.sendall(content)
            if not is_whole:
                connection.shutdown(socket.SHUT_WR)
        answer = bytearray()
        with suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                answer += piece
    return bytes(answer)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_no_request_is_answered_by_a_500_and_memory_is_bounded(running, caplog):
    n_requests = times(1500, 100_000)
    caplog.set_level(logging.ERROR)
    draw, known, url = random.Random(SEED), addresses(), running.url
    tokens = (running.write_token, running.write_token, running.read_token, None, "hf_x", "\xff")
    before, seen = resident_bytes(), {}
    for number in range(n_requests):
        content, is_whole = request(draw, known, tokens)
        place = running.storage_url if b"/lfs" in content[:12] else url
        answer = send(place, content, is_whole)
        status = answer[9:12].decode() or "none"
        seen[status] = seen.get(status, 0) + 1
        assert status < "500" or status == "none", (number, content[:2000], answer[:500])
        assert not caplog.records, (number, content[:2000], caplog.text)
    assert resident_bytes() - before < MOST_BYTES
    assert {"200", "400", "401", "403", "404"} <= seen.keys()
    assert seen.get("none", 0) < n_requests / 20
    assert running.api().model_info("acme/base").id == "acme/base"
    assert Store(running.root).repos.keys() == running.store.repos.keys()  # after a restart


def test_sixty_readers_of_a_log_leave_the_server_free(running):
    api = running.api()
    spec = {"dockerImage": "x", "command": ["sleep", "60"]}
    place = f"/api/jobs/{running.user}"
    head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {running.write_token}\r\n"
    start = f"POST {place} HTTP/1.1\r\n{head}Content-Length: "
    content = json.dumps(spec)
    answer = send(
        running.url, f"{start}{len(content)}\r\nConnection: close\r\n\r\n{content}".encode()
    )
    job = json.loads(answer.partition(b"\r\n\r\n")[2])["id"]
    host = urlsplit(running.url)
    follow = f"GET {place}/{job}/logs HTTP/1.1\r\n{head}\r\n".encode()
    with ExitStack() as opened:
        readers = [
            opened.enter_context(socket.create_connection((host.hostname, host.port), timeout=20))
            for _ in range(60)
        ]
        for reader in readers:
            reader.sendall(follow)
        for reader in readers:
            assert reader.recv(1 << 16).startswith(b"HTTP/1.1 200")
        with ThreadPoolExecutor(8) as pool:
            begun = time.monotonic()
            for told in pool.map(lambda _: api.model_info("acme/base").id, range(40)):
                assert told == "acme/base"
        assert time.monotonic() - begun < 20
        cancel = f"POST {place}/{job}/cancel HTTP/1.1\r\n{head}Content-Length: 0\r\n"
        assert b'"CANCELED"' in send(running.url, f"{cancel}Connection: close\r\n\r\n".encode())
        for reader in readers:
            while piece := reader.recv(1 << 16):
                if piece.endswith(b"0\r\n\r\n"):
                    break


def test_a_reader_of_a_long_log_leaves_the_server_free(running):
    """A client that takes the lines as fast as they come makes no send wait."""
    place = f"/api/jobs/{running.user}"
    content = json.dumps({"dockerImage": "x", "command": ["seq", "100000"]})
    head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {running.write_token}\r\n"
    head += "Connection: close\r\n"
    start = f"POST {place} HTTP/1.1\r\n{head}Content-Length: {len(content)}\r\n\r\n{content}"
    job = json.loads(send(running.url, start.encode()).partition(b"\r\n\r\n")[2])["id"]
    ask = f"GET {place}/{job} HTTP/1.1\r\n{head}\r\n".encode()
    while b"COMPLETED" not in send(running.url, ask):
        time.sleep(0.1)
    with ThreadPoolExecutor(1) as pool:
        follow = f"GET {place}/{job}/logs HTTP/1.1\r\n{head}\r\n".encode()
        reader = pool.submit(send, running.url, follow)
        waits = []
        while not reader.done():
            begun = time.monotonic()
            send(running.url, ask)
            waits.append(time.monotonic() - begun)
        assert b'"100000"' in reader.result()
    assert max(waits) < 1


@pytest.mark.parametrize(
    "command",
    [["yes", "x" * 1000], ["head", "-c", "50000000", "/dev/zero"]],
    ids=["lines", "a line"],
)
def test_a_job_that_prints_without_end_takes_bounded_memory(running, command, monkeypatch):
    monkeypatch.setattr(jobs, "MAX_LOG_CHARACTERS", 100_000)
    place = f"/api/jobs/{running.user}"
    content = json.dumps({"dockerImage": "x", "command": command, "timeoutSeconds": 1})
    head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {running.write_token}\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n{content}"
    answer = send(running.url, f"POST {place} HTTP/1.1\r\n{head}".encode())
    job = json.loads(answer.partition(b"\r\n\r\n")[2])["id"]
    told = send(running.url, f"GET {place}/{job}/logs HTTP/1.1\r\n{head}".encode())  # to its end

    assert 50_000 < len(told) < 1_000_000
    assert b"the rest of the log is not kept" in told
