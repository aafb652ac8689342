"""Tables of mteb's own tasks on the embedded Hub, where the tasks look for them."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from huggingface_hub import CommitOperationAdd

from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.embedding_tasks import load_embedding_tasks, locate_embedding_tasks
from lewis_hub.evaluate.embeddings import evaluate_embedder
from lewis_hub.evaluate.tasks import TaskSelection


def published(api, task, tables):
    """The task with these rows by table as its data; the table `test` is its split."""
    selection = TaskSelection((task,), library="mteb")
    dataset = locate_embedding_tasks(selection)[task].metadata.dataset
    repo = dataset["path"]
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    added = [CommitOperationAdd(path, content) for path, content in _files(tables).items()]
    commit = api.create_commit(repo, added, commit_message="Rows", repo_type="dataset")
    return load_embedding_tasks(selection, {(repo, dataset["revision"]): commit.oid}).tasks


def scored(folder, tasks, task):
    """The result of a model of sentences in one of the tasks."""
    settings = EvaluationSettings(backend="mteb")
    return evaluate_embedder(folder, tasks, settings, lambda _: None).tasks[task]


def _files(tables):
    files = {}
    for name, rows in tables.items():
        file = io.BytesIO()
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), file)
        files[f"{name}.parquet"] = file.getvalue()
    configs = [
        {
            "config_name": "default" if name == "test" else name,
            "data_files": [{"split": name, "path": f"{name}.parquet"}],
        }
        for name in tables
    ]
    return {**files, "README.md": f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()}
