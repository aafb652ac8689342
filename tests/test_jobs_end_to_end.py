"""A merge as a Job, as a user types it: the embedded Hub runs it in a process of its own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lewis_hub.demo.zoo import seed_hub, zoo_folder
from lewis_hub.localhub.server import serve

pytestmark = pytest.mark.slow  # each starts the command several times

DOCUMENT = (Path(__file__).parents[1] / "docs" / "jobs.md").read_text()
# as the document has them, but for the GPU
MERGE, SCHEDULE, LIST, DELETE = (
    shlex.split(line.removesuffix(" --device cuda"))
    for line in re.findall(r"^lewis-hub (.+)$", DOCUMENT, re.MULTILINE)
)
RECIPE = """
base_model: zoo/base
models: [{{model: zoo/expert-reverse, parameters: {{weight: {weight}}}}}]
merge_method: task_arithmetic
dtype: bfloat16
evaluate:
  tasks: [zoo_reverse]
  include: tasks
  limit: 20
  compare: [base]
  gate: {{task: zoo_reverse, metric: "exact_match,none", not_worse_than: [previous]}}
publish: {{repo: lewis/reverse, license: apache-2.0}}
"""


@pytest.fixture
def jobs(tmp_path):
    pytest.importorskip("hf_xet")
    shutil.copytree(zoo_folder() / "tasks", tmp_path / "work" / "tasks")
    for name, weight in (("recipe", 1.0), ("bad", 0.0)):
        text = RECIPE.format(weight=weight)
        (tmp_path / "work" / f"{name}.yaml").write_text(text)
    with serve(tmp_path / "hub", jobs=True) as hub:
        seed_hub(hub.api())
        yield hub


def run(hub, folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "lewis_hub", *words],
        cwd=folder / "work",
        env=os.environ
        | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.write_token,
            "HF_HOME": str(folder / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_merge_on_jobs_is_published_and_ends_with_the_job_s_exit_code(jobs, tmp_path):
    done = run(jobs, tmp_path, *MERGE, "--json")

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (job,) = jobs.api().list_jobs(namespace="lewis")
    assert "Evaluating: 40 items" in done.stderr
    commits = [one.commit_id for one in jobs.api().list_repo_commits("lewis/reverse")]
    assert len(commits) == 2
    assert (told["status"], told["output"], told["repo"]) == ("merged", None, "lewis/reverse")
    assert (told["commit"], told["url"]) == (commits[0], f"{jobs.url}/lewis/reverse")
    assert (told["job"], told["job_url"]) == (job.id, job.url)
    assert told["scores"]["zoo_reverse"]["n"] == 20
    assert told["gate"]["passed"] is True

    again = run(jobs, tmp_path, *MERGE, "--json")

    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "unchanged"

    refused = run(jobs, tmp_path, *MERGE, "bad.yaml")

    assert refused.returncode == 3
    (job, *_) = jobs.api().list_jobs(namespace="lewis")
    assert refused.stdout == f"Job {job.id} ended with exit code 3: {job.url}\n"
    assert (
        "below the quality gate: on zoo_reverse (exact_match) the merged model is" in refused.stderr
    )
    assert [one.commit_id for one in jobs.api().list_repo_commits("lewis/reverse")] == commits

    for said in (done.stdout, done.stderr, refused.stdout, refused.stderr):
        assert jobs.write_token not in said
    for one in jobs.api().list_jobs(namespace="lewis"):
        assert jobs.write_token not in repr(one)
        assert one.flavor == "a100-large"
    kept = [path for path in jobs.root.rglob("*") if path.is_file() and path.name != "users.json"]
    assert all(jobs.write_token.encode() not in path.read_bytes() for path in kept)


def test_a_schedule_merges_when_it_is_triggered(jobs, tmp_path):
    made = run(jobs, tmp_path, *SCHEDULE, "--json")
    (one,) = json.loads(run(jobs, tmp_path, *LIST, "--json").stdout)["schedules"]

    told = json.loads(made.stdout)
    assert (told["status"], told["schedule"]) == ("scheduled", "17 4 * * 1")
    assert one["id"] == told["id"]
    assert one["command"].endswith("lewis-hub merge /recipe -o merged --push")

    api = jobs.api()
    job = api.trigger_scheduled_job(scheduled_job_id=one["id"], namespace="lewis")
    assert api.wait_for_job(job.id, namespace="lewis").status.stage == "COMPLETED"
    assert "lewis/gate.json" in api.list_repo_files("lewis/reverse")

    deleted = run(jobs, tmp_path, *DELETE[:-1], one["id"])

    assert (deleted.returncode, deleted.stdout) == (0, f"Deleted {one['id']}\n")
    assert json.loads(run(jobs, tmp_path, *LIST, "--json").stdout) == {"schedules": []}


def test_the_answer_of_a_hub_without_jobs_is_shown(hub, tmp_path):
    seed_hub(hub.api())
    (tmp_path / "work").mkdir()
    recipe = (
        RECIPE.format(weight=1.0)
        .replace("  include: tasks\n", "")
        .replace("lewis/", hub.user + "/")
        .replace("zoo_reverse", "gsm8k")
        .replace("exact_match,none", "exact_match,strict-match")
    )
    (tmp_path / "work" / "recipe.yaml").write_text(recipe)

    done = run(hub, tmp_path, "merge", "--push", "--on", "jobs")

    assert done.returncode == 1
    assert "This Hub runs no Jobs" in done.stderr
    assert "Traceback" not in done.stderr
