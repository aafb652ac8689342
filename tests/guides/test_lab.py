"""On real models: SmolLM2-135M-Instruct and an expert of it, where there are any."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import published
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lewis_hub.guides import activations, by_block, reference
from lewis_hub.guides.lewis import lewis_reference
from lewis_hub.guides.registry import Statistics
from lewis_hub.guides.threads import threads
from lewis_hub.guides.tokens import CalibrationTokens
from lewis_hub.guides.weights import in_folder

MODELS, LAB = os.environ.get("LEWIS_HUB_MODELS"), os.environ.get("LEWIS_HUB_LAB")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODELS and LAB), reason="LEWIS_HUB_MODELS and LEWIS_HUB_LAB say where"),
]


def nothing(_: int) -> None:
    pass


@pytest.fixture
def folders() -> dict[str, Path]:
    return {name: Path(MODELS or "") / name for name in ("base", "expert-math")}


@pytest.fixture
def texts() -> list[str]:
    with (Path(LAB or "") / "data/gsm8k/train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 3)]
    return [f"{row['question']} {row['answer']}" for row in rows]


@pytest.fixture
def tokens(folders, texts) -> CalibrationTokens:
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    ids = tuple(map(tuple, tokenizer(texts)["input_ids"]))
    end = tokenizer.eos_token_id
    return CalibrationTokens(ids, (0, 1, 2), 3, 0, 0, "base", published.N_TOKENS, end)


def test_the_reference_finds_what_the_published_procedure_does(folders, texts, tokens):
    ours, theirs = {}, {}
    for role, folder in folders.items():
        [ours[role]] = reference.measure(folder, role, [tokens], "cpu", nothing)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = published.importance(model, published.padded(str(folder), texts))
        theirs[role] = {f"model.layers.{name}": one for name, one in found.items()}
        assert ours[role] == pytest.approx(theirs[role], rel=1e-4)

    measured = ({"lewis_reference": ours[role]} for role in ("base", "expert-math"))
    densities = lewis_reference(Statistics(tuple(ours["base"]), *measured), 0.3, 0.8)

    short = [
        {name.removeprefix("model.layers."): one for name, one in theirs[role].items()}
        for role in ("base", "expert-math")
    ]
    shares = {n: round(share, 5) for n, share in published.differences(*short).items()}
    least, most = min(shares.values()), max(shares.values())
    expected = {
        f"model.layers.{n}": 0.3 + 0.5 * (share - least) / (most - least)
        for n, share in shares.items()
    }
    assert dict(densities) == pytest.approx(expected, abs=5e-4)


def test_importance_is_the_same_block_by_block_and_on_any_number_of_threads(folders, tokens):
    folder = folders["base"]
    [expected] = activations.measure(folder, "base", [tokens], "cpu", nothing)

    for n_threads in (1, 2, 4):
        with threads(n_threads):
            [found] = by_block.measure(in_folder("base", folder), [tokens], "cpu", nothing)
        assert found == expected
