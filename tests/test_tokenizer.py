"""Vocabularies and unions of small tokenizers of every kind, made with the tokenizers library."""

from __future__ import annotations

import base64
import json
import struct
import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lewis_hub.errors import TokenizerError
from lewis_hub.text_growth import require_modest
from lewis_hub.tokenizer import (
    disagreement,
    extended_files,
    load_tokenizer,
    load_without_added,
    read_vocabulary,
    template_files,
    template_of,
    unite,
)


def byte_level(merges=(), added=(), *, first=()):
    """Byte-level BPE: special tokens, the alphabet, one token a merge, then added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*first, *letters, *dict.fromkeys("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer, added)


def unigram(scores, added=()):
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_added(tokenizer, added)


def word_level(words, added=()):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with_added(tokenizer, added)


def _with_added(tokenizer, added):
    for token in added:
        is_plain = isinstance(token, AddedToken)
        one = token if is_plain else AddedToken(token, normalized=False, special=True)
        tokenizer.add_tokens([one])
    return tokenizer


def read(label, tokenizer, **config):
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    if config:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    return read_vocabulary(label, files)


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


def test_a_file_that_makes_the_library_panic_is_named():
    broken = json.loads(byte_level([("a", "b")]).to_str())
    broken["model"] |= {"continuing_subword_prefix": "##", "vocab": {"a": 0, "b": 1, "a##b": 2}}

    with pytest.raises(TokenizerError, match=r"^me: tokenizer.json: the tokenizers library cannot"):
        read_vocabulary("me", {"tokenizer.json": json.dumps(broken).encode()})


def test_a_file_of_an_older_version_need_not_name_the_kind_of_its_model():
    old = json.loads(byte_level([("a", "b")]).to_str())
    del old["model"]["type"]

    found = read_vocabulary("me", {"tokenizer.json": json.dumps(old).encode()})

    assert found.kind == read("x", byte_level()).kind


@pytest.mark.parametrize(
    "entry",
    [
        {"x": {"content": "a"}},
        {"9" * 5000: {"content": "a"}},
        {"1": "a"},
        {"1": {}},
        {"1": {"content": 5}},
        {"1": {"content": "\ud800"}},
    ],
)
def test_an_added_token_that_is_none_is_named(entry):
    with pytest.raises(TokenizerError) as refused:
        read("me", word_level(["a", "b"]), added_tokens_decoder=entry)

    assert str(refused.value) == (
        f"me: tokenizer_config.json: entry {next(iter(entry))[:20]!r} of `added_tokens_decoder` is "
        "not an id with a token.\nThe file is damaged: use an intact copy."
    )


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


BASE = {
    "byte_level": lambda: byte_level([("h", "e"), ("l", "l")], ["<|a|>", "<|b|>"], first=["<s>"]),
    "unigram": lambda: unigram({"<unk>": 0.0, "▁": -3.0, "a": -4.0, "b": -4.5}, ["<|a|>"]),
    "word_level": lambda: word_level(["[UNK]", "red", "blue"], ["<|a|>"]),
}
RIGHT = AddedToken("<c>", rstrip=True)
OTHERS = {
    "byte_level": lambda: [
        byte_level(
            [("l", "l"), ("ll", "o"), ("Ġ", "w")], ["<|b|>", AddedToken("<c>", rstrip=True)]
        ),
        byte_level([("h", "e"), ("Ġ", "w"), ("he", "y")], ["<c>", "<|d|>"], first=["<e>"]),
    ],
    "unigram": lambda: [unigram({"<unk>": 0.0, "b": -4.0, "▁ab": -2.5}, ["<|b|>"])],
    "word_level": lambda: [word_level(["[UNK]", "green", "red"], ["<|b|>", "<|a|>"])],
}


def united(kind, wanted=()):
    base, others = (
        read("base", BASE[kind]()),
        [read(str(i), t) for i, t in enumerate(OTHERS[kind]())],
    )
    return base, others, unite(base, others, wanted)


@pytest.mark.parametrize("kind", BASE)
def test_every_token_is_there_once_and_the_base_s_ids_stay(kind):
    base, others, union = united(kind, ["<new>", "<|a|>"])

    assert {token: union.ids[token] for token in base.ids} == base.ids
    everything = set(base.ids).union(*(other.ids for other in others)) | {"<new>"}
    assert set(union.ids) == everything
    assert sorted(union.ids.values()) == list(range(len(everything)))
    assert load_tokenizer("x", union.document).get_vocab(with_added_tokens=True) == union.ids


def test_new_tokens_are_written_in_the_order_of_their_ids_in_each_process():
    base, other = byte_level(), byte_level([("a", letter) for letter in "bcdefghijklmnopqrs"])

    union = unite(read("base", base), [read("other", other)], [f"<{i}>" for i in range(20)])

    vocab = union.document["model"]["vocab"]
    assert list(vocab)[-38:] == sorted(union.ids, key=union.ids.__getitem__)[-38:]


@pytest.mark.parametrize("kind", BASE)
def test_texts_that_the_base_can_write_are_cut_as_before_unless_the_parts_join(kind):
    base, _, union = united(kind)
    before, after = load_tokenizer("x", base.document), load_tokenizer("x", union.document)

    for text in ("he is", "a b ba", "red blue <|a|> red", "<|a|>"):
        assert after.encode(text).tokens == before.encode(text).tokens


def test_merges_of_the_others_come_after_the_base_s():
    _, _, union = united("byte_level")
    tokenizer = load_tokenizer("x", union.document)

    assert tokenizer.encode("hello hey w").tokens == ["he", "llo", "Ġ", "hey", "Ġw"]
    assert tokenizer.encode("<c><|d|>").tokens == ["<c>", "<|d|>"]
    assert tokenizer.decode(tokenizer.encode("hello hey w").ids) == "hello hey w"


def test_pieces_of_a_unigram_bring_their_scores():
    _, _, union = united("unigram")

    assert load_tokenizer("x", union.document).encode("ab <|b|>").tokens[0] == "▁ab"


def test_the_first_source_s_flags_count():
    _, others, union = united("byte_level")

    assert union.added["<c>"] == others[0].added["<c>"]
    assert union.added["<c>"]["rstrip"]


@pytest.mark.parametrize("kind", BASE)
def test_transformers_loads_it_with_the_same_ids(kind, tmp_path):
    _, _, union = united(kind, ["<new>"])
    load_tokenizer("x", union.document).save(str(tmp_path / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    fast.save_pretrained(tmp_path)

    loaded = AutoTokenizer.from_pretrained(tmp_path)

    assert loaded.get_vocab() == union.ids
    assert all(loaded.convert_tokens_to_ids(token) == i for token, i in union.ids.items())


def test_nothing_new_leaves_the_base_as_it_is():
    base = read("base", BASE["byte_level"]())

    assert unite(base, [base]) is base


def test_tokenizers_that_spell_in_other_ways_are_refused_by_name():
    base, other = read("base", byte_level()), read("other", unigram({"<unk>": 0.0, "▁a": -1.0}))

    with pytest.raises(TokenizerError) as refused:
        unite(base, [other])

    assert str(refused.value) == (
        "other: tokenizer.json: its tokenizer (Unigram, ▁ for spaces) cannot be united with that "
        "of base (BPE, bytes as letters): 2 of its tokens, such as '<unk>', could never occur in a "
        "text.\n"
        "Set `tokenizer_source` to `base` or to one of the models."
    )
    with pytest.raises(TokenizerError, match=r"old: it has no tokenizer\.json"):
        unite(base, [read_vocabulary("old", {"vocab.json": b'{"zzz": 0}'})])
    old = read_vocabulary("old", {"vocab.json": b'{"zzz": 0}'})
    with pytest.raises(TokenizerError, match=r"old: it has no tokenizer\.json"):
        unite(old, [], ["<x>"])


def test_a_configuration_that_lists_added_tokens_lists_the_new_ones_too():
    base = read("base", word_level(["a"], ["<x>"]))
    union = unite(base, [], ["<y>"])

    plain = extended_files(union, {"model_max_length": 8})
    listed = extended_files(union, {"added_tokens_decoder": {"1": {}}, "bos_token": "<x>"})

    assert list(plain) == ["tokenizer.json"]
    told = json.loads(listed["tokenizer_config.json"])
    assert told["bos_token"] == "<x>"
    assert {i: one["content"] for i, one in told["added_tokens_decoder"].items()} == {
        "1": "<x>",
        "2": "<y>",
    }
    assert told["added_tokens_decoder"]["1"]["special"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"tokenizer_config.json": b'{"chat_template": "a"}'}, "a"),
        ({"chat_template.jinja": b"b", "tokenizer_config.json": b'{"chat_template": "a"}'}, "b"),
        ({"tokenizer_config.json": b"{}", "chat_template.json": b'{"chat_template": "c"}'}, "c"),
        (
            {
                "tokenizer_config.json": b'{"chat_template": [{"name": "rag", "template": "r"}, '
                b'{"name": "default", "template": "d"}]}'
            },
            "d",
        ),
        (
            {"tokenizer_config.json": b'{"chat_template": [{"name": []}, {"name": "default"}]}'},
            None,
        ),
    ],
)
def test_a_template_is_found_wherever_a_source_keeps_it(files, found):
    assert template_of("me", files) == found


def test_a_broken_file_with_a_template_is_named():
    with pytest.raises(TokenizerError, match=r"^me: chat_template.json: it is not a JSON object"):
        template_of("me", {"chat_template.json": b"["})


def test_a_template_leaves_the_configuration_for_a_file_of_its_own():
    assert template_files("t", {"a": 1}) == {"chat_template.jinja": "t"}
    written = template_files("t", {"a": 1, "chat_template": "old"})
    assert json.loads(written["tokenizer_config.json"]) == {"a": 1}


def test_an_id_far_above_the_number_of_tokens_is_refused():
    pieces = {"type": "BPE", "vocab": {"a": 0, "b": 4_000_000_000}, "merges": []}
    files = {"tokenizer.json": json.dumps({"model": pieces}).encode()}

    for found in (files, {"vocab.json": b'{"a": 0, "b": 4000000000}'}):
        with pytest.raises(TokenizerError) as caught:
            read_vocabulary("org/model", found)
        assert str(caught.value) == (
            f"org/model: {next(iter(found))}: 'b' has the id 4000000000, but it has 2 tokens.\n"
            "The file is damaged: use an intact copy."
        )
    with pytest.raises(TokenizerError, match="'b' has the id -1"):
        read_vocabulary("org/model", {"vocab.json": b'{"a": 0, "b": -1}'})


def test_a_tokenizer_that_makes_a_text_very_long_is_refused():
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    document = {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "normalizer": {"type": "Sequence", "normalizers": [step] * 5},
    }

    with pytest.raises(TokenizerError, match="it may make a text more than 2,000 times as long"):
        read_vocabulary("org/model", {"tokenizer.json": json.dumps(document).encode()})


@pytest.mark.parametrize(
    ("part", "step", "n"),
    [
        ("normalizer", {"type": "ByteLevel"}, 12),
        ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "a"}, 12),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(?=.)"}, "content": "a"}, 12),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "b{2}?"}, "content": "a"}, 12),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "b{,2}"}, "content": "a"}, 12),
        ("decoder", {"type": "BPEDecoder", "suffix": ""}, 8),
        ("decoder", {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": 1}, 8),
    ],
)
def test_steps_that_make_a_text_longer_each_time_are_refused(part, step, n):
    kind = "decoders" if part == "decoder" else f"{part}s"
    document = {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        part: {"type": "Sequence", kind: [step] * n},
    }

    with pytest.raises(TokenizerError, match=r"it may make a text more than [\d,]+ times as long"):
        load_tokenizer("org/model", document)


@pytest.mark.parametrize(
    "normalizers",
    [
        [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}] * 20,
        [{"type": "Replace", "pattern": {"Regex": r"[ '_]+\s"}, "content": "▁"}] * 20,
        [{"type": "Replace", "pattern": {"String": "``"}, "content": '"'}] * 20,
        [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}],
    ],
)
def test_steps_of_usual_tokenizers_are_accepted(normalizers):
    document = {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    }

    assert load_without_added("org/model", document).encode("aa").ids == [0, 0]


def test_a_million_steps_are_refused_at_once():
    document = {"normalizer": [{"type": "Replace", "content": "a" * 40}] * 1_000_000}

    began = time.process_time()
    with pytest.raises(TokenizerError, match="more than 2,000 times"):
        require_modest("org/model", document)
    assert time.process_time() - began < 1


def test_a_map_of_characters_that_makes_a_text_very_long_is_refused():
    trie = [0] * 1024  # a double array with one entry: `a` -> the text at 0
    trie[0], trie[256 ^ ord("a")] = 256 << 10, 512 << 10 | 1 << 8 | ord("a")
    numbers = struct.pack("<1025I", 4 * len(trie), *trie)
    document = {"model": {"type": "BPE", "vocab": {"b": 0}, "merges": []}}

    def read(n_letters):
        charsmap = base64.b64encode(numbers + n_letters * b"b" + b"\0").decode()
        normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap}
        return load_without_added("org/model", {**document, "normalizer": normalizer})

    assert read(1000).encode("aa").ids == 2000 * [0]
    with pytest.raises(TokenizerError, match="it may make a text more than 2,000 times as long"):
        read(100_001)


def tokens_from_template(piece, n_pieces, n_ids, n_steps=1):
    """The tokens of `b` after steps that each add pieces before a text; token 0 has `n_ids`."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [*[{piece: {"id": "A", "type_id": 0}}] * n_pieces, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"A": {"id": "A", "ids": [0] * n_ids, "tokens": ["a"] * n_ids}},
    }
    document = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "post_processor": {"type": "Sequence", "processors": [template] * n_steps},
    }
    return load_tokenizer("org/model", document).encode("b").ids


@pytest.mark.parametrize(
    ("piece", "n_pieces", "n_ids", "n_steps"),
    [
        ("SpecialToken", 1, 1001, 1),
        ("SpecialToken", 600, 600, 1),
        ("SpecialToken", 1, 1, 10),
        ("Sequence", 1000, 1, 1),
    ],
)
def test_a_template_that_makes_very_many_tokens_is_refused(piece, n_pieces, n_ids, n_steps):
    """300 kB of JSON made 100 million tokens of one letter."""
    with pytest.raises(TokenizerError, match="it may make a text more than 1,000 times as long"):
        tokens_from_template(piece, n_pieces, n_ids, n_steps)


def test_a_template_may_add_special_tokens():
    assert tokens_from_template("SpecialToken", 2, 400) == 800 * [0] + [1]


def test_a_tokenizer_that_makes_what_a_model_wrote_very_long_is_refused():
    step = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 1000}
    document = {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "decoder": {"type": "Sequence", "decoders": [step] * 3},
    }

    with pytest.raises(TokenizerError, match="it may make a text more than 100 times as long"):
        read_vocabulary("org/model", {"tokenizer.json": json.dumps(document).encode()})
