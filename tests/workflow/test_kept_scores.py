"""Results that an interrupted run kept are used again only for the same items."""

import json

from statistical_merges import Recorder

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.benchmarks import load_tasks
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.workflow.evaluate import Candidate, score

TASK = """
task: rows
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def test_results_on_a_local_file_that_changed_are_not_used_again(tmp_path):
    data, tasks = tmp_path / "rows.jsonl", tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.yaml").write_text(TASK.replace("FILE", str(data)))
    kept = tasks / "merged.partial"  # as where `include` is the folder of the recipe
    one = Candidate("merged", "sha256:0", zoo_folder() / "base")

    def scored(*questions):
        rows = [json.dumps({"question": each, "answer": " yes"}) for each in questions]
        data.write_text("\n".join(rows))
        loaded = load_tasks(TaskSelection(("rows",), tasks), {})
        told = Recorder()
        found = score([one], loaded, None, EvaluationSettings(), kept, told)
        return found["merged"].tasks["rows"].documents, told.totals["Evaluating"]

    first, n_first = scored("a", "b")
    again, n_again = scored("a", "b")
    other, n_other = scored("a", "c")

    assert (n_first, n_again, n_other) == (2, 0, 2)
    assert first == again
    assert [x == y for x, y in zip(first, other, strict=True)] == [True, False]
