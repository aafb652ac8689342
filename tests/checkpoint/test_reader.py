import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from lewis_hub.checkpoint import reader
from lewis_hub.checkpoint.reader import TensorReader, local_checkpoint, read_headers, read_tensor
from lewis_hub.errors import BrokenCheckpointError

LABEL = "me/model@abc"
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}


def file(entries, data=12, header=None):
    text = json.dumps(entries).encode() if header is None else header
    return struct.pack("<Q", len(text)) + text + bytes(data)


def read(files, index=None):
    files = files if isinstance(files, dict) else {"model.safetensors": files}
    sizes = {path: len(content) for path, content in files.items()}
    encoded = json.dumps(index).encode() if isinstance(index, dict) else index
    return read_headers(LABEL, sizes, lambda path, a, b: files[path][a:b], encoded)


def problem(files, index=None):
    with pytest.raises(BrokenCheckpointError) as caught:
        read(files, index)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


def test_tensors_come_in_the_order_of_their_bytes_with_offsets_from_the_files_start():
    content = file({"b": B, "__metadata__": {"format": "pt"}, "a": A})

    checkpoint = read(content)

    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.tensors["b"].start == len(content) - 4
    assert checkpoint.tensors["a"].n_elements == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x01", "it has 1 bytes, too few for a safetensors header"),
        (struct.pack("<Q", 10**9), "its header claims 1,000,000,000 bytes; at most 100,000,000"),
        (file({"a": A})[:30], "it is truncated: the header ends at"),
        (file({"a": A, "b": B}, data=10), "it is truncated: `b` ends at byte"),
        (file({}, 0, header=b"not json"), "its header is not JSON"),
        (file({}, 0, header=b"\xff\xfe"), "its header is not JSON"),
        (file({}, 0, header=b"[" * 100_000), "its header is not JSON"),
        (file({}, 0, header=b"[" + b"[]," * 3_000_000), "its header has 6,000,001 values; at most"),
        (file({}, 0, header=b"[]"), "its header is not a JSON object"),
        (file({}, 0, header=b'{"a": 1, "a": 2}'), "its header names `a` twice"),
        (
            file({"__metadata__": {"n": 1}}, 0),
            "its `__metadata__` is not a mapping from strings to strings",
        ),
        (
            file({"a": 1}),
            "the entry of `a` must have exactly the keys dtype, shape and data_offsets",
        ),
        (file({"a": {**A, "more": 1}}), "the entry of `a` must have exactly the keys dtype"),
        (file({"a": {**A, "dtype": "F31"}}), "`a` has the unknown dtype 'F31'; known are BOOL"),
        (file({"a": {**A, "dtype": ["F32"]}}), "`a` has the unknown dtype ['F32']"),
        (file({"a": {**A, "shape": [-2]}}), "`a` has the shape [-2], which is not a list of sizes"),
        (file({"a": {**A, "shape": [True]}}), "`a` has the shape [True]"),
        (
            file({"a": {**A, "shape": [1] * 65}}),
            f"`a` has the shape [{'1, ' * 33} and so on, which is not a list of sizes",
        ),
        (file({"a": {**A, "data_offsets": [8, 0]}}), "data_offsets [8, 0], expected [start, stop]"),
        (file({"a": {**A, "data_offsets": [0]}}), "data_offsets [0], expected [start, stop]"),
        (file({"a": {**A, "shape": [3]}}), "`a` is F32 of shape [3], 12 bytes, but its data_off"),
        (file({"a": {**A, "shape": [2**62, 2**62]}}), "but its data_offsets span 8"),
        (file({"a": A, "b": {**B, "data_offsets": [4, 8]}}, 8), "`b` overlaps `a`"),
        (file({"b": B}), "8 bytes between the header and `b` belong to no tensor"),
        (file({"a": A}), "4 bytes after `a` belong to no tensor"),
        (file({"a\nb": A}, 8), "its header names a tensor 'a\\nb', which cannot be printed"),
    ],
)
def test_a_hostile_file_is_refused_by_its_own_message(content, says):
    message = problem(content)

    assert message.startswith("me/model@abc: model.safetensors: ")
    assert says in message
    assert message.endswith("use an intact copy.")


ONE = file({"a": A}, 8)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (b"{", "it is not JSON"),
        (b"[" + b"[]," * 2_000_001, "it has 4,000,003 values, the limit is 4,000,000"),
        (b"[" * 101 + b"]" * 101, "its values are in each other more than 100 deep"),
        ({}, "it has no `weight_map` from tensors to shards"),
        ({"weight_map": {}}, "it has no `weight_map`"),
        (
            {"weight_map": {"a": "../x.safetensors"}},
            "'../x.safetensors', which is not a plain .safetensors file",
        ),
        ({"weight_map": {"a": "sub/x.safetensors"}}, "which is not a plain .safetensors file name"),
        (
            {"weight_map": {"a": "sub\\x.safetensors"}},
            "which is not a plain .safetensors file name",
        ),
        ({"weight_map": {"a": ".x.safetensors"}}, "which is not a plain .safetensors file name"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "'pytorch_model.bin', which is not a plain"),
        ({"weight_map": {"a": 1}}, "it maps `a` to 1, which is not a plain .safetensors file name"),
        (
            {"weight_map": {"a": "2.safetensors"}},
            "names the shard `2.safetensors`, which does not exist",
        ),
        ({"weight_map": {"z": "1.safetensors"}}, "`z` to `1.safetensors`, which does not contain"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index, says):
    message = problem({"1.safetensors": ONE}, index)

    assert message.startswith("me/model@abc: model.safetensors.index.json: ")
    assert says in message


def test_the_index_says_which_of_two_copies_counts():
    files = {"1.safetensors": file({"a": A, "b": B}), "2.safetensors": ONE}

    found = read(files, {"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}})

    assert {name: tensor.shard for name, tensor in found.tensors.items()} == {
        "b": "1.safetensors",
        "a": "2.safetensors",
    }


@pytest.mark.parametrize("shard", ["1.safetensors", "model.safetensors", "gone.safetensors"])
def test_an_index_beside_a_whole_file_does_not_count(shard):
    files = {"model.safetensors": file({"a": A, "b": B}), "1.safetensors": ONE}

    found = read(files, {"weight_map": {"a": shard}})

    shards = {name: tensor.shard for name, tensor in found.tensors.items()}
    assert shards == {"a": "model.safetensors", "b": "model.safetensors"}


def test_two_copies_that_the_index_does_not_tell_apart_are_refused():
    two = {"1.safetensors": file({"a": A, "b": B}), "2.safetensors": file({"a": A, "c": B})}
    index = {"weight_map": {"b": "1.safetensors", "c": "2.safetensors"}}

    assert "`a` is in both `1.safetensors` and `2.safetensors`" in problem(two, index)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("MAX_TENSORS", "its files have more than 1,000 tensors"),
        ("MAX_LETTERS", "the names of its tensors have more than 1,000 letters"),
    ],
)
def test_a_model_of_more_tensors_than_any_is_refused_before_all_its_headers_are_read(
    limit, says, monkeypatch
):
    """Each header has a limit, but a model may have any number of files."""
    monkeypatch.setattr(reader, limit, 1000)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    files = {
        f"{k}.safetensors": file({f"{k}.{i}": empty for i in range(100)}, 0) for k in range(100)
    }
    index = {"weight_map": {f"{k}.0": f"{k}.safetensors" for k in range(100)}}
    sizes, asked = {path: len(content) for path, content in files.items()}, []

    def counted(path, start, stop):
        asked.append(path)
        return files[path][start:stop]

    with pytest.raises(BrokenCheckpointError) as caught:
        read_headers(LABEL, sizes, counted, json.dumps(index).encode())

    assert str(caught.value) == f"{LABEL}: {says}.\nUse an intact copy."
    assert len(asked) < 30


def test_shards_without_an_index_are_refused():
    message = problem({"1.safetensors": ONE, "2.safetensors": ONE})

    assert "has neither model.safetensors nor model.safetensors.index.json" in message
    assert "found: 1.safetensors, 2.safetensors" in message


def test_a_file_that_is_empty_when_it_is_read_is_told():
    with pytest.raises(BrokenCheckpointError, match="another process truncated it while it was re"):
        read_headers(LABEL, {"model.safetensors": 100}, lambda *_: b"", None)


def test_a_long_header_takes_a_second_request():
    asked = []
    content = file({"__metadata__": {"note": "a" * 70_000}, "a": A}, 8)

    def counted(path, start, stop):
        asked.append((start, stop))
        return content[start:stop]

    read_headers(LABEL, {"model.safetensors": len(content)}, counted, None)

    assert asked == [(0, 65536), (65536, len(content) - 8)]


def test_a_reader_reads_pieces_and_whole_tensors(tmp_path):
    values = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    save_file({"a": values, "empty": torch.zeros(0, 2)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    checkpoint = read(content)
    into = bytearray(4)

    with TensorReader(tmp_path, LABEL) as reader:
        reader.read(checkpoint.tensors["a"], 2, memoryview(into))
        whole = read_tensor(reader, checkpoint.tensors["a"])
        empty = read_tensor(reader, checkpoint.tensors["empty"])

    assert torch.frombuffer(into, dtype=torch.bfloat16).tolist() == [1.0, 2.0]
    assert whole.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert whole.dtype == torch.float32
    assert empty.shape == (0, 2)


def test_a_file_that_shrank_or_went_since_it_was_checked_is_told(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file({"a": A}, 8))
    tensor = read(path.read_bytes()).tensors["a"]
    path.write_bytes(path.read_bytes()[:-2])

    into = memoryview(bytearray(8))

    with TensorReader(tmp_path, LABEL) as reader, pytest.raises(BrokenCheckpointError) as shrank:
        reader.read(tensor, 0, into)
    path.unlink()
    with TensorReader(tmp_path, LABEL) as reader, pytest.raises(BrokenCheckpointError) as went:
        reader.read(tensor, 0, into)
    path.mkdir()  # which can be opened, but not read
    with TensorReader(tmp_path, LABEL) as reader, pytest.raises(BrokenCheckpointError) as failed:
        reader.read(tensor, 0, into)

    assert "model.safetensors: it ends inside `a`.\nThe file changed after" in str(shrank.value)
    assert "model.safetensors: it cannot be read: No such file" in str(went.value)
    assert "model.safetensors: it cannot be read: Is a directory" in str(failed.value)


def test_whole_numbers_of_all_widths_are_read_and_what_torch_lacks_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for dtype, width in {"U16": 2, "U32": 4, "U64": 8, "C64": 8, "F8_E8M0": 1}.items():
        entry = {"dtype": dtype, "shape": [1], "data_offsets": [0, width]}
        path.write_bytes(file({"a": entry}, width))
        tensor = read(path.read_bytes()).tensors["a"]
        with TensorReader(tmp_path, LABEL) as reader:
            if dtype.startswith("U"):
                assert read_tensor(reader, tensor).dtype == torch.float32
            else:
                with pytest.raises(BrokenCheckpointError, match=f"`a` is {dtype}, which this"):
                    read_tensor(reader, tensor)


@pytest.mark.parametrize("becomes", ["nothing", "a folder"])
def test_a_local_file_that_is_gone_when_its_header_is_read_is_told(tmp_path, monkeypatch, becomes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(ONE)
    header = reader.read_header

    def read_late(*args):
        path.unlink()
        if becomes == "a folder":
            path.mkdir()
        return header(*args)

    monkeypatch.setattr(reader, "read_header", read_late)
    with pytest.raises(BrokenCheckpointError) as caught:
        local_checkpoint("me", tmp_path)

    said = {"nothing": "No such file or directory", "a folder": "Is a directory"}[becomes]
    assert str(caught.value) == (
        f"me: model.safetensors: it cannot be read: {said}.\n"
        "The file changed after it was checked: restore it, then run again."
    )
