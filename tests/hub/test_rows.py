from __future__ import annotations

import gzip
import json
import resource
import shutil
import socket
import sys
import time
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lewis_hub.errors import SourceError
from lewis_hub.evaluate.benchmarks import at_commits
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.hub import rows
from lewis_hub.hub.resolve import resolve_dataset
from lewis_hub.hub.rows import describe_dataset, load_rows
from lewis_hub.hub.source import cache_root
from lewis_hub.workflow.task_data import scored_sources

ROWS = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(5)]
CONFIGS = b"""---
configs:
- config_name: easy
  data_files: [{split: train, path: easy.jsonl}, {split: test, path: hard.jsonl}]
- config_name: hard
  data_files: hard.jsonl
---
"""


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def load(api, name, config=None, split="train", revision=None):
    return load_rows(api, resolve_dataset(api, str(name), revision), config, split)


def message(api, name, config=None, split="train") -> str:
    with pytest.raises(SourceError) as raised:
        load(api, name, config, split)
    return str(raised.value)


def test_a_local_file_gives_its_rows_in_order(tmp_path, api):
    (tmp_path / "data.jsonl").write_bytes(lines(ROWS))

    rows = load(api, tmp_path / "data.jsonl")

    assert len(rows) == 5
    assert rows.columns == ("question", "answer")
    assert rows.rows([3, 0]) == [ROWS[3], ROWS[0]]


def test_files_whose_rows_are_cached_are_not_fetched_again(api, push):
    """They may be gigabytes, and the Hub may not answer."""
    push("me/rows", {"train.jsonl": lines(ROWS)}, "dataset")
    first = load(api, "me/rows")
    shutil.rmtree(cache_root())

    assert load(api, "me/rows").rows(range(5)) == first.rows(range(5)) == ROWS
    assert not list(cache_root().rglob("*.jsonl"))


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_other_file_kinds_give_the_same_rows(tmp_path, api, kind):
    import datasets

    path = tmp_path / f"data.{kind}"
    getattr(datasets.Dataset.from_list(ROWS), f"to_{kind}")(str(path))

    found = load(api, path).rows(range(5))

    assert [{key: str(value) for key, value in row.items()} for row in found] == ROWS


def test_a_folder_of_files_gives_its_splits(tmp_path, api):
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "test.jsonl").write_bytes(lines(ROWS[:2]))

    assert len(load(api, tmp_path, split="test")) == 2
    assert message(api, tmp_path, split="dev") == (
        f"{tmp_path}: it has no split `dev`.\nIt has: train, test."
    )


@pytest.mark.parametrize(
    ("split", "config", "expected"),
    [
        (
            "test",
            None,
            "a file has no split `test`.\n"
            "Leave out `split`, or write `train`, which is the whole file.",
        ),
        ("train", "main", "a file has no configuration `main`.\nLeave out `config`."),
    ],
)
def test_a_bare_file_has_neither_splits_nor_configurations(tmp_path, api, split, config, expected):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(ROWS))

    assert message(api, path, config, split) == f"{path}: {expected}"


def test_a_slice_of_a_file_is_a_slice(tmp_path, api):
    (tmp_path / "data.jsonl").write_bytes(lines(ROWS))

    assert load(api, tmp_path / "data.jsonl", split="train[:2]").rows([1]) == [ROWS[1]]


def test_an_empty_file_is_refused(tmp_path, api):
    path = tmp_path / "data.jsonl"
    path.touch()

    assert message(api, path) == f"{path}: the file is empty.\nWrite one row per line into it."


def test_a_file_with_blank_lines_only_is_refused(tmp_path, api):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n\n")

    assert message(api, path) == f"{path}: its files have no rows.\nUse another."


def test_a_broken_file_is_named_with_its_place(tmp_path, api):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(ROWS) + b"{oops\n")

    assert message(api, path) == (
        f"{path}: its rows could not be read (JSON parse error: Missing a name for object member. "
        "in row 5).\nRepair the file it names."
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "nothing.jsonl",
            "no such file or folder: looked for TMP/nothing.jsonl.\n"
            "Check the path; a repo is written owner/name.",
        ),
        (
            "notes.txt",
            "`.txt` files are not read as rows.\n"
            "Give a .jsonl, .json, .parquet, .csv file, a folder of them, or a dataset's repo.",
        ),
    ],
)
def test_paths_that_hold_no_rows_are_refused(tmp_path, api, name, expected):
    (tmp_path / "notes.txt").write_text("hello")

    told = expected.replace("TMP", str(tmp_path))
    assert message(api, tmp_path / name) == f"{tmp_path / name}: {told}"


def test_a_repo_gives_the_rows_of_its_pinned_commit(hub, api, push):
    sha = push("tests/sums", {"train.jsonl": lines(ROWS)}, repo_type="dataset")
    push("tests/sums", {"train.jsonl": lines(ROWS[:1])}, repo_type="dataset")

    assert load(api, "tests/sums", revision=sha).rows([4]) == [ROWS[4]]
    assert len(load(api, "tests/sums")) == 1


def test_rows_are_read_from_the_files_that_the_hub_lists(hub, api, push):
    others = [row | {"answer": "no"} for row in ROWS]
    sha = push("tests/sums", {"train.jsonl": lines(ROWS)}, repo_type="dataset")
    files = hub.store.find("datasets", "tests/sums").commits[sha].files
    true = files["train.jsonl"]
    stored = hub.store.blobs.add(lines(others))
    files["train.jsonl"] = replace(true, sha256=stored, size_bytes=len(lines(others)))
    said = "`train.jsonl` does not have the digest that"

    assert said in message(api, "tests/sums")
    commits = {("tests/sums", None): sha}
    with at_commits(commits), pytest.raises(SourceError, match=said):
        datasets.load_dataset("tests/sums", split="train", token=api.token)
    before = datasets.config.HF_DATASETS_CACHE
    with pytest.raises(SourceError, match=said), rows.at_commit("tests/sums", sha, token=api.token):
        datasets.load_dataset("tests/sums", revision=sha, token=api.token)
    assert before == datasets.config.HF_DATASETS_CACHE

    files["train.jsonl"] = true
    with rows.at_commit("tests/sums", sha, token=api.token):
        table = datasets.load_dataset("tests/sums", split="train", revision=sha, token=api.token)
    assert table.to_list() == ROWS
    assert load(api, "tests/sums").rows(range(5)) == ROWS
    with at_commits(commits):
        assert datasets.load_dataset("tests/sums", split="train", token=api.token)[4] == ROWS[4]


def test_no_other_host_is_told_the_name_of_a_dataset(api, push, monkeypatch):
    push("tests/secret", {"train.jsonl": b'{"text": "a"}\n'}, "dataset", private=True)
    asked, look_up = set(), socket.getaddrinfo

    def noted(host, *args, **options):
        asked.add(host)
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    source = resolve_dataset(api, "tests/secret")
    assert describe_dataset(api, source, None, "train").splits == ("train",)
    assert len(load_rows(api, source, None, "train")) == 1
    with at_commits({("tests/secret", None): source.commit_sha}):
        assert len(datasets.load_dataset("tests/secret", split="train", token=api.token)) == 1

    assert asked <= {"127.0.0.1"}


def test_a_commit_without_rows_never_gives_those_of_another(hub, api, push):
    push("tests/sums", {"train.jsonl": lines(ROWS)}, repo_type="dataset")
    assert len(load(api, "tests/sums")) == 5
    api.delete_file("train.jsonl", "tests/sums", repo_type="dataset")
    sha = push("tests/sums", {"notes.xyz": b"hi"}, repo_type="dataset")

    assert message(api, "tests/sums") == (
        f"tests/sums@{sha}: it has no readable data files, or one that it names is missing.\n"
        "Use one with .jsonl, .parquet or .csv files."
    )


def test_a_missing_configuration_or_split_lists_what_there_is(hub, api, push):
    files = {"README.md": CONFIGS, "easy.jsonl": lines(ROWS), "hard.jsonl": lines(ROWS[:2])}
    sha = push("tests/sums", files, repo_type="dataset")

    assert len(load(api, "tests/sums", "easy", "test")) == 2
    assert message(api, "tests/sums") == (
        f"tests/sums@{sha}: it has several configurations.\nSet `config` to one of easy, hard."
    )
    assert message(api, "tests/sums", "main") == (
        f"tests/sums@{sha}: it has no configuration `main`.\nIt has: easy, hard."
    )
    assert message(api, "tests/sums", "easy", "dev") == (
        f"tests/sums@{sha}: it has no split `dev`.\nIt has: train, test."
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "notes.xyz",
            "it has no readable data files, or one that it names is missing.\n"
            "Use one with .jsonl, .parquet or .csv files.",
        ),
        (
            "sums.py",
            "it is a loading script, and those are not run.\nLook on its page for a branch with "
            ".parquet files and write it after `@` (often `refs/convert/parquet`), or use another.",
        ),
    ],
)
def test_a_repo_without_data_files_is_refused(api, push, path, expected):
    sha = push("tests/sums", {path: b"print('hi')"}, repo_type="dataset")

    assert message(api, "tests/sums") == f"tests/sums@{sha}: {expected}"


def test_a_model_named_as_dataset_is_called_one(hub, api, push):
    push("tests/model", {"model.safetensors": b"w"})

    assert message(api, "tests/model") == (
        "tests/model: this is a model, not a dataset.\nName a dataset."
    )


@pytest.mark.parametrize(
    "path",
    ["https://example.com/a.jsonl", "hf://datasets/other/repo/a.jsonl", "zip://a::b.zip"]
    + ["../other/a.jsonl", "/etc/passwd", "C:/a.jsonl", "~/a.jsonl"],
)
def test_a_card_that_names_data_of_others_is_refused_before_anything_is_asked(hub, push, api, path):
    named = CONFIGS.replace(b"hard.jsonl}", path.encode() + b"}").replace(b": hard.jsonl", b": x")
    sha = push("tests/sums", {"README.md": named, "easy.jsonl": lines(ROWS)}, repo_type="dataset")
    expected = (
        f"tests/sums@{sha}: `README.md` names data that is not in it: {path}.\n"
        "Use a dataset that has its data itself."
    )

    assert message(api, "tests/sums", "easy") == expected
    with pytest.raises(SourceError) as raised:
        describe_dataset(api, resolve_dataset(api, "tests/sums", None), "easy", "train")
    assert str(raised.value) == expected


def test_a_card_with_a_bomb_never_reaches_datasets(tmp_path, api):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    for name, text in {"README.md": "---\n{}\n---\n", ".huggingface.yaml": "{}\n"}.items():
        (tmp_path / name).write_text(text.format("a: &a [*a]"))

        assert message(api, tmp_path) == (
            f"{tmp_path}: `{name}` cannot be read: the value of `&a` contains itself.\n"
            "Repair its card, or use another dataset."
        )
        (tmp_path / name).write_text("")


@pytest.mark.parametrize(
    "card",
    ["---\n{}\n--- ", "---\n{}\n---\t\n# Sums\n---\n", "---\r\n---\n{}\n---\n", " \n---\r{}\r---"],
)
def test_a_card_ends_where_datasets_ends_it(tmp_path, api, card):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    named = "configs: [{config_name: default, data_files: 'https://example.com/a.jsonl'}]"
    (tmp_path / "README.md").write_text(card.format(named), newline="")

    expected = "`README.md` names data that is not in it: https://example.com/a.jsonl"
    assert expected in message(api, tmp_path)


def test_a_card_is_read_by_the_parser_of_datasets(tmp_path, api):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    first, second = (f"configs: [{{data_files: '{one}'}}]" for one in ("/etc/passwd", "a.jsonl"))
    # a mark inside of a text is skipped by libyaml, and is part of a key for PyYAML
    card = f"---\na: 1\n{first}\n\ufeff{second}\n---\n"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")

    expected = "`README.md` names data that is not in it: /etc/passwd"
    assert expected in message(api, tmp_path)


def test_a_parquet_file_of_equal_rows_is_read_in_pieces_and_up_to_a_limit(
    tmp_path, api, monkeypatch
):
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int8()), ["x" * 100])
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet", store_schema=False)
    source = resolve_dataset(api, str(tmp_path / "rows.parquet"))
    assert source.files[0].size_bytes < 10_000

    monkeypatch.setattr(rows, "MAX_SMALL_BYTES", 1 << 20)
    with pytest.raises(SourceError) as raised:
        load_rows(api, source, None, "train")
    assert str(raised.value) == (
        f"{source.name}: its rows could not be read (its rows have over 200 times the bytes of "
        "the file).\nRepair the file it names."
    )
    monkeypatch.setattr(rows, "MAX_SMALL_BYTES", 1 << 30)
    found = load_rows(api, source, None, "train")
    assert len(found) == 200_000
    assert {len(column) for column in found.table.data.column("text").chunks} == {1000}


@pytest.mark.parametrize("kind", [pa.null(), pa.bool_()])
def test_lists_of_values_without_a_byte_are_read_up_to_a_limit(tmp_path, api, kind):
    """50 million of them, in 767 bytes, took 6 GB where they were scored."""

    def write(n):
        values = pa.nulls(n) if kind == pa.null() else pa.array([False]).take(pa.array([0] * n))
        lists = pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), values)
        pq.write_table(pa.table({"text": ["a"], "x": lists}), tmp_path / "rows.parquet")

    write(11_000_000)
    assert message(api, tmp_path) == (
        f"{tmp_path}: its rows could not be read (its rows have over 200 times the bytes of the "
        "file).\nRepair the file it names."
    )
    write(100_000)
    assert len(load_rows(api, resolve_dataset(api, str(tmp_path)), None, "train")) == 1


def test_values_are_counted_in_lists_mappings_and_json():
    columns = {  # name -> a column, and the bytes of its values
        "lists": (pa.array([[[1, 2], [3]], [[4]]]), 32 * (3 + 4)),
        "nulls": (pa.array([[None] * 10, None], pa.list_(pa.null())), 100 * 10),
        "fixed": (pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), 32 * 2),
        "truth values": (pa.array([[True], [False, True]], pa.large_list(pa.bool_())), 100 * 3),
        "mappings": (pa.array([{"x": [1, 2]}, {"x": None}]), 32 * (2 + 2)),
        "text": (pa.array(["[[], [], {}]", None]), 32 * (3 + 2 + 1)),
        "json": (pa.array(["[1, 2]"], pa.json_()), 32 * 2),
        "words": (pa.array(["a", "b"]), 0),
    }

    for column, n_bytes in columns.values():
        assert rows.inner_bytes(pa.table({"x": column}), 10_000) == n_bytes
    assert (
        0
        < rows.inner_bytes(pa.table({"x": columns["nulls"][0], "y": columns["nulls"][0]}), 5)
        < 2000
    )


@pytest.mark.parametrize("kind", [pa.json_(), pa.string()])
def test_json_in_a_column_is_read_up_to_a_limit(tmp_path, api, monkeypatch, kind):
    """Empty lists in 6 kB became 6 GB where they were scored."""
    monkeypatch.setattr(rows, "MAX_SMALL_BYTES", 100_000_000)
    (tmp_path / "README.md").write_text(
        "---\ndataset_info: {features: [{name: x, dtype: json}]}\n---\n"
    )
    column = pa.array(["[" + "[]," * 1_800_000 + "[]]"]).cast(kind)
    pq.write_table(pa.table({"x": column}), tmp_path / "rows.parquet", compression="zstd")

    assert "its rows have over 200 times the bytes of the file" in message(api, tmp_path)


def test_a_time_in_an_unknown_zone_is_one_message(tmp_path, api):
    """It was a traceback, in a merge of several steps after the first one."""
    zone = pa.timestamp("us", tz="No/Where")
    times = pa.Array.from_buffers(zone, 2, [None, pa.py_buffer(bytes(16))])
    pq.write_table(pa.table({"text": ["a", "b"], "time": times}), tmp_path / "rows.parquet")
    found = load_rows(api, resolve_dataset(api, str(tmp_path)), None, "train")

    with pytest.raises(SourceError, match="its rows could not be read .'No/Where'"):
        found.rows([0])


def test_padded_tokens_are_read(tmp_path, api):
    tokens = [[*range(i % 50), *[0] * (128 - i % 50)] for i in range(50)]
    mask = [[int(token > 0) for token in one] for one in tokens]
    table = pa.table({"input_ids": tokens * 1000, "attention_mask": mask * 1000})
    pq.write_table(table, tmp_path / "rows.parquet")

    assert len(load_rows(api, resolve_dataset(api, str(tmp_path)), None, "train")) == 50_000


def test_rows_of_very_many_empty_columns_are_read_up_to_a_limit(tmp_path, api, monkeypatch):
    monkeypatch.setattr(rows, "MAX_SMALL_BYTES", 10_000_000)
    monkeypatch.setattr(rows, "MAX_EXPANSION", 1)
    pq.write_table(pa.table({f"c{i}": pa.nulls(7000) for i in range(100)}), tmp_path / "a.parquet")

    assert "its rows have over 1 times the bytes of the file" in message(api, tmp_path)
    monkeypatch.setattr(rows, "MAX_SMALL_BYTES", 12_000_000)
    assert len(load_rows(api, resolve_dataset(api, str(tmp_path)), None, "train")) == 7000


def test_compressed_arrow_is_read_up_to_a_limit(tmp_path, api, monkeypatch):
    table = pa.table({"text": ["x" * 1000] * 1000})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(tmp_path / "train.arrow", table.schema, options=options) as out:
        for _ in range(10):
            out.write_table(table)
    assert (tmp_path / "train.arrow").stat().st_size < 40_000
    monkeypatch.setattr(rows, "MAX_SMALL_BYTES", 1 << 20)

    assert message(api, tmp_path) == (
        f"{tmp_path}: its rows could not be read (its rows have over 200 times the bytes of the "
        "file).\nRepair the file it names."
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit memory")
def test_rows_of_one_long_text_take_no_memory_without_a_limit(tmp_path, api, monkeypatch):
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["x" * (1 << 21)])
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet", store_schema=False)
    assert (tmp_path / "rows.parquet").stat().st_size < 200_000
    monkeypatch.setattr(rows, "MAX_MEMORY_BYTES", 1 << 30)

    before = resource.getrlimit(resource.RLIMIT_DATA)
    said = message(api, tmp_path / "rows.parquet")

    assert "its rows could not be read (realloc of size " in said
    assert said.endswith(
        "Reading them takes over 1 GiB of memory: use .jsonl or .parquet files with shorter rows."
    )
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize("kind", ["json", "csv"])
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit memory")
def test_a_file_that_takes_more_memory_than_the_limit_is_not_called_broken(
    kind, tmp_path, api, monkeypatch
):
    path = tmp_path / f"rows.{kind}"
    text = "x" * (1 << 20)
    many = [{"text": text} for _ in range(80)] if kind == "json" else [{"text": text * 80}]
    path.write_text(json.dumps(many) if kind == "json" else f"text\n{many[0]['text']}\n")
    monkeypatch.setattr(rows, "MAX_MEMORY_BYTES", 64 << 20)

    said = message(api, path)

    assert "its rows could not be read (" in said
    assert "()" not in said
    assert said.endswith("use .jsonl or .parquet files with shorter rows.")


@pytest.mark.parametrize(
    ("option", "value"),
    [("sep", "(a+)+$"), ("delimiter", ".*b"), ("thousands", "](a+)+$|[")],
)
def test_no_pattern_of_a_card_separates_a_table(tmp_path, api, option, value):
    (tmp_path / "train.csv").write_text("a,b\n" + 40 * "a" + "b\n")
    config = {"config_name": "default", "data_files": "train.csv", option: value}
    card = json.dumps({"configs": [{**config, "engine": "python"}]})
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")

    assert message(api, tmp_path) == (
        f"{tmp_path}: `README.md` sets `{option}` to a pattern: {value}.\n"
        "Use a dataset whose tables are separated by one letter."
    )


@pytest.mark.parametrize(
    ("separator", "between"), [("\t", "\t"), (r"\t", "\t"), (r"\s+", "  "), (";;", ";;")]
)
def test_a_card_may_separate_tables_by_other_letters(tmp_path, api, separator, between):
    (tmp_path / "train.csv").write_text(f"a{between}b\n1{between}2\n")
    config = {"config_name": "default", "data_files": "train.csv", "sep": separator}
    card = json.dumps({"configs": [{**config, "engine": "python"}]})
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")

    assert load(api, tmp_path).rows([0]) == [{"a": 1, "b": 2}]


def test_a_card_says_what_stands_in_its_tables(tmp_path, api):
    (tmp_path / "train.csv").write_text("1,\\N\n~,4\n")
    config = {"config_name": "default", "data_files": "train.csv", "header": None}
    config |= {"names": ["~a", "b::c"], "na_values": ["\\N", "~"], "description": "/x"}
    (tmp_path / "README.md").write_text(f"---\nconfigs: [{json.dumps(config)}]\n---\n")

    found = load(api, tmp_path)

    assert found.rows([0, 1]) == [{"~a": 1.0, "b::c": None}, {"~a": None, "b::c": 4.0}]
    config["data_files"] = [{"split": "train", "path": {"description": "/etc/passwd"}}]
    (tmp_path / "README.md").write_text(f"---\nconfigs: [{json.dumps(config)}]\n---\n")
    assert "`README.md` names data that is not in it: /etc/passwd" in message(api, tmp_path)


@pytest.mark.parametrize("pattern", [5 * "*a" + "b.jsonl", "**/**/**/a.jsonl"])
def test_a_card_names_files_by_few_wildcards(tmp_path, api, pattern):
    (tmp_path / f"{200 * 'a'}.jsonl").write_bytes(lines(ROWS))
    config = {"config_name": "default", "data_files": {"train": ["*.jsonl", pattern]}}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': [config]})}\n---\n")

    assert message(api, tmp_path) == (
        f"{tmp_path}: `README.md` names its data by too many wildcards: {pattern}.\n"
        "Use a dataset that names its files."
    )


def test_rows_of_another_commit_are_refused(hub, api, push):
    sha = push("tests/sums", {"train.jsonl": lines(ROWS)}, repo_type="dataset")
    source = resolve_dataset(api, "tests/sums")
    commits = hub.store.find("datasets", "tests/sums").commits
    other = push("tests/sums", {"train.jsonl": lines(ROWS[:1])}, repo_type="dataset")
    commits[sha] = commits[other]

    with pytest.raises(SourceError) as raised:
        load_rows(api, source, None, "train")
    assert f"`{other}/train.jsonl` is another file than" in str(raised.value)


def test_rows_of_files_that_were_not_listed_are_not_read(hub, api, push):
    sha = push("tests/sums", {"train-0.jsonl": lines(ROWS)}, repo_type="dataset")
    source = resolve_dataset(api, "tests/sums")
    files = hub.store.find("datasets", "tests/sums").commits[sha].files
    files["train-1.jsonl"] = files["train-0.jsonl"]

    assert load_rows(api, source, None, "train").rows(range(5)) == ROWS
    assert len(load_rows(api, source, None, "train")) == 5


def test_a_revision_of_a_dataset_may_have_slashes(api, push):
    push("me/rows", {"train.jsonl": b'{"a": 1}\n'}, "dataset")
    api.create_branch("me/rows", branch="convert/parquet", repo_type="dataset")
    found = resolve_dataset(api, "me/rows", "convert/parquet")
    assert found.revision == "convert/parquet"
    assert len(load_rows(api, found, None, "train")) == 1


@pytest.mark.parametrize(
    ("name", "reader"),
    [("train.h5", "hdf5"), ("train.tar", "webdataset")],
)
def test_files_that_are_no_tables_are_not_opened(api, push, name, reader):
    push("me/rows", {name: b"no table"}, "dataset")
    with pytest.raises(SourceError) as raised:
        load_rows(api, resolve_dataset(api, "me/rows"), None, "train")
    assert f"its rows could not be read (they are read by `{reader}`; tables are read by " in str(
        raised.value
    )


@pytest.mark.parametrize(
    ("name", "content", "card"),
    [
        ("train.jsonl", b'{"a":' * 2000 + b"1" + b"}" * 2000, {}),
        ("train.jsonl.gz", b"\x1f\x8b", {}),
        ("train.jsonl.zip", b"PK", {}),
        ("train.jsonl", b"{}", {"configs": [{"config_name": 5, "data_files": "train.jsonl"}]}),
        ("train.jsonl", b"{}", {"configs": [{"data_files": [{"split": "train", "path": [[]]}]}]}),
        ("train.jsonl", b"{}", {"dataset_info": {"features": 5}}),
        ("dataset_infos.json", b'{"default": 5}', {}),
    ],
)
def test_what_datasets_cannot_read_is_one_message(tmp_path, api, name, content, card):
    (tmp_path / "test.jsonl").write_bytes(lines(ROWS))
    (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")

    assert message(api, tmp_path).startswith(f"{tmp_path}: its rows could not be read (")


def test_programs_that_use_datasets_themselves_are_not_limited(tmp_path, api):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    load_rows(api, resolve_dataset(api, str(tmp_path / "rows.jsonl")), None, "train")
    made = datasets.Dataset.from_generator(lambda: iter([{"a": 1}]), cache_dir=str(tmp_path))
    assert made.to_list() == [{"a": 1}]


def test_json_has_not_far_more_columns_in_its_rows_than_in_its_file(tmp_path, api, monkeypatch):
    """In 10 MB a row of 280 names and three million empty ones took 4 GB."""
    named = json.dumps({f"column{i}": i for i in range(300)}).encode()
    content = named + b"\n{}" * 20_000
    monkeypatch.setattr(rows, "MAX_SMALL_BYTES", 1 << 20)
    expected = (
        f"{tmp_path}: its rows could not be read (its rows have over 200 times the bytes of the "
        "file).\nRepair the file it names."
    )
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert message(api, tmp_path) == expected
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content))
    assert message(api, tmp_path) == expected


def test_a_table_is_read_in_limited_time(tmp_path, api, monkeypatch):
    """With 3,200 columns of mixed types it took three minutes, with 32,000 a day."""
    names = [f"column{i}" for i in range(2000)]
    mixed = [dict.fromkeys(names, "a"), dict.fromkeys(names, 1)]
    (tmp_path / "rows.jsonl").write_bytes(lines(mixed))
    monkeypatch.setattr(rows, "MAX_TABLE_S", 0.5)

    assert message(api, tmp_path) == (
        f"{tmp_path}: its rows could not be read (it takes more than 0.5 s for one of its tables)."
        "\nRepair the file it names."
    )


def test_an_encoding_that_takes_quadratic_time_is_stopped(tmp_path, api, monkeypatch):
    card = "---\nconfigs: [{config_name: x, data_files: a.jsonl, encoding: punycode}]\n---\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "a.jsonl").write_bytes(b"x-" + b"a" * 1_000_000)
    monkeypatch.setattr(rows, "MAX_TABLE_S", 0.5)

    assert "it takes more than 0.5 s for one of its tables" in message(api, tmp_path, "x")


DEEP = 20_000


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1}\n' * 3 + b" null null\n", "a row is null"),
        (b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}\n", "JSON has more than 1,000 levels"),
        (b'{"a": "\n' + b"[" * DEEP + b"\n", "JSON has more than 1,000 levels"),
        (b'{"a": "\r' + b"[" * DEEP + b"\n", "JSON has more than 1,000 levels"),
        (b"]" * DEEP + b"\n" + b"[" * DEEP + b"\n", "JSON has more than 1,000 levels"),
        (b'{"a": 1}\rnull\r', "a row is null"),
        (b'{"a": 1}\n\xef\xbb\xbf null\n', "a row is null"),
    ],
)
def test_json_that_ends_the_process_in_arrow_is_refused(tmp_path, api, content, problem):
    (tmp_path / "rows.jsonl").write_bytes(content)

    assert message(api, tmp_path) == (
        f"{tmp_path}: its rows could not be read ({problem}).\nRepair the file it names."
    )


@pytest.mark.parametrize(
    "content", [b'"' + b'\\"' * 1_000_000, b"\n" * 1_000_000, b"{" + b'"' * 1_000_000]
)
def test_json_that_is_broken_is_looked_through_in_linear_time(tmp_path, api, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    began = time.process_time()

    message(api, tmp_path)

    assert time.process_time() - began < 20


@pytest.mark.parametrize("n_values", [3, 30_000])
def test_a_null_on_a_line_of_a_row_is_a_value_of_it(tmp_path, api, n_values):
    """It was read as a table of columns if one of its lists had a null, else as one row."""
    row = {"a": ["x", *[None] * n_values, "y"]}
    (tmp_path / "rows.json").write_text(json.dumps(row, indent=1))

    assert load(api, tmp_path).rows([0]) == [row]


def test_arrays_may_have_as_many_rows_as_they_want(tmp_path, api):
    array = datasets.Array2D((None, 2), "int32")
    found = {"a": [[[1, 2]], [[3, 4], [5, 6]]]}
    table = datasets.Dataset.from_dict(found, features=datasets.Features({"a": array}))
    table.to_parquet(tmp_path / "rows.parquet")

    assert load(api, tmp_path).rows([0, 1]) == [{"a": each} for each in found["a"]]


def test_a_file_of_null_has_no_rows(tmp_path, api):
    (tmp_path / "rows.jsonl").write_bytes(b"null\n")

    assert message(api, tmp_path) == f"{tmp_path}: its files have no rows.\nUse another."


def test_brackets_in_texts_are_no_levels(tmp_path, api):
    rows_of = [{"a": '"[{' * 2000 + "\\"}, {"a": "null"}, {"a": None}]
    (tmp_path / "rows.jsonl").write_bytes(lines(rows_of))

    assert [dict(row) for row in load(api, tmp_path).rows([0, 1, 2])] == rows_of


IMAGES = """---
dataset_info:
  features: [{name: text, dtype: string}, {name: pages, list: image}]
---
"""


def test_items_of_a_task_open_nothing_that_a_row_names(tmp_path, monkeypatch):
    """An image of a row was opened where the row says: in any file, at any host."""
    (tmp_path / "README.md").write_text(IMAGES)
    (tmp_path / "test.jsonl").write_bytes(lines([{"text": "a", "pages": ["/etc/passwd"]}]))
    opened = []
    monkeypatch.setattr("PIL.Image.open", lambda path, *_: opened.append(path))

    with at_commits({}):
        table = datasets.load_dataset(str(tmp_path), split="test")

    assert list(table) == [{"text": "a", "pages": [{"bytes": None, "path": "/etc/passwd"}]}]
    assert opened == []


def test_columns_of_json_are_decoded(tmp_path):
    mixed = [{"q": {"a": 1}}, {"q": {"a": "b"}}]
    (tmp_path / "test.jsonl").write_bytes(lines(mixed))

    with at_commits({}):
        assert list(datasets.load_dataset(str(tmp_path), split="test")) == mixed


def test_what_a_task_wants_to_stream_is_read_whole(tmp_path):
    """A bundled task streams; nothing would compare digests, and any reader would be used."""
    (tmp_path / "test.jsonl").write_bytes(lines(ROWS))
    with at_commits({}):
        table = datasets.load_dataset(str(tmp_path), split="test", streaming=True)
    assert isinstance(table, datasets.Dataset)
    assert list(table) == ROWS

    with rows.only_tables(), pytest.raises(ValueError, match="they would be read while they come"):
        datasets.load_dataset(str(tmp_path), split="test", streaming=True)


ARRAYS = """---
dataset_info:
  features: [{name: text, dtype: {array2_d: {shape: SHAPE, dtype: float64}}}]
---
"""


def test_an_array_of_a_card_has_no_endless_shape(tmp_path, api):
    """A row that is null became all values of its shape, 3 GB each."""
    (tmp_path / "rows.jsonl").write_bytes(lines([{"text": None}, {"text": [[1.0]]}]))
    (tmp_path / "README.md").write_text(ARRAYS.replace("SHAPE", "[20000, 20000]"))
    assert message(api, tmp_path) == (
        f"{tmp_path}: its rows could not be read (an array has 400,000,000 values, the limit is "
        "100,000).\nRepair the file it names."
    )

    (tmp_path / "README.md").write_text(ARRAYS.replace("SHAPE", "[2, 2]"))
    found = load(api, tmp_path)
    with pytest.raises(SourceError) as raised:
        found.rows([1])
    assert str(raised.value).startswith(f"{tmp_path}: its rows could not be read (cannot reshape")


CARD = """---
configs: [{config_name: default, data_files: [{split: train, path: %s}]}]
---
"""


@pytest.mark.parametrize("named", [".kept/rows.txt", ".kept/*.txt", "rows.txt"])
def test_a_folder_gives_only_the_files_that_are_pinned(named, tmp_path, api):
    """Rows were read from any file, through a link in a hidden folder or beside a task."""
    secret, folder = tmp_path / "secret.txt", tmp_path / "data"
    secret.write_text("hunter2")
    (folder / ".kept").mkdir(parents=True)
    (folder / named.replace("*", "rows")).symlink_to(secret)
    (folder / "README.md").write_text(CARD % named)

    with at_commits({}), pytest.raises(SourceError):
        datasets.load_dataset(str(folder), split="train")
    assert "hidden" in message(api, folder) or "outside of the folder" in message(api, folder)


def test_a_folder_behind_a_link_gives_the_files_that_a_task_names(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "link").symlink_to(tmp_path / "data")

    with at_commits({}):
        table = datasets.load_dataset(
            str(tmp_path / "link"), data_files="rows.jsonl", split="train"
        )

    assert len(table) == len(ROWS)


@pytest.mark.parametrize("name", ["runs[12].jsonl", "runs[12]/train.jsonl", "run*/train.jsonl"])
def test_a_path_that_is_a_pattern_of_others_is_refused(name, tmp_path, api):
    """`runs1.jsonl` was read, and the digest of `runs[12].jsonl` was in the lock."""
    other = name.replace("[12]", "1").replace("*", "1")
    for one, content in ((name, ROWS), (other, ROWS[:1])):
        (tmp_path / one).parent.mkdir(exist_ok=True)
        (tmp_path / one).write_bytes(lines(content))

    asked = tmp_path / name.partition("/")[0]
    assert "which `datasets` takes for a pattern" in message(api, asked)


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_is_a_file_of_its_folder(card, tmp_path, api):
    """`datasets` read whatever a link names, such as /dev/zero, without end."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "data" / card).symlink_to("/dev/zero")
    (tmp_path / "tasks").mkdir()
    task = f"task: own\ndataset_path: {tmp_path / 'data'}\ntest_split: train\n"
    (tmp_path / "tasks" / "own.yaml").write_text(task)

    expected = f"`{card}` is a link to outside of the folder"
    assert expected in message(api, tmp_path / "data")
    with pytest.raises(SourceError, match=expected):
        scored_sources(api, TaskSelection(("own",), tmp_path / "tasks"))
