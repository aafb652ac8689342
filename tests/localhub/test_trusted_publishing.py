import subprocess
import sys

import pytest
from huggingface_hub import HfApi
from huggingface_hub._oidc import exchange_oidc_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from lewis_hub.demo.zoo import seed_hub, zoo_folder

IDENTITY = "what the CI signed"


@pytest.fixture
def publisher(hub, api):
    """A client that signed in as the trusted publisher of acme/mine."""
    api.create_repo("acme/mine", private=True)
    hub.publishers[IDENTITY] = "acme/mine"
    got = exchange_oidc_token(subject_token=IDENTITY, resource="acme/mine", endpoint=hub.url)
    assert (got["token_type"], got["expires_in"]) == ("bearer", 3600)
    return HfApi(endpoint=hub.url, token=got["access_token"])


def test_a_trusted_publisher_writes_its_repository_and_no_other(hub, api, publisher):
    api.create_repo("acme/other")

    publisher.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="acme/mine")

    assert "a.txt" in api.list_repo_files("acme/mine")
    for refused in ("acme/other", "acme/new"):
        with pytest.raises(HfHubHTTPError):
            publisher.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=refused)
    with pytest.raises(HfHubHTTPError, match="403"):
        publisher.create_repo("acme/new")


def test_a_trusted_publisher_reads_no_gated_repository(api, publisher):
    api.create_repo("acme/gated")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="acme/gated")
    api.update_repo_settings("acme/gated", gated="auto")

    with pytest.raises(GatedRepoError):
        publisher.hf_hub_download("acme/gated", "config.json")


def test_the_identity_of_a_user_reads_gated_repositories_and_no_private_one(hub, api):
    for name, how in {"gated": {"gated": "auto"}, "hidden": {"private": True}}.items():
        api.create_repo(f"acme/{name}")
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=f"acme/{name}")
        api.update_repo_settings(f"acme/{name}", **how)
    hub.publishers[IDENTITY] = hub.user
    got = exchange_oidc_token(subject_token=IDENTITY, resource=hub.user, endpoint=hub.url)

    reader = HfApi(endpoint=hub.url, token=got["access_token"])

    assert reader.hf_hub_download("acme/gated", "config.json")
    with pytest.raises(HfHubHTTPError, match="404"):
        reader.hf_hub_download("acme/hidden", "config.json")
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="acme/gated")


def test_sources_are_read_by_the_identity_of_the_user(hub, api, tmp_path, monkeypatch):
    seed_hub(api)
    api.update_repo_settings("zoo/base", gated="auto")
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: ties\nbase_model: zoo/base\nmodels: [zoo/expert-reverse]\n"
        f"publish: {{repo: {hub.user}/new}}\n"
    )
    hub.publishers[IDENTITY] = hub.user
    monkeypatch.delenv("HF_TOKEN", raising=False)
    command = [sys.executable, "-m", "lewis_hub", "actions", "preflight", str(tmp_path)]

    without = subprocess.run(command, capture_output=True, text=True, check=False)
    monkeypatch.setenv("HF_OIDC_RESOURCE", hub.user)
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", IDENTITY)
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert "zoo/base: access is gated and there is no token" in without.stderr
    assert done.stdout == "merge: The disk is large enough.\n"


@pytest.mark.parametrize(("identity", "repo"), [("another", "acme/mine"), (IDENTITY, "acme/other")])
def test_whom_a_repository_does_not_trust_gets_no_token(hub, publisher, identity, repo):
    with pytest.raises(HfHubHTTPError, match=f"No trusted publisher of {repo} matches"):
        exchange_oidc_token(subject_token=identity, resource=repo, endpoint=hub.url)


def test_push_signs_in_without_a_stored_token(hub, api, monkeypatch):
    api.create_repo("acme/mine")
    hub.publishers[IDENTITY] = "acme/mine"
    monkeypatch.setenv("HF_OIDC_RESOURCE", "acme/mine")
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", IDENTITY)
    push = [sys.executable, "-m", "lewis_hub", "push", str(zoo_folder() / "base")]

    done = subprocess.run([*push, "acme/mine"], capture_output=True, text=True, check=False)
    other = subprocess.run([*push, "acme/other"], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in api.list_repo_files("acme/mine")
    assert other.returncode == 1
    assert other.stderr == (
        "lewis-hub: acme/other: HF_OIDC_RESOURCE lets this run write to acme/mine alone.\n"
        "Publish there, or set HF_OIDC_RESOURCE to acme/other.\n"
    )


def test_a_push_without_a_stored_token_needs_a_repo_that_is_there_and_trusts_it(hub, monkeypatch):
    monkeypatch.setenv("HF_OIDC_RESOURCE", "acme/new")
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", IDENTITY)
    push = [sys.executable, "-m", "lewis_hub", "push", str(zoo_folder() / "base"), "acme/new"]

    untrusted = subprocess.run(push, capture_output=True, text=True, check=False)
    hub.publishers[IDENTITY] = "acme/new"
    missing = subprocess.run(push, capture_output=True, text=True, check=False)

    assert untrusted.returncode == missing.returncode == 1
    assert untrusted.stderr == (
        "lewis-hub: acme/new: trusted publishing was refused: No trusted publisher of acme/new"
        f" matches this identity.\nName this workflow in {hub.url}/acme/new/settings as a trusted"
        " publisher.\n"
    )
    assert missing.stderr == (
        "lewis-hub: acme/new: there is no such repo, and without a stored token none can be made.\n"
        f"Make it at {hub.url}/new, and name this workflow in its settings as a trusted"
        " publisher.\n"
    )


def test_without_an_identity_there_is_no_push_and_no_stack_of_calls(hub, monkeypatch):
    monkeypatch.setenv("HF_OIDC_RESOURCE", "acme/mine")
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    push = [sys.executable, "-m", "lewis_hub", "push", str(zoo_folder() / "base"), "acme/mine"]

    done = subprocess.run(push, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith(
        "lewis-hub: acme/mine: trusted publishing failed: HF_OIDC_RESOURCE"
    )
    assert "Traceback" not in done.stderr
