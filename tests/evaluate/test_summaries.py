"""Tasks of mteb whose items have no numbers, and data that give no score."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from published_tasks import published, scored
from sentence_models import embedder

from lewis_hub.errors import EvaluationError

pytestmark = [
    pytest.mark.slow,  # loads sentence-transformers and mteb
    pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed"),
]
WORDS = ["cat", "dog", "sun", "moon", "tree", "river"]


def test_summaries_are_scored_without_numbers_of_their_items(hub, tmp_path):
    """They were read as pairs of sentences: a traceback, when all had been scored."""
    task = "SummEvalSummarization.v2"
    rows = [
        {
            "text": " ".join(WORDS[i:]),
            "human_summaries": [WORDS[i], WORDS[i + 1]],
            "machine_summaries": [f"{WORDS[j]} {WORDS[i]}" for j in range(5)],
            "relevance": [float((i + 2 * j) % 5) for j in range(5)],
        }
        for i in range(4)
    ]

    result = scored(
        embedder(tmp_path / "model", seed=0), published(hub.api(), task, {"test": rows}), task
    )

    [metric] = result.metrics.values()
    assert -1 <= metric.value <= 1
    assert metric.values is None


def test_data_that_give_no_score_are_an_error(hub, tmp_path):
    rows = [{"sentence1": one, "sentence2": WORDS[0], "score": 2.0} for one in WORDS]
    loaded = published(hub.api(), "STSBenchmark", {"test": rows})

    with pytest.raises(EvaluationError) as caught:
        scored(embedder(tmp_path / "model", seed=0), loaded, "STSBenchmark")

    assert str(caught.value) == (
        "STSBenchmark: its main score is no number (nan): its data give none.\n"
        "Check its data: similarities that are NaN, or all the same, have none."
    )
