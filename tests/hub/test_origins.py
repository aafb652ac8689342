"""Tokens go to the Hub that is asked, and to no other host that its answers name."""

from __future__ import annotations

import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from faulty_proxy import proxy
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session
from running_server import running

from lewis_hub.errors import PublishError
from lewis_hub.hub import origins
from lewis_hub.hub.failures import HubRepo, call_hub
from lewis_hub.hub.fetch import fetch
from lewis_hub.hub.resolve import resolve_model


class Elsewhere(BaseHTTPRequestHandler):
    """Notes the requests and the tokens that it gets."""

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.got.append((self.path, self.headers["Authorization"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        """Say nothing."""


for method in ("GET", "POST", "PUT"):
    setattr(Elsewhere, f"do_{method}", Elsewhere.answer)


@pytest.fixture
def elsewhere():
    """A server of others; `url` is its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        server.got = []
        with running(server) as server.url:
            yield server


def answering(stands, change):
    """Let a proxy change the answers to some calls."""
    stands.answered = lambda method, target, answer: change(method, target, answer)


def test_a_list_does_not_go_on_at_another_host(hub, push, elsewhere, no_pauses):
    push("me/model", {"config.json": b"{}"})
    following = f"{elsewhere.url}/next?token=1"
    with proxy(hub) as stands:
        link = f'<{following}>; rel="next"'
        answering(stands, lambda _m, t, a: a.saying(link=link) if "/tree/" in t else a)
        api = HfApi(endpoint=stands.url, token=hub.write_token)
        with pytest.raises(PublishError) as error:
            call_hub(HubRepo.to_publish(api, "me/model"), lambda: [*api.list_repo_tree("me/model")])
    assert str(error.value) == (
        f"me/model: cannot reach {stands.url} (a list goes on elsewhere, at {elsewhere.url}).\n"
        "Check the network and HF_ENDPOINT, then run the same command again: finished work is kept."
    )
    assert elsewhere.got == []


def test_an_upload_is_checked_elsewhere_without_the_token(hub, elsewhere):
    hub.api().create_repo("me/merge")

    def change(_method, target, answer):
        if "objects/batch" not in target:
            return answer
        told = json.loads(answer.body)
        for one in told["objects"]:
            one["actions"]["verify"] = {"href": f"{elsewhere.url}/verify"}
        return answer.sending(json.dumps(told).encode())

    with proxy(hub) as stands:
        answering(stands, change)
        api = HfApi(endpoint=stands.url, token=hub.write_token)
        asked = HubRepo.to_publish(api, "me/merge")
        added = [
            CommitOperationAdd(name, name.encode() * 99) for name in ("a.safetensors", "b.bin")
        ]
        call_hub(asked, lambda: api.preupload_lfs_files("me/merge", added))
    assert elsewhere.got == [("/verify", None)] * 2


@pytest.mark.parametrize("header", ["link", "x_xet_refresh_route"])
def test_a_file_comes_without_xet_if_another_host_would_give_access(
    hub, push, elsewhere, monkeypatch, header
):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    push("me/model", {"config.json": b"{}", "model.safetensors": b"1" * 3000})
    source = resolve_model(hub.api(), "me/model")
    route = f"{elsewhere.url}/auth"
    named = {"link": f'<{route}>; rel="xet-auth"', "x_xet_refresh_route": route}[header]

    def change(_method, target, answer):
        has_file = "/resolve/" in target
        return answer.saying(x_xet_hash="a" * 64, **{header: named}) if has_file else answer

    with proxy(hub) as stands:
        answering(stands, change)
        folder = fetch(HfApi(endpoint=stands.url, token=hub.write_token), source, lambda _: None)
    assert (folder / "model.safetensors").read_bytes() == b"1" * 3000
    assert elsewhere.got == []


def test_access_to_xet_by_the_hub_itself_stays():
    for route in ("https://huggingface.co/api/x", "https://hub.example:443/api/x"):
        headers = {"X-Xet-Hash": "a" * 64, "Link": f'<{route}>; rel="xet-auth"'}
        answer = origins.httpx2.Response(200, headers=headers)
        with origins.asking("https://hub.example"):
            origins.hide_access_elsewhere(answer)
        assert answer.headers["X-Xet-Hash"] == "a" * 64


@pytest.mark.parametrize(
    ("address", "is_asked"),
    [
        ("http://hub.example/a", True),
        ("http://hub.example:80/a", True),
        ("https://hub.example/a", True),  # where a Hub redirects from http://
        ("https://HUB.example/a", True),
        ("https://hub.example:8443/a", False),
        ("http://hub.example:8080/a", False),
        ("http://hub.example.evil/a", False),
        ("http://hub.example@evil/a", False),
        ("https://huggingface.co/api/models", True),
        ("http://huggingface.co/api/models", False),
        ("https://huggingface.co.evil/api/models", False),
        ("https://cas-server.xethub.hf.co/a", False),
        ("/api/models", False),
        ("http://[", False),
    ],
)
def test_a_hub_is_known_by_scheme_host_and_port(monkeypatch, address, is_asked):
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    with origins.asking("http://hub.example"), origins.asking("http://hub.example"):
        assert origins.is_asked(address) == is_asked
    assert origins.is_asked(address)  # others use huggingface_hub as they like


def test_the_issuer_of_identities_gets_its_own_token(monkeypatch, elsewhere):
    headers = {"Authorization": "Bearer of-the-workflow"}
    asked = HubRepo.to_publish(HfApi(endpoint="http://hub.example"), "me/merge")
    for _ in range(2):
        call_hub(asked, lambda: get_session().get(f"{elsewhere.url}/id", headers=headers))
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{elsewhere.url}/id?v=1")
    assert [token for _, token in elsewhere.got] == [None, "Bearer of-the-workflow"]


def test_a_message_names_the_storage_that_cannot_be_reached(hub, no_pauses):
    hub.api().create_repo("me/merge")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}"

    def change(_method, target, answer):
        if "objects/batch" not in target:
            return answer
        told = json.loads(answer.body)
        told["objects"][0]["actions"]["upload"]["href"] = f"{refused}/put?signature=secret"
        return answer.sending(json.dumps(told).encode())

    with proxy(hub) as stands:
        answering(stands, change)
        api = HfApi(endpoint=stands.url, token=hub.write_token)
        added = [CommitOperationAdd("a.safetensors", b"1" * 99)]
        with pytest.raises(PublishError) as error:
            call_hub(
                HubRepo.to_publish(api, "me/merge"),
                lambda: api.preupload_lfs_files("me/merge", added),
            )
    told, remedy = str(error.value).split("\n")
    assert told.startswith(f"me/merge: cannot reach {refused}, which {stands.url} names (")
    assert "secret" not in told
    assert remedy == (
        "Check that this machine may reach it, then run the same command again: finished work is "
        "kept."
    )
