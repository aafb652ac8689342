"""Long texts in the data of a task: 3 rows in 6 kB of parquet took 5 and 7 GB to score."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate import harness, text_limits
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.benchmarks import load_tasks, with_prompts
from lewis_hub.evaluate.embedding_tasks import (
    documents_of,
    load_embedding_tasks,
    n_documents,
    require_few_labels,
)
from lewis_hub.evaluate.harness import evaluate_model
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.evaluate.text_limits import FEWER, HeldTexts

LL = "output_type: multiple_choice\ndoc_to_choice: [a, b]\ndoc_to_target: 0"
GENERATED = "output_type: generate_until\ndoc_to_target: a"
TOO_MANY = (
    "own: its texts, and those of the tasks before it, may take more than 0.1 GB while they are "
    f"scored.\n{FEWER}"
)
TOO_LONG = (
    "own: a text has 6,000,000 letters, the limit is 5,000,000.\nChoose a task with shorter texts."
)


@pytest.fixture
def selection(tmp_path):
    """Make the selection of a task of lm-eval on rows with these texts."""

    def select(texts, kind=LL, shown="", text="{{question}}"):
        (tmp_path / "data").mkdir()
        for split in ("train", "test"):
            table = pa.table({"question": texts if split == "test" else [shown]})
            pq.write_table(table, tmp_path / f"data/{split}.parquet", compression="zstd")
        (tmp_path / "own.yaml").write_text(
            f"task: own\ndataset_path: {tmp_path / 'data'}\ntest_split: test\n"
            f"training_split: train\ndoc_to_text: '{text}'\n{kind}\n"
            f"metric_list: [{{metric: acc}}]\nnum_fewshot: {int(bool(shown))}\n"
        )
        return TaskSelection(("own",), include=tmp_path)

    return select


def refusal(prepare):
    with pytest.raises(EvaluationError) as refused:
        prepare()
    return str(refused.value)


def test_a_very_long_text_is_refused_where_the_rows_are_read(selection):
    selected = selection(["a", "ab" * 3_000_000])

    assert refusal(lambda: load_tasks(selected, {})) == TOO_LONG


@pytest.mark.parametrize("shown", ["ab" * 3_000_000, ""])
def test_a_very_long_prompt_is_refused(shown, selection):
    """Its letters come from an example, or from the template."""
    text = "{{question}}" if shown else "{% for _ in range(60) %}{{question * 1000}}{% endfor %}"
    selected = selection(["a" * 100], shown=shown, text=text)

    message = refusal(lambda: with_prompts(load_tasks(selected, {})))

    assert message.startswith("own: a text has 6,000,")
    assert message.endswith(" letters, the limit is 5,000,000.\nChoose a task with shorter texts.")


def test_very_many_texts_are_refused(selection, monkeypatch):
    """Each of 45 rows makes two requests, whose tokens are held."""
    monkeypatch.setattr(text_limits, "MAX_BYTES", 100_000_000)
    loaded = load_tasks(selection(["ab" * 50_000] * 45), {})

    assert refusal(lambda: with_prompts(loaded)) == TOO_MANY
    assert with_prompts(loaded, limit=20).n_requests == 40


def test_of_texts_that_a_model_continues_only_servers_hold_all_tokens(selection, monkeypatch):
    monkeypatch.setattr(text_limits, "MAX_BYTES", 100_000_000)
    loaded = load_tasks(selection(["ab" * 50_000] * 80, kind=GENERATED), {})

    assert with_prompts(loaded).n_requests == 80
    served = EvaluationSettings(backend="local-completions")
    assert refusal(lambda: with_prompts(loaded, settings=served)) == TOO_MANY


@pytest.mark.parametrize(("metric", "limit"), [("bleu", 100_000), ("chrf", 100_000), ("ter", 5000)])
def test_an_answer_that_sacrebleu_compares_is_not_very_long(metric, limit, selection, tmp_path):
    """One of 4.3 MB took ter 71 s, after all answers were made."""
    kind = GENERATED.replace("doc_to_target: a", "doc_to_target: '{{question}}'")
    selected = selection(["a" * limit, "ab" * (limit // 2 + 1)], kind=kind, text="a")
    file = tmp_path / "own.yaml"
    others = file.read_text().replace("{metric: acc}", "{metric: exact_match}")
    file.write_text(file.read_text().replace("{metric: acc}", f"{{metric: {metric}}}"))
    loaded = load_tasks(selected, {})

    assert with_prompts(loaded, limit=1).n_requests == 1
    assert refusal(lambda: with_prompts(loaded)) == (
        f"own: its answer to an item has {limit + 2:,} letters, the limit for {metric} is "
        f"{limit:,}.\nChoose a task with shorter answers."
    )
    file.write_text(others)
    assert with_prompts(load_tasks(selected, {})).n_requests == 2


@pytest.mark.parametrize("choices", [[["a", "b"], ["a"] * 10_001], ["ab", "a" * 10_001]])
def test_an_item_of_very_many_choices_is_refused(choices, selection):
    """Each is a request: 3 million, in 832 bytes, were built for minutes."""
    listed = LL.replace("[a, b]", "question")
    loaded = load_tasks(selection(choices, listed, shown=choices[0], text="b"), {})

    assert refusal(lambda: with_prompts(loaded)) == (
        "own: an item has 10,001 choices, the limit is 10,000.\nChoose a task with fewer choices."
    )


def test_texts_whose_every_letter_is_a_token_may_not_fill_the_memory(selection, monkeypatch):
    benchmarks = with_prompts(load_tasks(selection(["7x" * 200_000] * 20), {}))
    monkeypatch.setattr(harness, "MAX_BYTES", 100_000_000)

    message = refusal(
        lambda: evaluate_model(
            zoo_folder() / "base", benchmarks, EvaluationSettings(), lambda _: None
        )
    )

    assert message == f"own: it takes more than 0.1 GB for the requests.\n{FEWER}"


def test_rows_without_letters_count(selection, monkeypatch):
    """20 million empty rows fit into a few kB."""
    monkeypatch.setattr(text_limits, "MAX_BYTES", 100_000_000)
    selected = selection([""] * 62_501)

    assert refusal(lambda: load_tasks(selected, {})) == TOO_MANY


@pytest.mark.parametrize("split", ["training_split: train", "fewshot_split: train"])
def test_rows_that_examples_are_drawn_from_count_before_they_are_listed(
    split, selection, tmp_path, monkeypatch
):
    """25 million, in 83 kB, were listed for over 107 s, before any was counted."""
    monkeypatch.setattr(text_limits, "MAX_BYTES", 100_000_000)
    selected = selection(["a"])
    task = tmp_path / "own.yaml"
    task.write_text(task.read_text().replace("training_split: train", split))
    table = pa.table({"question": [""] * 62_501})
    pq.write_table(table, tmp_path / "data/train.parquet")

    assert refusal(lambda: load_tasks(selected, {})) == TOO_MANY


@pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed")
@pytest.mark.parametrize(
    ("n_rows", "n_labels", "message"),
    [
        (62_501, 2, TOO_MANY),
        (
            2_001,
            2_001,
            "own: its items have 2,001 labels, the limit is 2,000.\n"
            "Choose a task with fewer labels.",
        ),
    ],
)
def test_rows_and_labels_that_a_classifier_is_trained_on_count(
    n_rows, n_labels, message, tmp_path, monkeypatch
):
    """10,000 labels took scikit-learn 92 s and 2.3 GB, with vectors of 64 numbers."""
    monkeypatch.setattr(text_limits, "MAX_BYTES", 100_000_000)
    (tmp_path / "data").mkdir()
    for split, n_texts in (("train", n_rows), ("test", 2)):
        labels = [number % n_labels for number in range(n_texts)]
        table = pa.table({"text": ["a"] * n_texts, "label": labels})
        pq.write_table(table, tmp_path / f"data/{split}.parquet")
    (tmp_path / "own.yaml").write_text(
        f"name: own\ntype: Classification\ndataset: {{path: {tmp_path / 'data'}}}\n"
        "eval_splits: [test]\nmain_score: accuracy\n"
    )
    selected = TaskSelection(("own",), include=tmp_path, library="mteb")

    assert refusal(lambda: load_embedding_tasks(selected, {})) == message


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [[number] for number in range(2_001)],
            "own: its items have 2,001 labels, the limit is 2,000.\n"
            "Choose a task with fewer labels.",
        ),
        ([[*range(1_000)]] * 5_000, TOO_MANY),
    ],
)
def test_items_of_several_labels_are_counted_with_all_of_them(labels, message, monkeypatch):
    """3,000 rows, of .85 MB, with 60 labels of their own each took 5.2 GB and ended in an error."""
    monkeypatch.setattr(text_limits, "MAX_BYTES", 100_000_000)
    metadata = SimpleNamespace(name="own", type="MultilabelClassification")
    rows = Dataset.from_dict({"text": ["a"] * len(labels), "label": labels})
    task = SimpleNamespace(
        metadata=metadata,
        train_split="test",
        eval_splits=["test"],
        hf_subsets=["default"],
        label_column_name="label",
        dataset={"test": rows},
    )

    assert refusal(lambda: require_few_labels(task, HeldTexts())) == message


def test_texts_are_counted_in_lists_and_in_tables():
    held = HeldTexts()

    held.add_texts("own", {"a": ["bc", {"d": "efg"}], "h": 5})
    held.add_rows("own", [{"text": "abc"}, {"text": None}])
    held.add_rows("own", Dataset.from_dict({"text": ["abc"]}))  # too small for a long text

    assert held.n_bytes == 4 * 5 + 2 * 1500 + 4 * 3 + 1500 + 100


def test_texts_in_lists_count_as_items():
    """A million pairs of a row were one item."""
    held = HeldTexts()

    held.add_rows("own", [{"sentence1": ["a"] * 10, "sentence2": ["b"] * 10, "labels": [1] * 10}])

    assert held.n_bytes == 1500 + 17 * 500 + 20 * 4


def write_tables(folder, tables):
    """Write columns as parquet; a table named `a/test` is the split `test` of configuration `a`."""
    for name, columns in tables.items():
        file = folder / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), file)
    names = [name.partition("/")[0] for name in tables if "/" in name]
    if names:
        parts = "".join(f"- {{config_name: {one}, data_dir: {one}}}\n" for one in names)
        (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")


def own_embedding_task(folder, kind, tables):
    """The selection of an own task for embedding models, with these columns by table."""
    data = folder / "data"
    write_tables(data, tables)
    score = {"STS": "cosine_spearman", "Retrieval": "ndcg_at_10"}[kind]
    (folder / "own.yaml").write_text(
        f"name: own\ntype: {kind}\ndataset: {{path: {data}}}\neval_splits: [test]\n"
        f"main_score: {score}\n"
    )
    return TaskSelection(("own",), include=folder, library="mteb")


@pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed")
@pytest.mark.parametrize("kind", ["STS", "Retrieval"])
def test_a_very_long_text_is_refused_before_it_is_embedded(kind, tmp_path):
    long = ["a", "ab" * 3_000_000]
    if kind == "STS":
        tables = {"test": {"sentence1": long, "sentence2": ["b"] * 2, "score": [0.0, 1.0]}}
    else:
        ids = ["1", "2"]
        tables = {
            "corpus/test": {"_id": ids, "title": ["", ""], "text": long},
            "queries/test": {"_id": ids, "text": ["a", "b"]},
            "qrels/test": {"query-id": ids, "corpus-id": ids, "score": [1, 1]},
        }
    selected = own_embedding_task(tmp_path, kind, tables)

    assert refusal(lambda: load_embedding_tasks(selected, {})) == TOO_LONG


@pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed")
def test_the_documents_that_are_judged_for_a_query_count(tmp_path, monkeypatch):
    """18 million judgements, in 261 kB, took 4.3 GB."""
    monkeypatch.setattr(text_limits, "MAX_BYTES", 10_000_000)
    judged = [str(number) for number in range(50_000)]
    tables = {
        "corpus/test": {"_id": ["1"], "title": [""], "text": ["a"]},
        "queries/test": {"_id": ["1"], "text": ["a"]},
        "qrels/test": {"query-id": ["1"] * 50_000, "corpus-id": judged, "score": [1] * 50_000},
    }
    selected = own_embedding_task(tmp_path, "Retrieval", tables)

    assert refusal(lambda: load_embedding_tasks(selected, {})) == TOO_MANY.replace(
        "0.1 GB", "0.0 GB"
    )


@pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed")
@pytest.mark.parametrize(("grade", "told"), [(500_000_000, "500,000,000"), (-10_001, "-10,001")])
def test_a_document_has_no_very_high_grade(grade, told, tmp_path):
    """trec_eval took 157 s and 4.6 GB for 500 million, and gave 0 to all queries for 2 billion."""
    tables = {
        "corpus/test": {"_id": ["1", "2"], "title": ["", ""], "text": ["a", "b"]},
        "queries/test": {"_id": ["q"], "text": ["a"]},
        "qrels/test": {"query-id": ["q", "q"], "corpus-id": ["1", "2"], "score": [10_000, 2]},
    }
    load_embedding_tasks(own_embedding_task(tmp_path / "low", "Retrieval", tables), {})
    tables["qrels/test"]["score"] = [1, grade]
    selected = own_embedding_task(tmp_path / "high", "Retrieval", tables)

    assert refusal(lambda: load_embedding_tasks(selected, {})) == (
        f"own: its document `2` has the grade {told} for the query `q`, the limit is 10,000.\n"
        "Choose a task with lower grades."
    )


def searched(queries, documents, grades):
    """The tables of a task of two queries, and two documents that are judged for each."""
    return {
        "corpus/test": {"_id": documents, "title": [""] * 2, "text": ["a", "b"]},
        "queries/test": {"_id": queries, "text": ["a", "b"]},
        "qrels/test": {
            "query-id": [one for one in queries for _ in documents],
            "corpus-id": documents * 2,
            "score": grades,
        },
    }


@pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed")
@pytest.mark.parametrize(
    ("queries", "documents", "grades", "told"),
    [
        (
            *(["p", "q"], ["1", "2"], [1, -1, -5, -2]),
            "own: the highest grade of a document for its query `q` is -2, the least is 0.\n"
            "Choose a task whose documents that are not relevant have the grade 0.",
        ),
        (
            *(["p", "q"], ["1", "1\0x"], [1, 0, 0, 1]),
            "own: its identifier '1\\x00x' has a null character.\n"
            "Correct the identifiers in its data.",
        ),
        (
            *(["p", "p\0x"], ["1", "2"], [1, 0, 0, 1]),
            "own: its identifier 'p\\x00x' has a null character.\n"
            "Correct the identifiers in its data.",
        ),
    ],
)
def test_what_damages_the_memory_of_trec_eval_is_refused(
    queries, documents, grades, told, tmp_path
):
    """The process ended by a signal, or a score was not that of the data."""
    whole = searched(["p", "q"], ["1", "2"], [1, -1, 0, -2])
    load_embedding_tasks(own_embedding_task(tmp_path / "whole", "Retrieval", whole), {})
    tables = searched(queries, documents, grades)
    selected = own_embedding_task(tmp_path / "broken", "Retrieval", tables)

    assert refusal(lambda: load_embedding_tasks(selected, {})) == told


@pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed")
def test_documents_to_rank_that_belong_to_no_query_are_refused(tmp_path):
    """All scores were 0."""
    tables = {
        "corpus/test": {"_id": ["1"], "title": [""], "text": ["a"]},
        "queries/test": {"_id": ["q1"], "text": ["a"]},
        "qrels/test": {"query-id": ["q1"], "corpus-id": ["1"], "score": [1]},
        "top_ranked/test": {"query-id": ["q1"], "corpus-ids": [["1"]]},
    }
    load_embedding_tasks(own_embedding_task(tmp_path / "right", "Retrieval", tables), {})
    tables["top_ranked/test"]["query-id"] = ["query-1"]
    selected = own_embedding_task(tmp_path / "wrong", "Retrieval", tables)

    assert refusal(lambda: load_embedding_tasks(selected, {})) == (
        "own: its table `top_ranked` has documents for none of its queries: it names `query-1`, "
        "and the queries have identifiers such as `q1`.\nCorrect the identifiers in its data."
    )


def published_task(monkeypatch, task, folder, tables):
    """The selection of a task of mteb's own, with its data in a folder."""
    kind = type(task)
    write_tables(folder, tables)
    data = {"dataset": {"path": str(folder), "revision": "main"}}
    monkeypatch.setattr(kind, "metadata", kind.metadata.model_copy(update=data))
    return TaskSelection((kind.metadata.name,), library="mteb")


@pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed")
def test_a_retrieval_task_of_mtebs_version_1_has_items(tmp_path, monkeypatch):
    """93 tasks were refused: mteb makes their tables of version 2 only where it scores them."""
    import mteb

    selected = published_task(
        monkeypatch,
        mteb.get_task("SyntecRetrieval"),
        tmp_path,
        {
            "documents/test": {"id": [7, 8], "content": ["a", "b"], "title": ["", ""]},
            "queries/test": {"Question": ["what is a?", "and b?"], "Article": [7, 8]},
        },
    )

    tasks = load_embedding_tasks(selected, {}).tasks

    assert list(documents_of(tasks["SyntecRetrieval"], "test")) == [
        ("default", "0", {"id": "0", "text": "what is a?"}),
        ("default", "1", {"id": "1", "text": "and b?"}),
    ]


@pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed")
def test_a_table_of_many_languages_counts_once(tmp_path, monkeypatch):
    """For each of 1,916 pairs, 2,000 sentences in 121 languages counted as 12.6 GB, in 102 s."""
    import mteb

    held, task = HeldTexts(), mteb.get_task("NTREXBitextMining")
    columns = sorted({one for pair in task.hf_subsets for one in pair.split("-")})
    tables = {"test": {one: [f"{one} 1", f"{one} 2"] for one in columns}}
    selected = published_task(monkeypatch, task, tmp_path, tables)
    monkeypatch.setattr("lewis_hub.evaluate.embedding_tasks.HeldTexts", lambda: held)

    tasks = load_embedding_tasks(selected, {}).tasks

    assert n_documents(tasks) == 2
    of_the_rows = 2 * (text_limits.ITEM_BYTES + text_limits.COLUMN_BYTES * len(columns))
    assert held.n_bytes == of_the_rows + 250 * 1916 * 2  # a neighbour of each sentence of a pair


@pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed")
def test_the_documents_that_are_found_for_a_query_count(tmp_path, monkeypatch):
    """1,000 for each of 20,000 queries, in 32 kB, took 4.2 GB."""
    monkeypatch.setattr(text_limits, "MAX_BYTES", 10_000_000)
    ids = [str(number) for number in range(300)]
    tables = {
        "corpus/test": {"_id": ids, "title": [""] * 300, "text": ["a"] * 300},
        "queries/test": {"_id": ids, "text": ["a"] * 300},
        "qrels/test": {"query-id": ids, "corpus-id": ids, "score": [1] * 300},
    }
    selected = own_embedding_task(tmp_path, "Retrieval", tables)

    assert refusal(lambda: load_embedding_tasks(selected, {})) == TOO_MANY.replace(
        "0.1 GB", "0.0 GB"
    )


@pytest.mark.skipif(not find_spec("mteb"), reason="mteb is not installed")
def test_a_value_that_python_has_not_is_one_message_as_the_data_are_loaded(tmp_path):
    """It was a traceback as the items were counted."""
    zone = pa.timestamp("us", tz="No/Where")
    times = pa.Array.from_buffers(zone, 2, [None, pa.py_buffer(bytes(16))])
    texts = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [0.0, 1.0]}
    selected = own_embedding_task(tmp_path, "STS", {"test": {**texts, "time": times}})

    message = refusal(lambda: load_embedding_tasks(selected, {}))

    assert message.startswith(f"own: its data `{tmp_path / 'data'}` cannot be loaded: 'No/Where'.")
