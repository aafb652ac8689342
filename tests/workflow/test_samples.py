"""Questions and answers in the report: of public data, unless the recipe asks for others."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.evaluate.benchmarks import TaskData, task_data
from lewis_hub.evaluate.samples import Samples
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks
from lewis_hub.report.page_data import embedded, page_data
from lewis_hub.workflow.samples import closed
from lewis_hub.workflow.task_data import scored_sources

TASK = """
task: {name}
dataset_path: {path}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: exact_match}}]
"""
RECIPE = """
base_model: zoo/base
models: [{{model: zoo/expert-reverse, parameters: {{weight: 0.7}}}}]
merge_method: task_arithmetic
dtype: bfloat16
evaluate: {{tasks: [zoo_reverse], include: tasks, limit: 6, compare: [base, experts]{more}}}
"""


def test_only_data_that_anyone_may_read_are_public(hub, tmp_path):
    api, name = hub.api(), f"{hub.user}/sums"
    api.create_repo(name, repo_type="dataset")
    (tmp_path / "task.yaml").write_text(TASK.format(name="sums", path=name))
    selected = TaskSelection(("sums",), tmp_path)
    (data,) = task_data(locate_tasks(selected))

    def why():
        return closed(data, scored_sources(api, selected), tmp_path)

    assert why() is None
    api.update_repo_settings(name, repo_type="dataset", gated="auto")
    assert why() == f"The dataset {name} is gated."
    api.update_repo_settings(name, repo_type="dataset", gated=False, private=True)
    assert why() == f"The dataset {name} is private."
    assert closed(data, {}, tmp_path) == f"It is unknown whether the dataset {name} is public."


def test_files_count_as_public_beside_the_task_that_is_published_with_them(tmp_path):
    inside, outside = tmp_path / "tasks" / "rows.jsonl", tmp_path / "rows.jsonl"
    inside.parent.mkdir()

    def why(*files, code=False):
        data = TaskData("sums", None, None, tuple(map(str, files)), code)
        return closed(data, {}, inside.parent)

    assert why(inside) is None
    assert why(inside, outside) == "Its data are files outside of the folder of its task."
    assert why("https://example.org/rows.jsonl") == why(outside)
    assert why(inside.parent / ".mine" / "rows.jsonl") == why(outside)  # it is not published
    assert why() == "It is unknown where its data come from."
    assert why(inside, code=True) == (
        "Python code makes its items, so it is unknown whether they are public."
    )


def test_data_that_a_task_reads_elsewhere_are_not_those_of_its_repo(tmp_path):
    more = "dataset_kwargs: {data_files: {test: /home/me/rows.jsonl}}\n"
    (tmp_path / "task.yaml").write_text(TASK.format(name="sums", path="me/public") + more)

    (data,) = task_data(locate_tasks(TaskSelection(("sums",), tmp_path)))

    assert (data.repo, data.files) == (None, ("/home/me/rows.jsonl",))
    assert closed(data, {}, tmp_path) == "Its data are files outside of the folder of its task."


def merge(more=""):
    """Merge into `merged` anew; its samples and the page."""
    shutil.rmtree("merged", ignore_errors=True)
    Path("recipe.yaml").write_text(RECIPE.format(more=more))
    done = CliRunner().invoke(cli, ["merge", "-q", "--json"])
    assert done.exit_code == 0, done.output
    samples = Path("merged/lewis/samples.json").read_text()
    return Samples.from_json(samples), Path("merged/lewis/report.html").read_text()


@pytest.mark.slow  # it scores models
def test_a_merge_keeps_what_every_model_answered_and_the_page_shows_it(place):
    samples, page = merge()

    lines = (zoo_folder() / "data/reverse/test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(row) for row in lines[:6]]
    task = samples.tasks["zoo_reverse"]
    assert task.questions == tuple(f"Question: {row['question']}\nAnswer:" for row in rows)
    assert task.targets == tuple(row["answer"] for row in rows)
    expert = next(label for label in task.answers if label.startswith("expert:"))
    metric = task.metrics["exact_match,none"]
    assert metric.against == expert
    for label, given in task.answers.items():
        right = tuple(
            float(said == wanted) for said, wanted in zip(given, task.targets, strict=True)
        )
        assert metric.values[label] == right
    # the page is made of what is kept
    data = re.search(r'id="data">(.*?)</script>', page)[1]
    assert data == embedded(page_data(None, samples))
    lock = json.loads(Path("merged/lewis/lock.json").read_text())
    assert "lewis/samples.json" in lock["outputs"]
    assert '"answers"' not in Path("merged/lewis/items.json").read_text()
    done = CliRunner().invoke(cli, ["verify", "merged", "--json"])
    assert json.loads(done.stdout)["problems"] == []


@pytest.mark.slow  # it scores models
def test_gated_questions_are_left_out_and_the_page_says_so_unless_asked_for(hub, place):
    hub.api().update_repo_settings("zoo/reverse", repo_type="dataset", gated="auto")

    samples, page = merge()

    task = samples.tasks["zoo_reverse"]
    assert (task.questions, task.answers) == ((), {})
    assert "Question: reverse" not in Path("merged/lewis/samples.json").read_text() + page
    assert (
        "Questions and answers of zoo_reverse are left out. The dataset zoo/reverse is gated. "
        "`evaluate.log_samples: all` in the recipe shows them."
    ) in page
    asked, page = merge(", log_samples: all")
    assert asked.tasks["zoo_reverse"].n_with_texts == 6
    assert "are left out" not in page
    recipe = yaml.safe_load(Path("merged/lewis/recipe.yaml").read_text())
    assert recipe["evaluate"]["log_samples"] == "all"


@pytest.mark.slow  # it scores models
def test_no_texts_are_kept_if_the_recipe_says_so(place):
    samples, page = merge(", log_samples: none")

    assert samples.tasks["zoo_reverse"].questions == ()
    assert "The recipe sets `log_samples: none`." in page
