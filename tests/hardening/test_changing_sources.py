"""A source that is truncated, replaced or deleted while it is read: one message, never a signal."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from effort import SEED, times
from huggingface_hub import HfApi

from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import SourceError
from lewis_hub.hub.ranges import read_range
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.recipe.read import parse_recipe

TESTS = Path(__file__).parents[1]


def test_a_source_that_changes_while_it_is_merged_is_one_message(tmp_path):
    n_merges = times(12, 240)
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "hardening.changing", tmp_path, str(n_merges), str(SEED)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    sys.stdout.write("\n".join(" ".join(one) for one in outcomes))  # pytest -rP shows it
    assert [one for one in outcomes if one[1] not in ("refused", "as before")] == []
    assert len(outcomes) == n_merges
    assert [one for one in outcomes if one[1] == "refused"]


class AtMerging:
    """A progress that calls a function when the weights begin to be read."""

    def __init__(self, call):
        self.call = call

    @contextmanager
    def stage(self, title, total, unit):
        if title == "Merging":
            self.call()
        yield lambda _: None

    def say(self, text):
        pass


def test_weights_that_are_replaced_before_they_are_read_are_refused_and_read_again(tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    weights, kept = base / "model.safetensors", (base / "model.safetensors").read_bytes()
    text = f"{{base_model: {base}, models: [{zoo_folder() / 'expert-reverse'}], "
    recipe = parse_recipe(text + "merge_method: linear}", "recipe.yaml")
    clean = pipeline.merge_models(recipe, tmp_path / "clean").output / "model.safetensors"

    def change():
        weights.write_bytes(kept[:-64] + bytes(64))

    with pytest.raises(SourceError) as caught:
        pipeline.merge_models(recipe, tmp_path / "merged", progress=AtMerging(change))
    assert not (tmp_path / "merged").exists()
    weights.write_bytes(kept)
    again = pipeline.merge_models(recipe, tmp_path / "merged").output / "model.safetensors"

    assert str(caught.value) == (
        f"{base}: `model.safetensors` changed while it was read.\nRestore it, then run again."
    )
    assert again.read_bytes() == clean.read_bytes()


@pytest.mark.parametrize(
    ("becomes", "problem"),
    [
        ("a folder", "`model.safetensors` changed while it was read.\nRestore it, then run again."),
        (
            "nothing",
            "`model.safetensors` is a link to outside of the folder, or to nothing.\n"
            "Put the file itself in its place.",
        ),
    ],
)
def test_a_local_file_that_is_gone_is_one_message_and_not_asked_for_on_the_hub(
    tmp_path, becomes, problem
):
    folder = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    source = resolve_model(HfApi(endpoint="http://127.0.0.1:9"), str(folder))
    (folder / "model.safetensors").unlink()
    if becomes == "a folder":
        (folder / "model.safetensors").mkdir()

    with pytest.raises(SourceError) as caught:
        read_range(HfApi(endpoint="http://127.0.0.1:9"), source, "model.safetensors", 0, 8)

    assert str(caught.value).endswith(f": {problem}")
