"""Report: plots, lock and costs of a finished merge, and what tells of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml

from lewis_hub import __version__
from lewis_hub.errors import LewisHubError
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.hub.source import Source
from lewis_hub.recipe import Recipe
from lewis_hub.report.cost import Costs
from lewis_hub.report.lock import Lock, LockedInput, OutputFile, can_change_the_result
from lewis_hub.report.mergekit import FILE as MERGEKIT
from lewis_hub.report.mergekit import METHODS, MergekitMerge, mergekit_config
from lewis_hub.report.plots import Plot, draw
from lewis_hub.stages import describing
from lewis_hub.stages.calibration import Guidance
from lewis_hub.stages.evaluation import Scored
from lewis_hub.stages.execution import Step
from lewis_hub.stages.merging import MergedModel
from lewis_hub.stages.slicing import pinned_slices
from lewis_hub.stages.sources import Inputs, by_reference, merged_entries, source_of

SOFTWARE = ("torch", "transformers", "numpy", "llvmlite", "safetensors", "datasets", "lm_eval")
DOCUMENTS = ("importance.json", "density.json")
TASK_SUFFIXES = (".yaml", ".yml", ".py", ".jsonl", ".json", ".txt")
COST, GATE = UNLOCKED = ("cost.json", "gate.json")
TASKS = "tasks"  # where own task files lie beside lewis/recipe.yaml


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
    places = [told.get("guide", {}), *models]
    for calibration in (place["calibration"] for place in places if "calibration" in place):
        dataset = inputs.datasets.get(calibration["dataset"])
        calibration["dataset"] = dataset.pinned if dataset else calibration["dataset"]
    if recipe.evaluate and recipe.evaluate.include:
        told["evaluate"]["include"] = TASKS
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
    recipe: Recipe, inputs: Inputs, max_shard_bytes: int, outputs: Mapping[str, OutputFile]
) -> Lock:
    """What is merged, and what came out; without outputs, what will be merged."""
    entries = merged_entries(recipe)
    calibrated = [recipe.calibration_of(entry) for entry in entries] if recipe.guide else []
    inputs_locked = [_locked(source, source is inputs.base) for source in inputs.models]
    return Lock(
        inputs=tuple(inputs_locked),
        calibration=tuple(
            _locked_data(inputs.datasets[calibration.dataset])
            for calibration in calibrated
            if calibration
        ),
        recipe=pinned(recipe, inputs),
        method=recipe.merge_method,
        guide=recipe.guide.name if recipe.guide else None,
        seed=recipe.seed,
        max_shard_bytes=max_shard_bytes,
        outputs=outputs,
        software={"lewis_hub": __version__} | _software(),
    )


def write_guidance(folder: Path, guidance: Guidance) -> tuple[Plot, ...]:
    """Write profile, schedule and their plots into a folder; returns the plots."""
    if guidance.profile:
        write_whole(folder / "importance.json", guidance.profile.to_json())
    write_whole(folder / "density.json", guidance.schedule.to_json())
    return draw(guidance.profile, guidance.schedule, folder)


def write(
    step: Step,
    merged: MergedModel,
    guidance: Guidance | None,
    scored: Scored | None,
    costs: Costs,
) -> tuple[str, ...]:
    """Write all that a merge leaves behind beside the model itself.

    Returns:
        Paths of all files of the result, relative to its folder.
    """
    folder = merged.folder
    own = folder / "lewis"
    own.mkdir(exist_ok=True)
    plots = write_guidance(own, guidance) if guidance else ()
    recipe = _yaml(pinned(step.recipe, step.inputs))
    texts = {"recipe.yaml": recipe, COST: costs.to_json()}
    if scored:
        texts |= {"scores.json": scored.scores.to_json(), "items.json": scored.items.to_json()}
    if scored and scored.gate:
        texts[GATE] = scored.gate.to_json()
    for name, text in texts.items():
        write_whole(own / name, text)
    names = [name for name in (*texts, *(DOCUMENTS if guidance else ())) if name not in UNLOCKED]
    names += [file for plot in plots for file in plot.files]
    names += _own_tasks(step, own)
    written = [*merged.shards, *merged.sidecars, *(f"lewis/{name}" for name in names)]
    outputs = {name: _output(folder / name, merged.shards.get(name)) for name in written}
    told = _mergekit(step, guidance)
    if told:
        write_whole(folder / MERGEKIT, told)
        outputs[MERGEKIT] = _output(folder / MERGEKIT, None)
    locked = lock(step.recipe, step.inputs, step.execution.max_shard_bytes, outputs)
    write_whole(own / "lock.json", locked.to_json())
    guided = describing.guided(step, guidance, plots)
    facts = describing.card_facts(step, merged, guided, scored, costs, locked)
    described = describing.describe(step, folder, facts, scored)
    # what a run cost, and what its result was held against, is no part of what was merged: the
    # same merge has the same lock
    beside = [f"lewis/{name}" for name in texts if name in UNLOCKED]
    return (*outputs, *beside, "lewis/lock.json", *described)


def _mergekit(step: Step, guidance: Guidance | None) -> str | None:
    recipe, inputs = step.recipe, step.inputs
    if recipe.merge_method not in METHODS:
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


def _own_tasks(step: Step, own: Path) -> list[str]:
    """Carry own task files, so that the recipe beside them can be run again."""
    asked = step.recipe.evaluate
    if asked is None or asked.include is None:
        return []
    source, target = Path(step.recipe.locate(asked.include)), own / TASKS
    carried = []
    for file in sorted(source.rglob("*")):
        part = file.relative_to(source)
        if file.is_file() and file.suffix in TASK_SUFFIXES and "__pycache__" not in part.parts:
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / part)
            carried.append(f"{TASKS}/{part.as_posix()}")
    return carried


def _output(path: Path, sha256: str | None) -> OutputFile:
    known = sha256 or sha256_of(path)
    return OutputFile(known, path.stat().st_size)


def _yaml(document: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100))


def is_this_merge(output: Path, planned: Lock) -> bool:
    """Whether a folder holds this very merge, scored as the recipe asks."""
    try:
        found = Lock.from_json((output / "lewis" / "lock.json").read_text(encoding="utf-8"))
    except (OSError, LewisHubError):
        return False
    same = found.digest == planned.digest
    return same and all(
        found.recipe.get(k) == planned.recipe.get(k) for k in ("evaluate", "publish")
    )


def _locked(source: Source, is_base: bool) -> LockedInput:  # noqa: FBT001
    files = {f.path: f.digest for f in source.files if can_change_the_result(f.path)}
    role: Literal["base", "expert"] = "base" if is_base else "expert"
    return LockedInput(source.name, role, source.revision, source.commit_sha, files)


def _locked_data(source: Source) -> LockedInput:
    files = {file.path: file.digest for file in source.files}  # a card says which make up a split
    return LockedInput(source.name, "calibration", source.revision, source.commit_sha, files)


def _software() -> dict[str, str]:
    found = {}
    for name in SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
