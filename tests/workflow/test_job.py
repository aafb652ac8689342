"""The recipe is compiled once: what takes it, where a job is made, and what a job answers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from zoo_hub import put_zoo

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import Silent
from lewis_hub.errors import SourceError
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.job import prepare
from lewis_hub.workflow.resources import Execution

PACKAGE = Path(lewis_hub.__file__).parent
# They read a recipe, or answer questions about it; every other module takes values of a job.
BORDER = {
    *("pipeline.py", "workflow/resolve.py", "workflow/examine.py", "workflow/job.py"),
    *("workflow/adapters.py", "workflow/mixture.py", "workflow/parts.py", "workflow/steps.py"),
    *("workflow/single_model.py", "workflow/snapshot.py"),
    *("tune/run.py", "tune/space.py"),
}
RECIPE = """base_model: zoo/base
models: [{model: zoo/expert-reverse}, {model: zoo/expert-cipher}]
merge_method: ties
parameters: {density: 0.5}
"""


def parameters(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                if argument.annotation:
                    yield node.name, ast.unparse(argument.annotation)


def test_only_the_border_takes_a_recipe():
    taking = {
        str(file.relative_to(PACKAGE))
        for package in ("workflow", "tune", "report", "evaluate", "merge", "calibration", "guides")
        for file in (PACKAGE / package).glob("*.py")
        for _, annotation in parameters(file)
        if annotation.split(" | ")[0] in ("Recipe", "Sequence[Recipe]")
    }

    assert taking <= BORDER


def test_a_job_is_made_at_one_place():
    made = [
        file.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "MergeJob"
    ]

    assert made == ["job.py"]


@pytest.fixture
def job(hub):
    put_zoo(hub)

    def make(text, recipe=RECIPE, **execution):
        recipe = parse_recipe(recipe + text, "recipe.yaml")
        return prepare(recipe.placed_in(zoo_folder()), Execution(**execution), hub.api(), Silent())

    return make


def test_a_plain_merge_measures_and_scores_nothing(job):
    plain = job("")

    assert (plain.guide, plain.statistics, plain.evaluation, plain.held_out) == (None,) * 4
    assert plain.texts.calibrations == ()
    assert [one.role for one in plain.sources.models] == ["base", "expert", "expert"]
    assert plain.disk_needs().statistics_bytes == 0
    assert plain.planned.outputs == {}


@pytest.mark.parametrize(
    ("first", "other"), [("zoo/base", "zoo/base@main"), ("./expert-cipher", "expert-cipher/")]
)
def test_a_model_by_two_names_is_not_merged_twice(job, first, other):
    models = f"[{{model: zoo/expert-reverse}}, {{model: {first}}}, {{model: {other}}}]"
    recipe = f"base_model: zoo/base\nmodels: {models}\nmerge_method: model_stock\n"

    with pytest.raises(SourceError, match=f"it is `{first}` by another name"):
        job("", recipe)
    job("", recipe.replace(f", {{model: {other}}}", "").replace("model_stock", "ties"))


def test_a_base_that_the_method_does_not_take_may_be_merged_by_another_name(job):
    models = "[{model: zoo/base@main}, {model: zoo/expert-cipher}]"

    job("", f"base_model: zoo/base\nmodels: {models}\nmerge_method: linear\n")


def test_a_trim_by_activation_needs_one_number_an_input_and_regmean_a_matrix(job):
    texts = 'calibration: {dataset: zoo/reverse, text: "{question}", samples: 4}\n'
    base = RECIPE.replace("density: 0.5", "density: 0.5, trim: activation")
    trimmed = job(texts, recipe=base)
    solved = job(texts, recipe=RECIPE.replace("ties", "regmean"))

    moments = [one.statistics.moments for one in (trimmed, solved)]
    assert [(one.are_solved, one.in_sequence) for one in moments] == [(False, False), (True, False)]
    assert moments[0].widest < moments[1].widest
    assert len(trimmed.texts.calibrations) == 2


def test_a_rebuild_reads_no_measurement_or_text_beside_the_recipe(job):
    guided = RECIPE.replace("parameters: {density: 0.5}", "guide: {name: magnitude}")

    usual, again = (job("", guided, measures_again=flag) for flag in (False, True))

    assert [path.name for path in usual.guide.beside] == ["importance"]
    assert (again.guide.beside, again.texts.beside) == ((), ())


def test_a_lock_does_not_change_with_the_way_that_the_work_is_done(job):
    first = job("")
    other = job("", runner="inline", max_memory_bytes=1 << 30)

    assert other.planned == first.planned
    assert other.plan == first.plan
