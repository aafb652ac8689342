from __future__ import annotations

import logging
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import EvaluationError, UnscorableAnswerError
from lewis_hub.evaluate import harness
from lewis_hub.evaluate.answers import recorded_answers
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.benchmarks import load_tasks, with_prompts
from lewis_hub.evaluate.harness import (
    Benchmarks,
    affordable_batch,
    evaluate_model,
    logits_bytes,
    tokenisable_batch,
)
from lewis_hub.evaluate.items import first_items
from lewis_hub.evaluate.paired import compare, mcnemar, newcombe_interval
from lewis_hub.evaluate.scores import Answers, ModelResult
from lewis_hub.evaluate.tasks import TaskSelection

CPU = EvaluationSettings()
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RIGHT_AFTER_ZERO_ONLY = (1.0, *[0.0] * 9) * 2


def ignore(_: int) -> None:
    """Count nothing."""


@pytest.fixture(scope="module")
def benchmarks(own_tasks: Path) -> Benchmarks:
    return with_prompts(load_tasks(TaskSelection(("both",), include=own_tasks), {}))


@pytest.fixture(scope="module")
def good(benchmarks: Benchmarks, good_model: Path) -> ModelResult:
    return evaluate_model(good_model, benchmarks, CPU, ignore)


@pytest.fixture(scope="module")
def poor(benchmarks: Benchmarks, poor_model: Path) -> ModelResult:
    return evaluate_model(poor_model, benchmarks, CPU, ignore)


def test_a_model_that_counts_right_scores_one(good):
    assert good.tasks["after"].metrics["exact_match,none"].values == (1.0,) * 20
    assert good.tasks["choose"].metrics["acc,none"].values == (1.0,) * 20
    assert good.tasks["choose"].metrics["mcc,none"].value == 1.0


def test_each_item_has_the_value_that_the_model_was_made_to_give(poor):
    after, choose = poor.tasks["after"], poor.tasks["choose"]

    assert after.metrics["exact_match,none"].values == RIGHT_AFTER_ZERO_ONLY
    assert choose.metrics["acc,none"].values == RIGHT_AFTER_ZERO_ONLY
    assert after.metrics["exact_match,none"].value == 0.1
    assert (after.version, len(set(after.documents))) == ("3.0", 10)  # each of ten items twice


def test_a_metric_that_is_no_mean_has_a_value_but_no_items(poor):
    mcc = poor.tasks["choose"].metrics["mcc,none"]

    assert (mcc.value, mcc.values, mcc.stderr) == (0.0, None, None)


def test_the_standard_error_is_lm_evals(poor):
    from lm_eval.api.metrics import mean_stderr

    metric = poor.tasks["after"].metrics["exact_match,none"]

    assert metric.stderr == pytest.approx(mean_stderr(list(RIGHT_AFTER_ZERO_ONLY)))
    assert metric.stderr == pytest.approx(math.sqrt(0.1 * 0.9 / 19))


def test_a_group_has_the_items_of_its_tasks(poor):
    group = poor.tasks["both"]

    assert group.documents == (*poor.tasks["after"].documents, *poor.tasks["choose"].documents)
    assert list(poor.tasks) == ["after", "choose", "both"]


def test_every_model_gets_the_same_items_and_few_shot_prompts(good, poor):
    for name in ("after", "choose"):
        assert good.tasks[name].documents == poor.tasks[name].documents
        assert good.tasks[name].prompts == poor.tasks[name].prompts
    assert len(set(good.tasks["choose"].prompts)) > 10  # two examples before each, drawn anew


def test_the_comparison_counts_the_items_where_only_one_was_right(good, poor):
    scores = compare({"base": poor, "merged": good})

    (test,) = scores.tasks["after"].paired
    assert (test.against, test.metric) == ("base", "exact_match,none")
    assert (test.difference, test.p) == (0.9, mcnemar(18, 0))
    assert test.ci95 == newcombe_interval(both=2, only_first=18, only_second=0, neither=0)
    assert scores.tasks["after"].n == 20


def test_progress_ends_at_the_announced_total(benchmarks, good_model):
    counted: list[int] = []

    evaluate_model(good_model, benchmarks, CPU, counted.append)

    assert benchmarks.n_requests == 20 + 20 * 10  # a choice is one request per answer
    assert sum(counted) == benchmarks.n_requests


def test_a_limit_scores_the_first_items_only(own_tasks, poor_model, poor):
    few = with_prompts(load_tasks(TaskSelection(("after",), include=own_tasks), {}), 3)

    result = evaluate_model(poor_model, few, CPU, ignore)

    assert few.n_requests == 3
    assert result.tasks["after"].documents == poor.tasks["after"].documents[:3]
    assert result.tasks["after"].metrics["exact_match,none"].values == (1.0, 0.0, 0.0)


def test_the_batch_size_does_not_change_a_score(own_tasks, poor_model, poor, monkeypatch):
    monkeypatch.setattr(harness, "MAX_BATCH_SIZE", 3)
    tasks = with_prompts(load_tasks(TaskSelection(("after", "choose"), include=own_tasks), {}))

    result = evaluate_model(poor_model, tasks, CPU, ignore)

    assert result.tasks["after"] == poor.tasks["after"]
    assert result.tasks["choose"] == poor.tasks["choose"]


def test_the_batch_shrinks_with_the_text_and_the_vocabulary():
    assert affordable_batch(n_tokens=20, n_vocabulary=356, memory_bytes=2_000_000_000) == 128
    assert affordable_batch(n_tokens=500, n_vocabulary=50_000, memory_bytes=2_000_000_000) == 10
    assert affordable_batch(500, 50_000, 2_000_000_000, n_beams=5) == 2
    assert affordable_batch(n_tokens=8_000, n_vocabulary=256_000, memory_bytes=2_000_000_000) == 1


def test_a_batch_of_long_texts_is_small_for_the_tokenizer():
    """128 texts of 5 million letters would take 190 GB, whatever a model's context."""
    assert [tokenisable_batch(n) for n in (0, 10_000, 100_000, 5_000_000)] == [128, 128, 66, 1]


def test_the_memory_of_logits_is_bounded_by_the_configuration():
    """SmolLM2-135M, scored on 64 questions of GSM8K, took 3 GB more than libraries and weights."""
    small = {"max_position_embeddings": 256, "vocab_size": 390}
    assert logits_bytes(small) == 3 * 128 * 256 * 390 * 8 // 2
    assert logits_bytes({"text_config": small}) == logits_bytes(small)
    assert logits_bytes({"max_position_embeddings": 8192, "vocab_size": 49152}) == 3_000_000_000
    assert logits_bytes({"vocab_size": 390}) == 3_000_000_000  # positions without a limit


def test_nothing_is_written_to_the_terminal_and_all_is_put_back(benchmarks, good_model, capfd):
    import datasets.utils
    import lm_eval.models.huggingface
    import lm_eval.utils
    import torch

    random.seed(5)
    torch.manual_seed(5)
    expected = random.Random(5).random(), torch.initial_seed()
    bar, level = lm_eval.models.huggingface.tqdm, logging.getLogger("lm_eval").level
    silent = datasets.utils.are_progress_bars_disabled()
    capfd.readouterr()

    evaluate_model(good_model, benchmarks, CPU, ignore)

    assert capfd.readouterr() == ("", "")
    assert (random.random(), torch.initial_seed()) == expected
    assert lm_eval.models.huggingface.tqdm is bar
    assert logging.getLogger("lm_eval").level == level
    assert "from_string" not in vars(lm_eval.utils.env)
    assert datasets.utils.are_progress_bars_disabled() == silent


def test_the_libraries_still_have_what_the_harness_replaces():
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import lm_eval.utils
    import tqdm

    for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
        assert issubclass(module.tqdm, tqdm.std.tqdm)
    assert callable(lm_eval.utils.env.from_string)
    assert lm_eval.api.task.datasets.load_dataset is datasets.load_dataset


def test_a_folder_without_a_model_is_told_by_its_name(benchmarks, tmp_path):
    with pytest.raises(EvaluationError) as raised:
        evaluate_model(tmp_path, benchmarks, CPU, ignore)

    first, *rest = str(raised.value).splitlines()
    assert first.startswith(f"{tmp_path}: cannot be loaded as a language model: ")
    assert rest[-1] == (
        "Expected: config.json, tokenizer files and safetensors that transformers can load."
    )


def test_a_model_whose_likelihoods_are_nan_is_not_scored(benchmarks, good_model, tmp_path):
    """lm-eval counted NaN as a choice of the first answer, which is right in some tasks."""
    shutil.copytree(good_model, tmp_path / "model")
    weights = load_file(good_model / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e38
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})

    with pytest.raises(UnscorableAnswerError) as caught:
        evaluate_model(tmp_path / "model", benchmarks, CPU, ignore)

    assert str(caught.value) == (
        f"{tmp_path / 'model'}: gives texts likelihoods that are not numbers (NaN), so it cannot "
        "be scored.\nIts activations overflow. Of a merge, lower the weights; of another model, "
        "leave it out of `compare`."
    )


def test_an_answer_of_very_long_tokens_is_refused_before_it_is_compared(tmp_path):
    """One of gsm8k, of 256 tokens of 10,000 digits, was compared for 40 minutes."""
    write_repeating_model(tmp_path / "model", "9" * 10_000)
    loaded = writing_task(tmp_path, n_tokens=64)

    with pytest.raises(UnscorableAnswerError) as caught:
        evaluate_model(tmp_path / "model", loaded, CPU, ignore)

    assert str(caught.value) == (
        f"{tmp_path / 'model'}: wrote an answer of 640,000 letters, the limit is 20,000, or 150 "
        "for each token.\n"
        "Its tokenizer has very long tokens: score another model, or other tasks."
    )


def test_an_answer_of_long_tokens_of_spaces_or_digits_is_scored(tmp_path):
    """As of a model that repeats the longest token of its tokenizer."""
    write_repeating_model(tmp_path / "model", "9" * 128)
    loaded = writing_task(tmp_path, n_tokens=256)

    result = evaluate_model(tmp_path / "model", loaded, CPU, ignore)

    assert result.tasks["write"].metrics["exact_match,none"].values == (0.0,)


def write_repeating_model(folder, token):
    """A model that writes one token again and again."""
    vocabulary = {"<unk>": 0, "<pad>": 1, "<eos>": 2, token: 3, "Question": 4}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Whitespace(), Fuse()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    ids = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=5, num_hidden_layers=1, **sizes, **ids))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(0.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
        model.lm_head.weight[[0, 1, 2, 4]] = 0.0
    model.save_pretrained(folder)


def writing_task(folder, n_tokens):
    """A task of one item, whose answer of so many tokens is compared as that of gsm8k."""
    (folder / "rows.jsonl").write_text('{"question": "Question", "answer": "7"}\n')
    (folder / "write.yaml").write_text(
        "task: write\ndataset_path: json\noutput_type: generate_until\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        f"generation_kwargs: {{until: ['!'], max_gen_toks: {n_tokens}}}\n"
        "metric_list: [{metric: exact_match, regexes_to_ignore: ['(?s).*#### ']}]\n"
    )
    return with_prompts(load_tasks(TaskSelection(("write",), include=folder), {}))


def test_a_truncated_weight_file_is_told_by_its_folder(benchmarks, good_model, tmp_path):
    for file in good_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00")

    with pytest.raises(EvaluationError, match="cannot be loaded as a language model: Safetensor"):
        evaluate_model(tmp_path, benchmarks, CPU, ignore)


def test_a_task_whose_answers_do_not_fit_the_context_is_refused(own_tasks, good_model, tmp_path):
    text = (own_tasks / "after.yaml").read_text().replace("max_gen_toks: 1", "max_gen_toks: 64")
    (tmp_path / "after.yaml").write_text(text)
    long = with_prompts(load_tasks(TaskSelection(("after",), include=tmp_path), {}))

    with pytest.raises(EvaluationError) as raised:
        evaluate_model(good_model, long, CPU, ignore)

    assert str(raised.value) == (
        "after: generates up to 64 tokens, but the model's context is 64 tokens.\n"
        "Set a smaller `generation_kwargs.max_gen_toks` in its file."
    )


def test_a_metric_that_cannot_take_the_answers_names_the_task(own_tasks, good_model, tmp_path):
    text = (own_tasks / "choose.yaml").read_text()
    text = text.replace(
        "{metric: mcc, aggregation: matthews_corrcoef", "{metric: f1, aggregation: f1"
    )
    (tmp_path / "choose.yaml").write_text(text)
    tasks = with_prompts(load_tasks(TaskSelection(("choose",), include=tmp_path), {}))

    with pytest.raises(EvaluationError) as raised:
        evaluate_model(good_model, tasks, CPU, ignore)

    assert str(raised.value).startswith(
        "choose: lm-eval could not score the answers: ValueError: Target is multiclass but"
    )


ERRORS = ["LookupError", "AssertionError", "ZeroDivisionError", "RuntimeError", "SyntaxError"]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_a_task_s_python_names_the_task(own_tasks, good_model, tmp_path, error):
    text = (own_tasks / "after.yaml").read_text()
    (tmp_path / "after.yaml").write_text(text + "process_results: !function own.results\n")
    (tmp_path / "own.py").write_text(f"def results(doc, answers):\n    raise {error}('no data')\n")
    tasks = with_prompts(load_tasks(TaskSelection(("after",), include=tmp_path), {}))

    with pytest.raises(EvaluationError) as raised:
        evaluate_model(good_model, tasks, CPU, ignore)

    assert str(raised.value).startswith(
        f"after: lm-eval could not score the answers: {error}: no data"
    )


def test_a_device_with_too_little_memory_is_told(own_tasks, good_model, tmp_path):
    text = (own_tasks / "after.yaml").read_text()
    (tmp_path / "after.yaml").write_text(text + "process_results: !function own.results\n")
    code = (
        "import torch\n\ndef results(doc, answers):\n    raise torch.OutOfMemoryError('20 GiB')\n"
    )
    (tmp_path / "own.py").write_text(code)
    tasks = with_prompts(load_tasks(TaskSelection(("after",), include=tmp_path), {}))

    with pytest.raises(EvaluationError) as raised:
        evaluate_model(good_model, tasks, CPU, ignore)

    assert str(raised.value) == (
        "after: the device has too little memory to score.\n"
        "Set a smaller `batch_size` in `evaluate`, or score on another `--device`."
    )


def test_a_number_of_tokens_that_is_no_number_names_the_task(own_tasks, good_model, tmp_path):
    text = (own_tasks / "after.yaml").read_text().replace("max_gen_toks: 1", "max_gen_toks: many")
    (tmp_path / "after.yaml").write_text(text)
    tasks = with_prompts(load_tasks(TaskSelection(("after",), include=tmp_path), {}))

    with pytest.raises(EvaluationError) as raised:
        evaluate_model(good_model, tasks, CPU, ignore)

    assert str(raised.value).startswith("after: lm-eval could not score the answers: ValueError: ")


def test_prompts_go_through_the_chat_template_where_that_is_asked_for(own_tasks):
    tasks = with_prompts(load_tasks(TaskSelection(("after",), include=own_tasks), {}), 3)
    model = zoo_folder() / "base"

    plain = evaluate_model(model, tasks, CPU, ignore).tasks["after"]
    chat = evaluate_model(model, tasks, EvaluationSettings(chat_template=True), ignore)

    assert chat.tasks["after"].documents == plain.documents
    assert not set(chat.tasks["after"].prompts) & set(plain.prompts)
    assert chat.settings == {"chat_template": True}  # a reader of the scores is told


def test_a_model_without_a_chat_template_is_named(own_tasks, good_model):
    tasks = with_prompts(load_tasks(TaskSelection(("after",), include=own_tasks), {}), 3)

    with pytest.raises(EvaluationError) as caught:
        evaluate_model(good_model, tasks, EvaluationSettings(chat_template=True), ignore)

    assert str(caught.value) == (
        f"{good_model}: has no chat template.\n"
        "Remove `evaluate.chat_template`, or compare with other models."
    )


def test_what_a_model_answered_is_recorded(good, poor):
    right = (*WORDS[1:], "zero") * 2

    assert good.tasks["after"].answers == Answers(right)
    assert good.tasks["choose"].answers == Answers(right)
    assert poor.tasks["after"].answers == Answers(("one",) * 20)
    assert poor.tasks["choose"].answers.given == ("one",) * 20
    assert good.tasks["both"].answers is None  # a group


def test_what_a_filter_reads_and_what_another_measure_prefers_are_recorded():
    generates = SimpleNamespace(OUTPUT_TYPE="generate_until")
    chooses = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice", doc_to_choice=lambda _: ["no", "certainly"]
    )
    said = {"doc": {}, "resps": [["so it is 4"]], "filtered_resps": ["4"]}
    whole = {**said, "filtered_resps": ["so it is 4"]}
    likely = {"doc": {}, "resps": [[(-4.0, False)], [(-9.0, False)]]}
    rolling = SimpleNamespace(OUTPUT_TYPE="loglikelihood_rolling")

    found = recorded_answers(
        generates, {"none": {0: whole}, "strict": {0: said}}, ("em,none", "em,strict")
    )
    chosen = recorded_answers(chooses, {"none": {0: likely}}, ("acc,none", "acc_norm,none"))

    assert found == Answers(("so it is 4",), {"em,strict": ("4",)})
    assert chosen == Answers(("no",), {"acc_norm,none": ("certainly",)})
    assert recorded_answers(rolling, {"none": {0: likely}}, ("bits_per_byte,none",)) is None


def test_items_are_in_the_order_of_the_results(own_tasks):
    loaded = load_tasks(TaskSelection(("both",), include=own_tasks), {})

    items = first_items(loaded, 3)

    assert [item.prompt for item in items["after"]] == [f"after : {word}" for word in WORDS[:3]]
    assert [item.answer for item in items["choose"]] == ["one", "two", "three"]
    assert items["choose"][0].choices == WORDS
    assert list(items) == ["after", "choose"]
