from __future__ import annotations

import time

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import httpx

from lewis_hub.localhub.hub import Hub
from lewis_hub.localhub.pages import MAX_LINES, render_markdown

EVIL = "<img src=x onerror=alert(1)>"
PNG = b"\x89PNG\r\n\x1a\n\x00fake"
CARD = f"""---
license: mit
tags: ["{EVIL}"]
---
# A title {EVIL}

<script>alert(1)</script>

[a link](javascript:alert(1)) and [the plan](lewis/lock.json)

| n | value |
|---|---:|
| a | 1.0 |

![heat map](plots/map.png)

<picture>
  <source media="(prefers-color-scheme: dark)" srcset="plots/dark.png">
  <img alt="a map" src="plots/map.png">
</picture>
"""


@pytest.fixture
def repo(hub: Hub, api: HfApi) -> str:
    api.create_repo("acme/merged")
    api.create_commit(
        "acme/merged",
        [
            CommitOperationAdd("README.md", CARD.encode()),
            CommitOperationAdd("plots/map.png", PNG),
            CommitOperationAdd(f"{EVIL}.txt", b"<b>text</b>"),
        ],
        commit_message=f"Merge {EVIL}",
    )
    return "acme/merged"


def page(hub: Hub, path: str) -> str:
    answer = httpx.get(hub.url + path, headers={"Accept": "text/html"}, follow_redirects=True)
    assert answer.status_code == 200
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "<script" not in answer.text
    assert "<img src=x" not in answer.text
    return answer.text


def test_a_repository_page_shows_the_card_with_its_pictures_at_the_commit(hub, api, repo):
    sha = api.model_info(repo).sha

    html = page(hub, f"/{repo}")

    assert f'<img src="/{repo}/resolve/{sha}/plots/map.png" alt="heat map" />' in html
    assert (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="/{repo}/resolve/{sha}'
        f'/plots/dark.png"><img src="/{repo}/resolve/{sha}/plots/map.png" alt="a map"></picture>'
    ) in html
    assert '<td class="right">1.0</td>' in html
    assert f'<a href="/{repo}/resolve/{sha}/lewis/lock.json">the plan</a>' in html


def test_whatever_a_repository_holds_is_shown_as_text(hub, api, repo):
    escaped = "&lt;img src=x onerror=alert(1)&gt;"

    html = page(hub, f"/{repo}")

    assert f"A title {escaped}" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "javascript:" not in html.replace("[a link](javascript:alert(1))", "")
    assert f"{escaped}.txt</a>" in html
    assert f"Merge {escaped}</a>" in html


def test_the_addresses_that_the_client_gives_out_show_the_repository_there(hub, api, repo):
    made = api.create_commit(
        repo,
        [CommitOperationAdd("notes.txt", b"one")],
        commit_message="Add notes",
        commit_description="Because.",
        create_pr=True,
    )

    for address in (made.commit_url, made.pr_url, f"{hub.url}/{repo}/tree/refs%2Fpr%2F1"):
        html = page(hub, address.removeprefix(hub.url))
        assert f'<a href="/{repo}/resolve/{made.oid}/notes.txt">notes.txt</a>' in html
        assert "Add notes</a>" in html
    assert "notes.txt" not in page(hub, f"/{repo}/commits/main")


def test_a_private_or_gated_repository_has_no_page_without_a_token(hub, api, repo):
    api.create_repo("acme/secret", private=True)
    api.update_repo_settings(repo, gated="auto")

    private, gated, missing = (
        httpx.get(f"{hub.url}/{name}") for name in ("acme/secret", repo, "acme/nothing")
    )

    assert (private.status_code, private.text) == (missing.status_code, missing.text)
    assert gated.status_code == 401
    assert "A title" not in gated.text


def test_files_come_with_a_type_that_no_browser_runs(hub, api, repo):
    api.upload_file(
        path_or_fileobj=b"<script>alert(1)</script>", path_in_repo="x.html", repo_id=repo
    )

    answer = httpx.get(f"{hub.url}/{repo}/resolve/main/x.html")

    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "text",
    [
        '<picture><source media="(prefers-color-scheme: dark)" srcset="javascript:x">'
        '<img src="a.png"></picture>',
        '<picture onclick="x"><source media="(prefers-color-scheme: dark)" srcset="a.png">'
        '<img src="a.png"></picture>',
        '<picture><source media="print" srcset="a.png"><img src="a.png"></picture>',
    ],
)
def test_a_picture_that_is_not_exactly_the_pattern_stays_text(text):
    assert "<picture" not in render_markdown(text, str)


def test_a_picture_keeps_no_attribute_but_its_own():
    html = render_markdown(
        '<picture><source srcset="d.png" media="(prefers-color-scheme: dark)" />'
        '<img src="l.png" onerror="x()" alt="a &quot; b" width="300"/></picture>',
        lambda path: f"/r/{path}",
    )

    assert html == (
        '<p><picture><source media="(prefers-color-scheme: dark)" srcset="/r/d.png">'
        '<img src="/r/l.png" alt="a &quot; b" width="300"></picture></p>\n'
    )


def test_comments_are_left_out_and_those_in_code_are_not():
    shown = render_markdown(
        "<!-- begin -->\n## A title\n\na<!-- b\nc -->d `<!-- e -->`\n\nf <!-- g", str
    )

    assert shown == (
        "<p></p>\n<h2>A title</h2>\n<p>ad <code>&lt;!-- e --&gt;</code></p>\n<p>f &lt;!-- g</p>\n"
    )


@pytest.mark.parametrize(
    "card",
    [
        "<!--" * 60_000,
        "![[" * 60_000,
        f"a <picture><source {' ' * 60_000}b",
        f'a <picture><source {"a" * 60_000}><img src="a"></picture>',
    ],
    ids=["comments", "brackets", "a picture", "an attribute"],
)
def test_a_card_is_rendered_in_linear_time(card):
    began = time.process_time()
    assert card[:20].replace("<", "&lt;")[:10] in render_markdown(card, str)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_card_of_very_many_lines_is_plain_text(end):
    quoted = f"{'> ' * 50}a{end}" + f"a{end}" * MAX_LINES
    assert render_markdown(quoted, str) == f"<pre>{quoted.replace('>', '&gt;')}</pre>"


def test_a_card_of_brackets_is_plain_text():
    assert render_markdown("[<b>" * 30_000, str) == f"<pre>{'[&lt;b&gt;' * 30_000}</pre>"
