"""Write the report of a finished merge: plots, lock, costs, card and page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from lewis_hub.documents import read_json
from lewis_hub.evaluate.gate import FILE as GATE
from lewis_hub.evaluate.samples import FILE as SAMPLES
from lewis_hub.evaluate.samples import Samples
from lewis_hub.files import sha256_of, write_whole
from lewis_hub.hub.source import Source
from lewis_hub.merge.aligned import FILE as ALIGNMENT
from lewis_hub.merge.aligned import alignment_json
from lewis_hub.merge.engine import ShardResult
from lewis_hub.recipe.evaluation import Benchmark
from lewis_hub.recipe.schema import Calibration
from lewis_hub.report import cost, page
from lewis_hub.report import lock as locks
from lewis_hub.report.card import eval_results, model_card
from lewis_hub.report.chart import draw_scores
from lewis_hub.report.facts import CardFacts, Guided
from lewis_hub.report.lock import Lock, LockedData, LockedInput, OutputFile
from lewis_hub.report.maps import draw_maps
from lewis_hub.report.matches import draw_matches
from lewis_hub.report.mergekit import FILE as MERGEKIT
from lewis_hub.report.mergekit import MergekitMerge, mergekit_config
from lewis_hub.report.usage import usage_of
from lewis_hub.workflow.evaluate import CARD, ITEMS, SCORES, Scored
from lewis_hub.workflow.generated import FILE as GENERATED
from lewis_hub.workflow.merge import MergedModel
from lewis_hub.workflow.snapshot import RecipeSnapshot
from lewis_hub.workflow.statistics import Gathered
from lewis_hub.workflow.task_data import PinnedTask

PROFILE, SCHEDULE = "importance.json", "density.json"  # in the folder `lewis`
RECIPE = "lewis/recipe.yaml"


@dataclass(frozen=True)
class ReportSettings:
    """The values of a report that are known before the merge."""

    facts: CardFacts  # of the card, without results of the merge
    planned: Lock  # the lock without rows; of its outputs it has the user's task files alone
    snapshot: RecipeSnapshot
    mergekit: MergekitMerge | None  # the settings for mergekit; None if mergekit has no such merge
    benchmarks: Mapping[str, Benchmark]  # task -> benchmark whose leaderboard shows the score
    device: str


def write(
    settings: ReportSettings,
    merged: MergedModel,
    guided: Guided | None,
    gathered: Gathered,
    scored: Scored | None,
    costs: cost.Costs,
) -> tuple[str, ...]:
    """Write the report; return the paths of all files of the model, relative to its folder."""
    folder, machine = merged.folder, cost.this_machine(settings.device)
    (folder / "lewis").mkdir(exist_ok=True)
    guided = write_guidance(folder / "lewis", guided) if guided else None
    chart = draw_scores(scored.scores, folder / "lewis") if scored else None
    matches = draw_matches(gathered.aligned, folder / "lewis")
    maps = guided.maps if guided else None
    of_matches = [picture for one in matches.values() for picture in one.drawn]
    pictures = [one for one in (chart, maps, *of_matches) if one]
    written = _write_locked(settings, folder, guided, scored)
    if gathered.generated:
        write_whole(folder / "lewis" / GENERATED, "\n".join(gathered.generated) + "\n")
        written.append(f"lewis/{GENERATED}")
    if gathered.aligned:
        written.append(f"lewis/{ALIGNMENT}")
        write_whole(folder / written[-1], alignment_json(gathered.aligned))
    drawn = [f"lewis/{file}" for picture in pictures for file in picture.files]
    outputs = locked_outputs(folder, merged.shards, (*merged.sidecars, *written, *drawn))
    lock = _finished(settings.planned, outputs, gathered)
    # The lock has no costs, times and verdict, so that equal merges have equal locks.
    beside = {cost.FILE: costs.to_json(machine), locks.FILE: lock.to_json()}
    beside[locks.PROVENANCE_FILE] = locks.provenance(lock, costs.began, datetime.now(UTC))
    if scored and scored.gate:
        beside[GATE] = scored.gate.to_json()
    for name, text in beside.items():
        write_whole(folder / name, text)
    facts = replace(
        described(settings.facts, folder),
        parameters=merged.parameters,
        guided=guided,
        scores=scored.scores if scored else None,
        gate=scored.gate if scored else None,
        costs=tuple(costs.stages),
        scored_data=scored.data if scored else {},
        chart=chart,
        digest=lock.digest,
        measured=gathered.measured,
        aligned=gathered.aligned,
        matches=matches,
        notes=gathered.notes,
        machine=machine,
    )
    return (*outputs, *beside, *_write_card(settings, folder, facts, scored))


def locked_outputs(
    folder: Path, shards: Mapping[str, ShardResult], names: Iterable[str]
) -> dict[str, OutputFile]:
    """Return what a lock states of files in a folder: of shards, and of others by their names."""
    found = {name: OutputFile(one.sha256, one.n_bytes) for name, one in shards.items()}
    for name in names:
        found[name] = OutputFile(sha256_of(folder / name), (folder / name).stat().st_size)
    return found


def _finished(planned: Lock, outputs: Mapping[str, OutputFile], gathered: Gathered) -> Lock:
    """Return the lock with outputs and drawn rows."""
    rows: Sequence[tuple[int, ...] | None] = gathered.rows or [None] * len(planned.calibration)
    data = zip(planned.calibration, rows, strict=True)
    calibration = tuple(replace(one, rows=drawn) for one, drawn in data)
    return replace(planned, outputs=outputs, calibration=calibration)


def described(facts: CardFacts, folder: Path) -> CardFacts:
    """Return the same facts with those that the files of the model tell."""
    config = read_json((folder / "config.json").read_bytes())
    parents = [facts.models[source.pinned] for source in facts.sources]
    usage = usage_of(folder, config, parents)
    generated = (folder / "lewis" / GENERATED).exists()
    chat = has_chat_template(folder)
    return replace(facts, config=config, usage=usage, chat=chat, generated=generated)


def write_guidance(folder: Path, guided: Guided) -> Guided:
    """Write profile, schedule and their maps into a folder; return the guidance with its maps."""
    if guided.profile:
        write_whole(folder / PROFILE, guided.profile.to_json())
    write_whole(folder / SCHEDULE, guided.schedule.to_json())
    return replace(guided, maps=draw_maps(guided.profile, guided.schedule, folder))


def _write_locked(
    settings: ReportSettings, folder: Path, guided: Guided | None, scored: Scored | None
) -> list[str]:
    """Write the descriptive files of the lock; return their paths and those of the guidance."""
    texts = {RECIPE: settings.snapshot.to_yaml()}
    if scored:
        texts[SCORES] = scored.scores.to_json()
        texts[ITEMS] = scored.items.to_json()
        texts[SAMPLES] = scored.samples.to_json()
    others: list[str] = []
    if guided:
        others += [*([PROFILE] if guided.profile else []), SCHEDULE]
    others += settings.snapshot.copy_tasks(folder / "lewis")
    if settings.mergekit:
        schedule = guided.schedule if guided else None
        texts[MERGEKIT] = mergekit_config(replace(settings.mergekit, schedule=schedule))
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [*texts, *(f"lewis/{name}" for name in others)]


def has_chat_template(folder: Path) -> bool:
    """Return whether tokenizer or processor has a chat template, in a file of its own or not."""
    configs = (folder / name for name in ("tokenizer_config.json", "processor_config.json"))
    texts = (config.read_text(encoding="utf-8") for config in configs if config.exists())
    inside = any('"chat_template"' in text for text in texts)
    return inside or any((folder / f"chat_template.{end}").exists() for end in ("jinja", "json"))


def _write_card(
    settings: ReportSettings, folder: Path, facts: CardFacts, scored: Scored | None
) -> tuple[str, ...]:
    """Write card, page and leaderboard entries; return their paths, relative to the folder.

    They are not part of the lock, because they describe a run and their owner may change them.
    """
    samples = scored.samples if scored else Samples()
    texts = {CARD: str(model_card(facts)), page.FILE: page.report_page(facts, samples)}
    if facts.scores and settings.benchmarks:
        texts |= eval_results(facts.scores, settings.benchmarks, facts)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_whole(folder / name, text)
    return tuple(texts)


def locked_input(source: Source, *, is_base: bool) -> LockedInput:
    """Return the entry of a source in the lock."""
    files = {f.path: f.digest for f in source.files if locks.can_change_the_result(f.path)}
    role: Literal["base", "expert"] = "base" if is_base else "expert"
    return LockedInput(source.name, role, source.revision, source.commit_sha, files)


def locked_data(data: Source | PinnedTask, asked: Calibration) -> LockedData:
    """Return the entry of a dataset, or of a task and its data, in the lock."""
    if isinstance(data, Source):
        files = {file.path: file.digest for file in data.files}
        name, revision, sha = data.name, data.revision, data.commit_sha
    else:
        files = {"task files": data.digest}
        for number, source in enumerate(data.datasets):
            files |= {f"data {number}: {file.path}": file.digest for file in source.files}
        name, revision, sha = f"task {data.selection.names[0]}", asked.revision, data.digest
    return LockedData(name, revision, sha, files, asked.config, asked.split, None)
