"""Tables that mteb reads while it scores a model, such as what changed in the judgements."""

from __future__ import annotations

import io
from importlib.util import find_spec

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
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
TASK = "Core17InstructionRetrieval"
REPO = f"mteb/{TASK}"
N = 4
QUERIES = [f"q{i}-{kind}" for i in range(N) for kind in ("og", "changed")]
TABLES = {
    "corpus": [{"_id": f"d{i}", "title": "", "text": f"cat {i} dog {i * 7}"} for i in range(9)],
    "queries": [{"_id": query, "text": f"what is {query[:2]}"} for query in QUERIES],
    "instruction": [{"query-id": query, "instruction": f"find {query}"} for query in QUERIES],
    "test": [
        {"query-id": query, "corpus-id": f"d{at // 2 + k}", "score": 1}
        for at, query in enumerate(QUERIES)
        for k in range(3)
    ],
    "top_ranked": [
        {"query-id": query, "corpus-ids": [f"d{k}" for k in range(9)]} for query in QUERIES
    ],
    "qrel_diff": [{"query-id": f"q{i}", "corpus-ids": [f"d{i}"]} for i in range(N)],
}


def put(api, **changed):
    """Publish the task's dataset with other tables; returns its commit."""
    files = {}
    for name, rows in {**TABLES, **changed}.items():
        file = io.BytesIO()
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), file)
        files[f"{name}.parquet"] = file.getvalue()
    configs = [
        {
            "config_name": "default" if name == "test" else name,
            "data_files": [{"split": name, "path": f"{name}.parquet"}],
        }
        for name in TABLES
    ]
    files["README.md"] = f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()
    api.create_repo(REPO, repo_type="dataset", exist_ok=True)
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(REPO, operations, commit_message="Rows", repo_type="dataset").oid


def load(commit):
    selection = TaskSelection((TASK,), library="mteb")
    dataset = locate_embedding_tasks(selection)[TASK].metadata.dataset
    return load_embedding_tasks(selection, {(REPO, dataset["revision"]): commit}).tasks


def score(folder, tasks):
    settings = EvaluationSettings(backend="mteb")
    result = evaluate_embedder(folder, tasks, settings, lambda _: None)
    [metric] = result.tasks[TASK].metrics.values()
    return metric.value


def test_what_changed_in_the_judgements_is_read_within_the_limits(hub, tmp_path):
    """835 bytes took 10 GB, after all texts had been embedded."""
    model = embedder(tmp_path / "model", seed=0)
    ids = pa.ListArray.from_arrays(
        pa.array([0, 40_000_000], pa.int32()), pa.repeat("d0", 40_000_000)
    )
    wide = pa.table({"query-id": pa.array(["q0"]), "corpus-ids": ids})
    tasks = load(put(hub.api(), qrel_diff=wide))

    with pytest.raises(EvaluationError, match="mteb could not score the model"):
        score(model, tasks)

    assert -1 <= score(model, load(put(hub.api()))) <= 1
