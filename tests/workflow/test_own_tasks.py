"""What the Python and the data of a user's own tasks read is pinned, compared and published."""

import json
import tempfile
import textwrap

import pytest
from statistical_merges import Recorder

import lewis_hub
from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.benchmarks import load_tasks, own_files
from lewis_hub.evaluate.embedding_tasks import own_task_files
from lewis_hub.evaluate.libraries import LIBRARIES
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.workflow.evaluate import Candidate, score
from lewis_hub.workflow.resolve import hub_api
from lewis_hub.workflow.resources import Execution
from lewis_hub.workflow.task_data import pin_task

TASK = """
task: own
dataset_path: json
dataset_kwargs: {DATA}
training_split: train
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " end"
metric_list: [{metric: METRIC, aggregation: mean, higher_is_better: true}]
"""
MADE = "process_docs: !function own.process_docs\n"
SCORED = "process_results: !function own.points\n"
RECIPE = f"""
base_model: {zoo_folder() / "base"}
merge_method: ties
models: [{{model: {zoo_folder() / "expert-reverse"}}}]
guide: {{calibration: {{task: own, include: tasks, samples: 4}}}}
"""


def write(folder, data=None, **python):
    """Write a task, its rows and its Python; return the folder of the task."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [json.dumps({"text": f"{split} reverse BAKOT {i}"}) for i in range(8)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    here = f"data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}"
    functions = MADE if "process_docs" in python.get("own", "") else ""
    functions += SCORED if "points" in python.get("own", "") else ""
    text = TASK.replace("METRIC", "points" if SCORED in functions else "acc")
    (tasks / "own.yaml").write_text(text.replace("DATA", data or here) + functions)
    for name, text in python.items():
        (tasks / f"{name}.py").write_text(textwrap.dedent(text))
    return tasks


IMPORTS = """
    import os, sys
    sys.path.insert(0, os.path.dirname(__file__))
    import {name}
    def process_docs(rows):
        return rows.map({name}.one)
"""


def test_python_that_a_task_imports_is_one_of_its_files(tmp_path):
    tasks = write(
        tmp_path,
        own="import json, first\nfrom deep import inner\ndef process_docs(rows): ...\n",
        first="import second.part as part, unknown\n",
        unused="",
    )
    for name in ("second/__init__", "second/part", "second/other", "deep/__init__", "deep/inner"):
        (tasks / name).parent.mkdir(exist_ok=True)
        (tasks / f"{name}.py").write_text("from . import inner\n" if "part" in name else "")
    (tasks / "second/inner.py").write_text("import first\nfrom .. import top\n")
    (tasks / "broken.py").write_text("import (")
    (tasks / "top.py").write_text("import broken\n")

    modules = ("broken", "deep/__init__", "deep/inner", "first", "own", "second/__init__")
    modules += ("second/inner", "second/part", "top")
    expected = sorted(["own.yaml", *(f"{name}.py" for name in modules)])
    assert sorted(own_files(["own"], tasks)) == expected


def test_a_calibration_is_another_one_after_an_edit_of_python_that_its_task_imports(tmp_path):
    tasks = write(tmp_path, own=IMPORTS.format(name="helper_of_edit"), helper_of_edit="one = dict")
    before = pin_task(hub_api(), "own", None, tasks)
    (tasks / "helper_of_edit.py").write_text("def one(row): return {'text': 'other'}\n")
    after = pin_task(hub_api(), "own", None, tasks)

    assert before.digest != after.digest
    assert before.facts["dataset_sha"] == after.facts["dataset_sha"]


READS = """
    import json
    from pathlib import Path
    FILE = Path(__file__).parent / {file!r}
    def process_docs(rows):
        word = json.loads(FILE.read_text())
        return rows.map(lambda row: {{"text": word + row["text"]}})
"""
SWALLOWS = READS.replace(
    "word = json.loads(FILE.read_text())",
    "try: word = FILE.read_text()\n        except OSError: word = ''",
)


@pytest.mark.parametrize("python", [READS, SWALLOWS])
@pytest.mark.parametrize("file", ["words.json", "../words.json", ".words.json"])
def test_a_calibration_whose_task_reads_a_file_that_it_does_not_name_is_refused(
    tmp_path, monkeypatch, python, file
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    tasks = write(tmp_path, own=python.format(file=file))
    words = (tasks / file).resolve()
    words.write_text('"encode "')
    asked = parse_recipe(RECIPE, "recipe.yaml").placed_in(tmp_path)

    with pytest.raises(EvaluationError) as caught:
        pipeline.calibrate(asked, tmp_path / "out")

    assert str(caught.value) == (
        f"own: its Python reads {words}, which no task names, so that it is not part of the merge."
        "\nWrite its content into a Python file that this one imports, or name it in `data_files`."
    )
    assert not (tmp_path / "out").exists()


NAMES = """
    import pyarrow.parquet
    from pathlib import Path
    def process_docs(rows):
        words = pyarrow.parquet.read_table(f"{{Path(__file__).parent}}/{file}")
        return rows.map(lambda row: {{"text": words["word"][0].as_py() + row["text"]}})
"""


@pytest.mark.parametrize("file", ["words.parquet", "../words.parquet"])
def test_a_calibration_whose_task_names_another_file_is_refused_before_it_runs(tmp_path, file):
    """pyarrow opens it in C++, which no hook sees."""
    tasks = write(tmp_path, own=NAMES.format(file=file))
    (tasks / file).write_bytes(b"no parquet")

    with pytest.raises(EvaluationError, match=r"^own: its Python reads .*/words.parquet, which no"):
        pin_task(hub_api(), "own", None, tasks)


def test_a_calibration_may_read_what_it_imports_and_what_it_names(tmp_path):
    tasks = write(tmp_path, own=IMPORTS.format(name="helper_of_named"))
    named = f"data_files: {{train: [{tmp_path}/train.jsonl, {tasks}/more.jsonl], "
    named += f"test: {tmp_path}/test.jsonl}}"
    helper = """
        import tempfile, lewis_hub.demo.zoo as zoo
        from pathlib import Path
        MORE = (Path(__file__).parent / "more.jsonl").read_text()
        (zoo.zoo_folder() / "base" / "config.json").read_text()
        def one(row):
            with tempfile.TemporaryFile("w+") as file:
                file.write("encode ")
                file.seek(0)
                return {"text": file.read() + row["text"]}
    """
    (tasks / "more.jsonl").write_text('{"text": "more"}\n')
    write(tmp_path, data=named, helper_of_named=helper, own=IMPORTS.format(name="helper_of_named"))
    asked = parse_recipe(RECIPE, "recipe.yaml").placed_in(tmp_path)

    assert pipeline.calibrate(asked, tmp_path / "out").profile.sources


def test_a_merge_whose_task_reads_its_own_data_is_made_again(tmp_path):
    """The copies in the merge are its task files, whatever paths their `data_files` name."""
    named = f"data_files: {{train: {tmp_path}/tasks/rows.jsonl, test: {tmp_path}/test.jsonl}}"
    own = READS.format(file="rows.jsonl") + "    ELSEWHERE = '../test.jsonl'\n"
    own = own.replace("json.loads(FILE.read_text())", "FILE.read_text()[:3]")
    tasks = write(tmp_path, data=named, own=own)
    (tasks / "rows.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    asked = parse_recipe(RECIPE, "recipe.yaml").placed_in(tmp_path)

    merged = pipeline.merge_models(asked, tmp_path / "merged").output

    copies = sorted(path.name for path in (merged / "lewis" / "tasks").iterdir())
    assert copies == ["own.py", "own.yaml", "rows.jsonl"]
    model, allowed = ModelReference(name=str(merged)), Execution(allow_code=True)
    assert lewis_hub.verify(model, allowed, rebuild=True).problems == ()


@pytest.mark.parametrize(
    "data",
    [
        "data_dir: tasks/rows",
        "data_dir: tasks/rows, data_files: {train: train.jsonl, test: test.jsonl}",
    ],
)
def test_a_calibration_on_a_folder_whose_files_no_task_names_is_refused(tmp_path, data):
    tasks = write(tmp_path, data=data)

    with pytest.raises(EvaluationError) as caught:
        pin_task(hub_api(), "own", None, tasks)

    assert str(caught.value) == (
        "own: does not name the files of its data, so they cannot be pinned.\n"
        "Name each file with its folder in `data_files`, without `data_dir`."
    )


@pytest.mark.parametrize(
    "data",
    [
        "data_dir: tasks/rows",
        "data_dir: tasks/rows, data_files: {train: train.jsonl, test: test.jsonl}",
        "data_files: {train: tasks/*/train.jsonl, test: 'tasks/**/[st]est.jsonl'}",
        "FOLDER",
    ],
)
def test_data_in_the_folder_of_own_tasks_are_among_their_files(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    tasks = write(tmp_path, data=data)
    (tasks / "rows").mkdir()
    for name in ("train.jsonl", "test.jsonl", "notes.txt", ".hidden.jsonl"):
        (tasks / "rows" / name).write_text("{}")
    if data == "FOLDER":
        text = (tasks / "own.yaml").read_text().replace("dataset_path: json", "dataset_path: ROWS")
        text = text.replace("dataset_kwargs: {FOLDER}\n", "").replace("ROWS", "tasks/rows")
        (tasks / "own.yaml").write_text(text)

    found = own_files(["own"], tasks)

    assert sorted(found) == ["own.yaml", "rows/test.jsonl", "rows/train.jsonl"]


def test_data_in_the_folder_of_own_tasks_of_mteb_are_among_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = tmp_path / "tasks"
    (tasks / "rows").mkdir(parents=True)
    (tasks / "rows" / "test.jsonl").write_text("{}")
    (tasks / "own.yaml").write_text("name: Own\ntype: STS\ndataset: {path: tasks/rows}\n")
    (tasks / "other.yaml").write_text("name: Other\ntype: STS\ndataset: 5\n")

    assert sorted(own_task_files(("Own",), tasks)) == ["own.yaml", "rows/test.jsonl"]
    assert sorted(own_task_files(("Other",), tasks)) == ["other.yaml"]


POINTS = """
    import os, sys
    sys.path.insert(0, os.path.dirname(__file__))
    from {name} import POINTS
    def points(doc, results):
        return {{"points": POINTS}}
"""
LAZY = """
    from pathlib import Path
    def points(doc, results):
        return {{"points": float((Path(__file__).parent / {file!r}).read_text())}}
"""


def scored(tasks):
    one = Candidate("merged", "sha256:0", zoo_folder() / "base")
    loaded, told = load_tasks(TaskSelection(("own",), tasks), {}), Recorder()
    found = score([one], loaded, None, EvaluationSettings(), tasks.parent / "kept", told)
    return found["merged"].tasks["own"].metrics["points,none"].value, told.totals["Evaluating"]


def test_scores_by_python_that_changed_since_are_not_used_again(tmp_path):
    tasks = write(tmp_path, own=POINTS.format(name="points_of_edit"), points_of_edit="POINTS = 1.0")
    first, again = scored(tasks), scored(tasks)
    (tasks / "points_of_edit.py").write_text("POINTS = 0.25\n# longer\n")
    _, n_other = scored(tasks)

    assert (first, again, n_other) == ((1.0, 8), (1.0, 0), 8)


def test_a_metric_that_reads_a_file_beside_it_is_refused(tmp_path):
    tasks = write(tmp_path, own=LAZY.format(file="points.txt"))
    (tasks / "points.txt").write_text("0.5")

    with pytest.raises(EvaluationError) as caught:
        scored(tasks)

    assert str(caught.value) == (
        f"own: its Python reads {tasks}/points.txt, which no task names, so that it is not part of "
        "the merge.\nWrite its content into a Python file that this one imports, or name it in "
        f"`data_files`.\nOr move it out of {tasks}: then nothing compares it."
    )
    assert list((tmp_path / "kept").iterdir()) == []


def test_scores_are_not_used_again_after_an_edit_of_any_file_beside_the_python(tmp_path):
    """Libraries may read such a file where no hook sees it."""
    tasks = write(tmp_path, own="def points(doc, results): return {'points': 1.0}\n")
    (tasks / "words.bin").write_text("a")
    first, again = scored(tasks), scored(tasks)
    (tasks / "words.bin").write_text("b")

    assert (first, again, scored(tasks)) == ((1.0, 8), (1.0, 0), (1.0, 8))


def test_a_scored_task_whose_python_names_another_file_beside_it_is_refused_early(tmp_path):
    tasks = write(tmp_path, own=LAZY.format(file="points.txt"))
    (tasks / "points.txt").write_text("0.5")

    with pytest.raises(EvaluationError) as caught:
        LIBRARIES["lm-eval"].require_tasks(TaskSelection(("own",), tasks))
    with pytest.raises(EvaluationError) as when_scored:
        scored(tasks)

    assert str(caught.value) == str(when_scored.value)


def test_a_metric_may_read_a_file_elsewhere(tmp_path):
    tasks = write(tmp_path, own=LAZY.format(file="../points.txt"))
    (tmp_path / "points.txt").write_text("0.5")

    assert scored(tasks) == (0.5, 8)
