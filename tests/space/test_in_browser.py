"""The Space as a user sees it: Gradio in a process of its own, clicked through in Chromium.

LEWIS_HUB_SPACE names a Python that has the extra `space`; without it, this Python is used.
"""

import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from zoo_hub import put_zoo

from tests.report.chromium import PROGRAM, browser, found

APP = Path(__file__).parents[2] / "templates" / "space" / "app.py"
PYTHON = os.environ.get("LEWIS_HUB_SPACE") or (
    sys.executable if importlib.util.find_spec("gradio") else None
)
pytestmark = [
    pytest.mark.slow,  # starts a browser and a server
    pytest.mark.skipif(PROGRAM is None, reason="no chromium: apt-get install chromium"),
    pytest.mark.skipif(PYTHON is None, reason="no gradio: pip install '.[space]'"),
]
SIGNED_IN = "mock-oauth-token-for-local-dev"  # which Gradio gives where it does not run in a Space
CHECK, MERGE, CARD = 1, 2, 3  # tabs
WIDER = "document.documentElement.scrollWidth > innerWidth"


@contextmanager
def running(hub, folder, **variables):
    """The app on a free port: its address, and its log when it has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "tabs").mkdir()
    own = {"GRADIO_SERVER_PORT": str(port), "TMPDIR": str(folder / "tabs"), **variables}
    address = f"http://127.0.0.1:{port}/"
    with (folder / "app.log").open("w") as log:
        words = [PYTHON, APP]
        app = subprocess.Popen(
            words, cwd=folder, env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            until(lambda: answers(address) or app.poll() is not None)
            assert app.poll() is None, (folder / "app.log").read_text()
            yield address
        finally:
            app.terminate()
            app.wait()


def answers(address):
    try:
        with urllib.request.urlopen(address) as answer:
            return answer.status == 200
    except OSError:
        return False


def until(holds, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def text_of(page, selector):
    return page.value(f"{found(selector)}.innerText")


def says(page, selector, text, seconds=120):
    try:
        page.wait(f"{found(selector)}?.innerText.includes({text!r})", seconds)
    except TimeoutError:
        pytest.fail(f"{selector} shows {text_of(page, selector)!r}")


def show(page, tab, selector):
    page.click("button[role=tab]", tab)
    page.wait(f"{found(selector)}?.offsetParent")


def elsewhere(page, address):
    """What a page asked of other servers."""
    return [one for one in page.requests if one.startswith("http") and not one.startswith(address)]


def open_app(page, address, **look):
    page.open(address, **look)
    page.wait(found("#write"))


def sign_in(page, user):
    """Press the button until the page that it leads to is there; the first is deaf for a while."""

    def is_signed_in():
        if text_of(page, "#sign-in") == f"Logout ({user})":
            return True
        page.click("#sign-in")
        time.sleep(3)
        page.wait(found("#sign-in"))
        return False

    until(is_signed_in)


def test_a_user_writes_checks_merges_looks_downloads_and_pushes(hub, tmp_path):
    put_zoo(hub)
    hub.add_token(SIGNED_IN, hub.user, "write", ("*",))

    with running(hub, tmp_path, HF_TOKEN=hub.write_token) as address, browser() as page:
        open_app(page, address, width=1280)
        sign_in(page, hub.user)

        page.write("#base textarea, #base input", "zoo/base")
        page.write("#experts textarea", "zoo/expert-reverse\nzoo/expert-cipher")
        page.click("#write")
        says(page, "#written", "Note: the guide is `magnitude`, which reads only weights")
        recipe = page.value(f"{found('#yaml textarea')}.value")
        assert 'base_model: "zoo/base"' in recipe
        assert "  name: magnitude" in recipe

        show(page, CHECK, "button#check")
        page.click("button#check")
        says(page, "#checked", "No problems found.")
        assert "1,157,504" in text_of(page, "#checked")
        assert "apache-2.0" in text_of(page, "#checked")

        show(page, MERGE, "button#merge")
        page.click("button#merge")
        says(page, "#merged", "Merged. The card is under “4 Card”.")
        assert "Merging: 100%" in page.value(f"{found('#log textarea')}.value")

        show(page, CARD, "#card")
        says(page, "#card", "by TIES-Merging, without training")
        assert page.value(
            "[...document.querySelectorAll('#card img')].every(one => one.naturalWidth > 300)"
        )
        page.click("#pack")
        says(page, "#archive", "\n.zip\n")  # its name and its ending are apart
        page.write("#target textarea, #target input", f"{hub.user}/from-a-space")
        page.click("#push")
        says(page, "#pushed", f"{hub.user}/from-a-space")

        page.resize(390)
        for tab, selector in enumerate(("#write", "button#check", "button#merge", "#card")):
            show(page, tab, selector)
            assert not page.value(WIDER), selector

        assert elsewhere(page, address) == []
        (tabs,) = (tmp_path / "tabs").glob("lewis-hub-space-*")
        assert any(tabs.iterdir())
        page.open(f"{hub.url}/{hub.user}/from-a-space")  # the tab leaves the app
        until(lambda: not any(tabs.iterdir()))

    assert hub.api().model_info(f"{hub.user}/from-a-space").private
    log = (tmp_path / "app.log").read_text()
    assert SIGNED_IN not in log
    assert hub.write_token not in log
    assert list((tmp_path / "tabs").glob("lewis-hub-space-*")) == []


def test_a_folder_of_the_machine_in_a_pasted_recipe_is_refused(hub, tmp_path):
    put_zoo(hub)
    pasted = f"merge_method: linear\nmodels: [zoo/base, {tmp_path}]\n"

    with running(hub, tmp_path) as address, browser() as page:
        open_app(page, address)
        page.write("#yaml textarea", pasted)
        steps = (CHECK, "button#check", "#checked"), (MERGE, "button#merge", "#merged")
        for tab, button, shown in steps:
            show(page, tab, button)
            page.click(button)
            says(page, shown, f"`{tmp_path}` is not a repository of the Hub")


def test_a_page_of_another_site_gets_nothing_with_the_login_of_its_visitor(hub, tmp_path):
    put_zoo(hub)
    hub.add_token(SIGNED_IN, hub.user, "write", ("*",))
    hub.api().update_repo_settings("zoo/base", private=True)
    recipe = "{base_model: zoo/base, models: [zoo/expert-cipher], merge_method: linear}"
    own = {"Host": "me.hf.space", "Origin": "https://me.hf.space", "Sec-Fetch-Site": "same-origin"}
    other = {**own, "Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}

    with running(hub, tmp_path, HF_TOKEN=hub.write_token) as address:
        cookie = login(address)
        seen, refused = (
            result_of(address, "check", [recipe], {**headers, "Cookie": cookie})
            for headers in (own, other)
        )

    assert "zoo/base" in json.dumps(seen)
    assert "only for this Space" in json.dumps(refused)
    assert "zoo/base" not in json.dumps(refused)


def login(address):
    """The cookie of a user who is signed in; browsers keep it for encrypted addresses only."""
    answer = httpx2.get(f"{address}login/callback", headers={"Host": "me.hf.space"})
    return answer.headers["set-cookie"].partition(";")[0]


def result_of(address, name, values, headers):
    """What a function of the page answers to a request that a browser would send."""
    functions = httpx2.get(f"{address}config").json()["dependencies"]
    (number,) = (one["id"] for one in functions if one["api_name"] == name)
    asked = {"data": values, "fn_index": number, "session_hash": secrets.token_hex(8)}
    join = f"{address}gradio_api/queue/join"
    httpx2.post(join, json=asked, headers=headers).raise_for_status()
    data = f"{address}gradio_api/queue/data?session_hash={asked['session_hash']}"
    with httpx2.stream("GET", data, headers=headers, timeout=120) as answer:
        for line in answer.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                return message["output"]
    raise AssertionError("the stream ended")


def test_the_app_takes_no_files_and_no_large_body(hub, tmp_path):
    with running(hub, tmp_path) as address:
        upload, join = f"{address}gradio_api/upload", f"{address}gradio_api/queue/join"
        file = httpx2.post(upload, files={"files": b"a"})
        body = httpx2.post(join, content=b'"' + b"a" * (8 << 20) + b'"')

    assert (file.status_code, body.status_code) == (415, 413)
    assert list((tmp_path / "tabs").glob("gradio/*/*")) == []


def test_without_a_login_nobody_signs_in_and_nothing_of_another_site_is_loaded(hub, tmp_path):
    with running(hub, tmp_path) as address, browser() as page:
        open_app(page, address, width=390)
        assert not page.value(f"Boolean({found('#sign-in')})")
        assert not page.value(WIDER)
        show(page, MERGE, "button#merge")
        page.click("button#merge")
        says(page, "#merged", "There is no recipe yet: write or paste one under “1 Recipe”.")

        assert elsewhere(page, address) == []
        assert page.complaints == []
