"""Token embeddings that are fitted by how often each expert's texts have each token, on the zoo."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from statistical_merges import MODELS, NORM, Q, Recorder, merge, recipe, weights, zoo_weights
from transformers import AutoTokenizer

import lewis_hub
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.workflow.examine import measurement_of
from lewis_hub.workflow.token_shares import shares

TABLE = "model.embed_tokens.weight"
METHOD = "merge_method: regmean\nparameters: {inputs: INPUTS, embeddings: true}\n"


def of(inputs, text=METHOD):
    return MODELS + text.replace("INPUTS", inputs)


def counted(skill, indices):
    """Token -> how often the texts have it, counted one by one."""
    tokenizer = AutoTokenizer.from_pretrained(zoo_folder() / "base")
    lines = (zoo_folder() / "data" / skill / "train.jsonl").read_text().splitlines()
    items = [json.loads(lines[index]) for index in indices]
    texts = ["Question: {question}\nAnswer: {answer}".format(**item) for item in items]
    return Counter(one for text in texts for one in tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    "inputs",
    ["own", *(pytest.param(n, marks=pytest.mark.slow) for n in ("merged", "merged_block"))],
)
def test_a_row_is_the_mean_of_the_experts_by_their_counts_of_its_token(api, tmp_path, inputs):
    output = merge(tmp_path / "out", of(inputs))

    found = weights(output)[TABLE].float()
    lock = json.loads((output / "lewis" / "lock.json").read_text())
    rows = [one["rows"] for one in lock["calibration"]]
    counts = [counted(s, r) for s, r in zip(("reverse", "cipher"), rows, strict=True)]
    totals = [sum(one.values()) for one in counts]
    experts = [zoo_weights(f"expert-{skill}")[TABLE] for skill in ("reverse", "cipher")]
    seen = counts[0].keys() | counts[1].keys()
    assert 10 < len(seen) < len(found)
    assert counts[0] != counts[1]
    for token, row in enumerate(found):
        first, second = (one[token] / n for one, n in zip(counts, totals, strict=True))
        if token not in seen:
            first = second = 1.0
        expected = (first * experts[0][token] + second * experts[1][token]) / (first + second)
        torch.testing.assert_close(row, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_the_rest_is_as_without_it_but_for_what_reads_the_embeddings(api, tmp_path):
    own = [weights(merge(tmp_path / n, of("own", t))) for n, t in variants_of(METHOD)]
    merged = [weights(merge(tmp_path / f"m{n}", of("merged", t))) for n, t in variants_of(METHOD)]

    changed = {name for name in own[0] if not torch.equal(own[0][name], own[1][name])}
    assert changed == {TABLE}
    assert not torch.equal(merged[0][Q], merged[1][Q])
    assert torch.equal(merged[0][NORM], merged[1][NORM])


def variants_of(text):
    return [("with", text), ("without", text.replace(", embeddings: true", ""))]


@pytest.mark.slow
def test_a_fit_that_was_interrupted_comes_out_the_same_and_can_be_made_again(api, tmp_path):
    whole = merge(tmp_path / "whole", of("merged"))
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", of("merged"), progress=Recorder("Fitting block by block", 300))

    found = weights(merge(tmp_path / "out", of("merged")))

    assert all(torch.equal(found[name], tensor) for name, tensor in weights(whole).items())
    verdict = lewis_hub.verify(lewis_hub.ModelReference(name=str(whole)), rebuild=True)
    assert verdict.problems == ()


def test_where_no_table_is_asked_for_by_its_name_nothing_is_fitted_and_this_is_said(api, tmp_path):
    none = METHOD.replace("true", "[{filter: norm, value: true}]")
    said = Recorder()

    output = merge(tmp_path / "out", of("own", none), progress=said)

    assert (
        "`embeddings` has no effect: no tensor is known by its name as token embeddings."
        in said.said
    )
    plain = merge(tmp_path / "plain", of("own", METHOD.replace(", embeddings: true", "")))
    assert torch.equal(weights(output)[TABLE], weights(plain)[TABLE])


def test_the_share_of_a_token_is_of_all_tokens_of_all_texts():
    texts = CalibrationTokens(((3, 1, 3), (1,), (3,)), (0, 1, 2), 3, 0, 0, "tiny")

    found = shares(texts, 5)

    assert found.shape == (5, 1, 1)
    assert found.flatten().tolist() == pytest.approx([0.0, 0.4, 0.0, 0.6, 0.0])


def test_the_memory_of_a_table_is_counted_where_it_is_fitted():
    asked = [measurement_of(recipe(of("own", text))).moments for _, text in variants_of(METHOD)]

    assert [one.fits_tables for one in asked] == [True, False]
