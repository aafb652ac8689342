"""Commands about models: measure, score, publish, verify, compare and extract them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

import lewis_hub
from lewis_hub.cli import options
from lewis_hub.cli.terminal import Terminal, scores_table, terminal_options
from lewis_hub.display import TextTable

if TYPE_CHECKING:
    from lewis_hub.recipe.formats import ExportFormat
    from lewis_hub.report.profiles import ProfileComparison
    from lewis_hub.workflow.verify import Verdict


RECIPES = {".yaml", ".yml"}
N_SHOWN = 20  # modules in a table; --json contains all


@click.command(
    epilog="\b\nExamples:\n  lewis-hub evaluate merged --task gsm8k --limit 100\n"
    "  lewis-hub evaluate merged --task gsm8k --backend vllm --num-fewshot 5\n"
    "  lewis-hub evaluate me/model --task gsm8k --backend local-completions \\\n"
    "    --backend-arg base_url=http://127.0.0.1:8000/v1/completions --backend-arg model=NAME"
)
@click.argument("model")
@options.repeated("--task", "tasks", required=True, help="lm-eval task; may be repeated.")
@click.option("--include", type=options.FOLDER, help="Folder with your own lm-eval task files.")
@click.option("--limit", type=options.COUNT, help="Score only the first N items of each task.")
@options.flag("--chat-template", help="Format prompts with the model's chat template.")
@options.scoring
@options.execution
@terminal_options
def evaluate(
    terminal: Terminal,
    model: str,
    tasks: tuple[str, ...],
    include: Path | None,
    limit: int | None,
    chat_template: bool,
    running: dict[str, Any],
    **given: Unpack[options.ExecutionOptions],
) -> None:
    """Score a model on lm-eval tasks.

    MODEL is a repo, repo@revision or folder. With --backend local-completions a server answers:
    MODEL only gives the tokenizer, and --backend-arg model=NAME is the server's name for it.
    """
    evaluation = options.validated(
        lewis_hub.Evaluation,
        tasks=tasks,
        include=str(include) if include else None,
        limit=limit,
        chat_template=chat_template,
        compare=(),
        **running,
    )
    execution = lewis_hub.Execution(**given)
    scores = lewis_hub.evaluate_model(model, evaluation, execution, terminal.progress)
    terminal.finish(scores.to_document(), scores_table(scores))


@click.command(
    epilog="\b\nExamples:\n  lewis-hub push merged\n"
    "  lewis-hub push merged me/my-merge --as pull-request"
)
@click.argument("folder", type=options.FOLDER)
@click.argument("repo", type=options.REPO, required=False)
@click.option(
    "--as",
    "landing",
    type=click.Choice(["commit", "pull-request"]),
    help="Publish as a commit or as a pull request. [default: the recipe's choice, else commit]",
)
@click.option("--tag", type=options.TAG, help="Tag for the new commit.")
@options.flag("--private", help="Create the repo as a private one.")
@options.flag(
    "--force", help="Push even if the quality gate refused the merge; the commit title says so."
)
@options.sign
@terminal_options
def push(
    terminal: Terminal,
    folder: Path,
    repo: str | None,
    landing: str | None,
    tag: str | None,
    private: bool,
    force: bool,
    private_key: Path | None,
) -> None:
    """Publish a merged model in one commit.

    FOLDER contains the model. Without REPO, the settings under `publish` in its recipe apply.
    """
    from lewis_hub.workflow import verify as signing
    from lewis_hub.workflow.evaluate import read_verdict
    from lewis_hub.workflow.publish import judge_folder, refused
    from lewis_hub.workflow.resolve import hub_api

    given = {"repo": repo, "as": landing, "tag": tag, "private": private or None}
    target = lewis_hub.open_target(_publishing(folder, given))
    if private_key:
        judge_folder(folder, target.asked.repo, hub_api())  # a signature covers the verdict
        signing.sign(folder, private_key)
    published = lewis_hub.publish(folder, target, terminal.progress, force=force)
    verdict = read_verdict(folder)
    proposed = verdict is not None and bool(verdict.missed) and not force
    document = published.to_json() | ({"status": "refused"} if proposed else {})
    terminal.finish(document, str(published))
    if verdict and proposed:
        terminal.refuse(refused(folder, verdict, published.url))


def _publishing(folder: Path, given: Mapping[str, str | bool | None]) -> lewis_hub.Publishing:
    """Combine the recipe's `publish` and the options; a named repo replaces all of `publish`."""
    from lewis_hub.workflow.publish import lock_in
    from lewis_hub.workflow.republish import publishing_in

    lock = None if given["repo"] else lock_in(folder)
    stated = publishing_in(lock.recipe) if lock else None
    settings = stated.model_dump(by_alias=True) if stated else {}
    settings |= {key: value for key, value in given.items() if value is not None}
    if "repo" not in settings:
        raise click.UsageError(
            f"the recipe of {folder} does not name a repo: add it as OWNER/NAME."
        )
    return lewis_hub.Publishing.model_validate(settings)


@click.command(
    epilog="\b\nExamples:\n  lewis-hub verify merged\n  lewis-hub verify me/my-merge --rebuild\n"
    "  lewis-hub verify me/my-merge --public-key key.pub"
)
@click.argument("model")
@options.flag("--rebuild", help="Repeat the merge and compare the files.")
@click.option(
    "--public-key", metavar="KEY.pub", type=options.FILE, help="Require a signature by this key."
)
@options.nan
@options.execution
@terminal_options
def verify(
    terminal: Terminal,
    model: str,
    rebuild: bool,
    public_key: Path | None,
    **given: Unpack[options.ExecutionOptions],
) -> None:
    """Check the files of a merge against its lock.

    MODEL is a folder or repo. Its lewis/lock.json contains the digest of every file.
    """
    execution, progress = lewis_hub.Execution(**given), terminal.progress
    verdict = lewis_hub.verify(model, execution, progress, rebuild=rebuild, public_key=public_key)
    document = {
        "status": "failed" if verdict.problems else "verified",
        "digest": verdict.lock.digest,
        "n_files": verdict.n_files,
        "rebuilt": rebuild,
        "signature": verdict.signature,
        "problems": list(verdict.problems),
    }
    terminal.finish(document, *_verdict_lines(verdict, rebuilt=rebuild))
    if verdict.problems:
        raise click.exceptions.Exit(1)


def _verdict_lines(verdict: Verdict, *, rebuilt: bool) -> tuple[str, ...]:
    if verdict.problems:
        return tuple(f"problem: {problem}" for problem in verdict.problems)
    rebuild = " Repeating the merge gave the same files." if rebuilt else ""
    signature = {
        "none": "The merge is not signed.",
        "unchecked": "The merge is signed: check the signature with --public-key.",
        "holds": "The signature is valid.",
    }
    files = f"{verdict.n_files} files match the lock {verdict.lock.digest[:19]}….{rebuild}"
    return files, signature[verdict.signature]


@click.command(
    epilog="\b\nExamples:\n  lewis-hub diff merged me/my-merge\n"
    "  lewis-hub diff me/my-merge@v1 me/my-merge@v2\n  lewis-hub diff me/my-merge recipe.yaml"
)
@click.argument("before")
@click.argument("after")
@terminal_options
def diff(terminal: Terminal, before: str, after: str) -> None:
    """List the differences between two merges or recipes.

    BEFORE and AFTER are folders or repos of merges, or .yaml files of recipes. Compare a merge with
    a recipe to see what a new merge would change, including changed inputs.
    """
    differences = lewis_hub.diff_merges(before, after)
    document = {"status": "differs" if differences else "same", "differences": list(differences)}
    terminal.finish(document, *differences or ("Nothing differs.",))


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
    type=options.line_breaks,
    metavar="TEXT",
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
@click.option("--samples", type=options.COUNT, help="Number of rows to sample. [default: 15]")
@click.option("--max-tokens", type=options.COUNT, help="Maximum length of a text. [default: 512]")
@click.option(
    "--seed", type=click.IntRange(min=0), help="Seed for sampling the rows. [default: 42]"
)
@options.output(
    "Folder for the profile. [default: importance/ beside the recipe, or in this folder]"
)
@options.memory
@options.overlap
@options.execution
@terminal_options
def importance(
    terminal: Terminal,
    recipe_or_model: str,
    seed: int | None,
    output: Path | None,
    device: str,
    max_memory_bytes: int | None,
    allow_code: bool,
    allow_pickle: bool,
    allow_overlap: bool,
    **data: Any,
) -> None:
    """Calibrate the models of a recipe, or one model.

    A YAML file is a recipe: this writes importance.json, density.json and their plots. Any other
    argument is a model (repo, repo@revision or folder): this calibrates it on a dataset or task,
    and writes importance.json and its plot.
    """
    settings = {name: value for name, value in data.items() if value is not None}
    execution = lewis_hub.Execution(
        device=device,
        max_memory_bytes=max_memory_bytes,
        allow_code=allow_code,
        allow_pickle=allow_pickle,
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
    recipe = options.read_recipe(path, allow_overlap=allow_overlap)
    output = output or path.parent / "importance"
    calibrated = lewis_hub.calibrate(recipe, output, execution, terminal.progress)
    schedule = json.loads(calibrated.schedule.to_json())
    document = {"status": "calibrated", "output": str(output), "density": schedule}
    terminal.finish(document, calibrated.table, f"Wrote {output}")


def _calibrate_model(
    terminal: Terminal,
    model: str,
    settings: dict[str, Any],
    seed: int,
    execution: lewis_hub.Execution,
    output: Path,
) -> None:
    from pydantic import ValidationError

    from lewis_hub.report.profiles import short_name

    try:
        calibration = lewis_hub.Calibration.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise click.UsageError(
            f"{model} is not a YAML file, so it is taken as a model: {problem}"
        ) from None
    progress = terminal.progress
    measured = lewis_hub.measure_model(model, calibration, output, execution, progress, seed=seed)
    rows = [
        (short_name(entry.source), module, f"{value:,.4g}")
        for entry in measured.sources
        for module, value in sorted(entry.modules.items(), key=lambda item: -item[1])[:N_SHOWN]
    ]
    table = TextTable(("source", "module", "importance"), tuple(rows))
    document = {"status": "calibrated", "output": str(output)}
    document |= {"importance": json.loads(measured.to_json())}
    terminal.finish(document, table, f"Wrote {output}")


@click.command(
    epilog="\b\nExamples:\n  lewis-hub compare importance/ other/importance.json\n"
    "  lewis-hub compare me/my-merge@v1 me/my-merge@v2"
)
@click.argument("before")
@click.argument("after")
@options.output("Folder for the plots.", default="comparison")
@terminal_options
def compare(terminal: Terminal, before: str, after: str, output: Path) -> None:
    """Compare two importance profiles.

    This prints tables and rank correlations, and draws plots. A profile is an importance.json, a
    folder that contains one, or the repo of a merge. Sources that are in both profiles are
    compared. If each profile has one source, these two are compared.
    """
    from lewis_hub.files import require_no_links_among, require_writable
    from lewis_hub.report.plots import MAX_MAPS, draw_comparisons

    require_no_links_among(output)
    require_writable(output)
    profiles = (lewis_hub.read_profile(before), lewis_hub.read_profile(after))
    compared = lewis_hub.compare_profiles(*profiles)
    plots = draw_comparisons(compared, output)
    document = {
        "status": "compared",
        "output": str(output),
        "comparisons": [comparison.to_json() for comparison in compared],
        "plots": list(plots),
    }
    shown: list[TextTable | str] = []
    for pair in compared:
        shown += [_comparison_table(pair), *pair.sentences]
    if len(compared) > MAX_MAPS:
        shown.append(f"Only the first {MAX_MAPS} of {len(compared):,} comparisons are drawn.")
    terminal.finish(document, *shown, f"Wrote to {output}: {', '.join(plots)}" if plots else "")


def _comparison_table(pair: ProfileComparison) -> TextTable:
    """The modules with the largest change."""
    from lewis_hub.report.profiles import short_name

    rows = []
    for row in pair.by_change[:N_SHOWN]:
        change = "-" if row.change is None else f"{row.change:+.1%}"
        numbers = (f"{row.before:,.4g}", f"{row.after:,.4g}", change)
        rows.append((short_name(pair.after), row.module, *numbers))
    return TextTable(("source", "module", "A", "B", "change"), tuple(rows))


@click.command(
    epilog="\b\nExamples:\n  lewis-hub export merged\n"
    "  lewis-hub export me/my-merge --to gguf:q8_0 -o gguf"
)
@click.argument("model")
@click.option(
    "--to", type=options.EXPORT, default="gguf", help="gguf (float16), gguf:bf16 or gguf:q8_0."
)
@options.output("Folder for the file. [default: the model's folder; for a repo this folder]")
@terminal_options
def export(terminal: Terminal, model: str, to: ExportFormat, output: Path | None) -> None:
    """Write a model as a GGUF file for llama.cpp.

    MODEL is a folder or repo. In the folder of a merge, its card and lock then name the file.
    """
    file = lewis_hub.export_model(model, to, output, terminal.progress)
    document = {"status": "exported", "output": str(file), "bytes": file.stat().st_size}
    terminal.finish(document, f"Wrote {file}")
