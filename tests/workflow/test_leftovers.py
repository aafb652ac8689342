"""A rerun with other settings: nothing that the interrupted run left is part of its model."""

import shutil
from contextlib import contextmanager

import pytest

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import Silent
from lewis_hub.errors import OutputError
from lewis_hub.merge.workspace import LOCK, alone_at
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.fetch import fetch_whole
from lewis_hub.workflow.job import prepare
from lewis_hub.workflow.merge import finish_model, write_weights
from lewis_hub.workflow.resources import Execution

SHARDED = Execution(max_shard_bytes=1_000_000)
SHARDS = [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]


class StopsBefore(Silent):
    """The user presses Ctrl-C when a stage begins."""

    def __init__(self, title):
        self._title = title

    @contextmanager
    def stage(self, title, total, unit):
        if title.startswith(self._title):
            raise KeyboardInterrupt
        with super().stage(title, total, unit) as advance:
            yield advance


@pytest.fixture(autouse=True)
def _offline(hub):
    """The sources are local folders."""


def recipe(weight, more=""):
    return parse_recipe(
        f"base_model: {zoo_folder()}/base\nmerge_method: task_arithmetic\ndtype: float32\n"
        f"models: [{{model: {zoo_folder()}/expert-reverse, parameters: {{weight: {weight}}}}}]\n"
        f"export: [gguf:f16]\n{more}",
        "recipe.yaml",
    )


def interrupted(asked, output, execution=None):
    """Merge up to the export; return the folder in which the run worked."""
    with pytest.raises(KeyboardInterrupt):
        lewis_hub.merge_models(asked, output, execution, StopsBefore("Exporting"))
    return output.with_name(output.name + ".partial")


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize(("first", "then"), [(SHARDED, None), (None, SHARDED)])
def test_an_export_has_the_weights_of_its_own_run(tmp_path, first, then):
    interrupted(recipe(1.0), tmp_path / "merged", first)

    again = lewis_hub.merge_models(recipe(0.5), tmp_path / "merged", then, progress=False)
    clean = lewis_hub.merge_models(recipe(0.5), tmp_path / "clean", then, progress=False)

    name = "model-F16.gguf"
    assert (again.output / name).read_bytes() == (clean.output / name).read_bytes()


def test_what_is_scored_and_exported_has_no_file_of_another_run(tmp_path):
    in_chat = recipe(1.0, "chat_template: chatml\n")
    work = interrupted(in_chat, tmp_path / "merged")
    assert "model.safetensors" in visible(work)
    (work / "lewis").mkdir()
    (work / "lewis/generated.jsonl").write_text("{}", encoding="utf-8")

    interrupted(recipe(0.5), tmp_path / "merged", SHARDED)
    clean = interrupted(recipe(0.5), tmp_path / "clean", SHARDED)

    assert visible(work) == visible(clean)
    assert [name for name in visible(work) if name.endswith(".safetensors")] == SHARDS


def test_a_rerun_keeps_its_finished_shards(tmp_path):
    work = interrupted(recipe(0.5), tmp_path / "merged", SHARDED)
    written = {name: (work / name).stat().st_mtime_ns for name in SHARDS}

    interrupted(recipe(0.5), tmp_path / "merged", SHARDED)

    assert {name: (work / name).stat().st_mtime_ns for name in SHARDS} == written


def test_scores_are_kept_for_weights_and_the_files_beside_them(api, tmp_path):
    def identity(asked, name):
        job = prepare(asked, Execution(), api, Silent())
        files = fetch_whole(api, [one.source for one in job.sources.models], Silent())
        planned, folder = job.plan.plan(None), tmp_path / name
        shards = write_weights(planned, files.locations, folder, job.means, Silent())
        return planned.digest, finish_model(planned, shards, job.sidecars, files.sources, folder)

    plain, in_chat = recipe(0.5), recipe(0.5, "chat_template: chatml\n")
    (digest, first), (_, again) = identity(plain, "first"), identity(plain, "again")
    other_digest, other = identity(in_chat, "other")

    assert first.identity == again.identity
    assert (other_digest, other.identity != first.identity) == (digest, True)


def test_a_second_run_makes_no_steps_for_an_output_that_another_run_makes(tmp_path):
    three_steps = parse_recipe(
        f"name: first\nmodels: [{zoo_folder()}/base]\nmerge_method: linear\n---\n"
        "name: second\nmodels: [first]\nmerge_method: linear\n---\n"
        "models: [second]\nmerge_method: linear\nexport: [gguf:f16]\n",
        "recipe.yaml",
    )
    said = []

    class StartsAnother(Silent):
        def stage(self, title, total, unit):
            if title.startswith("Exporting"):
                again = Silent()
                again.say = said.append
                with pytest.raises(OutputError, match="merged: another run is working on it"):
                    lewis_hub.merge_models(three_steps, tmp_path / "merged", None, again)
            return super().stage(title, total, unit)

    lewis_hub.merge_models(three_steps, tmp_path / "merged", None, StartsAnother())

    assert said == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_a_step_whose_source_changed_after_an_interruption_is_made_again(tmp_path):
    expert = shutil.copytree(zoo_folder() / "expert-reverse", tmp_path / "expert")
    two_steps = parse_recipe(
        f"name: first\nmodels: [{zoo_folder()}/base, {expert}]\nmerge_method: linear\n---\n"
        f"models: [first, {zoo_folder()}/base]\nmerge_method: linear\nexport: [gguf:f16]\n",
        "recipe.yaml",
    )
    interrupted(two_steps, tmp_path / "merged")
    other = zoo_folder() / "expert-cipher" / "model.safetensors"
    shutil.copyfile(other, expert / "model.safetensors")

    lewis_hub.merge_models(two_steps, tmp_path / "merged")

    lewis_hub.merge_models(two_steps, tmp_path / "at-once")
    found, expected = (tmp_path / one / "model.safetensors" for one in ("merged", "at-once"))
    assert found.read_bytes() == expected.read_bytes()
    assert not (tmp_path / "merged.parts").exists()


def test_a_model_is_not_measured_where_another_run_measures(tmp_path):
    base, output, texts = zoo_folder() / "base", tmp_path / "importance", tmp_path / "texts.jsonl"
    texts.write_text('{"text": "reverse abc"}\n')
    asked = lewis_hub.Calibration(dataset=str(texts), text="{text}", samples=1)
    output.mkdir()

    with (
        alone_at(output / LOCK, output),
        pytest.raises(OutputError, match="importance: another run is working on it"),
    ):
        lewis_hub.measure_model(base, asked, output, progress=False)

    assert [*output.iterdir()] == []
    lewis_hub.measure_model(base, asked, output, progress=False)
    assert (output / "importance.json").exists()
