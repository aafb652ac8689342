"""Whatever goes wrong at whichever call of a push, the repo is as before or complete.

The calls are counted in a push that goes well, so that a call which is added is tried as well.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from lewis_hub.errors import PublishError
from lewis_hub.hub.publish import Publication, publish

ANY = "."
NEVER = 1_000_000
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
FAULTS = {
    "500": lambda hub, skip, times: hub.fail(ANY, 500, skip=skip, times=times),
    "503": lambda hub, skip, times: hub.fail(ANY, 503, skip=skip, times=times),
    "429": lambda hub, skip, times: hub.fail(ANY, 429, skip=skip, times=times),
    "412": lambda hub, skip, times: hub.fail(ANY, 412, skip=skip, times=times),
    "no answer": lambda hub, skip, times: hub.drop(ANY, skip=skip, times=times),
    "lost answer": lambda hub, skip, times: hub.drop(ANY, skip=skip, times=times, after_bytes=0),
}


@pytest.fixture
def folders(tmp_path):
    for name, files in (("before", BEFORE), ("after", AFTER)):
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(content)
    return tmp_path / "before", tmp_path / "after"


def content(hub, repo):
    """What main holds: nothing where there is no repo, or one that was only made."""
    found = hub.store.find("models", *repo.split("/"))
    if found is None:
        return {}
    files = hub.store.resolve(found, "main").files
    return {p: hub.store.blobs.read(f.sha256) for p, f in files.items() if p != ".gitattributes"}


def n_calls(hub, api, folder, repo):
    """How many requests a push makes that goes well."""
    counter = hub.fail(ANY, 500, skip=NEVER)
    publish(api, folder, repo, PUSH, lambda _: None)
    hub.faults.clear()
    return NEVER - counter.skip


def assert_as_before_or_complete(hub, api, folder, repo, before):
    """After a push with faults; and that a rerun completes, with one commit in all."""
    hub.faults.clear()
    found = content(hub, repo)
    assert found in (before, AFTER)

    published = publish(api, folder, repo, PUSH, lambda _: None)

    assert content(hub, repo) == AFTER
    titles = [commit.title for commit in api.list_repo_commits(repo)]
    assert titles.count("Second") == 1
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
    assert tags == {"v2": published.commit_sha}


@pytest.mark.slow  # each case is a push for every call of a push
@pytest.mark.parametrize("new", [False, True], ids=["over a merge", "new repo"])
@pytest.mark.parametrize("times", [1, NEVER], ids=["once", "from then on"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_of_a_push_leaves_the_repo_as_before_or_complete(
    hub, api, folders, no_pauses, fault, times, new
):
    former, folder = folders
    repos = (f"tests/merged-{number}" for number in itertools.count())

    def prepared():
        repo = next(repos)
        if not new:
            publish(api, former, repo, Publication("First"), lambda _: None)
        return repo

    for call in range(n_calls(hub, api, folder, prepared())):
        repo = prepared()
        FAULTS[fault](hub, call, times)
        with suppress(PublishError):
            publish(api, folder, repo, PUSH, lambda _: None)
        assert_as_before_or_complete(hub, api, folder, repo, {} if new else BEFORE)


@pytest.mark.slow
def test_somebody_elses_commit_at_any_call_is_never_overwritten(hub, api, folders, no_pauses):
    """A stale parent for real: the repo moves while the push waits for the answer to one call."""
    former, folder = folders
    repos = (f"tests/merged-{number}" for number in itertools.count())

    def prepared():
        repo = next(repos)
        publish(api, former, repo, Publication("First"), lambda _: None)
        return repo

    for call in range(n_calls(hub, api, folder, prepared())):
        repo = prepared()
        strike = hub.faults.take
        seen = itertools.count()

        def take(method, target, strike=strike, seen=seen, call=call, repo=repo):
            if next(seen) == call:
                hub.faults.take = strike
                theirs = hub.api()
                theirs.upload_file(path_or_fileobj=b"x", path_in_repo="theirs", repo_id=repo)
            return strike(method, target)

        hub.faults.take = take
        with suppress(PublishError):
            publish(api, folder, repo, PUSH, lambda _: None)
        hub.faults.take = strike
        found = content(hub, repo)
        assert found in (BEFORE | {"theirs": b"x"}, AFTER | {"theirs": b"x"})


def test_two_processes_that_push_at_once_end_as_whole_commits_or_a_clear_refusal(hub, folders):
    former, folder = folders
    repo = f"{hub.user}/merged"
    publish(hub.api(), former, repo, Publication("First"), lambda _: None)
    hub.faults.delay_s = 0.15  # so that they are in the midst of it together
    wholes = {}
    for name in ("one", "two"):
        for path, told in (AFTER | {"config.json": f'["{name}"]'.encode()}).items():
            (folder.parent / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder.parent / name / path).write_bytes(told)
        wholes[name] = AFTER | {"config.json": f'["{name}"]'.encode()}
    environment = os.environ | {"HF_TOKEN": hub.write_token}
    command = [sys.executable, "-m", "lewis_hub", "push"]

    running = {
        name: subprocess.Popen(
            [*command, str(folder.parent / name), repo, "--json", "-q"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in wholes
    }
    told = {name: process.communicate(timeout=60) for name, process in running.items()}

    hub.faults.clear()
    commits = [c.title for c in hub.api().list_repo_commits(repo)].count("Merge with lewis-hub")
    winners = [name for name, process in running.items() if process.returncode == 0]
    assert len(winners) == commits >= 1
    assert content(hub, repo) in [wholes[name] for name in winners]
    for name in wholes.keys() - set(winners):
        assert f"{repo}: somebody pushed " in told[name][1]
