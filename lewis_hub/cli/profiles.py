"""The commands `importance` and `compare`."""

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
N_SHOWN = 20  # modules in a table; --json contains all


@click.command(
    epilog="\b\nExamples:\n  lewis-hub importance recipe.yaml -o profile\n"
    "  lewis-hub importance me/math --task gsm8k --samples 64\n"
    '  lewis-hub importance me/math --dataset openai/gsm8k --config main --text "{question}"'
)
@click.argument("recipe_or_model", metavar="[RECIPE | MODEL]", default="recipe.yaml")
@click.option(
    "--dataset", help="For MODEL: dataset repo, repo@revision, or a .jsonl or .parquet file."
)
@click.option("--config", help="Configuration (subset) of the dataset.")
@click.option(
    "--text",
    type=Template(),
    help="Template over the dataset's columns: `{question} {answer}`; \\n is a line break.",
)
@click.option("--messages", help="Column with chat messages, instead of --text.")
@click.option("--task", help="For MODEL: lm-eval task whose items and prompts are the texts.")
@click.option("--include", help="Folder with your own lm-eval task files.")
@click.option(
    "--chat-template",
    is_flag=True,
    default=None,
    help="Format the task's prompts with the model's chat template.",
)
@click.option("--split", help="Split to sample from. [default: train]")
@click.option(
    "--samples", type=click.IntRange(min=1), help="Number of rows to sample. [default: 15]"
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Maximum length of a text. [default: 512]"
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Seed for sampling the rows. [default: 42]"
)
@output_option(
    "Folder for the profile. [default: importance/ beside the recipe, or in this folder]"
)
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
    """Calibrate the models of a recipe, or one model.

    A YAML file is a recipe: this writes importance.json, density.json and their plots. Any other
    argument is a model (repo, repo@revision or folder): this calibrates it on a dataset or task,
    and writes importance.json and its plot.
    """
    from lewis_hub.workflow.resources import Execution

    settings = {name: value for name, value in data.items() if value is not None}
    execution = Execution(
        device=device,
        max_memory_bytes=max_memory,
        allow_pickle=allow_pickle,
        allow_code=allow_code_execution,
    )
    path = Path(recipe_or_model)
    if path.suffix not in RECIPES and not path.is_file():
        output = output or Path("importance")
        settings["allow_overlap"] = allow_overlap
        seed = 42 if seed is None else seed
        _calibrate_model(terminal, recipe_or_model, settings, seed, execution, output)
        return
    if settings or seed is not None:
        raise click.UsageError(
            f"{path} is a recipe, and a recipe contains its calibration data and seed. "
            "Remove these options, or name a model instead of the recipe."
        )
    output = output or path.parent / "importance"
    _calibrate_recipe(terminal, path, execution, output, allow_overlap=allow_overlap)


def _calibrate_recipe(
    terminal: Terminal, path: Path, execution: Any, output: Path, *, allow_overlap: bool
) -> None:
    from lewis_hub.workflow.resolve import allowing_overlap, read_recipe

    recipe = read_recipe(path)
    if allow_overlap:
        recipe = allowing_overlap(recipe)
    from lewis_hub import pipeline
    from lewis_hub.cli.tables import density_table

    calibrated = pipeline.calibrate(recipe, output, execution, terminal.progress)
    schedule = json.loads(calibrated.schedule.to_json())
    document = {"status": "calibrated", "output": str(calibrated.output), "density": schedule}
    terminal.finish(document, density_table(calibrated), f"Wrote {calibrated.output}")


def _calibrate_model(
    terminal: Terminal,
    model: str,
    settings: dict[str, Any],
    seed: int,
    execution: Any,
    output: Path,
) -> None:
    from pydantic import ValidationError

    from lewis_hub.cli.tables import importance_table
    from lewis_hub.recipe.schema import Calibration
    from lewis_hub.workflow.single_model import measure_model

    try:
        calibration = Calibration.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise click.UsageError(
            f"{model} is not a YAML file, so it is taken as a model: {problem}"
        ) from None
    measured = measure_model(model, calibration, output, execution, terminal.progress, seed=seed)
    document = {"status": "calibrated", "output": str(output)}
    document |= {"importance": json.loads(measured.to_json())}
    terminal.finish(document, importance_table(measured, N_SHOWN), f"Wrote {output}")


@click.command(
    epilog="\b\nExamples:\n  lewis-hub compare importance/ other/importance.json\n"
    "  lewis-hub compare me/my-merge@v1 me/my-merge@v2"
)
@click.argument("before")
@click.argument("after")
@output_option("Folder for the plots.", default="comparison")
@terminal_options
def compare(terminal: Terminal, before: str, after: str, output: Path) -> None:
    """Compare two importance profiles.

    This prints tables and rank correlations, and draws plots. A profile is an importance.json, a
    folder that contains one, or the repo of a merge. Sources that are in both profiles are
    compared. If each profile has one source, these two are compared.
    """
    from lewis_hub.cli.tables import comparison_table
    from lewis_hub.files import require_writable
    from lewis_hub.report.plots import draw_comparisons
    from lewis_hub.report.profiles import compare_profiles
    from lewis_hub.workflow.single_model import read_profile

    require_writable(output)
    compared = compare_profiles(read_profile(before), read_profile(after))
    plots = draw_comparisons(compared, output)
    document = {
        "status": "compared",
        "output": str(output),
        "comparisons": [comparison.to_json() for comparison in compared],
        "plots": list(plots),
    }
    shown = [part for pair in compared for part in comparison_table(pair, N_SHOWN)]
    terminal.finish(document, *shown, f"Wrote to {output}: {', '.join(plots)}" if plots else "")
