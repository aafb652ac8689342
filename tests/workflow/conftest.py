from __future__ import annotations

import shutil

import pytest
from zoo_hub import put_zoo

from lewis_hub.demo.zoo import zoo_folder


@pytest.fixture
def place(hub, tmp_path, monkeypatch):
    """A working folder with the zoo's tasks; the Hub has the zoo, and a token to write."""
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(zoo_folder() / "tasks", "tasks")
    return tmp_path
