"""The whole path over HTTP, as a user types it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from zoo_hub import put_zoo

from lewis_hub.demo.zoo import zoo_folder

pytestmark = pytest.mark.slow  # each starts the command several times

MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
    "lewis/recipe.yaml",
    "lewis/lock.json",
    "lewis/provenance.json",
    "lewis/importance.json",
    "lewis/density.json",
    "lewis/scores.json",
    "lewis/samples.json",
    "lewis/cost.json",
    "lewis/report.html",
    "lewis/tasks/zoo_reverse.yaml",
    "lewis/tasks/zoo_cipher.yaml",
}
# what a run cost and when it was differs from run to run, and so do card and report, which tell it
NOT_THE_SAME = {"lewis/cost.json", "lewis/provenance.json", "lewis/report.html", "README.md"}


@pytest.fixture
def zoo(hub, tmp_path):
    """A working folder with the zoo's recipe, and a Hub with the zoo on it."""
    put_zoo(hub)
    recipe = (zoo_folder() / "recipe.yaml").read_text()
    recipe = recipe.replace("include: tasks", "include: tasks\n  limit: 6")
    recipe = recipe.replace("repo: demo/", f"repo: {hub.user}/").replace(
        "samples: 128", "samples: 8"
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    shutil.copytree(zoo_folder() / "tasks", tmp_path / "tasks")
    return tmp_path


def command(*words):
    return [sys.executable, "-m", "lewis_hub", *words]


def environment(hub, folder):
    return os.environ | {
        "HF_TOKEN": hub.write_token,
        "HF_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def run(hub, folder, *words, check=True):
    done = subprocess.run(
        command(*words),
        cwd=folder,
        env=environment(hub, folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_one_command_merges_scores_and_publishes_and_the_second_changes_nothing(hub, zoo):
    done = run(hub, zoo, "merge", "recipe.yaml", "--push", "--json")

    document = json.loads(done.stdout)
    repo = document["repo"]
    assert document["status"] == "merged"
    assert repo == f"{hub.user}/reverse-cipher-lewis"
    on_disk = files_in(zoo / "merged")
    assert set(on_disk) >= MODEL_FILES
    published = {name for name in hub.api().list_repo_files(repo) if name != ".gitattributes"}
    assert published == set(on_disk)
    commits = hub.api().list_repo_commits(repo)
    scores = json.loads(on_disk["lewis/scores.json"])["tasks"]
    assert set(scores) == {"zoo_reverse", "zoo_cipher"}
    labels = [label.partition("@")[0] for label in scores["zoo_reverse"]["models"]]
    assert labels == [
        "base",
        "expert:zoo/expert-reverse",
        "expert:zoo/expert-cipher",
        "uniform",
        "merged",
    ]
    assert scores["zoo_reverse"]["n"] == 6
    assert "Downloading" in done.stderr
    assert "Evaluating" in done.stderr
    assert hub.write_token not in done.stdout + done.stderr
    assert all(hub.write_token.encode() not in content for content in on_disk.values())
    assert all(str(zoo).encode() not in content for content in on_disk.values())

    again = json.loads(run(hub, zoo, "merge", "recipe.yaml", "--push", "--json").stdout)

    assert again["status"] == "unchanged"
    assert [c.commit_id for c in hub.api().list_repo_commits(repo)] == [
        c.commit_id for c in commits
    ]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    token = hub.write_token
    model = AutoModelForCausalLM.from_pretrained(repo, token=token)
    tokenizer = AutoTokenizer.from_pretrained(repo, token=token)
    assert str(model.dtype) == "torch.bfloat16"
    assert tokenizer.chat_template


@pytest.mark.parametrize("guide", ["lewis", None])
def test_a_merge_without_evaluation_says_so_and_leaves_a_model(hub, zoo, guide):
    if guide is None:
        text = (zoo / "recipe.yaml").read_text()
        before, _, rest = text.partition("guide:")
        (zoo / "recipe.yaml").write_text(before + "evaluate:" + rest.partition("evaluate:")[2])

    document = json.loads(run(hub, zoo, "merge", "--no-eval", "--json", "-q", "-o", "out").stdout)

    assert document == {"status": "merged", "output": str(zoo / "out"), "scores": None}
    assert ("lewis/density.json" in files_in(zoo / "out")) == (guide is not None)
    assert "lewis/scores.json" not in files_in(zoo / "out")


def test_check_reads_a_few_kilobytes_and_no_weight(hub, zoo):
    document = json.loads(run(hub, zoo, "check", "--json").stdout)

    assert document["status"] == "fine"
    assert [source["role"] for source in document["sources"]] == ["base", "expert", "expert"]
    assert document["download_bytes"] > sum(s["size_bytes"] for s in document["sources"])
    blobs = [p for p in (zoo / "cache" / "hub").rglob("*") if p.is_file() and not p.is_symlink()]
    assert max(path.stat().st_size for path in blobs) < 100_000


def test_a_benchmark_that_the_recipe_names_gets_an_entry_for_its_leaderboard(hub, zoo):
    recipe = (
        (zoo / "recipe.yaml")
        .read_text()
        .replace("\n  limit: 6", "")
        .replace("[zoo_reverse, zoo_cipher]", "[zoo_reverse]")
    )
    named = "{dataset: zoo/reverse, task_id: default, metric: 'exact_match,none'}"
    compared = f"compare: [base]\n  benchmarks: {{zoo_reverse: {named}}}"
    recipe = recipe.replace("compare: [base, experts, uniform]", compared)
    (zoo / "recipe.yaml").write_text(recipe)

    repo = json.loads(run(hub, zoo, "merge", "--push", "--json").stdout)["repo"]

    path = hub.api().hf_hub_download(repo, ".eval_results/reverse.yaml")
    (entry,) = yaml.safe_load(Path(path).read_text())
    scores = json.loads((zoo / "merged" / "lewis" / "scores.json").read_text())
    merged = scores["tasks"]["zoo_reverse"]["models"]["merged"]["exact_match,none"]
    assert entry["dataset"] == {"id": "zoo/reverse", "task_id": "default"}
    assert entry["value"] == pytest.approx(100 * merged["value"])
    assert entry["source"] == {"url": f"https://huggingface.co/{repo}", "name": "Model card"}
    card = ModelCard.load(zoo / "merged" / "README.md")
    [result] = card.data.eval_results
    assert (result.dataset_type, result.dataset_split) == ("zoo/reverse", "test")
    assert result.dataset_revision == hub.api().dataset_info("zoo/reverse").sha
    assert (result.metric_type, result.metric_name) == ("exact_match", "exact match")
    assert hub.url not in card.content
    assert (zoo / "merged" / "lewis" / "scores-dark.png").exists()
    assert json.loads(run(hub, zoo, "verify", repo, "--json").stdout)["problems"] == []
    assert json.loads(run(hub, zoo, "verify", "merged", "--json").stdout)["problems"] == []

    misnamed = named.replace("exact_match,none", "acc,none")
    (zoo / "recipe.yaml").write_text(recipe.replace(named, misnamed))
    told = run(hub, zoo, "check", check=False).stdout
    assert "zoo_reverse: it has no metric `acc,none`." in told


def test_importance_stops_after_calibration_and_merge_reuses_it(hub, zoo):
    run(hub, zoo, "importance")
    profile = json.loads((zoo / "importance" / "importance.json").read_text())
    assert [(s["role"], s["source"].partition("@")[0]) for s in profile["sources"]] == [
        ("base", "zoo/base"),
        ("base", "zoo/base"),
        ("expert", "zoo/expert-reverse"),
        ("expert", "zoo/expert-cipher"),
    ]
    assert len(list((zoo / "importance").glob("*.png"))) == 2

    merged = run(hub, zoo, "merge", "--no-eval")

    assert "Calibrating: 0 tokens" in merged.stderr


def test_a_push_needs_a_token_before_any_work(hub, zoo):
    env = environment(hub, zoo) | {"HF_TOKEN": ""}
    done = subprocess.run(
        command("merge", "--push"), cwd=zoo, env=env, capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert done.stderr.startswith(f"lewis-hub: {hub.user}/reverse-cipher-lewis: ")
    assert "hf auth login" in done.stderr
    assert not (zoo / "merged.partial").exists()


def test_ctrl_c_exits_within_a_second_and_the_same_command_continues(hub, zoo):
    process = subprocess.Popen(
        command("merge"), cwd=zoo, env=environment(hub, zoo), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    for line in process.stderr:
        if line.startswith("Merging"):
            break
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)

    assert process.returncode == 130
    assert "interrupted. Run the same command again to continue." in told
    assert not (zoo / "merged").exists()

    resumed = run(hub, zoo, "merge")

    assert "Calibrating: 0 tokens" in resumed.stderr
    assert (zoo / "merged" / "README.md").exists()


def test_a_run_that_is_killed_at_any_moment_ends_in_the_same_bytes(hub, zoo):
    run(hub, zoo, "merge", "-o", "whole")
    expected = files_in(zoo / "whole")
    start = time.perf_counter()
    run(hub, zoo, "merge", "-o", "timed")
    seconds = time.perf_counter() - start
    draw = random.Random(0)
    n_killed = n_begun = 0
    while n_begun < 10 or n_killed < 8:
        output = f"killed-{n_begun}"
        n_begun, start = n_begun + 1, time.perf_counter()
        process = subprocess.Popen(
            command("merge", "-q", "-o", output), cwd=zoo, env=environment(hub, zoo)
        )
        try:
            process.wait(timeout=draw.uniform(0, seconds))
            seconds = min(seconds, time.perf_counter() - start)  # the machine was busy before
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            n_killed += 1

        run(hub, zoo, "merge", "-q", "-o", output)

        found = files_in(zoo / output)
        assert set(found) == set(expected)
        differing = {name for name in expected if found[name] != expected[name]}
        assert differing <= NOT_THE_SAME


def test_the_demo_s_merges_do_both_skills_as_the_documentation_says(hub, tmp_path):
    told = json.loads(run(hub, tmp_path, "demo", "-o", "demo", "-q", "--json").stdout)

    assert told["regmean"]["output"] == str(tmp_path / "demo" / "merged-regmean")
    for task, scores in told["scores"].items():
        assert scores["n"] == 300
        guided, by_regmean = (
            {label: metrics["exact_match,none"]["value"] for label, metrics in models.items()}
            for models in (scores["models"], told["regmean"]["scores"][task]["models"])
        )
        assert guided["merged"] > guided["base"] + 0.1
        assert by_regmean["merged"] > guided["merged"]
        guidance = (Path(__file__).parents[1] / "docs" / "guidance.md").read_text()
        column = {"zoo_reverse": 1, "zoo_cipher": 2}[task]
        for name, value in {
            "its uniform twin": guided["uniform"],
            "TIES guided by LEWIS": guided["merged"],
            "its task arithmetic twin": by_regmean["task_arithmetic"],
            "regmean": by_regmean["merged"],
        }.items():
            (row,) = [line for line in guidance.splitlines() if line.startswith(f"| {name} | 0.")]
            shown = float(row.strip("| ").split(" | ")[column].split()[0])
            assert value == pytest.approx(shown, abs=0.02)  # processors round otherwise
