"""The quality gate from a recipe to the Hub: what is worse than before is not published."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lewis_hub.cli.main import cli
from lewis_hub.errors import OutputError

pytestmark = pytest.mark.slow  # each scores models

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
  gate: {gate}
publish: {{repo: {user}/reverse, license: apache-2.0}}
"""
GATE = "{task: zoo_reverse, metric: 'exact_match,none', not_worse_than: [base, previous]}"
PROPOSES = GATE.replace("previous]", "previous], on_refusal: pull-request")
FOUND = (
    "zoo_reverse (exact_match) the merged model is worse than lewis/reverse at {sha}: 0.000 "
    "against 0.850 (difference −0.850, 95 % interval −0.948 to −0.585)"
)


def run(*words):
    done = CliRunner().invoke(cli, [*words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def typed(*words):
    """In a process of its own, which `main` ends."""
    command = [sys.executable, "-m", "lewis_hub", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def merge(hub, *words, weight=1.0, gate=GATE):
    """Merge into `merged`, or elsewhere by -o; weight 1 gives the expert, 0 the base."""
    text = RECIPE.format(weight=weight, gate=gate, user=hub.user)
    Path("recipe.yaml").write_text(text)
    done = run("merge", "-q", "--json", *words)
    return done.exit_code, json.loads(done.stdout), done.stderr


def commits(hub):
    return [one.commit_id for one in hub.api().list_repo_commits(f"{hub.user}/reverse")]


def test_what_is_better_passes_and_what_is_worse_is_not_pushed(hub, place):
    code, told, _ = merge(hub, "--push")

    assert (code, told["status"], told["gate"]["passed"]) == (0, "merged", True)
    assert [check["why"] for check in told["gate"]["checks"]] == ["", "the repo does not exist yet"]
    assert "The gate accepted this merge." in (place / "merged/README.md").read_text()
    published = commits(hub)

    code, again, _ = merge(hub, "--push")

    assert (code, again["status"], again["gate"]) == (0, "unchanged", told["gate"])
    assert commits(hub) == published

    code, told, message = merge(hub, "--push", "-o", "bad", weight=0.0)

    assert (code, told["status"], told["gate"]["passed"]) == (3, "refused", False)
    assert "repo" not in told
    found = FOUND.format(sha=published[0][:8])
    assert message == (
        f"lewis-hub: {place / 'bad'}: below the quality gate: on {found}.\n"
        f"Nothing was pushed, and the merge is kept. `lewis-hub push {place / 'bad'} OWNER/NAME "
        "--force` publishes it anyway.\n"
    )
    assert commits(hub) == published
    assert list(hub.api().get_repo_discussions(f"{hub.user}/reverse")) == []
    card = (place / "bad/README.md").read_text()
    assert "The gate refused this merge." in card
    assert f"- On {found}.".replace("@", "&#64;") in card

    assert run("verify", "bad").exit_code == 0  # a verdict is no part of what was merged
    pushed = typed("push", "bad", f"{hub.user}/reverse", "--json")
    assert (pushed.returncode, json.loads(pushed.stdout)["status"]) == (3, "refused")
    assert f"lewis-hub: bad: below the quality gate: on {found}." in pushed.stderr
    assert commits(hub) == published

    assert typed("merge", "-q", "--push", "-o", "bad").returncode == 3
    assert commits(hub) == published

    assert run("push", "bad", f"{hub.user}/reverse", "--force").exit_code == 0
    newest = hub.api().list_repo_commits(f"{hub.user}/reverse")[0]
    assert newest.title.startswith("Merge with lewis-hub, below the quality gate: ")


def test_a_refused_merge_is_proposed_where_the_gate_asks_for_it(hub, place):
    merge(hub, "--push")
    published = commits(hub)

    code, told, message = merge(hub, "--push", "-o", "bad", weight=0.0, gate=PROPOSES)

    assert (code, told["status"]) == (3, "refused")
    assert told["url"] == told["pull_request"] == f"{hub.url}/{hub.user}/reverse/discussions/1"
    assert message.endswith(f"Main is unchanged; the merge is proposed at {told['url']}.\n")
    assert commits(hub) == published
    (proposed,) = hub.api().get_repo_discussions(f"{hub.user}/reverse")
    assert proposed.title.startswith("Merge with lewis-hub, below the quality gate: ")
    details = hub.api().get_discussion_details(f"{hub.user}/reverse", proposed.num)
    description = details.events[0].content
    assert description.startswith("This merge missed its quality gate.\n\n- On zoo_reverse")
    assert "| model | `zoo_reverse`, exact match |" in description

    again = merge(hub, "--push", "-o", "bad", weight=0.0, gate=PROPOSES)

    assert (again[0], again[1]["pull_request"]) == (3, told["pull_request"])
    pushed = typed("push", "bad", "-q", "--json")  # in a step of its own, as a workflow does
    step = json.loads(pushed.stdout)
    assert (pushed.returncode, step["status"]) == (3, "refused")
    assert step["pull_request"] == told["pull_request"]
    assert pushed.stderr.endswith(f"Main is unchanged; the merge is proposed at {told['url']}.\n")
    assert len(list(hub.api().get_repo_discussions(f"{hub.user}/reverse"))) == 1


def test_a_refused_merge_is_not_proposed_to_a_repo_that_does_not_exist(hub, place, monkeypatch):
    scored = RECIPE.replace("compare: [base]", "compare: [experts]")
    monkeypatch.setattr(sys.modules[__name__], "RECIPE", scored)
    gate = PROPOSES.replace("base, previous", "experts")

    code, told, message = merge(hub, "--push", "-o", "bad", weight=0.0, gate=gate)

    assert (code, told["status"]) == (3, "refused")
    assert "below the quality gate" in message
    assert "Nothing was pushed, and the merge is kept." in message
    assert not hub.api().repo_exists(f"{hub.user}/reverse")


def test_a_refused_merge_stays_refused_where_every_merge_is_proposed(hub, place, monkeypatch):
    merge(hub, "--push")
    proposing = RECIPE.replace("license:", "as: pull-request, license:")
    monkeypatch.setattr(sys.modules[__name__], "RECIPE", proposing)
    code, told, message = merge(hub, "--push", "-o", "bad", weight=0.0, gate=PROPOSES)
    assert (code, told["status"]) == (3, "refused")

    for folder in ("bad", "other"):
        code, again, said = merge(hub, "--push", "-o", folder, weight=0.0, gate=PROPOSES)

        assert (code, again["status"], again["gate"]) == (3, "refused", told["gate"])
        assert again["pull_request"] == told["pull_request"]
        assert said.partition(": below")[2] == message.partition(": below")[2]


def test_without_push_a_missed_gate_leaves_the_folder_and_exits_3(hub, place):
    merge(hub, "--push")

    code, told, _ = merge(hub, "-o", "bad", weight=0.0)

    assert (code, told["status"], told["output"]) == (3, "refused", str(place / "bad"))
    assert (place / "bad/model.safetensors").exists()


def test_a_folder_that_passed_is_judged_again_by_what_was_pushed_meanwhile(hub, place):
    code, told, _ = merge(hub, "-o", "bad", weight=0.0)
    assert (code, told["gate"]["passed"]) == (0, True)  # nothing was there yet
    merge(hub, "--push")
    published = commits(hub)

    code, told, _ = merge(hub, "--push", "-o", "bad", weight=0.0)

    assert (code, told["status"]) == (3, "refused")
    assert commits(hub) == published
    assert FOUND.format(sha=published[0][:8]) in (place / "bad/README.md").read_text()
    assert not json.loads((place / "bad/lewis/gate.json").read_text())["passed"]


def test_a_folder_is_judged_again_when_it_is_pushed(hub, place):
    """As in a workflow, where the push is a job of its own."""
    merge(hub, "-o", "bad", weight=0.0)
    assert json.loads(Path("bad/lewis/gate.json").read_text())["passed"]  # nothing was there yet
    Path("bad/model.sig").write_text("{}")
    merge(hub, "--push")
    published = commits(hub)

    pushed = typed("push", "bad", "--json")

    assert (pushed.returncode, json.loads(pushed.stdout)["status"]) == (3, "refused")
    assert f"below the quality gate: on {FOUND.format(sha=published[0][:8])}." in pushed.stderr
    assert commits(hub) == published
    assert not json.loads(Path("bad/lewis/gate.json").read_text())["passed"]
    assert "The gate refused this merge." in Path("bad/README.md").read_text()
    page = Path("bad/lewis/report.html").read_text()
    told = f"Quality gate: On {FOUND.format(sha=published[0][:8])}."
    assert (page.count("Quality gate: "), page.count(told)) == (2, 1)
    assert not Path("bad/model.sig").exists()  # it covers the verdict
    assert run("verify", "bad").exit_code == 0


def test_a_push_to_another_repo_changes_no_verdict(hub, place):
    merge(hub, "--push")
    merge(hub, "-o", "bad", weight=0.0)
    verdict = Path("bad/lewis/gate.json").read_text()

    pushed = typed("push", "bad", f"{hub.user}/another")  # which holds nothing to compare with

    assert pushed.returncode == 3
    assert Path("bad/lewis/gate.json").read_text() == verdict
    assert not hub.api().repo_exists(f"{hub.user}/another")


def test_a_refused_merge_that_is_made_again_is_not_proposed_again(hub, place):
    merge(hub, "--push")
    _, first, _ = merge(hub, "--push", "-o", "bad", weight=0.0, gate=PROPOSES)

    code, told, message = merge(hub, "--push", "-o", "next week", weight=0.0, gate=PROPOSES)

    assert (code, told["status"], told["commit"]) == (3, "refused", first["commit"])
    assert message.endswith(f"the merge is proposed at {first['pull_request']}.\n")
    assert len(list(hub.api().get_repo_discussions(f"{hub.user}/reverse"))) == 1


def test_another_task_file_is_another_merge(hub, place):
    merge(hub, "--push")
    assert merge(hub, "--push")[1]["status"] == "unchanged"
    task = Path("tasks/zoo_reverse.yaml")
    task.write_text(task.read_text() + 'description: "Reverse it. "\n')

    code, told, _ = merge(hub, "--push", "-o", "again")

    assert (code, told["status"]) == (0, "merged")
    sent = Path(hub.api().hf_hub_download(f"{hub.user}/reverse", "lewis/tasks/zoo_reverse.yaml"))
    assert sent.read_bytes() == task.read_bytes()
    assert told["gate"]["checks"][1]["why"] == "it was scored on other items or prompts"


def test_a_merge_without_scores_leaves_no_score_of_the_merge_before_it(hub, place):
    name, boards = f"{hub.user}/reverse", "benchmarks: {zoo_reverse: BOARD}"
    board = "{dataset: zoo/reverse, task_id: reverse, metric: 'exact_match,none'}"
    text = RECIPE.format(weight=1.0, gate=GATE, user=hub.user).replace("  limit: 20\n", "")
    text = text.replace("  compare:", f"  {boards.replace('BOARD', board)}\n  compare:")
    Path("recipe.yaml").write_text(text)
    run("merge", "-q", "--push")
    described = {".eval_results/reverse.yaml", "lewis/gate.json", "lewis/scores.json"}
    assert described <= {*hub.api().list_repo_files(name)}

    unscored = text.partition("evaluate:")[0] + "publish:" + text.partition("publish:")[2]
    Path("recipe.yaml").write_text(unscored.replace("weight: 1.0", "weight: 0.5"))
    run("merge", "-q", "--push", "-o", "unscored")

    now = {*hub.api().list_repo_files(name)}
    assert not described & now
    assert {"lewis/lock.json", "lewis/provenance.json", "lewis/report.html"} <= now


def test_a_metric_that_the_task_does_not_have_is_refused_before_any_download(hub, place):
    with pytest.raises(Exception, match="it has no metric `acc,none`."):
        merge(hub, gate=GATE.replace("exact_match", "acc"))

    assert not (place / "merged.partial").exists()


def test_a_gate_cannot_be_passed_by_not_scoring(hub, place):
    (place / "recipe.yaml").write_text(RECIPE.format(weight=1, gate=GATE, user=hub.user))
    done = run("merge", "--push", "--no-eval")

    assert done.exit_code == 2
    assert "the recipe has a quality gate" in done.stderr


@pytest.mark.parametrize("step", ["", "name: step\n"])
def test_scores_by_an_edited_task_are_made_again(hub, place, step):
    scored = "evaluate: {tasks: [zoo_reverse], include: tasks, limit: 2}\n"
    text = "base_model: zoo/base\nmodels: [NAME]\nmerge_method: linear\n"
    if step:
        text = step + text.replace("NAME", "zoo/expert-reverse") + "---\n" + text
    Path("recipe.yaml").write_text(text.replace("NAME", "step" if step else "zoo/base") + scored)
    words = ("merge", "-q", "--json")
    first, again = (json.loads(run(*words).stdout)["status"] for _ in range(2))
    task = Path("tasks/zoo_reverse.yaml")
    task.write_text(task.read_text() + "description: 'Letters: '\n")

    with pytest.raises(OutputError, match="holds something else than this merge"):
        run(*words)

    assert (first, again) == ("merged", "unchanged")
    assert run("merge", "-q", "--no-eval").exit_code == 0
