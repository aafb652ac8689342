"""Tokens of two vocabularies that stand for the same bytes, however they are spelled."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lewis_hub.errors import TokenizerError
from lewis_hub.merge import token_matches
from lewis_hub.merge.token_matches import BYTES, match, read_roles, spell, split
from lewis_hub.tokenizer import Vocabulary, read_vocabulary

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(merges=(), special=(), added=()):
    words = [*ALPHABET, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    return read("bytes", tokenizer)


def sentence_piece(pieces, merges=(), special=(), *, prepends=True):
    """BPE as Llama 2 has it: single bytes first, then pieces, with spaces as ▁."""
    named = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [*special, *named, *pieces]
    model = models.BPE(
        {word: i for i, word in enumerate(words)}, list(merges), byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if prepends else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.add_special_tokens(list(special))
    return read("pieces", tokenizer)


def read(label, tokenizer):
    return read_vocabulary(label, {"tokenizer.json": tokenizer.to_str().encode()})


def spelled(vocabulary, roles=None, n_rows=None):
    return spell(vocabulary, roles or {}, vocabulary.n_rows if n_rows is None else n_rows)


def test_every_byte_has_the_letter_that_the_tokenizers_library_gives_it():
    tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    for byte, text in ((b, chr(b)) for b in range(128)):
        [(letter, _)] = tokenizer.pre_tokenize_str(text)
        assert BYTES[letter] == byte
    assert sorted(BYTES) == ALPHABET
    assert sorted(BYTES.values()) == list(range(256))


def test_spaces_and_bytes_match_whatever_their_spelling():
    model = byte_level([("Ġ", "t"), ("Ġt", "h"), ("i", "n"), ("Ã", "©")], added=["  \t"])
    donor = sentence_piece(["▁", "▁t", "▁th", "in", "é", "x", "▁zz", "  \t"])
    ours, theirs = spelled(model), spelled(donor)

    found = match(ours, theirs)

    def token_of(token):
        row = found.rows.get(donor.ids[token])
        return next((t for t, i in model.ids.items() if i == row), None)

    assert token_of("▁th") == "Ġth"
    assert token_of("▁") == token_of("<0x20>") == "Ġ"
    assert token_of("in") == "in"
    assert token_of("é") == "Ã©"  # two bytes
    assert token_of("<0xC3>") == "Ã"
    assert token_of("x") == token_of("<0x78>") == "x"
    assert token_of("  \t") == "  \t"  # an added token is written as it is
    assert token_of("▁zz") is None
    shared = {donor_id for donor_id, _ in found.shared}
    assert donor.ids["x"] in shared
    assert donor.ids["<0x78>"] not in shared  # a second name of one token
    assert len({row for _, row in found.shared}) == len(found.shared)
    assert found.shared == tuple(sorted(found.shared))


def test_a_vocabulary_matches_itself_token_by_token():
    vocabulary = sentence_piece(["▁", "▁t", "x", "A", "B"], special=["<s>", "</s>"])
    one = spelled(vocabulary)

    found = match(one, one)

    assert found.rows == {i: i for i in vocabulary.ids.values()}  # also <0x41> beside A
    left_out = {vocabulary.ids[f"<0x{ord(text):02X}>"] for text in " xAB"}
    assert {i for i, _ in found.shared} == {*vocabulary.ids.values()} - left_out


def test_special_tokens_match_by_their_text_or_by_a_role_that_no_other_token_took():
    model = byte_level(special=["<|end|>", "<|begin|>"])
    donor = byte_level(special=["<s>", "</s>", "<pad>"])
    ours = spelled(model, {"eos": "<|end|>", "pad": "<|end|>", "bos": "<|begin|>"})
    theirs = spelled(donor, {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "</s>"})

    found = match(ours, theirs)

    assert found.rows[donor.ids["</s>"]] == model.ids["<|end|>"]
    assert found.rows[donor.ids["<s>"]] == model.ids["<|begin|>"]
    assert donor.ids["<pad>"] not in found.rows  # it would be as likely as the end of the text
    assert (donor.ids["</s>"], model.ids["<|end|>"]) in found.shared


def test_the_text_of_a_special_token_counts_before_its_role():
    model = byte_level(special=["<a>", "<b>"])
    donor = byte_level(special=["<b>", "<c>"])
    found = match(spelled(model, {"eos": "<a>"}), spelled(donor, {"eos": "<b>"}))

    assert found.rows[donor.ids["<b>"]] == model.ids["<b>"]
    assert donor.ids["<c>"] not in found.rows


def test_tokens_without_a_row_do_not_match():
    vocabulary = byte_level(added=["new"])
    stored = spelled(vocabulary, {"eos": "new"}, n_rows=256)

    assert "new" not in stored.ids
    assert stored.roles == {}
    assert 256 not in match(stored, spelled(vocabulary)).rows


def test_roles_are_read_as_text_or_object_and_the_configuration_counts():
    files = {
        "special_tokens_map.json": b'{"eos_token": "<old>", "pad_token": {"content": "<p>"}}',
        "tokenizer_config.json": b'{"eos_token": {"content": "<new>"}, "bos_token": null}',
    }

    assert read_roles("x", files) == {"eos": "<new>", "pad": "<p>"}


def test_texts_are_split_as_the_tokenizer_does():
    model = byte_level([("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w")])
    texts = ["hello", " world", "é", ""]

    found = split(spelled(model), [text.encode() for text in texts])

    names = {i: token for token, i in model.ids.items()}
    assert [[names[i] for i in ids] for ids in found] == [
        ["hell", "o"],
        ["Ġw", "o", "r", "l", "d"],
        ["Ã", "©"],
        [],
    ]


def test_bytes_that_are_no_text_are_split_into_the_longest_tokens():
    model = byte_level([("Ã", "©")])

    [found] = split(spelled(model), [b"\xc3\xa9\xc3"])

    assert found == (model.ids["Ã©"], model.ids["Ã"])


@pytest.mark.parametrize("prepends", [True, False])
def test_a_space_that_the_tokenizer_puts_first_is_not_part_of_the_token(prepends):
    merges = [("▁", "t"), ("▁t", "o"), ("i", "n")]
    pieces = ["▁", "t", "o", "i", "n", "▁t", "▁to", "in", "g"]
    model = sentence_piece(pieces, merges, prepends=prepends)
    names = {i: token for token, i in model.ids.items()}

    found = split(spelled(model), [b" to", b"to", b"ing", b" in", b"in\xff"])

    assert [[names[i] for i in ids] for ids in found] == [
        ["▁to"],
        ["t", "o"],  # from left to right, as the tokenizer would write ▁to
        ["in", "g"],
        ["▁", "in"],
        ["in", "<0xFF>"],
    ]


def test_a_text_that_the_model_cannot_write_has_no_tokens():
    words = {"a": 0, "b": 1, "[UNK]": 2}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))

    assert split(spelled(read("words", tokenizer)), [b"ab", b"a", b"c"]) == [(0, 1), (0,), ()]


def test_a_model_without_tokenizer_json_cannot_split_tokens():
    vocabulary = Vocabulary("org/old", {"Ġa": 0, "a": 1}, {}, None)

    assert spelled(vocabulary).ids == {b" a": 0, b"a": 1}
    with pytest.raises(TokenizerError, match="org/old: it has no tokenizer.json, which is needed"):
        split(spelled(vocabulary), [b"a"])


def test_an_added_token_of_a_byte_level_vocabulary_is_no_row_of_letters():
    vocabulary = byte_level(added=[AddedToken("Ġx", normalized=False)])

    assert spelled(vocabulary).texts[vocabulary.ids["Ġx"]] == "Ġx".encode()


def test_a_very_long_token_is_not_split():
    model = spelled(byte_level([("a", "a")]))

    assert split(model, [b"a" * 512, b"a" * 100_000]) == [
        (model.vocabulary.ids["aa"],) * 256,
        (),
    ]


def test_a_tokenizer_that_panics_is_refused():
    document = dict(byte_level().document)
    slow = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    files = {"tokenizer.json": json.dumps({**document, "pre_tokenizer": slow}).encode()}
    model = spelled(read_vocabulary("slow", files))

    with pytest.raises(TokenizerError, match="the tokenizers library cannot use it .*retry-limit"):
        split(model, [b"a" * 30 + b"!"])


def test_a_text_of_more_tokens_than_bytes_is_split_into_the_longest_ones():
    grows = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 400}
    files = {"tokenizer.json": json.dumps({**byte_level().document, "normalizer": grows}).encode()}
    model = spelled(read_vocabulary("grows", files))

    assert split(model, [b"aa", b"b"]) == [(model.ids[b"a"],) * 2, (model.ids[b"b"],)]


def test_texts_that_take_too_long_to_split_are_refused(monkeypatch):
    monkeypatch.setattr(token_matches, "MAX_SPLIT_S", 1.0)
    slow = {"type": "Split", "pattern": {"Regex": r".*.*\p{Han}"}, "behavior": "Isolated"}
    changed = {"type": "Replace", "pattern": {"Regex": "."}, "content": "~"}
    texts = [b"%d" % i + b"ab" * 250 for i in range(200)]
    for step in (
        {"pre_tokenizer": {**slow, "invert": False}},
        {"normalizer": changed},  # so that each text is split into the longest tokens
    ):
        document = {**byte_level().document, **step}
        files = {"tokenizer.json": json.dumps(document).encode()}
        model = spelled(read_vocabulary("slow", files))

        with pytest.raises(TokenizerError) as caught:
            split(model, texts)

        assert str(caught.value) == (
            "slow: tokenizer.json: it takes more than 1 s to split the donor's tokens.\n"
            "Choose another --method."
        )
