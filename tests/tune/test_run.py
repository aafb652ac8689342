"""The whole search over the embedded Hub: what it looks at, what it leaves, how it goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from statistical_merges import Recorder

import lewis_hub
from lewis_hub.calibration.grams import DIAGONAL, WIDEST
from lewis_hub.calibration.texts import draw_rows
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import (
    CalibrationModelError,
    EvaluationError,
    GuideError,
    NonFiniteError,
    OutputError,
    RecipeError,
    TuningError,
    UnscorableAnswerError,
)
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.harness import load
from lewis_hub.evaluate.items import load_rows
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.merge.workspace import LOCK, alone_at
from lewis_hub.recipe.read import read_recipe
from lewis_hub.tune import study as tuning
from lewis_hub.tune.objective import Search
from lewis_hub.tune.run import tune_recipe
from lewis_hub.tune.space import candidate
from lewis_hub.tune.study import is_of_settings

from .conftest import CALIBRATION

START = {
    "guide.name": "lewis",
    "guide.gamma": 0.05,
    "guide.epsilon": 0.1,
    "models[0].weight": 1.0,
    "models[1].weight": 1.0,
    "parameters.normalize": True,
    "parameters.rescale": False,
    "parameters.lambda": 1.0,
}


def run(*words):
    done = CliRunner().invoke(cli, list(map(str, words)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout)


def rows(skill, split):
    text = (zoo_folder() / "data" / skill / f"{split}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_search_starts_at_the_recipe_and_leaves_a_better_one_with_how_it_was_found(recipe_file):
    told = run("tune", recipe_file, "--trials", 3, "--samples", 16, "--json", "-q")

    folder = recipe_file.parent
    assert told["status"] == "tuned"
    assert [trial["values"] for trial in told["trials"][:2]] == [
        START,
        START | {"guide.gamma": 0.3, "guide.epsilon": 0.8},
    ]
    assert len(told["trials"]) == 3
    assert told["start"] == told["trials"][0]
    assert told["best"]["value"] == min(trial["value"] for trial in told["trials"])
    assert told["best"]["value"] < told["start"]["value"]
    best = read_recipe(folder / "recipe.tuned.yaml")
    assert best.guide.gamma == told["best"]["values"]["guide.gamma"]
    assert best.models[1].parameters["weight"] == told["best"]["values"]["models[1].weight"]
    assert best.evaluate == read_recipe(recipe_file).evaluate
    comment = (folder / "recipe.tuned.yaml").read_text().partition("\nbase_model")[0]
    assert "from recipe.yaml: the best of 3 trials" in comment
    assert "16 items of zoo_reverse, split train; 16 items of zoo_cipher, split train." in comment
    assert f"Result: {told['best']['value']:.4f}, {told['start']['value']:.4f} with" in comment
    (test,) = [
        one for one in told["final"]["zoo_reverse"]["paired"] if one["metric"] == "answer_loss,none"
    ]
    assert test["against"] == "start"
    assert f"zoo_reverse answer loss (n = 8): {test['difference']:+.4f}, 95 %" in comment
    models = told["final"]["zoo_reverse"]["models"]
    losses = [models[label]["answer_loss,none"]["value"] for label in ("merged", "start")]
    assert test["difference"] == pytest.approx(losses[0] - losses[1])
    assert sorted(path.name for path in (folder / "tuning").iterdir()) == [
        "importance.json",
        "search-dark.png",
        "search-light.png",
        "study.journal",
        "trials.json",
    ]
    assert json.loads((folder / "tuning" / "trials.json").read_text()) == told


def test_a_second_run_goes_on_with_the_study_and_measures_nothing(recipe_file, stage_titles):
    recipe, output = read_recipe(recipe_file), recipe_file.parent / "tuning"
    first = tune_recipe(recipe, Search(n_trials=1, samples=8), output)
    profile = (output / "importance.json").stat().st_mtime_ns

    more = tune_recipe(recipe, Search(n_trials=2, samples=8), output, progress=stage_titles())
    none = tune_recipe(recipe, Search(n_trials=2, samples=8), output)

    assert [len(tuned.trials) for tuned in (first, more, none)] == [1, 2, 2]
    assert [tuned.n_begun for tuned in (first, more, none)] == [1, 1, 0]
    assert more.trials[0] == first.trials[0]
    assert none.trials == more.trials
    assert (output / "importance.json").stat().st_mtime_ns == profile


def test_no_item_is_calibrated_on_or_scored(recipe_file):
    text = recipe_file.read_text().replace("samples: 8", "samples: 200")
    recipe_file.write_text(text.replace("{question} {answer}", "{question}"))

    tuned = tune_recipe(
        read_recipe(recipe_file), Search(n_trials=1, samples=10**6), recipe_file.parent / "tuning"
    )

    for one, skill in zip(tuned.items, ("reverse", "cipher"), strict=True):
        train = rows(skill, "train")
        questions = [item.document["question"] for item in one.rows.items(one.indices)]
        assert one.n_calibrated == 200
        assert len(questions) == len(train) - 200
        assert not {*questions} & {row["question"] for row in rows(skill, "test")}


def test_no_item_is_one_of_a_calibration_texts_examples(recipe_file):
    tasks = recipe_file.parent / "tasks"
    text = (tasks / "zoo_reverse.yaml").read_text().replace("zoo_reverse", "many", 1)
    (tasks / "many.yaml").write_text(text + "num_fewshot: 5\n")
    calibration = CALIBRATION % "reverse"
    on_task = "{task: many, include: tasks, samples: 40, max_tokens: 40}"
    recipe_file.write_text(recipe_file.read_text().replace(calibration, on_task))
    recipe = read_recipe(recipe_file)

    asked = Search(n_trials=1, samples=60, tasks=("zoo_reverse",))
    (items,) = tune_recipe(recipe, asked, recipe_file.parent / "tuning").items

    shown = load_rows(TaskSelection(("many",), tasks), "train", {})
    texts = [row["text"] for row in shown.rows(draw_rows(300, 40, recipe.seed))]
    questions = [item.document["question"] for item in items.rows.items(items.indices)]
    assert len({*questions}) == 60
    assert not [one for one in questions for text in texts if f"{one}\n" in text]
    assert items.n_calibrated > 40


def test_items_go_through_the_chat_template_where_evaluate_asks_for_it(recipe_file):
    text = recipe_file.read_text().replace("limit: 8", "limit: 8, chat_template: true")
    recipe_file.write_text(text)

    asked = Search(n_trials=2, samples=4, tasks=("zoo_reverse",))
    tuned = tune_recipe(read_recipe(recipe_file), asked, recipe_file.parent / "tuning")

    (one,) = tuned.items
    for question in one.rows.questions(one.indices):
        assert question.prompt.startswith("<|begin|><|user|>Question: ")
        assert question.prompt.endswith("Answer:<|end|><|assistant|>")


def test_a_budget_that_is_spent_begins_no_trial(recipe_file):
    with pytest.raises(TuningError, match="no trial was scored to the end"):
        tune_recipe(
            read_recipe(recipe_file),
            Search(budget_s=0.0, samples=4),
            recipe_file.parent / "tuning",
        )


def test_items_that_are_scored_are_refused_whatever_the_task_is_called(recipe_file):
    tasks = recipe_file.parent / "tasks"
    again = (tasks / "zoo_reverse.yaml").read_text().replace("task: zoo_reverse", "task: copied")
    (tasks / "copied.yaml").write_text(again)
    recipe, output = read_recipe(recipe_file), recipe_file.parent / "tuning"

    with pytest.raises(TuningError) as caught:
        tune_recipe(recipe, Search(tasks=("copied",), split="test", samples=20), output)
    assert str(caught.value) == (
        "copied, split `test`: of 20 items to tune on, `evaluate` scores 20 of zoo_reverse.\n"
        "A score on items that a merge was tuned on is meaningless: name another split\n"
        "with --split, or another task with --task."
    )
    with pytest.raises(EvaluationError) as refused:
        tune_recipe(recipe, Search(split="test"), output)
    assert str(refused.value) == (
        "zoo_reverse: it scores the split `test`, and a merge must not be fitted to its items.\n"
        "It has: `train`."
    )
    assert not output.exists()


@pytest.mark.parametrize("split", [None, "train"])
def test_an_unknown_task_is_refused_before_calibration_texts_are_drawn(recipe_file, split):
    text = recipe_file.read_text().replace("split: train", "split: test")  # which is scored
    recipe_file.write_text(text)
    recipe, output = read_recipe(recipe_file), recipe_file.parent / "tuning"

    with pytest.raises(EvaluationError, match="zoo_revers: "):
        tune_recipe(recipe, Search(tasks=("zoo_revers",), split=split), output)
    assert not output.exists()


@pytest.mark.slow
def test_a_search_with_other_calibration_texts_begins_anew(recipe_file):
    task, output = recipe_file.parent / "tasks" / "texts.yaml", recipe_file.parent / "tuning"
    task.write_text((zoo_folder() / "tasks/zoo_cipher.yaml").read_text().replace("zoo_c", "c", 1))
    by_task = "{task: cipher, include: tasks, split: train, samples: 8}"
    recipe_file.write_text(recipe_file.read_text().replace(CALIBRATION % "cipher", by_task))
    recipe, search = read_recipe(recipe_file), Search(n_trials=1, samples=4)

    first, again = (tune_recipe(recipe, search, output).n_begun for _ in range(2))
    task.write_text(task.read_text().replace("Question:", "Ask:"))
    other = tune_recipe(recipe, search, output).n_begun

    assert (first, again, other) == (1, 0, 1)


def test_two_searches_in_one_folder_do_not_meet(recipe_file):
    output = recipe_file.parent / "tuning"
    output.mkdir()

    with (
        alone_at(output / LOCK, output),
        pytest.raises(OutputError, match="tuning: another run is working on it"),
    ):
        tune_recipe(read_recipe(recipe_file), Search(samples=4), output)


def test_nothing_is_left_where_calibration_draws_all_items(recipe_file):
    n_rows = len(rows("reverse", "train"))
    recipe_file.write_text(recipe_file.read_text().replace("samples: 8", f"samples: {n_rows}"))

    with pytest.raises(TuningError, match="no item of split `train` is left that calibration"):
        tune_recipe(read_recipe(recipe_file), Search(), recipe_file.parent / "tuning")


def test_a_recipe_that_scores_nothing_is_refused(recipe_file):
    unscored = read_recipe(recipe_file).model_copy(update={"evaluate": None})

    with pytest.raises(RecipeError, match="`evaluate`: the recipe scores nothing"):
        tune_recipe(unscored, Search(), recipe_file.parent / "tuning")


@pytest.mark.slow
def test_a_metric_is_made_higher_by_trials_of_several_methods(recipe_file):
    asked = Search(n_trials=2, samples=8, metric="exact_match,none", methods=("task_arithmetic",))

    tuned = tune_recipe(read_recipe(recipe_file), asked, recipe_file.parent / "tuning")

    assert tuned.objective.lower_is_better is False
    assert tuned.best.value == max(trial.value for trial in tuned.trials)
    assert all(trial.value * 16 == int(trial.value * 16) for trial in tuned.trials)  # of 8 and 8
    assert tuned.trials[0].values == {"merge_method": "ties", **START}


@pytest.mark.parametrize(
    ("file", "edited"),
    [
        ("helper.py", ("float(", "1 - float(")),
        pytest.param(
            "zoo_reverse.yaml",
            ("max_gen_toks: 9", "max_gen_toks: 1"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_metric_whose_task_files_changed_is_measured_again(file, edited, recipe_file):
    """The prompts and answers stay the same: old trials were told as those of the new files."""
    recipe_file.write_text(
        recipe_file.read_text().replace("[zoo_reverse, zoo_cipher]", "[zoo_reverse]")
    )
    tasks, scorer = recipe_file.parent / "tasks", "process_results: !function helper.score\n"
    with (tasks / "zoo_reverse.yaml").open("a") as task:
        task.write(scorer)
    (tasks / "helper.py").write_text(
        "def score(doc, results):\n"
        '    return {"exact_match": float(results[0].strip() == doc["answer"])}\n'
    )
    asked = Search(n_trials=1, samples=8, metric="exact_match,none")
    recipe, output = read_recipe(recipe_file), recipe_file.parent / "tuning"
    first = tune_recipe(recipe, asked, output)
    same = tune_recipe(recipe, asked, output)

    (tasks / file).write_text((tasks / file).read_text().replace(*edited))
    anew = tune_recipe(recipe, asked, output)

    assert [tuned.n_begun for tuned in (first, same, anew)] == [1, 0, 1]
    assert 0.0 < first.best.value == same.best.value
    assert anew.best.value == (1 - first.best.value if file == "helper.py" else 0.0)


def test_a_metric_that_no_task_has_is_refused(recipe_file):
    with pytest.raises(EvaluationError) as caught:
        tune_recipe(
            read_recipe(recipe_file), Search(metric="exact_match"), recipe_file.parent / "tuning"
        )
    assert str(caught.value) == (
        "zoo_reverse: it has no metric `exact_match`.\n"
        "Did you mean `exact_match,none`? It has `exact_match,none`."
    )


def by_statistics(recipe_file, asked):
    """The same recipe without its guide, by what is asked."""
    lines = [line for line in recipe_file.read_text().splitlines() if "guide:" not in line]
    recipe_file.write_text("\n".join(lines).replace("merge_method: ties", asked) + "\n")
    return read_recipe(recipe_file)


def widths(output):
    """How many inputs one matrix of each source's stored statistics covers at most."""
    found = (output / "statistics").glob("*/grams.json")
    return sorted(json.loads(path.read_text())["facts"]["widest"] for path in found)


@pytest.mark.slow
def test_later_trials_are_merged_in_memory_with_the_scores_of_their_recipes(
    recipe_file, tmp_path, monkeypatch
):
    recipe, output = read_recipe(recipe_file), tmp_path / "tuning"
    folders = []
    write = tuning.write_weights

    def noting(planned, places, folder, *others):
        folders.append(folder.name)
        return write(planned, places, folder, *others)

    monkeypatch.setattr(tuning, "write_weights", noting)

    tuned = tune_recipe(recipe, Search(n_trials=3, samples=8, methods=("dare_ties",)), output)

    assert folders[0] == "trial"
    assert "trial" not in folders[1:]
    assert len({trial.values["merge_method"] for trial in tuned.trials}) == 2
    for number, trial in enumerate(tuned.trials):
        asked = candidate(tuned.space, trial.values).model_copy(update={"evaluate": None})
        merged = lewis_hub.merge_models(asked, tmp_path / str(number)).output
        *_, value = tuned.objective.values(load(merged, EvaluationSettings()), lambda _: None)
        assert trial.value == value


@pytest.mark.parametrize("inputs", ["own", pytest.param("merged", marks=pytest.mark.slow)])
def test_a_trial_of_regmean_is_what_a_merge_of_its_recipe_is(recipe_file, tmp_path, inputs):
    asked = f"merge_method: regmean\nparameters: {{inputs: {inputs}}}"
    recipe, output = by_statistics(recipe_file, asked), tmp_path / "tuning"

    tuned = tune_recipe(recipe, Search(n_trials=1, samples=8), output)

    unscored = recipe.model_copy(update={"evaluate": None})
    merged = lewis_hub.merge_models(unscored, tmp_path / "merged").output
    *_, value = tuned.objective.values(load(merged, EvaluationSettings()), lambda _: None)
    assert tuned.start.value == value
    assert tuned.start.values == {
        "models[0].weight": 1.0,
        "models[1].weight": 1.0,
        "parameters.density": 1.0,
        "parameters.off_diagonal": 0.5,
        "parameters.lambda": 1.0,
        "parameters.compensate": True,
    }


@pytest.mark.slow
def test_statistics_are_gathered_once_for_all_runs_of_a_search(recipe_file, tmp_path):
    asked = "merge_method: ties\nparameters: {trim: activation, density: 0.2}"
    recipe, output = by_statistics(recipe_file, asked), tmp_path / "tuning"
    first = tune_recipe(recipe, Search(n_trials=1, samples=8, methods=("regmean",)), output)
    kept = {path: path.stat().st_mtime_ns for path in (output / "statistics").glob("*/*")}

    more = tune_recipe(recipe, Search(n_trials=2, samples=8, methods=("regmean",)), output)

    assert more.trials[0] == first.trials[0]
    assert (first.n_begun, more.n_begun) == (1, 1)
    assert widths(output) == [DIAGONAL, DIAGONAL, WIDEST, WIDEST]  # of both methods and experts
    assert kept == {path: path.stat().st_mtime_ns for path in (output / "statistics").glob("*/*")}


@pytest.mark.slow
def test_a_guides_pass_gathers_the_statistics_of_a_search(recipe_file, tmp_path):
    recipe_file.write_text(recipe_file.read_text().replace("ties", "regmean", 1))
    told, output = Recorder(), tmp_path / "tuning"

    tune_recipe(read_recipe(recipe_file), Search(n_trials=1, samples=8), output, progress=told)

    assert told.totals["Calibrating"] > 0
    assert told.totals["Gathering statistics"] == 0
    assert widths(output) == [WIDEST, WIDEST]


@pytest.mark.slow
def test_a_recipe_without_a_guide_is_tried_as_it_is_before_the_guide_that_is_asked_for(
    recipe_file, tmp_path
):
    recipe = by_statistics(recipe_file, "merge_method: regmean")
    asked = Search(n_trials=2, samples=8, guides=("lewis",))

    tuned = tune_recipe(recipe, asked, tmp_path / "tuning")

    unscored = recipe.model_copy(update={"evaluate": None})
    merged = lewis_hub.merge_models(unscored, tmp_path / "merged").output
    *_, value = tuned.objective.values(load(merged, EvaluationSettings()), lambda _: None)
    assert tuned.start == tuned.trials[0]
    assert tuned.start.value == value
    assert tuned.start.values["guide.name"] == "none"
    guided = tuned.trials[1]
    told = {name: value for name, value in guided.values.items() if name.startswith("guide.")}
    assert told == {"guide.name": "lewis", "guide.gamma": 0.3, "guide.epsilon": 0.8}
    assert guided.value != value
    assert tuned.recipe.guide is None or tuned.best == guided


@pytest.mark.slow
def test_settings_that_cannot_be_merged_fail_and_the_search_goes_on(recipe_file):
    text = recipe_file.read_text().replace("epsilon: 0.1", "epsilon: 0.9, mean_density: 0.9")
    recipe_file.write_text(text)
    words = ["tune", recipe_file, "--samples", 8, "--json", "-q"]

    first = run(*words, "--trials", 4)
    again = run(*words, "--trials", 5)

    failed, *others = first["trials"]
    assert (failed["state"], failed["value"]) == ("failed", None)
    assert failed["error"].startswith("guide.mean_density: a mean density of 0.9 is out of reach")
    assert "complete" in {trial["state"] for trial in others}
    assert first["start"] is None
    assert first["final"]["zoo_reverse"]["paired"] == []
    comment = (recipe_file.parent / "recipe.tuned.yaml").read_text()
    assert "# The settings of recipe.yaml themselves failed: guide.mean_density: a mean" in comment
    assert again["trials"][:4] == first["trials"]
    assert again["n_begun"] == 1
    assert again["trials"][4]["values"] != failed["values"]


@pytest.mark.slow
def test_a_merge_that_does_not_fit_into_its_dtype_is_a_failed_trial(recipe_file, tmp_path):
    text = recipe_file.read_text().replace("dtype: bfloat16", "dtype: float16")
    recipe_file.write_text(text + "parameters: {weight: 1.0e+6, normalize: false}\n")

    tuned = tune_recipe(
        read_recipe(recipe_file), Search(n_trials=6, samples=4), tmp_path / "tuning"
    )

    assert "holds NaN or infinity in the merged model" in tuned.refused
    assert tuned.trials[0].error == tuned.refused
    assert tuned.best.values["parameters.normalize"] is True


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (GuideError("guide.mean_density", "out of reach", ""), True),
        (NonFiniteError("x", "the merged model", ""), True),
        (NonFiniteError("x", "o/expert", ""), False),
        (UnscorableAnswerError("the model", "", ""), True),
        (CalibrationModelError("the merged model", "the activations are not finite", ""), True),
        (CalibrationModelError("o/expert", "the activations are not finite", ""), False),
        (OutputError("/tuning", "the disk is full", ""), False),
    ],
)
def test_what_settings_are_to_blame_for_is_told_from_sources_and_disks(error, is_so):
    assert is_of_settings(error) is is_so


@pytest.mark.parametrize("command", ["tune", "importance"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_asked_of_the_hub(
    recipe_file, command, monkeypatch
):
    monkeypatch.setattr("lewis_hub.hub.resolve.resolve_model", None)

    with pytest.raises(OutputError) as caught:
        run(command, recipe_file, "-o", "/proc/nope", "-q")

    assert str(caught.value) == (
        "/proc/nope: it cannot be written (No such file or directory).\n"
        "Name a folder that you may write to with -o."
    )


def test_plots_of_a_comparison_that_cannot_be_written_are_told_before_anything_is_read():
    with pytest.raises(OutputError, match="/proc/nope: it cannot be written"):
        run("compare", "nothing", "nothing", "-o", "/proc/nope")


def test_the_importance_of_a_model_cannot_be_written_anywhere_either():
    words = ["importance", "o/model", "--dataset", "o/data", "--text", "{q}", "-o", "/proc/nope"]

    with pytest.raises(OutputError, match="/proc/nope: it cannot be written"):
        run(*words)


def test_a_recipe_beside_which_nothing_can_be_written_is_refused_before_the_search(recipe_file):
    with recipe_file.open() as opened:
        path = f"/proc/self/fd/{opened.fileno()}"  # as of `tune <(command)`
        with pytest.raises(OutputError) as caught:
            run("tune", path, "-o", recipe_file.parent / "tuning")

    assert str(caught.value) == (
        "/proc/self/fd: it cannot be written (No such file or directory).\n"
        "The tuned recipe is written beside the recipe: copy the recipe to a folder that you can "
        "write to."
    )


@pytest.mark.slow
def test_a_killed_search_goes_on_and_what_it_finds_is_better_on_items_that_it_never_saw(
    recipe_file, seeded
):
    text = recipe_file.read_text().replace("limit: 8", "limit: 200")
    recipe_file.write_text(text + "parameters: {lambda: 0.4}\n")  # far too little of both experts
    words = [sys.executable, "-m", "lewis_hub", "tune", str(recipe_file), "--trials", "12"]
    words += ["--samples", "60", "--json"]
    study = recipe_file.parent / "tuning" / "study.journal"
    environment = os.environ | {"HF_TOKEN": seeded.write_token}
    first = subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not study.exists() or study.read_text().count('"values":[') < 2:
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()

    second = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)

    told = json.loads(second.stdout)
    assert len(told["trials"]) == 12
    assert told["trials"][0]["values"] == START | {"parameters.lambda": 0.4}
    assert 0 < told["n_begun"] < 12
    assert told["best"]["value"] < told["start"]["value"] - 0.1
    models = [task["models"] for task in told["final"].values()]
    merged, start = (
        sum(of[label]["answer_loss,none"]["value"] for of in models) / len(models)
        for label in ("merged", "start")
    )
    assert merged < start - 0.1
