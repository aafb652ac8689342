"""Whatever goes wrong at whichever call of a push, the repo is as before or complete.

The calls are counted in a push that goes well, so that a call which is added is tried as well.
"""

from __future__ import annotations

import itertools
import json
import re
from contextlib import suppress

import pytest
from faulty_proxy import proxy
from hub_faults import ANY, FAULTS, NEVER, run_concurrently
from hub_models import push_by_another, watch_requests
from huggingface_hub import HfApi

from lewis_hub.errors import PublishError
from lewis_hub.hub.publish import Publication, publish

BEFORE = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"1" * 3000,
    "model-00002-of-00002.safetensors": b"2" * 3000,
    "lewis/lock.json": json.dumps({"outputs": {"lewis/old.png": {}}}).encode(),
    "lewis/old.png": b"\x89PNG",
}
AFTER = {
    "config.json": b"[]",
    "README.md": b"---\nlicense: mit\n---\n# Merged\n",
    "model.safetensors": b"3" * 3000,
    "lewis/lock.json": b'{"outputs": {}}',
}
PUSH = Publication("Second", tag="v2")


@pytest.fixture
def prepare(api, tmp_path):
    """Makes a repo that holds a merge, or a name for one, and a folder that is to be pushed there.

    The weights are new each time: the Hub asks nobody for what it has already.
    """
    numbers = itertools.count()

    def prepared(new=False):
        number = next(numbers)
        after = AFTER | {"model.safetensors": b"%08d" % number * 400}
        repo = f"tests/merged-{number}"
        if not new:
            former = write(tmp_path / "before", BEFORE)
            publish(api, former, repo, Publication("First"), lambda _: None)
        return repo, write(tmp_path / "after", after), after

    return prepared


def write(folder, files):
    for path, told in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(told)
    return folder


def content(hub, repo):
    """What main holds: nothing where there is no repo, or one that was only made."""
    found = hub.store.find("models", repo)
    if found is None:
        return {}
    files = found.resolve("main").files
    return {
        p: hub.store.blobs.path(f.sha256).read_bytes()
        for p, f in files.items()
        if p != ".gitattributes"
    }


def n_calls(hub, api, repo, folder, after):
    """How many requests a push makes that goes well."""
    counter = hub.fail(ANY, 500, skip=NEVER)
    publish(api, folder, repo, PUSH, lambda _: None)
    hub.faults.clear()
    assert content(hub, repo) == after
    return NEVER - counter.skip


def assert_as_before_or_complete(hub, api, repo, folder, before, after):
    """After a push with faults; and that a rerun completes, with one commit in all."""
    hub.faults.clear()
    assert content(hub, repo) in (before, after)

    published = publish(api, folder, repo, PUSH, lambda _: None)

    assert content(hub, repo) == after
    titles = [commit.title for commit in api.list_repo_commits(repo)]
    assert titles.count("Second") == 1
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
    assert tags == {"v2": published.commit_sha}


@pytest.mark.slow  # each case is a push for every call of a push
@pytest.mark.parametrize("new", [False, True], ids=["over a merge", "new repo"])
@pytest.mark.parametrize("times", [1, NEVER], ids=["once", "from then on"])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "cut answer"])
def test_a_fault_at_any_call_of_a_push_leaves_the_repo_as_before_or_complete(
    hub, api, prepare, no_pauses, fault, times, new
):
    for call in range(n_calls(hub, api, *prepare(new))):
        repo, folder, after = prepare(new)
        FAULTS[fault](hub, call, times)
        with suppress(PublishError):
            publish(api, folder, repo, PUSH, lambda _: None)
        assert times == NEVER or not hub.faults.pending  # it did strike
        assert_as_before_or_complete(hub, api, repo, folder, {} if new else BEFORE, after)


@pytest.mark.slow
def test_somebody_elses_commit_at_any_call_is_never_overwritten(hub, api, prepare, no_pauses):
    """A stale parent for real: the repo moves while the push waits for the answer to one call."""
    for call in range(n_calls(hub, api, *prepare())):
        repo, folder, after = prepare()
        seen = itertools.count()

        def hear(method, target, seen=seen, call=call, repo=repo):
            if next(seen) == call:
                push_by_another(hub, repo)

        with watch_requests(hub, hear), suppress(PublishError):
            publish(api, folder, repo, PUSH, lambda _: None)
        assert content(hub, repo) in [side | {"theirs": b"x"} for side in (BEFORE, after)]


def test_two_processes_that_push_at_once_end_as_whole_commits_or_a_clear_refusal(
    hub, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    repo = f"{hub.user}/merged"
    publish(hub.api(), write(tmp_path / "before", BEFORE), repo, PUSH, lambda _: None)
    wholes = {name: AFTER | {"config.json": f'["{name}"]'.encode()} for name in ("one", "two")}
    for name, files in wholes.items():
        write(tmp_path / name, files)
    commands = {name: (["push", name, repo, "--json", "-q"], tmp_path) for name in wholes}

    done = run_concurrently(hub, 0.15, commands)  # late enough that both are at work together

    commits = [c.title for c in hub.api().list_repo_commits(repo)].count("Merge with lewis-hub")
    winners = [name for name, process in done.items() if process.returncode == 0]
    assert len(winners) == commits >= 1
    assert content(hub, repo) in [wholes[name] for name in winners]
    for name in wholes.keys() - set(winners):
        assert f"{repo}: somebody pushed " in done[name].stderr


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("call", ["/api/models/.*/revision/", "objects/batch", "/commit/main"])
def test_no_call_waits_for_a_day_and_the_pause_is_told(
    hub, api, prepare, monkeypatch, call, status
):
    repo, folder, _ = prepare()
    hub.fail(call, status, times=NEVER).headers = {"Retry-After": "86400"}
    pauses_s = []
    monkeypatch.setattr("time.sleep", pauses_s.append)

    with pytest.raises(PublishError) as raised:
        publish(api, folder, repo, PUSH, lambda _: None)

    assert pauses_s == []
    assert content(hub, repo) == BEFORE
    told = {
        429: f"{repo}: {hub.url} limits the rate of requests (429).\nWait 86400 s, then run",
        503: f"{repo}: {hub.url} answers 503 and requires a pause of 86,400 s.\n"
        "Calls wait at most 60 s. Wait that long, then run",
    }
    assert str(raised.value).startswith(told[status])


@pytest.mark.parametrize("n_digits", [400, 5000])
@pytest.mark.parametrize("header", ["Retry-After", "RateLimit"])
@pytest.mark.parametrize("call", ["/api/models/.*/revision/", "objects/batch", "/commit/main"])
def test_a_pause_of_any_number_of_digits_is_one_message(hub, api, prepare, call, header, n_digits):
    repo, folder, _ = prepare()
    seconds = "9" * n_digits
    asked = {"Retry-After": seconds, "RateLimit": f'"api";r=0;t={seconds}'}[header]
    hub.fail(call, 429, times=NEVER).headers = {header: asked}

    with pytest.raises(PublishError) as raised:
        publish(api, folder, repo, PUSH, lambda _: None)

    assert content(hub, repo) == BEFORE
    problem = f"{repo}: {hub.url} limits the rate of requests (429).\nWait "
    assert re.match(re.escape(problem) + r"(999999999|1000000000) s, then run", str(raised.value))


@pytest.mark.parametrize("n_parts", [10_000, 10_001])
def test_a_file_is_uploaded_in_as_many_parts_as_the_storage_may_have(hub, tmp_path, n_parts):
    """The storage says no tag of a part, so the upload ends with the first one."""
    folder = write(tmp_path / "after", AFTER | {"model.safetensors": b"4" * n_parts})
    methods = []

    def change(method, target, answer):
        methods.append(method)
        if "objects/batch" not in target:
            return answer.saying(etag=None) if method == "PUT" else answer
        told = json.loads(answer.body)
        for one in told["objects"]:
            upload = one["actions"]["upload"]
            parts = dict.fromkeys(map(str, range(1, n_parts + 1)), upload["href"])
            upload["header"] = {"chunk_size": "1", **parts}
        return answer.sending(json.dumps(told).encode())

    with proxy(hub) as stands:
        stands.answered = change
        api = HfApi(endpoint=stands.url, token=hub.write_token)
        with pytest.raises(PublishError) as error:
            publish(api, folder, "tests/parts", PUSH, lambda _: None)
    told = f"cannot reach {stands.url} (a file is to be uploaded in 10,001 parts, and 10,000 are"
    assert (told in str(error.value)) == (n_parts > 10_000)
    assert ("PUT" in methods) == (n_parts <= 10_000)
