"""Passwords in HF_ENDPOINT, signatures, tokens and identities are used, and never shown."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from faulty_proxy import proxy
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _auth
from running_server import running

from lewis_hub.display import without_credentials
from lewis_hub.errors import PublishError, SourceError
from lewis_hub.hub.failures import HubRepo, address
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.hub.target import account


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


class SignIn(BaseHTTPRequestHandler):
    """Refuses an identity, or gives it a new token each time; errors repeat what they know."""

    def do_POST(self):
        """Answer a sign-in."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.refuses:
            told = self.server.refuses.format(asked["subject_token"])
            self.answer(403, {"error": told})
            return
        self.server.given.append(f"hf_jwt_{len(self.server.given)}{'ab-cd_ef' * 4}")
        self.answer(200, {"access_token": self.server.given[-1], "expires_in": 0})

    def do_GET(self):
        """Refuse any other call."""
        self.answer(400, {"error": f"you had {' and '.join(self.server.given)}"})

    def answer(self, status, told):
        """Answer in JSON."""
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def signing_in(monkeypatch, identity, refuses=None):
    """A server that this workflow signs in to by its identity, and the address of that server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), SignIn)
    server.refuses, server.given = refuses, []
    with running(server) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)
        monkeypatch.setenv("HF_OIDC_RESOURCE", "me/merge")
        monkeypatch.setenv("HF_OIDC_ID_TOKEN", identity)
        yield server, url


@pytest.mark.parametrize("identity", ["signed by the CI", "eyJhbGciOiJSUzI1NiJ9.eyJzdWIifQ.c2ln_-"])
@pytest.mark.parametrize(
    ("refuses", "shown"),
    [
        ("Nobody trusts {}, so no", "Nobody trusts <token>, so no"),
        ("x" * 290 + " {}", "x" * 290 + " <token>"),  # messages are cut here
    ],
)
def test_a_refused_identity_is_never_shown(monkeypatch, identity, refuses, shown):
    with (
        signing_in(monkeypatch, identity, refuses) as (_, url),
        pytest.raises(PublishError) as raised,
    ):
        account(HubRepo.to_publish(HfApi(endpoint=url), "me/merge"))

    assert str(raised.value) == (
        f"me/merge: trusted publishing was refused: {shown}.\n"
        f"Name this workflow in {url}/me/merge/settings as a trusted publisher."
    )


def test_tokens_that_an_identity_had_before_are_never_shown(monkeypatch):
    with signing_in(monkeypatch, "signed by the CI") as (server, url):
        asked = HubRepo.to_publish(HfApi(endpoint=url), "me/merge")
        assert [asked.token, asked.token] == server.given
        with pytest.raises(PublishError) as raised:
            account(asked)

    assert str(raised.value) == (
        f"me/merge: {url} refused this with 400: you had <token> and <token> and <token>.\n"
        "Correct the cause that it names, then run the same command again."
    )
