import json

import pytest

from lewis_hub.errors import TokenizerError
from lewis_hub.tokenizer import extended_files, template_files, template_of, unite

from .conftest import read, word_level


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
