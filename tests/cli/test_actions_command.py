"""What the steps of a workflow ask lewis-hub: what to do, and what to show."""

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from unittest.mock import Mock

import pytest
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd
from zoo_hub import put_zoo

from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError, OutputError
from lewis_hub.workflow import publish

RECIPE = """
base_model: zoo/base
models: [{{model: zoo/expert-reverse, parameters: {{weight: 1.0}}}}]
merge_method: task_arithmetic
dtype: bfloat16
{evaluate}
publish: {{repo: {user}/again, license: apache-2.0, as: {landing}}}
"""
GATE = """
evaluate:
  tasks: [zoo_reverse]
  include: tasks
  gate: {task: zoo_reverse, metric: "exact_match,none", not_worse_than: [previous]}
"""


@pytest.fixture
def place(hub, tmp_path, monkeypatch):
    """A working folder under a workflow's step, and a Hub with the zoo on it."""
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page.md"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(zoo_folder() / "tasks", "tasks")
    return tmp_path


def write(hub, evaluate="", landing="commit"):
    text = RECIPE.format(user=hub.user, evaluate=evaluate, landing=landing)
    Path("recipe.yaml").write_text(text)


def run(*words):
    done = CliRunner().invoke(cli, words)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def preflight(*words):
    Path("outputs").unlink(missing_ok=True)
    done = run("actions", "preflight", "--json", *words)
    return json.loads(done.stdout), Path("outputs").read_text()


def test_a_merge_in_the_target_is_not_repeated_until_a_source_changes(hub, place):
    write(hub)
    assert preflight() == (
        {"status": "merge", "why": "The disk is large enough.", "repo": "lewis/again"},
        "way=merge\n",
    )
    pushed = json.loads(run("merge", "--push", "--json", "-o", "elsewhere").stdout)

    found, outputs = preflight()

    assert found == {
        "status": "unchanged",
        "why": f"lewis/again@{pushed['commit'][:8]} holds this merge already.",
        "repo": "lewis/again",
        "commit_url": pushed["commit_url"],
    }
    assert outputs == "way=unchanged\n"
    assert preflight("--force")[1] == "way=merge\n"
    assert preflight("--repo", "lewis/other")[1] == "way=merge\n"
    move = [
        CommitOperationAdd("config.json", (zoo_folder() / "base/config.json").read_bytes() + b"\n")
    ]
    hub.api().create_commit("zoo/expert-reverse", move, commit_message="Change")
    assert preflight()[1] == "way=merge\n"


def test_a_target_that_not_everybody_may_read_is_told_to_the_workflow(hub, place):
    write(hub)
    recipe = Path("recipe.yaml")
    public = recipe.read_text()
    recipe.write_text(public.replace("license:", "private: true, license:"))
    assert preflight()[1] == "way=merge\nprivate=yes\n"

    hub.api().create_repo("lewis/again", private=True)
    recipe.write_text(public)
    assert preflight()[1] == "way=merge\nprivate=yes\n"


def test_a_private_target_that_the_merging_job_does_not_see_is_told_to_the_workflow(
    hub, place, monkeypatch
):
    """The push has another token: it signs in as a trusted publisher."""
    write(hub)
    hub.api().create_repo("lewis/again", private=True)
    hub.add_token("hf_narrow", "reader", "read")
    hub.add_token("hf_other", "other", "write")
    hub.publishers["signed by GitHub"] = hub.user

    for token in ("hf_narrow", "hf_other"):
        monkeypatch.setenv("HF_TOKEN", token)
        assert preflight()[1] == "way=merge\nprivate=yes\n"
    monkeypatch.setenv("HF_OIDC_RESOURCE", hub.user)  # the identity that reads gated sources
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", "signed by GitHub")
    assert preflight()[1] == "way=merge\nprivate=yes\n"


def test_a_target_that_the_token_may_make_will_be_public(hub, place, monkeypatch):
    write(hub)
    hub.add_token("hf_lewis", "lewis", "write")
    monkeypatch.setenv("HF_TOKEN", "hf_lewis")

    assert preflight()[1] == "way=merge\n"


@pytest.mark.parametrize(
    "more",
    [
        "tokenizer_source: zoo/expert-reverse",
        "chat_template: zoo/expert-reverse",
        "tokenizer: {source: base, tokens: {a: {source: zoo/expert-reverse, force: true}}}",
    ],
)
def test_a_new_card_of_the_model_that_gives_the_tokenizer_is_no_change(hub, place, more):
    write(hub, more)
    assert run("merge", "--push", "-q", "-o", "elsewhere").exit_code == 0
    put_card(hub, "zoo/expert-reverse")

    assert preflight()[1] == "way=unchanged\n"


def test_a_new_card_of_a_source_of_an_earlier_step_is_no_change(hub, place):
    write(hub)
    first = Path("recipe.yaml").read_text().partition("publish:")[0]
    last = Path("recipe.yaml").read_text().replace("zoo/expert-reverse", "first")
    Path("recipe.yaml").write_text(f"name: first\n{first}---\n{last}")
    pushed = json.loads(run("merge", "--push", "--json", "-o", "elsewhere").stdout)
    put_card(hub, "zoo/expert-reverse")

    again = json.loads(run("merge", "--push", "--json", "-o", "again").stdout)

    assert (again["status"], again["commit"]) == ("unchanged", pushed["commit"])


def put_card(hub, repo):
    card = CommitOperationAdd("README.md", b"---\nlicense: apache-2.0\n---\nAnother text.\n")
    hub.api().create_commit(repo, [card], commit_message="Describe")


COMMANDS = ("merge --push", "merge --push --stream --no-eval", "actions preflight")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tag_of_an_earlier_merge_is_refused_before_any_work(hub, place, command):
    write(hub)
    recipe = Path("recipe.yaml")
    recipe.write_text(recipe.read_text().replace("license:", "tag: v1, license:"))
    assert run("merge", "--push", "-q", "-o", "elsewhere").exit_code == 0
    first = hub.api().list_repo_refs("lewis/again").tags[0].target_commit
    assert preflight()[1] == "way=unchanged\n"
    move = CommitOperationAdd(
        "model.safetensors", (zoo_folder() / "base/model.safetensors").read_bytes()
    )
    hub.api().create_commit("zoo/expert-reverse", [move], commit_message="Change")

    with pytest.raises(LewisHubError, match=f"^lewis/again: tag `v1` is already on {first}; "):
        run(*command.split())

    assert {path.name for path in place.glob("*merged*")} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tag_on_a_pull_request_is_refused_before_any_work(hub, place, command):
    hub.api().create_repo("lewis/again")
    write(hub, landing="pull-request")
    recipe = Path("recipe.yaml")
    recipe.write_text(recipe.read_text().replace("license:", "tag: v1, license:"))

    with pytest.raises(LewisHubError, match="a pull request has no commit on main to tag yet"):
        run(*command.split())

    assert {path.name for path in place.glob("*merged*")} == set()


def test_jobs_are_to_merge_what_has_changed_if_they_are_asked_to(hub, place):
    write(hub, GATE)

    assert preflight("--on", "jobs") == (
        {"status": "jobs", "why": "Hugging Face Jobs merge, as asked.", "repo": "lewis/again"},
        "way=jobs\n",
    )

    write(hub)
    assert run("merge", "--push", "-q").exit_code == 0
    assert preflight("--on", "jobs")[1] == "way=unchanged\n"
    assert preflight("--on", "jobs", "--force")[1] == "way=jobs\n"


def test_an_open_pull_request_with_the_merge_counts_if_the_recipe_asks_for_one(hub, place):
    hub.api().create_repo("lewis/again")
    write(hub, landing="pull-request")
    assert run("merge", "--push", "-q").exit_code == 0

    assert preflight()[1] == "way=unchanged\n"


def test_a_stranger_s_pull_request_with_the_same_lock_does_not_count(hub, place):
    hub.api().create_repo("lewis/again")
    hub.add_token("hf_stranger", "stranger", "write")
    write(hub, landing="pull-request")
    assert run("merge", "-q", "-o", "made").exit_code == 0
    made, poison = Path("made"), b"other weights" * 100
    lock = json.loads((made / "lewis/lock.json").read_text())
    digest = {"sha256": hashlib.sha256(poison).hexdigest(), "size": len(poison)}
    lock["outputs"]["model.safetensors"] |= digest
    (made / "lewis/lock.json").write_text(json.dumps(lock))
    (made / "model.safetensors").write_bytes(poison)
    hub.api("hf_stranger").upload_folder(
        repo_id="lewis/again", folder_path=made, create_pr=True, commit_message="Merge"
    )

    assert preflight()[1] == "way=merge\n"
    pushed = json.loads(run("merge", "--push", "--json").stdout)

    assert pushed["pull_request"] == f"{hub.url}/lewis/again/discussions/2"
    assert pushed["status"] == "merged"


def test_measurements_of_the_target_s_merge_are_reused(hub, place):
    calibration = "{dataset: zoo/reverse, split: train, text: '{question}', samples: 2}"
    guide = f"guide: {{name: lewis, gamma: 0.3, epsilon: 0.8, calibration: {calibration}}}"
    write(hub, guide)
    text = Path("recipe.yaml").read_text().replace("task_arithmetic", "ties")
    Path("recipe.yaml").write_text(text)
    assert run("merge", "--push", "-q", "-o", "elsewhere").exit_code == 0
    Path("recipe.yaml").write_text(text.replace("gamma: 0.3", "gamma: 0.4"))

    assert preflight()[1] == "way=merge\n"

    kept = Path("importance/importance.json")
    assert kept.read_text() == Path("elsewhere/lewis/importance.json").read_text()
    assert "Calibrating: 0 tokens" in run("merge", "--no-eval").stderr
    kept.write_text("own")
    assert preflight()[1] == "way=merge\n"
    assert kept.read_text() == "own"


def full(monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(14 * 10**9, 14 * 10**9, 1000))


def test_a_merge_is_streamed_if_the_disk_is_too_small(hub, place, monkeypatch):
    write(hub, GATE.partition("  gate:")[0])
    full(monkeypatch)

    found, outputs = preflight()

    assert outputs == "way=stream\n"
    assert "download and merge need" in found["why"]
    assert "0.00 GB are free" in found["why"]


def test_a_recipe_with_a_gate_is_never_streamed(hub, place, monkeypatch):
    write(hub, GATE)
    full(monkeypatch)

    with pytest.raises(Exception, match="so the merge cannot be streamed: use a machine"):
        run("actions", "preflight")

    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("calibration", "is_refused"),
    [
        ("{task: own_task, include: tasks, split: train, samples: 2}", True),
        ("{dataset: zoo/reverse, text: '{question}', samples: 2}", True),  # compared with its items
        ("{dataset: zoo/reverse, text: '{question}', samples: 2, allow_overlap: true}", False),
        (None, False),
    ],
)
def test_what_runs_own_task_files_is_never_streamed(
    calibration, is_refused, hub, place, monkeypatch
):
    """The job that publishes a stream draws its texts too, and may sign in."""
    task = Path("tasks/zoo_reverse.yaml").read_text().replace("zoo_reverse", "own_task")
    code = "open('ran', 'w')\n\n\ndef documents(found):\n    return found\n"
    Path("tasks/code.py").write_text(code)
    Path("tasks/own_task.yaml").write_text(f"{task}process_docs: !function code.documents\n")
    guide = f"guide: {{name: lewis, calibration: {calibration}}}\n" if calibration else ""
    write(hub, f"evaluate: {{tasks: [own_task], include: tasks}}\n{guide}")
    if guide:
        recipe = Path("recipe.yaml")
        recipe.write_text(recipe.read_text().replace("task_arithmetic", "ties"))
    shortage = OutputError("merged", "it needs 15 GB, 14 GB are free", "Free some space.")
    monkeypatch.setattr(publish, "require_disk", Mock(side_effect=shortage))

    if is_refused:
        with pytest.raises(Exception, match="by own task files, and the job that publishes runs"):
            run("actions", "preflight")
    else:
        assert preflight()[1] == "way=stream\n"
        assert run("merge", "--stream", "--push", "--no-eval", "-q").exit_code == 0

    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "name",
    ["me/$(id)", "me/a;id", "me/`id`", "me/a b", "me/a|b", "me/a'b", "me/a\nb", "--help", "a"],
)
@pytest.mark.parametrize("command", ["actions preflight", "merge --push", "schedule --cron @daily"])
def test_a_repo_name_with_shell_characters_is_refused(name, command, place):
    done = run(*command.split(), f"--repo={name}")

    assert done.exit_code == 2
    assert "expected owner/name such as me/my-merge, found" in done.stderr


@pytest.mark.parametrize("name", ["me/a--b", "me/a..b"])
def test_a_repo_name_that_the_hub_does_not_accept_is_refused(name, place):
    assert "expected owner/name such as me/my-merge" in run("merge", f"--repo={name}").stderr


def test_the_report_links_the_commit_and_shows_scores_and_verdict(place):
    score = {"value": 0.9, "stderr": 0.01}
    check = {
        "task": "t",
        "metric": "acc,none",
        "against": "base",
        "tolerance": 0.0,
        "on_refusal": "stop",
        "higher_is_better": True,
        "value": 0.9,
        "other": 0.5,
        "difference": 0.4,
        "ci95": [0.3, 0.5],
        "why": "",
    }
    tasks = {
        "t": {"n": 100, "version": "1", "models": {"merged": {"acc,none": score}}, "paired": []}
    }
    merged = {"status": "merged", "scores": tasks, "gate": {"version": 1, "checks": [check]}}
    Path("merge.json").write_text(json.dumps(merged))
    url = "https://hub/me/mine"
    pushed = {"status": "published", "repo": "me/mine", "url": url, "commit": "c" * 40}
    Path("push.json").write_text(json.dumps(pushed | {"commit_url": f"{url}/commit/{'c' * 40}"}))
    Path("empty.json").touch()

    done = run("actions", "report", "empty.json", "missing.json", "merge.json", "push.json")

    assert done.stdout == Path("page.md").read_text()
    assert done.stdout.splitlines() == [
        "## Published",
        "",
        f"[`me/mine`](<{url}>) at [`cccccccccccc`](<{url}/commit/{'c' * 40}>)",
        "",
        "| model | `t`, accuracy |",
        "| --- | ---: |",
        "| **this merge** | 0.900 ± 0.010 |",
        "| items | 100 |",
        "",
        "### Quality gate",
        "",
        "The gate accepted this merge. It refuses a merge if the whole interval of a difference is "
        "worse than the tolerance.",
        "",
        "- On t (acc) the merged model is not significantly worse than the base: 0.900 against "
        "0.500 (difference &#43;0.400, 95 % interval &#43;0.300 to &#43;0.500).",
    ]
    assert Path("outputs").read_text() == f"status=published\ncommit-url={url}/commit/{'c' * 40}\n"


def test_the_report_of_a_failure_shows_its_message_unchanged(place):
    message = "me/x: **no**\n```\n<img src=x onerror=alert(1)>"
    told = {"status": "failed", "error": {"kind": "SourceError", "message": message}}
    Path("merge.json").write_text(json.dumps(told))

    page = run("actions", "report", "merge.json").stdout

    assert page == f"## Failed\n\n````text\n{message}\n````\n"
    assert Path("outputs").read_text() == "status=failed\ncommit-url=\n"


def test_a_report_has_no_controls_of_a_terminal(place):
    told = {
        "status": "failed",
        "error": {"message": "a\x1b[31m\tb\u202ec\nd\x1be"},
        "commit_url": "https://hub/me/x/commit/\x1b]0;x\x07\u202ef\n1",
    }
    Path("merge.json").write_text(json.dumps(told))

    page = run("actions", "report", "merge.json").stdout

    assert page == Path("page.md").read_text()
    assert page.endswith("\n\n```text\na\\x1b[31m\tb\\u202ec\nd\\x1be\n```\n")
    assert Path("outputs").read_text() == (
        "status=failed\ncommit-url=https://hub/me/x/commit/\\x1b]0;x\\x07\\u202ef1\n"
    )


def test_an_incomplete_run_is_reported_as_failed(place):
    Path("preflight.json").write_text('{"status": "merge", "why": "", "repo": "me/mine"}')

    assert run("actions", "report", "preflight.json").stdout == "## Failed\n"


def test_push_uses_the_publish_settings_of_the_recipe(hub, place):
    hub.api().create_repo("lewis/again")
    write(hub, landing="pull-request")
    assert run("merge", "-q").exit_code == 0

    told = json.loads(run("push", "merged", "--json").stdout)

    assert told["pull_request"] == f"{hub.url}/lewis/again/discussions/1"
    assert (
        json.loads(run("push", "merged", "--json", "--as", "commit").stdout)["pull_request"] is None
    )


def test_push_needs_a_repo_if_the_recipe_names_none(place):
    Path("model").mkdir()

    done = run("push", "model")

    assert done.exit_code == 2
    assert "the recipe of model does not name a repo: add it as OWNER/NAME." in done.stderr


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "merge.json is not JSON: "),
        ("[1]", "merge.json is not what a command prints with --json"),
        ("5", "merge.json is not what a command prints with --json"),
        ('{"status": []}', "`status` in merge.json is not what a command prints with --json"),
        ('{"commit_url": 5}', "`commit_url` in merge.json is not what a command prints"),
        ('{"error": "no"}', "`error` in merge.json is not what a command prints with --json"),
        ('{"error": {"message": 1}}', "`error` in merge.json has no message"),
        ('{"error": {"kind": "a"}}', "`error` in merge.json has no message"),
        ('{"scores": [1]}', "`scores` in merge.json is not what a command prints with --json"),
        ("[" * 5000, "merge.json is not JSON: "),
    ],
)
def test_documents_that_no_command_printed_are_one_message(tmp_path, monkeypatch, text, problem):
    monkeypatch.chdir(tmp_path)
    Path("merge.json").write_text(text)

    done = run("actions", "report", "merge.json")

    assert done.exit_code == 1
    assert problem in done.output


@pytest.mark.parametrize("text", ['{"scores": {"a": 1}}', '{"gate": {"a": 1}}'])
def test_scores_and_gates_that_no_command_printed_are_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("merge.json").write_text(text)

    with pytest.raises(LewisHubError):
        run("actions", "report", "merge.json")
