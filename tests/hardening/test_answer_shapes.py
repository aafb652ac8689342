"""JSON of another shape in the answer to any call of resolve and push.

A mirror or a proxy may send it. What is asked for is done, or one message says why not; a push
leaves the repo as before or complete, and after it the same push completes.
"""

from __future__ import annotations

import copy
import json
import random

import pytest
from effort import SEED, times
from faulty_proxy import proxy

from hardening.test_http import Push, Resolve, calls_of

OTHERS = (None, 5, "x", [], {"x": 1}, "a\nb::error::c")
MISSING = object()
DRAWN = 40  # of an operation's values, in the gate


@pytest.fixture
def behind(hub, monkeypatch):
    """A proxy of the Hub; nothing waits."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    with proxy(hub) as stands:
        yield stands


def places(value, path=()):
    """The paths of the values in a document; of a list, those in its first item."""
    yield path
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value[:1])
        for key, item in inner:
            yield from places(item, (*path, key))


def changed(document, path, other):
    """The document with another value at a path, or without it."""
    if not path:
        return None if other is MISSING else other
    document = copy.deepcopy(document)
    around = document
    for key in path[:-1]:
        around = around[key]
    if other is MISSING:
        del around[path[-1]]
    else:
        around[path[-1]] = other
    return document


def striking(behind, forward, call, change):
    """Answer one call by JSON that `change` makes of the Hub's."""

    def answered(method, target, answer):
        answer = forward(method, target, answer)
        if behind.calls[-1] == call and answer.headers.get("content-type") == "application/json":
            answer = answer.sending(json.dumps(change(json.loads(answer.body))).encode())
        return answer

    behind.answered = answered


def cases(behind, operation, calls, n_drawn):
    """Each of these calls with each value of its answer replaced; in the gate some."""
    forward, found = behind.answered, []
    for call in calls:
        seen = []
        striking(behind, forward, call, lambda answer, seen=seen: seen.append(answer) or answer)
        operation.prepare()
        behind.reset()
        assert operation.run(behind.url)
        paths = places(seen[0]) if seen else ()
        found += [(call, path, other) for path in paths for other in (MISSING, *OTHERS)]
        behind.answered = forward
    return random.Random(SEED).sample(found, times(n_drawn, len(found)))


def said(operation, url):
    """The message of an operation; empty if there is none."""
    try:
        operation.run(url)
    except operation.error as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", [Resolve, Push])
def test_json_of_another_shape_does_no_harm(hub, behind, tmp_path, kind, subtests):
    operation, forward = kind(hub), behind.answered
    operation.folder = tmp_path
    told = []
    for call, path, other in cases(behind, operation, calls_of(behind, operation), DRAWN):
        with subtests.test(f"{call} {path} {other!r}"):
            operation.prepare()
            behind.reset()
            striking(behind, forward, call, lambda answer, p=path, o=other: changed(answer, p, o))
            told.append(said(operation, behind.url))
            behind.answered = forward
            behind.reset()
            assert len(told[-1].splitlines()) in (0, 2), told[-1]
            assert operation.is_as_before_or_done()
            assert operation.run(behind.url)
    assert any(told)
