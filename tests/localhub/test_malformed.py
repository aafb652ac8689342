"""Requests that no client sends: they are refused, and the Hub goes on."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import httpx2
import pytest

from lewis_hub.localhub import call
from lewis_hub.localhub.repositories import TOKEN_EXCHANGE
from lewis_hub.localhub.server import serve
from lewis_hub.localhub.store import git_file

REPO = "/api/models/acme/base"
LFS = "/acme/base.git/info/lfs/objects"
DEEP = b"[" * 100_000
HEADER = b'{"key":"header","value":{"summary":"Change"}}\n'


def send(hub, method, path, body=b"", token=None, **headers):
    told = {"Authorization": f"Bearer {token or hub.write_token}", **headers}
    return httpx2.request(method, hub.url + path, content=body, headers=told)


def test_only_this_machines_names_are_served(hub, push):
    push("acme/base", {"a.txt": b"x"})
    port = hub.url.rpartition(":")[2]

    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST", "localhost:9000"):
        assert send(hub, "GET", REPO, Host=host).status_code == 200
    for host in (f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "x"):
        answer = send(hub, "GET", REPO, Host=host)
        assert answer.status_code == 421
        assert answer.json() == {"error": "This Hub answers at 127.0.0.1 and localhost only"}


def test_a_body_is_not_read_before_the_token(hub, monkeypatch):
    body = bytes(call.MAX_UNKNOWN_BODY_BYTES + 1)
    read = []
    stream = call.Request.stream

    async def counted(request):
        async for piece in stream(request):
            read.append(len(piece))
            yield piece

    monkeypatch.setattr(call.Request, "stream", counted)

    assert send(hub, "POST", "/api/repos/create", body, token="hf_unknown").status_code == 401
    assert read == []
    path = hub.url + "/api/repos/create"
    assert httpx2.post(path, content=body).status_code == 413
    monkeypatch.setattr(call, "MAX_BODY_BYTES", 1000)
    assert send(hub, "POST", "/api/repos/create", bytes(1001)).status_code == 413


def test_verify_says_nothing_to_those_who_may_not_upload(hub, push):
    push("acme/base", {"m.bin": b"x" * 3000})
    file = hub.store.find("models", "acme/base").resolve("main").files["m.bin"]
    body = json.dumps({"oid": file.sha256, "size": 3000}).encode()

    assert send(hub, "POST", f"{LFS}/verify", body).status_code == 200
    assert send(hub, "POST", f"{LFS}/verify", body, token=hub.read_token).status_code == 403
    assert httpx2.post(f"{hub.url}{LFS}/verify", content=body).status_code == 401


MALFORMED = {
    "no JSON": ("/api/repos/create", b"{"),
    "a list": ("/api/repos/create", b"[]"),
    "deep": ("/api/repos/create", b'{"a":' + DEEP),
    "half a letter of a repo": ("/api/repos/create", b'{"name": "a", "type": "\\ud800"}'),
    "not UTF-8": ("/api/repos/create", b"\xff"),
    "a number as name": ("/api/repos/create", b'{"name": 5, "organization": [1]}'),
    "a kind that is a list": ("/api/repos/create", b'{"name": "a", "type": ["model"]}'),
    "files that are none": (f"{REPO}/preupload/main", b'{"files": 5}'),
    "no files": (f"{REPO}/preupload/main", b"{}"),
    "no base64": (
        f"{REPO}/preupload/main",
        b'{"files": [{"path": "a", "size": 1, "sample": "a"}]}',
    ),
    "a size that is a text": (
        f"{REPO}/preupload/main",
        b'{"files": [{"path": "a", "size": "x", "sample": ""}]}',
    ),
    "an endless size": (
        f"{REPO}/preupload/main",
        b'{"files": [{"path": "a", "size": 1e999, "sample": ""}]}',
    ),
    "a commit line without JSON": (f"{REPO}/commit/main", HEADER + b"x"),
    "a commit line that is a number": (f"{REPO}/commit/main", HEADER + b"5"),
    "a commit without header": (f"{REPO}/commit/main", b""),
    "a commit line without value": (f"{REPO}/commit/main", HEADER + b'{"key":"file"}'),
    "a path that is a number": (
        f"{REPO}/commit/main",
        HEADER + b'{"key":"file","value":{"path":5,"content":""}}',
    ),
    "a content without base64": (
        f"{REPO}/commit/main",
        HEADER + b'{"key":"file","value":{"path":"a","content":"a"}}',
    ),
    "half a letter": (
        f"{REPO}/commit/main",
        b'{"key":"header","value":{"summary":"\\ud800"}}',
    ),
    "a pull request without title": (f"{REPO}/discussions", b'{"pullRequest": true, "title": 5}'),
    "objects that are none": (f"{LFS}/batch", b'{"objects": [5]}'),
    "an object with a long size": (
        f"{LFS}/batch",
        b'{"objects": [{"oid": "a", "size": NaN}]}',
    ),
    "a Job with an infinite image": (
        "/api/scheduled-jobs/acme",
        b'{"schedule": {}, "jobSpec": {"dockerImage": Infinity, "command": ["true"]}}',
    ),
    "a Job with a number beyond all": (
        "/api/scheduled-jobs/acme",
        b'{"schedule": {}, "jobSpec": {"dockerImage": 1e999, "command": ["true"]}}',
    ),
    "an object without size": (f"{LFS}/verify", b'{"oid": "a"}'),
    "no subject": (
        "/oauth/token",
        json.dumps({"grant_type": TOKEN_EXCHANGE, "resource": ["a"]}).encode(),
    ),
    "gated by a number": (f"{REPO}/settings", b'{"gated": 5}'),
    "a tag of a list": (f"{REPO}/tag/main", b"[1]"),
}


@pytest.mark.parametrize(
    ("path", "content", "named"),
    [
        ("/api/repos/create", b'{"a":[%s]}', "The body"),
        (f"{REPO}/preupload/main", b'{"files":[%s]}', "The body"),
        (f"{LFS}/batch", b'{"objects":[%s]}', "The body"),
        (
            f"{REPO}/commit/main",
            HEADER + b'{"key":"file","value":{"a":[%s]}}',
            "A line of the commit",
        ),
    ],
)
def test_json_of_very_many_values_is_refused(hub, push, path, content, named):
    """256 MiB of empty lists would take tens of gigabytes."""
    push("acme/base", {"a.txt": b"x"})

    answer = send(hub, "POST", path, content % b",".join([b"{}"] * 500_000))

    assert answer.status_code == 400
    problem = r"it has 1,000,\d\d\d values, the limit is 1,000,000"
    assert re.fullmatch(f"{named}: {problem}", answer.json()["error"])


def test_a_question_for_very_many_paths_is_refused(hub, push):
    push("acme/base", {"a.txt": b"x"})

    answer = send(hub, "POST", f"{REPO}/paths-info/main", b"&".join([b"paths=a"] * 100_001))

    assert (answer.status_code, answer.json()["error"]) == (
        400,
        "The body: it has more than 100,000 fields",
    )


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_malformed_is_refused(hub, push, kind):
    push("acme/base", {"a.txt": b"x"})
    path, body = MALFORMED[kind]

    answer = send(hub, "PUT" if path.endswith("settings") else "POST", path, body)

    assert answer.status_code in ({403} if path == "/oauth/token" else {400})
    assert answer.json()["error"]
    assert send(hub, "GET", f"{REPO}/commits/main").status_code == 200


def test_verify_says_nothing_of_files_outside_of_the_blobs(hub, push):
    push("acme/base", {"a.txt": b"x"})
    size = hub.users.stat().st_size

    for oid in ("../../users.json", str(hub.users), "a\0b"):
        body = json.dumps({"oid": oid, "size": size}).encode()
        assert send(hub, "POST", f"{LFS}/verify", body).status_code == 404


@pytest.mark.parametrize(
    "metadata",
    [
        "d: 2024-13-45",
        "2024-01-01: x",
        "x: .nan",
        'x: "\\ud800"',
        "? [a, b]\n: c",
        "x: &a [*a]",
        "x: " + "[" * 5000,
        "x: " + "y" * 3_000_000,
    ],
)
def test_a_card_that_cannot_be_read_leaves_its_pages(hub, push, metadata):
    card = f"---\n{metadata}\n---\n[link](//[)\n".encode()
    push("acme/base", {"a.txt": b"x"})
    repo = hub.store.find("models", "acme/base")
    head = repo.resolve("main")
    file = git_file(card, hub.store.blobs.add(card))
    made = replace(head, parent=head.sha, files={**head.files, "README.md": file})
    hub.store.add_commit(repo, made, "refs/heads/main")

    assert send(hub, "GET", REPO).json()["cardData"] == {}
    assert send(hub, "GET", "/acme/base").status_code == 200
    checked = json.dumps({"content": card.decode()}).encode()
    assert send(hub, "POST", "/api/validate-yaml", checked).status_code == 400


SPEC = {"dockerImage": "x", "command": ["true"]}
BROKEN_JOBS = {
    "no command": {},
    "a command that is a number": SPEC | {"command": 5},
    "a word with a null byte": SPEC | {"command": ["a\0"]},
    "a variable that is a number": SPEC | {"environment": {"A": 5}},
    "an endless timeout": SPEC | {"timeoutSeconds": 1e300},
    "a timeout that is a text": SPEC | {"timeoutSeconds": "soon"},
    "a volume without source": SPEC | {"volumes": [{"type": "bucket"}]},
    "a volume of a number": SPEC | {"volumes": [5]},
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A Hub that runs Jobs."""
    with serve(tmp_path_factory.mktemp("hub"), jobs=True) as running:
        yield running


@pytest.mark.parametrize("kind", BROKEN_JOBS)
def test_a_malformed_job_is_refused(running, kind):
    spec = BROKEN_JOBS[kind]
    jobs, schedules = (f"/api/{noun}/{running.user}" for noun in ("jobs", "scheduled-jobs"))

    answer = send(running, "POST", jobs, json.dumps(spec).encode())

    assert answer.status_code == 400
    assert answer.json()["error"]
    if spec:
        scheduled = json.dumps({"schedule": "@daily", "jobSpec": spec}).encode()
        assert send(running, "POST", schedules, scheduled).status_code == 400
    assert send(running, "GET", jobs).json() == []


def test_a_job_mounts_nothing_outside_of_its_bucket(running):
    bucket = f"/api/buckets/{running.user}/data"
    volume = {"type": "bucket", "source": f"{running.user}/data", "mountPath": "/data"}
    assert send(running, "POST", bucket).status_code in {200, 409}

    for path in ("..", "../../..", "/"):
        spec = SPEC | {"volumes": [volume | {"path": path}]}
        jobs = f"/api/jobs/{running.user}"
        assert send(running, "POST", jobs, json.dumps(spec).encode()).status_code == 404
    for line in (b"5", b"{}", b'{"type": "addFile"}', b'{"type": "addFile", "path": "a\\u0000"}'):
        assert send(running, "POST", f"{bucket}/batch", line).status_code == 400


def test_a_name_that_no_disk_can_hold_is_refused(running):
    buckets = f"/api/buckets/{running.user}"
    assert send(running, "POST", f"{buckets}/data").status_code in {200, 409}
    volume = {"type": "bucket", "source": f"{running.user}/data", "path": "b" * 300}
    spec = json.dumps(SPEC | {"volumes": [volume | {"mountPath": "/data"}]}).encode()

    for path, body in ((f"{buckets}/{'a' * 300}", b""), (f"/api/jobs/{running.user}", spec)):
        answer = send(running, "POST", path, body)
        assert answer.status_code == 400
        assert answer.json() == {"error": "A name is longer than the disk allows"}
