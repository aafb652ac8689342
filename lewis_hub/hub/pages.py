"""The embedded Hub's plain web page: repositories, files, commits, and the rendered card."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from itertools import islice
from typing import Any
from urllib.parse import quote

import jinja2
import yaml
from markupsafe import Markup
from starlette.responses import HTMLResponse, Response

from lewis_hub.hub import answers, markdown
from lewis_hub.hub.access import Refusal, check_reads
from lewis_hub.hub.call import Call
from lewis_hub.hub.card import card_body, card_metadata, card_text, tags
from lewis_hub.hub.contents import SHOWN_IMAGES
from lewis_hub.hub.discussions import discussions_of
from lewis_hub.hub.store import KINDS, Commit, File, Repo

SHOWN_BYTES = 256 * 2**10
NEWEST = 5


def front(call: Call) -> Response:
    """All repositories that need no token."""
    kinds, hidden = [], 0
    for kind in KINDS:
        rows = []
        for repo in call.store.repos(kind):
            if repo.private:
                hidden += 1
                continue
            info = answers.repo_info(call.store, repo, call.commit(repo, "main"), blobs=False)
            row = {"id": repo.id, "url": _home(repo), "gated": repo.gated, "tags": info["tags"]}
            rows.append(row | {"size": size(info["usedStorage"]), "date": info["lastModified"]})
        kinds.append((kind, sorted(rows, key=lambda row: row["date"], reverse=True)))
    return _page(call, "front.html", {"title": "lewis-hub", "kinds": kinds, "hidden": hidden})


def repository(call: Call) -> Response:
    """A repository's card, files and newest commits."""
    repo = call.seen_repo()
    commit = call.commit(repo)
    text = card_text(call.store, commit)
    if repo.gated:
        text = None if _is_refused(call, repo) else text
    card = text and markdown.render(
        card_body(text),
        image=lambda path: f"{_home(repo)}/resolve/{commit.sha}/{quote(path, safe='/%')}",
        link=lambda path: f"{_home(repo)}/blob/{commit.sha}/{quote(path, safe='/%')}",
    )
    shown = {
        "tab": "card",
        "card": card and Markup(card),  # noqa: S704 - made by markdown.render, which escapes
        "rows": _rows(call, repo, commit, ""),
        "commits": list(islice(call.store.history(repo, commit), NEWEST)),
    }
    return _repo_page(call, "card.html", repo, shown)


def folder(call: Call) -> Response:
    """What lies in a folder."""
    repo = call.seen_repo()
    path = call.parts.get("path", "").strip("/")
    rows = _rows(call, repo, call.commit(repo), path)
    if path and not rows:
        raise Refusal(404, f"There is no folder {path} here", "EntryNotFound")
    crumbs = _crumbs(call, repo, path)
    return _repo_page(call, "folder.html", repo, {"tab": "files", "rows": rows, "crumbs": crumbs})


def file(call: Call) -> Response:
    """A file: its text or picture, sizes and digest."""
    repo = call.read_repo()
    path = call.parts["path"]
    found = call.commit(repo).files.get(path)
    if found is None:
        raise Refusal(404, f"There is no file {path} here", "EntryNotFound")
    text, why = None, f"larger than {size(SHOWN_BYTES)}"
    if found.size_bytes <= SHOWN_BYTES:
        try:
            text = call.store.blobs.read(found.sha256).decode()
        except UnicodeDecodeError:
            why = "not text"
    shown = {
        "tab": "files",
        "crumbs": _crumbs(call, repo, path),
        "path": path,
        "raw": f"{_home(repo)}/resolve/{quote(call.parts['revision'], safe='')}/{quote(path)}",
        "image": path.lower().endswith(SHOWN_IMAGES),
        "text": text,
        "why": why,
        **_facts(found),
    }
    return _repo_page(call, "file.html", repo, shown)


def commits(call: Call) -> Response:
    """The history of a revision."""
    repo = call.seen_repo()
    history = list(call.store.history(repo, call.commit(repo)))
    return _repo_page(call, "commits.html", repo, {"tab": "commits", "commits": history})


def commit(call: Call) -> Response:
    """A commit and the files that it changed."""
    repo = call.seen_repo()
    shown = call.commit(repo)
    before = call.commit(repo, shown.parents[0]).files if shown.parents else {}
    changes = []
    for path in sorted({*before, *shown.files}):
        old, new = before.get(path), shown.files.get(path)
        if old == new:
            continue
        what = "added" if old is None else "deleted" if new is None else "changed"
        url = f"{_home(repo)}/blob/{shown.sha}/{quote(path)}" if new else None
        bytes_now = size(new.size_bytes) if new else ""
        changes.append({"what": what, "path": path, "url": url, "size": bytes_now})
    return _repo_page(
        call, "commit.html", repo, {"tab": "commits", "commit": shown, "changes": changes}
    )


def discussion(call: Call) -> Response:
    """A pull request or discussion."""
    repo = call.seen_repo()
    number = call.parts["number"]
    item = next((d for d in discussions_of(call.store, repo) if str(d["num"]) == number), None)
    if item is None:
        raise Refusal(404, f"There is no discussion {number} here", "EntryNotFound")
    proposed = []
    if item["base"]:
        for made in call.store.history(repo, call.commit(repo, f"refs/pr/{number}")):
            if made.sha == item["base"]:
                break
            proposed.append(made)
    shown = {"tab": item["num"], "item": item, "commits": proposed}
    return _repo_page(call, "discussion.html", repo, shown)


def style(_call: Call) -> Response:
    """The one style sheet."""
    return Response(_source("style.css"), media_type="text/css")


def icon(_call: Call) -> Response:
    """What a browser shows in the tab."""
    return Response(_source("icon.svg"), media_type="image/svg+xml")


def refusal(refused: Refusal, endpoint: str) -> HTMLResponse:
    """What a browser is told instead of JSON."""
    shown = {"title": refused.message, "status": refused.status, "message": refused.message}
    html = _templates().get_template("refusal.html").render(endpoint=endpoint, **shown)
    return HTMLResponse(html, refused.status, {"Content-Security-Policy": policy("")})


def size(n_bytes: int) -> str:
    """A size as people read it."""
    amount = float(n_bytes)
    for unit in ("B", "KB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.1f} GB"


def policy(storage_url: str) -> str:
    """The Content-Security-Policy of every page: no scripts, pictures from this Hub only."""
    return (
        f"default-src 'none'; style-src 'self'; img-src 'self' {storage_url}".rstrip()
        + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _repo_page(call: Call, template: str, repo: Repo, shown: Mapping[str, Any]) -> Response:
    revision = call.parts.get("revision", "main")
    main = call.commit(repo, "main")
    try:
        metadata = card_metadata(card_text(call.store, main))
    except yaml.YAMLError:
        metadata = {}
    common = {
        "title": repo.id,
        "repo": repo,
        "home": _home(repo),
        "revision": revision,
        "rev": quote(revision, safe=""),
        "tags": tags(metadata, main),
        "discussions": discussions_of(call.store, repo),
    }
    return _page(call, template, common | dict(shown))


def _page(call: Call, template: str, shown: Mapping[str, Any]) -> Response:
    html = _templates().get_template(template).render(endpoint=call.endpoint, **shown)
    headers = {
        "Content-Security-Policy": policy(call.hub.storage_url),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(html, headers=headers)


def _rows(call: Call, repo: Repo, commit: Commit, path: str) -> list[dict[str, Any]]:
    entries = answers.tree(commit.files, path, recursive=False)
    answers.with_last_commits(entries, call.store.history(repo, commit))
    rows = []
    for entry in sorted(entries, key=lambda entry: (entry["type"] == "file", entry["path"])):
        is_folder = entry["type"] == "directory"
        view = "tree" if is_folder else "blob"
        revision = quote(call.parts.get("revision", "main"), safe="")
        row = {"name": entry["path"].rpartition("/")[2], "folder": is_folder}
        row["url"] = f"{_home(repo)}/{view}/{revision}/{quote(entry['path'])}"
        row |= {} if is_folder else _facts(commit.files[entry["path"]])
        rows.append(row | {"commit": entry["lastCommit"]})
    return rows


def _facts(found: File) -> dict[str, Any]:
    kept = "LFS" if found.lfs else "git"
    return {"size": size(found.size_bytes), "kept": kept, "sha256": found.sha256}


def _crumbs(call: Call, repo: Repo, path: str) -> list[dict[str, str]]:
    parts = path.split("/") if path else []
    tree = f"{_home(repo)}/tree/{quote(call.parts['revision'], safe='')}"
    return [
        {"name": name, "url": f"{tree}/{quote('/'.join(parts[: depth + 1]))}"}
        for depth, name in enumerate(parts)
    ]


def _home(repo: Repo) -> str:
    return f"/datasets/{repo.id}" if repo.kind == "datasets" else f"/{repo.id}"


def _is_refused(call: Call, repo: Repo) -> bool:
    try:
        check_reads(call.grant, repo)
    except Refusal:
        return True
    return False


def _source(name: str) -> str:
    return resources.files("lewis_hub.templates").joinpath("hub", name).read_text("utf-8")


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["moment"] = lambda date: date[:16].replace("T", " ")
    return environment
