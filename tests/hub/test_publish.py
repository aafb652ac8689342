from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from lewis_hub.display import Silent
from lewis_hub.errors import PublishError
from lewis_hub.hub import target
from lewis_hub.hub.failures import HubRepo
from lewis_hub.hub.publish import (
    Publication,
    PushedCommit,
    folder_bytes,
    publish,
    publish_tag,
)
from lewis_hub.hub.target import ACCOUNT, open_pull_requests, open_target, own_pull_requests
from lewis_hub.recipe.schema import Publishing
from lewis_hub.workflow import publish as publishing

REPO = "tests/merged"
PLAIN = Publication("Merge with LEWIS")
FILES = {
    "config.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n# Merged\n",
    "model-00001-of-00002.safetensors": b"1" * 3000,
    "model-00002-of-00002.safetensors": b"2" * 3000,
    "model.safetensors.index.json": b"{}",
    "lewis/lock.json": json.dumps(
        {"outputs": {"lewis/old.png": {}, "model-00002-of-00002.safetensors": {}}}
    ).encode(),
    "lewis/old.png": b"\x89PNG",
}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "merged", FILES)


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def content(api, revision="main"):
    info = api.model_info(REPO, revision=revision)
    paths = [file.rfilename for file in info.siblings if file.rfilename != ".gitattributes"]
    return {
        path: Path(api.hf_hub_download(REPO, path, revision=info.sha)).read_bytes()
        for path in paths
    }


def commits(api, revision="main"):
    return [commit.title for commit in api.list_repo_commits(REPO, revision=revision)]


def refusal(api, folder, repo=REPO, publication=PLAIN) -> str:
    with pytest.raises(PublishError) as raised:
        publish(api, folder, repo, publication, lambda _: None)
    return str(raised.value)


def test_the_first_push_creates_the_repo_and_makes_one_commit(api, folder):
    uploaded = []

    published = publish(api, folder, REPO, PLAIN, uploaded.append)

    assert content(api) == FILES
    assert commits(api).count("Merge with LEWIS") == 1
    head = api.model_info(REPO).sha
    assert published.commit_sha == head
    assert published.url == f"{api.endpoint}/{REPO}"
    assert published.to_json() == {
        "status": "published",
        "repo": REPO,
        "commit": head,
        "url": f"{api.endpoint}/{REPO}",
        "commit_url": f"{api.endpoint}/{REPO}/commit/{head}",
        "pull_request": None,
        "tag": None,
    }
    assert sum(uploaded) == folder_bytes(folder) == sum(map(len, FILES.values()))


def test_a_push_that_changes_nothing_makes_no_commit(api, folder):
    first = publish(api, folder, REPO, PLAIN, lambda _: None)
    before = commits(api)

    second = publish(api, folder, REPO, PLAIN, lambda _: None)

    assert (second.changed, second.commit_sha) == (False, first.commit_sha)
    assert second.to_json()["status"] == "unchanged"
    assert commits(api) == before


def test_a_changed_file_makes_one_more_commit(api, folder):
    publish(api, folder, REPO, PLAIN, lambda _: None)
    write(folder, {"model-00001-of-00002.safetensors": b"3" * 3000})

    published = publish(api, folder, REPO, PLAIN, lambda _: None)

    assert published.changed
    assert content(api)["model-00001-of-00002.safetensors"] == b"3" * 3000
    assert commits(api).count("Merge with LEWIS") == 2


def test_what_a_former_merge_left_goes_and_other_peoples_files_stay(api, folder):
    publish(api, folder, REPO, PLAIN, lambda _: None)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    for path in FILES:
        if path.startswith("model") or path == "lewis/old.png":
            (folder / path).unlink()
    write(folder, {"model.safetensors": b"4" * 3000, "lewis/lock.json": b'{"outputs": {}}'})

    publish(api, folder, REPO, PLAIN, lambda _: None)

    assert sorted(content(api)) == [
        "README.md",
        "config.json",
        "lewis/lock.json",
        "model.safetensors",
        "notes.txt",
    ]


def test_what_the_lock_of_a_former_merge_does_not_list_goes_as_well(api, folder):
    scores = ".eval_results/gsm8k.yaml"
    write(folder, {scores: b"[]", "lewis/gate.json": b"{}"})
    publish(api, folder, REPO, PLAIN, lambda _: None)
    for path in (scores, "lewis/gate.json"):
        (folder / path).unlink()
    former = Publication("Merge", former=(scores, "lewis/gate.json", "lewis/never.json"))

    assert publish(api, folder, REPO, former, lambda _: None).changed
    assert content(api).keys() == FILES.keys()
    assert not publish(api, folder, REPO, former, lambda _: None).changed


def test_hidden_files_stay_at_home(api, folder):
    write(folder, {".env": b"SECRET", ".cache/x": b"x", "lewis/.tmp": b"x"})

    publish(api, folder, REPO, PLAIN, lambda _: None)

    assert content(api) == FILES


def test_a_link_inside_the_folder_is_followed_and_one_to_outside_is_refused(api, folder, tmp_path):
    (folder / "again.json").symlink_to(folder / "config.json")
    publish(api, folder, REPO, PLAIN, lambda _: None)
    (tmp_path / "passwords").write_text("secret")
    (folder / "x.json").symlink_to(tmp_path / "passwords")

    assert content(api)["again.json"] == b"{}"
    assert refusal(api, folder) == (
        f"{folder}: `x.json` is a link to outside of the folder, or to nothing.\n"
        "Put the file itself in its place."
    )


@pytest.mark.parametrize(
    ("missing", "kept"),
    [("config.json", "model.safetensors"), (".safetensors file", "config.json")],
)
def test_a_folder_without_a_model_is_refused(api, tmp_path, missing, kept):
    write(tmp_path, {kept: b"x"})

    assert refusal(api, tmp_path) == (
        f"{tmp_path}: there is no {missing} in it, so it is not a model's folder.\n"
        "Name the folder that `lewis-hub merge` wrote."
    )


def test_a_private_repo_is_created_private(api, folder):
    publish(api, folder, REPO, Publication("m", private=True), lambda _: None)

    assert api.model_info(REPO).private is True


# -- pull requests and tags


def test_a_pull_request_leaves_main_alone(api, folder):
    publish(api, folder, REPO, PLAIN, lambda _: None)
    before = commits(api)
    write(folder, {"config.json": b"[]"})

    published = publish(
        api, folder, REPO, Publication("Better", landing="pull-request"), lambda _: None
    )

    assert commits(api) == before
    assert published.url == published.pull_request_url == f"{api.endpoint}/{REPO}/discussions/1"
    assert content(api, "refs/pr/1")["config.json"] == b"[]"
    assert api.model_info(REPO, revision="refs/pr/1").sha == published.commit_sha


def test_the_same_pull_request_is_not_opened_twice(api, folder):
    publish(api, folder, REPO, PLAIN, lambda _: None)
    write(folder, {"config.json": b"[]"})
    proposal = Publication("Better", landing="pull-request")
    first = publish(api, folder, REPO, proposal, lambda _: None)

    second = publish(api, folder, REPO, proposal, lambda _: None)

    assert (second.changed, second.url, second.commit_sha) == (
        False,
        first.url,
        first.commit_sha,
    )
    assert len(list(api.get_repo_discussions(REPO))) == 1


def test_a_tag_is_put_on_the_commit_and_stays_there(api, folder):
    tagged = Publication("m", tag="v1")

    published = publish(api, folder, REPO, tagged, lambda _: None)
    again = publish(api, folder, REPO, tagged, lambda _: None)
    write(folder, {"config.json": b"[]"})

    assert [(tag.name, tag.target_commit) for tag in api.list_repo_refs(REPO).tags] == [
        ("v1", published.commit_sha)
    ]
    assert again.changed is False
    assert refusal(api, folder, publication=tagged) == (
        f"{REPO}: tag `v1` is already on {published.commit_sha}; nothing was changed.\n"
        "Choose another tag."
    )
    assert api.model_info(REPO).sha == published.commit_sha


@pytest.mark.parametrize("ignored", ["*.safetensors", "*", "lewis/old.png"])
def test_a_file_that_the_repo_ignores_is_never_left_out(api, folder, ignored):
    api.create_repo(REPO)
    add = CommitOperationAdd(".gitignore", ignored.encode())
    api.create_commit(REPO, [add], commit_message="Ignore")

    told = refusal(api, folder)

    assert told.startswith(f"{REPO}: its .gitignore ignores `")
    assert told.endswith("Let its .gitignore keep the file, then run again.")
    assert commits(api) == ["Ignore", "initial commit"]


def test_a_tag_that_somebody_put_elsewhere_meanwhile_is_told(api, folder, hub, monkeypatch):
    first = publish(api, folder, REPO, PLAIN, lambda _: None).commit_sha
    write(folder, {"config.json": b"[]"})
    commit = HfApi.create_commit

    def overtaken(*args, **options):
        made = commit(*args, **options)
        hub.api().create_tag(REPO, tag="v1", revision=first)
        return made

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    told = refusal(api, folder, publication=Publication("Second", tag="v1"))

    second = api.model_info(REPO).sha
    assert told == (
        f"{REPO}: {second} is published, but tag `v1` is not on it: it is already on {first}.\n"
        "Choose another tag."
    )
    with pytest.raises(PublishError, match="it is already on"):
        publish_tag(api, REPO, PushedCommit(second), "v1")


def test_an_unchanged_push_can_still_add_a_tag(api, folder):
    publish(api, folder, REPO, PLAIN, lambda _: None)

    published = publish(api, folder, REPO, Publication("m", tag="v2"), lambda _: None)

    assert published.changed is False
    assert api.model_info(REPO, revision="v2").sha == published.commit_sha


def test_a_tag_on_a_pull_request_is_refused(api, folder):
    both = Publication("m", landing="pull-request", tag="v1")

    assert refusal(api, folder, publication=both) == (
        f"{REPO}: a pull request has no commit on main to tag yet.\n"
        "Tag it once it is merged, or push it as a commit."
    )


def test_a_stranger_s_pull_request_with_a_file_more_is_another_one(api, folder, hub):
    hub.add_token("hf_stranger", "stranger", "write")
    api.create_repo(REPO)
    more = write(folder.with_name("more"), {**FILES, "modeling.py": b"import os"})
    proposal = Publication("Second", landing="pull-request")
    publish(hub.api("hf_stranger"), more, REPO, proposal, lambda _: None)

    published = publish(api, folder, REPO, proposal, lambda _: None)

    assert published.url == f"{hub.url}/{REPO}/discussions/2"
    assert "modeling.py" not in content(api, "refs/pr/2")


def test_a_stranger_s_pull_request_without_a_file_of_main_is_another_one(api, folder, hub):
    hub.add_token("hf_stranger", "stranger", "write")
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    changes = [CommitOperationAdd(path, data) for path, data in FILES.items()]
    changes.append(CommitOperationDelete("notes.txt"))
    hub.api("hf_stranger").create_commit(REPO, changes, commit_message="x", create_pr=True)

    proposal = Publication("Second", landing="pull-request")
    published = publish(api, folder, REPO, proposal, lambda _: None)

    assert published.url == f"{hub.url}/{REPO}/discussions/2"
    assert content(api, "refs/pr/2")["notes.txt"] == b"mine"


def test_a_stranger_s_pull_request_with_very_many_files_stops_no_push(
    api, folder, hub, monkeypatch
):
    monkeypatch.setattr("lewis_hub.hub.resolve.MAX_SIBLINGS", 50)
    monkeypatch.setattr("lewis_hub.hub.resolve.MAX_FILES", 100)
    hub.add_token("hf_stranger", "stranger", "write")
    api.create_repo(REPO)
    changes = [CommitOperationAdd(f"{number}.txt", b"1") for number in range(101)]
    hub.api("hf_stranger").create_commit(REPO, changes, commit_message="x", create_pr=True)

    proposal = Publication("Second", landing="pull-request")
    published = publish(api, folder, REPO, proposal, lambda _: None)

    assert published.url == f"{hub.url}/{REPO}/discussions/2"
    assert publish(api, folder, REPO, proposal, lambda _: None).url == published.url


def test_only_the_newest_pull_requests_are_compared(hub, api, monkeypatch):
    monkeypatch.setattr(target, "MAX_PULL_REQUESTS", 3)
    api.create_repo(REPO)
    for number in range(5):
        api.create_pull_request(REPO, title=f"Number {number}")

    found = open_pull_requests(HubRepo.to_publish(api, REPO))

    pages = [f"{hub.url}/{REPO}/discussions/{number}" for number in (5, 4, 3)]
    assert [url for url, _ in found] == pages


def test_pull_requests_of_strangers_hide_none_of_ours(hub, api, monkeypatch):
    monkeypatch.setattr(target, "MAX_PULL_REQUESTS", 3)
    hub.add_token("hf_stranger", "stranger", "write")
    api.create_repo(REPO)
    api.create_pull_request(REPO, title="Ours")
    for number in range(4):
        hub.api("hf_stranger").create_pull_request(REPO, title=f"Number {number}")

    found = own_pull_requests(HubRepo.to_publish(api, REPO))

    assert [url for url, _ in found] == [f"{hub.url}/{REPO}/discussions/1"]


# -- other people


def test_a_repo_that_moved_since_it_was_looked_at_is_left_alone(api, folder):
    publish(api, folder, REPO, PLAIN, lambda _: None)
    seen = open_target(api, REPO).head
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="config.json", repo_id=REPO)
    theirs = api.model_info(REPO).sha
    write(folder, {"config.json": b"[]"})

    assert refusal(api, folder, publication=Publication("m", expected_parent=seen)) == (
        f"{REPO}: somebody pushed {theirs} meanwhile; nothing was changed.\n"
        f"Look at {api.endpoint}/{REPO}/commits/main, then run the same command again."
    )
    assert api.model_info(REPO).sha == theirs


@pytest.mark.parametrize("theirs", ["config.json", "README.md"])
def test_a_repo_that_somebody_made_meanwhile_is_left_alone(api, folder, theirs):
    asked = Publishing(repo=REPO)
    seen = publishing.open_destination(asked, api)
    assert seen.target.head is None
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=FILES["README.md"], path_in_repo=theirs, repo_id=REPO)
    head = api.model_info(REPO).sha

    with pytest.raises(PublishError) as error:
        publishing.push(folder, seen, api, Silent(), force=False)
    assert str(error.value) == (
        f"{REPO}: somebody pushed {head} meanwhile; nothing was changed.\n"
        f"Look at {api.endpoint}/{REPO}/commits/main, then run the same command again."
    )
    assert api.model_info(REPO).sha == head


def test_an_empty_repo_that_was_made_meanwhile_gets_the_merge(api, folder):
    seen = publishing.open_destination(Publishing(repo=REPO), api)
    api.create_repo(REPO)
    assert publishing.push(folder, seen, api, Silent(), force=False).changed
    assert content(api).keys() == FILES.keys()


def test_two_pushes_at_once_end_as_whole_commits_or_as_one_clear_refusal(api, folder, tmp_path):
    publish(api, folder, REPO, PLAIN, lambda _: None)
    start = api.model_info(REPO).sha
    outcomes = {}

    def push(name):
        mine = write(tmp_path / name, FILES | {"config.json": name.encode()})
        barrier.wait()
        try:
            publish(api, mine, REPO, Publication(name, expected_parent=start), lambda _: None)
        except PublishError as error:
            outcomes[name] = str(error)
        else:
            outcomes[name] = "published"

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=push, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    head = api.model_info(REPO).sha
    winner = next(name for name, outcome in outcomes.items() if outcome == "published")
    loser = "two" if winner == "one" else "one"
    assert outcomes[loser].startswith(f"{REPO}: somebody pushed {head} meanwhile")
    assert content(api)["config.json"] == winner.encode()
    assert [title for title in commits(api) if title in {"one", "two"}] == [winner]


# -- trouble on the way


def test_a_tag_that_cannot_be_made_is_told_with_the_commit_that_is_there(
    api, folder, hub, no_pauses
):
    tagged = Publication("m", tag="v1")
    hub.fail("/tag/", 500, times=6)

    told = refusal(api, folder, publication=tagged)

    head = api.model_info(REPO).sha
    assert told == (
        f"{REPO}: {head} is published, but tag `v1` is not on it: {api.endpoint} still fails "
        "with 500 after several attempts: injected fault.\n"
        "This is usually temporary: wait a little, then run the same command again: finished work "
        "is kept."
    )
    assert publish(api, folder, REPO, tagged, lambda _: None).commit_sha == head
    assert api.model_info(REPO, revision="v1").sha == head


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_twice(api, folder, hub, no_pauses):
    publish(api, folder, REPO, PLAIN, lambda _: None)
    write(folder, {"config.json": b"[]"})
    hub.fail(f"/api/models/{REPO}/commit/", "drop", after_bytes=0)

    published = publish(api, folder, REPO, Publication("Second"), lambda _: None)

    assert commits(api).count("Second") == 1
    assert published.commit_sha == api.model_info(REPO).sha


def test_a_pull_request_whose_answer_was_lost_is_found_and_not_opened_twice(
    api, folder, hub, no_pauses
):
    publish(api, folder, REPO, PLAIN, lambda _: None)
    write(folder, {"config.json": b"[]"})
    hub.fail(f"/api/models/{REPO}/commit/", "drop", after_bytes=0)

    published = publish(
        api, folder, REPO, Publication("Second", landing="pull-request"), lambda _: None
    )

    assert len(list(api.get_repo_discussions(REPO))) == 1
    assert published.url == f"{api.endpoint}/{REPO}/discussions/1"


def test_a_commit_that_did_not_land_is_tried_again(api, folder, hub, no_pauses):
    hub.fail(f"/api/models/{REPO}/commit/", 503, times=2)

    publish(api, folder, REPO, PLAIN, lambda _: None)

    assert commits(api).count("Merge with LEWIS") == 1
    assert content(api) == FILES


def test_a_hub_that_stays_down_is_told_and_a_rerun_completes(api, folder, hub, no_pauses):
    hub.fail(f"/api/models/{REPO}/commit/", 500, times=6)

    text = refusal(api, folder)
    publish(api, folder, REPO, PLAIN, lambda _: None)

    assert text.startswith(f"{REPO}: {api.endpoint} still fails with 500 after several attempts")
    assert content(api) == FILES
    assert commits(api).count("Merge with LEWIS") == 1


@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/info/lfs/", "/api/whoami"])
def test_server_errors_before_the_commit_are_retried(api, folder, hub, no_pauses, path):
    hub.fail(path, 503, times=1)

    publish(api, folder, REPO, PLAIN, lambda _: None)

    assert content(api) == FILES


# -- who may push


def test_without_a_token_nothing_is_pushed(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)

    assert refusal(HfApi(endpoint=hub.url), folder) == (
        f"{REPO}: there is no token to sign in with.\nMake one with write access at "
        f"{hub.url}/settings/tokens, then set HF_TOKEN or run `hf auth login`."
    )


def test_a_token_that_may_only_read_is_refused(hub, folder):
    text = refusal(hub.api(hub.read_token), folder)

    assert text == (
        f"{REPO}: this token may only read.\nMake one with write access at "
        f"{hub.url}/settings/tokens, then set HF_TOKEN to it or run `hf auth login`."
    )
    assert hub.read_token not in text


def test_a_new_repo_in_somebody_elses_namespace_is_refused_before_any_work(hub):
    hub.add_token("hf_visitor", "visitor", "write", namespaces=("visitor", "team"))

    with pytest.raises(PublishError) as raised:
        open_target(hub.api("hf_visitor"), REPO)

    assert str(raised.value) == (
        f"{REPO}: `visitor` may not make a repo under `tests`.\n"
        "This token's namespaces are visitor, team: push to visitor/merged, or use a token of a "
        "member of `tests`."
    )
    assert open_target(hub.api("hf_visitor"), "team/merged").head is None


@pytest.mark.parametrize(("name", "n_teams"), [("v" * 10**6, 0), ("visitor", 50_000)])
def test_a_message_repeats_as_many_names_as_one_can_read(hub, name, n_teams):
    teams = tuple(f"team{i}" for i in range(n_teams))
    hub.add_token("hf_visitor", name, "write", namespaces=(name, *teams))

    with pytest.raises(PublishError) as raised:
        open_target(hub.api("hf_visitor"), REPO)

    shown = name if n_teams else "v" * 197 + "..."
    listed = "visitor, " + ", ".join(teams[:7]) + " and 49,993 more" if n_teams else shown
    assert str(raised.value) == (
        f"{REPO}: `{shown}` may not make a repo under `tests`.\n"
        f"This token's namespaces are {listed}: push to {shown}/merged, or use a token of a "
        "member of `tests`."
    )


def test_a_long_answer_is_cut_in_a_message():
    hub_repo = HubRepo.to_publish(HfApi(endpoint="http://hub.example"), REPO)
    told = str(hub_repo.failed("a" * 10**6, "b" * 10**6))
    assert told == f"{REPO}: {'a' * 1997}...\n{'b' * 1997}..."


def test_somebody_elses_repo_is_refused_before_anything_else_but_takes_proposals(hub, api, folder):
    publish(api, folder, REPO, PLAIN, lambda _: None)
    hub.add_token("hf_visitor", "visitor", "write")
    visitor = hub.api("hf_visitor")
    write(folder, {"config.json": b"[]"})

    with pytest.raises(PublishError) as raised:
        open_target(visitor, REPO)
    proposal = Publication("Better", landing="pull-request")
    proposed = publish(visitor, folder, REPO, proposal, lambda _: None)

    assert str(raised.value) == (
        f"{REPO}: `visitor` may not push to it.\nPropose the change instead: "
        "`--as pull-request`. Or push to a repo of your own, such as visitor/merged."
    )
    assert proposed.pull_request_url == f"{hub.url}/{REPO}/discussions/1"


def test_an_unknown_token_is_refused_and_never_shown(hub, folder):
    stranger = HfApi(endpoint=hub.url, token="hf_abcdefghijklmnop")

    assert refusal(stranger, folder) == (
        f"{REPO}: {hub.url} does not know this token.\nIt may be mistyped, expired or "
        "from another Hub: set HF_TOKEN or run `hf auth login`."
    )


@pytest.mark.parametrize("name", ["merged", "a/b/c", "owner/a..b"])
def test_a_bad_repo_name_is_refused_before_any_network(folder, name):
    nowhere = HfApi(endpoint="http://127.0.0.1:1", token="hf_x")

    assert refusal(nowhere, folder, name) == (
        f"{name}: this is not the name of a repo.\n"
        "Write owner/name: letters, digits, `-`, `_`, `.`; no `--` and no `..`."
    )


def scope(name, *permissions):
    return {"entity": {"_id": "1", "type": "user", "name": name}, "permissions": [*permissions]}


@pytest.mark.parametrize(
    ("scopes", "may_make"),
    [
        ({"global": [], "scoped": [scope("me", "repo.content.read", "repo.write")]}, True),
        ({"scoped": [scope("me", "repo.content.read")]}, False),
        ({"scoped": [scope("other", "repo.write"), scope("me/one", "repo.write")]}, False),
        ({"canReadGatedRepos": True, "scoped": []}, False),
        (["of another shape"], False),
        (None, False),
    ],
)
def test_a_fine_grained_token_makes_repos_only_where_it_says_so(scopes, may_make):
    token = {"role": "fineGrained", "fineGrained": scopes}
    who = ACCOUNT.validate_python({"name": "me", "auth": {"accessToken": token}})

    assert who.may_make("me/new") is may_make
    assert who.owns("me/new")
    assert not who.only_reads
