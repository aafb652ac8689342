"""The workflow that `init --github` writes, run for real by act on this machine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd
from zoo_hub import put_zoo

from lewis_hub import __version__
from lewis_hub.cli.init import render_workflow
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import seed_hub, zoo_folder
from lewis_hub.localhub.server import serve

pytestmark = pytest.mark.slow  # each run scores models

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
WORKFLOW = Path(".github") / "workflows" / "remerge.yml"
EXPERT = "zoo/expert-reverse"
RECIPE = """
base_model: zoo/base
models: [{model: zoo/expert-reverse, parameters: {weight: 1.0}}]
merge_method: task_arithmetic
dtype: bfloat16
evaluate:
  tasks: [zoo_reverse]
  include: tasks
  limit: 20
  compare: [base]
  gate: {task: zoo_reverse, metric: "exact_match,none", not_worse_than: [base, previous]}
"""
PUBLISHED = "publish: {repo: lewis/reverse, license: apache-2.0}\n"
FIVE_MB = """
import shutil, sys
from collections import namedtuple
usage = namedtuple("usage", "total used free")(14_000_000_000, 13_995_000_000, 5_000_000)
if "preflight" in sys.orig_argv:  # what follows keeps a reserve that is larger than these models
    shutil.disk_usage = lambda path: usage
"""
PIP = """
import sys  # nothing is installed on the machine that runs the tests: what would be is noted
with open(__file__ + ".txt", "a") as noted:
    print(*sys.argv[1:], file=noted)
"""
CALLER = """
on: push
jobs:
  remerge:
    uses: ./.github/workflows/remerge.yml
    with: {repo: REPO}
"""
SETUP_PYTHON = """
name: setup-python
description: The Python that runs the tests
inputs:
  python-version: {description: not heeded, required: true}
runs:
  using: composite
  steps:
    - shell: bash
      run: echo "$BIN" >> "$GITHUB_PATH"
"""
UPLOAD = """
name: upload-artifact
description: Keeps the folder on this machine
inputs:
  name: {description: of the artifact, required: true}
  path: {description: a folder, required: true}
  include-hidden-files: {description: heeded, required: true}
  compression-level: {description: not heeded, required: true}
  retention-days: {description: not heeded, required: true}
outputs:
  artifact-id: {description: of what was uploaded, value: "${{ steps.kept.outputs.id }}"}
runs:
  using: composite
  steps:
    - id: kept
      shell: bash
      env: {FROM: "${{ inputs.path }}"}
      run: >-
        rm -rf "$ARTIFACTS" && mkdir "$ARTIFACTS" && cp -r "$FROM" "$ARTIFACTS/17" &&
        echo id=17 >> "$GITHUB_OUTPUT"
"""
DOWNLOAD = """
name: download-artifact
description: Takes the folder from this machine
inputs:
  name: {description: of the artifact}
  artifact-ids: {description: or its id}
  path: {description: a folder, required: true}
runs:
  using: composite
  steps:
    - shell: bash
      env: {TO: "${{ inputs.path }}", ID: "${{ inputs.name && 17 || inputs.artifact-ids }}"}
      run: mkdir -p "$TO" && cp -r "$ARTIFACTS/$ID/." "$TO"
"""
STUBS = {
    "setup-python": SETUP_PYTHON,
    "upload-artifact": UPLOAD,
    "download-artifact": DOWNLOAD,
}
KEPT = ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "OMP_NUM_THREADS")


@pytest.fixture
def publisher(hub, tmp_path, monkeypatch):
    """A publisher's repository with a recipe and its workflow; the zoo is on the Hub."""
    put_zoo(hub)
    folder = tmp_path / "publisher"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "recipe.yaml").write_text(RECIPE + PUBLISHED)
    shutil.copytree(zoo_folder() / "tasks", folder / "tasks")
    monkeypatch.chdir(folder)
    assert CliRunner().invoke(cli, ["init", "--github"]).exit_code == 0
    commit(folder)
    for name, text in STUBS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "action.yml").write_text(text)
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()  # so that it is found before the real one
    (tmp_path / "pip" / "__main__.py").write_text(PIP)
    return folder


def installed(folder):
    """What the runs so far would have installed, one command a line."""
    noted = folder.parent / "pip" / "__main__.py.txt"
    lines = noted.read_text().splitlines()
    noted.unlink()
    return lines


def git(folder, *words):
    who = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org")
    subprocess.run(["git", *who, *words], cwd=folder, check=True)


def commit(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "Change")


def act(folder, event, *words):
    """Run the workflow; returns act's exit code and all that it shows."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    given = {name: os.environ[name] for name in KEPT}
    given |= {"BIN": str(BIN), "HF_HOME": str(home / "hf"), "PYTHONPATH": str(folder.parent)}
    given["ARTIFACTS"] = str(home / "artifacts")
    environment = [word for name, value in given.items() for word in ("--env", f"{name}={value}")]
    command = [BIN / "act", event, *words, *environment]
    command += ["-P", "ubuntu-latest=-self-hosted", "--no-cache-server"]
    for used in stubbed():
        stub = folder.parent / used.partition("@")[0].partition("/")[2]
        command += ["--local-repository", f"{used}={stub}"]
    own = {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        command, cwd=folder, env=own, capture_output=True, text=True, timeout=300, check=False
    )
    shutil.rmtree(home / "hf", ignore_errors=True)  # the next runner is a new machine
    return done.returncode, done.stdout + done.stderr


def copied(folder):
    """This repository without what is made in it: act holds all of it in memory."""
    made = shutil.ignore_patterns(".venv", ".git", ".*_cache", "__pycache__", "build", "dist")
    return shutil.copytree(ROOT, folder / "lewis-hub", ignore=made)


def stubbed():
    """The actions as the workflows pin them, but for the checkout, which act knows."""
    jobs = yaml.safe_load(render_workflow("recipe.yaml"))["jobs"].values()
    used = {step["uses"] for job in jobs for step in job["steps"] if "uses" in step}
    return [name for name in sorted(used) if not name.startswith("actions/checkout")]


def put(hub, weights):
    change = CommitOperationAdd("model.safetensors", weights)
    return hub.api().create_commit(EXPERT, [change], commit_message="Train on").oid


def commits(hub):
    return [one.commit_id for one in hub.api().list_repo_commits("lewis/reverse")]


def test_a_schedule_pushes_what_changed_and_what_passes_the_gate(hub, publisher):
    """Keyless: the secret may only read, and what GitHub says of the workflow is trusted."""
    hub.api().create_repo("lewis/reverse")
    hub.publishers["signed by GitHub"] = "lewis/reverse"
    trusted = ["-s", f"HF_TOKEN={hub.read_token}", "--var", "HF_OIDC_RESOURCE=lewis/reverse"]
    trusted += ["--env", "HF_OIDC_ID_TOKEN=signed by GitHub"]

    code, said = act(publisher, "schedule", *trusted)
    assert code == 0, said
    first, *_ = commits(hub)
    assert f"[`lewis/reverse`](<{hub.url}/lewis/reverse>) at [`{first[:12]}`]" in said
    assert "| model | `zoo_reverse`, exact match |" in said
    assert "The gate accepted this merge." in said
    assert hub.read_token not in said
    assert "hf_jwt_" not in said

    code, said = act(publisher, "schedule", *trusted)
    assert code == 0, said
    assert "Summary - ## Nothing changed" in said
    assert "holds this merge already" in said
    assert "Run Main Merge and score" not in said
    assert commits(hub)[0] == first

    weights = bytearray((zoo_folder() / "expert-reverse/model.safetensors").read_bytes())
    weights[-2] ^= 0x40  # one weight, a little
    moved = put(hub, bytes(weights))
    code, said = act(publisher, "schedule", *trusted)
    assert code == 0, said
    assert "Summary - ## Published" in said
    second = commits(hub)[0]
    assert second != first
    title = hub.api().list_repo_commits("lewis/reverse")[0].title
    assert moved[:8] in title

    put(hub, (zoo_folder() / "base/model.safetensors").read_bytes())
    code, said = act(publisher, "schedule", *trusted)
    assert code == 1
    assert "exit status 3" in said
    assert "Summary - ## Refused by the quality gate" in said
    assert f"worse than lewis/reverse at {second[:8]}: 0.000 against" in said
    assert commits(hub)[0] == second


def test_a_dispatched_repo_never_reaches_a_shell(hub, publisher, tmp_path):
    proof = tmp_path / "proof"

    code, said = act(publisher, "workflow_dispatch", "--input", f"repo=me/$(touch {proof})")

    assert code == 1
    assert "expected owner/name such as me/my-merge, found 'me/$(touch" in said
    assert not proof.exists()


def test_a_merge_larger_than_the_disk_is_streamed(hub, publisher, tmp_path):
    (publisher / "recipe.yaml").write_text(RECIPE.partition("  gate:")[0] + PUBLISHED)
    commit(publisher)
    (tmp_path / "sitecustomize.py").write_text(FIVE_MB)
    small = ["-s", f"HF_TOKEN={hub.write_token}"]

    code, said = act(publisher, "schedule", *small)

    assert code == 0, said
    assert "Run Main Merge from Hub to Hub" in said
    assert "Run Main Merge and score" not in said
    assert "Summary - ## Published" in said
    (first, *_) = commits(hub)
    assert "model.safetensors" in hub.api().list_repo_files("lewis/reverse")

    code, said = act(publisher, "schedule", *small)

    assert code == 0, said
    assert "Summary - ## Nothing changed" in said
    assert commits(hub)[0] == first


def test_a_merge_is_handed_over_to_jobs(publisher, tmp_path, monkeypatch):
    pytest.importorskip("hf_xet")
    with serve(tmp_path / "hub-with-jobs", jobs=True) as hub:
        seed_hub(hub.api())
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        words = ["-s", f"HF_TOKEN={hub.write_token}", "--var", "JOBS_FLAVOR=cpu-upgrade"]

        code, said = act(publisher, "schedule", *words, "--var", "JOBS_TIMEOUT=10m")

        assert code == 0, said
        assert "Run Main Merge on Hugging Face Jobs" in said
        assert "Run Main Merge and score" not in said
        assert "Run Main Push" not in said
        assert "Summary - ## Published" in said
        (first, *_) = commits(hub)

        code, said = act(publisher, "schedule", *words)

        assert code == 0, said
        assert "Summary - ## Nothing changed" in said
        assert commits(hub)[0] == first


@pytest.fixture
def caller(publisher):
    """Write a workflow that calls the reusable one, for a repo; its path is returned.

    The reusable one is nearly as it is: act does not know `$/`, GitHub's way to name what lies
    beside a workflow.
    """
    version = f"with:\n          version: {__version__}\n          only:"
    used = (ROOT / WORKFLOW).read_text().replace("uses: $/", "uses: ./")
    used = used.replace("with:\n          only:", version)
    (publisher / WORKFLOW).write_text(used)
    shutil.copytree(ROOT / ".github" / "actions", publisher / ".github" / "actions")

    def write(repo, secrets=""):
        text = CALLER.replace("REPO", repo) + secrets
        (publisher / WORKFLOW).with_name("caller.yml").write_text(text)
        commit(publisher)
        return ".github/workflows/caller.yml"

    return write


def test_a_caller_passes_its_inputs_to_the_reusable_workflow(hub, publisher, caller, tmp_path):
    proof = tmp_path / "proof"

    code, said = act(publisher, "push", "-W", caller(f"me/$(touch {proof})"))

    assert code == 1
    assert "expected owner/name such as me/my-merge, found 'me/$(touch" in said
    assert "Summary - ## Failed" in said
    assert not proof.exists()


def test_the_reusable_workflow_hands_its_merge_over_to_the_job_that_pushes(hub, publisher, caller):
    token = '    secrets: {HF_TOKEN: "${{ secrets.HF_TOKEN }}"}\n'
    words = ["-W", caller("lewis/reverse", token), "-s", f"HF_TOKEN={hub.write_token}"]

    code, said = act(publisher, "push", *words)

    assert code == 0, said
    assert f"::set-output:: commit-url={hub.url}/lewis/reverse/commit/{commits(hub)[0]}" in said
    assert "Summary - ## Published" in said


def test_the_action_in_the_documents_runs(hub, publisher, tmp_path):
    """With a stored token, and with the release that is installed here."""
    text = (ROOT / "docs" / "automation.md").read_text()
    ten_lines = re.search(r"```yaml\n(on:.+?)```", text, re.DOTALL)[1]
    pinned = f"me/lewis-hub/.github/actions/lewis-hub@{'a' * 40}"
    used = ten_lines.replace("OWNER/REPO/.github/actions/lewis-hub@SHA", pinned)
    used = used.replace("with: {recipe:", f"with: {{version: {__version__}, recipe:")
    (publisher / WORKFLOW).write_text(used)
    commit(publisher)

    code, said = act(
        publisher,
        "schedule",
        *("-s", f"HF_TOKEN={hub.write_token}"),
        *("--local-repository", f"me/lewis-hub@{'a' * 40}={copied(tmp_path)}"),
    )

    assert code == 0, said
    tool, itself, rest = installed(publisher)
    assert tool.startswith("install --no-cache-dir --no-deps --only-binary :all: --require-hashes")
    assert itself.endswith(f" --no-deps --no-build-isolation lewis-hub=={__version__}")
    assert rest.endswith(f" --require-hashes -r {ROOT / 'templates/workflows/requirements.txt'}")
    assert f"::set-output:: commit-url={hub.url}/lewis/reverse/commit/{commits(hub)[0]}" in said
    assert "::set-output:: status=published" in said
    assert hub.write_token not in said
