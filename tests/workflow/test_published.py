"""From a recipe to the files: `lewis_reference` finds what the published procedure does."""

from __future__ import annotations

import json

import published
import pytest
import reference_procedure
import torch
import yaml
from architectures import CAUSAL, TEXTS, Case, build
from transformers import AutoModelForCausalLM

import lewis_hub

N_TOKENS = 12  # of every text, once padded


@pytest.fixture
def tiny(tmp_path):
    build(Case("llama", CAUSAL), tmp_path)
    return tmp_path


@pytest.fixture
def found(tiny):
    """The files' numbers, on all the texts that there are."""
    data = {"dataset": str(tiny / "texts.jsonl"), "text": "{text}", "samples": len(TEXTS)}
    asked = {
        "base_model": str(tiny / "base"),
        "models": [{"model": str(tiny / "one")}],
        "merge_method": "ties",
        "guide": {"name": "lewis_reference", "calibration": {**data, "max_tokens": N_TOKENS}},
    }
    path = tiny / "recipe.yaml"
    path.write_text(yaml.safe_dump(asked))
    output = lewis_hub.calibrate(lewis_hub.read_recipe(path), tiny / "measured").output
    return {
        name: json.loads((output / f"{name}.json").read_text())
        for name in ("importance", "density")
    }


@pytest.fixture
def texts(tiny, monkeypatch):
    """In the order of the file, padded with the end of the sequence; made without our code."""
    monkeypatch.setattr(published, "N_TOKENS", N_TOKENS)
    return published.padded(str(tiny / "base"), TEXTS)


def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_importance_and_densities_are_those_of_the_loops(tiny, found, texts):
    base, expert = (
        reference_procedure.importance(model(tiny / name), texts) for name in ("base", "one")
    )

    measured = [one["modules"] for one in found["importance"]["sources"]]
    assert measured == [pytest.approx(base, rel=1e-4), pytest.approx(expert, rel=1e-4)]
    [scheduled] = found["density"]["experts"]
    assert {
        name.removesuffix(".weight"): density for name, density in scheduled["tensors"].items()
    } == pytest.approx(reference_procedure.densities(base, expert, 0.3, 0.8), abs=5e-4)


def test_importance_is_the_published_procedures_to_the_last_bit(tiny, found, texts):
    """Texts in another order have other means, which are running ones in float32."""
    for measured, name in zip(found["importance"]["sources"], ("base", "one"), strict=True):
        theirs = published.importance(model(tiny / name), texts)

        assert measured["modules"] == {f"model.layers.{at}": one for at, one in theirs.items()}


def test_what_counted_is_told(found):
    for measured in found["importance"]["sources"]:
        assert measured["n_tokens"] == len(TEXTS) * N_TOKENS  # padding too
        assert measured["calibration"]["n_tokens"] == 44  # of the texts
