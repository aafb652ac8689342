"""How much longer the settings of a tokenizer make texts: padding, and pieces that overlap."""

from __future__ import annotations

import pytest

from lewis_hub.errors import TokenizerError
from lewis_hub.text_growth import require_modest_padding


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
