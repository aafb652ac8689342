"""What is refused before anything is sent to Hugging Face Jobs, and what is handed on."""

import click
import pytest
from click.testing import CliRunner

from lewis_hub.cli.jobs import ended, handed_on, printed
from lewis_hub.cli.main import cli
from lewis_hub.errors import RecipeError
from lewis_hub.recipe.read import read_recipe
from lewis_hub.workflow.ci import Hardware, request

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


def asked(folder, text=RECIPE, options=("--push",)):
    (folder / "recipe.yaml").write_text(text)
    file = folder / "recipe.yaml"
    return request(file, read_recipe(file), options, HERE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "--on", "jobs"], "a Job's disk goes with it: add --push."),
        (["merge", "--on", "jobs", "--push", "-o", "x"], "a Job's disk goes with it."),
        (
            ["merge", "--on", "jobs", "--push", "--sign", "recipe.yaml"],
            "your key stays here, so a Job cannot sign.",
        ),
        (["merge", "--flavor", "a100-large"], "they say where a Job runs: add --on jobs."),
        (["merge", "--timeout", "2 hours"], "expected a time such as 90m or 2h, found '2 hours'"),
        (["merge", "--on", "mars"], "'mars' is not 'jobs'"),
        (["schedule", "recipe.yaml"], "Missing option '--cron'"),
        (["schedule", "--cron", "17 4 * *"], "expected five fields such as '17 4 * * 1'"),
        (["schedule", "--cron", "@often"], "found '@often'"),
    ],
)
def test_wrong_usage_is_told(folder, words, message):
    assert message in " ".join(refused(*words).split())


def test_a_recipe_travels_with_what_lies_beside_it(folder):
    job = asked(folder)

    assert job.words == ["merge", "/recipe", "-o", "merged", "--push"]
    assert set(job.files) == {"recipe.yaml", "tasks/mine.yaml"}
    assert (job.flavor, job.timeout) == ("a100-large", "2h")


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
def test_what_a_job_cannot_have_is_refused_before_anything_is_sent(folder, text, message):
    with pytest.raises(RecipeError) as caught:
        asked(folder, text)

    assert str(caught.value).endswith(message)


def test_the_options_that_are_given_are_handed_on_and_no_others():
    words = ["-q", "--json", "--push", "--on", "jobs", "--flavor", "x", "--device", "cuda"]
    words += ["--repo", "me/x", "--no-eval", "--max-shard-size", "1GB"]
    merge = cli.commands["merge"]

    with merge.make_context("merge", words) as context:
        assert isinstance(context, click.Context)
        assert handed_on(context) == [
            *("--push", "--repo", "me/x", "--no-eval", "--device", "cuda"),
            *("--max-shard-size", "1GB", "--json"),
        ]


def test_a_folder_stands_for_the_recipe_in_it(folder):
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


def test_the_document_is_found_in_a_job_s_log():
    expected = {"status": "refused", "gate": {"passed": False}, "lines": "a\n}"}

    assert printed(LOG.splitlines()) == printed(LOG.splitlines()[2:]) == expected


@pytest.mark.parametrize("log", ["", "{", "{\n}", "one\n{\n  half", "}\nx\n{", "a: 1\nb"])
def test_a_log_without_a_document_has_none(log):
    assert printed(log.splitlines()) == {}


@pytest.mark.parametrize(
    ("named", "told", "code", "status"),
    [
        (0, {}, 0, "merged"),
        (0, {"status": "unchanged"}, 0, "unchanged"),
        (3, {}, 3, "refused"),
        (130, {}, 130, "failed"),
        (137, {"status": "merged"}, 137, "failed"),  # it was ended behind its document
        (None, {"status": "refused"}, 3, "refused"),
        (None, {"status": "unchanged"}, 0, "unchanged"),
        (None, {"status": "failed"}, 1, "failed"),
        (None, {}, 1, "failed"),
    ],
)
def test_a_job_ends_as_the_hub_says_or_else_as_its_document_does(named, told, code, status):
    assert ended(named, told) == (code, status)
