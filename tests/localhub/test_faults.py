from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from lewis_hub.errors import ExtraMissingError, HubServerError
from lewis_hub.localhub.server import serve


def test_too_many_requests_on_the_preupload_is_tried_again(hub, api, no_pauses):
    api.create_repo("acme/base")
    hub.fail("/preupload/", 429, times=2)

    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="acme/base")

    assert "x.txt" in api.list_repo_files("acme/base")
    assert hub.faults.pending == []


def test_a_storage_error_on_a_large_file_is_tried_again(hub, api, no_pauses):
    weights = os.urandom(3000)
    api.create_repo("acme/base")
    hub.fail("/lfs-upload/", 500, method="PUT")

    api.upload_file(path_or_fileobj=weights, path_in_repo="m.bin", repo_id="acme/base")

    assert Path(api.hf_hub_download("acme/base", "m.bin")).read_bytes() == weights
    assert hub.faults.pending == []


def test_an_error_on_the_commit_itself_reaches_the_user_and_nothing_is_committed(hub, api):
    api.create_repo("acme/base")
    hub.fail("/commit/", 500)

    with pytest.raises(HfHubHTTPError, match="500 Internal Server Error"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="acme/base")

    assert api.list_repo_files("acme/base") == [".gitattributes"]


def test_a_connection_can_be_cut_before_anything_happens(hub, api):
    api.create_repo("acme/base")
    hub.fail("/commit/", "drop")

    with pytest.raises(httpx.RemoteProtocolError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="acme/base")

    assert len(api.list_repo_commits("acme/base")) == 1


def test_a_connection_can_be_cut_after_the_commit_was_made(hub, api):
    api.create_repo("acme/base")
    hub.fail("/commit/", "drop", after_bytes=0)

    with pytest.raises(httpx.RemoteProtocolError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="acme/base")

    assert len(api.list_repo_commits("acme/base")) == 2


def test_a_cut_download_is_taken_up_where_it_ended(hub, api, push, no_pauses):
    weights = os.urandom(300_000)
    push("acme/base", {"m.bin": weights})
    hub.fail("/lfs/", "drop", after_bytes=100_000, method="GET")

    assert Path(api.hf_hub_download("acme/base", "m.bin")).read_bytes() == weights


def test_the_body_of_an_answer_does_not_wait_for_the_acknowledgement_of_its_head(hub):
    seconds = []
    with httpx.Client() as client:
        for _ in range(10):
            start = time.monotonic()
            client.get(f"{hub.url}/api/models")
            seconds.append(time.monotonic() - start)

    assert min(seconds) < 0.03  # an acknowledgement is delayed by 40 ms


def test_answers_can_be_late_and_slow(hub, push):
    push("acme/base", {"a.txt": b"x" * 3000})
    hub.faults.delay_s, hub.faults.bytes_per_s = 0.05, 20_000.0

    start = time.monotonic()
    httpx.get(f"{hub.url}/acme/base/resolve/main/a.txt")

    assert time.monotonic() - start >= 0.15


def test_bodies_share_one_bandwidth_in_both_directions(hub, api, push):
    content = os.urandom(4000)
    push("acme/base", {"a.bin": content})
    hub.faults.bytes_per_s = 20_000.0

    start = time.monotonic()
    with ThreadPoolExecutor() as pool:
        down = pool.submit(
            httpx.get, f"{hub.url}/acme/base/resolve/main/a.bin", follow_redirects=True
        )
        up = pool.submit(httpx.post, f"{hub.url}/api/validate-yaml", content=bytes(4000))

    assert down.result().content == content
    assert up.result().status_code == 400
    assert time.monotonic() - start >= 0.35


def test_a_fault_strikes_only_what_it_names(hub, api, push):
    push("acme/base", {"a.txt": b"x"})
    hub.fail("/api/models/acme/base$|/api/models/acme/base\\?", 503, method="GET")

    with pytest.raises(HfHubHTTPError, match="503"):
        api.model_info("acme/base")

    assert api.model_info("acme/base").id == "acme/base"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::1", "example.org", ""])
def test_an_address_that_others_could_reach_is_refused(tmp_path, host):
    with pytest.raises(HubServerError) as raised, serve(tmp_path, host):
        pass

    assert str(pickle.loads(pickle.dumps(raised.value))) == (
        f"{host}: the embedded Hub binds to 127.0.0.0/8 only; it is no production server.\n"
        "Use 127.0.0.1, and a tunnel such as `ssh -L` to reach it from elsewhere."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_said_to_be(hub, tmp_path):
    port = int(hub.url.rpartition(":")[2])

    with pytest.raises(HubServerError) as raised, serve(tmp_path, port=port):
        pass

    assert str(raised.value) == (
        f"127.0.0.1:{port}: the embedded Hub cannot listen there (Address already in use).\n"
        "Stop what listens there, or choose another port with --port."
    )


def test_a_folder_is_served_by_one_hub_at_a_time(tmp_path):
    with serve(tmp_path), pytest.raises(HubServerError) as raised, serve(tmp_path):
        pass

    assert str(raised.value) == (
        f"{tmp_path}: another embedded Hub serves this folder.\n"
        "Stop that one, or choose another folder with --root."
    )


def test_without_the_extra_the_install_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ExtraMissingError) as raised, serve(tmp_path):
        pass

    assert str(pickle.loads(pickle.dumps(raised.value))) == (
        "The embedded Hub needs the demo extra: pip install 'lewis-hub[demo]'"
    )


def test_a_fresh_folder_has_one_user_whose_tokens_only_the_owner_reads(tmp_path):
    with serve(tmp_path / "new") as hub:
        users = tmp_path / "new" / "users.json"

        assert hub.user == "lewis"
        assert hub.write_token != hub.read_token
        assert hub.api().create_repo("any/where").repo_id == "any/where"
        assert users.stat().st_mode & 0o077 == 0


def test_two_commits_of_one_file_share_its_bytes(hub, push):
    weights = os.urandom(3000)
    push("acme/a", {"m.bin": weights})
    push("acme/b", {"n.bin": weights})

    sizes = [p.stat().st_size for p in (hub.root / "blobs").glob("*/*")]
    assert sizes.count(3000) == 1
