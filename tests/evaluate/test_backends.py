"""lm-eval's backends: the same answers from transformers and from a server of completions."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from completions_server import NOWHERE, serving
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from scored_models import result

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.cli.options import rescored
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import EvaluationError, ExtraMissingError, RecipeError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.gate import Previous, judge
from lewis_hub.evaluate.harness import load
from lewis_hub.evaluate.paired import compare
from lewis_hub.evaluate.scores import ModelResult, Scores, settings_words
from lewis_hub.recipe.backend import ADDRESS, EXACTNESS, SIZE, TEXTS
from lewis_hub.recipe.evaluation import Gate

MERGE = {"models": ["a/b"], "merge_method": "linear"}
OTHERS = "it may name code, files or hosts, and a recipe may be of someone else."
KERNEL = "it may name code of the Hub, and a recipe may be of someone else."
ELSEWHERE = "it is not on this machine, and would get the prompts and your API key."


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_server_gives_the_scores_of_transformers(own_tasks, poor_model, server, batch_size):
    served = {"backend": "local-completions", "backend_args": {"base_url": server.url}}

    plain = result(own_tasks, poor_model, "after", "choose")
    told = result(own_tasks, poor_model, "after", "choose", batch_size=batch_size, **served)

    assert told.tasks == plain.tasks
    assert plain.settings == {}
    expected = {"backend": "local-completions"} | ({"batch_size": 4} if batch_size else {})
    assert told.settings == expected
    assert {request["model"] for request in server.requests} == {str(poor_model)}


def test_the_number_of_examples_is_that_of_the_settings(own_tasks, good_model):
    few = result(own_tasks, good_model, "choose", num_fewshot=1)
    more = result(own_tasks, good_model, "choose", num_fewshot=3)

    assert few.tasks["choose"].documents == more.tasks["choose"].documents
    assert few.tasks["choose"].prompts != more.tasks["choose"].prompts
    assert (few.settings, more.settings) == ({"num_fewshot": 1}, {"num_fewshot": 3})


def test_options_of_generation_replace_those_of_the_task(own_tasks, good_model, server):
    served = {"backend": "local-completions", "backend_args": {"base_url": server.url}}
    server.requests.clear()

    long = result(own_tasks, good_model, "after", generation={"max_gen_toks": 3}, **served)

    assert {request["max_tokens"] for request in server.requests} == {3}
    assert long.tasks["after"].metrics["exact_match,none"].value == 0.0  # it counts on
    assert long.settings["generation"] == {"max_gen_toks": 3}


def test_the_settings_are_kept_in_items_and_scores(own_tasks, good_model):
    found = result(own_tasks, good_model, "choose", num_fewshot=1, batch_size=2)
    scores = compare({"merged": found})

    assert ModelResult.from_json(found.to_json()) == found
    assert Scores.from_json(scores.to_json()) == scores
    assert scores.to_document()["settings"] == {"num_fewshot": 1, "batch_size": 2}
    assert settings_words(scores.settings) == "num_fewshot 1, batch_size 2"


def test_results_under_other_settings_are_not_compared(own_tasks, good_model):
    gate = Gate(task="after", metric="exact_match,none", not_worse_than=("previous",))
    plain = result(own_tasks, good_model, "after")
    sampled = result(own_tasks, good_model, "after", generation={"max_gen_toks": 2})

    verdict = judge([gate], compare({"merged": sampled}), sampled, Previous("me/x@1", plain))

    (check,) = verdict.checks
    assert check.why == ("it was scored with the default settings, this with max_gen_toks 2")


def test_arguments_that_a_backend_lacks_are_refused(good_model):
    with pytest.raises(EvaluationError, match="`hf` does not take these arguments: .*no_such"):
        load(good_model, EvaluationSettings(backend_args={"no_such": 1}))


def test_an_option_of_yours_may_name_another_model(good_model, poor_model):
    """Such as an adapter: only the settings of a model lead nowhere else."""
    plain = load(poor_model, EvaluationSettings()).model
    both = load(poor_model, EvaluationSettings(backend_args={"delta": str(good_model)})).model

    added = load(good_model, EvaluationSettings()).model.state_dict()
    expected = {name: one + added[name] for name, one in plain.state_dict().items()}
    assert all(one.equal(expected[name]) for name, one in both.state_dict().items())


@pytest.mark.skipif(find_spec("vllm") is not None, reason="it is installed")
def test_vllm_is_an_extra(good_model):
    with pytest.raises(ExtraMissingError) as caught:
        load(good_model, EvaluationSettings(backend="vllm"))

    assert str(caught.value) == (
        "The backend `vllm` needs the vllm extra: pip install 'lewis-hub[vllm]'"
    )


@pytest.mark.skipif(find_spec("vllm") is not None, reason="it is installed")
def test_a_backend_that_is_not_installed_is_refused_before_the_model_is_looked_up():
    with pytest.raises(ExtraMissingError):
        CliRunner().invoke(
            cli,
            ["evaluate", "no/model", "--task", "after", "--backend", "vllm"],
            catch_exceptions=False,
        )


def test_the_command_scores_a_model_by_the_name_that_a_server_knows(own_tasks, good_model):
    pytest.importorskip("tenacity")
    with serving({"counter": str(good_model)}) as server:
        words = ["evaluate", str(good_model), "--task", "after", "--include", str(own_tasks)]
        words += ["--backend", "local-completions", "--backend-arg", f"base_url={server.url}"]
        words += ["--backend-arg", "model=counter", "--limit", "4", "--json", "-q"]

        done = CliRunner().invoke(cli, words, catch_exceptions=False)

    document = json.loads(done.stdout)
    assert document["settings"] == {
        "backend": "local-completions",
        "backend_args": {"model": "counter"},
    }
    (scored,) = document["tasks"]["after"]["models"].values()
    assert scored["exact_match,none"]["value"] == 1.0
    assert {request["model"] for request in server.requests} == {"counter"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "local-completions"], "`local-completions` needs the server's address"),
        (["--backend-arg", "pretrained=x"], "`backend_args.pretrained` is not yours to set"),
        (["--backend-arg", "token=x"], "put it into the variable HF_TOKEN, which no file records"),
        (
            ["--backend-arg", f"base_url={NOWHERE}"],
            "is an argument of `backend: local-completions`",
        ),
        (["--generation", "temperature"], "expected NAME=VALUE such as temperature=0.6"),
    ],
)
def test_wrong_options_are_a_usage_error(words, message):
    done = CliRunner().invoke(cli, ["evaluate", "x/y", "--task", "after", *words])

    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.slow  # two merges, each with three models
def test_a_merge_is_scored_by_a_server_as_by_transformers(api, server, tmp_path, datasets_cache):
    zoo = zoo_folder()
    text = f"""
base_model: {zoo / "base"}
models: [{zoo / "expert-reverse"}]
merge_method: task_arithmetic
evaluate: {{tasks: [zoo_reverse], include: tasks, limit: 4, num_fewshot: 0}}
"""
    shutil.copytree(zoo / "tasks", tmp_path / "tasks")
    (tmp_path / "recipe.yaml").write_text(text)
    command = ["merge", str(tmp_path / "recipe.yaml"), "--json", "-q"]
    served = ["--backend", "local-completions", "--backend-arg", f"base_url={server.url}"]

    plain = CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "plain")])
    asked = CliRunner().invoke(
        cli, [*command, *served, "-o", str(tmp_path / "served")], catch_exceptions=False
    )

    assert json.loads(asked.stdout)["scores"] == json.loads(plain.stdout)["scores"]
    card = (tmp_path / "served" / "README.md").read_text()
    assert "with backend local-completions, num_fewshot 0. ±" in card.replace("\n", " ")
    for file in (tmp_path / "served").rglob("*"):
        if file.suffix in (".md", ".json", ".yaml", ".html"):
            assert f":{server.server_port}" not in file.read_text(), file


def test_options_replace_the_settings_of_a_recipe(tmp_path):
    text = "models: [a/b]\nmerge_method: linear\n"
    text += "evaluate: {tasks: [gsm8k], num_fewshot: 3, limit: 2}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = lewis_hub.read_recipe(tmp_path / "recipe.yaml")

    changed = rescored(recipe, {"num_fewshot": 5, "generation": {"temperature": 0.5}})

    told = changed.evaluate.model_dump(exclude_unset=True)
    assert told == {
        "tasks": ("gsm8k",),
        "limit": 2,
        "num_fewshot": 5,
        "generation": {"temperature": 0.5},
    }
    assert changed.locate("./x") == recipe.locate("./x") == str(tmp_path / "x")
    assert rescored(recipe, {}) is recipe
    with pytest.raises(click.UsageError, match="`base_url` is an argument of"):
        rescored(recipe, {"backend_args": {"base_url": NOWHERE}})
    with pytest.raises(click.UsageError, match="the recipe scores nothing: add `evaluate` to it"):
        rescored(recipe.model_copy(update={"evaluate": None}), {"num_fewshot": 5})


def test_an_option_keeps_the_other_arguments_of_a_recipe():
    """Some arguments may only be options, so a run may need both."""
    own = {"backend": "vllm", "backend_args": {"dtype": "float32", "max_model_len": 99}}
    generation = {"temperature": 0.1, "max_gen_toks": 5}
    scoring = {"tasks": ["gsm8k"], "generation": generation}
    recipe = lewis_hub.Recipe.model_validate(
        {"models": ["a/b"], "merge_method": "linear", "evaluate": scoring | own}
    )
    given = {"backend_args": {"lora": "x", "dtype": "auto"}, "generation": {"temperature": 0.5}}

    same = rescored(recipe, given).evaluate
    named = rescored(recipe, given | {"backend": "vllm"}).evaluate
    other = rescored(recipe, given | {"backend": "hf"}).evaluate

    assert same.backend_args == {"dtype": "auto", "max_model_len": 99, "lora": "x"}
    assert named == same
    assert same.generation == other.generation == {"temperature": 0.5, "max_gen_toks": 5}
    assert other.backend_args == {"lora": "x", "dtype": "auto"}


def test_a_recipe_scores_its_own_models_on_a_server():
    recipe = lewis_hub.Recipe.model_validate(
        {
            "base_model": "a/b",
            "models": ["a/c"],
            "merge_method": "ties",
            "evaluate": {
                "tasks": ["gsm8k"],
                "backend": "local-completions",
                "backend_args": {"base_url": NOWHERE, "model": "one"},
            },
        }
    )

    with pytest.raises(lewis_hub.LewisHubError, match="every model of the recipe would be scored"):
        lewis_hub.check(recipe)


@pytest.mark.parametrize(
    ("backend", "name", "value", "problem"),
    [
        ("hf", "peft", "evil/adapter", OTHERS),
        ("hf", "allow_all_kernels", True, OTHERS),
        ("hf", "offload_folder", "/home/me", OTHERS),
        ("vllm", "worker_cls", "evil.Worker", OTHERS),
        ("mteb", "cache_folder", "/home/me", OTHERS),
        ("hf", "attn_implementation", "evil/kernel", KERNEL),
        ("local-completions", "base_url", "https://evil.example/v1/completions", ELSEWHERE),
        ("local-completions", "base_url", "http://evil.example\\@127.0.0.1/v1", ELSEWHERE),
        ("local-completions", "base_url", "http://127.0.0.1@evil.example/v1", ELSEWHERE),
        ("local-completions", "base_url", "http://127.0.0.1.evil.example/v1", ELSEWHERE),
    ],
)
def test_the_file_of_a_recipe_leads_to_no_code_file_or_host(
    backend, name, value, problem, tmp_path
):
    args = {name: value}
    if backend == "local-completions":
        args = {"base_url": NOWHERE} | args
    evaluate = {"tasks": ["gsm8k"], "backend": backend, "backend_args": args}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**MERGE, "evaluate": evaluate}))

    with pytest.raises(RecipeError) as caught:
        lewis_hub.read_recipe(file)

    remedy = f"Remove it, and give it as an option, if you trust it: `--backend-arg {name}=VALUE`."
    if name == "base_url":
        remedy = "Remove `backend` and `backend_args`, and give them as options, if you trust the "
        remedy += "server: `--backend local-completions` and `--backend-arg base_url=VALUE`."
    assert str(caught.value).partition(": ")[2] == (
        f"`evaluate.backend_args.{name}`: {problem}\n{remedy}"
    )
    file.write_text(yaml.safe_dump({**MERGE, "evaluate": {"tasks": ["gsm8k"]}}))
    told = rescored(lewis_hub.read_recipe(file), {"backend": backend, "backend_args": args})
    assert told.evaluate.backend_args == args


@pytest.mark.parametrize(
    ("backend", "args"),
    [
        ("hf", {"dtype": "bfloat16", "attn_implementation": "flash_attention_2"}),
        ("hf", {"think_end_token": "</think>", "parallelize": True, "max_length": 4096}),
        ("vllm", {"gpu_memory_utilization": 0.8, "max_model_len": 4096, "quantization": "fp8"}),
        ("local-completions", {"base_url": "http://localhost:8000/v1/completions"}),
        ("local-completions", {"base_url": "http://[::1]:8000/v1/completions", "timeout": 60}),
        ("mteb", {"truncate_dim": 64, "similarity_fn_name": "cosine"}),
    ],
)
def test_the_file_of_a_recipe_says_how_large_and_exact_a_run_is(backend, args, tmp_path):
    evaluate = {"tasks": ["gsm8k"], "backend": backend, "backend_args": args}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**MERGE, "evaluate": evaluate}))

    assert lewis_hub.read_recipe(tmp_path / "recipe.yaml").evaluate.backend_args == args


def test_the_arguments_that_a_recipe_may_set_are_documented():
    page = (Path(__file__).parents[2] / "docs" / "scores.md").read_text("utf-8")
    listed = page.partition("A recipe may set ")[2].partition("\n\n")[0]

    allowed = {*EXACTNESS, *SIZE, *TEXTS, ADDRESS} - {"model"}  # a recipe has several
    assert {*re.findall(r"`(\w+)`", listed)} == allowed


@pytest.mark.parametrize("name", ["custom_generate", "trust_remote_code"])
def test_no_option_of_generation_runs_code(name):
    with pytest.raises(ValidationError) as caught:
        lewis_hub.Evaluation(tasks=("gsm8k",), generation={name: "./evil"})

    (error,) = caught.value.errors()
    assert error["msg"] == (
        f"Value error, `generation.{name}` is not yours to set: no code of a model is run"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused_before_the_merge(value):
    scored = {"tasks": ("gsm8k",)}
    gate = {"task": "gsm8k", "metric": "exact_match,none", "tolerance": value}

    with pytest.raises(ValidationError, match=f"`generation.temperature` is {value}, expected a f"):
        lewis_hub.Evaluation(**scored, generation={"temperature": value})
    with pytest.raises(ValidationError, match=f"`backend_args.x` is {value}, expected a finite"):
        lewis_hub.Evaluation(**scored, backend_args={"x": value})
    with pytest.raises(ValidationError, match="Input should be "):
        lewis_hub.Evaluation(**scored, gate=gate)


def test_a_model_whose_files_lack_weights_is_not_scored(tmp_path):
    folder = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1.mlp." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(EvaluationError) as caught:
        load(folder, EvaluationSettings())

    assert str(caught.value) == (
        f"{folder}: its files lack model.layers.1.mlp.down_proj.weight (and 2 more of the weights "
        "that its architecture needs).\n"
        "The config does not describe these files: check the source, or take another."
    )
