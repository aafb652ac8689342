"""The steps of the Space, each in a process of its own, over the embedded Hub."""

import json
import os
import time
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd

from templates.space import sessions

pytestmark = pytest.mark.slow  # starts processes that import torch and transformers
RECIPE = """
base_model: zoo/base
models: [zoo/expert-reverse, zoo/expert-cipher]
merge_method: ties
parameters: {density: 0.5, weight: 1.0}
"""


@pytest.fixture
def session():
    yield "tab"
    sessions.close("tab")
    sessions.CLOSED.clear()


def last(step, request, token=None):
    return [*sessions.run(step, "tab", request, token)][-1]


def test_a_folder_of_the_machine_is_refused_before_it_is_looked_at(api, session, tmp_path):
    there = {"recipe": RECIPE.replace("zoo/base", str(tmp_path))}
    missing = {"recipe": RECIPE.replace("zoo/base", f"{tmp_path}/missing")}

    problems = [last("check", asked)["problem"] for asked in (there, missing)]

    ending = "is not a repository of the Hub: write owner/name. Folders are not read."
    assert problems == [f"`{tmp_path}` {ending}", f"`{tmp_path}/missing` {ending}"]


def test_a_recipe_with_a_typo_gets_the_message_of_the_command_line(api, session):
    problem = last("check", {"recipe": RECIPE.replace("models:", "modles:")})["problem"]

    assert problem == (
        "/recipe/recipe.yaml:3: `modles`: unknown key `modles`.\nDid you mean `models`?"
    )


def test_models_above_the_limit_are_refused_before_a_download(api, session, monkeypatch):
    monkeypatch.setenv("MAX_GB", "0.005")

    events = [*sessions.run("merge", session, {"recipe": RECIPE, "score": False})]

    assert [event["problem"].partition(" Copy")[0] for event in events] == [
        "These models have 0.0 GB of weights, and this Space merges up to 0.0 GB."
    ]
    assert not (sessions.folder_of(session) / "merged").exists()


def test_a_stack_that_repeats_layers_is_limited_by_what_it_writes(api, session, monkeypatch):
    monkeypatch.setenv("MAX_GB", "0.02")
    parts = [{"sources": [{"model": "zoo/base", "layer_range": [0, 2]}]}] * 40
    stack = json.dumps({"slices": parts, "merge_method": "passthrough", "dtype": "float32"})

    problem = last("check", {"recipe": stack})["problem"]

    assert problem.startswith("The merged model would have 0.1 GB of weights, and this Space ")


def test_exports_count_as_what_is_written(api, session, monkeypatch):
    monkeypatch.setenv("MAX_GB", "0.006")
    exports = "dtype: float32\nexport: [gguf:f16, gguf:bf16, gguf:q8_0]\n"

    problem = last("check", {"recipe": RECIPE + exports})["problem"]

    assert problem.startswith("The merged model would have 0.0 GB of weights, and this Space ")


def test_half_a_letter_in_a_recipe_is_told_as_a_letter_that_is_not_expected(api, session):
    problem = last("check", {"recipe": RECIPE.replace("models:", "mod\ud800:")})["problem"]

    assert problem.startswith("/recipe/recipe.yaml:3: `mod?`: unknown key `mod?`.")


def test_idle_folders_are_deleted_from_the_oldest_on_where_the_disk_is_nearly_full(monkeypatch):
    folders = [sessions.folder_of(name) for name in ("old", "older", "own", "used")]
    for folder, age in zip(folders, (100, 200, 300, 400), strict=True):
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    monkeypatch.setattr(sessions, "RUNNING", [(folders[3], None)])
    gone = []
    usage = type("Usage", (), {"free": property(lambda _: 1e9 * len(gone))})
    monkeypatch.setattr(sessions.shutil, "disk_usage", lambda _: usage())
    monkeypatch.setattr(sessions.shutil, "rmtree", lambda folder, **_: gone.append(folder))
    monkeypatch.setattr(sessions, "FREE_BYTES", 1e9)

    sessions._delete_unused(folders[2])

    assert gone == [folders[1]]
    monkeypatch.undo()
    for folder in folders:
        folder.rmdir()


def test_datasets_above_the_limit_are_refused_before_a_download(api, session, monkeypatch):
    monkeypatch.setenv("MAX_GB", "0.05")
    api.create_repo("lewis/rows", repo_type="dataset", exist_ok=True)
    rows = CommitOperationAdd("train.jsonl", b'{"text": "' + bytes(60_000_000) + b'"}\n')
    api.create_commit("lewis/rows", [rows], commit_message="Rows", repo_type="dataset")
    calibration = "calibration: {dataset: lewis/rows, text: '{text}'}\n"
    guided = RECIPE.replace("density: 0.5, ", "") + "guide: {name: lewis}\n" + calibration

    events = [*sessions.run("merge", session, {"recipe": guided, "score": False})]

    assert [event["problem"].partition(" Copy")[0] for event in events] == [
        "The datasets have 0.1 GB, and this Space merges up to 0.1 GB."
    ]


def test_a_process_has_the_token_of_its_user_and_no_secret_of_the_machine(
    hub, api, session, monkeypatch
):
    api.update_repo_settings("zoo/base", private=True)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)  # of the machine
    asked = {"recipe": RECIPE}

    refused, seen = last("check", asked), last("check", asked, hub.read_token)

    assert "zoo/base" in refused["problem"]
    assert seen["result"]["lines"][-1] == "No problems found."


def test_closing_a_tab_ends_its_process_and_deletes_its_folder(api, session):
    events = sessions.run("merge", session, {"recipe": RECIPE, "score": False})
    started = next(events)

    sessions.close(session)

    assert started == {"stage": "Downloading", "done": 0.0}
    assert [*events][-1] == {
        "problem": "The step ended without a result, maybe for lack of memory. Merge smaller "
        "models."
    }
    assert not sessions.folder_of(session).exists()
    assert sessions.RUNNING == []


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "same-site", "origin": "https://other.hf.space"}, False),
        ({"sec-fetch-site": "cross-site", "origin": "https://me.hf.space"}, False),
        ({"origin": "https://me.hf.space"}, True),
        ({"origin": "https://me.hf.space.evil.example"}, False),
        ({"origin": "null"}, False),
        ({}, True),
    ],
)
def test_only_the_space_s_own_page_has_a_tab(headers, is_own):
    assert sessions.is_own_page({"host": "me.hf.space", **headers}) is is_own


def test_a_step_that_waits_for_its_turn_does_not_run_after_its_tab_is_closed(api):
    waiting = sessions.run("check", "closed", {"recipe": RECIPE})

    sessions.close("closed")

    assert [*waiting] == [{"problem": "This tab was closed."}]
    assert not sessions.folder_of("closed").exists()


def test_processes_that_a_step_started_end_with_it(session, tmp_path, monkeypatch):
    started = (
        "import json, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(json.dumps({'say': child.pid}), flush=True)\n"
        "child.wait()\n"
    )
    (tmp_path / "worker.py").write_text(started)
    monkeypatch.setattr(sessions, "WORKER", tmp_path / "worker.py")
    events = sessions.run("merge", session, {})
    child = next(events)["say"]

    events.close()

    deadline = time.monotonic() + 30
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process):
    """Whether a process is there, and not only its exit status."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_end_of_the_app_ends_its_processes_and_deletes_the_folders_of_all_tabs(api):
    sessions.folder_of("another").mkdir(parents=True)
    events = sessions.run("merge", "tab", {"recipe": RECIPE, "score": False})
    next(events)
    ((_, process),) = sessions.RUNNING

    sessions.close_all()

    assert process.poll() is not None
    assert "ended without a result" in [*events][-1]["problem"]
    assert not sessions.ROOT.exists()
    assert sessions.RUNNING == []


def test_a_step_that_takes_too_long_is_stopped(api, session, monkeypatch):
    monkeypatch.setattr(sessions, "MAX_MINUTES", 0.005)

    assert last("merge", {"recipe": RECIPE, "score": False}) == {
        "problem": "This took more than 0.005 minutes and was stopped. Merge smaller models."
    }


def test_the_name_of_a_tab_cannot_lead_out_of_the_folder_of_tabs():
    assert sessions.folder_of("../../etc").parent == sessions.ROOT


def test_folders_of_clients_that_close_no_tab_are_deleted_after_hours(session):
    old, new = (sessions.folder_of(name) for name in ("old", "new"))
    for folder in (old, new):
        (folder / "recipe").mkdir(parents=True)
    long_ago = time.time() - sessions.UNUSED_S - 1
    os.utime(old, (long_ago, long_ago))

    last("init", {"base": "", "experts": [], "tasks": [], "repo": None})

    assert not old.exists()
    assert new.exists()
    sessions.close("new")
