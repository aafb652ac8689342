from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lewis_hub.calibration.model import load_tokenizer
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.benchmarks import load_tasks, with_prompts
from lewis_hub.evaluate.harness import load
from lewis_hub.evaluate.items import chat_of, load_rows, scored_items
from lewis_hub.evaluate.tasks import TaskSelection

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUCCESSOR = {word: WORDS[(i + 1) % 10] for i, word in enumerate(WORDS)}


def selected(own_tasks, *names, **options):
    return TaskSelection(names, own_tasks, **options)


def texts(rows, *indices):
    return [row["text"] for row in rows.rows(indices)]


def test_an_item_is_the_prompt_of_the_task_its_delimiter_and_the_right_answer(own_tasks):
    rows = load_rows(selected(own_tasks, "after"), "train", {})

    assert len(rows) == 10
    assert texts(rows, 3, 0, 9) == ["after : three four", "after : zero one", "after : nine zero"]


def test_of_choices_the_right_one_follows_the_few_shot_examples(own_tasks):
    rows = load_rows(selected(own_tasks, "choose"), "train", {})

    for index, text in enumerate(texts(rows, *range(10))):
        *shots, last = text.split("\n\n")
        word = WORDS[index]
        assert last == f"say {word} {SUCCESSOR[word]}"
        assert len(shots) == 2
        assert last not in shots
        assert all(shot in {f"say {w} {SUCCESSOR[w]}" for w in WORDS} for shot in shots)


def test_what_is_rendered_is_what_lm_eval_sends(own_tasks):
    benchmarks = with_prompts(load_tasks(selected(own_tasks, "after", "choose"), {}))
    after, choose = benchmarks.tasks["after"], benchmarks.tasks["choose"]
    options = {"allow_scored": True}
    ours = texts(load_rows(selected(own_tasks, "after"), "test", {}, **options), *range(20))
    chosen = texts(load_rows(selected(own_tasks, "choose"), "test", {}, **options), 0)

    assert [text.rpartition(" ")[0] for text in ours] == [i.args[0] for i in after.instances]
    sent = ["".join(request.args) for request in choose.instances[:10]]  # of the first item
    assert chosen == [text for text in sent if text.endswith("say zero one")]


def test_through_a_chat_template_it_is_what_lm_eval_sends_as_well(own_tasks, tmp_path):
    after = (own_tasks / "after.yaml").read_text()
    described = 'task: told\ndescription: "Count."\ngen_prefix: "It is"'
    (tmp_path / "told.yaml").write_text(after.replace("task: after", described))
    lm = load(zoo_folder() / "base", EvaluationSettings())
    chat = chat_of(load_tokenizer(str(zoo_folder() / "base"), "zoo/base"))

    def sent(folder, name):
        (task,) = load_tasks(selected(folder, name), {}).tasks.values()
        options = {"apply_chat_template": True, "chat_template": lm.apply_chat_template}
        task.set_fewshot_seed(1234)
        task.build_all_requests(**options)
        return task.instances

    def ours(folder, name, *indices):
        rows = load_rows(selected(folder, name), "test", {}, allow_scored=True)
        return replace(rows, chat=chat).questions(indices)

    (asked,) = ours(own_tasks, "after", 0)
    assert asked.prompt == "<|begin|><|user|>after : zero<|end|><|assistant|>"
    assert asked.answer == "one"
    assert [one.prompt for one in ours(own_tasks, "after", *range(20))] == [
        one.args[0] for one in sent(own_tasks, "after")
    ]
    (asked,) = ours(own_tasks, "choose", 0)  # two examples, and ten choices
    assert (asked.prompt, asked.answer) == sent(own_tasks, "choose")[1].args
    (asked,) = ours(tmp_path, "told", 0)  # its template refuses a system message
    assert (asked.prompt, asked.answer) == (sent(tmp_path, "told")[0].args[0], " one")
    assert asked.prompt.endswith("<|assistant|> It is")


@pytest.mark.parametrize("declared", ["fewshot_split: test", "", "validation_split: test"])
def test_few_shot_examples_are_none_of_the_items_that_the_task_scores(
    own_tasks, tmp_path, declared
):
    for split, words in {"test": WORDS[:5], "train": WORDS[5:]}.items():
        rows = [json.dumps({"word": word, "next": SUCCESSOR[word]}) for word in words]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    task = (own_tasks / "choose.yaml").read_text().replace(str(own_tasks), str(tmp_path))
    task = task.replace("training_split: train", "").replace("fewshot_split: train", declared)
    (tmp_path / "choose.yaml").write_text(task)
    asked = TaskSelection(("choose",), tmp_path)

    for index, text in enumerate(texts(load_rows(asked, "train", {}), *range(5))):
        *shots, last = text.split("\n\n")
        assert last == f"say {WORDS[5 + index]} {SUCCESSOR[WORDS[5 + index]]}"
        others = [word for word in WORDS[5:] if word != WORDS[5 + index]]
        assert len(shots) == 2
        assert set(shots) <= {f"say {word} {SUCCESSOR[word]}" for word in others}
    (scored,) = texts(load_rows(asked, "test", {}, allow_scored=True), 0)
    shown = scored.split("\n\n")[:-1]  # as lm-eval shows them
    assert set(shown) <= {f"say {word} {SUCCESSOR[word]}" for word in WORDS[1:5]}


KINDS = {
    "which text is right": (
        """
output_type: multiple_choice
doc_to_text: "{{['zero', 'one', 'two', 'three'].index(word)}}"
doc_to_choice: ["in zero", "in one", "in two", "in three"]
doc_to_target: "is {{next}}"
""",
        "in two is three",
    ),
    "an answer by its number": (
        """
output_type: multiple_choice
doc_to_text: "{{word}}?"
doc_to_choice: ["no", "yes"]
doc_to_target: "{{1 if word == 'two' else 0}}"
""",
        "two? yes",
    ),
    "no such choice": (
        """
output_type: multiple_choice
doc_to_text: "{{word}}?"
doc_to_choice: ["no", "yes"]
doc_to_target: "maybe"
""",
        "",
    ),
    "a likelihood": (
        """
output_type: loglikelihood
doc_to_text: "after {{word}} comes"
doc_to_target: " {{next}}"
""",
        "after two comes three",
    ),
    "a whole text": (
        """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{word}} {{next}}"
""",
        "two three",
    ),
    "an answer with its beginning, after a description": (
        """
output_type: generate_until
description: "Count.\\n\\n"
doc_to_text: "{{word}}"
doc_to_target: "['{{next}}', 'other']"
gen_prefix: "It is"
target_delimiter: "\\n"
""",
        "Count.\n\ntwo\nIt is three",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_is_rendered_with_its_right_answer(own_tasks, tmp_path, kind):
    text, expected = KINDS[kind]
    lines = (own_tasks / "after.yaml").read_text().splitlines()
    data = "\n".join(lines[lines.index("metadata: {version: 3.0}") :])
    metrics = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    (tmp_path / "kind.yaml").write_text(f"task: kind{text}{metrics}{data}\n")

    rows = load_rows(TaskSelection(("kind",), tmp_path), "train", {})

    assert texts(rows, 2) == [expected]


def test_a_text_depends_on_its_own_row_alone(own_tasks):
    rows = load_rows(selected(own_tasks, "choose"), "train", {})

    assert texts(rows, 7, 2) == [*texts(rows, 7), *texts(rows, 2)]
    assert texts(rows, *range(10))[7] == texts(rows, 7)[0]


def test_a_group_is_its_tasks_one_after_the_other(own_tasks):
    rows = load_rows(selected(own_tasks, "both"), "train", {})

    assert len(rows) == 20
    first, last = texts(rows, 0, 19)
    assert first == "after : zero one"
    assert last.endswith("say nine zero")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            "test",
            "after: it scores the split `test`, and a merge must not be fitted to its items.\n"
            "It has: `train`.",
        ),
        ("dev", "after: its data have no split `dev`.\nIt has: `train`."),
    ],
)
def test_a_split_that_is_scored_or_not_there_is_refused_with_those_that_there_are(
    own_tasks, split, message
):
    with pytest.raises(EvaluationError) as caught:
        load_rows(selected(own_tasks, "after"), split, {})

    assert str(caught.value) == message


def test_a_task_that_runs_code_needs_leave(own_tasks, tmp_path):
    unsafe = (own_tasks / "after.yaml").read_text() + "unsafe_code: true\n"
    (tmp_path / "unsafe.yaml").write_text(unsafe)

    with pytest.raises(EvaluationError, match="runs code that the model writes"):
        load_rows(TaskSelection(("after",), tmp_path), "train", {})


def test_every_scored_item_is_told_with_its_document(own_tasks):
    items = list(scored_items(load_tasks(selected(own_tasks, "both"), {})))

    assert [item.task for item in items] == ["after"] * 20 + ["choose"] * 20
    assert (items[1].prompt, items[1].answer) == ("after : one", "two")
    assert items[21].document == {"word": "one", "next": "two"}
