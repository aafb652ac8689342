"""Report: plots, lock and costs of a finished merge, and what tells of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from lewis_hub.evaluate.gate import FILE as GATE
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.guides import registry as guides
from lewis_hub.hub.source import Source
from lewis_hub.methods import registry
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_calibration import Calibration
from lewis_hub.recipe_rules import fits_in_sequence
from lewis_hub.report.cost import FILE as COSTS
from lewis_hub.report.cost import Costs
from lewis_hub.report.lock import FILE as LOCK
from lewis_hub.report.lock import (
    Lock,
    LockedData,
    LockedInput,
    OutputFile,
    can_change_the_result,
)
from lewis_hub.report.machine import this_machine
from lewis_hub.report.mergekit import FILE as MERGEKIT
from lewis_hub.report.mergekit import METHODS, MergekitMerge, mergekit_config
from lewis_hub.report.plots import Plot, draw
from lewis_hub.report.provenance import FILE as PROVENANCE
from lewis_hub.report.provenance import Run, provenance
from lewis_hub.stages import describing
from lewis_hub.stages.calibration import Guidance
from lewis_hub.stages.carrying import carry_tasks, pin_calibration, task_folders
from lewis_hub.stages.evaluation import Scored
from lewis_hub.stages.execution import Step, software
from lewis_hub.stages.merging import MergedModel
from lewis_hub.stages.slicing import pinned_slices
from lewis_hub.stages.sources import (
    Inputs,
    by_reference,
    calibrations,
    merged_entries,
    needs_grams,
    source_of,
)
from lewis_hub.stages.statistics import Gathered
from lewis_hub.stages.task_data import PinnedTask


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
    guided = describing.guided(step, guidance, plots)
    facts = describing.card_facts(step, merged, guided, scored, costs, locked)
    facts = replace(
        facts,
        measured=gathered.measured,
        in_sequence=fits_in_sequence(step.recipe),
        notes=gathered.notes,
        machine=machine,
    )
    return (*outputs, *beside, *describing.describe(step, folder, facts, scored))


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
