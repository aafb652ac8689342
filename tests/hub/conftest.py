"""What the tests of the Hub's clients share: a client, and ways to fill the Hub and to break it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from lewis_hub.localhub.hub import Hub

Push = Callable[..., str]


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return hub.api()


@pytest.fixture
def push(api: HfApi) -> Push:
    """Put files into a repo, made if missing, in one commit; gives the commit's sha."""

    def push_files(
        repo: str, files: Mapping[str, bytes], repo_type: str = "model", *, private: bool = False
    ) -> str:
        api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
        additions = [CommitOperationAdd(path, content) for path, content in files.items()]
        made = api.create_commit(repo, additions, commit_message="Put files", repo_type=repo_type)
        return str(made.oid)

    return push_files


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is tried again be tried at once."""
    monkeypatch.setattr("time.sleep", lambda _: None)
