"""The table of trials on terminals of several widths."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from lewis_hub.cli.terminal import to_rich
from lewis_hub.cli.tuning import trials_tables
from lewis_hub.tune.run import Tuned
from lewis_hub.tune.study import Trial

VALUES = {
    "merge_method": "task_arithmetic",
    "guide.name": "activation_shift",
    "guide.gamma": 0.1234,
    "guide.epsilon": 0.8765,
    **{f"models[{index}].weight": 1.0 for index in range(3)},
    "parameters.normalize": True,
    "parameters.rescale": False,
    "parameters.off_diagonal": 0.5,
    "parameters.select_topk": 0.75,
}


def trial(number, value):
    return Trial(number, "complete", VALUES, value, value, {})


def shown(width):
    first, second = trial(0, 0.5), trial(1, 0.25)
    tuned = SimpleNamespace(
        objective=SimpleNamespace(metric="answer_loss,none", lower_is_better=True),
        trials=(first, second),
        start=first,
        best=second,
    )
    file = io.StringIO()
    for table in trials_tables(tuned, 10, width):
        Console(file=file, width=width).print(table if isinstance(table, str) else to_rich(table))
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_word_of_a_head_and_no_value_is_broken(width):
    lines = shown(width).splitlines()
    words = [word for line in lines for word in line.split()]

    heads = "merge_ method guide. name gamma epsilon weight[0] weight[1] weight[2] normalize"
    heads += " rescale off_ diagonal select_ topk answer_ loss trial"
    assert {*heads.split()} <= {*words}
    assert words.count("task_arithmetic") == words.count("activation_shift") == 2
    assert words.count("0.2500") == 1
    assert max(map(len, lines)) <= width


def test_columns_that_do_not_fit_go_on_below_beside_the_number_of_their_trial():
    rows = [line.split() for line in shown(100).splitlines()]

    assert [row[:2] for row in rows if row[:1] == ["1"]] == [["1", "best"]] * 2
    assert [row[:2] for row in rows if row[:1] == ["0"]] == [["0", "recipe"]] * 2
    assert len([row for row in shown(200).splitlines() if "recipe" in row]) == 1


def test_a_notebook_shows_the_best_settings_beside_the_recipe_s():
    first, best = trial(0, 0.5), Trial(1, "complete", {"density": 0.25}, 0.25, 0.25, {})
    objective = SimpleNamespace(metric="answer_loss,none")
    tuned = Tuned(None, None, objective, (), (first, best), 2, best, first, None, None)

    told = "2 trials on answer_loss,none; the best is number 1: 0.2500, the recipe's own settings: "
    assert repr(tuned) == f"{told}0.5000"
    assert "<tr><td>density</td><td>0.25</td><td>-</td></tr>" in tuned._repr_html_()
