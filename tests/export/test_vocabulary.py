"""Tokenizers as llama.cpp stores them."""

from __future__ import annotations

import json
from typing import Any

import pytest

import lewis_hub
from lewis_hub.errors import ExportError
from lewis_hub.export import pretokenizers
from lewis_hub.export.pretokenizers import pretokenizer_name
from lewis_hub.export.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_gguf_vocabulary,
)

BYTES = (lewis_hub.zoo_folder() / "base" / "tokenizer.json").read_bytes()


def added(number: int, content: str, *, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


PIECES: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        added(0, "<unk>"), added(1, "<s>"), added(9, "▁▁", special=False),
        added(10, "<|im_end|>", special=False),
    ],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": {
            "<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "▁a": 7, "▁ab": 8,
        },
        "merges": [["a", "b"], ["▁", "a"], ["▁", "ab"], ["▁a", "b"]],
    },
}  # fmt: skip


def vocabulary(document: Any, n_rows: int = 12, config: Any = None, **settings: Any):
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    files = {"tokenizer.json": text, "tokenizer_config.json": json.dumps(settings).encode()}
    return read_gguf_vocabulary("the model", files, n_rows, config or {})


def test_a_piece_has_the_rank_of_its_first_merge_as_its_score():
    found = vocabulary(PIECES, bos_token="<s>", unk_token={"content": "<unk>"})

    assert (found.model, found.pre, found.merges) == ("llama", "default", ())
    assert found.tokens == (
        *("<unk>", "<s>", "<0x0A>", "▁", "a", "b", "ab", "▁a", "▁ab"),
        *("  ", "<|im_end|>", "[PAD11]"),
    )
    assert found.types == (
        *(UNKNOWN, CONTROL, BYTE, NORMAL, NORMAL, NORMAL, NORMAL, NORMAL, NORMAL),
        *(USER_DEFINED, CONTROL, UNUSED),
    )
    assert found.scores[6:9] == (0.0, -1.0, -2.0)
    assert {*found.scores[:6], *found.scores[9:]} == {-10_004.0}
    assert found.ids == {"bos": 1, "unk": 0}
    assert found.space_first is True


def test_a_tokenizer_without_a_space_in_front_says_so():
    plain = PIECES | {"normalizer": PIECES["normalizer"]["normalizers"][1]}

    assert vocabulary(plain).space_first is False


@pytest.mark.parametrize(
    ("settings", "adds"),
    [
        ({}, {"bos": True}),
        ({"add_bos_token": False}, {"bos": False}),
        ({"eos_token": "<|im_end|>"}, {"bos": True, "eos": False}),
        ({"eos_token": "<|im_end|>", "add_eos_token": True}, {"bos": True, "eos": True}),
    ],
)
def test_the_tokens_at_the_ends_of_a_text_are_those_that_the_tokenizer_adds(settings, adds):
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    post = {
        "type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip

    found = vocabulary(PIECES | {"post_processor": post}, bos_token="<s>", **settings)

    assert found.adds == adds


def test_a_bpe_on_bytes_has_its_merges_and_the_ids_of_the_configuration():
    config = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}

    found = vocabulary(BYTES, 400, config, eos_token="<|end|>")

    document = json.loads(BYTES)
    assert (found.model, found.pre, found.scores) == ("gpt2", "gpt-2", ())
    merges = document["model"]["merges"]
    assert found.merges == tuple(m if isinstance(m, str) else " ".join(m) for m in merges)
    assert found.ids == {"bos": 1, "eos": 2, "pad": 0}
    assert found.adds == {"bos": False, "eos": False}
    assert found.types[:6] == (*[CONTROL] * 5, NORMAL)
    assert found.tokens[389:] == (found.tokens[389], *(f"[PAD{i}]" for i in range(390, 400)))


def split(regex: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("steps", "ignores_merges", "name"),
    [
        ([PLAIN | {"use_regex": True}], False, "gpt-2"),
        ([DIGITS, PLAIN | {"use_regex": True}], False, "smollm"),
        ([split(pretokenizers.LLAMA3), PLAIN], True, "llama-bpe"),
        ([split(pretokenizers.LLAMA3), PLAIN], False, "dbrx"),
        ([split(pretokenizers.QWEN2), PLAIN], False, "qwen2"),
        ([split(pretokenizers.TEKKEN), PLAIN], True, "tekken"),
        ([split(pretokenizers.GPT4O), PLAIN], False, "gpt-4o"),
        ([split(r"\p{N}"), PLAIN], False, None),
        ([PLAIN | {"add_prefix_space": True, "use_regex": True}], False, None),
        ([{"type": "Whitespace"}, PLAIN], False, None),
    ],
)
def test_a_pre_tokenizer_has_the_name_of_its_regular_expressions(steps, ignores_merges, name):
    model = {"ignore_merges": ignores_merges}
    sequence = {"type": "Sequence", "pretokenizers": steps}

    assert pretokenizer_name({"model": model, "pre_tokenizer": sequence}) == name
    if len(steps) == 1:
        assert pretokenizer_name({"model": model, "pre_tokenizer": steps[0]}) == name


def test_the_regular_expressions_are_those_that_the_models_are_published_with():
    assert pretokenizers.LLAMA3 == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert pretokenizers.LLAMA3.replace("{1,3}", "") == pretokenizers.QWEN2
    assert pretokenizers.TEKKEN == (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def with_model(**changes: Any) -> dict[str, Any]:
    return PIECES | {"model": PIECES["model"] | changes}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (with_model(byte_fallback=False), "no tokenizer like its tokenizer.json (BPE, Prepend"),
        (PIECES | {"normalizer": {"type": "Lowercase"}}, "tokenizer.json (BPE, Lowercase)"),
        (PIECES | {"pre_tokenizer": {"type": "Whitespace"}}, "Replace, Whitespace)"),
        (
            json.loads(BYTES) | {"normalizer": {"type": "NFKC"}},
            "no pre-tokenizer for its tokenizer.json",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(document, problem):
    with pytest.raises(ExportError) as raised:
        vocabulary(document, 400)

    assert problem in str(raised.value)


def test_a_tokenizer_with_more_tokens_than_rows_or_without_its_file_is_refused():
    with pytest.raises(ExportError, match="has 11 tokens, its embeddings have 8 rows"):
        vocabulary(PIECES, 8)
    with pytest.raises(ExportError, match="it has no tokenizer.json"):
        read_gguf_vocabulary("the model", {}, 8, {})


def test_the_steps_of_a_tokenizer_are_known_before_it_splits_a_text():
    document = json.loads(BYTES)
    fixed = {"strategy": {"Fixed": 2_000_000_000}, "direction": "Right", "pad_id": 0}
    fixed |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "<|pad|>"}
    slow = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    long = {"normalizer": {"type": "Prepend", "prepend": "a" * 30 + "!"}, "pre_tokenizer": slow}

    assert vocabulary(document | {"padding": fixed}, 400) == vocabulary(document, 400)
    with pytest.raises(ExportError, match="llama.cpp has no tokenizer like its tokenizer.json"):
        vocabulary(document | long, 400)
