"""Limits of memory of embedding models, that hold whatever a setting is named."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate import embedding_limits
from lewis_hub.evaluate.embedding_limits import limit_batches, limit_held_vectors, limit_vectors
from lewis_hub.evaluate.text_limits import FEWER

REMEDY = "Its files are damaged, or made to do so: use an intact copy of the model."


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(embedding_limits, "BATCH_BYTES", 100_000_000)


def grow():
    kept = []
    for _ in range(100):
        kept.append(b"x" * 10_000_000)
        time.sleep(0.01)
    return kept


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


def test_a_batch_of_very_long_texts_is_refused():
    """The tokenizer ended the process where it reached the limit of memory."""
    model = SimpleNamespace(preprocess=len)

    limit_batches("org/model", model)

    assert model.preprocess(["a" * 4_000_000, {"text": "b" * 4_000_000}]) == 2
    with pytest.raises(EvaluationError) as refused:
        model.preprocess(["a" * 4_000_000, ("b" * 4_000_000, "c")])
    assert str(refused.value) == (
        "org/model: a batch of texts has 8,000,001 letters, the limit is 8,000,000.\n"
        "Set a smaller `batch_size` in `evaluate`."
    )


@pytest.mark.parametrize("key", ["sentence_embedding", "scores"])
def test_a_model_that_gives_very_long_vectors_is_refused(key):
    """They are kept for all texts: pooled 20,000 times, some thousand of them took gigabytes."""
    model = SimpleNamespace(forward=lambda n: {key: torch.ones(2, n), "input_ids": None})

    limit_vectors("org/model", model, is_sparse=False)

    assert model.forward(16_384)[key].shape == (2, 16_384)
    with pytest.raises(EvaluationError) as refused:
        model.forward(16_385)
    assert str(refused.value) == (
        f"org/model: its vector of a text has 16,385 numbers, the limit is 16,384.\n{REMEDY}"
    )


@pytest.mark.parametrize("key", ["sentence_embedding", "scores"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_model_whose_vectors_are_not_finite_is_not_scored(value, key):
    """mteb replaced NaN, and a cosine of too large numbers is 0: the order was that of the rows."""
    model = SimpleNamespace(forward=lambda value: {key: torch.tensor([[1.0, 2.0], [value, 0.0]])})

    limit_vectors("org/model", model, is_sparse=False)

    assert model.forward(1e18)[key].shape == (2, 2)
    with pytest.raises(EvaluationError) as refused:
        model.forward(value)
    assert str(refused.value) == (
        "org/model: gives texts vectors that are not finite (NaN, or too large), so it cannot be "
        "scored.\nIts activations overflow. Of a merge, lower the weights; of another model, leave "
        "it out of `compare`."
    )


def test_of_a_sparse_model_only_numbers_that_are_not_0_count():
    def vectors(n):
        found = torch.zeros(2, 50_000)
        found[1, :n] = 1
        return {"sentence_embedding": found}

    model = SimpleNamespace(forward=vectors)
    limit_vectors("org/model", model, is_sparse=True)

    assert model.forward(4096)["sentence_embedding"].shape == (2, 50_000)
    with pytest.raises(EvaluationError, match=r"has 4,097 numbers, the limit is 4,096"):
        model.forward(4097)


def test_vectors_of_very_many_texts_are_refused_before_they_are_made(monkeypatch):
    """15,000 pairs, in 1.2 kB, took 8.2 GB by a model of 16,384 numbers."""
    monkeypatch.setattr(embedding_limits, "MAX_BYTES", 7_800_000)
    made = []

    def encode(texts, **_):
        made.append(len(texts))
        return np.zeros((len(texts), 1000), dtype=np.float32)

    model = SimpleNamespace(encode=encode)
    limit_held_vectors("org/model", model)

    first = model.encode(["a"] * 300)
    assert len(model.encode(["b"] * 250)) == 250  # 4 * 1.2 MB and 3 * 1 MB
    with pytest.raises(EvaluationError) as refused:
        model.encode(["b"] * 251)
    assert str(refused.value) == (
        "org/model: its vectors have 1,000 numbers, so those of 251 texts may take 0.0 GB while "
        f"they are scored, the limit is 0.0 GB.\n{FEWER}"
    )
    assert made == [1, 300, 250]
    del first
    assert len(model.encode(["b"] * 650)) == 650  # the first ones are not kept
