"""How much longer the settings of a tokenizer make texts: padding, and pieces that overlap."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lewis_hub.errors import TokenizerError
from lewis_hub.text_growth import limit_texts, require_modest, require_modest_padding


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"padding": {"strategy": {"Fixed": 20_000_000}}},
            "it pads each text to 20,000,000 tokens, the limit is 131,072.\n"
            "Use a copy of the model without this padding.",
        ),
        (
            {"padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 20_000_000}},
            "it pads each text to a multiple of 20,000,000 tokens, the limit is 1,024.\n"
            "Use a copy of the model without this padding.",
        ),
        (
            {"pad_to_multiple_of": 20_000_000},
            "it pads each text to a multiple of 20,000,000 tokens, the limit is 1,024.\n"
            "Use a copy of the model without this padding.",
        ),
        (
            {"padding": "max_length", "model_max_length": 20_000_000},
            "it pads each text to 20,000,000 tokens, the limit is 131,072.\n"
            "Use a copy of the model without this padding.",
        ),
        (
            {"truncation": {"max_length": 5000, "stride": 4999}},
            "it cuts texts into pieces of 5,000 tokens, of which 4,999 overlap.\n"
            "Set `stride` to 0 in a copy: a token is in at most 10 pieces.",
        ),
    ],
)
def test_a_tokenizer_pads_or_repeats_no_text_without_a_limit(settings, told):
    with pytest.raises(TokenizerError) as refused:
        require_modest_padding("org/model: tokenizer.json", settings)

    assert str(refused.value) == f"org/model: tokenizer.json: {told}"


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": {"strategy": {"Fixed": 512}, "pad_to_multiple_of": 8}},
        {"truncation": {"max_length": 512, "stride": 384, "strategy": "LongestFirst"}},
        {"max_length": 128, "stride": 0, "pad_to_multiple_of": None},
        {"padding": "max_length", "model_max_length": 10**30},  # there is none
        {"padding": None, "truncation": None},
    ],
)
def test_published_tokenizers_pad_texts(settings):
    require_modest_padding("org/model: tokenizer.json", settings)


def tokenizer_of(**steps):
    backend = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="<s>"))
    for name, step in steps.items():
        setattr(backend, name, step)
    loaded = PreTrainedTokenizerFast(tokenizer_object=backend)
    limit_texts("org/model", loaded)
    return loaded


LONGER = normalizers.Replace(Regex("[a-z ]"), "b" * 1500)
REPEATED = processors.TemplateProcessing(single=" ".join(["$A"] * 500), special_tokens=[])


@pytest.mark.parametrize(
    ("steps", "n_letters"),
    [({"normalizer": LONGER}, 10_000), ({"post_processor": REPEATED}, 1_000_000)],
    ids=["letters", "tokens"],
)
@pytest.mark.parametrize("call", ["encode", "__call__", "tokenize"])
def test_a_text_that_a_tokenizer_makes_far_longer_is_refused(steps, n_letters, call):
    """10 kB of a tokenizer made 13 GB of an honest text of 110,000 letters, and a signal."""
    loaded = tokenizer_of(**steps)

    with pytest.raises(TokenizerError, match=r"org/model: it may make [\d,]+ bytes and tokens"):
        getattr(loaded, call)("a" * n_letters)


def test_short_texts_are_tokenised_whatever_it_makes_of_them():
    assert tokenizer_of(normalizer=LONGER)(["a"] * 2)["input_ids"] == [[1], [1]]


@pytest.mark.parametrize(
    "steps",
    [
        {"normalizer": normalizers.NFKD(), "pre_tokenizer": pre_tokenizers.ByteLevel()},
        {"normalizer": normalizers.BertNormalizer()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(), "post_processor": processors.ByteLevel()},
        {"normalizer": normalizers.Sequence([normalizers.NFKD(), normalizers.NFKC()])},
    ],
)
def test_long_texts_of_usual_letters_are_tokenised(steps):
    """Each letter may become 18 or more, but these do not."""
    text = "한국어 é word " * 150_000  # 3 MB

    assert len(tokenizer_of(**steps)(text)["input_ids"]) > 0


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (
            {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b" * 10_001, -2.0]]}},
            "a token of 10,001 letters, the limit is 10,000",
        ),
        (
            {"model": {"type": "WordLevel", "vocab": {"a" * 10_001: 0}}},
            "a token of 10,001 letters, the limit is 10,000",
        ),
        (
            {"model": {"type": "WordPiece", "vocab": {}, "max_input_chars_per_word": 10**9}},
            "`max_input_chars_per_word`: words of 1,000,000,000 letters, the limit is 10,000",
        ),
        (
            {
                "normalizer": {"type": "Replace", "pattern": {"String": "x"}, "content": ""},
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": r"[\p{L}]" * 1000}},
                        {"type": "Split", "pattern": {"Regex": "a" * 13_000}},
                    ],
                },
            },
            "patterns of 20,001 letters, the limit is 20,000",
        ),
    ],
)
def test_a_tokenizer_has_no_token_word_or_pattern_of_any_length(document, told):
    """A token of 160,000 letters ended every command by a signal."""
    with pytest.raises(TokenizerError) as refused:
        require_modest("org/model", document)

    remedy = "The file is damaged: use an intact copy."
    assert str(refused.value) == f"org/model: tokenizer.json: it has {told}.\n{remedy}"


SLOW = """
import sys
from tokenizers import Regex, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast
from lewis_hub.text_growth import limit_texts

words = models.WordPiece({"a": 0, "##a": 1, "?": 2}, unk_token="?", max_input_chars_per_word=10**9)
loaded = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
if "counted" in sys.argv:
    slow = Regex("(?:a|aa){1,19}d")
    loaded.backend_tokenizer.normalizer = normalizers.Replace(slow, "a" * 1900)
limit_texts("org/model", loaded, max_s=1.0)
print(len(loaded(["a"] * 100)["input_ids"]), flush=True)
loaded("a" * 60_000 + "b")  # the cube of it: minutes
"""


@pytest.mark.parametrize("how", ["made tokens", "counted"])
def test_a_tokenizer_that_takes_very_long_for_a_text_ends_the_process(how):
    ended = subprocess.run(
        [sys.executable, "-c", SLOW, how], capture_output=True, text=True, timeout=60, check=False
    )

    assert (ended.returncode, ended.stdout) == (1, "100\n")
    assert ended.stderr.splitlines()[-2:] == [
        "lewis-hub: org/model: its tokenizer takes 3 s longer for its texts than others do.",
        "Use a copy of the model with another one.",
    ]
