"""Chat templates of others that never end, or fill the memory."""

import json
import shutil
import subprocess
import sys
import threading
import time

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lewis_hub import limits
from lewis_hub.calibration.model import load_tokenizer
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import TokenizerError
from lewis_hub.evaluate import chat
from lewis_hub.evaluate.chat import limit_templates, limited
from lewis_hub.system import resident_bytes

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": f"{LOOP}{ENDS}",
    "loops that call": f"{LOOP}{{{{ 'abc' | upper | length }}}}{ENDS}",
    "macros": "{% macro a(n) %}{% for i in range(99999) %}{{ a(0) if n else '' }}{% endfor %}"
    "{% endmacro %}{% for i in range(99999) %}{{ a(1) }}{% endfor %}",
}
GROWING = {
    "output": f"{LOOP}{{{{ 'x' * 100000 }}}}{ENDS}",
    "a text that doubles": "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a product": "{{ 'x' * 10 ** 18 }}",
}

UNSTOPPABLE = {
    "nested lists are compared": "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
    "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
    "a long list is searched": "{{ ('a' * 10 ** 7 ~ 'b') in ['a' * 10 ** 7 ~ 'c'] * 10 ** 7 }}",
    "a text is searched from its end": "{{ ('a' * 10 ** 7).rfind('ab' + 'a' * 5 * 10 ** 6) }}",
}


class Tokenizer:
    """What a tokenizer of transformers does with a template."""

    def __init__(self, template, name_or_path="a/b"):
        self.template, self.name_or_path = template, name_or_path

    def apply_chat_template(self, messages, **options):
        compiled = ImmutableSandboxedEnvironment().from_string(self.template)
        return compiled.render(messages=messages, **options)


def rendered(template, monkeypatch, **limits):
    for name, limit in limits.items():
        monkeypatch.setattr(chat, name, limit)
    tokenizer = Tokenizer(template)
    limit_templates(tokenizer)
    return tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], end="!")


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_refused(template, monkeypatch):
    began = time.process_time()
    with pytest.raises(TokenizerError) as caught:
        rendered(template, monkeypatch, MAX_S=0.2)

    assert time.process_time() - began < 20
    assert str(caught.value) == (
        "a/b: chat template: it takes more than 0.2 s for one conversation.\n"
        "Set `chat_template` in the recipe, or use a copy of the model with another template."
    )


@pytest.mark.parametrize("template", GROWING.values(), ids=GROWING)
def test_a_template_that_fills_the_memory_is_refused(template, monkeypatch):
    with pytest.raises(TokenizerError, match="takes (more than 0.1 GB|too much memory)"):
        rendered(template, monkeypatch, MAX_GROWTH_BYTES=100_000_000)


def test_a_template_within_the_limits_is_rendered(monkeypatch):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ end }}{% endfor %}"

    assert rendered(template, monkeypatch) == "user: hi!"


def test_a_text_far_longer_than_its_conversation_is_refused(monkeypatch):
    """The tokenizer took 19 GB for what a template of 45 bytes wrote."""
    template = "{{ messages[0].content | center(n) }}"
    # 21 letters are given: role, user, content, hi, end, !
    longest = template.replace("n)", "50168)")

    assert len(rendered(longest, monkeypatch)) == 50_168
    with pytest.raises(TokenizerError) as caught:
        rendered(template.replace("n)", "50169)"), monkeypatch)

    assert str(caught.value) == (
        "a/b: chat template: it makes a text of 50,169 letters of one conversation, the limit is "
        "50,168.\n"
        "Set `chat_template` in the recipe, or use a copy of the model with another template."
    )


def test_a_long_conversation_may_make_a_long_text(monkeypatch):
    """JSON escapes make up to six letters of one."""
    tokenizer = Tokenizer("{{ messages | tojson }}")
    limit_templates(tokenizer)

    text = tokenizer.apply_chat_template([{"role": "user", "content": "<" * 100_000}])

    assert len(text) > 600_000


SAID = [{"role": "user", "content": "reverse ab"}]


def zoo_tokenizer(folder, template):
    base = shutil.copytree(zoo_folder() / "base", folder / "base")
    (base / "chat_template.jinja").write_text(template)
    return load_tokenizer(str(base), "zoo/base")


def test_a_text_far_longer_than_its_conversation_is_not_tokenised(tmp_path, monkeypatch):
    tokenizer = zoo_tokenizer(tmp_path, "{{ messages[0].content | center(10 ** 6) }}")
    tokenised = []
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: tokenised.append(1))

    for said in (SAID, [SAID] * 2):
        with pytest.raises(TokenizerError, match=r"a text of [12],000,000 letters of one conv"):
            tokenizer.apply_chat_template(said, add_generation_prompt=True)
    assert tokenised == []


def test_a_conversation_becomes_texts_or_tokens_as_without_limits(tmp_path):
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    tokenizer = zoo_tokenizer(tmp_path, template)
    text, ids = "reverse ab", tokenizer("reverse ab", add_special_tokens=False)["input_ids"]

    apply = tokenizer.apply_chat_template
    assert apply(SAID, tokenize=False) == text
    assert apply([SAID, SAID], tokenize=False) == [text, text]
    assert apply(SAID)["input_ids"] == ids
    assert apply([SAID, SAID], return_dict=False) == [ids, ids]
    assert apply(SAID, return_assistant_tokens_mask=True)["assistant_masks"] == [1] * len(ids)
    assert apply(SAID, sanitize_control_tokens=True)["input_ids"] == ids


NESTED = "{% for a in messages %}" * 21 + "{% endfor %}" * 21


@pytest.mark.parametrize(
    "template", ["{{ 1 // 0 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", NESTED]
)
def test_an_error_of_python_code_is_one_of_the_template(template, monkeypatch):
    """Scoring, which comes after the merge, expects no other errors of a template."""
    with pytest.raises(TemplateError, match="^(ZeroDivision|Recursion|Syntax)Error: "):
        rendered(template, monkeypatch)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 10 ** (10 ** 10) > 3 }}",
        "{% set n = messages | length + 9 %}{{ n ** (n ** 9) > 3 }}",
        "{% set n = namespace(x=10) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}"
        "{% endfor %}",
    ],
)
def test_a_number_that_takes_c_code_very_long_is_an_error(template, monkeypatch):
    with pytest.raises(TemplateError, match="^OverflowError: a number has more than 1,048,576 b"):
        rendered(template, monkeypatch)


@pytest.mark.parametrize("template", UNSTOPPABLE.values(), ids=UNSTOPPABLE)
def test_c_code_that_no_error_stops_ends_with_the_process(template):
    """While it runs, no other thread does: an error in its thread, or Ctrl-C, does not arrive."""
    program = f"""
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lewis_hub import limits
from lewis_hub.evaluate import chat

chat.MAX_S, chat.LAST_S = 1.0, 2.0
with chat.limited("a/b"):
    ImmutableSandboxedEnvironment().from_string({template!r}).render()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 1
    assert done.stderr.startswith("Timeout (0:00:02)!")
    assert "jinja2" in done.stderr


def test_a_template_may_compute(monkeypatch):
    template = "{{ 2 ** 10 }} {{ 3 * 4 }} {{ 2.0 ** -1 }} {{ 'ab' * 2 }} {{ ('-' * 3) ~ 10 ** -1 }}"

    assert rendered(template, monkeypatch) == "1024 12 0.5 abab ---0.1"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("text", ["'x'.center(10 ** 9)", "'%999999999d' % 1"])
def test_one_call_takes_no_more_memory_than_all(text, monkeypatch):
    before = resident_bytes()
    with pytest.raises(TokenizerError, match="takes too much memory"):
        rendered(f"{{{{ {text} }}}}", monkeypatch, MAX_GROWTH_BYTES=100_000_000)
    assert resident_bytes() - before < 300_000_000


def test_limits_that_are_reached_at_the_end_stop_nothing_afterwards(monkeypatch):
    monkeypatch.setattr(limits, "CHECK_EVERY_S", 0.0)
    n_refused = 0
    for number in range(300):
        monkeypatch.setattr(chat, "MAX_S", number * 1e-5)
        try:
            with limited("a"):
                time.sleep(0.001)
        except TokenizerError:
            n_refused += 1
        sum(range(1000))

    assert 0 < n_refused <= 300
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == limits.WATCH]


@pytest.mark.parametrize("longest", ["256", [256], {"tokens": 256}])
def test_a_longest_text_that_is_no_number_is_refused_when_the_tokenizer_is_loaded(
    longest, tmp_path
):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo_folder() / "base" / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["model_max_length"] = longest
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    with pytest.raises(TokenizerError, match="me/model: `model_max_length` in its tokenizer_conf"):
        load_tokenizer(str(tmp_path), "me/model")
