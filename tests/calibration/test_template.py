from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis_hub.calibration.texts import Messages, Rendered, Text, check_columns
from lewis_hub.errors import CalibrationError
from lewis_hub.evaluate.chat import limit_templates
from lewis_hub.recipe.schema import Calibration

COLUMNS = ("question", "answer", "Full Text", "a.b")


def asked(template: str) -> Calibration:
    return Calibration(dataset="me/data", text=template)


def render(template: str, row: dict[str, Any]) -> str:
    check_columns(asked(template), COLUMNS)
    return Text(asked(template)).render(3, row)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{question} {answer}", "1+1? 2"),
        ("Q: {question}\nA: {answer}\n", "Q: 1+1?\nA: 2\n"),
        ("{{{question}}} {{}}", "{1+1?} {}"),
        ("{Full Text}|{a.b}", "long|dotted"),
        ("{answer}{answer}", "22"),
    ],
)
def test_a_template_is_filled_with_columns(template, expected):
    row = {"question": "1+1?", "answer": 2, "Full Text": "long", "a.b": "dotted"}

    assert render(template, row) == expected


def test_a_null_is_an_empty_text():
    assert render("{question} {answer}", {"question": "why?", "answer": None}) == "why? "


def test_braces_in_the_data_are_not_a_template():
    assert render("{question}", {"question": "{answer} {0} {{"}) == "{answer} {0} {{"


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_comes_through_unchanged(question, answer):
    assert render("{question}\x00{answer}", {"question": question, "answer": answer}) == (
        f"{question}\x00{answer}"
    )


HOW = "Write {column} for a column and {{ or }} for a literal brace."
THERE = "Columns: `question`, `answer`, `Full Text`, `a.b`."


@pytest.mark.parametrize(
    ("template", "problem", "remedy"),
    [
        ("{qestion}", "there is no column `qestion`", f"{THERE} Did you mean `question`?"),
        ("{ANSWER}", "there is no column `ANSWER`", f"{THERE} Did you mean `answer`?"),
        ("{xyz}", "there is no column `xyz`", THERE),
        (
            "{answer.__class__}",
            "there is no column `answer.__class__`",
            THERE,
        ),
        ("{answer[0]}", "there is no column `answer[0]`", f"{THERE} Did you mean `answer`?"),
        ("{0}", "there is no column `0`", THERE),
        ("{}", "'{}' has a field that is not just a column's name", HOW),
        ("{answer:>9}", "'{answer:>9}' has a field that is not just a column's name", HOW),
        (
            "{answer:{question}}",
            "'{answer:{question}}' has a field that is not just a column's name",
            HOW,
        ),
        ("{answer!r}", "'{answer!r}' has a field that is not just a column's name", HOW),
        ("{answer", "'{answer' is not a template: expected '}' before end of string", HOW),
        ("answer}", "'answer}' is not a template: Single '}' encountered in format string", HOW),
        ("no braces", "'no braces' names no column", HOW),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template, problem, remedy):
    with pytest.raises(CalibrationError) as caught:
        check_columns(asked(template), COLUMNS)

    assert str(caught.value) == f"calibration on me/data, `text`: {problem}.\n{remedy}"


@pytest.mark.parametrize(("value", "kind"), [([1], "list"), ({"a": 1}, "dict"), (b"x", "bytes")])
def test_a_column_of_lists_is_no_text(value, kind):
    with pytest.raises(CalibrationError) as caught:
        render("{answer}", {"answer": value})

    assert str(caught.value) == (
        f"calibration on me/data, `text`: row 3 holds a {kind} in column `answer`.\n"
        "A template takes columns of text and numbers; chat goes under `messages`."
    )


def messages(tokenizer: Any) -> Messages:
    return Messages(Calibration(dataset="me/data", messages="chat"), tokenizer)


def test_chat_needs_a_chat_template(byte_tokenizer):
    byte_tokenizer.chat_template = None
    byte_tokenizer.name_or_path = "me/plain"

    with pytest.raises(CalibrationError) as caught:
        messages(byte_tokenizer)

    assert str(caught.value) == (
        "calibration on me/data, `messages`: the tokenizer of me/plain has no chat template.\n"
        "Use `text` over plain columns, or a source whose tokenizer has one."
    )


def test_chat_needs_its_column():
    with pytest.raises(CalibrationError) as caught:
        check_columns(Calibration(dataset="me/data", messages="chat"), ("chats", "id"))

    assert str(caught.value) == (
        "calibration on me/data, `messages`: there is no column `chat`.\n"
        "Columns: `chats`, `id`. Did you mean `chats`?"
    )


@pytest.mark.parametrize("value", ["hello", [{"from": "human", "value": "hi"}], ["hi"], 3])
def test_a_column_that_holds_no_messages_is_refused(byte_tokenizer, value):
    with pytest.raises(CalibrationError) as caught:
        messages(byte_tokenizer).render(8, {"chat": value})

    assert str(caught.value) == (
        "calibration on me/data, `messages`: row 8, column `chat` is no list of {role, content}.\n"
        "Each message needs `role` and `content`; use `text` for plain columns."
    )


def test_a_conversation_that_the_chat_template_refuses_is_an_error(byte_tokenizer):
    byte_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"

    with pytest.raises(CalibrationError) as caught:
        messages(byte_tokenizer).render(8, {"chat": [{"role": "user", "content": "hi"}]})

    assert str(caught.value) == (
        "calibration on me/data, `messages`: the chat template refuses row 8:"
        " roles must alternate.\n"
        "The roles or their order do not suit this tokenizer; use `text`."
    )


def test_a_chat_template_with_more_loops_in_each_other_than_python_compiles_is_an_error(
    byte_tokenizer,
):
    byte_tokenizer.chat_template = "{% for a in messages %}" * 21 + "{% endfor %}" * 21
    limit_templates(byte_tokenizer)

    with pytest.raises(CalibrationError) as caught:
        messages(byte_tokenizer).render(8, {"chat": [{"role": "user", "content": "hi"}]})

    assert str(caught.value).startswith(
        "calibration on me/data, `messages`: the chat template refuses row 8:"
        " SyntaxError: too many statically nested blocks"
    )


def test_a_question_that_the_chat_template_refuses_is_an_error(byte_tokenizer):
    byte_tokenizer.chat_template = "{{ raise_exception('a system message comes first') }}"

    with pytest.raises(CalibrationError, match="refuses a question: a system message comes first"):
        Rendered(Calibration(task="gsm8k", chat_template=True), byte_tokenizer)


@pytest.mark.parametrize("content", [[{"type": "text", "text": "hi"}], 3, {"a": 1}])
def test_contents_that_the_chat_template_cannot_write_are_an_error(byte_tokenizer, content):
    byte_tokenizer.chat_template = "{{ 'user: ' + messages[0].content }}"

    with pytest.raises(CalibrationError, match="the chat template refuses row 8: can only conc"):
        messages(byte_tokenizer).render(8, {"chat": [{"role": "user", "content": content}]})


@pytest.mark.parametrize("empty", [None, []])
def test_a_row_without_messages_is_an_empty_text(byte_tokenizer, empty):
    assert messages(byte_tokenizer).render(0, {"chat": empty}) == ""


def test_a_prompt_for_the_model_ends_where_its_answer_begins(byte_tokenizer):
    byte_tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    asked = Calibration(dataset="me/data", messages="chat", answers="model")
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]

    template = Messages(asked, byte_tokenizer)

    assert template.render(0, {"chat": chat}) == "<user>2 + 2?\n<assistant>"
    assert template.render(0, {"chat": chat[:1]}) == "<user>2 + 2?\n<assistant>"
    assert template.render(0, {"chat": chat[1:]}) == ""
    assert template.parts({"chat": chat}) == ("2 + 2?",)
    assert messages(byte_tokenizer).render(0, {"chat": chat}) == "<user>2 + 2?\n<assistant>4\n"
