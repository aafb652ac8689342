"""mteb's tasks for embedding models, by name or in the user's own files; no data is loaded.

An own file is YAML with the keys of mteb's `TaskMetadata`: `name`, `type`, `dataset` (`path` and
`revision`), `eval_splits`, `main_score`. Its data has the columns that mteb expects of the type.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from lewis_hub.documents import MAX_YAML_BYTES, DocumentError, leaves, read_yaml
from lewis_hub.errors import EvaluationError, LewisHubError
from lewis_hub.evaluate.benchmarks import (
    Commits,
    LoadedTasks,
    ScoredData,
    TaskData,
    tables_beside,
)
from lewis_hub.evaluate.gate import unknown_metric
from lewis_hub.evaluate.harness import quiet_libraries
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.evaluate.text_limits import HeldTexts
from lewis_hub.files import raise_if_of_the_disk, require_inside
from lewis_hub.hub.cached_rows import computed_anew
from lewis_hub.hub.rows import at_commit, only_tables

KINDS = {  # types of own tasks -> class of mteb
    "Classification": "AbsTaskClassification",
    "Clustering": "AbsTaskClustering",
    "PairClassification": "AbsTaskPairClassification",
    "Retrieval": "AbsTaskRetrieval",
    "STS": "AbsTaskSTS",
}
COMMIT = re.compile("[0-9a-f]{40}")
NAME = re.compile(r"[\w.-]+")
UNSTATED = {"description": "A task of one's own.", "eval_langs": ["eng-Latn"]}
MAX_LABELS = 2_000  # published tasks have some hundred; 10,000 take minutes, and gigabytes
RELEVANT = "relevant_docs"
RANKED_BEFORE = "top_ranked"
LISTS = (RELEVANT, RANKED_BEFORE)  # of a retrieval task: query -> documents
MAX_GRADE = 10_000  # trec_eval has 8 bytes, and a step, for each grade up to the highest
RANKED = 1000  # documents that mteb finds for a query
JUDGEMENT_BYTES = 200  # of a query and a document, while they are scored
NEIGHBOUR_BYTES = 250  # of a sentence and the nearest one in another language
CORRECT = "Correct the file; its keys are those of mteb's `TaskMetadata`."
CHECK_DATA = "Check `dataset` and the columns of its data, your network, and `hf auth login`."


def locate_embedding_tasks(selection: TaskSelection) -> dict[str, Any]:
    """Name -> mteb's task object, without data; imports mteb, which takes seconds.

    Raises:
        EvaluationError: mteb has no such task, or an own file is not one.
    """
    own = _own_files(selection.include) if selection.include else {}
    return {name: _own(*own[name]) if name in own else _known(name) for name in selection.names}


def own_task_files(names: tuple[str, ...], folder: Path) -> dict[str, Path]:
    """The files of own tasks that are named, and their data in the folder, by path in it."""
    own, root = _own_files(folder), folder.resolve()
    named = [own[name] for name in names if name in own]
    found = {path.relative_to(folder).as_posix(): path for path, _ in named}
    for _, document in named:
        dataset = document.get("dataset")
        place = dataset.get("path") if isinstance(dataset, Mapping) else None
        for path in tables_beside(place, folder) if isinstance(place, str) else ():
            found[path.relative_to(root).as_posix()] = path
    return found


def _own_files(folder: Path) -> dict[str, tuple[Path, Mapping[str, Any]]]:
    if not folder.is_dir():
        remedy = "Set `evaluate.include` to the folder with your task files."
        raise EvaluationError(str(folder), "is not a folder.", remedy)
    found: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for path in sorted(folder.glob("**/*.yaml"), key=Path.as_posix):
        require_inside(folder, path, EvaluationError)
        try:
            if path.stat().st_size > MAX_YAML_BYTES:
                raise EvaluationError(str(path), f"has more than {MAX_YAML_BYTES:,} bytes", CORRECT)
            document = read_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, DocumentError) as error:
            raise EvaluationError(str(path), f"is not YAML: {error}", CORRECT) from error
        if isinstance(document, dict) and "name" in document:
            name = str(document["name"])
            if not NAME.fullmatch(name) or name in found:
                problem = f"`name` is {name!r}, expected letters and digits, once in the folder"
                raise EvaluationError(str(path), problem, CORRECT)
            found[name] = (path, document)
    return found


def _own(path: Path, document: Mapping[str, Any]) -> Any:
    with quiet_libraries():
        import mteb.abstasks
        from mteb.abstasks.task_metadata import TaskMetadata
    from pydantic import ValidationError

    if document.get("type") not in KINDS:
        problem = f"`type` is {document.get('type')!r}, expected one of {', '.join(KINDS)}"
        raise EvaluationError(str(path), problem, CORRECT)
    try:
        dataset = {"revision": "main", **document["dataset"]}
        metadata = TaskMetadata(**{**UNSTATED, **document, "dataset": dataset})
    except (KeyError, TypeError) as error:
        raise EvaluationError(str(path), f"has no valid `dataset`: {error}", CORRECT) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
        raise EvaluationError(str(path), problem, CORRECT) from error
    kind = getattr(mteb.abstasks, KINDS[document["type"]])
    task = kind.__new__(kind)
    task.metadata = metadata  # mteb's own tasks have it in a class of their own
    task.__init__()
    return task


def _known(name: str) -> Any:
    with quiet_libraries():
        import mteb
        from mteb.abstasks.aggregated_task import AbsTaskAggregate
        from mteb.get_tasks import _TASKS_REGISTRY

        task = mteb.get_task(name) if name in _TASKS_REGISTRY else None
    if isinstance(task, AbsTaskAggregate):
        parts = ", ".join(part.metadata.name for part in task.tasks)
        raise EvaluationError(name, "it is a group of tasks.", f"Name some of them: {parts}.")
    if task is not None:
        return task
    near = difflib.get_close_matches(name, _TASKS_REGISTRY, n=3)
    hint = f"Did you mean {' or '.join(f'`{one}`' for one in near)}? " if near else ""
    remedy = f"{hint}`backend: mteb` takes mteb's tasks; those of lm-eval need another backend."
    raise EvaluationError(name, "mteb has no task of this name.", remedy)


def embedding_data(selection: TaskSelection) -> tuple[TaskData, ...]:
    """The data of every task of a selection."""
    located = locate_embedding_tasks(selection)
    datasets = {name: task.metadata.dataset for name, task in located.items()}
    return tuple(
        TaskData(name, one["path"], one["revision"], (), by_code=False)
        for name, one in datasets.items()
    )


def metric_of(task: Any, split: str) -> str:
    """The name of a task's main score on a split, as a gate names it: `ndcg_at_10,test`."""
    return f"{task.metadata.main_score},{split}"


def require_embedding_metric(selection: TaskSelection, task: str, metric: str) -> None:
    """Refuse a metric that is not the task's main score."""
    found = locate_embedding_tasks(selection)[task]
    known = [metric_of(found, split) for split in found.eval_splits]
    if metric not in known:
        raise unknown_metric(task, metric, known)


def load_embedding_tasks(selection: TaskSelection, commits: Commits) -> LoadedTasks:
    """Fetch the data of the tasks; a dataset without a commit is loaded at its revision.

    Raises:
        EvaluationError: as `locate_embedding_tasks`; data are missing or do not fit the task; or
            their texts are very long, or very many, or grades very high.
    """
    tasks, held = locate_embedding_tasks(selection), HeldTexts()
    for name, task in tasks.items():
        dataset = task.metadata.dataset
        if commit := commits.get((dataset["path"], dataset["revision"])):
            pinned = {**dataset, "revision": commit}
            pinned.pop("trust_remote_code", None)  # `datasets` runs no code
            task.metadata = task.metadata.model_copy(update={"dataset": pinned})
        try:
            with quiet_libraries(), guarded_tables(task.metadata.dataset if commit else None):
                task.load_data()
                _convert(task)
                for rows in _tables(task):
                    held.add_rows(name, rows)
                    _ = rows[:1]  # a value that Python has not, such as an unknown time zone
                held.add(name, JUDGEMENT_BYTES * _n_judgements(task))
                held.add(name, NEIGHBOUR_BYTES * _n_neighbours(task))
                _require_ranked(name, task)
                _require_whole_identifiers(name, task)
                _require_fitting_grades(name, task)
                require_few_labels(task, held)
        except LewisHubError:
            raise
        except Exception as error:  # of any class: from mteb's Python and the columns of the data
            raise_if_of_the_disk(error)
            line = str(error).partition("\n")[0]
            problem = f"its data `{dataset['path']}` cannot be loaded: {line}"
            raise EvaluationError(name, problem, CHECK_DATA) from error
    return LoadedTasks(selection, commits, tasks, {})


@contextmanager
def guarded_tables(pinned: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside the block mteb reads tables within the limits, of `pinned` those of its commit."""
    own_cache: AbstractContextManager[None] = nullcontext()
    if pinned:
        own_cache = at_commit(pinned["path"], pinned["revision"])
    with own_cache, only_tables(), computed_anew():
        yield


def guarded_scoring(task: Any) -> AbstractContextManager[None]:
    """Guard the tables that mteb reads while it scores: what changed in the judgements.

    Only the tasks that follow instructions have such a table.
    """
    if task.metadata.type != "InstructionReranking":
        return nullcontext()
    dataset = task.metadata.dataset
    return guarded_tables(dataset if COMMIT.fullmatch(dataset["revision"]) else None)


def _convert(task: Any) -> None:
    """Give a retrieval task that has tables of mteb's version 1 those of version 2."""
    if convert := getattr(task, "convert_v1_dataset_format_to_v2", None):
        convert(num_proc=None)


def scored_embedding_data(loaded: LoadedTasks) -> dict[str, ScoredData]:
    """Task -> its dataset."""
    found = {}
    for name, task in loaded.tasks.items():
        dataset, splits = task.metadata.dataset, task.eval_splits
        if not Path(dataset["path"]).exists():
            config, split = dataset.get("name"), splits[0] if len(splits) == 1 else None
            found[name] = ScoredData(dataset["path"], config, split, dataset["revision"])
    return found


def documents_of(task: Any, split: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Subset, identifier and content of every item of a split: a row, or a query."""
    for subset, data in subsets_of(task, split):
        if isinstance(data, Mapping):  # of a retrieval task
            queries = data["queries"]
            rows = {row["id"]: row for row in queries}
            yield from ((subset, str(key), dict(row)) for key, row in rows.items())
        else:
            yield from ((subset, str(number), dict(row)) for number, row in enumerate(data))


def subsets_of(task: Any, split: str) -> Iterator[tuple[str, Any]]:
    """The data of a split in each subset; mteb leaves the only one unnamed in some tasks.

    Where each column is a language, and each subset a pair of them, they are one table.
    """
    if getattr(task, "parallel_subsets", False):
        yield "parallel", task.dataset[split]
        return
    for subset in task.hf_subsets:
        held = task.dataset
        yield subset, held[split] if subset not in held else held[subset][split]


def _tables(task: Any) -> Iterator[Any]:
    """The tables that a task reads: of its splits, and of a retrieval task queries and corpus."""
    trained_on = getattr(task, "train_split", None)  # of a classifier
    for split in dict.fromkeys([*task.eval_splits, *([trained_on] if trained_on else [])]):
        for _, data in subsets_of(task, split):
            parts = [data["queries"], data["corpus"]] if isinstance(data, Mapping) else [data]
            yield from parts


def _n_judgements(task: Any) -> int:
    """The pairs of a query and a document that a retrieval task lists, or finds: RANKED a query."""
    splits = list(_searched(task))
    listed = [data.get(part) for data in splits for part in LISTS]
    found = sum(len(data["queries"]) * min(RANKED, len(data["corpus"])) for data in splits)
    return found + sum(len(documents) for one in listed if one for documents in one.values())


def _n_neighbours(task: Any) -> int:
    """The sentences that a task of many pairs of languages finds the nearest one for, at once."""
    if not getattr(task, "parallel_subsets", False):
        return 0
    return len(task.hf_subsets) * max(len(task.dataset[split]) for split in task.eval_splits)


def _require_ranked(name: str, task: Any) -> None:
    """Refuse documents to rank that belong to none of the queries: all scores would be 0."""
    for data in _searched(task):
        ranked, queries = data.get(RANKED_BEFORE), data["queries"]["id"]
        if ranked and len(queries) and ranked.keys().isdisjoint(queries):
            problem = f"its table `{RANKED_BEFORE}` has documents for none of its queries: it "
            problem += f"names `{str(next(iter(ranked)))[:100]}`, and the queries have identifiers "
            problem += f"such as `{str(queries[0])[:100]}`."
            raise EvaluationError(name, problem, "Correct the identifiers in its data.")


def _require_whole_identifiers(name: str, task: Any) -> None:
    """Refuse a null character in an identifier: trec_eval, in C, reads what is before it."""
    for data in _searched(task):
        listed = [one for part in LISTS for one in (data.get(part) or {}).items()]
        of_lists = chain.from_iterable((query, *documents) for query, documents in listed)
        for found in chain(data["queries"]["id"], data["corpus"]["id"], of_lists):
            if isinstance(found, str) and "\0" in found:
                problem = f"its identifier {found[:100]!r} has a null character."
                raise EvaluationError(name, problem, "Correct the identifiers in its data.")


def _require_fitting_grades(name: str, task: Any) -> None:
    """Refuse grades of documents that trec_eval takes very long for, or has no number for.

    Where the highest grade of a query is negative, it writes outside of its memory.
    """
    for data in _searched(task):
        for query, documents in (data.get(RELEVANT) or {}).items():
            highest = max((grade for grade in documents.values() if grade is not None), default=0)
            if highest < 0:
                problem = f"the highest grade of a document for its query `{str(query)[:100]}` is "
                problem += f"{highest}, the least is 0."
                remedy = "Choose a task whose documents that are not relevant have the grade 0."
                raise EvaluationError(name, problem, remedy)
            for document, grade in documents.items():
                if isinstance(grade, int) and abs(grade) > MAX_GRADE:
                    problem = f"its document `{str(document)[:100]}` has the grade {grade:,} for "
                    problem += f"the query `{str(query)[:100]}`, the limit is {MAX_GRADE:,}."
                    raise EvaluationError(name, problem, "Choose a task with lower grades.")


def _searched(task: Any) -> Iterator[Mapping[str, Any]]:
    """The splits of a retrieval task that are scored, in each subset."""
    for split in task.eval_splits:
        yield from (data for _, data in subsets_of(task, split) if isinstance(data, Mapping))


def require_few_labels(task: Any, held: HeldTexts) -> None:
    """Refuse a classifier of very many labels, which scikit-learn takes hours and gigabytes for.

    Raises:
        EvaluationError: it has more than MAX_LABELS, or they are many for its number of items.
    """
    name, has_several = task.metadata.name, task.metadata.type == "MultilabelClassification"
    if task.metadata.type != "Classification" and not has_several:
        return
    for split in {task.train_split, *(task.eval_splits if has_several else ())}:
        for _, rows in subsets_of(task, split):
            column = task.label_column_name
            labels = {*leaves([*rows[column]])} if has_several else rows.unique(column)
            n_labels = len(labels)
            if n_labels > MAX_LABELS:
                problem = f"its items have {n_labels:,} labels, the limit is {MAX_LABELS:,}."
                raise EvaluationError(name, problem, "Choose a task with fewer labels.")
            if has_several:  # mteb makes a number of each item and label, three times
                held.add(name, 3 * 8 * len(rows) * n_labels)


def items_of(tasks: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(task, document) for every item, to compare with calibration texts."""
    for name, task in tasks.items():
        for split in task.eval_splits:
            yield from ((name, document) for *_, document in documents_of(task, split))


def n_documents(tasks: Mapping[str, Any]) -> int:
    """The number of items that a model is scored on."""
    return sum(1 for _ in items_of(tasks))
