from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.code import loads_code, runs_code
from lewis_hub.evaluate.tasks import (
    METRICS,
    OF_GROUPS,
    TaskSelection,
    bundled_folder,
    locate_tasks,
    read_file,
    read_folder,
    scan_headers,
)

ARITHMETIC = "task: sums\ntag: numbers\ndataset_path: me/sums\ndataset_name: easy\n"
GROUP = "group: all_numbers\ntask:\n  - sums\n  - {task: products, num_fewshot: 2}\n"


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def names(*asked: str, include: Path) -> list[str]:
    return [task.name for task in locate_tasks(TaskSelection(asked, include)).tasks]


def refusal(*asked: str, **options: object) -> str:
    with pytest.raises(EvaluationError) as raised:
        locate_tasks(TaskSelection(asked, **options))
    return str(raised.value)


def test_an_own_task_is_found_with_its_dataset(tmp_path):
    include = write(tmp_path, sums=ARITHMETIC)

    (task,) = locate_tasks(TaskSelection(("sums",), include)).tasks

    assert task.name == "sums"
    assert (task.config["dataset_path"], task.config["dataset_name"]) == ("me/sums", "easy")


def test_a_group_stands_for_all_that_it_lists(tmp_path):
    include = write(tmp_path, sums=ARITHMETIC, products="task: products\n", group=GROUP)

    assert names("all_numbers", include=include) == ["sums", "products"]


def test_a_tag_stands_for_every_task_that_bears_it(tmp_path):
    products = "task: products\ntag: [hard, numbers]\n"
    include = write(tmp_path, sums=ARITHMETIC, products=products)

    located = locate_tasks(TaskSelection(("numbers",), include))

    assert located.selected == ("products", "sums")
    assert not located.through_tag


def test_a_group_may_list_a_tag_and_tasks_of_its_own(tmp_path):
    group = "group: mixed\ntask: [numbers, {task: inline, dataset_path: me/inline}]\n"
    include = write(tmp_path, sums=ARITHMETIC, group=group)

    located = locate_tasks(TaskSelection(("mixed",), include))

    assert [file.name for file in located.files] == ["mixed", "sums", "mixed::inline"]
    assert located.through_tag


def test_included_files_are_merged_under_the_file_itself(tmp_path):
    (tmp_path / "template").write_text("dataset_path: me/base\ndataset_name: base\n")
    write(tmp_path, sums="include: template\ntask: sums\ndataset_name: own\n")

    assert read_file(tmp_path / "sums.yaml").config == {
        "task": "sums",
        "dataset_path": "me/base",
        "dataset_name": "own",
    }


def test_no_task_at_all_is_an_error():
    assert refusal() == (
        "evaluate: no task is named.\nName at least one in `evaluate.tasks`, or with `--task`."
    )


def test_an_unknown_task_names_the_nearest_ones():
    assert refusal("gms8k") == (
        "gms8k: neither lm-eval nor your include folder has such a task.\n"
        "Nearest: gsm8k, hrm8k. Put your own task files into the folder that `evaluate.include` "
        "names."
    )


def test_the_keys_of_a_group_and_of_its_members_replace_those_of_the_tasks(tmp_path):
    rows = "dataset_path: json\ndataset_kwargs: {data_files: rows.jsonl}\n"
    inner = "group: inner\ntask: [sums]\nlimit: 1\n"
    member = "{task: products, dataset_path: me/private, unsafe_code: true}"
    outer = f"group: outer\ntask: [inner, {member}]\nnum_fewshot: 7\nlimit: 2\n"
    files = {"sums": ARITHMETIC, "products": f"task: products\n{rows}"}
    include = write(tmp_path, **files, inner=inner, outer=outer)

    located = locate_tasks(TaskSelection(("outer",), include, allow_code=True))

    sums, products = located.tasks
    assert (sums.name, sums.config["num_fewshot"], sums.config["limit"]) == ("sums", 7, 2)
    assert (products.name, products.config["dataset_path"]) == ("products", "me/private")
    with pytest.raises(EvaluationError, match="products: runs code that the model writes"):
        locate_tasks(TaskSelection(("outer",), include))


def test_the_keys_of_groups_are_those_of_lm_eval():
    from lm_eval.config.group import GroupConfig

    assert {field.name for field in fields(GroupConfig)} == OF_GROUPS


def test_a_group_with_an_unknown_member_names_its_file(tmp_path):
    include = write(tmp_path, sums=ARITHMETIC, group=GROUP.replace("products", "qwertz"))

    assert refusal("all_numbers", include=include).startswith(
        f"qwertz: listed in {tmp_path}/group.yaml, neither lm-eval nor your include folder has "
        "such a task.\n`lm-eval ls tasks` lists all names. Put your own task files into"
    )


def test_a_missing_include_folder_is_an_error(tmp_path):
    assert refusal("sums", include=tmp_path / "gone") == (
        f"{tmp_path}/gone: is not a folder.\n"
        "Set `evaluate.include` to the folder with your task files."
    )


def test_a_broken_task_file_is_told_by_its_line(tmp_path):
    message = refusal("sums", include=write(tmp_path, sums="task: sums\ntag: [open\n"))

    assert message.startswith(f"{tmp_path}/sums.yaml: is not valid YAML: ")
    assert "line 2, column 6" in message
    assert message.endswith("describes its keys.")


def test_a_file_without_keys_is_an_error(tmp_path):
    assert refusal("sums", include=write(tmp_path, sums="- sums\n")) == (
        f"{tmp_path}/sums.yaml: contains a list, expected keys such as `task:`.\n"
        "Correct the file; docs/task_guide.md of lm-evaluation-harness describes its keys."
    )


def test_two_files_of_one_name_are_an_error(tmp_path):
    message = refusal("sums", include=write(tmp_path, a=ARITHMETIC, b=ARITHMETIC))

    assert message == (
        f"{tmp_path}/b.yaml: task `sums` is also defined in {tmp_path}/a.yaml.\n"
        "Give each task its own name."
    )


def test_a_missing_and_a_circular_include_are_errors(tmp_path):
    lost = refusal("sums", include=write(tmp_path, sums="task: sums\ninclude: lost\n"))
    circular = refusal("sums", include=write(tmp_path, sums="task: sums\ninclude: sums.yaml\n"))

    assert f"includes {tmp_path}/lost, which is not a file." in lost
    assert f"{tmp_path}/sums.yaml: includes itself." in circular


ALLOW = "Allow it with `--allow-code-execution`, best in a container without network."


@pytest.mark.parametrize(
    "text",
    [
        "task: sums\nunsafe_code: true\n",
        "task: sums\nmetric_list: [{metric: code_eval, hf_evaluate: true}]\n",
    ],
)
def test_a_task_that_runs_generated_code_is_refused(tmp_path, text):
    message = refusal("sums", include=write(tmp_path, sums=text))

    assert message == f"sums: runs code that the model writes.\n{ALLOW}"


@pytest.mark.parametrize(
    "name",
    ["mbpp", "cruxeval_input", "longproc_countdown_0.5k", "prompt_robustness_math_algebra"],
)
def test_lm_evals_code_benchmarks_are_refused_whether_they_say_so_or_not(name):
    assert refusal(name) == f"{name}: runs code that the model writes.\n{ALLOW}"


def test_every_module_of_lm_eval_that_runs_code_itself_or_by_an_import_is_known():
    root = bundled_folder()
    modules = [path for path in root.rglob("*.py") if path.parent != root]
    found = {path.relative_to(root).as_posix() for path in modules if runs_code([path], root)}

    assert found == {
        *("cruxeval/utils.py", "humaneval/utils.py", "humaneval_infilling/utils.py"),
        *("longproc/metrics.py", "mbpp/utils.py", "noreval/ask_gec/errant.py"),
        *("score/math/math_grader.py", "score/math/utils_math.py"),
        "score/non_greedy_summarizer.py",
    }


@pytest.mark.parametrize("name", ["kobest_copa", "squadv2", "polemo2_in", "scrolls_narrativeqa"])
def test_lm_evals_tasks_whose_metric_is_code_of_the_hub_are_refused(name):
    assert refusal(name) == f"{name}: runs code of a metric that the Hub has.\n{ALLOW}"


@pytest.mark.parametrize("metric", ["{metric: f1, hf_evaluate: true}", "{metric: rouge}"])
def test_an_own_task_whose_metric_is_code_of_the_hub_is_refused(tmp_path, metric):
    include = write(tmp_path, sums=f"task: sums\nmetric_list: [{metric}]\n")
    assert refusal("sums", include=include) == (
        f"sums: runs code of a metric that the Hub has.\n{ALLOW}"
    )
    allowed = TaskSelection(("sums",), include, allow_code=True)
    assert [task.name for task in locate_tasks(allowed).tasks] == ["sums"]


def test_the_metrics_of_lm_eval_are_known():
    from lm_eval.api import metrics, registry

    assert metrics
    assert set(registry.metric_registry.keys()) == METRICS


def test_every_module_of_lm_eval_that_loads_code_is_known():
    root = bundled_folder()
    modules = [path for path in root.rglob("*.py") if path.parent != root]
    found = {path.relative_to(root).parts[0] for path in modules if loads_code([path], root)}
    names = (
        "afrobench careqa catalan_bench darija_bench evalita_llm french_bench galician_bench "
        "humaneval humaneval_infilling mbpp meddialog mediqa_qa2019 medtext meqsum mimic_repsum "
        "mts_dialog noreval noticia olaph scrolls slr_bench spanish_bench squadv2 wmt2016"
    )
    assert found == {*names.split()}


def test_own_functions_are_read_but_not_imported(tmp_path):
    (tmp_path / "own.py").write_text("raise SystemExit('imported')\n")
    include = write(tmp_path, sums="task: sums\nprocess_docs: !function own.process\n")

    (file,) = read_folder(include).values()

    assert file.config["process_docs"] == "own.process"
    assert file.modules == [tmp_path / "own.py"]
    assert names("sums", include=include) == ["sums"]


def test_task_files_from_a_repo_are_code_and_need_leave(tmp_path):
    include = write(tmp_path, sums=ARITHMETIC)

    assert refusal("sums", include=include, own_include=False) == (
        f"{tmp_path}: task files are code, and these come from a Hub repo.\n"
        f"Read them first. {ALLOW}"
    )
    allowed = TaskSelection(("sums",), include, own_include=False, allow_code=True)
    assert locate_tasks(allowed).tasks[0].name == "sums"


def test_a_yaml_file_cannot_make_python_objects(tmp_path):
    include = write(tmp_path, sums='task: !!python/object/apply:os.system ["true"]\n')

    assert "could not determine a constructor" in refusal("sums", include=include)


def test_allowed_code_benchmarks_are_found_without_importing_lm_eval():
    code = (
        "import sys\n"
        "from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks\n"
        "located = locate_tasks(TaskSelection(('gsm8k', 'mbpp'), allow_code=True))\n"
        "print([task.config['dataset_path'] for task in located.tasks])\n"
        "print({'torch', 'datasets', 'transformers'} & set(sys.modules))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.splitlines() == [
        "['openai/gsm8k', 'google-research-datasets/mbpp']",
        "set()",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's imports
def test_the_quick_scan_finds_what_lm_evals_own_index_holds():
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    scanned = scan_headers(bundled_folder())

    listed = {name: entry.yaml_path for name, entry in index.items() if entry.kind.name != "TAG"}
    assert {name: scanned.files.get(name) for name in listed} == listed
    assert {name for name, entry in index.items() if entry.kind.name == "TAG"} <= scanned.tags


@pytest.mark.slow
def test_a_tag_of_lm_eval_stands_for_all_its_tasks():
    located = locate_tasks(TaskSelection(("ai2_arc",)))

    assert [task.name for task in located.tasks] == ["arc_challenge", "arc_easy"]


def test_the_full_index_of_lm_eval_is_read_once_for_all_tags(tmp_path, monkeypatch):
    """It takes ten seconds, and `mmlu` lists four tags."""
    made = []

    class Manager:
        def __init__(self):
            tags = {"ai2_arc": {"arc_easy", "arc_challenge"}, "glue": {"cola", "rte"}}
            self.task_index = {tag: SimpleNamespace(tags=tags[tag]) for tag in tags}
            made.append(self)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    (tmp_path / "g.yaml").write_text("group: g\ntask: [ai2_arc, glue]\n")

    located = locate_tasks(TaskSelection(("g",), tmp_path))

    assert [task.name for task in located.tasks] == ["arc_challenge", "arc_easy", "cola", "rte"]
    assert len(made) == 1


SCORED = "dataset_path: json\ndataset_kwargs: {data_files: {test: x.jsonl}}\ntest_split: test\n"
DEEP = 24


def included_twice():
    files = {f"{n}.yaml": f"include: [{n + 1}.yaml, {n + 1}.yaml]\n" for n in range(DEEP)}
    return files | {f"{DEEP}.yaml": "x: 1\n", "one.yaml": f"task: one\ninclude: 0.yaml\n{SCORED}"}


def listed_twice():
    names = ["one", *(f"g{n}" for n in range(1, DEEP + 1))]
    groups = zip(names, names[1:], strict=False)
    files = {f"{name}.yaml": f"group: {name}\ntask: [{inner}, {inner}]\n" for name, inner in groups}
    return files | {f"g{DEEP}.yaml": f"task: g{DEEP}\n{SCORED}"}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (included_twice(), "included files, the limit is 1,000."),
        (listed_twice(), "one: leads to more than 20,000 tasks and groups."),
        ({"one.yaml": "group: one\ntask: [one]\n"}, "one: lists itself."),
        (
            {"one.yaml": "group: one\ntask: [two]\n", "two.yaml": "group: two\ntask: [one]\n"},
            "one: lists itself.",
        ),
        ({"one.yaml": "group: one\ntask: [5]\n"}, "`one` is neither a name nor a mapping."),
        ({"one.yaml": f"task: one\ninclude: 5\n{SCORED}"}, "`include` is no text and no list"),
        ({"one.yaml": f"task: one\ninclude: [5]\n{SCORED}"}, "`include` is no text and no list"),
        ({"one.yaml": f"task: one\ninclude: {'a' * 5000}\n{SCORED}"}, "which is not a file."),
        ({"one.yaml": f"task: one\ntag: 5\n{SCORED}"}, "`tag` is no text and no list of texts."),
        ({"one.yaml": f"task: one\ntag: [[1]]\n{SCORED}"}, "`tag` is no text and no list"),
        ({"one.yaml": "task: one\ndataset_path: [json]\n"}, "`dataset_path` is no text."),
        ({"one.yaml": "task: one\ndataset_kwargs: [1]\n"}, "`dataset_kwargs` is no mapping."),
        ({"one.yaml": f"task: one\nfewshot_split: [a]\n{SCORED}"}, "`fewshot_split` is no text."),
        ({"one.yaml": f"task: one\nrepeats: '2'\n{SCORED}"}, "`repeats` is no whole number from 1"),
        ({"one.yaml": f"task: one\nrepeats: true\n{SCORED}"}, "`repeats` is no whole number"),
    ],
)
def test_task_files_without_end_or_of_other_types_are_refused(tmp_path, files, problem):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    with pytest.raises(EvaluationError) as caught:
        locate_tasks(TaskSelection(("one",), tmp_path))

    assert problem in str(caught.value)


def test_a_file_that_several_include_is_read(tmp_path):
    files = {
        "a.yaml": "x: 1\n",
        "b.yaml": "include: a.yaml\n",
        "c.yaml": "include: [a.yaml]\ny: 2\n",
    }
    files["one.yaml"] = f"task: one\ninclude: [b.yaml, c.yaml]\n{SCORED}"
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    [found] = locate_tasks(TaskSelection(("one",), tmp_path)).files

    assert (found.config["x"], found.config["y"]) == (1, 2)
    assert sorted(path.name for path in found.included) == ["a.yaml", "b.yaml", "c.yaml"]
