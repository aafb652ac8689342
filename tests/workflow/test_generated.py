"""Calibration texts that the experts write, from the recipe to the card, on the zoo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from statistical_merges import Recorder, merge, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import CalibrationError, LewisHubError
from lewis_hub.workflow.generated import _lines_by_key
from lewis_hub.workflow.resources import Execution

PROMPT = '"Question: {question}\\nAnswer:"'
EXPERTS = ("reverse", "cipher")
MODELS = "base_model: zoo/base\nmerge_method: regmean\nmodels:\n"
ANSWERS = MODELS + "".join(
    f"  - model: zoo/expert-{skill}\n    calibration: {{dataset: zoo/{skill}, text: {PROMPT}, "
    "samples: 6, max_tokens: 48, answers: model}\n"
    for skill in EXPERTS
)
SAMPLED = (
    MODELS + "  - zoo/expert-reverse\n  - zoo/expert-cipher\n"
    "calibration: {from: model, prompt: 'Question:', temperature: 0.8, top_p: 0.9, samples: 6, "
    "max_tokens: 40}\n"
)


def lines_of(output):
    text = (output / "lewis" / "generated.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def shards_of(output):
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


def greedy(model, tokenizer, prompt, limit):
    """The most likely tokens after a prompt, by whole forward passes without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    n_prompt = len(ids)
    with torch.no_grad():
        while len(ids) < limit:
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return ids[n_prompt:]


@pytest.mark.slow
def test_each_expert_answers_its_prompts_and_the_answers_are_kept(api, tmp_path):
    output = merge(tmp_path / "out", ANSWERS)

    lines = lines_of(output)
    assert len(lines) == 12
    tokenizer = AutoTokenizer.from_pretrained(zoo_folder() / "base")
    for skill in EXPERTS:
        folder = zoo_folder() / f"expert-{skill}"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        data = (zoo_folder() / "data" / skill / "train.jsonl").read_text().splitlines()
        own = [one for one in lines if f"expert-{skill}" in one["source"]]
        for line in own:
            prompt = "Question: {question}\nAnswer:".format(**json.loads(data[line["row"]]))
            assert line["tokens"] == greedy(model, tokenizer, prompt, 48)
            assert line["text"] == tokenizer.decode(line["tokens"])
        assert sum(len(line["tokens"]) for line in own) > 6
    lock = json.loads((output / "lewis" / "lock.json").read_text())
    assert "lewis/generated.jsonl" in lock["outputs"]
    assert lock["seed"] == 42
    assert [len(one["rows"]) for one in lock["calibration"]] == [6, 6]
    card = " ".join((output / "README.md").read_text().split())
    told = "to these prompts the answers are the expert's own, right or wrong"
    assert f"For `zoo/expert-reverse`, {told} (`lewis/generated.jsonl`)." in card
    reference = lewis_hub.ModelReference(name=str(output))
    assert lewis_hub.verify(reference, rebuild=True).problems == ()
    assert lewis_hub.merge_models(recipe(ANSWERS), output).status == "unchanged"


@pytest.mark.slow
def test_answers_to_private_prompts_are_no_part_of_the_merge(api, tmp_path):
    api.update_repo_settings("zoo/reverse", private=True, repo_type="dataset")
    heard = Recorder()

    output = merge(tmp_path / "out", ANSWERS, progress=heard)

    assert {line["source"].partition("@")[0] for line in lines_of(output)} == {"zoo/expert-cipher"}
    assert (
        "zoo/expert-reverse: the merge does not have generated.jsonl, since it is not known that "
        "everybody may read the prompts."
    ) in heard.said
    api.update_repo_settings("zoo/cipher", private=True, repo_type="dataset")
    closed = merge(tmp_path / "closed", ANSWERS)
    assert not (closed / "lewis" / "generated.jsonl").exists()
    assert "lewis/generated.jsonl" not in (closed / "README.md").read_text()
    assert shards_of(closed) == shards_of(output)
    assert lewis_hub.verify(closed).problems == ()


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"texts": []}', '{"texts": "KEY", "row": [], "tokens": []}', "5"]
)
def test_other_lines_count_for_nothing(tmp_path, line):
    (tmp_path / "generated.jsonl").write_text(line)
    assert not _lines_by_key([tmp_path / "generated.jsonl", tmp_path]).keys() - {"KEY"}


def test_an_expert_samples_texts_without_data(api, tmp_path):
    output = merge(tmp_path / "out", SAMPLED)
    again = merge(tmp_path / "again", SAMPLED, Execution(runner="inline"))

    assert shards_of(output) == shards_of(again)
    lines = lines_of(output)
    assert lines == lines_of(again)
    assert [line["row"] for line in lines] == [*range(6), *range(6)]
    assert len({line["text"] for line in lines}) > 6
    assert json.loads((output / "lewis" / "lock.json").read_text())["calibration"] == []
    card = " ".join((output / "README.md").read_text().split())
    assert "For `zoo/expert-cipher`, without data the texts are the expert's own" in card


@pytest.mark.slow
def test_an_interrupted_run_and_a_second_merge_use_the_written_texts(api, tmp_path):
    whole, first, second = merge(tmp_path / "whole", ANSWERS), Recorder("Merging"), Recorder()
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", ANSWERS, progress=first)

    found = merge(tmp_path / "out", ANSWERS, progress=second)

    assert first.totals["Writing texts with zoo/expert-reverse"] > 100
    assert not any(title.startswith("Writing texts") for title in second.totals)
    assert lines_of(found) == lines_of(whole)
    assert shards_of(found) == shards_of(whole)


@pytest.mark.slow
def test_a_changed_line_is_written_again(api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "importance"
    folder.mkdir()
    lines = lines_of(merge(tmp_path / "out", ANSWERS))
    changed = [{**line, "tokens": [*line["tokens"], 5]} for line in lines[:6]] + lines[6:]
    (folder / "generated.jsonl").write_text("\n".join(map(json.dumps, changed)) + "\n{broken\n")
    heard = Recorder()

    found = merge(tmp_path / "again", ANSWERS, progress=heard)

    assert "Writing texts with zoo/expert-reverse" in heard.totals
    assert "Writing texts with zoo/expert-cipher" not in heard.totals
    assert lines_of(found) == lines


def test_texts_with_scored_items_are_refused(api, tmp_path):
    scored = f"evaluate: {{tasks: [zoo_reverse], include: {zoo_folder() / 'tasks'}}}\n"
    leaked = ANSWERS.replace("dataset: zoo/reverse,", "dataset: zoo/reverse, split: test,")

    with pytest.raises(CalibrationError, match=r"of 6 texts, `evaluate` scores 6 of zoo_reverse"):
        merge(tmp_path / "out", leaked + scored)


def test_the_check_tells_what_is_written_and_how_long_it_may_take(api):
    report = lewis_hub.check(recipe(SAMPLED))

    [note] = [note for note in report.notes if "expert-reverse" in note]
    assert note == (
        "zoo/expert-reverse writes 6 texts, 240 tokens with their prompts at most: up to 1 s on a "
        "CPU."
    )


def test_a_model_that_may_not_be_in_memory_is_refused_before_any_download(api, tmp_path):
    with pytest.raises(LewisHubError) as refused:
        merge(tmp_path / "out", SAMPLED, Execution(max_memory_bytes=2_000_000))

    assert "`from: model` loads it whole" in str(refused.value)
    assert "`lewis-hub importance` on a machine with enough room" in str(refused.value)


def test_a_model_alone_has_no_texts_of_its_own(tmp_path):
    asked = lewis_hub.Calibration(source="model", samples=4)

    with pytest.raises(CalibrationError) as refused:
        lewis_hub.measure_model("zoo/base", asked, tmp_path / "out")

    assert str(refused.value) == (
        "calibration on the model's own texts: an expert writes its texts for a merge, and this is "
        "a model alone.\nGive texts with answers, or name the recipe of the merge."
    )


@pytest.mark.slow
def test_a_stream_takes_the_texts_that_importance_wrote_and_writes_none(api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guided = SAMPLED.replace("regmean", "ties") + "guide: {name: lewis}\n"
    guided = guided.replace("samples: 6", "samples: 3")
    asked = lewis_hub.Publishing(repo=f"{api.whoami()['name']}/written")
    with pytest.raises(LewisHubError) as refused:
        lewis_hub.stream(recipe(guided), lewis_hub.open_target(asked), tmp_path / "work")
    assert "`from: model` loads zoo/expert-reverse whole, and --stream keeps no whole model" in str(
        refused.value
    )

    lewis_hub.calibrate(recipe(guided), tmp_path / "importance")
    published = lewis_hub.stream(recipe(guided), lewis_hub.open_target(asked), tmp_path / "work")

    assert published.changed
    path = api.hf_hub_download(asked.repo, "lewis/generated.jsonl")
    own = (tmp_path / "importance" / "generated.jsonl").read_bytes()
    assert Path(path).read_bytes() == own
