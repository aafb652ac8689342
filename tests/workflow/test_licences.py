"""Parents whose licences clash: nothing is published before somebody has decided."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from zoo_hub import put_zoo

from lewis_hub.cli.main import cli

REPO = "lewis/clash"
RECIPE = """base_model: zoo/base
merge_method: linear
models: [{model: zoo/expert-reverse, parameters: {weight: 1.0}}]
"""


@pytest.fixture
def place(hub, tmp_path, monkeypatch):
    """A working folder, and a Hub with the zoo, one expert of which is under another licence."""
    put_zoo(hub)
    hub.api().upload_file(
        repo_id="zoo/expert-reverse",
        path_or_fileobj=b"---\nlicense: gemma\n---\n",
        path_in_repo="README.md",
    )
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def run(*words):
    return CliRunner().invoke(cli, [*words, "-q"])


def test_a_clash_is_refused_before_any_download(hub, place):
    done = run("merge", "--push", "--repo", REPO)

    assert "publish.license: the parents' licences differ (zoo/base: " in str(done.exception)
    assert "zoo/expert-reverse: gemma" in str(done.exception)
    assert not hub.api().repo_exists(REPO)
    assert not Path("merged").exists()


def test_a_folder_of_a_clash_is_pushed_once_its_card_states_a_licence(hub, place):
    assert run("merge").exit_code == 0

    refused = run("push", "merged", REPO)

    assert str(refused.exception) == (
        "merged: its parents' licences differ, and README.md states none.\n"
        "Decide which licence a merge of them may have: write `license: ...` into the "
        "metadata at the top of README.md, or set `publish.license` and merge again."
    )
    assert not hub.api().repo_exists(REPO)

    card = ModelCard.load("merged/README.md")
    card.data.license = "gemma"
    card.save("merged/README.md")
    assert run("push", "merged", REPO).exit_code == 0
    assert ModelCard.load(REPO).data.license == "gemma"


def test_the_recipe_decides(hub, place):
    Path("recipe.yaml").write_text(RECIPE + f"publish: {{repo: {REPO}, license: gemma}}\n")

    done = run("merge", "--push")

    assert done.exit_code == 0, done.output
    card = ModelCard.load(REPO)
    assert card.data.license == "gemma"
    assert "The licences of the parents differ: " in card.text
    assert "without such a statement lewis-hub refuses to publish." in card.text
