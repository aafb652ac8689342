from __future__ import annotations

import pytest

from lewis_hub.errors import PublishError
from lewis_hub.hub.facts import Licence, ModelFacts, combined_licence, model_facts
from lewis_hub.hub.resolve import resolve_model

CARD = """---
license: other
license_name: gemma
license_link: https://ai.google.dev/gemma/terms
language: [en, no]
tags:
- math
---
# A model
"""


def facts(source: str, licence: str | None, name: str | None = None) -> ModelFacts:
    return ModelFacts(source, licence and Licence(licence, name), (), None)


def folder_with_card(tmp_path, card: str | bytes):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    return str(tmp_path)


def test_the_card_of_a_folder_gives_licence_and_languages(tmp_path, api):
    found = model_facts(api, resolve_model(api, folder_with_card(tmp_path, CARD)))

    assert found == ModelFacts(
        source=str(tmp_path),
        licence=Licence("other", "gemma", "https://ai.google.dev/gemma/terms"),
        languages=("en", "no"),
        url=None,
    )


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# No metadata\n---\nlicense: mit\n---\n",
        "---\nlicense: [unclosed\n---\n",
        "---\n- a list\n---\n",
        "---\n---\n",
        b"\xff\xfe\x00",
    ],
)
def test_a_card_without_readable_metadata_is_silent(tmp_path, api, card):
    found = model_facts(api, resolve_model(api, folder_with_card(tmp_path, card)))

    assert (found.licence, found.languages) == (None, ())


def test_a_card_with_windows_line_ends_and_a_byte_order_mark_is_read(tmp_path, api):
    card = "\ufeff---\r\nlicense: MIT\r\n---\r\n# Hello\r\n"

    found = model_facts(api, resolve_model(api, folder_with_card(tmp_path, card)))

    assert found.licence == Licence("mit")


def test_a_licence_that_the_hub_knows_has_no_other_name_and_link(tmp_path, api):
    """They stood beside `mit` in the card of a merge, whatever they led to."""
    card = CARD.replace("license: other", "license: mit")

    parent = model_facts(api, resolve_model(api, folder_with_card(tmp_path, card)))

    assert parent.licence == Licence("mit")
    assert combined_licence([parent], "mit") == Licence("mit")
    assert combined_licence([parent, facts("a/base", "mit")], None) == Licence("mit")


def test_parents_that_agree_pass_their_licence_on():
    parents = [facts("a/base", "gemma"), facts("b/math", "gemma")]

    assert combined_licence(parents, None) == Licence("gemma")


def test_parents_that_are_all_silent_give_no_licence():
    assert combined_licence([facts("a/base", None), facts("b/math", None)], None) is None


def test_a_chosen_licence_wins_and_keeps_the_name_that_a_parent_gave_it():
    parents = [facts("a/base", "other", "gemma"), facts("b/math", "mit")]

    assert combined_licence(parents, "other") == Licence("other", "gemma")
    assert combined_licence(parents, "apache-2.0") == Licence("apache-2.0")


def test_parents_that_disagree_are_each_named():
    parents = [facts("a/base", "gemma"), facts("b/math", "mit"), facts("c/code", None)]

    with pytest.raises(PublishError) as raised:
        combined_licence(parents, None)

    assert str(raised.value) == (
        "publish.license: the parents' licences differ (a/base: gemma; b/math: mit; "
        "c/code: not stated).\n"
        "Decide which licence a merge of them may have, and set `publish.license`."
    )


def test_two_licences_called_other_with_different_names_disagree():
    parents = [facts("a/base", "other", "gemma"), facts("b/math", "other", "llama4")]

    with pytest.raises(PublishError) as raised:
        combined_licence(parents, None)

    assert "(a/base: other (gemma); b/math: other (llama4))" in str(raised.value)


@pytest.mark.parametrize(
    ("widget", "example"),
    [
        ("[{text: A good film}]", "A good film"),
        ("[{source_sentence: A cat, sentences: [B]}]", "A cat"),
        ("[{messages: [{role: user, content: 'Who are you?'}]}]", "Who are you?"),
        ("[{src: https://x.org/a.png}, {text: second}]", "second"),
        (f"[{{text: {'x' * 201}}}]", None),
        ('[{text: "two\\nlines"}]', None),
        ("text", None),
        ("[[text], {messages: text}]", None),
    ],
)
def test_a_card_tells_its_task_and_an_example(tmp_path, api, widget, example):
    card = f"---\npipeline_tag: text-classification\nwidget: {widget}\n---\n"

    found = model_facts(api, resolve_model(api, folder_with_card(tmp_path, card)))

    assert (found.task, found.example) == ("text-classification", example)


def test_the_facts_of_a_repo_are_those_of_the_pinned_commit(hub, api, push):
    sha = push("tests/model", {"README.md": CARD.encode(), "model.safetensors": b"w" * 64})
    push("tests/model", {"README.md": b"---\nlicense: mit\n---\n"})

    found = model_facts(api, resolve_model(api, "tests/model", sha))

    assert found.licence.identifier == "other"
    assert found.url == "https://huggingface.co/tests/model"  # whatever the mirror
