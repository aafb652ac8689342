"""What a search by drift refuses, from its options and models alone."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from lewis_hub.calibration.texts import CalibrationTokens, draw_rows
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import Silent
from lewis_hub.hub.resolve import resolve_dataset
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.recipe.schema import Calibration
from lewis_hub.tune.held_out import (
    HeldOut,
    hold_out,
    length_problems,
    missing_problems,
    model_problems,
    option_problems,
)
from lewis_hub.tune.objective import LOOKED_AT, Search
from lewis_hub.tune.space import declared_calibrations
from lewis_hub.workflow.resolve import resolve_one
from lewis_hub.workflow.texts import TextSettings

TEXTS = "{dataset: o/data, text: '{question}'}"


def examined(translation=None, alignment=None, config=None):
    donor = SimpleNamespace(name="o/base", config={"vocab_size": 97} | (config or {}))
    experts = (SimpleNamespace(name="o/one", translation=translation),)
    sources = SimpleNamespace(donor=donor, experts=experts)
    return SimpleNamespace(sources=sources, tokens=SimpleNamespace(alignment=alignment))


def parsed(models, more=""):
    return parse_recipe(
        f"base_model: o/base\nmodels: [{models}]\nmerge_method: ties\n{more}", "recipe.yaml"
    )


def test_options_that_choose_how_answers_are_scored_are_refused_together():
    asked = Search(objective="drift", metric="acc,none", tasks=("one",), split="train")

    assert [*option_problems(asked)] == [
        "--metric, --task, --split choose how answers are scored, but drift is measured on "
        "calibration texts without answers. Leave it out, or search by `--objective answers`."
    ]
    assert [*option_problems(Search(objective="drift", samples=5))] == []


@pytest.mark.parametrize(
    ("known", "named"),
    [
        ({"translation": object()}, "o/one: its tokens have other ids than those of o/base"),
        ({"alignment": object()}, "the merge: its tokens have other ids than those of o/base"),
        ({"config": {"vocab_size": None}}, "o/base: its config.json has no `vocab_size`"),
        ({"config": {"is_encoder_decoder": True}}, "o/base is an encoder-decoder"),
    ],
)
def test_models_whose_predictions_cannot_be_compared_are_refused(known, named):
    (problem,) = model_problems(examined(**known))

    assert problem.startswith(named)
    assert problem.endswith("Search by `--objective answers`.")
    assert [*model_problems(examined())] == []


def test_texts_that_are_longer_than_the_models_read_are_refused():
    ((_, calibration),) = declared_calibrations(
        parsed("{model: o/one}", f"guide: {{calibration: {TEXTS}}}")
    )
    tokens = CalibrationTokens(((1, 2), tuple(range(65))), (0, 1), 2, 0, 0, "o/base")
    known = HeldOut({}, {calibration: tokens}, ())
    donor = examined(config={"max_position_embeddings": 64}).sources.donor
    unlimited = examined(config={"max_position_embeddings": -1}).sources.donor

    assert [*length_problems(donor, known)] == [
        "calibration on o/data: a text has 65 tokens, but o/base has 64 positions. "
        "Set `max_tokens: 64`, or less."
    ]
    assert [*length_problems(unlimited, known)] == []


def test_each_expert_has_its_own_texts_or_those_of_the_guide_and_all_without_are_told():
    lacking = parsed("{model: o/one}, {model: o/two}, {model: o/three, calibration: " + TEXTS + "}")
    guided = parsed("{model: o/one}", f"guide: {{calibration: {TEXTS}}}")

    assert [
        problem.partition(" has ")[0]
        for problem in missing_problems(declared_calibrations(lacking))
    ] == [
        "`o/one`",
        "`o/two`",
    ]
    assert [*missing_problems(declared_calibrations(guided))] == []
    assert [one for _, one in declared_calibrations(guided)] == [guided.guide.calibration]


def written(rows, folder):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def eight_besides(n_fitted, path):
    """Eight texts of a file, besides those that a merge is fitted on."""
    api, asked = HfApi(), Calibration(dataset=str(path), text="{text}", samples=n_fitted)
    donor = resolve_one(str(zoo_folder() / "base"), api)
    data = {asked: resolve_dataset(api, str(path))}
    return hold_out(TextSettings(donor, 42, False, data, (asked,)), 8, None, api, Silent())


def test_the_first_other_rows_are_held_out_however_many_are_equal(tmp_path):
    """A round for each few rows would take hours with a data set of equal ones."""
    rows = [{"text": "equal"}] * 20_000 + [{"text": f"row {n}"} for n in range(40)]
    path = written(rows, tmp_path)

    found = eight_besides(2, path)

    assert found.problems == ()
    in_order = draw_rows(len(rows), len(rows), 42)
    others = [row for row in in_order if row >= 20_000 and row not in in_order[:2]]
    assert [tokens.rows for tokens in found.held_out.values()] == [tuple(sorted(others[:8]))]


def test_of_very_many_equal_rows_not_all_are_looked_at(tmp_path):
    n_rows = LOOKED_AT + 40
    rows = [{"text": "equal"}] * n_rows
    for row in draw_rows(n_rows, n_rows, 42)[-8:]:
        rows[row] = {"text": f"row {row}"}
    path = written(rows, tmp_path)

    found = eight_besides(2, path)

    assert found.problems == (
        f"calibration on {path}, split train: 8 texts are needed to measure drift, but 0 are left "
        "besides the 2 that a merge is fitted on. Give fewer --samples, or fewer `samples` in the "
        "calibration.",
    )


def test_rows_are_held_out_beside_more_than_a_search_looks_at(tmp_path):
    n_fitted = LOOKED_AT + 8
    path = written([{"text": f"row {n}"} for n in range(n_fitted + 20)], tmp_path)

    found = eight_besides(n_fitted, path)

    assert found.problems == ()
    in_order = draw_rows(n_fitted + 20, n_fitted + 8, 42)
    assert [tokens.rows for tokens in found.held_out.values()] == [tuple(sorted(in_order[-8:]))]
