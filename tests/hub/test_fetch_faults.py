"""Servers and proxies that answer a download wrongly: one message, or the right bytes."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, get_session
from huggingface_hub.file_download import http_get
from running_server import running

from lewis_hub.errors import SourceError
from lewis_hub.hub import answers, target
from lewis_hub.hub.failures import HubRepo, call_hub, hub_failures
from lewis_hub.hub.fetch import fetch, read_small
from lewis_hub.hub.ranges import read_range
from lewis_hub.hub.resolve import resolve_dataset, resolve_model
from lewis_hub.hub.rows import load_rows
from lewis_hub.hub.source import cache_folder

WEIGHTS = os.urandom(300_000)
SIZE = len(WEIGHTS)
PAGE = b"<html>Sign in to this network</html>"


@contextmanager
def answering(status, headers, body, requests=None):
    """A server that answers every GET the same, and every HEAD as a Hub does."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.send_response(200)
            told = {"Content-Length": SIZE, "ETag": '"x"', "X-Repo-Commit": "a" * 40}
            for name, value in told.items():
                self.send_header(name, str(value))
            self.end_headers()

        def do_GET(self):
            requests.append(self.headers["Range"])
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.close_connection = True
            with suppress(ConnectionError):  # the client reads no further
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    requests = [] if requests is None else requests
    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield HfApi(endpoint=url)


@pytest.fixture
def source(api, push):
    push("tests/model", {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    return resolve_model(api, "tests/model")


def ranged(start, stop, size=SIZE):
    return {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}


WRONG = {
    "a page of a captive portal": (
        (200, {"Content-Type": "text/html"}, PAGE),
        "text/html of 36 bytes came in place of 300000 bytes",
    ),
    "too long": (
        (200, {}, WEIGHTS * 2),
        "an answer of 600000 bytes came in place of 300000 bytes",
    ),
    "another range": (
        (206, ranged(1, SIZE), WEIGHTS[1:]),
        "bytes 0-299999/300000 were requested, 'bytes 1-299999/300000' came",
    ),
    "another size": (
        (206, ranged(0, SIZE, SIZE + 1), WEIGHTS),
        "bytes 0-299999/300000 were requested, 'bytes 0-299999/300001' came",
    ),
    "a range of long numbers": (
        (206, {"Content-Range": f"bytes 0-{SIZE - 1}/{'9' * 5000}"}, WEIGHTS),
        f"bytes 0-299999/300000 were requested, 'bytes 0-299999/{'9' * 85}' came",
    ),
    "a gzip bomb": (
        (200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(50_000_000))),
        "compressed bytes (gzip) came in place of the file's",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_other_bytes_than_the_files_are_one_message_and_not_stored(source, no_pauses, wrong):
    answer, told = WRONG[wrong]
    with answering(*answer) as api, pytest.raises(SourceError) as raised:
        fetch(api, source, lambda _: None, ("*.safetensors",))

    assert str(raised.value).startswith(f"{source.pinned}: cannot reach {api.endpoint} ({told}).")
    assert not list(cache_folder("tests/model", "model").glob("blobs/*"))


@pytest.mark.parametrize("wrong", WRONG)
def test_other_bytes_than_those_of_a_range_are_one_message(source, no_pauses, wrong):
    with answering(*WRONG[wrong][0]) as api, pytest.raises(SourceError) as raised:
        read_range(api, source, "model.safetensors", 0, SIZE)

    assert str(raised.value).startswith(f"{source.pinned}: cannot reach {api.endpoint} (")


LOOKUPS = {
    "a gzip bomb": (
        ("gzip", gzip.compress(bytes(200_000_000))),
        "an answer to a lookup has more than 64 MiB",
    ),
    "without compression": (
        ("identity", b" " * (65 << 20)),
        "an answer to a lookup has more than 64 MiB",
    ),
    "very many values": (
        ("gzip", gzip.compress(b"[" + b"0," * 4_000_000)),
        "an answer to a lookup has more than 4,000,000 values",
    ),
    "very many objects": (
        ("gzip", gzip.compress(b"[" + b"{}," * 600_000)),
        "an answer to a lookup has more than 600,000 objects and lists",
    ),
    "not compressed": (
        ("gzip", b"{}"),
        "an answer is not compressed as it says: "
        "Error -3 while decompressing data: incorrect header check",
    ),
    "compressed in another way": (
        ("br", b"{}"),
        "an answer came compressed by 'br', which was not asked for",
    ),
}


@pytest.mark.parametrize("wrong", LOOKUPS)
def test_a_lookup_reads_a_limited_answer(no_pauses, wrong):
    (encoding, body), told = LOOKUPS[wrong]
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    tracemalloc.start()
    with answering(200, headers, body) as api, pytest.raises(SourceError) as raised:
        resolve_model(api, "tests/model")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert str(raised.value).startswith(f"tests/model: cannot reach {api.endpoint} ({told}).")
    assert peak_bytes < 2 * answers.MAX_LOOKUP_BYTES + 16_000_000


@pytest.mark.parametrize("path", ["/api/whoami-v2", "/api/models/a", "/api/agent-harnesses"])
def test_what_huggingface_hub_reads_whole_is_a_lookup(no_pauses, monkeypatch, path):
    monkeypatch.setattr(answers, "MAX_LOOKUP_BYTES", 50_000)
    with (
        answering(200, {}, bytes(60_000)) as api,
        pytest.raises(SourceError, match="an answer to a lookup has more than"),
        hub_failures(HubRepo(api, "tests/model")),
    ):
        get_session().get(api.endpoint + path)


SHA1 = "0" * 40
WRONGLY_LISTED = [
    {"sha": 5},
    {"siblings": [{}]},
    {"siblings": 5},
    {"siblings": [{"rfilename": None, "blobId": SHA1}]},
    {"siblings": [{"rfilename": "", "blobId": SHA1}]},
    {"siblings": [{"rfilename": "a\0.json", "blobId": SHA1}]},
    {"siblings": [{"rfilename": "\ud800.json", "blobId": SHA1}]},
    {"siblings": [{"rfilename": "a.json", "blobId": SHA1, "size": -1}]},
    {"siblings": [{"rfilename": "a.json", "blobId": SHA1, "size": "x"}]},
    {"siblings": [{"rfilename": "a.json", "blobId": SHA1, "lfs": 5}]},
    {"createdAt": "now\nand then"},
]


def test_a_lookup_may_be_compressed(push, api):
    sha = push("tests/model", {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    info = {"id": "tests/model", "sha": sha, "siblings": [], "note": "x" * 1_000_000}
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}

    with answering(200, headers, gzip.compress(json.dumps(info).encode())) as other:
        call_hub(HubRepo(other, "tests/model"), lambda: None)  # sets the limits
        assert other.model_info("tests/model").sha == sha


def test_a_file_that_others_download_may_be_larger_than_a_lookup(hub, push, api, monkeypatch):
    monkeypatch.setattr(answers, "MAX_LOOKUP_BYTES", 50_000)
    rows = b"".join(b'{"text": "%060d"}\n' % number for number in range(2000))
    push("tests/rows", {"train.jsonl": rows, "large.bin": WEIGHTS}, "dataset")

    loaded = load_rows(api, resolve_dataset(api, "tests/rows"), None, "train")
    with hub_failures(HubRepo(api, "tests/rows")):  # sets the limits
        path = api.hf_hub_download("tests/rows", "large.bin", repo_type="dataset")

    assert len(loaded) == 2000
    assert Path(path).read_bytes() == WEIGHTS


def test_a_lookup_stays_one_wherever_it_is_redirected(hub, push, no_pauses, monkeypatch):
    monkeypatch.setattr(answers, "MAX_LOOKUP_BYTES", 50_000)
    push("tests/model", {"model.safetensors": WEIGHTS})
    elsewhere = {"Location": f"{hub.url}/tests/model/resolve/main/model.safetensors"}

    with answering(302, elsewhere, b"") as api, pytest.raises(SourceError) as raised:
        resolve_model(api, "tests/model")

    assert "(an answer to a lookup has more than 0 MiB)" in str(raised.value)


def test_a_redirect_to_no_host_is_one_message(source, no_pauses):
    nowhere = {"Location": f"http://{'a' * 300}/"}

    with answering(302, nowhere, b"") as api, pytest.raises(SourceError) as raised:
        fetch(api, source, lambda _: None, ("*.safetensors",))

    told = f"{source.pinned}: {api.endpoint} does not answer like a Hub (UnicodeError: "
    assert str(raised.value).startswith(told)


def look_up(handler):
    """Ask a server for a file of a pinned commit, as a run does before a download."""
    with running(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        hub_repo = HubRepo(HfApi(endpoint=url), "me/model", revision="a" * 40)
        address = hub_repo.file_url("config.json")
        call_hub(hub_repo, lambda: hub_repo.api.get_hf_file_metadata(url=address))


@pytest.mark.parametrize(
    "location",
    ["/elsewhere", "elsewhere", "?a=%2f b", "/a%zz b/ä?x#y", "/a/../b", "{url}/c", "//{host}/d"]
    + [f"/me/model/resolve/{'b' * 40}/config.json", "/../resolve/main/x"],
)
def test_a_redirection_leads_to_no_other_commit(location):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            is_first = self.path == f"/me/model/resolve/{'a' * 40}/config.json"
            self.send_response(307 if is_first else 200)
            told = {"ETag": '"x"', "Content-Length": "9", "X-Repo-Commit": "b" * 40}
            host = self.headers["Host"]
            place = location.format(url=f"http://{host}", host=host)
            told = {"Location": place.encode().decode("latin-1")} if is_first else told
            for name, value in told.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_):
            pass

    with pytest.raises(SourceError, match="a file of another commit came, 'bbbb"):
        look_up(Handler)


@pytest.mark.parametrize("location", ["http://xn--\xff/", "http://[", f"/{'a' * 65_530}"])
def test_a_redirection_to_no_address_is_one_message(location):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(307)
            for name, value in {"ETag": '"x"', "Location": location}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_):
            pass

    with pytest.raises(SourceError, match="does not answer like a Hub"):
        look_up(Handler)


def test_a_file_without_a_length_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "MAX_LOOKUP_BYTES", 50_000)
    endless = {"Content-Length": "", "Transfer-Encoding": "chunked"}
    chunk = b"%x\r\n%s\r\n" % (SIZE, WEIGHTS)

    with (
        answering(200, endless, chunk * 5) as api,
        (tmp_path / "file").open("wb") as file,
        pytest.raises(SourceError, match="a file without a length has more than"),
        hub_failures(HubRepo(api, "tests/model")),
    ):
        http_get(f"{api.endpoint}/storage/of/a/file", file)

    assert (tmp_path / "file").stat().st_size <= 50_000


def test_the_log_of_a_job_may_be_quiet_and_long_but_no_line_endless(monkeypatch):
    monkeypatch.setattr(answers, "MAX_LINE_BYTES", 50_000)
    monkeypatch.setattr(answers, "SPEED_AFTER_S", 0.0)
    lines = [b'data: {"data": "%d", "timestamp": ""}\n' % number for number in range(5000)]

    def read(body):
        with answering(200, {}, body) as api, hub_failures(HubRepo(api, "tests/model")):
            url = f"{api.endpoint}/api/jobs/me/6874d1b8/logs"
            with get_session().stream("GET", url) as answer:
                return list(answer.iter_lines())

    assert len(read(b"".join(lines))) == 5000
    with pytest.raises(SourceError, match="a line of a log has more than"):
        read(b"x" * 60_000)


@pytest.mark.parametrize("listed", WRONGLY_LISTED)
def test_a_list_that_names_no_files_is_one_message(listed):
    body = json.dumps({"id": "tests/model", "sha": "0" * 40, **listed}).encode()
    headers = {"Content-Type": "application/json"}

    with answering(200, headers, body) as api, pytest.raises(SourceError) as raised:
        resolve_model(api, "tests/model")

    told = f"tests/model: {api.endpoint} does not answer like a Hub"
    assert str(raised.value).startswith(told)
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize(
    "page",
    [
        {"discussions": [], "count": 10, "start": 0},
        {"discussions": [{"num": 1}, {"num": 2, "author": {}}] * 25, "count": 10**9, "start": 0},
    ],
)
def test_a_list_of_pull_requests_that_never_ends_is_left(page, monkeypatch):
    monkeypatch.setattr(target, "_described", lambda _, revision: revision)
    monkeypatch.setattr(target, "_target", lambda _, described: described)
    headers, requests = {"Content-Type": "application/json"}, []

    with answering(200, headers, json.dumps(page).encode(), requests) as api:
        found = list(target.open_pull_requests(HubRepo.to_publish(api, "tests/model")))

    assert len(found) == (target.MAX_PULL_REQUESTS if page["discussions"] else 0)
    assert len(requests) <= 4


def test_an_endless_answer_is_read_no_further_than_the_file(source):
    endless = {"Content-Length": "", "Transfer-Encoding": "chunked"}
    chunk = b"%x\r\n%s\r\n" % (SIZE, WEIGHTS)
    with answering(200, endless, chunk * 20) as api:
        assert read_range(api, source, "model.safetensors", 7, 2000) == WEIGHTS[7:2000]


def test_a_server_that_sends_ten_bytes_an_answer_is_given_up(source, no_pauses):
    requests = []
    cut = {**ranged(0, SIZE), "Content-Length": str(SIZE)}
    with answering(206, cut, WEIGHTS[:10], requests) as api, pytest.raises(SourceError) as raised:
        fetch(api, source, lambda _: None, ("*.safetensors",))

    assert str(raised.value).startswith(f"{source.pinned}: cannot reach {api.endpoint} (")
    assert len(requests) < 20


def test_a_slow_answer_is_given_up_and_a_slow_receiver_is_not(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])

    def arriving(pause_s):
        for _ in range(100):
            now_s[0] += pause_s
            yield bytes(1000)

    for _ in answers.fast_enough(arriving(0.5)):
        now_s[0] += 100.0
    with pytest.raises(httpx2.TransportError, match="less than 1024 bytes/s arrived"):
        list(answers.fast_enough(arriving(2.0)))


def test_a_card_of_a_gigabyte_is_refused_before_it_is_read(api, push, tmp_path):
    for name in ("model.safetensors", "config.json", "README.md"):
        (tmp_path / name).write_bytes(b"x")
    source = resolve_model(api, str(tmp_path))
    os.truncate(tmp_path / "README.md", 10**9)

    with pytest.raises(SourceError) as raised:
        read_small(api, source, "README.md")

    assert str(raised.value) == (
        f"{tmp_path}@{source.commit_sha}: `README.md` has more than 100,000,000 bytes, so it is "
        "not read.\n"
        "Use an intact copy of the repo or folder."
    )


@pytest.mark.parametrize("digest", ["../../../../etc/passwd", "", "A" * 64, "0" * 63])
def test_a_digest_that_is_none_never_names_a_file_of_the_cache(api, push, monkeypatch, digest):
    push("tests/model", {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    listed = HfApi.repo_info

    def hostile(self, *args, **more):
        info = listed(self, *args, **more)
        info.siblings[-1].lfs.sha256 = digest
        return info

    monkeypatch.setattr(HfApi, "repo_info", hostile)

    with pytest.raises(SourceError) as raised:
        resolve_model(api, "tests/model")

    assert str(raised.value) == (
        f"tests/model: {api.endpoint} does not answer like a Hub.\nCheck HF_ENDPOINT."
    )
