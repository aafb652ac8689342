import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lewis_hub.errors import TokenizerError
from lewis_hub.tokenizer import load_tokenizer, read_vocabulary, unite

from .conftest import byte_level, read, unigram, word_level

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
