"""The recipes that the Space refuses, although lewis-hub runs them on a machine of one's own."""

import re
from pathlib import Path

import pytest
import yaml

import lewis_hub
from templates.space.refusals import REPO, TASK, not_on_the_hub, refusals

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "templates" / "space"
FINE = {
    "base_model": "zoo/base@main",
    "models": [
        {"model": "zoo/expert", "calibration": {"task": "gsm8k", "split": "train"}},
        {"model": "zoo/base@main+zoo/adapter", "calibration": {"dataset": "a/b@v1", "text": "{q}"}},
    ],
    "merge_method": "regmean",
    "evaluate": {"tasks": ["gsm8k", "mmlu_abstract_algebra"]},
}
FOLDER = "is not a repository of the Hub: write owner/name. Folders are not read."
MACHINE = "lewis-hub on your own machine runs such a recipe."
CALIBRATED = {"model": "zoo/expert", "calibration": {"dataset": "/etc/texts.jsonl", "text": "{t}"}}
INCLUDED = {"model": "zoo/expert", "calibration": {"task": "own", "include": "../tasks"}}


def refused(changes):
    recipe = lewis_hub.Recipe.model_validate({**FINE, **changes})
    return list(dict.fromkeys(refusals(recipe)))


def test_a_recipe_of_repositories_and_tasks_is_not_refused():
    assert refused({}) == []


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"base_model": "/etc", "models": ["a/b", "a/c"]}, [f"`/etc` {FOLDER}"]),
        ({"models": ["./merged"]}, [f"`./merged` {FOLDER}"]),
        ({"models": ["../other/recipe"]}, [f"`../other/recipe` {FOLDER}"]),
        ({"models": ["~/models"]}, [f"`~/models` {FOLDER}"]),
        ({"models": ["cache"]}, [f"`cache` {FOLDER}"]),
        ({"models": ["a/b/c"]}, [f"`a/b/c` {FOLDER}"]),
        ({"models": [CALIBRATED]}, [f"`/etc/texts.jsonl` {FOLDER}"]),
        ({"models": [INCLUDED]}, ["`include: ../tasks` is a folder, which is not read here."]),
        (
            {"models": ["zoo/base+./adapter"]},
            [
                "`zoo/base+./adapter`: an adapter needs the recipe's `base_model` here. " + MACHINE,
                f"`./adapter` {FOLDER}",
            ],
        ),
        (
            {"evaluate": {"tasks": ["own.yaml", "/etc/x"], "include": "/etc"}},
            [
                "`include: /etc` is a folder, which is not read here.",
                "`/etc/x` is not the name of a task of lm-eval. Files are not read.",
            ],
        ),
        (
            {
                "evaluate": {
                    "tasks": ["gsm8k"],
                    "backend": "local-completions",
                    "backend_args": {"base_url": "http://169.254.169.254/v1/completions"},
                }
            },
            [f"`backend` is not yours to choose here. {MACHINE}"],
        ),
        (
            {"allow_code": ["zoo/base"]},
            [f"`allow_code` is not allowed here: no code of a model is copied. {MACHINE}"],
        ),
        (
            {"guide": {"calibration": {"dataset": "x.jsonl", "text": "{t}"}}},
            [f"`x.jsonl` {FOLDER}"],
        ),
        ({"calibration": {"dataset": "x.parquet", "text": "{t}"}}, [f"`x.parquet` {FOLDER}"]),
    ],
)
def test_what_is_on_the_machine_or_elsewhere_is_refused(changes, problems):
    assert refused(changes) == problems


def test_slices_and_mixtures_are_read_too():
    source = {"model": "/models/a", "layer_range": [0, 2]}
    stack = {"slices": [{"sources": [source]}], "merge_method": "passthrough"}
    mixture = {"base_model": "zoo/base", "experts": [{"source_model": "./b"}]}

    found = [
        list(refusals(lewis_hub.Recipe.model_validate(document))) for document in (stack, mixture)
    ]

    assert found == [[f"`/models/a` {FOLDER}"], [f"`./b` {FOLDER}"]]


def test_a_file_of_several_merges_is_refused(tmp_path):
    first = {"name": "one", "models": ["a/b", "a/c"], "merge_method": "linear"}
    second = {"models": ["one", "a/d"], "merge_method": "linear"}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump_all([first, second]))

    assert next(refusals(lewis_hub.read_recipe(file))) == (
        f"a file of several merges is not run here. {MACHINE}"
    )


def test_names_with_line_breaks_or_parent_folders_are_no_repositories():
    names = ["a/b", "a/b@main", "a/b\n", "a/../b", "a/..", "-a/b", "a/b/", "", "a"]

    assert [bool([*not_on_the_hub(name)]) for name in names] == [False, False, *[True] * 7]
    assert not TASK.fullmatch("a/b.yaml")
    assert not REPO.fullmatch("zoo//base")


def test_the_front_matter_names_a_gradio_that_the_extra_allows_and_an_app_that_exists():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lowest, below = map(int, re.findall(r"gradio\[oauth\]>=6\.(\d+),<(\d+)", project)[0])

    assert front["sdk"] == "gradio"
    major, minor, _ = map(int, front["sdk_version"].split("."))
    assert major == below - 1
    assert minor >= lowest
    assert (SPACE / front["app_file"]).is_file()
    assert front["license"] == "apache-2.0"
    assert len(front["short_description"]) <= 60
    assert front["hf_oauth_scopes"] == ["contribute-repos", "gated-repos"]
