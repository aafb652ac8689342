"""Models that lm-eval would score by a random head: check, merge and evaluate say so."""

from __future__ import annotations

import pytest
import transformers
import yaml
from statistical_merges import Recorder
from tiny_models import fine_tuned, tiny_model

import lewis_hub
from lewis_hub.errors import CheckFailedError, EvaluationError

ONLY = "is a BertForSequenceClassification, and lm-eval runs only models that generate text."
SCORE = "Score it on labelled data of your own."
TASKS = {"tasks": ["zoo_reverse"], "include": str(lewis_hub.zoo_folder() / "tasks")}


@pytest.fixture
def classifiers(tmp_path):
    """A recipe over two tiny classifiers, as a document."""
    model = tiny_model("bert", transformers.AutoModelForSequenceClassification)
    model.save_pretrained(tmp_path / "base")
    fine_tuned(model, 1).save_pretrained(tmp_path / "mood")
    return {
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "mood"), "parameters": {"weight": 1.0}}],
        "merge_method": "task_arithmetic",
    }


def recipe(document, folder):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(document))
    return lewis_hub.read_recipe(file)


def test_check_and_merge_note_that_a_classifier_is_not_scored(classifiers, tmp_path):
    unscored, told = recipe(classifiers, tmp_path), Recorder()

    report = lewis_hub.check(unscored)
    lewis_hub.merge_models(unscored, tmp_path / "merged", progress=told)

    assert report.problems == ()
    assert f"{tmp_path / 'base'} {ONLY} {SCORE}" in report.notes
    assert [said for said in told.said if "note: " in said] == [
        f"note: {note}" for note in report.notes
    ]


def test_a_recipe_that_scores_a_classifier_is_refused(classifiers, tmp_path):
    scored = recipe(classifiers | {"evaluate": TASKS}, tmp_path)

    report = lewis_hub.check(scored)

    instead = f"{SCORE} Or remove `evaluate`: then the merge is not scored."
    assert report.problems == (f"evaluate: {tmp_path / 'base'}: {ONLY}\n{instead}",)
    with pytest.raises(CheckFailedError):
        lewis_hub.merge_models(scored, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_evaluate_refuses_a_classifier(classifiers, tmp_path):
    with pytest.raises(EvaluationError) as raised:
        lewis_hub.evaluate_model(tmp_path / "mood", lewis_hub.Evaluation(**TASKS))

    assert str(raised.value) == f"{tmp_path / 'mood'}: {ONLY}\n{SCORE}"
