"""Commands about importance: measure it, compare two profiles of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lewis_hub.cli.options import (
    Template,
    code_option,
    device_option,
    memory_option,
    output_option,
    overlap_option,
    pickle_option,
)
from lewis_hub.cli.terminal import Terminal, terminal_options

RECIPES = {".yaml", ".yml"}
N_SHOWN = 20  # modules in a table; --json has them all


@click.command(
    epilog="\b\nExamples:\n  lewis-hub importance recipe.yaml -o profile\n"
    "  lewis-hub importance me/math --task gsm8k --samples 64\n"
    '  lewis-hub importance me/math --dataset openai/gsm8k --config main --text "{question}"'
)
@click.argument("recipe_or_model", metavar="[RECIPE | MODEL]", default="recipe.yaml")
@click.option("--dataset", help="For MODEL: a repo, repo@revision, or a .jsonl or .parquet file.")
@click.option("--config", help="Configuration (subset) of the dataset.")
@click.option(
    "--text",
    type=Template(),
    help="Template over the dataset's columns: `{question} {answer}`; \\n is a new line.",
)
@click.option("--messages", help="Column of chat messages instead of --text.")
@click.option("--task", help="For MODEL: an lm-eval task whose items are put through its prompt.")
@click.option("--include", help="Folder with own lm-eval task files.")
@click.option(
    "--chat-template", is_flag=True, default=None, help="Put the task's prompts through it."
)
@click.option("--split", help="Split to draw from [train].")
@click.option("--samples", type=click.IntRange(min=1), help="Rows drawn by the seed [15].")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longer texts are cut here [512].")
@click.option("--seed", type=click.IntRange(min=0), help="Of the rows that are drawn [42].")
@output_option("Folder for the profile [importance/ beside the recipe, or here].")
@device_option
@memory_option
@pickle_option
@code_option
@overlap_option
@terminal_options
def importance(
    terminal: Terminal,
    recipe_or_model: str,
    seed: int | None,
    output: Path | None,
    device: str,
    max_memory: int | None,
    allow_pickle: bool,
    allow_code_execution: bool,
    allow_overlap: bool,
    **data: Any,
) -> None:
    """Calibrate only: of a RECIPE, or of one MODEL on a dataset or task.

    A YAML file is a recipe: importance.json, density.json and their plots are written. Anything
    else is a model (a repo, repo@revision or folder): importance.json and its plot.
    """
    from lewis_hub.workflow.execution import Execution

    told = {name: value for name, value in data.items() if value is not None}
    execution = Execution(
        device=device,
        max_memory_bytes=max_memory,
        allow_pickle=allow_pickle,
        allow_code=allow_code_execution,
    )
    path = Path(recipe_or_model)
    if path.suffix not in RECIPES and not path.is_file():
        output = output or Path("importance")
        told["allow_overlap"] = allow_overlap
        _of_model(terminal, recipe_or_model, told, 42 if seed is None else seed, execution, output)
        return
    if told or seed is not None:
        raise click.UsageError(
            f"{path} is a recipe, which names its own calibration data and seed; "
            "give the data to a model."
        )
    output = output or path.parent / "importance"
    _of_recipe(terminal, path, execution, output, allow_overlap=allow_overlap)


def _of_recipe(
    terminal: Terminal, path: Path, execution: Any, output: Path, *, allow_overlap: bool
) -> None:
    from lewis_hub.workflow.read import allowing_overlap, read_recipe

    recipe = read_recipe(path)
    if allow_overlap:
        recipe = allowing_overlap(recipe)
    from lewis_hub import pipeline
    from lewis_hub.cli.tables import density_table

    calibrated = pipeline.calibrate(recipe, output, execution, terminal.progress)
    schedule = json.loads(calibrated.schedule.to_json())
    document = {"status": "calibrated", "output": str(calibrated.output), "density": schedule}
    terminal.finish(document, density_table(calibrated), f"In {calibrated.output}")


def _of_model(
    terminal: Terminal, model: str, data: dict[str, Any], seed: int, execution: Any, output: Path
) -> None:
    from pydantic import ValidationError

    from lewis_hub.cli.tables import importance_table
    from lewis_hub.recipe.schema import Calibration, ModelReference
    from lewis_hub.workflow.single_model import measure_model

    try:
        calibration = Calibration.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise click.UsageError(f"{model} is a model, not a YAML file: {problem}") from None
    reference = ModelReference.model_validate(model)
    measured = measure_model(reference, calibration, seed, output, execution, terminal.progress)
    document = {"status": "calibrated", "output": str(output)}
    document |= {"importance": json.loads(measured.to_json())}
    terminal.finish(document, importance_table(measured, N_SHOWN), f"In {output}")


@click.command(
    epilog="\b\nExamples:\n  lewis-hub compare importance/ other/importance.json\n"
    "  lewis-hub compare me/my-merge@v1 me/my-merge@v2"
)
@click.argument("before")
@click.argument("after")
@output_option("Folder for the plots [comparison/].", default="comparison")
@terminal_options
def compare(terminal: Terminal, before: str, after: str, output: Path) -> None:
    """Hold two importance profiles side by side: tables, rank correlation, plots.

    Each is an importance.json, a folder with one (a merge, or what `importance` wrote), or the repo
    of a merge. Measurements of one source are compared, or the only two that there are.
    """
    from lewis_hub.cli.tables import comparison_table
    from lewis_hub.files import require_writable
    from lewis_hub.report.plots import draw_comparisons
    from lewis_hub.report.profiles import compare_profiles
    from lewis_hub.workflow.resolve import hub_api
    from lewis_hub.workflow.single_model import read_profile

    require_writable(output)
    api = hub_api()
    compared = compare_profiles(read_profile(api, before), read_profile(api, after))
    plots = draw_comparisons(compared, output)
    document = {
        "status": "compared",
        "output": str(output),
        "comparisons": [one.to_json() for one in compared],
        "plots": list(plots),
    }
    shown = [part for one in compared for part in comparison_table(one, N_SHOWN)]
    terminal.finish(document, *shown, f"In {output}: {', '.join(plots)}" if plots else "")
