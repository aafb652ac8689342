from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
from huggingface_hub import HfApi, HfFileSystem, snapshot_download
from huggingface_hub.utils import httpx

WEIGHTS = bytes(range(256)) * 8


def get(hub, path: str, **headers: str) -> httpx.Response:
    return httpx.get(hub.url + path, headers=headers, follow_redirects=True)


def test_a_small_file_answers_with_gits_digest_and_the_commit(hub, push):
    sha = push("acme/base", {"config.json": b"{}"})

    head = httpx.head(f"{hub.url}/acme/base/resolve/main/config.json")

    assert head.status_code == 200
    assert head.headers["ETag"] == '"9e26dfeeb6e641a33dae4961196235bdb965b21b"'
    assert head.headers["X-Repo-Commit"] == sha
    assert head.headers["Content-Length"] == "2"
    assert head.content == b""


def test_a_large_file_answers_with_where_its_bytes_are(hub, push):
    sha = push("acme/base", {"model.safetensors": WEIGHTS})

    head = httpx.head(f"{hub.url}/acme/base/resolve/main/model.safetensors")
    bytes_there = httpx.get(head.headers["Location"])

    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert head.status_code == 302
    assert head.headers["X-Linked-Etag"] == f'"{digest}"'
    assert head.headers["X-Linked-Size"] == "2048"
    assert head.headers["X-Repo-Commit"] == sha
    assert head.headers["Location"].startswith("http://127.0.0.2:")
    assert bytes_there.content == WEIGHTS


def test_a_large_file_of_a_private_repository_is_read_only_by_who_may_read_the_repository(
    hub, push
):
    push("acme/secret", {"model.safetensors": WEIGHTS}, private=True)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    address = f"{hub.storage_url}/lfs/{digest}/model.safetensors"
    path = "/acme/secret/resolve/main/model.safetensors"

    guessed = [httpx.get(address + query).status_code for query in ("", "?signature=00")]
    anonymous = get(hub, path)
    owner = get(hub, path, Authorization=f"Bearer {hub.read_token}")

    assert guessed == [403, 403]
    assert anonymous.status_code == 401
    assert owner.content == WEIGHTS


@pytest.mark.parametrize("path", ["model.safetensors", "notes.txt"])
def test_a_range_gives_just_those_bytes(hub, push, path):
    content = b"0123456789" * 10
    push("acme/base", {path: content})

    middle = get(hub, f"/acme/base/resolve/main/{path}", Range="bytes=15-24")
    end = get(hub, f"/acme/base/resolve/main/{path}", Range="bytes=-5")
    beyond = get(hub, f"/acme/base/resolve/main/{path}", Range="bytes=100-")

    assert (middle.status_code, middle.content) == (206, b"5678901234")
    assert middle.headers["Content-Range"] == "bytes 15-24/100"
    assert (end.status_code, end.content) == (206, b"56789")
    assert beyond.status_code == 416


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/acme/base/resolve/main/nothing.txt", "EntryNotFound"),
        ("/acme/base/resolve/nowhere/a.txt", "RevisionNotFound"),
        ("/acme/nothing/resolve/main/a.txt", "RepoNotFound"),
        ("/datasets/acme/base/resolve/main/a.txt", "RepoNotFound"),
    ],
)
def test_what_is_missing_is_named(hub, push, path, code):
    push("acme/base", {"a.txt": b"a"})

    answer = get(hub, path, Authorization=f"Bearer {hub.read_token}")

    assert answer.status_code == 404
    assert answer.headers["X-Error-Code"] == code
    assert answer.headers["X-Error-Message"] == answer.json()["error"]


def test_a_snapshot_is_the_repository_and_a_second_one_downloads_nothing(hub, push):
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "lewis/deep/a b#c.txt": b"odd"}
    push("acme/base", files)

    folder = Path(snapshot_download("acme/base"))
    hub.fail("/lfs/", 500, times=100)
    again = Path(snapshot_download("acme/base"))

    assert again == folder
    assert {path: (folder / path).read_bytes() for path in files} == files


def test_a_tree_has_folders(hub, api, push):
    push("acme/base", {"a.txt": b"a", "x/b.txt": b"b", "x/y/c.txt": b"c"})

    top = [item.path for item in api.list_repo_tree("acme/base")]
    below = [item.path for item in api.list_repo_tree("acme/base", "x")]
    everything = [item.path for item in api.list_repo_tree("acme/base", recursive=True)]

    assert top == [".gitattributes", "a.txt", "x"]
    assert below == ["x/b.txt", "x/y"]
    assert everything == [".gitattributes", "a.txt", "x", "x/b.txt", "x/y", "x/y/c.txt"]


def test_paths_are_looked_up_and_missing_ones_left_out(hub, api, push):
    push("acme/base", {"a.txt": b"a", "x/b.txt": b"b"})

    infos = api.get_paths_info("acme/base", ["a.txt", "x", "nothing"])

    assert [info.path for info in infos] == ["a.txt", "x"]


def test_the_file_system_view_reads_whole_files_and_pieces(hub, push):
    push("acme/base", {"model.safetensors": WEIGHTS, "x/a.txt": b"a"})
    view = HfFileSystem(endpoint=hub.url, token=hub.read_token)

    with view.open("acme/base/model.safetensors", "rb") as file:
        file.seek(300)
        piece = file.read(5)

    assert piece == WEIGHTS[300:305]
    assert view.read_bytes("acme/base/x/a.txt") == b"a"
    assert view.glob("acme/base/**/*.txt") == ["acme/base/x/a.txt"]


def test_safetensors_headers_are_read_without_the_weights(hub, api: HfApi, push):
    import torch
    from safetensors.torch import save

    push("acme/base", {"model.safetensors": save({"w": torch.zeros(3, 4)})})

    metadata = api.get_safetensors_metadata("acme/base")

    assert metadata.parameter_count == {"F32": 12}
    assert metadata.files_metadata["model.safetensors"].tensors["w"].shape == [3, 4]


def test_transformers_loads_a_model_and_its_tokenizer_and_pushes_it_back(hub, api, tmp_path):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")

    model.push_to_hub("acme/tiny", token=hub.write_token)
    tokenizer.push_to_hub("acme/tiny", token=hub.write_token)
    loaded = AutoModelForCausalLM.from_pretrained("acme/tiny")
    read = AutoTokenizer.from_pretrained("acme/tiny")

    tokens = torch.tensor([[1, 2]])
    assert read("two one").input_ids == [2, 1]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert "model.safetensors" in api.list_repo_files("acme/tiny")


def test_datasets_loads_jsonl_by_split(hub, push):
    from datasets import load_dataset

    push(
        "acme/sums",
        {
            "train.jsonl": b'{"q": "1+1", "a": 2}\n{"q": "1+2", "a": 3}\n',
            "test.jsonl": b'{"q": "2+2", "a": 4}\n',
        },
        repo_type="dataset",
    )

    loaded = load_dataset("acme/sums")

    assert loaded["train"][:] == {"q": ["1+1", "1+2"], "a": [2, 3]}
    assert loaded["test"][0] == {"q": "2+2", "a": 4}


def test_datasets_loads_a_configuration_of_parquet_at_a_commit(hub, push):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset

    def parquet(*values: int) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"a": list(values)}), buffer)
        return buffer.getvalue()

    card = b"""---
configs:
- config_name: main
  data_files: [{split: train, path: main/train-*.parquet}]
- config_name: hard
  data_files: [{split: train, path: hard/train-*.parquet}]
---
"""
    files = {"README.md": card, "main/train-0.parquet": parquet(1), "hard/train-0.parquet": b""}
    files["hard/train-0.parquet"] = parquet(2, 3)
    sha = push("acme/sums", files, repo_type="dataset")
    push("acme/sums", {"hard/train-0.parquet": parquet(9)}, repo_type="dataset")

    pinned = load_dataset("acme/sums", "hard", split="train", revision=sha)
    newest = load_dataset("acme/sums", "hard", split="train")

    assert pinned[:] == {"a": [2, 3]}
    assert newest[:] == {"a": [9]}
