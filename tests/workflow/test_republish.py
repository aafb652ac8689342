"""Publishing what is there: a change of `publish` alone never merges again."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from file_calls import below
from huggingface_hub import CommitOperationAdd, ModelCard
from zoo_hub import put_zoo

from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.evaluate.scores import MetricScore, Scores, TaskScores
from lewis_hub.report.lock import Lock
from lewis_hub.workflow.republish import readdress
from lewis_hub.workflow.resolve import read_recipe
from lewis_hub.workflow.steps import steps_digest

RECIPE = (
    "base_model: zoo/base\nmerge_method: ties\ndtype: bfloat16\n"
    "models: [{model: zoo/expert-reverse}, {model: zoo/expert-cipher}]\n"
)


@pytest.fixture
def place(hub, tmp_path, monkeypatch):
    """A working folder with a merge of a recipe that names no repo."""
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    monkeypatch.chdir(tmp_path)
    put_zoo(hub)
    Path("recipe.yaml").write_text(RECIPE)
    run("merge")
    return tmp_path


def run(*words):
    done = CliRunner().invoke(cli, [*words, "--json"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def weights():
    return Path("merged/model.safetensors").stat().st_mtime_ns


def shas(hub, repo):
    return [commit.commit_id for commit in hub.api().list_repo_commits(repo)]


def published(hub, repo, path):
    return Path(hub.api().hf_hub_download(repo, path)).read_text()


@pytest.mark.slow
def test_a_merge_that_was_rewritten_in_part_is_completed_by_the_same_command(
    hub, place, monkeypatch
):
    words = ["merge", "changed.yaml", "-o", "merged"]
    publish = f"publish: {{repo: {hub.user}/other, license: mit}}\nexport: gguf\n"
    Path("changed.yaml").write_text(RECIPE + publish)
    shutil.copytree("merged", "before")
    run(*words)
    expected, rename, n_done = below(place / "merged"), os.replace, 0

    def stop(one, other, **options):
        stop.left -= 1
        if stop.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(one))
        rename(one, other, **options)

    while True:
        shutil.rmtree("merged")
        shutil.copytree("before", "merged")
        stop.left = n_done
        monkeypatch.setattr(os, "replace", stop)
        try:
            run(*words)
        except OSError:
            monkeypatch.setattr(os, "replace", rename)
        else:
            break
        run(*words)
        assert below(place / "merged") == expected
        n_done += 1
    assert n_done > 4


def test_a_merge_is_pushed_later_as_it_is(hub, place):
    before, repo = weights(), f"{hub.user}/later"

    pushed = run("merge", "--push", "--repo", repo)
    again = run("merge", "--push", "--repo", repo)

    assert (pushed["status"], again["status"]) == ("merged", "unchanged")
    assert weights() == before
    assert len(shas(hub, repo)) == 2  # the empty repo, the merge
    assert run("verify", "merged")["problems"] == run("verify", repo)["problems"] == []
    assert f"repo: {repo}" in published(hub, repo, "lewis/recipe.yaml")


def test_what_is_rewritten_is_what_a_merge_with_that_recipe_writes(hub, place):
    repo = f"{hub.user}/later"
    run("merge", "--push", "--repo", repo)
    shutil.rmtree("merged/.cache", ignore_errors=True)
    Path("other.yaml").write_text(f"{RECIPE}publish: {{repo: {repo}}}\n")

    run("merge", "other.yaml", "-o", "direct")

    for name in ("lewis/recipe.yaml", "lewis/lock.json"):
        assert Path("merged", name).read_text() == Path("direct", name).read_text()
    cards = [Path(folder, "README.md").read_text() for folder in ("merged", "direct")]
    assert cards[0].partition("### Cost")[0] == cards[1].partition("### Cost")[0]
    assert f'name = "{repo}"' in cards[0]


def test_a_merge_with_a_name_and_a_step_is_published_later(hub, place):
    step = "name: step\n" + RECIPE + "---\n"
    text = step + RECIPE.replace("base_model", "name: blend\nbase_model").replace(
        "zoo/expert-cipher", "step"
    )
    Path("steps.yaml").write_text(text)
    repo = f"{hub.user}/later"
    run("merge", "steps.yaml", "-o", "blend")
    made = Path("blend/README.md").read_text()
    weights_before = Path("blend/model.safetensors").stat().st_mtime_ns

    run("merge", "steps.yaml", "-o", "blend", "--push", "--repo", repo)

    card = published(hub, repo, "README.md")
    assert "\n# blend\n" in made
    assert "\n# later\n" in card
    assert f"repo: {repo}" in card
    assert Path("blend/model.safetensors").stat().st_mtime_ns == weights_before
    assert run("verify", repo)["problems"] == []
    recipe = yaml.safe_load(published(hub, repo, "lewis/recipe.yaml"))
    assert (recipe["publish"]["repo"], recipe["intermediate"][0]["name"]) == (repo, "step")
    assert ".steps.json" not in hub.api().list_repo_files(repo)


@pytest.mark.slow
def test_steps_are_not_made_again_unless_what_they_start_from_changes(hub, place):
    shutil.copytree(zoo_folder() / "expert-cipher", "cipher")
    step = "name: step\n" + RECIPE.replace("zoo/expert-cipher", "./cipher") + "---\n"
    last = RECIPE.replace("zoo/expert-cipher", "step")

    def merge(text):
        Path("steps.yaml").write_text(text)
        done = CliRunner().invoke(cli, ["merge", "steps.yaml", "-o", "blend"])
        assert done.exit_code == 0, done.output
        return done

    first = merge(step + last)
    repeated = merge(step + last)
    moved = merge(f"{step}{last}publish: {{repo: {hub.user}/x}}\n")
    licensed = merge(f"{step}{last}publish: {{repo: {hub.user}/x, license: mit}}\n")
    (Path("cipher") / "config.json").write_text(
        (Path("cipher") / "config.json").read_text().replace("}", ' , "more": 1}', 1)
    )

    assert "Merging step (1 of 1" in first.stderr
    assert "Merging" not in repeated.stderr + moved.stderr
    assert "Nothing changed" in repeated.stdout
    assert "Rewriting card, recipe and lock" in moved.stderr
    card = ModelCard.load("blend/README.md")
    assert "Merging step" in licensed.stderr
    assert card.data.license == "mit"
    assert f'name = "{hub.user}/x"' in card.text
    changed = merge(step + last)
    assert "Merging step" in changed.stderr
    assert run("verify", "blend")["problems"] == []


def test_a_folder_with_another_merge_of_steps_is_not_taken_for_what_the_repo_holds(hub, place):
    repo = f"{hub.user}/steps"
    step = "name: step\n" + RECIPE + "---\n"
    last = RECIPE.replace("zoo/expert-cipher", "step") + f"publish: {{repo: {repo}}}\n"
    Path("steps.yaml").write_text(step + last)
    run("merge", "steps.yaml", "-o", "blend", "--push")
    Path("steps.yaml").write_text(step + last.replace("models", "parameters: {lambda: 2}\nmodels"))
    run("merge", "steps.yaml", "-o", "elsewhere", "--push")
    pushed = published(hub, repo, "lewis/lock.json")

    again = run("merge", "steps.yaml", "-o", "blend", "--push")
    alone = CliRunner().invoke(cli, ["merge", "steps.yaml", "-o", "blend"])

    assert again["status"] == "unchanged"
    assert (alone.exit_code, "Nothing changed" in alone.stdout) == (1, False)
    assert run("merge", "steps.yaml", "-o", "blend", "--push")["status"] == "unchanged"
    assert published(hub, repo, "lewis/lock.json") == pushed


def test_the_steps_of_a_merge_with_another_task_file_are_made_again(tmp_path):
    shutil.copytree(zoo_folder() / "tasks", tmp_path / "tasks")
    step = "name: step\n" + RECIPE + "---\n"
    scored = "evaluate: {tasks: [zoo_reverse], include: tasks}\n"
    (tmp_path / "steps.yaml").write_text(
        step + RECIPE.replace("zoo/expert-cipher", "step") + scored
    )
    recipe = read_recipe(tmp_path / "steps.yaml")
    before = steps_digest(recipe, {}, 1000)
    assert before == steps_digest(recipe, {}, 1000)

    (tmp_path / "tasks/zoo_cipher.yaml").unlink()  # is not used
    assert before == steps_digest(recipe, {}, 1000)
    with (tmp_path / "tasks/zoo_reverse.yaml").open("a") as task:
        task.write('description: "Reverse it. "\n')
    assert before != steps_digest(recipe, {}, 1000)


def test_a_step_inside_of_a_step_is_part_of_the_digest(tmp_path):
    """As in the recipe of a merge of adapters on bases of their own, which a merge writes."""
    inner = {"name": "inner", **yaml.safe_load(RECIPE)}
    step = {"name": "step", "intermediate": [inner], **yaml.safe_load(RECIPE)}
    step["models"] = [{"model": "inner"}]
    whole = {"intermediate": [step], **yaml.safe_load(RECIPE), "models": [{"model": "step"}]}

    def digest():
        (tmp_path / "steps.yaml").write_text(yaml.safe_dump(whole))
        return steps_digest(read_recipe(tmp_path / "steps.yaml"), {}, 1000)

    before = digest()
    assert before == digest()
    inner["base_model"] = "zoo/expert-reverse"
    assert before != digest()


@pytest.mark.slow  # it measures and scores, twice
def test_a_guided_and_scored_merge_is_rewritten_as_well(hub, place):
    text = (zoo_folder() / "recipe.yaml").read_text().replace("samples: 128", "samples: 2")
    text = text.replace("include: tasks", "include: tasks\n  limit: 3")
    shutil.copytree(zoo_folder() / "tasks", "tasks")
    Path("guided.yaml").write_text(text.partition("publish:")[0])
    repo = f"{hub.user}/guided"
    Path("direct.yaml").write_text(f"{text.partition('publish:')[0]}publish: {{repo: {repo}}}\n")
    run("merge", "guided.yaml", "-o", "guided")

    pushed = run("merge", "guided.yaml", "-o", "guided", "--push", "--repo", repo)
    run("merge", "direct.yaml", "-o", "direct")

    assert pushed["status"] == "merged"
    assert run("verify", "guided")["problems"] == []
    for name in ("lewis/recipe.yaml", "lewis/lock.json", "lewis/scores.json"):
        assert Path("guided", name).read_text() == Path("direct", name).read_text()
    cards = [Path(folder, "README.md").read_text() for folder in ("guided", "direct")]
    assert cards[0].partition("### Cost")[0] == cards[1].partition("### Cost")[0]
    pages = [Path(folder, "lewis/report.html").read_text() for folder in ("guided", "direct")]
    assert [page.count("guided</h1>") for page in pages] == [1, 1]
    uncosted = [re.sub(r"<h2>Cost</h2>.*?</section>", "", page, flags=re.S) for page in pages]
    assert uncosted[0] == uncosted[1]


def test_a_pushed_merge_is_not_committed_again_by_merge(hub, place):
    repo = f"{hub.user}/pushed"
    run("push", "merged", repo)
    first = shas(hub, repo)

    in_place = run("merge", "--push", "--repo", repo)
    shutil.rmtree("merged")
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    elsewhere = run("merge", "--push", "--repo", repo)

    assert (in_place["status"], elsewhere["status"]) == ("unchanged", "unchanged")
    assert shas(hub, repo) == first


def test_the_card_names_the_repo_that_a_push_names(hub, place):
    one, two = f"{hub.user}/one", f"{hub.user}/two"
    Path("merged/README.md").write_text(
        Path("merged/README.md").read_text().replace("## Limits", "My words.\n\n## Limits")
    )

    run("push", "merged", one)
    again = run("push", "merged", one)
    run("push", "merged", two)

    assert again["status"] == "unchanged"
    for repo in (one, two):
        card = published(hub, repo, "README.md")
        assert f"\n# {repo.partition('/')[2]}\n" in card
        assert f'name = "{repo}"\n' in card
        assert "My words." in card
        assert f"hf download {repo} " in card
    assert one not in published(hub, two, "README.md")
    assert run("verify", "merged")["problems"] == []


def test_the_commands_of_a_card_name_the_repo_that_a_push_names(hub, place):
    one, two = f"{hub.user}/one", f"{hub.user}/two"
    run("merge", "-o", "exported", "--export", "gguf:q8_0")
    local = Path("exported/README.md").read_text()
    card = local.replace("'What can you do?'", "'From a card'")  # as one that states an example
    Path("exported/README.md").write_text(card)

    run("push", "exported", one)
    run("push", "exported", two)

    for repo in (one, two):
        commands = re.findall(r"^(?:mlx_lm|llama-cli).*$", published(hub, repo, "README.md"), re.M)
        assert commands == [
            f"llama-cli -hf {repo}:Q8_0 -p 'From a card'",
            f"mlx_lm.generate --model {repo} --prompt 'From a card'",
            f"mlx_lm.convert --hf-path {repo} -q  # 4 bits, in the folder mlx_model",
        ]


def test_the_leaderboard_entry_names_the_repo_that_a_push_names(hub, place):
    board = {"dataset": "zoo/reverse", "task_id": "one", "metric": "exact_match,none"}
    scored = {"tasks": ["sums"], "benchmarks": {"sums": board}}
    found = Lock.from_json(Path("merged/lewis/lock.json").read_text())
    lock = replace(found, recipe={**found.recipe, "evaluate": scored})
    models = {"merged": {"exact_match,none": MetricScore(0.5, 0.25)}}
    scores = Scores({"sums": TaskScores(n=4, version="1.0", models=models, paired=())})
    Path("merged/lewis/scores.json").write_text(scores.to_json())
    entry = Path("merged/.eval_results/reverse.yaml")
    entry.parent.mkdir()
    entry.write_text("another\n")

    readdress(Path("merged"), lock, f"{hub.user}/two")

    [written] = yaml.safe_load(entry.read_text())
    assert written["source"]["url"] == f"https://huggingface.co/{hub.user}/two"
    assert (written["dataset"]["id"], written["value"]) == ("zoo/reverse", 50.0)
    entry.unlink()  # as its owner may
    readdress(Path("merged"), lock, f"{hub.user}/three")
    assert not entry.exists()


@pytest.mark.parametrize(
    "publish",
    ["{repo: USER/x, private: true}", "{repo: USER/x, tag: v1}", "{repo: USER/x, license: mit}"],
)
def test_a_change_of_publish_alone_needs_no_force(hub, place, publish):
    before = weights()
    Path("recipe.yaml").write_text(f"{RECIPE}publish: {publish.replace('USER', hub.user)}\n")

    merged = run("merge")
    pushed = run("merge", "--push")

    assert (merged["status"], pushed["status"]) == ("unchanged", "merged")
    assert weights() == before
    assert run("verify", f"{hub.user}/x")["problems"] == []


def test_a_changed_licence_is_one_more_commit_without_a_merge(hub, place):
    repo = f"{hub.user}/licensed"
    run("merge", "--push", "--repo", repo)
    before = weights()
    Path("recipe.yaml").write_text(f"{RECIPE}publish: {{repo: {repo}, license: mit}}\n")

    pushed = run("merge", "--push")

    assert pushed["status"] == "merged"
    assert weights() == before
    assert ModelCard(published(hub, repo, "README.md")).data.license == "mit"
    assert hub.api().list_repo_commits(repo)[0].title == (
        "Merge with lewis-hub: publish.license: absent → mit and 1 more"
    )
    assert run("merge", "--push")["status"] == "unchanged"


def test_a_changelog_stays_in_its_repo(hub, place):
    """The changes name former sources, whose names may be private."""
    secret, public = f"{hub.user}/secret", f"{hub.user}/public"
    run("push", "merged", secret)
    Path("recipe.yaml").write_text(RECIPE.replace(", {model: zoo/expert-cipher}", ""))
    run("merge", "-o", "next")
    run("push", "next", secret)
    assert "zoo/expert-cipher" in published(hub, secret, "lewis/changelog.json")
    assert "zoo/expert-cipher" in published(hub, secret, "README.md")

    run("push", "next", public)

    assert "lewis/changelog.json" not in hub.api().list_repo_files(public)
    assert "Changelog" not in published(hub, public, "README.md")
    run("push", "next", secret)
    assert "zoo/expert-cipher" in published(hub, secret, "lewis/changelog.json")


def test_weights_that_are_not_those_of_the_lock_are_not_pushed(hub, place):
    weights = bytearray(Path("merged/model.safetensors").read_bytes())
    weights[-2] ^= 0x40
    Path("merged/model.safetensors").write_bytes(weights)

    done = CliRunner().invoke(cli, ["push", "merged", f"{hub.user}/x"])

    assert str(done.exception) == (
        "merged: model.safetensors is not what the merge wrote.\n"
        "Merge again. Or delete lewis/lock.json and lewis/gate.json, to push it as another model."
    )
    assert not hub.api().repo_exists(f"{hub.user}/x")


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_of_its_lock_is_not_pushed(hub, place, name):
    repo = f"{hub.user}/whole"
    run("merge", "-o", "sharded", "--max-shard-size", "1MB")
    run("push", "sharded", repo)
    before = shas(hub, repo)
    Path("sharded", name).unlink()

    done = CliRunner().invoke(cli, ["push", "sharded", repo])

    assert str(done.exception) == (
        f"sharded: {name} is missing.\n"
        "Merge again. Or delete lewis/lock.json and lewis/gate.json, to push it as another model."
    )
    assert shas(hub, repo) == before
    assert run("verify", repo)["problems"] == []


def test_the_verdict_on_a_merge_whose_lock_cannot_be_read_does_not_stay(hub, place):
    repo = f"{hub.user}/old"
    run("push", "merged", repo)
    files = {"lewis/lock.json": b"{}", "lewis/gate.json": b"{}", "lewis/changelog.json": b"{}"}
    added = [CommitOperationAdd(path, content) for path, content in files.items()]
    hub.api().create_commit(repo, added, commit_message="As another version wrote it")

    run("push", "merged", repo)

    listed = hub.api().list_repo_files(repo)
    assert "lewis/gate.json" not in listed
    assert "lewis/changelog.json" in listed
    assert run("verify", repo)["problems"] == []


def test_a_merge_without_its_recipe_is_not_whole(place):
    Path("merged/lewis/recipe.yaml").unlink()

    done = CliRunner().invoke(cli, ["merge"])

    assert done.exit_code == 1
    assert "merged: it exists and holds something else than this merge." in str(done.exception)


@pytest.mark.parametrize("again", [["merge"], ["merge", "merged/lewis/recipe.yaml"]])
def test_after_a_rewriting_that_was_interrupted_a_merge_has_the_recipe_of_its_lock(
    hub, place, monkeypatch, again
):
    rename = os.replace
    publish = f"publish: {{repo: {hub.user}/other, license: mit}}\n"
    Path("changed.yaml").write_text(RECIPE + publish)

    def stop(one, other, **options):
        rename(one, other, **options)
        if Path(other).name == "recipe.yaml":
            raise OSError(errno.ENOSPC, "No space left on device", str(one))

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="No space"):
        run("merge", "changed.yaml")
    monkeypatch.setattr(os, "replace", rename)

    assert run(*again, "-o", "merged")["status"] == "unchanged"

    assert run("verify", "merged")["problems"] == []
    written = yaml.safe_load(Path("merged/lewis/recipe.yaml").read_text())
    assert ("publish" in written) == (len(again) > 1)
