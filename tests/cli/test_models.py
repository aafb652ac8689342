import json

import jsonschema
import pytest
from click.testing import CliRunner
from zoo_hub import put_zoo

from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder

TASKS = str(zoo_folder() / "tasks")
TEXT = "Question: {question}\nAnswer: {answer}"
SHELL_TEXT = TEXT.replace("\n", r"\n")


def run(*words):
    done = CliRunner().invoke(cli, list(map(str, words)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture
def seeded(hub, monkeypatch):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return hub


def test_one_model_is_measured_on_a_task_or_a_dataset_and_the_two_are_compared(seeded, tmp_path):
    model = zoo_folder() / "expert-reverse"
    task, data, plots = (tmp_path / name for name in ("task", "data", "plots"))
    words = ("importance", model, "--samples", 8, "--json")

    by_task = run(*words, "--task", "zoo_reverse", "--include", TASKS, "-o", task)
    run(*words, "--dataset", "zoo/cipher@main", "--text", SHELL_TEXT, "-o", data)
    compared = run("compare", task, data / "importance.json", "-o", plots, "--json")

    told = json.loads(by_task.stdout)
    profile = json.loads((task / "importance.json").read_text())
    assert json.loads((data / "importance.json").read_text())["calibration"]["text"] == TEXT
    assert told["importance"] == profile
    schema = json.loads(run("schema", "importance").stdout)
    jsonschema.Draft202012Validator(schema).validate(profile)
    assert [(s["source"], s["role"]) for s in profile["sources"]] == [(str(model), "expert")]
    assert sorted(path.name for path in task.iterdir()) == [
        "importance-expert-reverse-dark.png",
        "importance-expert-reverse-light.png",
        "importance.json",
    ]
    (one,) = json.loads(compared.stdout)["comparisons"]
    assert one["n"] == len(profile["sources"][0]["modules"]) == len(one["rows"])
    assert 0.9 < one["spearman"] < 1
    changes = [abs(row["change"]) for row in one["rows"]]
    assert changes == sorted(changes, reverse=True)
    assert sorted(path.name for path in plots.iterdir()) == [
        "change-expert-reverse-dark.png",
        "change-expert-reverse-light.png",
    ]


def test_chat_template_formats_the_prompts_of_a_task(seeded, tmp_path):
    words = ("importance", zoo_folder() / "base", "--task", "zoo_reverse", "--include", TASKS)

    told = run(*words, "--samples", 2, "--chat-template", "-o", tmp_path, "--json")

    (source,) = json.loads(told.stdout)["importance"]["sources"]
    assert source["calibration"]["chat_template"] is True


def test_a_model_measured_before_is_not_measured_again(seeded, tmp_path):
    words = ("importance", zoo_folder() / "base", "--task", "zoo_reverse", "--include", TASKS)
    run(*words, "-o", tmp_path)
    file = tmp_path / "importance.json"
    changed = json.loads(file.read_text())
    module = next(iter(changed["sources"][0]["modules"]))
    changed["sources"][0]["modules"][module] = 123.0
    file.write_text(json.dumps(changed))

    run(*words, "-o", tmp_path)
    assert json.loads(file.read_text())["sources"][0]["modules"][module] == 123.0
    run(*words, "--seed", 1, "-o", tmp_path)
    assert json.loads(file.read_text())["sources"][0]["modules"][module] != 123.0


def test_the_profile_of_a_merge_is_fetched_from_its_repo(seeded, tmp_path):
    api = seeded.api()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base_model: zoo/base\nmerge_method: ties\nmodels: [{model: zoo/expert-reverse}]\n"
        f"guide: {{calibration: {{task: zoo_reverse, include: {TASKS}, samples: 4}}}}\n"
    )
    run("merge", recipe)
    api.create_repo("zoo/merge")
    api.upload_folder(repo_id="zoo/merge", folder_path=tmp_path / "merged")

    done = run("compare", "zoo/merge", tmp_path / "merged", "-o", tmp_path / "plots", "--json")

    compared = json.loads(done.stdout)["comparisons"]
    assert [one["spearman"] for one in compared] == [1.0, 1.0]
    assert [one["before"].partition("@")[0] for one in compared] == [
        "zoo/base",
        "zoo/expert-reverse",
    ]
    assert {row["change"] for one in compared for row in one["rows"]} == {0.0}


def test_the_mean_in_the_table_is_the_recipe_s_mean_density(seeded, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base_model: zoo/base\nmerge_method: ties\nmodels: [{model: zoo/expert-reverse}]\n"
        "guide: {name: magnitude, gamma: 0.3, epsilon: 0.6, mean_density: 0.5}\n"
    )

    shown = run("importance", recipe).stdout.splitlines()
    density = json.loads((tmp_path / "importance" / "density.json").read_text())

    tensors = density["experts"][0]["tensors"]
    assert shown[0].split()[-3:] == ["mean", "lowest", "highest"]
    numbers = ("0.500", f"{min(tensors.values()):.3f}", f"{max(tensors.values()):.3f}")
    assert shown[1].split()[-4:] == [str(len(tensors)), *numbers]
    assert f"{sum(tensors.values()) / len(tensors):.3f}" != "0.500"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("me/model",),
            "me/model is not a YAML file, so it is taken as a model: "
            "give `dataset` (with a template)",
        ),
        (("me/model", "--dataset", "a/b"), "give `text` (a template over columns) or `messages`"),
        (
            ("recipe.yaml", "--task", "gsm8k"),
            "recipe.yaml is a recipe, and a recipe contains its calibration data and seed.",
        ),
        (
            ("recipe.yaml", "--seed", "3"),
            "recipe.yaml is a recipe, and a recipe contains its calibration data and seed.",
        ),
    ],
)
def test_data_options_are_for_a_model_and_refused_for_a_recipe(words, message):
    done = run("importance", *words)

    assert done.exit_code == 2
    assert message in done.output
