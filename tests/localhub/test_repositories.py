from __future__ import annotations

import hashlib

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import httpx

from lewis_hub.localhub.hub import Hub

CARD = (
    b"---\nlicense: mit\ntags: [merge]\nbase_model: [a/b, c/d]\nlibrary_name: transformers\n---\n"
)


@pytest.fixture
def stranger(hub: Hub) -> HfApi:
    """A client whose user owns nothing but the namespace `stranger`."""
    hub.add_token("hf_stranger", "stranger", "write")
    return hub.api("hf_stranger")


def anonymous(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


def refusal(call, *given, **named) -> HfHubHTTPError:
    with pytest.raises(HfHubHTTPError) as raised:
        call(*given, **named)
    return raised.value


def test_whoami_names_the_user_and_the_role_of_the_token(hub, api):
    reader = hub.api(hub.read_token).whoami()

    assert api.whoami()["name"] == hub.user
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    assert reader["auth"]["accessToken"]["role"] == "read"


def test_an_unknown_token_is_refused_whatever_it_asks(hub, api):
    api.create_repo("acme/base")

    error = refusal(hub.api("hf_unknown").model_info, "acme/base")

    assert error.response.status_code == 401
    assert "Invalid credentials in Authorization header" in str(error)
    assert not isinstance(error, RepositoryNotFoundError)


def test_a_new_repository_has_one_commit_and_its_own_address(hub, api):
    url = api.create_repo("acme/base")

    info = api.model_info("acme/base")
    assert url == f"{hub.url}/acme/base"
    assert url.repo_id == "acme/base"
    assert [file.rfilename for file in info.siblings] == [".gitattributes"]
    assert [commit.title for commit in api.list_repo_commits("acme/base")] == ["initial commit"]


def test_a_name_without_namespace_belongs_to_the_user(hub, api):
    assert api.create_repo("mine").repo_id == f"{hub.user}/mine"


def test_creating_what_exists_is_a_conflict_unless_that_is_fine(hub, api):
    first = api.create_repo("acme/base")

    error = refusal(api.create_repo, "acme/base")

    assert error.response.status_code == 409
    assert error.response.json()["url"] == f"{hub.url}/acme/base"
    assert api.create_repo("acme/base", exist_ok=True) == first


def test_a_name_that_no_repository_may_have_is_refused(hub):
    answer = httpx.post(
        f"{hub.url}/api/repos/create",
        json={"organization": "..", "name": "<img src=x>"},
        headers={"Authorization": f"Bearer {hub.write_token}"},
    )

    assert answer.status_code == 400
    assert answer.json()["error"] == "Invalid repository name: ../<img src=x>"


def test_a_read_token_creates_and_commits_nothing_and_learns_why(hub, api):
    api.create_repo("acme/base")
    reader = hub.api(hub.read_token)
    upload = {"path_or_fileobj": b"x", "path_in_repo": "x.txt", "repo_id": "acme/base"}

    created = refusal(reader.create_repo, "acme/other")
    committed = refusal(reader.upload_file, **upload)

    for error in (created, committed):
        assert error.response.status_code == 403
        assert "has the role read, a token with the role write is needed" in str(error)
    assert reader.create_repo("acme/base", exist_ok=True).repo_id == "acme/base"


def test_nobody_creates_in_the_namespace_of_another(stranger):
    error = refusal(stranger.create_repo, "acme/base")

    assert error.response.status_code == 403
    assert 'You don\'t have the rights to create a model under the namespace "acme"' in str(error)
    assert stranger.create_repo("stranger/base").repo_id == "stranger/base"


def test_a_private_repository_looks_missing_to_others(hub, api, stranger):
    api.create_repo("acme/secret", private=True)

    seen = api.model_info("acme/secret")
    hidden = refusal(stranger.model_info, "acme/secret")
    missing = refusal(stranger.model_info, "acme/nothing")
    unnamed = refusal(anonymous(hub).model_info, "acme/secret")

    assert seen.private is True
    assert isinstance(hidden, RepositoryNotFoundError)
    assert (hidden.response.status_code, missing.response.status_code) == (404, 404)
    assert hidden.response.json() == missing.response.json()
    assert isinstance(unnamed, RepositoryNotFoundError)
    assert unnamed.response.status_code == 401
    assert unnamed.response.headers["X-Error-Code"] == "RepoNotFound"


def test_a_gated_repository_shows_its_list_but_no_file_without_access(hub, api, push, stranger):
    push("acme/gated", {"README.md": CARD, "config.json": b"{}"})
    api.update_repo_settings("acme/gated", gated="manual")

    unnamed = refusal(anonymous(hub).auth_check, "acme/gated")
    named = refusal(stranger.hf_hub_download, "acme/gated", "config.json")

    assert isinstance(unnamed, GatedRepoError)
    assert unnamed.response.status_code == 401
    assert "You must have access to it and be authenticated to access it" in str(unnamed)
    assert isinstance(named, GatedRepoError)
    assert named.response.status_code == 403
    assert named.response.headers["X-Error-Code"] == "GatedRepo"
    assert stranger.model_info("acme/gated").gated == "manual"
    assert api.auth_check("acme/gated") is None
    assert api.hf_hub_download("acme/gated", "config.json").endswith("config.json")


def test_auth_check_tells_readers_from_writers(hub, api, stranger):
    api.create_repo("acme/base")

    assert api.auth_check("acme/base", write=True) is None
    assert stranger.auth_check("acme/base") is None
    assert refusal(stranger.auth_check, "acme/base", write=True).response.status_code == 403


def test_info_gives_the_cards_metadata_and_digests(hub, api, push):
    sha = push("acme/merged", {"README.md": CARD, "model.safetensors": b"weights"})

    info = api.model_info("acme/merged", files_metadata=True)

    files = {file.rfilename: file for file in info.siblings}
    assert info.sha == sha
    assert info.card_data.to_dict()["base_model"] == ["a/b", "c/d"]
    assert info.library_name == "transformers"
    assert (info.private, info.gated) == (False, False)
    assert info.last_modified >= info.created_at
    assert files["README.md"].size == len(CARD)
    assert files["README.md"].lfs is None
    assert files["model.safetensors"].lfs.size == 7
    digest = hashlib.sha256(b"weights").hexdigest()
    assert files["model.safetensors"].lfs.sha256 == digest


def test_a_model_and_a_dataset_of_one_name_are_two_repositories(hub, api):
    api.create_repo("acme/twin")

    assert api.create_repo("acme/twin", repo_type="dataset") == f"{hub.url}/datasets/acme/twin"
    assert api.dataset_info("acme/twin").id == "acme/twin"


@pytest.mark.parametrize("name", ["gpt2", "acme/nothing"])
def test_a_missing_repository_is_said_to_be_missing(hub, api, name):
    assert isinstance(refusal(api.model_info, name), RepositoryNotFoundError)
    assert api.file_exists(name, "config.json") is False


def test_an_address_that_is_not_there_is_not_found(hub):
    assert httpx.get(f"{hub.url}/api/agent-harnesses").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "problem"),
    [
        ("POST", "/api/repos/create", "[1]", "The body must be a JSON object"),
        (
            "PUT",
            "/api/models/acme/base/settings",
            '{"gated": "perhaps"}',
            "gated must be false, auto or manual",
        ),
        ("POST", "/oauth/token", '{"grant_type": "password"}', "unsupported_grant_type"),
        (
            "POST",
            "/api/models/acme/base/branch/refs%2Fpr%2F1",  # anyone may push to a pull request
            "{}",
            "Invalid name of a branch or tag: refs/pr/1",
        ),
        (
            "POST",
            "/api/models/acme/base/tag/main",
            '{"tag": ""}',
            "Invalid name of a branch or tag: ",
        ),
    ],
)
def test_a_body_that_the_hub_does_not_know_is_refused(hub, api, method, path, body, problem):
    api.create_repo("acme/base")
    headers = {"Authorization": f"Bearer {hub.write_token}"}

    answer = httpx.request(method, hub.url + path, content=body, headers=headers)

    assert (answer.status_code, answer.json()["error"]) == (400, problem)


def test_sizes_of_files_are_listed_only_on_request(api, push):
    push("acme/base", {"a.txt": b"abc"})

    plain, whole = (
        {file.rfilename: file.size for file in api.model_info("acme/base", **asked).siblings}
        for asked in ({}, {"files_metadata": True})
    )

    assert plain["a.txt"] is None
    assert whole["a.txt"] == 3


def test_the_digest_of_a_folder_changes_with_its_files(api, push):
    def digest() -> str:
        (folder,) = (item for item in api.list_repo_tree("acme/base") if item.path == "sub")
        return folder.tree_id

    push("acme/base", {"sub/a.txt": b"a"})
    before = digest()
    push("acme/base", {"sub/a.txt": b"b"})

    assert digest() != before


def test_a_hub_whose_users_only_read_is_served(tmp_path):
    (tmp_path / "users.json").write_text(
        '[{"token": "hf_r", "user": "reader", "role": "read", "namespaces": ["*"]}]'
    )

    hub = Hub(tmp_path)

    assert [grant.token for grant in hub.grants.values()] == ["hf_r"]
    assert hub.read_token == "hf_r"
