import json

import click
import pytest
from click.testing import CliRunner

from lewis_hub.cli.main import cli
from lewis_hub.cli.options import SIZE
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

    assert done.output == f"Wrote {output} and recipe.schema.json. Next: lewis-hub check {output}\n"
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


@pytest.mark.parametrize(
    "tasks", [["gsm8k"], ["no_such_task", "gsm8k"], ["mbpp", "gsm8k"], ["gsm8k"] * 3]
)
def test_init_guides_by_magnitude_where_experts_have_no_texts_of_their_own(tmp_path, tasks):
    output = tmp_path / "recipe.yaml"
    words = ["init", "--base", "b", "--expert", "e1", "--expert", "e2", "-o", str(output)]

    CliRunner().invoke(cli, words + [w for t in tasks for w in ("--task", t)])

    recipe = read_recipe(output)
    assert (recipe.merge_method, recipe.guide.name) == ("ties", "magnitude")
    assert (recipe.guide.gamma, recipe.guide.epsilon) == (0.25, 0.75)
    assert (recipe.guide.mean_density, recipe.guide.calibration) == (0.5, None)
    assert [entry.calibration for entry in recipe.models] == [None, None]
    assert recipe.evaluate.tasks == tuple(tasks)
    assert recipe.evaluate.compare == ("base", "experts", "uniform")


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


def test_methods_and_guides_are_listed_with_their_papers():
    listed = json.loads(CliRunner().invoke(cli, ["methods", "--json"]).output)["methods"]
    guides = json.loads(CliRunner().invoke(cli, ["guides", "--json"]).output)["guides"]

    papers = {entry["name"]: entry["paper"] for entry in listed}
    options = {entry["name"]: entry["options"] for entry in listed}
    assert len(listed) == 23
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
