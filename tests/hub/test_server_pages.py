from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import httpx

from lewis_hub.hub.markdown import render
from lewis_hub.hub.server import Hub

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


def page(hub: Hub, path: str, status: int = 200) -> str:
    answer = httpx.get(hub.url + path, headers={"Accept": "text/html"}, follow_redirects=True)
    assert answer.status_code == status
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "<script" not in answer.text
    assert "<img src=x" not in answer.text
    return answer.text


def test_the_front_page_lists_public_repositories_and_counts_private_ones(hub, api, repo):
    api.create_repo("acme/secret", private=True)

    html = page(hub, "/")

    assert '<a href="/acme/merged">acme/merged</a>' in html
    assert "acme/secret" not in html
    assert "1 private repository is not shown" in html


def test_a_repository_page_shows_the_card_with_its_pictures_at_the_commit(hub, api, repo):
    sha = api.model_info(repo).sha

    html = page(hub, f"/{repo}")

    assert f'<img src="/{repo}/resolve/{sha}/plots/map.png" alt="heat map" />' in html
    assert (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="/{repo}/resolve/{sha}'
        f'/plots/dark.png"><img src="/{repo}/resolve/{sha}/plots/map.png" alt="a map"></picture>'
    ) in html
    assert '<td class="right">1.0</td>' in html
    assert f'<a href="/{repo}/blob/{sha}/lewis/lock.json">the plan</a>' in html
    assert "license:mit" in html


def test_whatever_a_repository_holds_is_shown_as_text(hub, api, repo):
    escaped = "&lt;img src=x onerror=alert(1)&gt;"

    html = page(hub, f"/{repo}")
    listing = page(hub, f"/{repo}/tree/main")
    commits = page(hub, f"/{repo}/commits/main")

    assert f"A title {escaped}" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "javascript:" not in html.replace("[a link](javascript:alert(1))", "")
    assert f"{escaped}.txt</a>" in listing
    assert f"Merge {escaped}</a>" in commits


def test_a_file_page_shows_text_or_a_picture_with_size_and_digest(hub, api, repo):
    text = page(hub, f"/{repo}/blob/main/%3Cimg%20src=x%20onerror=alert(1)%3E.txt")
    picture = page(hub, f"/{repo}/blob/main/plots/map.png")

    assert "<pre>&lt;b&gt;text&lt;/b&gt;</pre>" in text
    assert "11 B" in text
    assert f'<img class="shown" src="/{repo}/resolve/main/plots/map.png"' in picture


def test_commit_and_pull_request_pages_exist_where_the_client_says_they_are(hub, api, repo):
    made = api.create_commit(
        repo,
        [CommitOperationAdd("notes.txt", b"one")],
        commit_message="Add notes",
        commit_description="Because.",
        create_pr=True,
    )

    commit = page(hub, made.commit_url.removeprefix(hub.url))
    request = page(hub, made.pr_url.removeprefix(hub.url))

    files = page(hub, f"/{repo}/tree/refs%2Fpr%2F1")
    assert f'<a href="/{repo}/blob/refs%2Fpr%2F1/notes.txt">notes.txt</a>' in files
    assert '<td class="soft">added</td><td><a href=' in commit
    assert "Pull request, open, by lewis" in request
    assert "Add notes</a>" in request
    assert "<pre>Because.</pre>" in request


def test_a_private_or_missing_repository_has_the_same_page(hub, api):
    api.create_repo("acme/secret", private=True)

    assert page(hub, "/acme/secret", 401) == page(hub, "/acme/nothing", 401)


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
    assert "<picture" not in render(text, image=str, link=str)


def test_a_picture_keeps_no_attribute_but_its_own():
    html = render(
        '<picture><source srcset="d.png" media="(prefers-color-scheme: dark)" />'
        '<img src="l.png" onerror="x()" alt="a &quot; b" width="300"/></picture>',
        image=lambda path: f"/r/{path}",
        link=str,
    )

    assert html == (
        '<p><picture><source media="(prefers-color-scheme: dark)" srcset="/r/d.png">'
        '<img src="/r/l.png" alt="a &quot; b" width="300"></picture></p>\n'
    )


def test_comments_are_left_out_and_those_in_code_are_not():
    shown = render(
        "<!-- begin -->\n## A title\n\na<!-- b\nc -->d `<!-- e -->`\n\nf <!-- g", str, str
    )

    assert shown == (
        "<p></p>\n<h2>A title</h2>\n<p>ad <code>&lt;!-- e --&gt;</code></p>\n<p>f &lt;!-- g</p>\n"
    )
