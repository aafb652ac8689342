import json

import pytest
from tokenizers import AddedToken

from lewis_hub.errors import TokenizerError
from lewis_hub.tokenizer import disagreement, read_vocabulary

from .conftest import byte_level, read, unigram, word_level


def test_ids_and_flags_are_those_of_the_tokenizers_library():
    found = read("x", byte_level([("a", "b")], ["<|s|>", AddedToken("plain", lstrip=True)]))

    assert (found.ids["ab"], found.ids["<|s|>"], found.ids["plain"], found.n_rows) == (
        256,
        257,
        258,
        259,
    )
    assert list(found.added) == ["<|s|>", "plain"]
    assert found.added["<|s|>"]["special"]
    assert found.added["plain"]["lstrip"]
    assert not found.added["plain"]["special"]


def test_gaps_between_stored_ids_are_closed_as_they_are_when_it_is_loaded():
    document = json.loads(word_level(["a", "b"], ["<x>", "<y>"]).to_str())
    document["added_tokens"][1]["id"] = 9

    found = read_vocabulary("x", {"tokenizer.json": json.dumps(document).encode()})

    assert found.ids == {"a": 0, "b": 1, "<x>": 2, "<y>": 3}


def test_tokens_that_only_the_configuration_adds_count():
    told = {
        "2": {"content": "<x>", "special": True},
        "10": {"content": "<y>"},
        "0": {"content": "a"},
    }

    found = read("x", word_level(["a", "b"]), added_tokens_decoder=told)

    assert found.ids == {"a": 0, "b": 1, "<x>": 2, "<y>": 3}


def test_a_tokenizer_of_the_old_kind_tells_its_ids_and_a_sentencepiece_one_does_not():
    files = {"vocab.json": b'{"a": 0, "b": 1}', "added_tokens.json": b'{"<x>": 2}'}

    assert read_vocabulary("x", files).ids == {"a": 0, "b": 1, "<x>": 2}
    assert read_vocabulary("x", {"tokenizer_config.json": b"{}"}) is None


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"model": 1}'])
def test_a_broken_file_is_named(text):
    with pytest.raises(TokenizerError, match=r"^me: tokenizer.json: "):
        read_vocabulary("me", {"tokenizer.json": text})


def test_vocabularies_agree_where_only_one_has_more():
    base = read("base", word_level(["a", "b"], ["<x>"]))
    more = read("more", word_level(["a", "b"], ["<x>", "<y>"]))

    assert disagreement(base, more) is None
    assert disagreement(more, base) is None


def test_an_id_that_means_something_else_is_told():
    base = read("base", word_level(["a", "b", "c"], ["<x>"]))

    renamed = read("e", word_level(["a", "b", "c"], ["<im>"]))
    swapped = read("e", word_level(["a", "c", "b"], ["<x>"]))
    moved = read("e", word_level(["a", "b", "c"], ["<n>", "<x>"]))

    assert disagreement(base, renamed) == "id 3 is '<im>' in e and '<x>' in base"
    assert disagreement(base, swapped) == "id 1 is 'c' in e and 'b' in base (and 1 more)"
    assert disagreement(base, moved) == "id 3 is '<n>' in e and '<x>' in base (and 1 more)"


def test_the_kind_tells_models_and_spellings_apart():
    kinds = [read("x", t).kind for t in (byte_level(), unigram({"<unk>": 0.0}), word_level(["a"]))]

    assert kinds == ["BPE, bytes as letters", "Unigram, ▁ for spaces", "WordLevel, plain letters"]
