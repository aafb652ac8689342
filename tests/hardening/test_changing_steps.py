"""Sources that change between the steps of a merge: all steps read one state of each."""

import json
import shutil

import pytest
from hub_models import altering, weight_bytes

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import Silent
from lewis_hub.errors import OutputError, SourceError
from lewis_hub.workflow.resolve import read_recipe

STEPS = """name: first
base_model: base
models: [expert]
merge_method: task_arithmetic
---
name: second
base_model: base
models: [other]
merge_method: task_arithmetic
---
name: third
base_model: base
models: [expert]
merge_method: task_arithmetic
---
base_model: base
models: [first, second, third]
merge_method: task_arithmetic
"""
TWO_STEPS = """name: first
base_model: base
models: [expert]
merge_method: ties
guide: {name: lewis, calibration: CALIBRATION}
---
name: second
base_model: base
models: [other]
merge_method: ties
"""
GUIDED = (
    TWO_STEPS
    + """parameters: {density: 0.5}
---
base_model: base
models: [first, second, expert]
merge_method: ties
guide: {name: lewis, calibration: CALIBRATION}
"""
)
DATASET = "{dataset: rows.jsonl, text: '{text}', samples: 4}"
OWN_TASK = "{task: own, include: tasks, samples: 4}"
TASK = """task: own
dataset_path: json
dataset_kwargs: {data_files: {train: PLACE/rows.jsonl, test: PLACE/rows.jsonl}}
training_split: train
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " end"
metric_list: [{metric: perplexity}]
"""


PLAIN_LAST = (
    TWO_STEPS
    + """guide: {name: lewis, calibration: CALIBRATION}
---
base_model: base
models: [first, second]
merge_method: linear
"""
)


class Steps(Silent):
    """Calls functions when a step begins; `calls` are the name of a step -> a function."""

    def __init__(self, **calls):
        self.calls = calls

    def say(self, text):
        named = text.removeprefix("Merging ").partition(" ")[0]
        self.calls.get(named, bool)()


@pytest.fixture
def place(tmp_path):
    """A folder with models, and with rows of a task of its own."""
    for name, copy in {
        "base": "base",
        "expert-reverse": "expert",
        "expert-cipher": "other",
    }.items():
        shutil.copytree(zoo_folder() / name, tmp_path / copy)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.replace("PLACE", str(tmp_path)))
    write_rows(tmp_path, "reverse BAKOT")
    return tmp_path


def write_rows(place, text):
    rows = "".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n in range(6))
    (place / "rows.jsonl").write_text(rows, encoding="utf-8")


def merge(place, name, text, **calls):
    (place / "recipe.yaml").write_text(text)
    recipe = read_recipe(place / "recipe.yaml")
    return lewis_hub.merge_models(recipe, place / name, progress=Steps(**calls))


def refused(place, text, **calls):
    """The message of a merge in steps during which a source changes; it makes no output."""
    with pytest.raises(SourceError) as caught:
        merge(place, "merged", text, **calls)
    assert not (place / "merged").exists()
    return str(caught.value)


def told(source):
    return (
        f"{source}: it changed while the steps of the merge were made.\n"
        "Run the same command again: steps that used it are made anew."
    )


def test_the_steps_of_a_merge_read_one_state_of_each_model(place):
    """Each step pinned its models anew: the lock named one base, the merge was of two."""
    clean = weight_bytes(merge(place, "clean", STEPS).output)
    change, restore = altering(place / "expert" / "model.safetensors")
    card = place / "base" / "README.md"

    assert refused(place, STEPS, second=change) == told(place / "expert")

    restore()
    again = merge(place, "merged", STEPS, second=lambda: card.write_text("Better words."))
    assert weight_bytes(again.output) == clean


def test_a_model_that_is_changed_for_one_step_and_restored_is_refused(place):
    """Its step had read other weights; the rerun said that nothing changed."""
    clean = weight_bytes(merge(place, "clean", STEPS).output)
    change, restore = altering(place / "other" / "model.safetensors")

    assert refused(place, STEPS, second=change, third=restore) == told(place / "other")

    assert weight_bytes(merge(place, "merged", STEPS).output) == clean


@pytest.mark.parametrize("calibration", [DATASET, pytest.param(OWN_TASK, marks=pytest.mark.slow)])
def test_the_steps_of_a_merge_are_calibrated_on_one_state_of_the_rows(calibration, place):
    """The lock named the new rows, the first step had the old ones."""
    text = GUIDED.replace("CALIBRATION", calibration)
    clean = weight_bytes(merge(place, "clean", text).output)

    message = refused(place, text, second=lambda: write_rows(place, "encode OZUN"))

    assert message.endswith(told("rows.jsonl"))
    write_rows(place, "reverse BAKOT")
    assert weight_bytes(merge(place, "merged", text).output) == clean


def test_a_task_file_that_changes_between_steps_is_refused(place):
    text, task = GUIDED.replace("CALIBRATION", OWN_TASK), place / "tasks" / "own.yaml"
    kept = task.read_text()

    def restore():
        task.write_text(kept)

    def edit():
        task.write_text(kept.replace("{{text}}", "{{text}}!"))

    assert refused(place, text, first=edit, second=restore) == told(task)


def test_task_files_that_only_steps_use_are_compared_and_part_of_the_merge(place, monkeypatch):
    """They were in no digest, and a merge could not be made again."""
    monkeypatch.chdir(place)
    text, task = PLAIN_LAST.replace("CALIBRATION", OWN_TASK), place / "tasks" / "own.yaml"
    kept = task.read_text()

    def edit():
        task.write_text(kept.replace("{{text}}", "{{text}}!"))

    assert refused(place, text, second=edit) == told(task)
    task.write_text(kept)
    merged = merge(place, "merged", text).output
    assert (merged / "lewis" / "tasks" / "own.yaml").read_text() == kept
    execution = lewis_hub.Execution(allow_code=True)
    again = lewis_hub.verify(merged, rebuild=True, execution=execution, progress=False)
    assert again.problems == ()


@pytest.mark.slow
def test_an_output_inside_of_a_folder_of_rows_is_no_change_of_it(place):
    """It was refused at each run, after all steps had been made."""
    rows = place / "rows"
    rows.mkdir()
    (place / "rows.jsonl").rename(rows / "train.jsonl")
    text = GUIDED.replace("CALIBRATION", DATASET.replace("rows.jsonl", "rows"))
    clean = weight_bytes(merge(place, "clean", text).output)

    assert weight_bytes(merge(place, "rows/merged", text).output) == clean


def test_a_tag_that_is_moved_and_moved_back_is_refused(hub, api, place):
    """The merge was of the other commit; the rerun said that nothing had changed."""
    repo = "zoo/other"
    api.create_repo(repo)
    first = api.upload_folder(repo_id=repo, folder_path=place / "other").oid
    weights = place / "other" / "model.safetensors"
    change, _ = altering(weights)
    change()
    second = api.upload_file(repo_id=repo, path_or_fileobj=weights, path_in_repo=weights.name).oid
    api.create_tag(repo, tag="v1", revision=first)

    def tag(commit):
        stored = hub.store.find("models", repo)
        stored.refs["refs/tags/v1"] = commit
        hub.store.save(stored)

    text = STEPS.replace("models: [other]", f"models: [{repo}@v1]")
    calls = {"second": lambda: tag(second), "third": lambda: tag(first)}

    assert refused(place, text, **calls) == told(f"{repo}@{second}")
    assert merge(place, "merged", text).status == "merged"


def test_an_adapter_on_a_base_of_its_own_revision_is_no_change(api, place):
    """The merge that is made of both has a name with a revision: it was refused at each run."""
    for name in ("base", "other"):
        api.create_repo(f"zoo/{name}", exist_ok=True)
        api.upload_folder(repo_id=f"zoo/{name}", folder_path=place / name)
        api.create_tag(f"zoo/{name}", tag="v1")
    settings = lewis_hub.LoraSettings(rank=2, include="proj")
    lewis_hub.extract_lora(str(place / "expert"), str(place / "other"), place / "lora", settings)
    text = """name: first
base_model: zoo/base@v1
models: [zoo/other@v1+lora, expert]
merge_method: task_arithmetic
---
base_model: zoo/base@v1
models: [first, expert]
merge_method: task_arithmetic
"""

    assert merge(place, "merged", text).status == "merged"
    assert merge(place, "merged", text).status == "unchanged"


def test_a_model_of_a_step_inside_of_a_step_is_read_in_one_state(place):
    """Its digest was not in that of the whole: after a change of it nothing had changed."""
    inner = "{name: inner, base_model: base, models: [other], merge_method: task_arithmetic}"
    outer = f"{{name: outer, intermediate: [{inner}], base_model: base, models: [inner], "
    text = f"intermediate: [{outer}merge_method: task_arithmetic}}]\n"
    text += "base_model: base\nmodels: [outer]\nmerge_method: task_arithmetic\n"
    merge(place, "merged", text)
    assert merge(place, "merged", text).status == "unchanged"
    change, _ = altering(place / "other" / "model.safetensors")

    change()

    with pytest.raises(OutputError, match="it exists and holds something else than this merge"):
        merge(place, "merged", text)
