"""A user and a password in HF_ENDPOINT are used, and never shown."""

import os
import re
import subprocess
import sys

import pytest
from faulty_proxy import proxy
from huggingface_hub import HfApi

from lewis_hub.display import without_credentials
from lewis_hub.errors import SourceError
from lewis_hub.hub.failures import HubRepo, address
from lewis_hub.hub.resolve import resolve_model


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        ("https://me:secret@hub.example", "https://hub.example"),
        ("https://me:sec@ret@hub.example:8/a", "https://hub.example:8/a"),
        ("https://secret@hub.example", "https://hub.example"),
        ("https://hub.example/a@b", "https://hub.example/a@b"),
    ],
)
def test_addresses_are_shown_without_credentials(endpoint, shown):
    api = HfApi(endpoint=endpoint)

    assert address(api) == shown
    assert HubRepo(api, "me/model").url == f"{shown}/me/model"


def test_a_message_shows_no_credentials(no_pauses):
    with pytest.raises(SourceError) as caught:
        resolve_model(HfApi(endpoint="http://me:secret@127.0.0.1:1"), "tests/model")

    assert "http://127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        (
            "X-Amz-Date=1&X-Amz-Credential=a%2Fc&X-Amz-Signature=d",
            "X-Amz-Date=1&X-Amz-Credential=...&X-Amz-Signature=...",
        ),
        ("Policy=ab~_&Signature=c-&Key-Pair-Id=K", "Policy=...&Signature=...&Key-Pair-Id=K"),
        ("se=1&sig=ab%3D", "se=1&sig=..."),
        ("create_pr=1&design=blue", "create_pr=1&design=blue"),
    ],
)
def test_an_address_is_shown_without_its_signature(query, shown):
    text = without_credentials(f"requesting PUT https://storage.example/a?{query} (503)")

    assert text == f"requesting PUT https://storage.example/a?{shown} (503)"


def test_one_failure_of_the_storage_puts_no_signature_into_the_log(hub, tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1" * 4000)
    names = {"HF_TOKEN": hub.write_token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    with proxy(hub) as stands:
        stands.reset((("PUT", "/lfs-upload/*?signature=*", 0), "503", False))
        done = subprocess.run(
            [sys.executable, "-m", "lewis_hub", "push", str(folder), "me/x", "--json"],
            env={**os.environ, **names, "HF_ENDPOINT": stands.url},
            capture_output=True,
            check=False,
            text=True,
        )

    assert done.returncode == 0, done.stderr
    assert "HTTP Error 503 thrown while requesting PUT" in done.stderr
    assert re.findall(r"signature=\S*", done.stderr) == ["signature=..."]
