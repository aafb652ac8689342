from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lewis_hub.cli.main import disk_failure
from lewis_hub.display import shortened
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate import benchmarks
from lewis_hub.evaluate.benchmarks import load_tasks, own_files, with_prompts
from lewis_hub.evaluate.tasks import TaskSelection

FILE_REMEDY = "Check the task's file: its keys, splits, columns and metrics."
DATA_REMEDY = (
    "Check `dataset_path`, `dataset_name` and `data_files` (a relative path starts at the\n"
    "working folder), your network, and whether the dataset needs `hf auth login`."
)

CALLS_ITSELF = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"


@pytest.fixture
def refusal(own_tasks: Path, tmp_path: Path):
    """What loading says of the task `after` with a piece of its file replaced."""

    def refuse(old: str, new: str) -> str:
        text = (own_tasks / "after.yaml").read_text()
        assert old in text
        (tmp_path / "after.yaml").write_text(text.replace(old, new))
        with pytest.raises(EvaluationError) as raised:
            with_prompts(load_tasks(TaskSelection(("after",), include=tmp_path), {}))
        return str(raised.value)

    return refuse


def test_an_unknown_key_is_named(refusal):
    message = refusal("output_type:", "output_kind: x\noutput_type:")

    assert message == f"after: cannot be built: lm-eval has no key `output_kind`.\n{FILE_REMEDY}"


def test_a_column_that_is_not_there_is_named(refusal):
    message = refusal("after : {{word}}", "after : {{wort}}")

    assert message == (
        f"after: cannot be built: UndefinedError: 'wort' is undefined.\n{FILE_REMEDY}"
    )


def test_a_split_that_is_not_there_is_named(refusal):
    message = refusal("test_split: test", "test_split: validation")

    assert message == f"after: cannot be built: KeyError: 'validation'.\n{FILE_REMEDY}"


def test_settings_that_a_task_s_python_asserts_are_named(refusal, tmp_path):
    (tmp_path / "own.py").write_text("def docs(rows):\n    raise AssertionError('no tokenizer.')\n")
    message = refusal("test_split:", "process_docs: !function own.docs\ntest_split:")

    assert message == f"after: cannot be built: AssertionError: no tokenizer.\n{FILE_REMEDY}"


@pytest.mark.parametrize("pattern", ["*/../" * 16 + "rows.jsonl", "**/" * 40 + "rows.jsonl"])
def test_a_pattern_of_data_files_that_leads_through_folders_often_is_refused(
    own_tasks, tmp_path, pattern
):
    """Nine steps `*/..` took 13 s for three folders, and each more three times as long."""
    text = (own_tasks / "after.yaml").read_text().replace("test.jsonl", pattern)
    (tmp_path / "after.yaml").write_text(text)
    folders = tmp_path / "/".join("abcdefghijklmnopqrst")
    folders.mkdir(parents=True)

    with pytest.raises(EvaluationError) as raised:
        own_files(["after"], tmp_path)

    found = f"{own_tasks}/{pattern}"
    assert str(raised.value) == (
        f"after: `data_files` has the pattern `{shortened(found)}`, which finds a file in many "
        "ways.\nWrite `..` before the first wildcard, and `**` at most 2 times."
    )


def test_a_pattern_that_goes_round_in_links_is_stopped(own_tasks, tmp_path, monkeypatch):
    """Two links to their folder are 2 ** 40 folders, before the system refuses to go on."""
    monkeypatch.setattr(benchmarks, "MATCHING_S", 0.5)
    text = (own_tasks / "after.yaml").read_text().replace(f"{own_tasks}/test.jsonl", "'**/x.jsonl'")
    (tmp_path / "after.yaml").write_text(text)
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(".")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(EvaluationError) as raised:
        own_files(["after"], tmp_path)

    assert str(raised.value) == (
        "after: it takes more than 0.5 s for the patterns of `data_files`.\n"
        "Name the files, or fewer folders; links to folders are followed."
    )


def test_a_null_character_in_a_path_is_one_message(own_tasks, tmp_path):
    text = (own_tasks / "after.yaml").read_text().partition("dataset_kwargs:")[0]
    text = text.replace("dataset_path: json", r'dataset_path: "./a\0b"')
    (tmp_path / "after.yaml").write_text(text)

    with pytest.raises(EvaluationError) as raised:
        own_files(["after"], tmp_path)

    problem = "after: the path of its data has a null character."
    assert str(raised.value) == f"{problem}\nCorrect `dataset_path` or `data_dir`."


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ("regex_pattern: '(['", "PatternError: unterminated character set at position 1"),
        (
            "regex: a",
            "TypeError: RegexFilter.__init__() got an unexpected keyword argument 'regex'",
        ),
    ],
)
def test_a_filter_that_cannot_be_made_is_told_before_the_model_runs(refusal, settings, cause):
    steps = f"filter_list: [{{name: own, filter: [{{function: regex, {settings}}}]}}]\n"

    message = refusal("test_split:", f"{steps}test_split:").replace(": error: ", ": PatternError: ")

    assert message == f"after: cannot be built: {cause}.\n{FILE_REMEDY}"


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("doc_to_target:", 'doc_to_choice: "[{{word}}"\ndoc_to_target:', "SyntaxError: "),
        ("after : {{word}}", CALLS_ITSELF, "RecursionError: maximum recursion depth"),
    ],
)
def test_what_the_data_or_the_file_of_a_task_raise_names_the_task(refusal, old, new, cause):
    message = refusal(old, new)

    assert message.startswith("after: cannot be built: ")
    assert cause in message
    assert message.endswith(FILE_REMEDY)


def test_a_data_file_that_is_not_there_is_named(refusal, own_tasks):
    message = refusal("test.jsonl", "gone.jsonl")

    assert message == (
        "after: its data `json` cannot be loaded: "
        f"Unable to find '{own_tasks}/gone.jsonl'.\n{DATA_REMEDY}"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_no_fault_of_the_task(
    own_tasks, tmp_path, monkeypatch, number
):
    """The command line has a message for each."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.finalize", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        load_tasks(TaskSelection(("after",), include=own_tasks), {})
    assert disk_failure(raised.value)


def test_a_dataset_that_cannot_be_reached_is_named(tmp_path, datasets_cache):
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\n"
    )

    with pytest.raises(EvaluationError) as raised:
        with_prompts(load_tasks(TaskSelection(("far",), include=tmp_path), {}))

    message = str(raised.value)
    assert message.startswith("far: its data `nobody/nothing` cannot be loaded: ")
    assert message.endswith(DATA_REMEDY)


def test_a_task_without_items_is_an_error(refusal, own_tasks, tmp_path):
    (tmp_path / "none.jsonl").write_text("")

    message = refusal(f"test: {own_tasks}/test.jsonl", f"test: {tmp_path}/none.jsonl")

    assert message == (
        "after: has no items to score.\n"
        "Check its `test_split` (or `validation_split`) and its data."
    )


def test_a_missing_python_module_is_told(refusal):
    message = refusal("output_type:", "process_docs: !function nowhere.process\noutput_type:")

    assert message.startswith("after: cannot be loaded: Cannot import module 'nowhere'")


def test_own_functions_run_when_the_tasks_are_built(own_tasks, tmp_path):
    (tmp_path / "own.py").write_text("def process(items):\n    return items.select(range(4))\n")
    text = (own_tasks / "after.yaml").read_text()
    (tmp_path / "after.yaml").write_text(f"process_docs: !function own.process\n{text}")

    benchmarks = with_prompts(load_tasks(TaskSelection(("after",), include=tmp_path), {}))

    assert benchmarks.n_requests == 4


def test_a_tag_builds_the_tasks_that_bear_it(own_tasks):
    benchmarks = with_prompts(load_tasks(TaskSelection(("counting",), include=own_tasks), {}), 2)

    assert (list(benchmarks.tasks), benchmarks.n_requests) == (["choose"], 20)


def test_generated_code_stays_off_unless_it_is_allowed(own_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")  # the user's own setting is no permission
    (tmp_path / "own.py").write_text(
        "import os\n\ndef process(items):\n"
        "    return items.select(range(4 + int(os.environ['HF_ALLOW_CODE_EVAL'])))\n"
    )
    text = (own_tasks / "after.yaml").read_text()
    (tmp_path / "after.yaml").write_text(f"process_docs: !function own.process\n{text}")

    refused = with_prompts(load_tasks(TaskSelection(("after",), include=tmp_path), {}))
    allowed = with_prompts(
        load_tasks(TaskSelection(("after",), include=tmp_path, allow_code=True), {})
    )

    assert (refused.n_requests, allowed.n_requests) == (4, 5)
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
