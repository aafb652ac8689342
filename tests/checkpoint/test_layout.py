import json
import struct

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.checkpoint.writer import OutputTensor, index_document, lay_out

BYTES = OutputTensor("a", "F32", (3,))


def tensors(*sizes):
    return [OutputTensor(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 20))
def test_shards_are_those_of_huggingface_hub(sizes, limit):
    state = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )

    ours = lay_out(tensors(*sizes), limit)

    assert {s.name: [t.name for t in s.tensors] for s in ours} == theirs.filename_to_tensors


def test_a_tensor_above_the_limit_gets_its_own_shard_and_the_others_stay_together():
    shards = lay_out(tensors(2, 9, 2), 5)

    assert [[t.name for t in shard.tensors] for shard in shards] == [["t1"], ["t0", "t2"]]


def test_the_header_is_padded_and_tells_dtype_shape_and_offsets():
    (shard,) = lay_out([OutputTensor("half", "BF16", (3, 1)), BYTES], 100)

    (length,) = struct.unpack("<Q", shard.header[:8])
    entries = json.loads(shard.header[8:])

    assert length % 8 == 0
    assert len(shard.header) == 8 + length
    assert entries == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "half": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [12, 18]},
    }
    assert shard.starts == (8 + length, 20 + length)
    assert shard.n_bytes == 26 + length


def test_the_index_is_what_transformers_writes():
    shards = lay_out([OutputTensor("b", "BF16", (4,)), BYTES, OutputTensor("c", "F32", ())], 12)

    text = index_document(shards)

    assert (
        text
        == json.dumps(
            {
                "metadata": {"total_parameters": 8, "total_size": 24},
                "weight_map": {
                    "a": "model-00002-of-00003.safetensors",
                    "b": "model-00001-of-00003.safetensors",
                    "c": "model-00003-of-00003.safetensors",
                },
            },
            indent=2,
        )
        + "\n"
    )


@pytest.mark.parametrize("limit", [12, 10**9])
def test_a_single_shard_has_no_index(limit):
    shards = lay_out([BYTES], limit)

    assert [shard.name for shard in shards] == ["model.safetensors"]
    assert index_document(shards) is None
