"""Refusals before anything is sent to Hugging Face Jobs, and the options that a Job gets."""

import click
import pytest
from click.testing import CliRunner
from zoo_hub import put_zoo

from lewis_hub.cli.jobs import LogEnd, job_options, job_result, printed_document
from lewis_hub.cli.main import cli
from lewis_hub.documents import MAX_JSON_BYTES
from lewis_hub.errors import CheckFailedError, RecipeError
from lewis_hub.pipeline import Hardware, job_request
from lewis_hub.recipe.read import read_recipe

RECIPE = """base_model: a/b
models: [{model: a/c}]
merge_method: ties
evaluate: {tasks: [mine], include: tasks, compare: [base]}
"""
HERE = Hardware("a100-large", "2h", None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tasks/__pycache__").mkdir(parents=True)
    (tmp_path / "tasks/mine.yaml").write_text("task: mine\n")
    (tmp_path / "tasks/__pycache__/x.pyc").write_text("")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words):
    done = CliRunner().invoke(cli, [*words])
    assert done.exit_code == 2
    return done.stderr


def make_request(folder, text=RECIPE, options=("--push",)):
    (folder / "recipe.yaml").write_text(text)
    file = folder / "recipe.yaml"
    return job_request(file, read_recipe(file), options, HERE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["merge", "--on", "jobs"],
            "the disk of a Job is deleted when it ends: add --push to keep the merge.",
        ),
        (
            ["merge", "--on", "jobs", "--push", "-o", "x"],
            "the disk of a Job is deleted when it ends: remove --output.",
        ),
        (
            ["merge", "--on", "jobs", "--push", "--sign", "recipe.yaml"],
            "a Job cannot sign, because your key is not sent to it: remove --sign.",
        ),
        (
            ["merge", "--flavor", "a100-large"],
            "these options select the machine of a Job: add --on jobs.",
        ),
        (
            ["merge", "--timeout", "2 hours"],
            "expected a duration such as 90m or 2h, found '2 hours'",
        ),
        (["merge", "--on", "mars"], "'mars' is not 'jobs'"),
        (["schedule", "recipe.yaml"], "Missing option '--cron'"),
        (["schedule", "--cron", "17 4 * *"], "expected five fields such as '17 4 * * 1'"),
        (["schedule", "--cron", "@often"], "found '@often'"),
    ],
)
def test_wrong_usage_is_refused_with_a_message(folder, words, message):
    assert message in " ".join(refused(*words).split())


def test_a_job_gets_the_recipe_and_the_files_beside_it(folder):
    job = make_request(folder)

    assert job.words == ["merge", "/recipe", "-o", "merged", "--push"]
    assert set(job.files) == {"recipe.yaml", "tasks/mine.yaml"}
    assert (job.flavor, job.timeout) == ("a100-large", "2h")


def test_a_job_merges_the_recipe_that_was_named(folder):
    named = folder / "tasks/named.yaml"
    named.write_text(RECIPE.replace("include: tasks", "include: ."))
    (folder / "tasks/recipe.yaml").write_text(RECIPE.replace("a/c", "a/other"))

    job = job_request(named, read_recipe(named), (), HERE)

    assert job.files["recipe.yaml"] == named


def test_a_job_gets_the_texts_of_all_steps(folder):
    for name in ("first", "last"):
        (folder / f"{name}.jsonl").write_text('{"text": "x"}\n')
    texts = "calibration: {dataset: ./%s.jsonl, text: '{text}', split: train}\n"
    regmean = "base_model: a/b\nmodels: [{model: a/c}]\nmerge_method: regmean\n"
    step = f"name: step\n{regmean}{texts % 'first'}---\n"

    job = make_request(folder, step + regmean.replace("a/c", "step") + texts % "last")

    assert set(job.files) == {"recipe.yaml", "first.jsonl", "last.jsonl"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            RECIPE.replace("a/c", "./tasks"),
            "`./tasks` is a local folder, but a Job reads models from the Hub.\n"
            "Push it: `lewis-hub push ./tasks OWNER/NAME`.",
        ),
        (
            RECIPE.replace("include: tasks", "include: /usr"),
            "`/usr` is not beside the recipe, so a Job cannot read it.\n"
            "Move it there, or to a repo on the Hub.",
        ),
    ],
)
def test_files_that_a_job_cannot_read_are_refused_before_anything_is_sent(folder, text, message):
    with pytest.raises(RecipeError) as caught:
        make_request(folder, text)

    assert str(caught.value).endswith(message)


def test_a_job_gets_the_typed_options_and_no_others():
    words = ["-q", "--json", "--push", "--on", "jobs", "--flavor", "x", "--device", "cuda"]
    words += ["--repo", "me/x", "--no-eval", "--max-shard-size", "1GB"]
    words += ["--generation", "temperature=0.5", "--generation", "top_p=1", "--num-fewshot", "2"]
    merge = cli.commands["merge"]

    with merge.make_context("merge", words) as context:
        assert isinstance(context, click.Context)
        assert job_options(context) == [
            *("--push", "--repo", "me/x", "--no-eval", "--max-shard-size", "1000000000"),
            *("--num-fewshot", "2", "--generation", "temperature=0.5", "--generation", "top_p=1"),
            *("--device", "cuda", "--json"),
        ]


def test_a_folder_means_the_recipe_in_it(folder):
    with cli.commands["merge"].make_context("merge", ["."]) as context:
        assert context.params["recipe_file"].name == "recipe.yaml"


LOG = """Evaluating: 40 items
{'not': 'this'}
{
  "status": "refused",
  "gate": {
    "passed": false
  },
  "lines": "a\\n}"
}
lewis-hub: merged: below the quality gate"""


def test_the_document_is_read_from_a_job_s_log():
    expected = {"status": "refused", "gate": {"passed": False}, "lines": "a\n}"}

    assert printed_document(LOG.splitlines()) == printed_document(LOG.splitlines()[2:]) == expected


def test_of_a_log_without_end_only_the_last_document_is_kept():
    kept = LogEnd()
    for _ in range(300):
        kept.add("x" * 100_000)
    assert sum(map(len, kept.lines)) < MAX_JSON_BYTES

    for line in [*LOG.splitlines(), *LOG.splitlines()]:
        kept.add(line)

    assert printed_document(kept.lines) == printed_document(LOG.splitlines()) != {}
    assert sum(map(len, kept.lines)) < len(LOG)


@pytest.mark.parametrize("log", ["", "{", "{\n}", "one\n{\n  half", "}\nx\n{", "a: 1\nb"])
def test_a_log_without_a_document_has_none(log):
    assert printed_document(log.splitlines()) == {}


@pytest.mark.parametrize(
    ("reported_code", "printed", "code", "status"),
    [
        (0, {}, 0, "merged"),
        (0, {"status": "unchanged"}, 0, "unchanged"),
        (3, {}, 3, "refused"),
        (130, {}, 130, "failed"),
        (137, {"status": "merged"}, 137, "failed"),  # killed after it had printed its document
        (None, {"status": "refused"}, 3, "refused"),
        (None, {"status": "unchanged"}, 0, "unchanged"),
        (None, {"status": "failed"}, 1, "failed"),
        (None, {}, 1, "failed"),
    ],
)
def test_the_result_of_a_job_is_its_document_s_unless_the_hub_contradicts_it(
    reported_code, printed, code, status
):
    assert job_result(reported_code, printed) == (code, status)


@pytest.mark.parametrize("command", ["merge --push --on jobs", "schedule --cron @daily"])
def test_a_problem_of_the_recipe_is_reported_before_a_job_is_created(
    command, hub, folder, monkeypatch
):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    text = RECIPE.replace("a/b", "zoo/base").replace("a/c", "zoo/expert-reverse")
    text += f"publish: {{repo: {hub.user}/again, license: apache-2.0}}\n"
    text += "parameters: {density: [{filter: no_such_tensor, value: 0.5}, {value: 1.0}]}\n"
    (folder / "recipe.yaml").write_text(text)

    done = CliRunner().invoke(cli, [*command.split(), "--flavor", "x", "recipe.yaml"])

    # this Hub refuses Jobs by another error, so none was requested
    assert isinstance(done.exception, CheckFailedError)
    assert "no_such_tensor" in str(done.exception)
