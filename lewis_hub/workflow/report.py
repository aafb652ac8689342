"""Report: plots, lock and costs of a finished merge, and what tells of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from lewis_hub.errors import PublishError
from lewis_hub.evaluate.gate import FILE as GATE
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.guides import registry as guides
from lewis_hub.hub.facts import Licence, ModelFacts, combined_licence
from lewis_hub.hub.source import Source
from lewis_hub.methods import registry
from lewis_hub.recipe.rules import fits_in_sequence
from lewis_hub.recipe.schema import Calibration, Recipe
from lewis_hub.report import leaderboards, page
from lewis_hub.report.card import model_card
from lewis_hub.report.cost import FILE as COSTS
from lewis_hub.report.cost import Costs, this_machine
from lewis_hub.report.facts import CardFacts, Guided
from lewis_hub.report.lock import FILE as LOCK
from lewis_hub.report.lock import PROVENANCE_FILE as PROVENANCE
from lewis_hub.report.lock import (
    Lock,
    LockedData,
    LockedInput,
    OutputFile,
    Run,
    can_change_the_result,
    provenance,
)
from lewis_hub.report.mergekit import FILE as MERGEKIT
from lewis_hub.report.mergekit import METHODS, MergekitMerge, mergekit_config
from lewis_hub.report.plots import Plot, draw
from lewis_hub.workflow.calibrate import Guidance
from lewis_hub.workflow.evaluate import Scored
from lewis_hub.workflow.grams import Gathered
from lewis_hub.workflow.job import Step, software
from lewis_hub.workflow.merge import MergedModel
from lewis_hub.workflow.resolve import (
    Inputs,
    PinnedTask,
    by_reference,
    calibrations,
    merged_entries,
    needs_grams,
    source_of,
)
from lewis_hub.workflow.slices import pinned_slices, stacked_blocks

CARD = "README.md"


def describe(step: Step, folder: Path, facts: CardFacts, scored: Scored | None) -> tuple[str, ...]:
    """Write them into the model's folder; returns their paths, relative to it.

    None of them is part of the lock: they tell of one run, and their owner may change them.
    """
    asked = step.recipe.evaluate
    results = scored.results if scored else {}
    texts = {CARD: str(model_card(facts)), page.FILE: page.report_page(facts, results)}
    if facts.scores and asked and asked.benchmarks:
        texts |= leaderboards.entries(facts.scores, asked.benchmarks, facts)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_whole(folder / name, text)
    return tuple(texts)


def guided(step: Step, guidance: Guidance | None, plots: tuple[Plot, ...]) -> Guided | None:
    """What the card says of the guide; None where there is none."""
    if guidance is None or step.recipe.guide is None:
        return None
    name = step.recipe.guide.name
    return Guided(name, guidance.profile, guidance.schedule, guidance.notes, plots)


def card_facts(
    step: Step,
    merged: MergedModel,
    guided: Guided | None,
    scored: Scored | None,
    costs: Costs,
    locked: Lock,
) -> CardFacts:
    """Gather all that a card states; the recipe as run lies in the folder already."""
    recipe, inputs, examined = step.recipe, step.inputs, step.examined
    repo = recipe.publish.repo if recipe.publish else None
    chosen = recipe.publish.license if recipe.publish else None
    return CardFacts(
        title=repo.partition("/")[2] if repo else "Merged model",
        repo=repo,
        endpoint=step.api.endpoint,
        base=inputs.base,
        experts=inputs.experts,
        models=examined.facts,
        datasets=inputs.calibration_data,
        parameters=merged.parameters,
        dtype=recipe.output_dtype,
        method=registry.find(recipe.merge_method),
        guided=guided,
        scores=scored.scores if scored else None,
        gate=scored.gate if scored else None,
        costs=tuple(costs.stages),
        recipe=(merged.folder / "lewis" / "recipe.yaml").read_text(encoding="utf-8"),
        licence=_licence([examined.facts[s.pinned] for s in inputs.models], chosen),
        licence_chosen=chosen is not None,
        config=json.loads((merged.folder / "config.json").read_text(encoding="utf-8")),
        chat=_chats(merged.folder),
        custom_code=inputs.donor.name in recipe.allow_code,
        mergekit=MERGEKIT in locked.outputs,
        digest=locked.digest,
        software=locked.software,
        stack=stacked_blocks(recipe, inputs),
        scored_in_chat=recipe.evaluate is not None and recipe.evaluate.chat_template,
    )


def _chats(folder: Path) -> bool:
    """Whether the tokenizer has a chat template, in a file of its own or in its configuration."""
    config = folder / "tokenizer_config.json"
    inside = config.exists() and '"chat_template"' in config.read_text(encoding="utf-8")
    return inside or (folder / "chat_template.jinja").exists()


def _licence(facts: Sequence[ModelFacts], chosen: str | None) -> Licence | None:
    """What follows from the parents; nothing where they differ and nobody decided."""
    try:
        return combined_licence(facts, chosen)
    except PublishError:
        return None


TASKS = "tasks"  # where own task files lie beside lewis/recipe.yaml; further folders get numbers
TASK_SUFFIXES = (".yaml", ".yml", ".py", ".jsonl", ".json", ".txt")


def pin_calibration(told: dict[str, Any], inputs: Inputs) -> None:
    """Write a dataset's commit, or that of a task's, into a calibration as plain data.

    One that nothing is drawn from stays as it was.
    """
    if "task" not in told:
        dataset = inputs.datasets.get(told["dataset"])
        told["dataset"] = dataset.pinned if dataset else told["dataset"]
        return
    task = inputs.tasks.get(Calibration.model_validate(told))
    commits = set(task.commits.values()) if task else set()
    if len(commits) == 1:
        told["revision"] = commits.pop()


def task_folders(recipe: Recipe) -> dict[str, str]:
    """Folders with own task files -> where their files are carried beside lewis/recipe.yaml."""
    guide = recipe.guide.calibration if recipe.guide else None
    places = [
        recipe.evaluate,
        recipe.calibration,
        guide,
        *(entry.calibration for entry in recipe.models),
    ]
    named = [place.include for place in places if place and place.include]
    folders = dict.fromkeys(map(recipe.locate, named))
    return {folder: f"{TASKS}{n or ''}" for n, folder in enumerate(folders)}


def carry_tasks(recipe: Recipe, own: Path) -> list[str]:
    """Copy own task files into a merge's own folder; returns their paths in it."""
    carried = []
    for folder, name in task_folders(recipe).items():
        source, target = Path(folder), own / name
        for file in sorted(source.rglob("*")):
            part = file.relative_to(source)
            if file.is_file() and file.suffix in TASK_SUFFIXES and "__pycache__" not in part.parts:
                (target / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / part)
                carried.append(f"{name}/{part.as_posix()}")
    return carried


def pinned(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """The recipe as plain data, defaults spelt out and every revision pinned.

    It reads back as a recipe beside `lewis/tasks`, where own task files are carried.
    """
    told = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    names = {str(model): source.pinned for model, source in by_reference(recipe, inputs).items()}
    del told["models" if recipe.slices else "slices"]
    models = told.get("models", [])
    slices = told.get("slices", [])
    for place in (told, *slices):
        if "base_model" in place:
            place["base_model"] = names[place["base_model"]]
    for model in (*models, *(source for one in slices for source in one["sources"])):
        model["model"] = names[model["model"]]
    _pin_tokenizer(told, recipe, inputs)
    places = [told, told.get("guide", {}), *models]
    drawn = [place["calibration"] for place in places if "calibration" in place]
    for calibration in drawn:
        pin_calibration(calibration, inputs)
    carried = task_folders(recipe)
    for place in (told.get("evaluate", {}), *drawn):
        if "include" in place:
            place["include"] = carried[recipe.locate(place["include"])]
    return told


def _pin_tokenizer(told: dict[str, Any], recipe: Recipe, inputs: Inputs) -> None:
    """Models that are named for their tokenizer, a token or their chat template."""

    def pin(place: dict[str, Any], key: str) -> None:
        name = place.get(key)
        if isinstance(name, str) and name not in ("base", "union") and recipe.reference(name):
            place[key] = source_of(recipe, inputs, name).pinned

    pin(told, "tokenizer_source")
    pin(told, "chat_template")
    asked = told.get("tokenizer", {})
    pin(asked, "source")
    for token in asked.get("tokens", {}).values():
        pin(token, "source")
        if isinstance(token.get("source"), dict):
            pin(token["source"], "model")


def lock(
    recipe: Recipe,
    inputs: Inputs,
    max_shard_bytes: int,
    outputs: Mapping[str, OutputFile],
    rows: Sequence[tuple[int, ...]] = (),
) -> Lock:
    """What is merged, and what came out; without outputs and rows, what will be merged."""
    calibrated = calibrations(recipe)
    drawn: Sequence[tuple[int, ...] | None] = rows or [None] * len(calibrated)
    inputs_locked = [_locked(source, source is inputs.base) for source in inputs.models]
    return Lock(
        inputs=tuple(inputs_locked),
        calibration=tuple(
            _locked_data(inputs.data_of(calibration), calibration, own)
            for calibration, own in zip(calibrated, drawn, strict=True)
        ),
        recipe=pinned(recipe, inputs),
        method=recipe.merge_method,
        method_version=registry.find(recipe.merge_method).version,
        guide=recipe.guide.name if recipe.guide else None,
        guide_version=guides.find(recipe.guide.name).version if recipe.guide else None,
        seed=recipe.seed,
        max_shard_bytes=max_shard_bytes,
        outputs=outputs,
        software=software(),
    )


def write_guidance(folder: Path, guidance: Guidance) -> tuple[Plot, ...]:
    """Write profile, schedule and their plots into a folder; returns the plots."""
    for name, text in _documents(guidance).items():
        write_whole(folder / name, text)
    return draw(guidance.profile, guidance.schedule, folder)


def _documents(guidance: Guidance) -> dict[str, str]:
    """The profile, of a guide that measures anything, and the schedule."""
    measured = {"importance.json": guidance.profile.to_json()} if guidance.profile else {}
    return measured | {"density.json": guidance.schedule.to_json()}


def write(
    step: Step,
    merged: MergedModel,
    guidance: Guidance | None,
    gathered: Gathered,
    scored: Scored | None,
    costs: Costs,
) -> tuple[str, ...]:
    """Write all that a merge leaves behind beside the model itself.

    Returns:
        Paths of all files of the result, relative to its folder.
    """
    folder, machine = merged.folder, this_machine(step.execution.device)
    (folder / "lewis").mkdir(exist_ok=True)
    plots = write_guidance(folder / "lewis", guidance) if guidance else ()
    written = [*merged.sidecars, *_write_told(step, folder, guidance, plots, scored)]
    outputs = {name: OutputFile(one.sha256, one.n_bytes) for name, one in merged.shards.items()}
    outputs |= {name: _output(folder / name) for name in written}
    rows = guidance.rows if guidance and guidance.rows else gathered.rows
    locked = lock(step.recipe, step.inputs, step.execution.max_shard_bytes, outputs, rows)
    # what a run cost, when it ran and what its result was held against is no part of what was
    # merged: equal merges have equal locks
    run = Run(costs.began, datetime.now(UTC))
    beside = {COSTS: costs.to_json(machine), LOCK: locked.to_json()}
    beside[PROVENANCE] = provenance(locked, run)
    if scored and scored.gate:
        beside[GATE] = scored.gate.to_json()
    for name, text in beside.items():
        write_whole(folder / name, text)
    shown = guided(step, guidance, plots)
    facts = card_facts(step, merged, shown, scored, costs, locked)
    facts = replace(
        facts,
        measured=gathered.measured,
        in_sequence=fits_in_sequence(step.recipe),
        notes=gathered.notes,
        machine=machine,
    )
    return (*outputs, *beside, *describe(step, folder, facts, scored))


def _write_told(
    step: Step,
    folder: Path,
    guidance: Guidance | None,
    plots: Sequence[Plot],
    scored: Scored | None,
) -> list[str]:
    """Write what tells of a merge and is part of its lock.

    Returns:
        Paths of all of it, those of the guidance, which is written already, included.
    """
    texts = {"lewis/recipe.yaml": _yaml(pinned(step.recipe, step.inputs))}
    if scored:
        texts["lewis/scores.json"] = scored.scores.to_json()
        texts["lewis/items.json"] = scored.items.to_json()
    others = [*(_documents(guidance) if guidance else ())]
    others += [file for plot in plots for file in plot.files]
    others += carry_tasks(step.recipe, folder / "lewis")
    told = _mergekit(step, guidance)
    if told:
        texts[MERGEKIT] = told
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [*texts, *(f"lewis/{name}" for name in others)]


def _mergekit(step: Step, guidance: Guidance | None) -> str | None:
    recipe, inputs = step.recipe, step.inputs
    if recipe.merge_method not in METHODS or needs_grams(recipe):
        return None
    entries = zip(merged_entries(recipe), inputs.experts, strict=True)
    told = pinned(recipe, inputs)
    merge = MergekitMerge(
        method=recipe.merge_method,
        base=inputs.base.pinned if inputs.base else None,
        models={expert.pinned: entry.parameters for entry, expert in entries},
        slices=pinned_slices(recipe, inputs),
        parameters=recipe.parameters,
        dtype=recipe.output_dtype,
        schedule=guidance.schedule if guidance else None,
        tensors=tuple(step.examined.checkpoints[inputs.donor.pinned].tensors),
        adapters=tuple(adapter.pinned for adapter in inputs.adapters),
        tokenizer={key: told[key] for key in ("tokenizer_source", "tokenizer") if key in told},
    )
    return mergekit_config(merge)


def _output(path: Path) -> OutputFile:
    return OutputFile(sha256_of(path), path.stat().st_size)


def _yaml(document: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100))


def _locked(source: Source, is_base: bool) -> LockedInput:  # noqa: FBT001
    files = {f.path: f.digest for f in source.files if can_change_the_result(f.path)}
    role: Literal["base", "expert"] = "base" if is_base else "expert"
    return LockedInput(source.name, role, source.revision, source.commit_sha, files)


def _locked_data(
    data: Source | PinnedTask, asked: Calibration, rows: tuple[int, ...] | None
) -> LockedData:
    """A dataset's files (a card says which make up a split), or a task's and those of its data."""
    if isinstance(data, Source):
        files = {file.path: file.digest for file in data.files}
        name, revision, sha = data.name, data.revision, data.commit_sha
    else:
        files = {"task files": data.digest}
        for number, source in enumerate(data.datasets):
            files |= {f"data {number}: {file.path}": file.digest for file in source.files}
        name, revision, sha = f"task {data.selection.names[0]}", asked.revision, data.digest
    return LockedData(name, revision, sha, files, asked.config, asked.split, rows)
