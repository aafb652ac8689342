from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import EvalResultEntry
from huggingface_hub._eval_results import parse_eval_result_entries

from lewis_hub.evaluate.scores import Scores
from lewis_hub.recipe.evaluation import Benchmark
from lewis_hub.report.card import eval_results

GSM8K = Benchmark(dataset="openai/gsm8k", task_id="gsm8k", metric="exact_match,none")


def test_a_named_benchmark_gets_an_entry_that_the_hub_reads(make_facts):
    facts = make_facts()

    files = eval_results(facts.scores, {"sums": GSM8K}, facts)

    assert list(files) == [".eval_results/gsm8k.yaml"]
    assert parse_eval_result_entries(yaml.safe_load(files[".eval_results/gsm8k.yaml"])) == [
        EvalResultEntry(
            dataset_id="openai/gsm8k",
            task_id="gsm8k",
            value=70.0,
            source_url="https://huggingface.co/me/zoo-merge",
            source_name="Model card",
            notes="lm-eval sums, version 1.0, exact_match,none, n = 300, standard error 2.600",
        )
    ]


def test_a_merge_without_a_repo_names_no_source_and_a_scale_is_followed(make_facts):
    facts = make_facts(repo=None)
    fraction = GSM8K.model_copy(update={"scale": 1.0})

    (text,) = eval_results(facts.scores, {"sums": fraction}, facts).values()

    assert text == (
        "- dataset:\n    id: openai/gsm8k\n    task_id: gsm8k\n  value: 0.7\n"
        "  notes: lm-eval sums, version 1.0, exact_match,none, n = 300, standard error 0.026\n"
    )


def test_an_entry_names_the_settings_of_the_evaluation(make_facts):
    facts = make_facts()
    scores = replace(facts.scores, settings={"chat_template": True, "num_fewshot": 5})

    (text,) = eval_results(scores, {"sums": GSM8K}, facts).values()

    (entry,) = yaml.safe_load(text)
    assert entry["notes"].endswith("standard error 2.600, chat_template true, num_fewshot 5")


def test_tasks_of_one_dataset_share_a_file_and_equal_names_do_not(make_facts):
    facts = make_facts()
    sums = facts.scores.tasks["sums"]
    scores = Scores({"a": sums, "b": sums, "c": sums})
    one, other = GSM8K, GSM8K.model_copy(update={"dataset": "other/gsm8k"})

    files = eval_results(scores, {"a": one, "b": one, "c": other}, facts)

    assert [(path, len(yaml.safe_load(text))) for path, text in files.items()] == [
        (".eval_results/gsm8k.yaml", 2),
        (".eval_results/gsm8k-2.yaml", 1),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_or_was_not_scored_gets_none(make_facts, make_scores, value):
    facts = make_facts()
    other = GSM8K.model_copy(update={"metric": "f1,none"})
    scored = facts.scores.tasks["sums"]
    models = {label: found for label, found in scored.models.items() if label != "merged"}
    unscored = Scores({"sums": replace(scored, models=models)})

    assert eval_results(make_scores(merged=value), {"sums": GSM8K}, facts) == {}
    assert eval_results(facts.scores, {"sums": other, "text": GSM8K}, facts) == {}
    assert eval_results(unscored, {"sums": GSM8K}, facts) == {}
