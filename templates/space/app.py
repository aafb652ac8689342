"""A Space that writes, checks and runs recipes of lewis-hub for small models."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr
import sessions
from bodies import LimitedBodies
from huggingface_hub import get_token
from starlette.middleware import Middleware

MAX_GB = float(os.environ.get("MAX_GB", "4"))
# the machine's own login stands for the user's where this is not a Space
CAN_SIGN_IN = bool(os.environ.get("SPACE_ID") or get_token())
ABOUT = f"""# Merge models with lewis-hub

Write a recipe, check it, merge small models and look at the model card. This Space merges up to
**{MAX_GB:g} GB** of weights, and a step takes at most {sessions.MAX_MINUTES:g} minutes. A recipe
may name repositories of the Hub only. Your files are deleted when you close this tab, or after
six hours without a step."""
SIGN_IN = (
    "To push the result, or to read gated models, sign in before you start: it reloads the page."
)
CSS = """
.gradio-container { width: 100%; min-width: 0; max-width: 1000px !important; margin: 0 auto; }
.recipe textarea, .log textarea { font-family: ui-monospace, monospace; font-size: 13px; }
.wide { overflow-x: auto; max-width: 100%; }
.wide table { border-collapse: collapse; font-size: 13px; }
.wide th, .wide td { border: 1px solid var(--border-color-primary); padding: 4px 8px;
    text-align: left; white-space: nowrap; }
.wide img { max-width: 100%; height: auto; }
.wide pre { overflow-x: auto; padding: 8px; background: var(--background-fill-secondary); }
.problem { color: var(--error-text-color, #b91c1c); white-space: pre-wrap; }
.line { margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { display: none !important; }
@media (max-width: 640px) {
    .tab-container button { padding: 0 8px !important; }
}
"""
FONT = ["system-ui", "sans-serif"]
THEME = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"])
NO_RECIPE = "There is no recipe yet: write or paste one under “1 Recipe”."


def write(
    base: str, experts: str, tasks: str, repo: str, request: gr.Request
) -> tuple[object, str]:
    """Write a recipe; returns it and a line about it."""
    asked = {
        "base": base.strip(),
        "experts": experts.split(),
        "tasks": tasks.split(),
        "repo": repo.strip() or None,
    }
    last = _last(sessions.run("init", _session(request), asked))
    if problem := last.get("problem"):
        return gr.skip(), _problem(problem)
    note = last["result"]["note"]
    return last["result"]["recipe"], _lines([f"Note: {note}"] if note else ["Recipe written."])


def check(recipe: str, request: gr.Request, token: gr.OAuthToken | None) -> str:
    """Check a recipe; returns its sources as a table, and what was found."""
    if not recipe.strip():
        return _problem(NO_RECIPE)
    asked = {"recipe": recipe}
    last = _last(sessions.run("check", _session(request), asked, _text(token)))
    if problem := last.get("problem"):
        return _problem(problem)
    return f'<div class="wide">{last["result"]["table"]}</div>{_lines(last["result"]["lines"])}'


def merge(
    recipe: str, score: bool, request: gr.Request, token: gr.OAuthToken | None
) -> Iterator[tuple[str, str, str]]:
    """Merge; yields the log, the result and the card."""
    if not recipe.strip():
        yield "", _problem(NO_RECIPE), ""
        return
    log: dict[str, str] = {"Started": ""}
    yield _log(log), _lines(["Merging …"]), ""
    asked = {"recipe": recipe, "score": score}
    for event in sessions.run("merge", _session(request), asked, _text(token)):
        if "stage" in event:
            log[event["stage"]] = f": {event['done']:.0%}"
        elif "say" in event:
            log[event["say"]] = ""
        elif problem := event.get("problem"):
            yield _log(log), _problem(problem), ""
            return
        else:
            result = event["result"]
            scores = f'<div class="wide">{result["scores"]}</div>' if result["scores"] else ""
            done = _lines(["Merged. The card is under “4 Card”."])
            yield _log(log), done + scores, f'<div class="wide">{result["card"]}</div>'
            return
        yield _log(log), _lines(["Merging …"]), ""


def pack(request: gr.Request) -> tuple[gr.File, str]:
    """Put the merged model into a zip file for download."""
    folder = sessions.folder_of(_session(request))
    if not (folder / "merged").is_dir():
        return gr.File(visible=False), _problem("There is no merged model yet: merge first.")
    archive = shutil.make_archive(str(folder / "merged"), "zip", folder / "merged")
    return gr.File(archive, visible=True), ""


def push(repo: str, private: bool, request: gr.Request, token: gr.OAuthToken | None) -> str:
    """Publish the merged model in a repo of the signed-in user; returns its address."""
    if token is None:
        return _problem("Sign in first.")
    asked = {"repo": repo.strip(), "private": private}
    last = _last(sessions.run("push", _session(request), asked, token.token))
    if problem := last.get("problem"):
        return _problem(problem)
    return _lines([last["result"]["published"]])


def leave(request: gr.Request) -> None:
    """Forget a tab that was closed."""
    sessions.close(_session(request))


def _session(request: gr.Request) -> str:
    """The tab that a request comes from; a page of another site has none."""
    if not sessions.is_own_page(request.headers):
        raise gr.Error("This is only for this Space's own page.")
    return str(request.session_hash)


def _text(token: gr.OAuthToken | None) -> str | None:
    return token.token if token else None


def _last(events: Iterator[sessions.Event]) -> sessions.Event:
    *_, last = events
    return last


def _log(log: dict[str, str]) -> str:
    return "\n".join(f"{title}{share}" for title, share in log.items())


def _lines(lines: list[str]) -> str:
    return "".join(f'<div class="line">{escape(line)}</div>' for line in lines)


def _problem(text: str) -> str:
    return f'<div class="problem">{escape(text)}</div>'


def build() -> gr.Blocks:
    """The page; steps of all users wait in one queue, and one merge runs at a time."""
    private = {"api_visibility": "private"}
    waits = {**private, "concurrency_id": "merge", "concurrency_limit": 1}
    short = {**private, "concurrency_id": "short", "concurrency_limit": 2}
    # results of a closed tab are deleted with it, and copies for download after an hour
    with gr.Blocks(title="lewis-hub", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(ABOUT)
        if CAN_SIGN_IN:
            gr.Markdown(SIGN_IN)
            gr.LoginButton(size="sm", elem_id="sign-in")
        with gr.Tab("1 Recipe", id="recipe"):
            base = gr.Textbox(label="Base model", placeholder="owner/name", elem_id="base")
            experts = gr.Textbox(
                label="Experts, fine-tuned from the base, one per line", lines=2, elem_id="experts"
            )
            tasks = gr.Textbox(
                label="lm-eval tasks, one per expert in their order (optional)",
                lines=2,
                elem_id="tasks",
            )
            repo = gr.Textbox(label="Publish as owner/name (optional)", elem_id="repo")
            start = gr.Button("Write the recipe", variant="primary", elem_id="write")
            written = gr.HTML(elem_id="written")
            recipe = gr.Textbox(
                label="Recipe: edit it, or paste one, also a mergekit configuration",
                lines=16,
                max_lines=40,
                elem_id="yaml",
                elem_classes="recipe",
                buttons=["copy"],
            )
        with gr.Tab("2 Check", id="check"):
            gr.Markdown("Reads headers and small files of the models, and no weights.")
            checks = gr.Button("Check the recipe", variant="primary", elem_id="check")
            checked = gr.HTML(elem_id="checked")
        with gr.Tab("3 Merge", id="merge"):
            score = gr.Checkbox(
                label="Score up to 50 items of each task (slow on a CPU)", elem_id="score"
            )
            merges = gr.Button("Merge", variant="primary", elem_id="merge")
            merged = gr.HTML(elem_id="merged")
            log = gr.Textbox(label="Log", lines=8, elem_id="log", elem_classes="log")
        with gr.Tab("4 Card", id="card"):
            packs = gr.Button("Make a zip file of the model", elem_id="pack")
            archive = gr.File(
                label="The merged model", elem_id="archive", interactive=False, visible=False
            )
            packed = gr.HTML(elem_id="packed")
            if CAN_SIGN_IN:
                target = gr.Textbox(label="Push to owner/name", elem_id="target")
                hidden = gr.Checkbox(label="As a private repo", value=True, elem_id="private")
                pushes = gr.Button("Push to the Hub", elem_id="push")
                pushed = gr.HTML(elem_id="pushed")
                pushes.click(push, [target, hidden], pushed, **short)
            card = gr.HTML("The card appears here after a merge.", elem_id="card")
        start.click(write, [base, experts, tasks, repo], [recipe, written], **short)
        checks.click(check, recipe, checked, **short)
        merges.click(merge, [recipe, score], [log, merged, card], **waits)
        packs.click(pack, None, [archive, packed], **short)
        page.unload(leave)
    return page.queue(max_size=20)


if __name__ == "__main__":
    # a Space is stopped by SIGTERM, which by itself would leave processes and folders behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    build().launch(
        theme=THEME,
        css=CSS,
        ssr_mode=False,
        quiet=True,
        footer_links=[],
        run_history=False,
        mcp_server=False,
        share=False,
        blocked_paths=[str(Path(__file__).parent)],
        app_kwargs={"middleware": [Middleware(LimitedBodies)]},
    )
