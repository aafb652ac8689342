"""Limits of memory of embedding models, that hold whatever a setting is named."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate import embedding_limits
from lewis_hub.evaluate.embedding_files import ModelFiles
from lewis_hub.evaluate.embedding_limits import limit_batches, limited_load
from lewis_hub.limits import TooMuchError, limited

REMEDY = "Its files are damaged, or made to do so: use an intact copy of the model."


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(embedding_limits, "FREE_BYTES", 20_000_000)
    monkeypatch.setattr(embedding_limits, "MAX_LOAD_BYTES", 80_000_000)
    monkeypatch.setattr(embedding_limits, "BATCH_BYTES", 100_000_000)


def grow():
    kept = []
    for _ in range(100):
        kept.append(b"x" * 10_000_000)
        time.sleep(0.01)
    return kept


@pytest.mark.usefixtures("small")
def test_a_load_that_takes_more_than_the_files_of_the_model_is_stopped():
    files = ModelFiles("org/model", {"model.safetensors": 1000}, lambda _: None)

    with pytest.raises(EvaluationError) as stopped, limited_load(files, "cpu"):
        grow()

    assert str(stopped.value) == (f"org/model: it takes more than 0.1 GB for its load.\n{REMEDY}")


@pytest.mark.usefixtures("small")
def test_a_batch_of_texts_that_becomes_very_large_is_refused():
    model = SimpleNamespace(preprocess=lambda texts: grow() if texts == ["long"] else texts)

    limit_batches("org/model", model)

    assert model.preprocess(["a"]) == ["a"]
    with pytest.raises(EvaluationError) as stopped:
        model.preprocess(["long"])
    assert str(stopped.value) == (
        f"org/model: its tokenizer: it takes more than 0.1 GB for a batch.\n{REMEDY}"
    )


def grow_in_part():
    with limited(60, "a part", max_bytes=10**12):
        grow()


def test_the_limit_around_another_one_says_what_was_too_much():
    with (
        pytest.raises(TooMuchError, match=r"more than 0.1 GB for all"),
        limited(math.inf, "all", max_bytes=100_000_000),
    ):
        grow_in_part()
