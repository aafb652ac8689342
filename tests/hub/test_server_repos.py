from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, snapshot_download

from lewis_hub.hub.server import Hub


def test_a_commit_of_regular_and_large_files_comes_back_byte_for_byte(hub: Hub) -> None:
    weights = os.urandom(5000)
    api = hub.api()
    api.create_repo("acme/base")

    made = api.create_commit(
        "acme/base",
        [
            CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n# Hi\n"),
            CommitOperationAdd("model.safetensors", weights),
        ],
        commit_message="Weights",
    )

    info = api.model_info("acme/base", files_metadata=True)
    folder = Path(snapshot_download("acme/base"))
    assert info.sha == made.oid
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "README.md").read_bytes() == b"---\nlicense: mit\n---\n# Hi\n"
