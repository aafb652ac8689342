"""Merging again only when something changed: the lock in the target repo decides."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from zoo_hub import put_zoo

from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.report.lock import Lock, OutputFile
from lewis_hub.workflow.publish import same_merge

EXPERT = "zoo/expert-reverse"


@pytest.fixture
def zoo(hub, tmp_path, monkeypatch):
    """A working folder with a recipe without calibration, and a Hub with the zoo on it."""
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    monkeypatch.chdir(tmp_path)
    put_zoo(hub)
    repo = f"{hub.user}/again"
    (tmp_path / "recipe.yaml").write_text(
        "base_model: zoo/base\nmerge_method: ties\ndtype: bfloat16\nparameters: {lambda: 1.0}\n"
        f"models: [{{model: {EXPERT}}}, {{model: zoo/expert-cipher, parameters: {{weight: 2}}}}]\n"
        f"publish: {{repo: {repo}, license: apache-2.0}}\n"
    )
    return repo


@pytest.fixture
def guided(zoo):
    """The same with a guide that measures base and experts."""
    recipe = (zoo_folder() / "recipe.yaml").read_text().replace("samples: 128", "samples: 4")
    recipe = recipe.partition("evaluate:")[0] + f"publish: {{repo: {zoo}, license: apache-2.0}}\n"
    Path("recipe.yaml").write_text(recipe)
    return zoo


def merge(*words):
    """Merge where nothing was merged or downloaded before, as a scheduled run does."""
    shutil.rmtree("merged", ignore_errors=True)
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    done = CliRunner().invoke(cli, ["merge", "--push", "--json", *words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout), done.stderr


def put(hub, repo, files):
    changes = [
        CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
        for path, content in files.items()
    ]
    return hub.api().create_commit(repo, changes, commit_message="Change").oid


def move(hub):
    """A new commit of an expert, with one weight that differs a little."""
    weights = bytearray(Path(hub.api().hf_hub_download(EXPERT, "model.safetensors")).read_bytes())
    weights[-2] ^= 0x40  # of a bfloat16's seven bits of mantissa
    return put(hub, EXPERT, {"model.safetensors": bytes(weights)})


def published(hub, repo, path):
    return Path(hub.api().hf_hub_download(repo, path)).read_text()


def shas(hub, repo):
    return [commit.commit_id for commit in hub.api().list_repo_commits(repo)]


def test_a_merge_that_the_repo_holds_already_downloads_no_weight_and_commits_nothing(hub, zoo):
    first, _ = merge()
    put(hub, EXPERT, {"README.md": b"---\nlicense: mit\n---\n# Only told otherwise\n"})
    before = shas(hub, zoo)

    second, said = merge()

    assert (first["status"], second["status"]) == ("merged", "unchanged")
    assert second == {
        "status": "unchanged",
        "output": None,
        "scores": None,
        "repo": zoo,
        "commit": before[0],
        "url": f"{hub.url}/{zoo}",
        "commit_url": f"{hub.url}/{zoo}/commit/{before[0]}",
        "pull_request": None,
        "tag": None,
    }
    assert shas(hub, zoo) == before
    assert "Downloading" not in said
    assert not Path("merged").exists()
    blobs = [path for path in Path(os.environ["HF_HOME"]).rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in blobs) < 100_000


def test_a_merge_that_the_repo_holds_gives_way_to_the_next_one_and_anything_else_stays(hub, zoo):
    merge()
    move(hub)

    again = CliRunner().invoke(cli, ["merge", "--push", "--json"])
    Path("merged/README.md").write_text("mine")
    move(hub)
    refused = CliRunner().invoke(cli, ["merge", "--push"])

    assert json.loads(again.stdout)["status"] == "merged"
    assert len(shas(hub, zoo)) == 3
    assert str(refused.exception) == (
        f"{Path('merged').resolve()}: it exists and holds something else than this merge.\n"
        "Name another folder with -o, or replace it with --force."
    )
    assert Path("merged/README.md").read_text() == "mine"


def test_a_published_merge_with_a_hidden_file_of_yours_stays(hub, zoo):
    """A push leaves hidden files out, so the repo of a git clone in the folder was lost."""
    merge()
    Path("merged/.git").mkdir()
    Path("merged/.git/config").write_text("mine")
    move(hub)

    refused = CliRunner().invoke(cli, ["merge", "--push"])

    assert "it exists and holds something else than this merge" in str(refused.exception)
    assert Path("merged/.git/config").read_text() == "mine"


@pytest.mark.slow  # each merge measures
def test_an_expert_that_moved_is_measured_alone_and_the_commit_says_so(hub, guided):
    _, at_first = merge()
    before = hub.api().model_info(EXPERT).sha
    after = move(hub)

    second, said = merge()

    old, new = before[:12], after[:12]
    n_tokens = [
        int(line.split()[1])
        for text in (at_first, said)
        for line in text.splitlines()
        if line.startswith("Calibrating: ") and line.endswith(" tokens")
    ]
    assert n_tokens[1] * 4 == pytest.approx(n_tokens[0], rel=0.1)  # base twice, two experts: one
    commit = hub.api().list_repo_commits(guided)[0]
    change = f"expert {EXPERT}: {old} → {new} (model.safetensors)"
    assert second["status"] == "merged"
    assert commit.title == f"Merge with lewis-hub: expert {EXPERT}: {old} → {new} and 1 more"
    assert commit.message == f"- {change}\n- weights: 1 of 1 files differ"
    (entry,) = json.loads(published(hub, guided, "lewis/changelog.json"))["entries"]
    assert entry["changes"] == [change, "weights: 1 of 1 files differ"]
    assert entry["replaced"] == shas(hub, guided)[1]
    assert entry["digest"] == Lock.from_json(published(hub, guided, "lewis/lock.json")).digest
    assert f"expert zoo/expert-reverse: {old} → {new} (model.safetensors)" in published(
        hub, guided, "README.md"
    )


@pytest.mark.slow  # each merge measures
def test_what_the_repo_measured_gives_the_same_merge_as_measuring_it_again(hub, guided):
    merge()
    move(hub)
    merge()
    reused = {
        n: published(hub, guided, f"lewis/{n}.json") for n in ("lock", "density", "importance")
    }
    put(hub, guided, {"lewis/lock.json": None})

    merge()

    assert reused == {n: published(hub, guided, f"lewis/{n}.json") for n in reused}


def test_the_changelog_keeps_what_was_before(hub, zoo):
    merge()
    move(hub)
    merge()
    recipe = Path("recipe.yaml").read_text()
    Path("recipe.yaml").write_text(recipe.replace("lambda: 1.0", "lambda: 0.5"))

    merge()

    entries = json.loads(published(hub, zoo, "lewis/changelog.json"))["entries"]
    assert [entry["changes"][0].partition(":")[0] for entry in entries] == [
        "parameters.lambda",
        f"expert {EXPERT}",
    ]
    assert entries[0]["changes"][0] == "parameters.lambda: 1 → 0.5"
    assert published(hub, zoo, "README.md").count("**, replaces `") == 2


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": None},
        {"model.safetensors": b"other"},
        {"lewis/lock.json": b"{}"},
    ],
    ids=["weights gone", "weights swapped", "no lock"],
)
def test_a_repo_that_is_not_what_its_lock_says_is_made_whole(hub, zoo, files):
    merge()
    weights = hub.api().model_info(zoo, files_metadata=True).siblings
    put(hub, zoo, files)

    again, _ = merge()

    assert again["status"] == "merged"
    now = hub.api().model_info(zoo, files_metadata=True).siblings
    assert [f.lfs.sha256 for f in now if f.lfs] == [f.lfs.sha256 for f in weights if f.lfs]


@pytest.mark.slow  # each merge measures
def test_measurements_of_a_repo_that_only_takes_proposals_are_not_taken(hub, guided):
    """Nothing shows that the numbers of its owner were measured."""
    merge()
    recipe = Path("recipe.yaml").read_text()
    Path("recipe.yaml").write_text(recipe.replace("gamma: 0.3", "gamma: 0.4"))
    _, of_its_own = merge()
    recipe = recipe.replace("license:", "as: pull-request, license:")
    Path("recipe.yaml").write_text(recipe.replace("gamma: 0.3", "gamma: 0.5"))

    _, of_others = merge()

    assert "Calibrating: 0 tokens" in of_its_own
    assert "Calibrating: 0 tokens" not in of_others


@pytest.mark.slow  # each merge measures
def test_measurements_that_are_not_those_of_the_lock_are_not_taken(hub, guided):
    merge()
    told = json.loads(published(hub, guided, "lewis/importance.json"))
    for source in told["sources"]:
        source["modules"] = dict.fromkeys(source["modules"], 1.0)
    put(hub, guided, {"lewis/importance.json": json.dumps(told).encode()})
    move(hub)

    _, said = merge()

    assert "Calibrating: 0 tokens" not in said
    modules = json.loads(published(hub, guided, "lewis/importance.json"))["sources"][0]["modules"]
    assert set(modules.values()) != {1.0}


def test_scores_that_are_not_asked_for_are_not_missed():
    scored = {"evaluate": {"tasks": ["a"]}, "publish": {"repo": "me/x"}}
    asked = [scored, {"publish": {"repo": "me/x"}}, {**scored, "evaluate": {"tasks": ["a", "b"]}}]
    found, *planned = (
        Lock((), (), recipe, "ties", 1, None, None, 1, 1000, {}, {}) for recipe in (scored, *asked)
    )

    assert [same_merge(found, one) for one in planned] == [True, True, False]


@pytest.mark.parametrize("stated", ["me/x", [1], None])
def test_a_lock_in_a_repo_that_says_odd_things_of_publishing_is_another_merge(stated):
    """`merge --push` ended in a traceback."""
    planned = Lock((), (), {"publish": {"license": "mit"}}, "ties", 1, None, None, 42, 1, {}, {})

    assert not same_merge(replace(planned, recipe={"publish": stated}), planned)


def test_scores_by_other_task_files_are_not_those_of_the_planned_merge():
    def lock(**outputs):
        recipe = {"evaluate": {"tasks": ["a"], "include": "tasks"}}
        return Lock((), (), recipe, "ties", 1, None, None, 1, 1000, outputs, {})

    old, new = OutputFile("aa", 2), OutputFile("bb", 2)
    found = lock(**{"model.safetensors": new, "lewis/tasks/a.yaml": old})
    planned = [lock(**{"lewis/tasks/a.yaml": one}) for one in (old, new)]

    assert [same_merge(found, one) for one in planned] == [True, False]


def test_force_merges_and_publishes_again(hub, zoo):
    merge()

    again, said = merge("--force")

    assert again["status"] == "merged"  # what it cost is another number
    assert "Downloading" in said
    assert len(shas(hub, zoo)) == 3


def test_a_tag_stays_on_its_commit_where_others_pushed_after_it(hub, zoo):
    recipe = Path("recipe.yaml")
    recipe.write_text(recipe.read_text().replace("apache-2.0}", "apache-2.0, tag: v1}"))
    first, _ = merge()
    theirs = put(hub, zoo, {"notes.txt": b"x"})

    second, _ = merge()

    assert (first["tag"], second["tag"]) == ("v1", None)
    assert (second["status"], second["commit"]) == ("unchanged", theirs)
    (tag,) = hub.api().list_repo_refs(zoo).tags
    assert (tag.name, tag.target_commit) == ("v1", first["commit"])


def test_another_recipe_is_another_merge_though_the_weights_are_the_same(hub, zoo):
    merge()
    Path("recipe.yaml").write_text(
        Path("recipe.yaml").read_text().replace("license: apache-2.0", "license: mit")
    )

    again, _ = merge()

    assert again["status"] == "merged"
    assert hub.api().list_repo_commits(zoo)[0].title == (
        "Merge with lewis-hub: publish.license: apache-2.0 → mit and 1 more"
    )


def test_a_pull_request_that_holds_the_merge_is_not_opened_again(hub, zoo):
    merge()
    move(hub)
    recipe = Path("recipe.yaml").read_text()
    Path("recipe.yaml").write_text(recipe.replace("license:", "as: pull-request, license:"))
    first, _ = merge()

    second, said = merge()

    assert (first["status"], second["status"]) == ("merged", "unchanged")
    assert second["pull_request"] == first["pull_request"] == f"{hub.url}/{zoo}/discussions/1"
    assert second["commit"] == first["commit"]
    assert "Downloading" not in said
