import json
import re
import shutil
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from lewis_hub.cli.main import cli
from lewis_hub.cli.options import SIZE
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError
from lewis_hub.merge.settings import parameters_of
from lewis_hub.methods import registry
from lewis_hub.recipe.read import read_recipe, schema


def test_init_writes_a_recipe_with_the_given_options(tmp_path):
    output = tmp_path / "recipe.yaml"
    words = ["init", "--base", "org/base", "--expert", "org/one", "--expert", "org/two@v1"]
    words += [
        "--task",
        "gsm8k",
        "--calibration",
        "org/data",
        "--repo",
        "me/mine",
        "-o",
        str(output),
    ]

    done = CliRunner().invoke(cli, words)

    wrote, _ = done.output.splitlines()
    assert wrote == f"Wrote {output} and recipe.schema.json. Next: lewis-hub check {output}"
    recipe = read_recipe(output)
    assert str(recipe.base_model) == "org/base"
    assert [str(entry.model) for entry in recipe.models] == ["org/one", "org/two@v1"]
    assert recipe.guide is not None
    assert recipe.guide.calibration is not None
    assert recipe.guide.calibration.dataset == "org/data"
    assert recipe.guide.calibration.text == "{question} {answer}"
    assert recipe.evaluate is not None
    assert recipe.evaluate.tasks == ("gsm8k",)
    assert recipe.publish is not None
    assert recipe.publish.repo == "me/mine"


def test_init_merges_by_statistics_when_there_is_a_calibration_for_each_expert(tmp_path):
    output = tmp_path / "recipe.yaml"
    words = ["init", "--base", "b", "--expert", "e1", "--expert", "e2"]
    words += ["--calibration", "org/d1", "--calibration", "org/d2", "-o", str(output)]
    words += ["--text", r"Q: {q}\nA: {a}"]  # as a shell hands it on

    CliRunner().invoke(cli, words, catch_exceptions=False)

    recipe = read_recipe(output)
    own = [entry.calibration for entry in recipe.models if entry.calibration]
    assert [one.dataset for one in own] == ["org/d1", "org/d2"]
    assert own[0].text == own[1].text == "Q: {q}\nA: {a}"
    assert (recipe.merge_method, recipe.guide) == ("regmean", None)
    assert recipe.parameters == {"inputs": "merged", "off_diagonal": 0.7}


def test_init_trims_by_a_guide_when_all_experts_share_a_calibration(tmp_path):
    output = tmp_path / "recipe.yaml"
    words = ["init", "--base", "b", "--expert", "e1", "--expert", "e2"]
    words += ["--calibration", "org/data", "-o", str(output)]

    CliRunner().invoke(cli, words, catch_exceptions=False)

    recipe = read_recipe(output)
    assert (recipe.merge_method, recipe.guide.name) == ("ties", "lewis")
    assert [entry.calibration for entry in recipe.models] == [None, None]


def test_init_calibrates_each_expert_on_the_training_items_of_its_own_task(tmp_path):
    output = tmp_path / "recipe.yaml"
    words = ["init", "--base", "b", "--expert", "e1", "--expert", "e2", "-o", str(output)]

    CliRunner().invoke(cli, [*words, "--task", "gsm8k", "--task", "mmlu_anatomy"])

    recipe = read_recipe(output)
    own = [entry.calibration for entry in recipe.models if entry.calibration]
    assert [(one.task, one.split) for one in own] == [("gsm8k", "train"), ("mmlu_anatomy", "dev")]
    assert {one.samples for one in own} == {64}
    assert (recipe.merge_method, recipe.guide) == ("regmean", None)


ASK = "give --task or --calibration once for each expert, in their order."
KEEPS = "`regmean`, which keeps more of each expert's skill"


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        (["gsm8k"], f"2 experts, 1 tasks and no calibration dataset; for {KEEPS}, {ASK}"),
        (["gsm8k"] * 3, f"2 experts, 3 tasks and no calibration dataset; for {KEEPS}, {ASK}"),
        (["mbpp", "gsm8k"], f"`mbpp` has no split with examples that is not scored; for {KEEPS}, "),
    ],
)
def test_init_guides_by_magnitude_where_experts_have_no_texts_of_their_own(tmp_path, tasks, why):
    output = tmp_path / "recipe.yaml"
    words = ["init", "--base", "b", "--expert", "e1", "--expert", "e2", "-o", str(output)]

    done = CliRunner().invoke(cli, words + [w for t in tasks for w in ("--task", t)])

    note = done.output.splitlines()[1]
    assert note.startswith("Note: the guide is `magnitude`, which reads only weights, because ")
    assert why in note
    recipe = read_recipe(output)
    assert (recipe.merge_method, recipe.guide.name) == ("ties", "magnitude")
    assert (recipe.guide.gamma, recipe.guide.epsilon) == (0.25, 0.75)
    assert (recipe.guide.mean_density, recipe.guide.calibration) == (0.5, None)
    assert [entry.calibration for entry in recipe.models] == [None, None]
    assert recipe.evaluate.tasks == tuple(tasks)
    assert recipe.evaluate.compare == ("base", "experts", "uniform")


@pytest.mark.parametrize("words", [["--expert", "e"], ["--expert", "e", "--task", "gsm8k"]])
def test_init_says_what_the_guide_of_a_single_expert_lacks(tmp_path, words):
    output = tmp_path / "recipe.yaml"

    done = CliRunner().invoke(cli, ["init", "--base", "b", *words, "-o", str(output), "--json"])

    assert json.loads(done.stdout)["note"] == (
        "the guide is `magnitude`, which reads only weights, because there are no calibration "
        "texts; for the guide `lewis`, give --calibration DATASET, with texts like those of the "
        "benchmark."
    )


def test_init_says_what_a_dataset_for_all_experts_costs(tmp_path):
    words = ["init", "--base", "b", "--expert", "e1", "--expert", "e2", "--calibration", "org/d"]

    done = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "recipe.yaml")])

    assert done.output.splitlines()[1] == f"Note: all experts share one dataset; for {KEEPS}, {ASK}"


def test_init_refuses_an_unknown_task_and_names_the_nearest(tmp_path):
    output = tmp_path / "recipe.yaml"

    with pytest.raises(LewisHubError) as caught:
        init("--task", "gms8k", "-o", str(output))

    assert str(caught.value).startswith(
        "gms8k: neither lm-eval nor your include folder has such a task.\nNearest: gsm8k"
    )
    assert not output.exists()


def test_init_takes_own_tasks_and_their_metric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merges").mkdir()
    shutil.copytree(zoo_folder() / "tasks", "merges/tasks")
    tasks = ["--task", "zoo_reverse", "--task", "zoo_cipher", "--include", "merges/tasks"]

    init("--expert", "e2", *tasks, "-o", "merges/recipe.yaml")

    recipe = read_recipe("merges/recipe.yaml")
    assert (recipe.merge_method, recipe.evaluate.include) == ("regmean", "tasks")
    own = [entry.calibration for entry in recipe.models]
    assert [(one.task, one.include) for one in own] == [
        ("zoo_reverse", "tasks"),
        ("zoo_cipher", "tasks"),
    ]
    assert recipe.locate("tasks") == str(tmp_path / "merges" / "tasks")
    hint = '{task: "zoo_reverse", metric: "exact_match,none", not_worse_than: [uniform, previous]}'
    assert f"  #   {hint}\n" in Path("merges/recipe.yaml").read_text()


def test_init_refuses_own_tasks_outside_of_the_recipe_s_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merges").mkdir()
    shutil.copytree(zoo_folder() / "tasks", "tasks")
    words = ["init", "--base", "b", "--expert", "e", "--task", "zoo_reverse", "--include", "tasks"]

    done = CliRunner().invoke(cli, [*words, "-o", "merges/recipe.yaml"])

    assert done.exit_code == 2
    assert f"tasks is not in the recipe's folder {tmp_path / 'merges'}" in done.stderr
    assert not list((tmp_path / "merges").iterdir())


@pytest.mark.parametrize(
    ("task", "metric"), [("gsm8k", "exact_match,strict-match"), ("hellaswag", "acc,none")]
)
def test_the_hint_on_the_gate_names_a_metric_of_the_task(tmp_path, task, metric):
    output = tmp_path / "recipe.yaml"

    init("--task", task, "-o", str(output))

    text = output.read_text()
    gate = re.search(r"# gate:.*\n  #   (\{.*\})\n", text)[1]
    assert yaml.safe_load(gate)["metric"] == metric
    output.write_text(re.sub(r"# gate:.*\n  #   ", "gate: ", text))
    assert read_recipe(output).evaluate.gate[0].task == task


@pytest.mark.parametrize(
    ("words", "typed", "message"),
    [
        ([], "", "there is no terminal to ask on; give --base MODEL and --expert MODEL"),
        (["--base", "b"], "", "there is no terminal to ask on; give --base MODEL and --expert"),
        (["-o", "no/recipe.yaml"], "b\ne\n", "the folder no does not exist; create it, or name"),
        (["--base", "./no", "--expert", "e"], "", "the folder ./no does not exist; name a folder"),
        (["--base", "b", "--expert", "e", "--include", "no"], "", "Directory 'no' does not exist"),
    ],
)
def test_init_refuses_what_it_cannot_work_with_in_one_message(
    tmp_path, monkeypatch, words, typed, message
):
    monkeypatch.chdir(tmp_path)

    done = CliRunner().invoke(cli, ["init", *words], input=typed)

    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


def init(*words):
    command = ["init", "--base", "b", "--expert", "e1", *words]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_init_asks_for_what_is_missing(tmp_path):
    output = tmp_path / "recipe.yaml"

    done = CliRunner().invoke(cli, ["init", "-o", str(output)], input="org/base\norg/a org/b\n")

    assert done.exit_code == 0
    assert [str(entry.model) for entry in read_recipe(output).models] == ["org/a", "org/b"]


def test_init_writes_the_schema_that_the_recipe_names(tmp_path):
    output = tmp_path / "recipe.yaml"

    CliRunner().invoke(cli, ["init", "--base", "b", "--expert", "e", "-o", str(output)])

    first_line = output.read_text().splitlines()[0]
    assert first_line == "# yaml-language-server: $schema=recipe.schema.json"
    assert (tmp_path / "recipe.schema.json").read_text() == schema()


def test_init_replaces_files_only_with_force(tmp_path):
    output = tmp_path / "recipe.yaml"
    output.write_text("mine")

    done = CliRunner().invoke(cli, ["init", "--base", "b", "--expert", "e", "-o", str(output)])

    assert done.exit_code == 2
    assert "exists; name another file with -o, or replace it with --force" in done.output
    assert output.read_text() == "mine"


def test_init_quotes_names_that_contain_yaml(tmp_path):
    output = tmp_path / "recipe.yaml"
    name = 'a/b"\n  evil: "1'

    CliRunner().invoke(
        cli, ["init", "--base", name, "--expert", "e", "-o", str(output)], catch_exceptions=False
    )

    assert read_recipe(output).base_model.name == name


@pytest.mark.parametrize("what", ["guides", "methods"])
def test_a_broken_package_is_named_and_the_others_are_listed(what, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lewis_hub.{what}]\nodd = not_there\n")
    told = (
        f"{what[:-1]} `odd`: broken provides it but does not load: No module named 'not_there'.\n"
        "Repair or remove the package: pip uninstall broken."
    )

    shown = CliRunner().invoke(cli, [what])
    document = json.loads(CliRunner().invoke(cli, [what, "--json"]).stdout)

    assert shown.exit_code == 0
    assert shown.stderr == f"warning: {told}\n"
    assert {"guides": "uniform", "methods": "ties"}[what] in shown.stdout
    assert len(document[what]) > 8
    assert document["broken"] == [told]


def test_each_method_is_listed_on_one_line():
    methods = CliRunner().invoke(cli, ["methods"]).stdout.splitlines()
    guides = CliRunner().invoke(cli, ["guides"]).stdout.splitlines()

    assert len(methods) == 1 + 27 + 2  # header; an empty line and a hint
    assert max(len(line.rstrip()) for line in methods) < 120
    assert methods[-1] == "`lewis-hub methods NAME` shows a method's formula, options and paper."
    assert [line.split()[0] for line in guides if "arXiv 2503.03874" in line] == [
        "lewis",
        "lewis_reference",
    ]


def test_methods_and_guides_are_listed_with_their_papers():
    listed = json.loads(CliRunner().invoke(cli, ["methods", "--json"]).output)["methods"]
    guides = json.loads(CliRunner().invoke(cli, ["guides", "--json"]).output)["guides"]

    papers = {entry["name"]: entry["paper"] for entry in listed}
    options = {entry["name"]: entry["options"] for entry in listed}
    assert len(listed) == 27
    assert options["della"] == [
        *("weight", "density", "epsilon", "normalize", "rescale", "lambda"),
        *("trim", "trim_exponent"),
    ]
    assert options["slerp"] == ["t"]
    assert papers["ties"] == "https://arxiv.org/abs/2306.01708"
    told = {entry["name"]: (entry["needs"], entry["paper"]) for entry in guides}
    assert told == {
        "activation_shift": (["output_shift"], None),
        "aim": (["evenness"], "https://arxiv.org/abs/2502.02421"),
        "inverse": (["lewis"], None),
        "lewis": (["lewis"], "https://arxiv.org/abs/2503.03874"),
        "lewis_reference": (["lewis_reference"], "https://arxiv.org/abs/2503.03874"),
        "magnitude": (["task_vector"], None),
        "owl": (["outliers"], "https://arxiv.org/abs/2310.05175"),
        "random": (["lewis"], None),
        "uniform": ([], None),
    }


def test_a_method_is_described_with_formula_options_and_paper():
    shown = CliRunner().invoke(cli, ["methods", "ties"]).output
    document = json.loads(CliRunner().invoke(cli, ["methods", "ties", "--json"]).output)

    assert shown.splitlines()[:7] == [
        "ties: Trim each task vector, elect a sign per entry, average the sources that agree with "
        "it.",
        "",
        "  merged = base + lambda (sum over i in A of u_i) / (sum over i in A of w_i)",
        "  u_i = w_i trim(v_i)",
        "  trim: keeps the d_i n largest of n entries",
        "  A: for each entry, the i with sign(u_i) = sign(sum_j u_j)",
        "  x_i: a model; v_i = x_i - base; w_i: weight; d_i: density",
    ]
    table = [line.split("  ") for line in shown.splitlines()]
    rows = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in table if row[0]}
    assert rows["density"] == [
        "1.0",
        "0 to 1",
        "the fraction of entries kept; may differ by model",
    ]
    assert rows["normalize"] == [
        "true",
        "true or false",
        "whether to divide by the sum of the weights",
    ]
    assert rows["trim"][:2] == ["magnitude", "magnitude or activation"]
    assert rows["trim_exponent"] == ["1.0", "at least 0", "the power of the activation norm"]
    assert shown.endswith("\nPaper: https://arxiv.org/abs/2306.01708\n")
    assert document["formula"].splitlines()[1] == "u_i = w_i trim(v_i)"
    assert document["options"][1] == {
        "name": "density",
        "default": 1.0,
        "values": "0 to 1",
        "meaning": "the fraction of entries kept",
        "per_source": True,
    }


def test_a_required_option_and_an_unknown_method_are_told():
    shown = CliRunner().invoke(cli, ["methods", "slerp"]).output

    assert re.search(r"^t +required +a number +the position on the arc", shown, re.MULTILINE)
    with pytest.raises(LewisHubError, match="Did you mean `ties`"):
        cli(["methods", "tie"], standalone_mode=False)


def test_every_method_has_a_formula_and_the_meaning_of_each_option():
    methods = registry.methods()

    assert [method.name for method in methods if not method.formula] == []
    assert [(m.name, p.name) for m in methods for p in parameters_of(m) if not p.meaning] == []
    assert [(m.name, name) for m in methods for name in m.meanings if name not in m.known] == []
    assert {p.name: p.meaning for p in parameters_of(registry.find("ram"))} == {
        "epsilon": "the difference from the base above which an entry has changed"
    }


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("5GB", 5_000_000_000), ("500 MB", 500_000_000), ("1.5kB", 1500), ("7", 7)],
)
def test_sizes_are_read_in_powers_of_1000(text, n_bytes):
    assert SIZE.convert(text, None, None) == n_bytes


@pytest.mark.parametrize("text", ["", "0", "5GiB", "-1GB", "many"])
def test_a_text_that_is_no_size_is_refused(text):
    with pytest.raises(click.BadParameter, match="expected a size such as 500MB or 5GB"):
        SIZE.convert(text, None, None)
