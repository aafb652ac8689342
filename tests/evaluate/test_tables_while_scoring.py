"""Tables that mteb reads while it scores a model, such as what changed in the judgements."""

from __future__ import annotations

from importlib.util import find_spec

import pyarrow as pa
import pytest
from published_tasks import published, scored
from sentence_models import embedder

from lewis_hub.errors import EvaluationError

pytestmark = [
    pytest.mark.slow,  # loads sentence-transformers and mteb
    pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed"),
]
TASK = "Core17InstructionRetrieval"
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


def loaded(api, **changed):
    """The task with other tables in its dataset."""
    return published(api, TASK, {**TABLES, **changed})


def score(folder, tasks):
    [metric] = scored(folder, tasks, TASK).metrics.values()
    return metric.value


def test_what_changed_in_the_judgements_is_read_within_the_limits(hub, tmp_path):
    """835 bytes took 10 GB, after all texts had been embedded."""
    model = embedder(tmp_path / "model", seed=0)
    ids = pa.ListArray.from_arrays(
        pa.array([0, 40_000_000], pa.int32()), pa.repeat("d0", 40_000_000)
    )
    wide = pa.table({"query-id": pa.array(["q0"]), "corpus-ids": ids})
    tasks = loaded(hub.api(), qrel_diff=wide)

    with pytest.raises(EvaluationError, match="mteb could not score the model"):
        score(model, tasks)

    assert -1 <= score(model, loaded(hub.api())) <= 1
