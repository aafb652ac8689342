"""What the protocol concludes from: its cells, items, recipes, experts and statistics."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from answers import Text, load, texts
from protocol_bootstrap import (
    Place,
    difference,
    estimate,
    gap_closed,
    lower_loss,
    mean_and_worst,
    p_value,
    resampled,
)
from protocol_cells import Cell, Cost, Estimate, Result, Scores, Store, cells
from protocol_methods import METHODS, Inputs, recipe
from protocol_tables import tables
from protocol_tasks import (
    FAMILIES,
    POOL,
    SMOKE,
    SPLITS,
    calibration_items,
    drawn,
    items_file,
    kind_of,
    write_items,
)
from protocol_train import answer_loss, train_expert
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.recipe.read import parse_recipe

SMALLEST = FAMILIES[0]


def place(losses, family="a", tasks=1, texts=1) -> Place:
    losses = np.array(losses, dtype=float)
    return Place(family, tasks, texts, losses, np.full(losses.shape[1], True))  # noqa: FBT003


def items(*means: float) -> list[list[list[float]]]:
    """Rows of one task with two equal items."""
    return [[[mean, mean]] for mean in means]


def test_the_gap_closed_is_the_share_of_what_task_arithmetic_loses():
    # two tasks: task arithmetic loses 0.4 and 0.2; the method loses 0.1 and 0.3
    losses = np.array([[1.4, 0.7], [1.0, 0.5], [1.1, 0.8]])

    assert gap_closed(losses).tolist() == pytest.approx([0.75, -0.5])
    assert mean_and_worst(losses, np.array([True, True])).tolist() == pytest.approx([0.125, -0.5])
    assert mean_and_worst(losses, np.array([True, False])).tolist() == pytest.approx([0.75, 0.75])


def test_items_of_all_methods_are_drawn_together():
    # the method is better by exactly 0.1 on every item, however much items differ
    rng = np.random.default_rng(0)
    own = rng.random((1, 50))
    losses = np.stack([own, own + 0.1])

    found = estimate([place(losses)], lower_loss, 99)[0]

    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert p_value([place(losses)], lower_loss, 99) == pytest.approx(2 / 100)


def test_the_spread_over_items_is_their_standard_error():
    rng = np.random.default_rng(0)
    other = rng.normal(size=400)
    losses = np.stack([np.zeros((1, 400)), other[None]])

    drawn_means = resampled([place(losses)], lower_loss, 800)[:, 0]

    assert drawn_means.std() == pytest.approx(other.std() / math.sqrt(400), rel=0.1)


def test_families_are_drawn_before_what_is_in_them():
    # no item, text or task differs within a family: only families vary
    same = [place(items(1, 0, gap), "a", t, c) for gap in (0.2,) for t in (1, 2) for c in (1, 2)]
    places = [*same, place(items(1, 0, 0.8), "b")]

    found = resampled(places, mean_and_worst, 800)[:, 0]

    # 1 - 0.2 twice, one of each, 1 - 0.8 twice, with chances 1/4, 1/2, 1/4
    values, counts = np.unique(found.round(6), return_counts=True)
    assert values.tolist() == [0.2, 0.5, 0.8]
    assert (counts / len(found)).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.06)
    assert estimate(places, mean_and_worst, 9)[0].value == pytest.approx(0.5)


def test_a_difference_of_two_methods_is_that_of_their_gaps():
    assert difference(np.array([[1.0], [0.0], [0.1], [0.4]]), np.array([True])) == pytest.approx(
        [0.3]
    )


def test_cells_run_from_the_smallest_family_with_two_experts_and_first_draws():
    found = cells(FAMILIES)

    assert str(found[0]) == "smollm2-135m/n2/tasks1/texts1/experts"
    assert [c.n for c in found if c.method == "ours"][:5] == [2, 4, 8, 16, 2]
    assert {c.family for c in found if c.n == 16} == {"smollm2-135m"}
    assert {c.texts for c in found if c.method == "ties"} == {1}
    assert {c.texts for c in found if c.method == "fine_tuning"} == {1, 2, 3}
    assert {c.method for c in found if c.n == 1} == {"lewis_alone", "uniform_alone"}
    assert len(set(map(str, found))) == len(found)
    assert [str(c) for c in cells(FAMILIES, "qwen*/n8/tasks3/texts2/ours")] == [
        "qwen2.5-0.5b/n8/tasks3/texts2/ours"
    ]


def test_more_experts_contain_the_fewer_ones_and_draws_differ():
    for draw in (1, 2, 3):
        eight = drawn(SMALLEST, 8, draw)
        assert drawn(SMALLEST, 2, draw) == eight[:2]
        assert len(set(eight)) == 8
    assert len({drawn(SMALLEST, 2, draw) for draw in (1, 2, 3)}) == 3
    assert set(drawn(SMALLEST, 16, 1)) == set(POOL)
    kinds = [[kind_of(t, d, "ab") for t in "ab"] for d in (1, 2, 3)]
    assert kinds == [["full", "full"], ["lora", "lora"], ["full", "lora"]]


def test_no_question_is_in_two_splits_and_calibration_draws_from_training_items(tmp_path):
    write_items(tmp_path, "reverse")
    whole = {s: _read(items_file(tmp_path, "reverse", s)) for s in SPLITS}

    assert {s: len(rows) for s, rows in whole.items()} == SPLITS
    questions = [row["question"] for rows in whole.values() for row in rows]
    assert len(set(questions)) == len(questions)
    first = _read(calibration_items(tmp_path, "reverse", 32, 1))
    second = _read(calibration_items(tmp_path, "reverse", 32, 2))
    assert len(first) == 32
    assert first != second
    assert all(row in whole["train"] for row in [*first, *second])


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.merge])
def test_every_recipe_is_one_that_the_package_reads(name):
    given = Inputs(
        Path("/base"), [Path("/a"), Path("/b")], [Path("/a.jsonl"), Path("/b.jsonl")], 64
    )
    method = METHODS[name]

    read = parse_recipe(json.dumps(recipe(method, given, method.grid[-1], [0.4, 0.8])), "r.yaml")

    assert read.merge_method == method.merge
    has_texts = [model.calibration is not None for model in read.models]
    assert has_texts == [method.texts in ("own", "prompts", "sampled")] * 2
    if name == "wudi_ridge":  # its anchor is task arithmetic by the mean of the best weights
        assert read.parameters["anchor_scale"] == pytest.approx(0.6)
    if name == "task_arithmetic":
        assert [model.parameters["weight"] for model in read.models] == [0.4, 0.8]


@pytest.mark.slow  # the first optimizer of a process imports half of torch
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_expert_differs_from_its_base_in_the_matrices_of_the_blocks_alone(kind, tmp_path):
    disable_progress_bar()
    base = zoo_folder() / "base"
    how = replace(SMOKE.training, n_steps=2, batch=4, lora_rank=2)
    asked = texts(base, [{"question": f"reverse {w}", "answer": w[::-1]} for w in WORDS])
    train_expert(base, asked, kind, how, tmp_path, "cpu")

    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")

    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {n for n, t in before.items() if ".layers." in n and t.dim() == 2}
    if kind == "lora":  # bfloat16 rounds: two singular values are far above the rest
        name = "model.layers.0.mlp.down_proj.weight"
        update = after[name].float() - before[name].float()
        values = torch.linalg.svdvals(update)
        assert values[1] > 3 * values[2]


WORDS = ("BAKOT", "OZUN", "TILEP", "RAMUS")


def test_the_loss_of_answers_is_that_of_each_text_alone():
    base = zoo_folder() / "expert-reverse"
    asked = texts(base, [{"question": f"reverse {w}", "answer": w[::-1]} for w in WORDS])
    model = load(base, "float32")

    with torch.no_grad():
        together = float(answer_loss(model, asked))
        alone = [(float(answer_loss(model, [one])), _n_answer(one)) for one in asked]

    n_tokens = sum(n for _, n in alone)
    assert together == pytest.approx(sum(x * n for x, n in alone) / n_tokens, abs=0.02)  # bfloat16


def _n_answer(text: Text) -> int:
    return len(text.tokens) - text.start


def result(method, losses, cell=None, **more) -> Result:
    cell = cell or Cell(SMALLEST.name, 2, 1, 1, method)
    scores = Scores({"x": losses, "y": losses}, {"x": [1.0, 0.0], "y": [0.0, 0.0]}, [3.0], {})
    return Result(cell, scores, more, Cost(10.0, 5.0, 2_000_000_000), 30.0, {})


def test_stored_cells_are_read_again_and_make_the_tables(tmp_path):
    store = Store(tmp_path)
    stored = {"task_arithmetic": 1.0, "experts": 0.5, "ours": 0.55, "ties": 1.1, "base": 3.0}
    for method, loss in stored.items():
        store.write(result(method, [loss, loss]))

    assert store.read(Cell(SMALLEST.name, 2, 1, 1, "ours")) == result("ours", [0.55, 0.55])
    lines = tables(store, FAMILIES, 200).splitlines()

    assert lines[0] == f"5 of {len(cells(FAMILIES))} cells of the protocol are stored."
    gap = "0.90 [0.90, 0.90]"
    assert f"| ours | 1 | {gap} | {gap} | 0.250 | +0.0 % |  | 10 | 2,000 MB |" in lines
    assert "| ours | ties | 2 | 1 | 1.10 [1.10, 1.10] | 0.338 |" in lines  # 34 * 2 / 201
    assert any(line.startswith("2 of the 34 tests can be made;") for line in lines)
    assert f"| gap closed, own texts, N = 2 | 0.97 | {gap} | no |" in lines
    assert "| gap closed, prompts alone, N = 8 | 0.90 |  | not measured |" in lines


def test_what_is_left_is_estimated_from_the_cells_that_are_stored(tmp_path):
    store = Store(tmp_path)
    store.write(result("ours", [0.5, 0.5]))  # 30 core-seconds with two experts
    left = [Cell(SMALLEST.name, 8, 1, 1, "ours"), Cell(SMALLEST.name, 8, 1, 1, "ties")]

    found = Estimate(store, FAMILIES, left, [])

    assert found.of(left[0]) == pytest.approx(8 * 15)
    assert found.of(left[1]) == 8 * METHODS["ties"].cost_s
    assert found.lines()[-1] == "Guessed, since nothing of it is stored yet: ties."


@pytest.mark.slow
def test_the_whole_protocol_runs_on_the_tiny_models_and_goes_on_where_it_ended(tmp_path):
    command = [sys.executable, "benchmarks/protocol.py", str(tmp_path), "--smoke"]
    first = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    again = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout

    assert "trained full-reverse" in first
    assert "zoo/n2/tasks1/texts1/distillation_10: " in first
    assert "zoo/n1/tasks1/texts1/uniform_alone: " in first
    tables_of_first = first[first.index("### 2 experts") :]
    assert again.endswith(tables_of_first)
    assert "core-seconds)" not in again
    rows = {line.split(" | ")[0].lstrip("| "): line for line in tables_of_first.splitlines()}
    assert float(rows["ours"].split(" | ")[2].split()[0]) > 0.8  # of the gap


def _read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
