import os

import optuna
import pytest
from file_calls import recorded

from lewis_hub.errors import TuningError
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.tune.space import space_of, warm_starts
from lewis_hub.tune.study import ERROR, Trial, best_of, enqueue, open_study, propose, trials

SPACE = space_of(
    parse_recipe(
        "base_model: o/base\nmodels: [{model: o/one}, {model: o/two}]\nmerge_method: ties\n"
        "guide: {name: uniform, gamma: 0.5}\n",
        "recipe.yaml",
    ),
    ["task_arithmetic"],
)


def opened(folder, name="study", **options):
    asked = {"lower_is_better": True, "seed": 42} | options
    return open_study(folder / "study.journal", name, **asked)


def run(study, n):
    for _ in range(n):
        trial = study.ask()
        values = propose(trial, SPACE)
        study.tell(trial, values["models[0].weight"])


def test_warm_starts_are_tried_first_and_once_whatever_the_number_of_runs(tmp_path):
    first = warm_starts(SPACE)[0]
    starts = [dict(first), dict(first) | {"models[0].weight": 0.2}]
    for _ in range(3):
        study = opened(tmp_path)
        enqueue(study, starts)
        run(study, 2)

    tried = trials(opened(tmp_path))

    assert [dict(trial.values) for trial in tried[:2]] == starts
    assert len(tried) == 6
    assert sum(dict(trial.values) in starts for trial in tried) == 2
    assert len({str(trial.values) for trial in tried}) == 6  # a resumed run draws anew
    assert best_of(tried, lower_is_better=True).value == min(trial.value for trial in tried)


def test_nothing_is_made_beside_the_study(tmp_path):
    """Optuna's lock would be: it raises a RuntimeError if it cannot be renamed, and waits for half
    a minute if a killed run left it."""
    calls = recorded([tmp_path], lambda: run(opened(tmp_path), 2))

    assert {call.path for call in calls} == {str(tmp_path / "study.journal")}


def test_what_a_killed_run_was_at_counts_as_failed_and_its_start_is_tried_again(tmp_path):
    killed = opened(tmp_path)
    enqueue(killed, warm_starts(SPACE))
    propose(killed.ask(), SPACE)

    again = opened(tmp_path)
    enqueue(again, warm_starts(SPACE))
    run(again, 2)

    states = [(trial.state, trial.tells) for trial in trials(again)]
    assert states == [("failed", False), ("complete", True), ("complete", True)]
    started = {str(dict(trial.values)) for trial in trials(again)[1:]}
    assert started == {str(dict(start)) for start in warm_starts(SPACE)}


def test_a_start_that_failed_for_a_reason_is_not_tried_again(tmp_path):
    for _ in range(2):
        study = opened(tmp_path)
        enqueue(study, warm_starts(SPACE))
        trial = study.ask()
        propose(trial, SPACE)
        trial.set_user_attr(ERROR, "out of reach")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)

    values = [dict(trial.values) for trial in trials(opened(tmp_path))]

    assert values == [dict(start) for start in warm_starts(SPACE)]


def test_which_axes_there_are_follows_from_what_was_chosen_before(tmp_path):
    space = space_of(
        parse_recipe(
            "base_model: o/base\nmodels: [{model: o/one}]\nmerge_method: ties\n", "recipe.yaml"
        ),
        ["task_arithmetic"],
        ["uniform"],
    )
    study = opened(tmp_path)

    found = [propose(study.ask(), space) for _ in range(20)]

    names = {
        (v["merge_method"], v.get("guide.name")): sorted({*v} - {"merge_method"}) for v in found
    }
    common = ["models[0].weight", "parameters.lambda", "parameters.normalize"]
    assert names == {
        ("task_arithmetic", None): common,
        ("ties", "none"): sorted(
            [*common, "guide.name", "parameters.density", "parameters.rescale"]
        ),
        ("ties", "uniform"): sorted(
            [*common, "guide.name", "guide.gamma", "guide.epsilon", "parameters.rescale"]
        ),
    }


def test_another_search_in_the_same_file_begins_anew(tmp_path):
    run(opened(tmp_path), 3)

    assert trials(opened(tmp_path, "other")) == ()
    assert len(trials(opened(tmp_path))) == 3


def test_a_trial_worse_than_the_median_is_left(tmp_path):
    study = opened(tmp_path)
    for _ in range(5):
        trial = study.ask()
        propose(trial, SPACE)
        trial.report(1.0, 1)
        study.tell(trial, 1.0)
    worse, better = study.ask(), study.ask()
    worse.report(1.1, 1)
    better.report(0.9, 1)

    assert (worse.should_prune(), better.should_prune()) == (True, False)
    study.tell(worse, state=optuna.trial.TrialState.PRUNED)
    assert [(t.state, t.value, t.reached) for t in trials(study)[5:]] == [("pruned", None, 1.1)]


def test_without_a_complete_trial_there_is_no_best():
    with pytest.raises(TuningError, match="no trial was scored to the end"):
        best_of((), lower_is_better=True)
    failed = Trial(0, "failed", {}, None, None, {}, "guide: out of reach")
    with pytest.raises(TuningError, match="The last error: guide: out of reach"):
        best_of((failed,), lower_is_better=True)


@pytest.mark.parametrize("line", ["not a journal", "[]", '{"op_code": 0, "worker_id": []}', "5"])
def test_a_file_that_is_no_study_is_refused(line, tmp_path):
    (tmp_path / "study.journal").write_text(f"{line}\n" * 3)

    with pytest.raises(TuningError, match="the study cannot be read"):
        opened(tmp_path)


def test_a_line_that_a_full_disk_cut_off_is_no_trial(tmp_path):
    """All trials were lost: what was appended to it could not be read."""
    run(opened(tmp_path), 3)
    file = tmp_path / "study.journal"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"op_code":4,"wor')

    run(opened(tmp_path), 1)

    assert len(trials(opened(tmp_path))) == 4
    assert file.read_bytes().startswith(whole)


def test_a_search_makes_no_link(tmp_path, monkeypatch):
    """A killed run would leave it in the output, where links are refused: no rerun would go on."""
    monkeypatch.setattr(os, "symlink", None)

    run(opened(tmp_path), 1)

    assert len(trials(opened(tmp_path))) == 1
