"""Calibration on a task's own items, and never on those that are scored, over the embedded Hub."""

import json
import shutil
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd, snapshot_download
from zoo_hub import put_zoo

import lewis_hub
from lewis_hub import pipeline
from lewis_hub.calibration.model import load_tokenizer
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import Silent
from lewis_hub.errors import (
    CalibrationError,
    CheckFailedError,
    EvaluationError,
    LewisHubError,
    OutputError,
    SourceError,
)
from lewis_hub.evaluate.benchmarks import load_tasks
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.hub.resolve import resolve_model
from lewis_hub.hub.source import cache_root
from lewis_hub.recipe.read import parse_recipe, read_recipe
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.workflow import texts
from lewis_hub.workflow.resources import Execution
from lewis_hub.workflow.task_data import pin_task, scored_commits
from lewis_hub.workflow.texts import TextSettings, draw

TASKS = zoo_folder() / "tasks"
TEMPLATE = 'text: "Question: {question}\\nAnswer: {answer}"'
TASK = f"task: zoo_reverse, include: {TASKS}"
EVALUATE = f"evaluate: {{tasks: [zoo_reverse, zoo_cipher], include: {TASKS}}}\n"


def recipe(calibration, more=""):
    text = (
        f"base_model: {zoo_folder() / 'base'}\nmerge_method: ties\ndtype: bfloat16\n"
        f"models: [{{model: {zoo_folder() / 'expert-reverse'}}}]\n"
        f"guide: {{calibration: {{{calibration}, samples: 12}}}}\n"
    )
    return parse_recipe(text + more, "recipe.yaml")


@pytest.fixture
def seeded(hub, monkeypatch):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return hub


def measured(asked, folder):
    (base, *_) = pipeline.calibrate(asked, folder).profile.sources
    return base


def rows_of(split):
    text = (zoo_folder() / "data" / "reverse" / f"{split}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def told(asked, folder):
    with pytest.raises(LewisHubError) as caught:
        pipeline.calibrate(asked, folder)
    return caught.type, str(caught.value)


def test_a_tasks_own_items_give_the_tokens_of_its_prompt_written_out(seeded, tmp_path):
    by_task = measured(recipe(TASK), tmp_path / "task")
    by_hand = measured(recipe(f"dataset: zoo/reverse, {TEMPLATE}"), tmp_path / "dataset")

    assert by_task.calibration["tokens_digest"] == by_hand.calibration["tokens_digest"]
    assert by_task.modules == by_hand.modules
    commit = seeded.api().dataset_info("zoo/reverse").sha
    assert by_task.calibration["dataset"] == f"zoo/reverse@{commit}"
    assert by_task.calibration["task"] == "zoo_reverse"
    assert (by_task.n_tokens, by_task.calibration["n_truncated"]) == (by_hand.n_tokens, 0)


def test_calibration_goes_through_the_chat_template_that_evaluate_asks_for(seeded, tmp_path):
    in_chat = EVALUATE.replace("include", "chat_template: true, include")
    written = "<|begin|><|user|>Question: {question}\nAnswer:<|end|><|assistant|> {answer}"
    rows = [json.dumps({"text": written.format(**row)}) for row in rows_of("train")]
    (tmp_path / "written.jsonl").write_text("\n".join(rows))

    by_task = measured(recipe(TASK, in_chat), tmp_path / "task").calibration
    by_hand = measured(recipe(f"dataset: {tmp_path}/written.jsonl, text: '{{text}}'"),
                       tmp_path / "hand").calibration  # fmt: skip
    unlike = measured(recipe(f"{TASK}, chat_template: false", in_chat), tmp_path / "not")

    assert by_task["chat_template"] is True
    assert by_task["tokens_digest"] == by_hand["tokens_digest"]
    plain = measured(recipe(TASK, EVALUATE), tmp_path / "plain")
    assert unlike.calibration["tokens_digest"] == plain.calibration["tokens_digest"]
    assert "chat_template" not in plain.calibration


def test_a_chat_template_that_is_not_there_is_an_error(seeded, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(zoo_folder() / "base", base)
    (base / "chat_template.jinja").unlink()
    asked = recipe(f"{TASK}, chat_template: true")
    asked = asked.model_copy(update={"base_model": ModelReference(name=str(base))})

    assert told(asked, tmp_path / "out")[1].endswith(
        "has no chat template.\nLeave `chat_template` out, or a source whose tokenizer has one."
    )


def test_check_names_each_scored_model_that_has_no_chat_template(seeded, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(zoo_folder() / "base", base)
    (base / "chat_template.jinja").unlink()
    asked = recipe(TASK, EVALUATE.replace("include", "chat_template: true, include"))
    alike = pipeline.check(asked).problems
    without = {"base_model": ModelReference(name=str(base)), "chat_template": "chatml"}

    (problem,) = pipeline.check(asked.model_copy(update=without)).problems

    assert alike == ()
    assert problem == (
        f"evaluate.chat_template: {base} has no chat template.\n"
        "Leave it out of `evaluate.compare`, or score without `chat_template`."
    )


def test_what_a_profile_says_is_as_its_schema_says(seeded, tmp_path):
    pipeline.calibrate(recipe(TASK), tmp_path / "task")
    asked = recipe(f"dataset: zoo/reverse, {TEMPLATE}")
    pipeline.calibrate(asked, tmp_path / "dataset")
    of_files = asked.guide.model_copy(update={"name": "magnitude"})
    pipeline.calibrate(asked.model_copy(update={"guide": of_files}), tmp_path / "files")

    file = resources.files("lewis_hub.calibration").joinpath("importance.schema.json")
    validator = jsonschema.Draft202012Validator(json.loads(file.read_text("utf-8")))
    validator.check_schema(validator.schema)
    pipeline.calibrate(recipe(f"{TASK}, chat_template: true"), tmp_path / "chat")
    for name in ("task", "chat", "dataset"):
        document = json.loads((tmp_path / name / "importance.json").read_text())
        assert list(validator.iter_errors(document)) == []
        del document["sources"][0]["calibration"]["dataset_sha"]
        (error,) = validator.iter_errors(document)
        assert error.message == "'dataset_sha' is a required property"
    document = json.loads((tmp_path / "files" / "importance.json").read_text())
    assert list(validator.iter_errors(document)) == []
    assert document["sources"][0]["calibration"].keys() == {"measure", "base"}


@pytest.mark.slow
def test_another_prompt_is_measured_anew_and_the_same_one_is_not(seeded, tmp_path, stage_titles):
    for name in ("zoo_reverse.yaml", "zoo_cipher.yaml"):
        (tmp_path / name).write_text((TASKS / name).read_text())
    asked = recipe(f"task: zoo_reverse, include: {tmp_path}").placed_in(tmp_path.parent)
    first = measured(asked, tmp_path / "out").calibration
    again = measured(asked, tmp_path / "out").calibration
    changed = (TASKS / "zoo_reverse.yaml").read_text().replace("Question:", "Q:")
    (tmp_path / "zoo_reverse.yaml").write_text(changed)
    other = measured(asked, tmp_path / "out").calibration

    assert again == first
    assert other["task_digest"] != first["task_digest"]
    assert other["tokens_digest"] != first["tokens_digest"]


@pytest.mark.parametrize("template", [TEMPLATE, 'text: "{answer}, so {question}"'])
def test_calibration_on_scored_items_is_refused_with_their_number(seeded, tmp_path, template):
    asked = recipe(f"dataset: zoo/reverse, split: test, {template}", EVALUATE)

    assert told(asked, tmp_path) == (
        CalibrationError,
        "calibration on zoo/reverse, split test: of 12 texts, `evaluate` scores 12 of zoo_reverse."
        "\nA score on calibration texts is meaningless: name another split, or another "
        "`seed`.\n`allow_overlap: true` in this calibration, or `--allow-overlap`, continues "
        "anyway.",
    )


HIDDEN = {  # how scored items may be written down -> a row, and what is calibrated on
    "another column": (lambda n, q, a: {"id": n, "q": q, "a": a}, "text: '{id} {q} {a}'"),
    "a preamble": (
        lambda n, q, a: {"t": f"Solve this. Question: {q} Response: {a}"},
        "text: '{t}'",
    ),
    "a prompt without an answer": (
        lambda n, q, a: {"n": n, "t": f"Solve this. Question: {q}\nAnswer:"},
        "text: '{n} {t}'",
    ),
    "a part of the question in the template": (
        lambda n, q, a: {"word": q.removeprefix("reverse ")},
        "text: 'Reverse {word}'",
    ),
    "chat with a system message": (
        lambda n, q, a: {
            "chat": [
                {"role": "system", "content": f"You are helper {n}."},
                {"role": "user", "content": q},
                {"role": "assistant", "content": a},
            ]
        },
        "messages: chat",
    ),
}


@pytest.mark.parametrize(("row", "asked"), HIDDEN.values(), ids=HIDDEN)
def test_scored_items_are_found_whatever_is_written_around_them(seeded, tmp_path, row, asked):
    base = tmp_path / "base"
    shutil.copytree(zoo_folder() / "base", base)
    template = (base / "chat_template.jinja").read_text()
    system = "{%- elif message.role == 'system' %}{{- message.content }}{%- else %}"
    (base / "chat_template.jinja").write_text(template.replace("{%- else %}", system))

    def on(split):
        rows = [row(n, one["question"], one["answer"]) for n, one in enumerate(rows_of(split))]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        made = recipe(f"dataset: {tmp_path}/{split}.jsonl, {asked}", EVALUATE)
        return made.model_copy(update={"base_model": ModelReference(name=str(base))})

    found = told(on("test"), tmp_path / "out")[1]

    assert "of 12 texts, `evaluate` scores 12 of zoo_reverse." in found
    assert measured(on("train"), tmp_path / "out").calibration["n_texts"] == 12


def on_scored(folder):
    """A recipe file that calibrates on what it scores, a number beside each item."""
    rows = [{"n": n, **row} for n, row in enumerate(rows_of("test"))]
    (folder / "copy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "recipe.yaml").write_text(
        "base_model: zoo/base\nmerge_method: ties\nmodels: [{model: zoo/expert-reverse}]\n"
        "guide: {calibration: {dataset: copy.jsonl, text: '{n} {question} {answer}', samples: 4}}\n"
        f"publish: {{repo: lewis/fitted}}\n{EVALUATE}"
    )
    return folder / "recipe.yaml"


FOUND = "of 4 texts, `evaluate` scores 4 of zoo_reverse."
WAYS = {
    "merge": ["merge", "--no-eval", "--json"],
    "stream": ["merge", "--stream", "--push", "--no-eval", "--json"],
    "importance": ["importance", "--json"],
}


@pytest.mark.parametrize(("command", "words"), [(w[0], w[1:]) for w in WAYS.values()], ids=WAYS)
def test_what_is_not_scored_now_is_held_out_too_unless_it_is_allowed(
    seeded, tmp_path, command, words
):
    file = on_scored(tmp_path)

    refused = CliRunner().invoke(cli, [command, str(file), *words])

    assert refused.exit_code == 1
    assert FOUND in str(refused.exception)
    assert not list(cache_root().rglob("*.safetensors"))  # before any large download
    allowed = CliRunner().invoke(cli, [command, str(file), *words, "--allow-overlap"])
    assert allowed.exit_code == 0, allowed.output
    assert "Loading the benchmarks" not in allowed.stderr
    if command == "merge":
        folder = snapshot_download("lewis/fitted") if "--push" in words else tmp_path / "merged"
        kept = read_recipe(Path(folder) / "lewis" / "recipe.yaml")
        assert kept.guide.calibration.allow_overlap


def test_one_model_is_measured_on_what_a_task_scores_where_that_is_allowed(seeded, tmp_path):
    words = ["importance", str(zoo_folder() / "base"), "--task", "zoo_reverse", "--include",
             str(TASKS), "--split", "test", "--samples", "2", "-o", str(tmp_path)]  # fmt: skip

    refused = CliRunner().invoke(cli, words)
    allowed = CliRunner().invoke(cli, [*words, "--allow-overlap"])

    assert "it scores the split `test`, and a merge must not be fitted" in str(refused.exception)
    assert (refused.exit_code, allowed.exit_code) == (1, 0)


def test_what_is_scored_later_and_cannot_be_loaded_is_no_reason_to_look_away(seeded, tmp_path):
    file = on_scored(tmp_path)
    text = file.read_text().replace("[zoo_reverse, zoo_cipher]", "[zoo_revers]")
    file.write_text(text.replace("{n} {question} {answer}", "{question}"))

    refused = CliRunner().invoke(cli, ["merge", str(file), "--no-eval"])

    assert refused.exit_code == 1
    assert "zoo_revers: neither lm-eval nor your include folder has such a task." in str(
        refused.exception
    )
    assert str(refused.exception).endswith("\nOr merge without comparing: `--allow-overlap`.")


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_of_a_task_with_many_examples_the_item_and_its_answer_are_measured(seeded, tmp_path):
    many = (TASKS / "zoo_reverse.yaml").read_text() + "num_fewshot: 40\n"
    (tmp_path / "many.yaml").write_text(many)
    asked = recipe(f"task: zoo_reverse, include: {tmp_path}, max_tokens: 40")
    api, calibration = seeded.api(), asked.guide.calibration
    pinned = pin_task(api, "zoo_reverse", None, tmp_path)
    base = resolve_model(api, "zoo/base")
    settings = TextSettings(base, 42, False, {calibration: pinned}, (calibration,))

    heard = Heard()

    drawn = draw(settings, calibration, api, heard)

    tokens = drawn.tokens.tokens
    tokenizer = load_tokenizer(str(zoo_folder() / "base"), "zoo/base")
    for row, ids in zip(tokens.rows, tokens.ids, strict=True):
        one = rows_of("train")[row]
        text = tokenizer.decode(ids)
        assert len(ids) == 40
        assert text.endswith(f"Question: {one['question']}\nAnswer: {one['answer']}")
    assert tokens.n_truncated == 12
    (line,) = heard.lines
    assert f"12 of 12 texts were cut to 40 tokens: {tokens.n_cut:,} tokens where they begin" in line


def test_a_few_scored_items_among_others_are_found_in_a_copy_of_the_data(seeded, tmp_path):
    rows = [*rows_of("test")[:2], *rows_of("train")[:10]]
    copy = [
        {"source": n, "full": f"Question:  {row['question']} Answer: {row['answer']}"}
        for n, row in enumerate(rows)
    ]
    (tmp_path / "copy.jsonl").write_text("\n".join(map(json.dumps, copy)))

    kind, message = told(recipe(f"dataset: {tmp_path}/copy.jsonl, text: '{{full}}'", EVALUATE),
                        tmp_path / "out")  # fmt: skip

    assert kind is CalibrationError
    assert "of 12 texts, `evaluate` scores 2 of zoo_reverse." in message


def test_an_overlap_may_be_allowed_and_the_train_split_has_none(seeded, tmp_path):
    allowed = recipe(f"{TASK}, split: test, allow_overlap: true", EVALUATE)
    clean = recipe(TASK, EVALUATE)

    assert measured(allowed, tmp_path / "one").calibration["split"] == "test"
    assert measured(clean, tmp_path / "two").calibration["split"] == "train"


def test_each_expert_may_have_a_task_or_a_dataset_of_its_own(seeded, tmp_path):
    asked = parse_recipe(
        "base_model: zoo/base\nmerge_method: ties\nmodels:\n"
        f"- {{model: zoo/expert-reverse, calibration: {{{TASK}, samples: 6}}}}\n"
        "- model: zoo/expert-cipher\n"
        f"  calibration: {{dataset: zoo/cipher, {TEMPLATE}, samples: 5, max_tokens: 9}}\n"
        "guide: {name: lewis}\n" + EVALUATE,
        "recipe.yaml",
    )

    sources = pipeline.calibrate(asked, tmp_path).profile.sources

    found = [
        (s.source.partition("@")[0], s.calibration["dataset"].partition("@")[0]) for s in sources
    ]
    assert found == [
        ("zoo/base", "zoo/reverse"),
        ("zoo/base", "zoo/cipher"),
        ("zoo/expert-reverse", "zoo/reverse"),
        ("zoo/expert-cipher", "zoo/cipher"),
    ]
    told = [(s.calibration["n_texts"], s.calibration["n_truncated"]) for s in sources[2:]]
    assert told == [(6, 0), (5, 5)]
    assert sources[3].n_tokens == 5 * 9


def test_a_task_at_an_earlier_revision_of_its_data_is_drawn_from_that(seeded, tmp_path):
    api = seeded.api()
    before = api.dataset_info("zoo/reverse").sha
    first = measured(recipe(TASK), tmp_path / "one").calibration
    _overwrite(api, "train.jsonl")

    asked = recipe(f"{TASK}, revision: {before}")

    assert measured(asked, tmp_path / "two").calibration == first
    newest = measured(recipe(TASK), tmp_path / "three").calibration
    assert newest["tokens_digest"] != first["tokens_digest"]


def test_scored_data_stay_at_the_commit_that_they_were_pinned_to(seeded):
    api = seeded.api()
    selected = TaskSelection(("zoo_reverse",), TASKS)
    commits = scored_commits(api, selected)
    _overwrite(api, "test.jsonl")

    pinned = load_tasks(selected, commits).tasks["zoo_reverse"]
    newest = load_tasks(selected, scored_commits(api, selected)).tasks["zoo_reverse"]

    assert pinned.eval_docs[0] == rows_of("test")[0]
    assert newest.eval_docs[0] == {"question": "reverse AB", "answer": "BA"}


@pytest.mark.parametrize("where", ["calibration", "evaluate"])
def test_a_task_whose_dataset_names_data_elsewhere_is_refused(seeded, tmp_path, where):
    card = b"---\nconfigs: [{config_name: default, data_files: http://127.0.0.2:9/a.jsonl}]\n---\n"
    change = [CommitOperationAdd("README.md", card)]
    commit = seeded.api().create_commit(
        "zoo/reverse", change, repo_type="dataset", commit_message="Data elsewhere"
    )
    on_cipher = f"dataset: {zoo_folder() / 'data/cipher/train.jsonl'}, {TEMPLATE}"
    asked = recipe(TASK) if where == "calibration" else recipe(on_cipher, EVALUATE)

    _, message = told(asked, tmp_path)

    assert (
        f"zoo/reverse@{commit.oid}: `README.md` names data that is not in it: "
        "http://127.0.0.2:9/a.jsonl.\nUse a dataset that has its data itself."
    ) in message


def _overwrite(api, path):
    row = json.dumps({"question": "reverse AB", "answer": "BA"}) + "\n"
    change = [CommitOperationAdd(path, row.encode())]
    api.create_commit("zoo/reverse", change, repo_type="dataset", commit_message="Other rows")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (f"dataset: zoo/reverse, split: trian, {TEMPLATE}", "it has no split `trian`.\nIt has: "),
        (f"dataset: zoo/reverse, config: hard, {TEMPLATE}", "it has no configuration `hard`."),
        (
            "dataset: zoo/reverse, text: '{Question} {answer}'",
            "there is no column `Question`.\nColumns: `question`, `answer`. Did you mean",
        ),
        ("dataset: zoo/reverse, messages: chat", "`messages`: there is no column `chat`."),
        ("dataset: zoo/reverse, text: '{question'", "is not a template"),
        (f"{TASK}, split: test", "the task scores split `test`, so calibration must not use it"),
    ],
)
def test_check_tells_what_is_wrong_with_calibration_data(seeded, calibration, message):
    (problem,) = pipeline.check(recipe(calibration)).problems

    assert message in problem


def test_a_task_without_the_split_names_those_that_there_are(seeded, tmp_path):
    kind, message = told(recipe(f"{TASK}, split: dev"), tmp_path)

    assert kind is EvaluationError
    assert message == "zoo_reverse: its data have no split `dev`.\nIt has: `train`."


def test_a_task_that_runs_code_needs_leave_to_calibrate_on_it(seeded, tmp_path):
    unsafe = (TASKS / "zoo_reverse.yaml").read_text() + "unsafe_code: true\n"
    (tmp_path / "unsafe.yaml").write_text(unsafe)

    kind, message = told(recipe(f"task: zoo_reverse, include: {tmp_path}"), tmp_path / "out")

    assert kind is CheckFailedError
    assert "zoo_reverse: runs code that the model writes." in message


def test_data_made_by_python_cannot_be_pinned(seeded, tmp_path):
    made = (TASKS / "zoo_reverse.yaml").read_text() + "custom_dataset: !function own.make\n"
    (tmp_path / "made.yaml").write_text(made)

    kind, message = told(recipe(f"task: zoo_reverse, include: {tmp_path}"), tmp_path / "out")

    assert kind is EvaluationError
    assert message.startswith("zoo_reverse: makes its items with Python")


def task_on_local_rows(folder):
    """Write a task whose rows are in a file beside it; return that file."""
    rows = folder / "rows.jsonl"
    rows.write_text((zoo_folder() / "data/reverse/train.jsonl").read_text())
    local = (TASKS / "zoo_reverse.yaml").read_text().replace(
        "dataset_path: zoo/reverse",
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{train: {rows}, test: {rows}}}}}",
    )  # fmt: skip
    (folder / "local.yaml").write_text(local)
    return rows


def test_local_data_files_of_a_task_are_pinned_by_their_content(seeded, tmp_path):
    rows = task_on_local_rows(tmp_path)
    before = pin_task(seeded.api(), "zoo_reverse", None, tmp_path)
    rows.write_text('{"question": "reverse AB", "answer": "BA"}\n')
    after = pin_task(seeded.api(), "zoo_reverse", None, tmp_path)

    assert before.digest == after.digest
    assert before.facts["dataset_sha"] != after.facts["dataset_sha"]
    assert before.facts["dataset"] == after.facts["dataset"] == str(rows)


def test_rows_of_a_task_that_changed_since_they_were_pinned_are_refused(
    seeded, tmp_path, monkeypatch
):
    """They would be in a merge whose lock names the file as it was."""
    rows = task_on_local_rows(tmp_path)
    asked = recipe(f"task: zoo_reverse, include: {tmp_path}").placed_in(tmp_path.parent)
    load_rows = texts.items.load_rows

    def load_changed(*args, **options):
        rows.write_text(rows.read_text() + '{"question": "reverse AB", "answer": "BA"}\n')
        return load_rows(*args, **options)

    monkeypatch.setattr(texts.items, "load_rows", load_changed)
    kind, message = told(asked, tmp_path / "out")

    assert kind is SourceError
    assert (
        message == f"{rows}: `rows.jsonl` changed while it was read.\nRestore it, then run again."
    )


def test_a_merge_on_a_task_is_verified_by_making_it_again(seeded, tmp_path):
    merged = pipeline.merge_models(recipe(TASK), tmp_path / "merged").output
    commit = seeded.api().dataset_info("zoo/reverse").sha

    again = read_recipe(merged / "lewis" / "recipe.yaml").guide.calibration
    assert (again.task, again.include, again.revision) == ("zoo_reverse", "tasks", commit)
    assert (merged / "lewis/tasks/zoo_reverse.yaml").read_text() == (
        TASKS / "zoo_reverse.yaml"
    ).read_text()
    card = (merged / "README.md").read_text()
    assert "zoo_reverse" in card
    _overwrite(seeded.api(), "train.jsonl")
    model, allowed = ModelReference(name=str(merged)), Execution(allow_code=True)
    assert lewis_hub.verify(model, allowed, rebuild=True).problems == ()
    with pytest.raises(OutputError, match="calibrated on its own task files, and those are code"):
        lewis_hub.verify(model, rebuild=True)
