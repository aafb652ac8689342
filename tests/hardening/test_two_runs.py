"""Two or three runs on one output, in every order of their calls on files that was drawn.

Each run is a thread, and only one runs at a time: before each call of the system on the folder, the
turn may pass to the other. A schedule, exhaustive or drawn from a seed, decides when.
"""

from __future__ import annotations

import random
import threading
from contextlib import contextmanager
from functools import partial

import pytest
from effort import EFFORT, SEED, times
from file_calls import below, heard, recorded
from hub_models import tiny

import lewis_hub
from lewis_hub.checkpoint.writer import OutputTensor, ShardWriter, lay_out
from lewis_hub.errors import OutputError
from lewis_hub.files import write_whole
from lewis_hub.merge.workspace import open_workspace
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resources import Execution

LAYOUTS = lay_out([OutputTensor(name, "F32", (2,)) for name in "ab"], 8)
FILES = [*(layout.name for layout in LAYOUTS), "document.json"]
MADE = "made"
REFUSALS = ("another run is working on it.", "it exists and holds something else than this merge.")
TURN_S = 60.0  # nothing waits so long: a schedule that does is a deadlock


class Turns:
    """Lets one of several threads run at a time; `choose(running, n_calls)` names the next."""

    def __init__(self, choose):
        self.choose, self.running, self.n_calls = choose, [], 0
        self.changed, self.own, self.turn = threading.Condition(), threading.local(), None

    def hear(self, _call=None):
        """Before a call on a file: pass the turn on, and wait for it."""
        number = getattr(self.own, "number", None)
        if number is None:  # not one of the runs
            return
        with self.changed:
            self.n_calls += 1
            self._next()
            self._wait(number)

    def _next(self):
        self.turn = self.choose(self.running, self.n_calls) if self.running else None
        self.changed.notify_all()

    def _wait(self, number):
        assert self.changed.wait_for(lambda: self.turn == number, TURN_S), "a deadlock"

    def run(self, works):
        """Run all works, each to what it returns."""
        results = {}

        def worked(number):
            self.own.number = number
            with self.changed:
                self._wait(number)
            try:
                results[number] = works[number]()
            finally:
                with self.changed:
                    self.running.remove(number)
                    self._next()

        self.running = list(range(len(works)))
        threads = [threading.Thread(target=worked, args=(number,)) for number in self.running]
        for thread in threads:
            thread.start()
        with self.changed:
            self._next()
        for thread in threads:
            thread.join(2 * TURN_S)
        assert set(results) == set(range(len(works)))
        return [results[number] for number in range(len(works))]


def write_output(output, content, replace):
    """A run that writes two shards and a document."""
    try:
        with open_workspace(output, replace=replace) as work:
            for layout in LAYOUTS:
                with ShardWriter(work.folder, layout, stays_cached=False) as shard:
                    shard.write(layout.starts[0], memoryview(content))
                    shard.finish()
            write_whole(work.folder / "document.json", content.hex())
            work.finish(FILES)
    except OutputError as error:
        return error.problem
    return MADE


CONTENTS = (b"11111111", b"22222222", b"33333333")


def expected(content):
    shards = {layout.name: layout.header + content for layout in LAYOUTS}
    return shards | {"document.json": content.hex().encode()}


def run_all(folder, choose, replace, n_runs=2):
    """Run them in a schedule; assert that what is there is always one of them, whole."""
    folder.mkdir()
    output, turns, contents = folder / "merged", Turns(choose), CONTENTS[:n_runs]
    wholes = [expected(content) for content in contents]

    def hear(call):
        turns.hear(call)
        if output.exists():
            assert below(output) in wholes

    with heard([folder], hear):
        works = [partial(write_output, output, content, replace) for content in contents]
        outcomes = turns.run(works)
    assert set(outcomes) <= {MADE, *REFUSALS}
    made = [whole for whole, outcome in zip(wholes, outcomes, strict=True) if outcome == MADE]
    assert below(output) in made
    assert replace or len(made) == 1
    assert [path.name for path in folder.iterdir()] == ["merged"]
    return turns.n_calls


@pytest.mark.parametrize("replace", [False, True], ids=["new", "over another"])
def test_a_second_run_may_come_before_any_call_of_a_first(tmp_path, replace):
    n_calls = run_all(tmp_path / "alone", lambda running, _: running[0], replace)

    assert n_calls > 50
    for k in range(0, n_calls, 4 if EFFORT == 1 else 1):
        run_all(
            tmp_path / str(k),
            lambda running, n, k=k: running[0] if n < k else running[-1],
            replace,
        )


@pytest.mark.parametrize("replace", [False, True], ids=["new", "over another"])
def test_two_runs_may_take_turns_in_any_order(tmp_path, replace):
    for seed in range(SEED, SEED + times(25, 5000)):
        draw = random.Random(seed)
        stays = draw.choice((0.5, 0.8, 0.95))  # long turns too
        last = [0]

        def choose(running, _, draw=draw, stays=stays, last=last):
            if last[0] not in running or draw.random() > stays:
                last[0] = draw.choice(running)
            return last[0]

        run_all(tmp_path / str(seed), choose, replace)


def in_phases(*phases):
    """Run after run: each phase is the number of a run, and of its calls; None: all that follow."""
    left = [list(phase) for phase in phases]

    def choose(running, _):
        while left[0][0] not in running or left[0][1] == 0:
            left.pop(0)
        if left[0][1] is not None:
            left[0][1] -= 1
        return left[0][0]

    return choose


def test_a_third_run_may_begin_when_a_first_ends_that_a_second_waited_for(tmp_path):
    """The first deletes its lock when the second has opened it, and the third makes another."""
    begin = tmp_path / "alone"
    begin.mkdir()
    calls = recorded([begin], lambda: write_output(begin / "merged", CONTENTS[0], True))
    locking = [call.name for call in calls].index("flock")
    assert (calls[locking].path, calls[-1].name) == (calls[-1].path, "unlink")
    step = 8 if EFFORT == 1 else 1
    for n_second in range(locking - 1, locking + 6):
        for n_third in range(locking, len(calls), step):
            first = (0, len(calls))  # but for the last: it deletes its lock
            phases = (first, (1, n_second), (0, None), (2, n_third), (1, None), (2, None))
            place = tmp_path / f"{n_second}-{n_third}"
            run_all(place, in_phases(*phases), replace=True, n_runs=3)


RECIPE = """base_model: BASE
models: [{model: EXPERT}]
merge_method: ties
parameters: {density: DENSITY}
"""
SMALL = Execution(runner="inline", max_shard_bytes=6_000)


@contextmanager
def in_order(folder, seed):
    """Turns drawn from a seed, at the calls on a folder."""
    draw = random.Random(seed)
    turns = Turns(lambda running, _: draw.choice(running))
    with heard([folder], turns.hear):
        yield turns


def test_two_merges_to_one_folder_end_as_one_of_them(tmp_path):
    base, expert = (tiny(tmp_path / name, seed) for seed, name in enumerate(("base", "expert")))
    text = RECIPE.replace("BASE", str(base)).replace("EXPERT", str(expert))
    recipes = [parse_recipe(text.replace("DENSITY", d), "recipe.yaml") for d in ("0.2", "0.7")]

    def merge(recipe, output):
        try:
            lewis_hub.merge_models(recipe, output, SMALL, progress=False)
        except OutputError as error:
            return error.problem
        return MADE

    wholes = []
    for i, recipe in enumerate(recipes):
        assert merge(recipe, tmp_path / f"alone-{i}") == MADE
        wholes.append(weights(tmp_path / f"alone-{i}"))
    assert wholes[0] != wholes[1]
    for seed in range(SEED, SEED + times(1, 60)):
        place = tmp_path / f"schedule-{seed}"
        place.mkdir()
        with in_order(place, seed) as turns:
            output = place / "merged"
            outcomes = turns.run([partial(merge, recipe, output) for recipe in recipes])
        assert sorted(outcomes)[-1] == MADE
        assert set(outcomes) - {MADE} <= set(REFUSALS)
        assert weights(place / "merged") == wholes[outcomes.index(MADE)]
        assert [path.name for path in place.iterdir()] == ["merged"]


def weights(folder):
    return {path: content for path, content in below(folder).items() if "safetensors" in path}
