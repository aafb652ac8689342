"""Tasks of mteb whose items have no numbers, and data that give no score."""

from __future__ import annotations

import io
from importlib.util import find_spec

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import CommitOperationAdd
from sentence_models import embedder

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.embedding_tasks import load_embedding_tasks, locate_embedding_tasks
from lewis_hub.evaluate.embeddings import evaluate_embedder
from lewis_hub.evaluate.tasks import TaskSelection

pytestmark = [
    pytest.mark.slow,  # loads sentence-transformers and mteb
    pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed"),
]
WORDS = ["cat", "dog", "sun", "moon", "tree", "river"]


def load(api, task, rows):
    """The task with these rows as its data, which are published where it looks for them."""
    selection = TaskSelection((task,), library="mteb")
    dataset = locate_embedding_tasks(selection)[task].metadata.dataset
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    api.create_repo(dataset["path"], repo_type="dataset")
    added = [CommitOperationAdd("data/test-00000-of-00001.parquet", file.getvalue())]
    commit = api.create_commit(dataset["path"], added, commit_message="Rows", repo_type="dataset")
    return load_embedding_tasks(selection, {(dataset["path"], dataset["revision"]): commit.oid})


def score(folder, loaded, task):
    settings = EvaluationSettings(backend="mteb")
    return evaluate_embedder(folder, loaded.tasks, settings, lambda _: None).tasks[task]


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

    result = score(embedder(tmp_path / "model", seed=0), load(hub.api(), task, rows), task)

    [metric] = result.metrics.values()
    assert -1 <= metric.value <= 1
    assert metric.values is None


def test_data_that_give_no_score_are_an_error(hub, tmp_path):
    rows = [{"sentence1": one, "sentence2": WORDS[0], "score": 2.0} for one in WORDS]
    loaded = load(hub.api(), "STSBenchmark", rows)

    with pytest.raises(EvaluationError) as caught:
        score(embedder(tmp_path / "model", seed=0), loaded, "STSBenchmark")

    assert str(caught.value) == (
        "STSBenchmark: its main score is no number (nan): its data give none.\n"
        "Check its data: similarities that are NaN, or all the same, have none."
    )
