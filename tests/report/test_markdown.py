from __future__ import annotations

import html
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lewis_hub.report import markdown

RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "a | b || c",
    "`code` ``more``",
    "[click](javascript:alert(1))",
    "![x](http://evil/y.png)",
    "**bold** __too__ *it* _that_ ~~no~~",
    "# heading",
    "- item",
    "1. item",
    "> quote",
    "&lt;b&gt; &amp;",
    "\\`escape\\|",
    "$x^2$ @user :smile:",
    "<!-- comment",
    "a\n\n---\nb",
    "{{ 7 * 7 }} {% raw %}",
    "http://evil www.evil",
    "__init__ _a_ a_b",
]


def visible(rendered: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", rendered)).strip()


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("show", [markdown.text, markdown.code])
def test_hostile_strings_show_as_they_are(hostile, show):
    for before in ("", "On ", "- "):
        rendered = RENDERER.render(f"{before}{show(hostile)}")
        tags = {tag.strip("</>") for tag in re.findall(r"<[^>]*>", rendered)}
        assert tags <= {"p", "code", "ul", "li"}
        assert rendered.count("<li>") == before.count("- ")
        expected = before.removeprefix("- ") + " ".join(hostile.split())
        assert visible(rendered) == expected


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_strings_stay_in_their_cell(hostile):
    row = [markdown.text(hostile), markdown.code(hostile), "end"]

    rendered = RENDERER.render(markdown.table(["a", "b", "c"], [row], right=[2]))

    cells = re.findall(r"<td[^>]*>(.*?)</td>", rendered, flags=re.DOTALL)
    one_line = " ".join(hostile.split())
    assert [visible(cell) for cell in cells] == [one_line, one_line, "end"]
    assert '<td style="text-align:right">end</td>' in rendered


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=30))
def test_every_text_shows_as_it_is(value):
    rendered = RENDERER.render("On " + markdown.text(value))

    assert visible(rendered) == f"On {' '.join(value.split())}".strip()
    assert rendered.startswith("<p>On ") or not value.strip()
    assert rendered.count("<") == 2


def test_what_cannot_be_seen_is_dropped():
    assert markdown.text("safe\u202egpj.exe\u0000\u200b") == "safegpj.exe"


def test_plain_names_stay_readable():
    assert markdown.text("exact_match (strict-match), 5 %") == "exact_match (strict-match), 5 %"
    assert markdown.code("owner/Llama_3.1-8B") == "`owner/Llama_3.1-8B`"


@pytest.mark.parametrize(
    "url",
    [
        None,
        "",
        "javascript:alert(1)",
        "data:text/html,x",
        "LICENSE",
        "//evil",
        "http://",
        "http://[bad",
        " jAvAsCrIpT:alert(1)",
    ],
)
def test_only_web_addresses_become_links(url):
    assert markdown.link("label", url) == "label"


def test_an_address_cannot_leave_its_link():
    address = 'https://x/a)b>c<d "e" `f` | [g](h)\\'

    linked = markdown.link("label", address)
    rendered = RENDERER.render(linked)

    assert linked == (
        "[label](<https://x/a%29b%3Ec%3Cd%20%22e%22%20%60f%60%20%7C%20[g]%28h%29%5C>)"
    )
    assert rendered.count("<a ") == 1
    assert visible(rendered) == "label"


def test_a_fence_is_longer_than_what_it_holds():
    content = "a: 1\n```\n<b>out?</b>\n````\rrest\x0cof"

    rendered = RENDERER.render(markdown.fenced(content, "yaml"))

    assert markdown.fenced(content, "yaml").startswith("`````yaml\na: 1\n")
    assert rendered.count("<pre>") == 1
    assert "&lt;b&gt;out?&lt;/b&gt;" in rendered
    assert rendered.endswith("</code></pre>\n")


def test_an_attribute_is_closed_by_nobody_but_us():
    assert markdown.attribute('x" onerror="y\n<b>') == "x&quot; onerror=&quot;y &lt;b&gt;"


def test_a_sentence_of_text_and_code_becomes_html():
    sentence = f"On {markdown.code('a_b')} ({markdown.text('<x> & *y*')}): p < 0.05."

    assert markdown.as_html(sentence) == ("On <code>a_b</code> (&lt;x&gt; &amp; *y*): p &lt; 0.05.")
    assert markdown.as_html("plain") == "plain"
    assert markdown.as_html("`a<b`") == "<code>a&lt;b</code>"


def test_lines_keep_their_breaks_and_lose_what_is_invisible():
    assert markdown.visible_lines("a\r\n\tb\u202ec\x00") == "a\n    bc"
    assert markdown.visible_lines("\u0646\u200c\u0645") == "\u0646\u200c\u0645"
