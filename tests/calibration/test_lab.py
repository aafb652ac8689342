"""On real models: SmolLM2-135M-Instruct and an expert of it, where there are any."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import published
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lewis_hub.calibration.measure import measure_inputs
from lewis_hub.calibration.reference import measure_reference
from lewis_hub.calibration.subject import Snapshot, in_folder
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.guides.lewis import lewis, lewis_reference
from lewis_hub.guides.registry import Measurements
from lewis_hub.methods.numerics import torch_threads

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


def in_span(shares: dict[str, float]) -> dict[str, float]:
    """The lowest at 0.3, the highest at 0.8."""
    least, most = min(shares.values()), max(shares.values())
    return {name: 0.3 + 0.5 * (one - least) / (most - least) for name, one in shares.items()}


def by_component(base: dict[str, float], expert: dict[str, float]) -> dict[str, float]:
    short = [
        {name.removeprefix("model.layers."): value for name, value in one.items()}
        for one in (base, expert)
    ]
    return {f"model.layers.{name}": one for name, one in published.differences(*short).items()}


def naive_importance(folder: Path, tokens: CalibrationTokens) -> dict[str, float]:
    """DESIGN's definition: texts alone, each as long as it is; sums and norms are float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    modules = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }
    squares = dict.fromkeys(modules, torch.zeros(()))
    for path, module in modules.items():

        def see(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            squares[path] = squares[path] + args[0][0].double().square().sum(dim=0)

        module.register_forward_pre_hook(see)
    with torch.no_grad():
        for ids in tokens.ids:
            model(torch.tensor([ids]))
    return {
        path: float((module.weight.detach().double() ** 2 @ squares[path]).sum() / tokens.n_tokens)
        ** 0.5
        for path, module in modules.items()
    }


def test_importance_and_densities_are_those_of_the_definition(folders, tokens):
    ours, expected = {}, {}
    for role, folder in folders.items():
        [ours[role]] = measure_inputs(Snapshot(role, folder), [tokens], "cpu", nothing)
        expected[role] = naive_importance(folder, tokens)
        assert ours[role] == pytest.approx(expected[role], rel=1e-6)

    measured = ({"lewis": ours[role]} for role in ("base", "expert-math"))
    densities = lewis(Measurements(tuple(ours["base"]), *measured), 0.3, 0.8)

    assert len(densities) == 210  # 7 matrices in each of 30 blocks
    shares = by_component(expected["base"], expected["expert-math"])
    assert dict(densities) == pytest.approx(in_span(shares), abs=6e-5)  # 4 decimals


def test_the_reference_finds_what_the_published_procedure_does(folders, texts, tokens):
    """To the last bit: one that differs prunes otherwise, and that grows to per cents."""
    ours, theirs = {}, {}
    with torch_threads(1):
        for role, folder in folders.items():
            [ours[role]] = measure_reference(Snapshot(role, folder), [tokens], "cpu", nothing)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            found = published.importance(model, published.padded(str(folder), texts))
            theirs[role] = {f"model.layers.{name}": one for name, one in found.items()}
            assert ours[role] == theirs[role]

    measured = ({"lewis_reference": ours[role]} for role in ("base", "expert-math"))
    densities = lewis_reference(Measurements(tuple(ours["base"]), *measured), 0.3, 0.8)

    shares = by_component(theirs["base"], theirs["expert-math"])
    rounded = {name: round(share, 5) for name, share in shares.items()}
    assert dict(densities) == pytest.approx(in_span(rounded), abs=6e-5)  # 4 decimals


def test_the_reference_is_the_same_on_any_number_of_threads(folders, tokens):
    found = []
    for n_threads in (1, 2):  # of more, `whole_shares` takes 2: a width is 576
        with torch_threads(n_threads):
            found += measure_reference(Snapshot("base", folders["base"]), [tokens], "cpu", nothing)

    assert found[0] == found[1]


def test_importance_is_the_same_block_by_block_and_on_any_number_of_threads(folders, tokens):
    folder = folders["base"]
    [expected] = measure_inputs(Snapshot("base", folder), [tokens], "cpu", nothing)

    for n_threads in (1, 2, 4):
        with torch_threads(n_threads):
            [found] = measure_inputs(in_folder("base", folder), [tokens], "cpu", nothing)
        assert found == expected
