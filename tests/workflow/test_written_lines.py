"""Lines of `generated.jsonl`, which others may have written: used, or passed over."""

import hashlib
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lewis_hub.calibration.subject import CalibrationSet
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.errors import RecipeError
from lewis_hub.recipe.schema import Calibration
from lewis_hub.report.lock import Lock, OutputFile
from lewis_hub.workflow.generated import TextRequest, require_whole_models
from lewis_hub.workflow.resources import Loading
from lewis_hub.workflow.verify import TEXTS, compare_models

TOKENS = CalibrationTokens(((5, 6), (7,)), (0, 1), 2, 0, 0, "me/model", limit=6)


@pytest.fixture
def request_of_two():
    asked = Calibration(dataset="me/data", text="{q}", answers="model")
    expert = SimpleNamespace(name="me/expert", pinned="me/expert@1", digest="1")
    return TextRequest(asked, expert, CalibrationSet({}, TOKENS), 42)


def line(asked, number, tokens):
    """A line with the digest of its tokens, as far as there can be one."""
    numbers = tokens if isinstance(tokens, list) else []
    told = f"{asked.key}:{number}:{','.join(map(str, numbers))}"
    digest = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
    own = {"row": number, "tokens": tokens, "texts": asked.key, "sha256": digest}
    return json.dumps(own)


def require(asked, path):
    require_whole_models({0: asked}, Loading(), [path], keeps_models=False)


def unknown():
    """Texts that are in no file are refused where a model cannot be loaded whole."""
    return pytest.raises(RecipeError, match="loads me/expert whole")


def test_lines_with_their_own_digest_are_used(request_of_two, tmp_path):
    path = tmp_path / "generated.jsonl"
    path.write_text(
        "\n".join(line(request_of_two, n, tokens) for n, tokens in enumerate(([1], [])))
    )

    require(request_of_two, path)


@pytest.mark.parametrize(
    "tokens",
    [
        *([-1], [10**30], [2**31], [1.0], [True], [None], ["1"], ["\ud800"], [[1]], [{}]),
        [1] * 5,  # with its prompt more than `max_tokens`
        "12",
        {"1": 2},
        5,
        None,
    ],
    ids=str,
)
def test_tokens_that_no_expert_writes_are_passed_over(request_of_two, tmp_path, tokens):
    path = tmp_path / "generated.jsonl"
    path.write_text(f"{line(request_of_two, 0, tokens)}\n{line(request_of_two, 1, [])}\n")

    with unknown():
        require(request_of_two, path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "null", "5", '{"texts": []}', '{"texts": {}}', '"a"', "\x00", "NaN"]
)
def test_lines_that_are_none_are_passed_over(request_of_two, tmp_path, content):
    path = tmp_path / "generated.jsonl"
    path.write_text(content)

    with unknown():
        require(request_of_two, path)


def test_files_without_end_are_not_read(request_of_two, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")

    with unknown():
        require(request_of_two, tmp_path / "fifo")
    with unknown():
        require(request_of_two, tmp_path / "device")


@pytest.mark.parametrize(("answers", "complaints"), [("model", 0), (None, 1)])
def test_answers_are_compared_if_both_merges_have_them(answers, complaints):
    model, texts = OutputFile("a" * 64, 3), OutputFile("b" * 64, 9)
    recipe = {"calibration": {"dataset": "me/data", "answers": answers}}
    lock = Lock((), (), recipe, "linear", 1, None, None, 1, 1000, {"config.json": model}, {})
    written = replace(lock, outputs={"config.json": model, TEXTS: texts})
    changed = replace(lock, outputs={"config.json": model, TEXTS: model})

    assert len(compare_models(lock, written)) == complaints
    assert len(compare_models(written, lock)) == complaints
    assert len(compare_models(written, changed)) == 1
