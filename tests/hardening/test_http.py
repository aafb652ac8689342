"""Every call of resolve, fetch, byte ranges and push, answered wrongly in sixteen ways.

What is asked for is done, or one message says why not; the repo and the cache are as before or
complete; it takes a bounded time; and without the fault the same call completes.
"""

from __future__ import annotations

import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from effort import SEED, times
from faulty_proxy import FAULTS
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import _auth

from lewis_hub.errors import PublishError, SourceError
from lewis_hub.hub.cache import MAX_SMALL_BYTES
from lewis_hub.hub.fetch import fetch, read_small
from lewis_hub.hub.publish import Publication, publish
from lewis_hub.hub.ranges import RemoteFiles, read_range
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.hub.source import cache_root

FILES = {
    "config.json": b'{"model_type": "llama"}' + b" " * 3000,
    "tokenizer.json": b'{"model": {}}' + b" " * 3000,
    "model-00001-of-00002.safetensors": b"1" * 5000,
    "model-00002-of-00002.safetensors": b"2" * 5000,
}
BEFORE = {"config.json": b"{}", "model.safetensors": b"0" * 3000}
AFTER = {"config.json": b"[]", "README.md": b"---\nlicense: mit\n---\n", "lewis/lock.json": b"{}"}
PUSH = Publication("Second", tag="v2")
MOST_S = 20.0  # of one operation, whatever is wrong
LONGEST_PAUSES_S = 700.0  # in all, if they were not skipped: each call pauses for a minute at most
DRAWN = 10  # of an operation's pairs of a call and a fault, in the gate


def put(hub, repo, files):
    """Put files into a repo, which is made if it is missing."""
    hub.api().create_repo(repo, exist_ok=True)
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    hub.api().create_commit(repo, additions, commit_message="Put files")


class Resolve:
    """Pins a model."""

    error = SourceError
    unseen = ()  # faults that nothing can show

    def __init__(self, hub):
        put(hub, "tests/model", FILES)
        self.expected = resolve_model(hub.api(), "tests/model")

    def prepare(self):
        pass

    def run(self, url):
        api = HfApi(endpoint=url, token=False)
        return resolve_model(api, "tests/model") == self.expected

    def is_as_before_or_done(self):
        return True


class Fetch(Resolve):
    """Downloads a model into the cache."""

    def prepare(self):
        shutil.rmtree(cache_root(), ignore_errors=True)

    def run(self, url):
        folder = fetch(HfApi(endpoint=url, token=False), self.expected, lambda _: None)
        return self._found() == FILES and folder == self.expected.snapshot

    def _found(self):
        folder = self.expected.snapshot
        return {path.name: path.read_bytes() for path in folder.glob("*")}

    def is_as_before_or_done(self):
        return self._found().items() <= FILES.items()


class Ranges(Resolve):
    """Reads byte ranges of a file, whose digest is that of the whole file."""

    unseen = ("other bytes",)

    def run(self, url):
        name, remote = "model-00001-of-00002.safetensors", {}
        api = HfApi(endpoint=url, token=False)
        head = read_range(api, self.expected, name, 0, 100)
        files = RemoteFiles(self.expected, url)
        for start in (1000, 3000):
            files.fetch(name, start, start + 500, lambda at, piece: remote.update({at: piece}))
        pieces = b"".join(remote[at] for at in sorted(remote))
        return head == b"1" * 100 and pieces == b"1" * 1000


class Push:
    """Pushes a model over another, and tags it."""

    error = PublishError
    unseen = ()

    def __init__(self, hub):
        self.hub, self.number = hub, 0

    def prepare(self):
        self.number += 1
        self.repo = f"tests/merged-{self.number}"
        put(self.hub, self.repo, BEFORE)
        self.files = AFTER | {"model.safetensors": b"%08d" % self.number * 400}
        for path, content in self.files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(content)

    def run(self, url):
        api = HfApi(endpoint=url, token=self.hub.write_token)
        publish(api, self.folder, self.repo, PUSH, lambda _: None)
        tags = {
            tag.name: tag.target_commit for tag in self.hub.api().list_repo_refs(self.repo).tags
        }
        commits = self.hub.api().list_repo_commits(self.repo)
        titles = [commit.title for commit in commits]
        return (
            self._found() == self.files
            and titles.count("Second") == 1
            and tags == {"v2": commits[0].commit_id}
        )

    def _found(self):
        files = self.hub.store.find("models", self.repo).resolve("main").files
        return {
            path: self.hub.store.blobs.path(file.sha256).read_bytes()
            for path, file in files.items()
            if path != ".gitattributes"
        }

    def is_as_before_or_done(self):
        return self._found() in (BEFORE, self.files)


def cases(behind, operation):
    """Each call of an operation with each fault, once and from then on; in the gate some."""
    calls = calls_of(behind, operation)
    faults = [fault for fault in FAULTS if fault not in operation.unseen]
    pairs = [(call, fault, lasts) for call in calls for fault in faults for lasts in (False, True)]
    return random.Random(SEED).sample(pairs, times(DRAWN, len(pairs)))


@pytest.mark.parametrize("kind", [Resolve, Fetch, Ranges, Push])
def test_a_wrong_answer_to_any_call_does_no_harm(hub, behind, pauses_s, tmp_path, kind, subtests):
    operation = kind(hub)
    operation.folder = tmp_path
    told = []
    for case in cases(behind, operation):
        with subtests.test(str(case)):
            operation.prepare()
            behind.reset(case)
            pauses_s.clear()
            told.append(said(operation, behind.url))
            assert behind.n_struck
            assert operation.is_as_before_or_done()
            assert sum(pauses_s) < LONGEST_PAUSES_S
            assert hub.write_token not in told[-1]
            behind.reset()
            assert operation.run(behind.url)
    assert any(told)


def said(operation, url):
    """The message of an operation; empty if it did what is expected of it."""
    start = time.monotonic()
    try:
        assert operation.run(url)
        message = ""
    except operation.error as error:
        message = str(error)
        assert len(message.splitlines()) == 2, message
    assert time.monotonic() - start < MOST_S
    return message


def calls_of(behind, operation):
    """The calls of an operation that goes well."""
    operation.prepare()
    behind.reset()
    assert operation.run(behind.url)
    return list(dict.fromkeys(behind.calls))


def test_what_two_runs_need_at_once_is_downloaded_once(hub, behind):
    operation, forward = Fetch(hub), behind.answered
    n_calls = len(calls_of(behind, operation))

    def slowly(method, target, answer):
        answer = forward(method, target, answer)
        time.sleep(0.2)
        return answer

    operation.prepare()
    behind.reset()
    behind.answered = slowly
    with ThreadPoolExecutor(2) as pool:
        done = [*pool.map(operation.run, [behind.url] * 2)]

    assert done == [True, True]
    assert len(behind.calls) == n_calls


def test_a_slow_answer_to_a_lookup_is_given_up(hub, behind, pauses_s):
    operation = Resolve(hub)
    behind.reset((calls_of(behind, operation)[0], "slow", True))

    with pytest.raises(SourceError) as raised:
        operation.run(behind.url)

    told = f"tests/model: cannot reach {behind.url} (less than 1024 bytes/s arrived)."
    assert str(raised.value).startswith(told)


@pytest.mark.parametrize(
    "fault", ["a page", "not compressed", "nothing", "too deep", "too long", "cut"]
)
def test_after_an_unreadable_answer_the_commit_is_found_on_the_hub(
    hub, behind, pauses_s, tmp_path, fault
):
    operation = Push(hub)
    operation.folder = tmp_path
    (commit,) = [call for call in calls_of(behind, operation) if "/commit/" in call[1]]
    operation.prepare()
    behind.reset((commit, fault, False))

    assert operation.run(behind.url)

    assert behind.n_struck == 1


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("name", "revision", "target"),
    [
        ("tests/model", "none", "/api/models/tests/model/refs"),
        ("tests/none", None, "/api/datasets/tests/none"),
    ],
)
def test_a_refusal_is_one_message_whatever_the_hub_answers_about_it(
    hub, behind, pauses_s, fault, name, revision, target
):
    put(hub, "tests/model", FILES)
    behind.reset((("GET", target, 0), fault, True))

    with pytest.raises(SourceError) as raised:
        resolve_model(HfApi(endpoint=behind.url, token=False), name, revision)

    assert behind.n_struck
    assert len(str(raised.value).splitlines()) == 2


SIGN_IN = ("POST", "/oauth/token", 0)
NO_TOKENS = (b"{}", b"[]", b"5", b'{"access_token": 5}', b'{"access_token": null}')


@pytest.fixture
def published_by_identity(hub, behind, pauses_s, tmp_path, monkeypatch):
    """A push with a token that the Hub gives to the identity of a workflow."""
    operation = Push(hub)
    operation.folder = tmp_path
    operation.prepare()
    monkeypatch.setattr(constants, "ENDPOINT", behind.url)
    monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)
    monkeypatch.setenv("HF_OIDC_RESOURCE", operation.repo)
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", "signed by GitHub")
    hub.publishers["signed by GitHub"] = operation.repo
    api = HfApi(endpoint=behind.url)
    return lambda: publish(api, tmp_path, operation.repo, PUSH, lambda _: None)


@pytest.mark.parametrize(
    "fault",
    ["a page", "too deep", "nothing", "a redirect loop", "not compressed", "cut", "429 for a day"],
)
def test_a_wrong_answer_to_a_sign_in_is_one_message(behind, published_by_identity, fault):
    behind.reset((SIGN_IN, fault, True))
    with pytest.raises(PublishError) as raised:
        published_by_identity()

    assert behind.n_struck
    assert len(str(raised.value).splitlines()) == 2
    assert ("limits the rate of requests" in str(raised.value)) == (fault == "429 for a day")
    behind.reset()
    assert published_by_identity().changed


@pytest.mark.parametrize("token", NO_TOKENS)
def test_a_sign_in_without_a_token_is_one_message(behind, published_by_identity, token):
    forward = behind.answered

    def without(method, target, answer):
        answer = forward(method, target, answer)
        return answer.sending(token) if target == SIGN_IN[1] else answer

    behind.answered = without
    with pytest.raises(PublishError) as raised:
        published_by_identity()

    assert len(str(raised.value).splitlines()) == 2


def test_weights_do_not_become_text_of_the_commit_whatever_the_hub_answers(
    hub, behind, pauses_s, tmp_path
):
    operation, forward = Push(hub), behind.answered
    operation.folder = tmp_path
    operation.prepare()
    with (tmp_path / "model.safetensors").open("wb") as sparse:
        sparse.truncate(MAX_SMALL_BYTES + 1)

    def as_text(method, target, answer):
        answer = forward(method, target, answer)
        return answer.sending(answer.body.replace(b'"lfs"', b'"regular"'))

    behind.answered = as_text
    with pytest.raises(PublishError) as raised:
        operation.run(behind.url)

    assert str(raised.value) == (
        f"{operation.repo}: it stores `model.safetensors` as text and not as a large file.\n"
        "Let its .gitattributes say `*.safetensors filter=lfs`, then run again."
    )
    assert operation._found() == BEFORE
    assert not [call for call in behind.calls if "/commit/" in call[1]]


@pytest.mark.parametrize("way", ["with the model", "alone"])
def test_ten_bytes_an_answer_end_a_download_of_a_small_file_too(hub, behind, pauses_s, way):
    operation = Fetch(hub)
    forward = behind.answered

    def run():
        if way == "with the model":
            return operation.run(behind.url)
        api = HfApi(endpoint=behind.url, token=False)
        return read_small(api, operation.expected, "config.json") == FILES["config.json"]

    def ten_bytes(method, target, answer):
        answer = forward(method, target, answer)
        if method == "GET" and "config.json" in target:
            return replace(answer, body=answer.body[:10])
        return answer

    behind.answered = ten_bytes
    with pytest.raises(SourceError) as raised:
        run()

    told = f"{operation.expected.pinned}: cannot reach {behind.url} (peer closed connection"
    assert str(raised.value).startswith(told)
    assert len(behind.calls) < 60
    behind.answered = forward
    assert run()
