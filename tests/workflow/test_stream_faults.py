"""Whatever goes wrong at whichever call of a stream, the repo is as before or complete.

The calls are those of a stream that goes well: of each kind the first and the last are struck, so
that a call which is added is tried as well. One is known by its kind and by how many of that come
before it: how many come in all changes from run to run. The models are tiny: one block, in two
shards.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from contextlib import contextmanager, suppress

import pytest
from hub_faults import FAULTS, NEVER, run_concurrently
from hub_models import push_by_another, push_folder, tiny, watch_requests
from streamed_merges import REPO, fetched_bytes, hub_digests, local_digests, read_published

import lewis_hub
from lewis_hub.errors import LewisHubError
from lewis_hub.localhub.hub import Fault
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resources import Execution

RECIPE = """base_model: tests/base
models: [{model: tests/expert}]
merge_method: ties
parameters: {density: 0.5}
publish: {repo: tests/streamed, tag: v1}
"""
SMALL = Execution(runner="inline", max_shard_bytes=6_000)
TITLE = "Merge with lewis-hub"
# each thread that needs one before it is known asks for it: none but the first two are sure to come
ADDRESS = re.compile(r"/resolve/.*\.safetensors")


@pytest.fixture
def seeded(hub, monkeypatch, tmp_path, no_pauses):
    """Seeds an empty Hub with both models, as often as it is called."""
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    models = [tiny(tmp_path / name, seed) for seed, name in enumerate(("base", "expert"))]

    def seed_anew():
        hub.clear()
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
        for model in models:
            push_folder(hub.api(), model, f"tests/{model.name}")

    return seed_anew


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)


def run(work, recipe=RECIPE):
    """From the look at the target on, as the command does it."""
    asked = parse_recipe(recipe, "recipe.yaml")
    target = lewis_hub.open_target(asked.publish)
    return lewis_hub.stream(asked, target, work, SMALL)


def calls(hub, work):
    """The first and the last call of each kind, as the kind and how many of it come before."""
    counted = Counter()
    with watch_requests(hub, lambda method, target: counted.update([(method, kind(target))])):
        run(work)
    assert len(counted) >= 25  # reads of both sources, and all that a push takes
    for one in counted:
        if ADDRESS.search(one[1]):
            counted[one] = 2
    return [(one, before) for one, n in counted.items() for before in sorted({0, n - 1})]


@contextmanager
def at(hub, call, happen):
    """`happen` is called just before one call is answered, which has to come."""
    (one, before), heard = call, Counter()

    def hear(method, target):
        heard[method, kind(target)] += 1
        if (method, kind(target)) == one and heard[one] == before + 1:
            happen()

    with watch_requests(hub, hear):
        yield
    assert heard[one] > before, call


def kind(target):
    """A request's target without what is another one each time."""
    return re.sub(r"[0-9a-f]{16,}|\d+", "*", target)


@pytest.fixture
def expected(hub, seeded, tmp_path):
    """What a stream publishes: path -> sha256. Documents name commits, which have dates."""
    seeded()
    lewis_hub.merge_models(parse_recipe(RECIPE, "recipe.yaml"), tmp_path / "merged", SMALL)
    return local_digests(tmp_path / "merged")


def weights(found):
    return {path: sha for path, sha in found.items() if path.endswith((".safetensors", "x.json"))}


def assert_complete(hub, expected):
    found = hub_digests(hub)
    assert found.keys() == expected.keys()
    assert weights(found) == weights(expected)
    assert [one.title for one in hub.api().list_repo_commits(REPO)].count(TITLE) == 1
    refs = hub.api().list_repo_refs(REPO)
    assert {tag.name: tag.target_commit for tag in refs.tags} == {
        "v1": refs.branches[0].target_commit
    }


def assert_a_fault_does_no_harm(hub, seeded, tmp_path, expected, fault, times):
    seeded()
    for call in calls(hub, tmp_path / "counted"):
        seeded()
        message = ""
        with at(hub, call, lambda: FAULTS[fault](hub, 0, times)):
            try:
                run(tmp_path / "work")
            except LewisHubError as error:
                message = str(error)
        hub.faults.clear()
        assert times == 1 or message, call  # what stays is told
        assert hub_digests(hub).keys() in (set(), expected.keys())
        claimed = re.search(" ([0-9a-f]{40}) is published, but tag `v1` is not on it: ", message)
        assert bool(hub_digests(hub)) == bool(claimed or not message), call

        run(tmp_path / "work")

        assert_complete(hub, expected)
        assert not list(tmp_path.glob("work*"))


def test_every_kind_of_call_may_fail_once_in_one_stream(hub, seeded, tmp_path, expected):
    seeded()
    strike, struck = hub.faults.take, set()

    def take(method, target):
        one = (method, kind(target))
        if one in struck:
            return strike(method, target)
        struck.add(one)
        return Fault(re.compile(""), 503, 1, method)

    hub.faults.take = take
    run(tmp_path / "work")
    hub.faults.take = strike

    assert len(struck) >= 25
    assert_complete(hub, expected)


@pytest.mark.slow  # each case is two streams for every kind of call
@pytest.mark.parametrize(
    ("fault", "times"),
    [
        *((fault, 1) for fault in FAULTS if fault != "lost answer"),
        *(("500", NEVER), ("no answer", NEVER)),
    ],
)
def test_a_fault_at_any_call_is_survived_or_a_rerun_completes(
    hub, seeded, tmp_path, expected, fault, times
):
    assert_a_fault_does_no_harm(hub, seeded, tmp_path, expected, fault, times)


@pytest.mark.slow
def test_somebody_elses_commit_at_any_call_is_never_overwritten(hub, seeded, tmp_path, expected):
    """A stale parent for real: the repo moves while the stream waits for the answer to a call."""
    n_refused = 0
    seeded()
    hub.api().create_repo(REPO)
    for call in calls(hub, tmp_path / "counted"):
        seeded()
        hub.api().create_repo(REPO)
        with at(hub, call, lambda: push_by_another(hub, REPO)), suppress(LewisHubError):
            run(tmp_path / "work")
        found = hub_digests(hub)
        assert "theirs" in found
        n_refused += found.keys() == {"theirs"}
        assert found.keys() - {"theirs"} in (set(), expected.keys())
        run(tmp_path / "work")
        assert hub_digests(hub).keys() - {"theirs"} == expected.keys()
        assert weights(hub_digests(hub)) == weights(expected)
    assert n_refused > 5


def test_what_the_storage_lost_is_made_again(hub, seeded, tmp_path, expected):
    seeded()
    hub.fail("/commit/main", 500, times=6)
    with pytest.raises(LewisHubError, match="tests/streamed"):
        run(tmp_path / "work")
    (note,) = tmp_path.rglob("model-00002-of-*.safetensors.done.json")
    hub.store.blobs.path(json.loads(note.read_text())["sha256"]).unlink()

    run(tmp_path / "work")

    assert_complete(hub, expected)


def test_a_rerun_neither_makes_nor_sends_again_what_was_sent(hub, seeded, tmp_path, expected):
    seeded()
    hub.fail("/commit/main", 500, times=6)
    with pytest.raises(LewisHubError) as raised:
        run(tmp_path / "work")
    heard = []

    with watch_requests(hub, lambda method, target: heard.append(f"{method} {kind(target)}")):
        run(tmp_path / "work")

    assert str(raised.value).startswith("tests/streamed: ")
    assert not [one for one in heard if one.startswith("PUT")]
    assert fetched_bytes(hub) == {"merge": 0}
    assert_complete(hub, expected)


def test_two_processes_that_stream_to_one_repo_end_as_whole_commits_or_a_clear_refusal(
    hub, seeded, tmp_path
):
    seeded()
    commands = {}
    for name, density in (("one", 0.2), ("two", 0.7)):
        (tmp_path / name).mkdir()
        text = RECIPE.replace("density: 0.5", f"density: {density}").replace(", tag: v1", "")
        (tmp_path / name / "recipe.yaml").write_text(text)
        commands[name] = ["merge", "--stream", "--push", "--json", "-q"], tmp_path / name

    done = run_concurrently(hub, 0.1, commands)  # late enough that both are at work together

    winners = [name for name, process in done.items() if process.returncode == 0]
    titles = [commit.title for commit in hub.api().list_repo_commits(REPO)]
    assert sum(title.startswith(TITLE) for title in titles) == len(winners) >= 1
    recipe = read_published(hub, "lewis/recipe.yaml").decode()
    newest = "one" if "density: 0.2" in recipe else "two"
    assert newest in winners
    lock = json.loads(read_published(hub, "lewis/lock.json"))
    assert {path: one["sha256"] for path, one in lock["outputs"].items()}.items() <= (
        hub_digests(hub).items()
    )
    for name in done.keys() - set(winners):
        told = done[name].stderr
        assert re.search(f"{REPO}: (somebody pushed|.* exists)", told), told
