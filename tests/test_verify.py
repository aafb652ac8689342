"""`verify`: a merge's files against its lock, here and on the Hub."""

import json
import random
import shutil

import pytest
from click.testing import CliRunner

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import seed_hub, zoo_folder
from lewis_hub.errors import OutputError
from lewis_hub.files import sha256_of
from lewis_hub.hub.cache import cache_root
from lewis_hub.recipe import ModelReference, Publishing


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A merge of local folders, so that it can be made again without a Hub."""
    folder = tmp_path_factory.mktemp("verify")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"base_model: {zoo_folder() / 'base'}\nmerge_method: dare_ties\ndtype: bfloat16\n"
        f"models: [{{model: {zoo_folder() / 'expert-reverse'}, parameters: {{density: 0.4}}}}]\n"
    )
    return lewis_hub.merge_models(lewis_hub.read_recipe(recipe), folder / "merged").output


@pytest.fixture
def merged(made, tmp_path):
    return shutil.copytree(made, tmp_path / "merged")


def verify(target, *words):
    done = CliRunner().invoke(cli, ["verify", str(target), "--json", *words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, json.loads(done.stdout)


def test_what_a_merge_left_is_verified(merged):
    code, told = verify(merged)

    assert (code, told["status"], told["problems"]) == (0, "verified", [])
    assert told["n_files"] == len(json.loads((merged / "lewis/lock.json").read_text())["outputs"])


def test_the_merge_made_again_has_the_same_weights(merged):
    code, told = verify(merged, "--rebuild")

    assert (code, told["status"], told["rebuilt"]) == (0, "verified", True)


def test_weights_that_another_recipe_makes_are_found_by_making_them_again(merged):
    """Whoever swaps weights and their digest in the lock is found by --rebuild alone."""
    other = shutil.copyfile(
        zoo_folder() / "expert-cipher" / "model.safetensors", merged / "model.safetensors"
    )
    lock = merged / "lewis" / "lock.json"
    told = json.loads(lock.read_text())
    told["outputs"]["model.safetensors"] = {
        "sha256": sha256_of(other),
        "n_bytes": other.stat().st_size,
    }
    lock.write_text(json.dumps(told))

    assert verify(merged)[0] == 0
    code, told = verify(merged, "--rebuild")
    assert code == 1
    assert told["problems"][0].startswith("model.safetensors: made again it has sha256 ")


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_byte_anywhere_is_found_and_named(merged, seed):
    draw = random.Random(seed)
    told = json.loads((merged / "lewis" / "lock.json").read_text())
    name = draw.choice(sorted(told["outputs"]))
    content = bytearray((merged / name).read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (merged / name).write_bytes(content)

    code, told = verify(merged)

    assert code == 1
    assert [problem.partition(":")[0] for problem in told["problems"]] == [name]
    assert "its sha256 is " in told["problems"][0]


def test_missing_shortened_and_added_files_are_named(merged):
    (merged / "tokenizer.json").unlink()
    config = merged / "config.json"
    n_bytes = config.stat().st_size
    config.write_text("{}")
    (merged / "modeling.py").write_text("import os")

    assert verify(merged)[1]["problems"] == [
        f"config.json: it has 2 bytes, the lock says {n_bytes:,}.",
        "tokenizer.json: it is missing.",
        "modeling.py: it is no part of the merge.",
    ]


def test_what_only_tells_of_a_merge_may_be_changed_and_added(hub, merged, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    for name in ("README.md", "lewis/report.html", "lewis/cost.json"):
        (merged / name).write_text("---\nlicense: mit\n---\nchanged")
    (merged / ".eval_results").mkdir()
    (merged / ".eval_results" / "gsm8k.yaml").write_text("[]")
    assert verify(merged)[1]["problems"] == []
    api, repo = hub.api(), f"{hub.user}/merge"
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=merged)

    verdict = lewis_hub.verify(ModelReference(name=repo))

    assert "lewis/report.html" not in verdict.lock.outputs
    assert api.file_exists(repo, ".eval_results/gsm8k.yaml")
    assert verdict.problems == ()


def test_a_changed_lock_is_named(merged):
    lock = merged / "lewis" / "lock.json"
    lock.write_text(lock.read_text().replace('"seed": 42', '"seed": 43'))

    with pytest.raises(OutputError) as raised:
        verify(merged)

    assert f"{merged}: lewis/lock.json: it states the digest " in str(raised.value)


def test_a_folder_without_a_lock_is_no_merge():
    with pytest.raises(OutputError) as raised:
        verify(zoo_folder() / "base")

    assert str(raised.value) == (
        f"{zoo_folder() / 'base'}: it has no lewis/lock.json, so it is no merge by lewis-hub.\n"
        "Name a folder or repo that `merge` made."
    )


def test_a_published_merge_is_verified_without_its_weights(hub, merged, monkeypatch):
    seed_hub(hub.api())
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    target = lewis_hub.open_target(Publishing(repo=f"{hub.user}/merge"))
    lewis_hub.publish(merged, target)

    verdict = lewis_hub.verify(ModelReference(name=f"{hub.user}/merge"))

    assert verdict.problems == ()
    blobs = [path for path in cache_root().rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in blobs) < 100_000


def test_diff_tells_what_two_merges_do_not_share(made, tmp_path):
    recipe = lewis_hub.read_recipe(made.parent / "recipe.yaml")
    other = lewis_hub.merge_models(recipe.model_copy(update={"seed": 7}), tmp_path / "other")

    told = CliRunner().invoke(cli, ["diff", str(made), str(other.output)])
    same = CliRunner().invoke(cli, ["diff", str(made), str(made), "--json"])

    assert told.stdout == "seed: 42 → 7\nweights: 1 of 1 files differ\n"
    assert json.loads(same.stdout) == {"status": "same", "differences": []}
