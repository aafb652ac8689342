"""Fixtures for all tests: the embedded Hub over HTTP, and an empty cache for each test.

huggingface_hub reads HF_ENDPOINT and the path of its cache when it is first imported. So importing
this module starts a Hub, and points the environment at it and at a temporary HF_HOME.

It also decides which tests are fast (`pytest -m fast`, `make quick`): those that use no server, no
subprocess, no lm-eval and no model of transformers, and are not in tests/hardening.
"""

from __future__ import annotations

import gc
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from lewis_hub.display import Advance
from lewis_hub.localhub.hub import Hub
from lewis_hub.localhub.server import serve

SESSION = ExitStack()
LEAKS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "HF_OIDC_RESOURCE",
    "HF_HUB_OFFLINE",
)
LARGE = {"torch", "transformers", "lm_eval", "matplotlib"}  # not in use so far
SLOW_FIXTURES = {"hub", "datasets_cache"}  # a server, lm-eval
SLOW_MARKERS = ("slow", "gpu", "ray")
SLOW_IMPORT = re.compile(
    r"^(?:from|import) (?:subprocess|transformers|lm_eval|train_zoo|lewis_hub\.(?:localhub"
    r"|evaluate\.harness|calibration\.(?:forward|measure|model|passes|sequential)))\b",
    re.MULTILINE,
)
CACHES = (
    "HF_HUB_CACHE",
    "HF_XET_CACHE",
    "HF_ASSETS_CACHE",
    "HF_DATASETS_CACHE",
    "HF_MODULES_CACHE",
)


def start_hub() -> Hub:
    folder = Path(SESSION.enter_context(tempfile.TemporaryDirectory(prefix="lewis-hub-tests-")))
    hub = SESSION.enter_context(serve(folder / "hub"))
    for name in LEAKS + CACHES:
        os.environ.pop(name, None)
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # the models are tiny, and the tests run side by side
        "MPLBACKEND": "agg",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # a process keeps the first that it finds
    }
    return hub


# A process that a shell starts in the background ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
HUB = start_hub()


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("gate", derandomize=True)  # a commit passes always or never
    settings.register_profile("fast", derandomize=True, max_examples=10)
    settings.load_profile("fast" if only_fast(config) else "gate")
    # huggingface_hub uploads LFS files through a parameter that its own HTTP library deprecates.
    ignored = "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"
    config.addinivalue_line("filterwarnings", ignored)


def only_fast(config: pytest.Config) -> bool:
    return bool(config.option.markexpr == "fast")


@cache
def is_slow(file: Path) -> bool:
    """Whether a file or the conftest of its folder imports what makes tests slow."""
    if file.parent.name == "hardening":  # many drawn cases, on Linux
        return True
    files = {file, file.with_name("conftest.py")} - {Path(__file__)}
    texts = (path.read_text(encoding="utf-8") for path in files if path.exists())
    return any(map(SLOW_IMPORT.search, texts))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m fast`, do not even import the other files."""
    folder = collection_path.is_dir()
    file = collection_path / "conftest.py" if folder else collection_path
    return True if only_fast(config) and file.suffix == ".py" and is_slow(file) else None


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark the fast tests."""
    for item in items:
        slow = is_slow(item.path) or SLOW_FIXTURES & {*item.fixturenames}
        if not slow and not any(map(item.get_closest_marker, SLOW_MARKERS)):
            item.add_marker("fast")


def pytest_unconfigure(config: pytest.Config) -> None:
    SESSION.close()


@pytest.fixture(autouse=True)
def frozen_libraries() -> None:
    """Leave what was imported so far out of garbage collections; an evaluation makes several."""
    if LARGE.isdisjoint(sys.modules):
        return
    LARGE.difference_update(sys.modules)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache() -> Iterator[None]:
    """Delete the downloads of each test."""
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The embedded Hub, empty; `hub.api()` is a client with its write token."""
    grants = dict(HUB.grants)
    HUB.clear()
    yield HUB
    HUB.clear()
    HUB.grants = grants


class StageTitles:
    """A progress that keeps the titles of stages."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def stage(self, title: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        self.titles.append(title)
        return nullcontext(lambda _: None)

    def say(self, text: str) -> None:
        pass


@pytest.fixture
def stage_titles() -> type[StageTitles]:
    """Makes a progress that keeps the titles of stages."""
    return StageTitles


@pytest.fixture
def api(hub, monkeypatch):
    """The embedded Hub with the zoo's models on it, and a token that may write."""
    from zoo_hub import put_zoo

    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return hub.api()
