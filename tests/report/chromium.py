"""Headless Chromium over its debugging pipe: what a page shows, asks for and complains of."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
READS, WRITES = 3, 4  # the descriptors on which Chromium speaks
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-extensions "
    "--hide-scrollbars --force-color-profile=srgb --remote-debugging-pipe about:blank"
)


class Page:
    """One tab; `requests` and `complaints` are of all that it loaded so far."""

    def __init__(self, answers: int, writes: int) -> None:
        self._answers, self._writes = answers, writes
        self._buffer, self._asked = b"", 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = next(
            one["targetId"]
            for one in self._ask("Target.getTargets")["targetInfos"]
            if one["type"] == "page"
        )
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    _session: str | None = None

    def open(self, address: str, *, dark: bool = False, width: int = 1100) -> None:
        """Load a page and wait until its pictures are there."""
        self._ask("Page.navigate", url="about:blank")  # or the last page would load pictures anew
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self.resize(width)
        self.value("0")  # what the last page had to say is heard now
        self.requests.clear()
        self.complaints.clear()
        self._ask("Page.navigate", url=address)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.value("document.readyState") == "complete" and self.value("location.href") != (
                "about:blank"
            ):
                return
            time.sleep(0.05)
        raise TimeoutError(address)

    def resize(self, width: int) -> None:
        """Give the window another width."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **size)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        found = self._ask("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def point_at(self, selector: str, number: int = 0) -> list[float]:
        """Move the mouse to the middle of the n-th element that matches; return its place."""
        element = found(selector, number)
        self.value(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box: list[float] = self.value(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())"
        )
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        return box

    def click(self, selector: str, number: int = 0) -> None:
        """Click on the middle of the n-th element that matches."""
        x, y = self.point_at(selector, number)
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, selector: str, text: str) -> None:
        """Replace the text of an input field as a user does who types or pastes."""
        self.value(f"(one => {{one.focus(); one.select()}})({found(selector)})")
        self._ask("Input.insertText", text=text)

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript condition holds."""
        deadline = time.monotonic() + seconds
        while not self.value(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(condition)
            time.sleep(0.1)

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self._ask("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key)

    def picture(self, path: Path) -> None:
        """Save the whole page as PNG."""
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self._ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._asked:
                assert "error" not in told, told["error"]
                return dict(told["result"])
            self._note(told.get("method"), told.get("params", {}))

    def _note(self, event: str | None, told: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif event in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(told))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._answers, 1 << 16)
            assert part, "Chromium ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


def found(selector: str, number: int = 0) -> str:
    """The JavaScript of the n-th element that matches."""
    return f"document.querySelectorAll({json.dumps(selector)})[{number}]"


@contextmanager
def browser() -> Iterator[Page]:
    """Start Chromium with an empty profile; it ends with the block."""
    assert PROGRAM
    to_it, ours = os.pipe()
    theirs, from_it = os.pipe()

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        shell = f'exec "$0" "$@" {READS}<&{to_it} {WRITES}>&{from_it}'
        words = [PROGRAM, f"--user-data-dir={profile}", *OPTIONS.split()]
        process = subprocess.Popen(
            ["bash", "-c", shell, *words], pass_fds=(to_it, from_it), stderr=subprocess.DEVNULL
        )
        os.close(to_it)
        os.close(from_it)
        try:
            yield Page(theirs, ours)
        finally:
            os.close(ours)
            os.close(theirs)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
