from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lewis_hub.localhub import files

UPLOAD = """
import os, sys
from huggingface_hub import CommitOperationAdd, HfApi

api = HfApi(token=sys.argv[1])
api.create_repo("acme/base")
added = [CommitOperationAdd(path, path) for path in ("m.bin", "n.bin")]
api.preupload_lfs_files("acme/base", added)
print(api.create_commit("acme/base", added, commit_message="By Xet").oid)
"""


@pytest.mark.slow
def test_files_that_a_client_uploads_by_xet_are_read_as_any_others(hub, api, tmp_path):
    pytest.importorskip("hf_xet")
    files = {"m.bin": os.urandom(300_000), "n.bin": b"\0" * 200_000}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    done = subprocess.run(
        [sys.executable, "-c", UPLOAD, hub.write_token],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_DISABLE_XET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert api.model_info("acme/base").sha == done.stdout.strip()
    for name, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        assert api.get_paths_info("acme/base", name)[0].lfs.sha256 == digest
        assert Path(api.hf_hub_download("acme/base", name)).read_bytes() == content
    assert list((hub.root / "xet").iterdir()) == []


def test_what_one_user_uploaded_by_xet_is_not_committed_by_another(hub, api, monkeypatch):
    hub.add_token("hf_stranger", "stranger", "write")
    mine, theirs = hub.grants[hub.write_token], hub.grants["hf_stranger"]
    digest, target = "1" * 64, hub.root / "taken"
    monkeypatch.setattr(files, "_files", lambda _: [(digest, "2" * 64)])
    monkeypatch.setattr(files, "_join", lambda _1, _2, _3, target: target.write_bytes(b"x"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    files.xet_token(hub.store, mine)

    assert not files.take_xet_upload(hub.store, theirs, digest, target)
    assert files.take_xet_upload(hub.store, mine, digest, target)


def test_a_shard_that_is_none_does_not_stop_the_commits_of_others(hub, api, monkeypatch):
    hub.add_token("hf_other", "other", "write")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    token = files.xet_token(hub.store, hub.grants["hf_other"])
    place = Path(token["casUrl"].removeprefix("local://")) / "xet/xorbs/shards"
    place.mkdir(parents=True)
    (place / "a.mdb").write_bytes(b"x" * 100)

    api.create_repo("acme/base")
    sha = api.upload_file(path_or_fileobj=b"{}", path_in_repo="a.json", repo_id="acme/base").oid
    assert api.model_info("acme/base").sha == sha
