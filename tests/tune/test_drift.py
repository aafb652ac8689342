"""The search by drift: on which texts it measures, what it needs, what it finds."""

import json

import pytest
from click.testing import CliRunner
from statistical_merges import Recorder

import lewis_hub
from lewis_hub.calibration.texts import draw_rows
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import SearchRefusedError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.harness import load
from lewis_hub.recipe.read import read_recipe
from lewis_hub.tune import drift
from lewis_hub.tune.drift import by_drift, drift_texts
from lewis_hub.tune.objective import Search
from lewis_hub.tune.run import tune_recipe

from .conftest import CALIBRATION

ZOO = zoo_folder()


@pytest.fixture
def unscored(recipe_file):
    """The recipe without its guide and `evaluate`, from a bad start."""
    lines = recipe_file.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("guide", "evaluate"))]
    recipe_file.write_text("\n".join([*kept, "parameters: {density: 0.1, lambda: 0.4}", ""]))
    return recipe_file


def rows(skill):
    text = (ZOO / "data" / skill / "train.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def by(**asked):
    return Search(objective="drift", **{"n_trials": 1, "samples": 8} | asked)


def test_a_recipe_that_scores_nothing_is_tuned_and_told_that_only_the_drift_was_measured(unscored):
    words = ("tune", unscored, "--objective", "drift", "--trials", 3, "--samples", 16, "--json")
    done = CliRunner().invoke(cli, [*map(str, words), "-q"], catch_exceptions=False)

    told = json.loads(done.stdout)
    assert told["best"]["value"] < told["start"]["value"]
    assert told["objective"]["metric"] == "drift"
    assert told["objective"]["items"] == []
    assert [one["n"] for one in told["objective"]["texts"]] == [16, 16]
    assert told["objective"]["texts"][0]["n_kept"] is None
    assert told["final"] is None
    best = read_recipe(unscored.with_name("recipe.tuned.yaml"))
    assert best.parameters["lambda"] == told["best"]["values"]["parameters.lambda"]
    assert best.models[0].calibration == read_recipe(unscored).models[0].calibration
    comment = unscored.with_name("recipe.tuned.yaml").read_text().partition("\nbase_model")[0]
    assert comment.splitlines()[2:] == [
        "# Objective: drift, the KL divergence of the merge's predictions of the next token from",
        "# each expert's, in nats, mean over tokens, then over experts.",
        f"#   {ZOO}/expert-reverse: 16 texts of zoo/reverse, split train",
        f"#   {ZOO}/expert-cipher: 16 texts of zoo/cipher, split train",
        "# No merge was fitted on these texts.",
        f"# Result: {told['best']['value']:.4f}, {told['start']['value']:.4f} with the settings of "
        "recipe.yaml.",
        "# Only the drift was measured. Whether the merge answers better was not: no item was",
        "# scored. With `evaluate` in the recipe the best settings are compared on its items.",
    ]


@pytest.mark.slow
def test_a_text_that_a_merge_is_fitted_on_in_another_calibration_is_passed_over(unscored):
    text = unscored.read_text().replace("zoo/cipher", "zoo/reverse")
    first, second = text.split("expert-cipher")
    asked = second.replace("samples: 8", "samples: 20", 1).replace(" {answer}", "", 1)
    unscored.write_text(f"{first}expert-cipher{asked}")
    recipe = read_recipe(unscored)

    tuned = tune_recipe(recipe, by(), unscored.parent / "tuning")

    fitted = draw_rows(300, 20, recipe.seed)
    assert tuned.texts[0].tokens.rows == tuned.texts[1].tokens.rows
    assert {*tuned.texts[0].tokens.rows} == {*draw_rows(300, 28, recipe.seed)} - {*fitted}


@pytest.mark.slow
def test_drift_is_measured_on_rows_after_those_that_are_fitted_on_and_is_0_for_the_expert(unscored):
    recipe, output = read_recipe(unscored), unscored.parent / "tuning"
    texts = tune_recipe(recipe, by(), output).texts

    after = draw_rows(300, 16, recipe.seed)[8:]
    assert [one.tokens.rows for one in texts] == [tuple(sorted(after))] * 2
    alone = by_drift(texts[:1])

    def drift_of(name):
        *_, value = alone.values(load(ZOO / name, EvaluationSettings()), lambda _: None)
        return value

    assert drift_of("expert-reverse") == 0.0
    assert drift_of("expert-cipher") > drift_of("base") > 0.1

    experts, pairs = zip(*((t.expert, (t.calibration, t.tokens)) for t in texts), strict=True)
    large = drift_texts(experts, pairs, 2_000_000, "cpu", output)
    n_predicted = sum(len(ids) - 1 for one in texts for ids in one.tokens.ids)
    assert n_predicted * 4 * 2_000_000 > drift.WHOLE_BYTES
    assert {one.n_kept for one in large} == {256}
    assert sum(one.n_bytes for one in large) == n_predicted * (256 * 8 + 4)


@pytest.mark.slow
def test_the_experts_predict_once_for_all_runs_of_a_search(unscored):
    recipe, output, told = read_recipe(unscored), unscored.parent / "tuning", Recorder()
    first = tune_recipe(recipe, by(), output)
    kept = {path: path.stat().st_mtime_ns for path in (output / "predictions").glob("*/*")}
    lost = first.texts[1].file(3)
    content = lost.read_bytes()
    lost.unlink()

    more = tune_recipe(recipe, by(n_trials=2), output, progress=told)

    assert len(kept) == 16
    assert told.totals["Predicting by the experts"] == 1
    assert lost.read_bytes() == content
    assert more.trials[0] == first.trials[0]
    assert (first.n_begun, more.n_begun) == (1, 1)


@pytest.mark.slow
def test_the_same_seed_finds_the_same(unscored, tmp_path):
    recipe = read_recipe(unscored)
    first, second = (
        tune_recipe(recipe, by(n_trials=4), tmp_path / name).trials for name in ("one", "two")
    )

    assert [(t.values, t.value) for t in first] == [(t.values, t.value) for t in second]


@pytest.mark.slow
def test_a_vocabulary_that_does_not_fit_is_cut_to_the_likeliest_tokens(unscored, monkeypatch):
    recipe, output = read_recipe(unscored), unscored.parent / "tuning"
    whole = tune_recipe(recipe, by(), output)
    monkeypatch.setattr(drift, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(drift, "N_KEPT", 4)

    cut = tune_recipe(recipe, by(), output)

    assert (whole.texts[0].keeps_all, cut.texts[0].keeps_all) == (True, False)
    assert 0.5 * whole.start.value < cut.start.value < whole.start.value
    assert whole.texts[0].n_bytes > cut.texts[0].n_bytes


def test_all_that_prevents_a_search_is_told_at_once(unscored):
    text = unscored.read_text().replace("split: train", "split: test", 1)
    text = text.replace(f", calibration: {CALIBRATION % 'cipher'}", "")
    scored = "evaluate: {tasks: [zoo_reverse], include: tasks, limit: 8}\n"
    unscored.write_text(text + scored)
    output = unscored.parent / "tuning"

    with pytest.raises(SearchRefusedError) as caught:
        tune_recipe(
            read_recipe(unscored),
            by(samples=400, metric="exact_match,none", split="train"),
            output,
        )
    assert str(caught.value) == (
        "this search cannot be run:\n"
        "- --metric, --split choose how answers are scored, but drift is measured on calibration "
        "texts without answers. Leave it out, or search by `--objective answers`.\n"
        f"- `{ZOO}/expert-cipher` has no calibration data to measure drift on. Add `calibration` "
        "to this model: texts of the kind that it is good at; answers are not needed.\n"
        "- calibration on zoo/reverse, split test: 400 texts are needed to measure drift, but 292 "
        "are left besides the 8 that a merge is fitted on. Give fewer --samples, or fewer "
        "`samples` in the calibration.\n"
        "- calibration on zoo/reverse, split test: of 300 texts, `evaluate` scores 300 of "
        "zoo_reverse.\n"
        "A score on calibration texts is meaningless: name another split, or another `seed`.\n"
        "`allow_overlap: true` in this calibration, or `--allow-overlap`, continues anyway."
    )
    assert not output.exists()


@pytest.mark.slow
def test_a_fitted_method_is_measured_on_other_texts_than_it_is_fitted_on(unscored, tmp_path):
    asked = "merge_method: regmean\nparameters: {inputs: merged, off_diagonal: 0.7}"
    lines = unscored.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("merge_method", "parameters"))]
    unscored.write_text("\n".join([*kept, asked, ""]))
    recipe = read_recipe(unscored)

    tuned = tune_recipe(recipe, by(), tmp_path / "tuning")

    merged = lewis_hub.merge_models(recipe, tmp_path / "merged").output
    *_, value = tuned.objective.values(load(merged, EvaluationSettings()), lambda _: None)
    assert tuned.start.value == value


@pytest.mark.slow
def test_drift_finds_settings_that_answer_better_without_having_seen_an_answer(recipe_file):
    text = recipe_file.read_text().replace("dtype:", "parameters: {lambda: 0.4}\ndtype:")
    recipe_file.write_text(text.replace("limit: 8", "limit: 200"))

    tuned = tune_recipe(
        read_recipe(recipe_file), by(n_trials=12, samples=64), recipe_file.parent / "tuning"
    )

    assert tuned.best.value < 0.7 * tuned.start.value
    models = [task.models for task in tuned.final.tasks.values()]
    merged, start = (
        sum(of[label]["answer_loss,none"].value for of in models) / len(models)
        for label in ("merged", "start")
    )
    assert merged < start - 0.1
