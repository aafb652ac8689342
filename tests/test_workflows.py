"""The workflows, the composite action and the workflow that `init --github` writes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from lewis_hub import __version__
from lewis_hub.cli.init import render, render_workflow
from lewis_hub.cli.main import cli
from lewis_hub.recipe.read import read_recipe

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
OURS = ROOT / ".github"
RECIPE = "merge_method: linear\nmodels: [{model: a/b, parameters: {weight: 1.0}}]\n"


@pytest.fixture(scope="module")
def publisher(tmp_path_factory):
    """A publisher's repository: what `init --github` writes, and the action as documented."""
    folder = tmp_path_factory.mktemp("publisher")
    workflow = folder / ".github" / "workflows" / "remerge.yml"
    workflow.parent.mkdir(parents=True)
    workflow.write_text(render_workflow("merges/recipe.yaml"))
    workflow.with_name("action.yml").write_text(documented()[0].replace("SHA", "a" * 40))
    workflow.with_name("gated.yml").write_text(render_workflow("merges/recipe.yaml", "me"))
    (folder / ".github" / "dependabot.yml").write_text(render("workflows/dependabot.yml"))
    return folder


def documented():
    """The two workflows in the documents: by the action, and by the reusable workflow."""
    text = (ROOT / "docs" / "automation.md").read_text()
    return re.findall(r"```yaml\n(.+?)```", text, re.DOTALL)


def workflows(publisher):
    return [*(OURS / "workflows").glob("*.yml"), *publisher.rglob("workflows/*.yml")]


def complaints(command, *words):
    """What a linter finds; empty where it is content."""
    done = subprocess.run(
        [BIN / command, *map(str, words)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.stdout + done.stderr if done.returncode else ""


def test_zizmor_finds_nothing(publisher):
    assert complaints("zizmor", "--offline", "--quiet", OURS, publisher) == ""


def test_actionlint_finds_nothing(publisher):
    assert complaints("actionlint", *workflows(publisher)) == ""


def test_yamllint_finds_nothing(publisher):
    assert complaints("yamllint", "--strict", OURS, publisher) == ""


def test_all_workflows_match_github_s_schema(publisher):
    known = "--builtin-schema"
    assert (
        complaints("check-jsonschema", known, "vendor.github-workflows", *workflows(publisher))
        == ""
    )
    assert (
        complaints(
            "check-jsonschema", known, "vendor.github-actions", *OURS.glob("actions/*/action.yml")
        )
        == ""
    )
    files = [folder / "dependabot.yml" for folder in (OURS, publisher / ".github")]
    assert complaints("check-jsonschema", known, "vendor.dependabot", *files) == ""


BROKEN = """name:  broken
on: push
jobs:
  one:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v6
      - run: echo "${{ github.event.issue.title }}"
        shel: bash
"""
FOUND = {  # what each linter says of it
    "zizmor": (["--offline", "--quiet"], "unpinned-uses"),
    "actionlint": ([], 'unexpected key "shel"'),
    "yamllint": (["--strict"], "too many spaces after colon"),
    "check-jsonschema": (["--builtin-schema", "vendor.github-workflows"], "'shel' was unexpected"),
}


@pytest.mark.parametrize("command", FOUND)
def test_the_linters_detect_a_wrong_workflow(command, tmp_path):
    broken = tmp_path / ".github" / "workflows" / "broken.yml"
    broken.parent.mkdir(parents=True)
    broken.write_text(BROKEN)
    words, said = FOUND[command]

    assert said in complaints(command, *words, broken)


def steps_of(document):
    """Every step of a workflow, or of an action."""
    jobs = document.get("jobs") or {"": document["runs"]}
    return [step for job in jobs.values() for step in job["steps"]]


def documents(publisher):
    files = [*workflows(publisher), *OURS.glob("actions/*/action.yml")]
    return {file: yaml.safe_load(file.read_text()) for file in files}


def test_no_expression_is_inserted_into_a_script(publisher):
    for file, document in documents(publisher).items():
        for step in steps_of(document):
            assert "${{" not in step.get("run", ""), file


def test_every_action_is_pinned_by_commit_and_the_same_everywhere(publisher):
    pins = {}
    for document in documents(publisher).values():
        for step in steps_of(document):
            if "uses" in step and not step["uses"].startswith("$/"):
                name, _, commit = step["uses"].partition("@")
                assert re.fullmatch(r"[0-9a-f]{40}", commit), step["uses"]
                assert pins.setdefault(name, commit) == commit
    assert len(pins) == 6


def test_the_action_runs_the_scripts_of_the_workflow_that_init_writes(publisher):
    written, action = (
        {step["name"]: step["run"] for step in steps_of(document) if "run" in step}
        for document in (
            yaml.safe_load(render_workflow("recipe.yaml")),
            yaml.safe_load((OURS / "actions/lewis-hub/action.yml").read_text()),
        )
    )

    assert written == action


def test_every_command_of_the_written_workflow_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lewis-hub" / "merged").mkdir(parents=True)
    Path("recipe.yaml").write_text(RECIPE)
    given = {
        '${REPO:+--repo="$REPO"}': "--repo=me/mine",
        "${FORCE:+--force}": "--force",
        '"$RUNNER_TEMP"/lewis-hub/{preflight,merge,push}.json': "a.json b.json c.json",
        "${JOBS:+--on=jobs}": "--on=jobs",
        '"$FLAVOR"': "a100-large",
        '${TIMEOUT:+--timeout="$TIMEOUT"}': "--timeout=2h",
        'mkdir -p "$RUNNER_TEMP/lewis-hub" && ': "",
        "$RUNNER_TEMP": str(tmp_path),
        "$RECIPE": "recipe.yaml",
    }
    scripts = [step.get("run", "") for step in steps_of(yaml.safe_load(render_workflow("r.yaml")))]
    commands = [script for script in scripts if "lewis-hub " in script]

    assert len(commands) == 7  # the report twice
    for script in commands:
        for shell, value in given.items():
            script = script.replace(shell, value)
        command, words = cli, shlex.split(script.partition(" > ")[0])[1:]
        while isinstance(command, click.Group):
            command, words = command.commands[words[0]], words[1:]
        assert isinstance(command.make_context("step", words), click.Context)


def test_the_written_workflow_has_few_permissions_and_cancels_no_push():
    document = yaml.safe_load(render_workflow("merges/recipe.yaml"))
    merge, push = document["jobs"].values()

    assert document["permissions"] == {}
    assert merge["permissions"] == {"contents": "read"}
    assert push["permissions"] == {"contents": "read", "id-token": "write"}
    assert document["concurrency"]["cancel-in-progress"] is False
    (when,) = document[True]["schedule"]  # YAML reads `on` as true
    assert 0 < int(when["cron"].split()[0]) < 60
    assert document["env"]["RECIPE"] == "${{ inputs.recipe || 'merges/recipe.yaml' }}"


def test_the_reusable_workflow_signs_in_only_to_push():
    document = yaml.safe_load((OURS / "workflows/remerge.yml").read_text())
    merge, push = document["jobs"].values()
    inputs = document[True]["workflow_call"]["inputs"]

    assert merge["permissions"] == {"contents": "read"}
    assert push["permissions"] == {"contents": "read", "id-token": "write"}
    assert merge["runs-on"] == push["runs-on"] == "${{ inputs.runs-on }}"
    assert inputs["runs-on"]["default"] == "ubuntu-latest"
    assert inputs == document[True]["workflow_dispatch"]["inputs"] | {
        name: told
        for name, told in inputs.items()
        if name in ("recipe", "oidc-resource")  # the caller's
    }
    for job in (merge, push):
        given = job["steps"][-1]["with"]
        action = yaml.safe_load((OURS / "actions/lewis-hub/action.yml").read_text())
        assert {str(name) for name in given} <= {*action["inputs"], "True"}


def test_runs_of_other_recipes_and_targets_do_not_wait_for_each_other():
    """Of those that wait in a group, GitHub keeps the newest only."""
    written = yaml.safe_load(render_workflow("merges/recipe.yaml"))
    called = yaml.safe_load((OURS / "workflows/remerge.yml").read_text())

    asked = "${{ inputs.recipe || 'merges/recipe.yaml' }}-${{ inputs.repo }}"
    assert written["concurrency"]["group"] == f"remerge-{asked}"
    asked = "${{ inputs.recipe }}-${{ inputs.repo }}"
    assert called["concurrency"]["group"] == f"lewis-hub-remerge-{asked}"


def test_each_job_of_a_run_hands_over_an_artifact_of_its_own():
    """A second artifact of one name would be refused, after the merge."""
    action = yaml.safe_load((OURS / "actions/lewis-hub/action.yml").read_text())
    steps = {step.get("name"): step for step in steps_of(action)}
    merge, push = yaml.safe_load((OURS / "workflows/remerge.yml").read_text())["jobs"].values()

    assert steps["Hand over"]["with"]["name"] == "lewis-hub-${{ job.check_run_id }}"
    identifier = f"${{{{ steps.{steps['Hand over']['id']}.outputs.artifact-id }}}}"
    assert action["outputs"]["artifact"]["value"] == identifier
    assert merge["outputs"]["artifact"] == "${{ steps.merge.outputs.artifact }}"
    assert push["steps"][-1]["with"]["artifact"] == "${{ needs.merge.outputs.artifact }}"
    taken = steps["Take over"]["with"]
    assert (taken.get("name"), taken["artifact-ids"]) == (None, "${{ inputs.artifact }}")


def test_gated_sources_are_read_by_the_identity_of_the_user():
    document = yaml.safe_load(render_workflow("recipe.yaml", "me"))
    merge, _ = document["jobs"].values()

    assert merge["permissions"] == {"contents": "read", "id-token": "write"}
    signed_in = [
        step["name"]
        for step in merge["steps"]
        if step.get("env", {}).get("HF_OIDC_RESOURCE") == "me"
    ]
    assert signed_in == ["Check sources, target and disk", "Merge and score"]


@pytest.mark.parametrize("user", ["007", "null", "1e3"])
def test_the_name_of_a_user_stays_a_text(user):
    merge = yaml.safe_load(render_workflow("recipe.yaml", user))["jobs"]["merge"]

    named = [step.get("env", {}).get("HF_OIDC_RESOURCE") for step in merge["steps"]]
    assert list(filter(None, named)) == [user, user]


@pytest.mark.parametrize(("visibility", "code"), [("private", 0), ("public", 1), ("internal", 1)])
def test_a_private_merge_is_not_handed_over_in_a_public_repository(tmp_path, visibility, code):
    steps = {step.get("name"): step for step in steps_of(yaml.safe_load(render_workflow("r.yaml")))}
    asked = steps["Require a private repository"]
    (tmp_path / "curl").write_text(f'#!/bin/sh\necho \'{{"visibility": "{visibility}"}}\'\n')
    (tmp_path / "curl").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{BIN}:/usr/bin:/bin"}

    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", asked["run"]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == code
    assert done.stderr.startswith("The target is not public" if code else "")
    assert asked["if"] == (
        "steps.preflight.outputs.way == 'merge' && steps.preflight.outputs.private == 'yes'"
    )
    assert [*steps].index(asked["name"]) < [*steps].index("Hand over")


def test_no_step_imports_from_the_checkout(publisher, tmp_path):
    """With `-m` and `-c`, Python looks there first: for pip, beside a right to sign in."""
    for name in ("pip", "json", "importlib"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w')")
    released = (OURS / "workflows" / "release.yml", OURS / "workflows" / "check.yml")
    steps = [
        step
        for file, document in documents(publisher).items()
        if file not in released  # they run this repository's own code
        for step in steps_of(document)
        if re.search(r"\bpython\b", step.get("run", ""))
    ]

    assert len(steps) == 8  # of the action, and of the workflow with and without --gated
    for step in steps:
        given = {"PATH": str(BIN), "PYTHONSAFEPATH": step["env"]["PYTHONSAFEPATH"]}
        for words in (["-m", "pip", "--version"], ["-c", "import json, importlib"]):
            subprocess.run([BIN / "python", *words], cwd=tmp_path, env=given, check=False)
        assert not (tmp_path / "imported").exists(), step["name"]


def test_a_job_that_uses_the_action_again_reports_nothing_of_the_recipe_before(tmp_path):
    action = steps_of(yaml.safe_load((OURS / "actions/lewis-hub/action.yml").read_text()))
    steps = [step for step in action if step.get("name") in ("Install", "Report")]
    assert [step["name"] for step in steps] == ["Install", "Report"]
    assert "if" not in steps[0]
    handed = tmp_path / "lewis-hub"
    handed.mkdir()
    published = {"status": "merged", "commit": "1" * 40, "commit_url": "https://x/a/commit/1"}
    (handed / "push.json").write_text(json.dumps(published))
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{BIN}:/usr/bin:/bin", "RUNNER_TEMP": str(tmp_path)}
    environment |= {"REQUIREMENT": "x", "GITHUB_OUTPUT": str(tmp_path / "output")}

    for step in steps:
        words = ["bash", "-eo", "pipefail", "-c", step["run"]]
        subprocess.run(words, env=environment, check=True, capture_output=True)

    assert (tmp_path / "output").read_text() == "status=failed\ncommit-url=\n"


def test_only_the_steps_that_push_sign_in_as_the_workflow():
    document = yaml.safe_load(render_workflow("recipe.yaml"))
    known = {step["name"]: set(step.get("env", {})) for step in steps_of(document) if "run" in step}

    assert known == {
        "Install": {"REQUIREMENT", "PIP_EXTRA_INDEX_URL", "PYTHONSAFEPATH"},
        "Check sources, target and disk": {"HF_TOKEN"},
        "Require a private repository": {"GH_TOKEN", "PYTHONSAFEPATH"},
        "Merge and score": {"HF_TOKEN"},
        "Merge on Hugging Face Jobs": {"HF_TOKEN"},
        "Push": {"HF_TOKEN", "HF_OIDC_RESOURCE"},
        "Merge from Hub to Hub": {"HF_TOKEN", "HF_OIDC_RESOURCE"},
        "Report": set(),
    }


def test_the_written_workflow_installs_this_version():
    install = next(
        step for step in steps_of(yaml.safe_load(render_workflow("r.yaml"))) if "run" in step
    )

    assert install["env"]["REQUIREMENT"] == f"lewis-hub=={__version__}"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "merges").mkdir()
    monkeypatch.chdir(tmp_path / "merges")
    return tmp_path


def init(*words):
    return CliRunner().invoke(cli, ["init", "--github", *words])


def test_init_puts_the_workflow_in_the_root_of_the_repository(repository):
    done = init("--base", "org/base", "--expert", "org/one")

    assert done.exit_code == 0, done.output
    workflow = repository / ".github" / "workflows" / "remerge.yml"
    assert workflow.read_text() == render_workflow("merges/recipe.yaml")
    assert str(read_recipe(repository / "merges" / "recipe.yaml").base_model) == "org/base"
    assert f"Wrote {workflow}. The workflow publishes with the secret HF_TOKEN" in done.output
    updates = repository / ".github" / "dependabot.yml"
    assert (
        yaml.safe_load(updates.read_text())["updates"][0]["package-ecosystem"] == "github-actions"
    )


def test_init_keeps_the_repository_s_own_dependabot(repository):
    (repository / ".github").mkdir()
    (repository / ".github" / "dependabot.yml").write_text("own")

    assert init("--base", "org/base", "--expert", "org/one", "--gated", "me").exit_code == 0
    assert (repository / ".github" / "dependabot.yml").read_text() == "own"
    workflow = repository / ".github" / "workflows" / "remerge.yml"
    assert workflow.read_text() == render_workflow("merges/recipe.yaml", "me")


def test_init_keeps_an_existing_recipe(repository):
    Path("recipe.yaml").write_text(RECIPE)

    assert init().exit_code == 0
    assert Path("recipe.yaml").read_text() == RECIPE
    again = init()
    assert again.exit_code == 2
    assert "remerge.yml exists; replace it with --force" in again.output
    assert init("--force").exit_code == 0
    assert Path("recipe.yaml").read_text() == RECIPE


@pytest.mark.parametrize("name", ["re'cipe.yaml", "a b.yaml", "${{ x }}.yaml", "$(id).yaml"])
def test_init_refuses_a_recipe_path_with_characters_that_a_shell_interprets(repository, name):
    Path(name).write_text(RECIPE)

    done = init("-o", name)

    assert done.exit_code == 2
    assert "which a shell passes on unchanged" in " ".join(done.output.split())
    assert not (repository / ".github").exists()


def test_init_refuses_a_recipe_outside_of_the_repository(repository, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "recipe.yaml"
    elsewhere.write_text(RECIPE)

    done = init("-o", str(elsewhere))

    assert done.exit_code == 2
    assert f" is not in {repository / 'merges'}, where the workflow" in " ".join(
        done.output.split()
    )


@pytest.mark.parametrize("link", [".github", ".github/workflows"])
def test_init_follows_no_link_that_a_clone_comes_with(repository, tmp_path_factory, link):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (repository / link).parent.mkdir(exist_ok=True)
    (repository / link).symlink_to(elsewhere, target_is_directory=True)
    Path("recipe.yaml").write_text(RECIPE)

    done = init()

    assert done.exit_code == 2
    assert "is a link, or in one: delete the link" in " ".join(done.output.split())
    assert not [*elsewhere.iterdir()]


def test_the_action_in_the_documents_takes_ten_lines_and_only_inputs_that_it_has():
    written, job = documented()
    action = yaml.safe_load((OURS / "actions/lewis-hub/action.yml").read_text())
    called = yaml.safe_load((OURS / "workflows/remerge.yml").read_text())[True]["workflow_call"]

    assert len(written.splitlines()) == 10
    *_, step = steps_of(yaml.safe_load(written))
    assert set(step["with"]) <= set(action["inputs"])
    (told,) = yaml.safe_load(job)["jobs"].values()
    assert set(told["with"]) <= set(called["inputs"])
    assert set(told["secrets"]) == set(called["secrets"])
