"""Measure a profile of the sources, and turn it into a density schedule."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lewis_hub.calibration import profile as profiles
from lewis_hub.calibration.grams import GramRequest
from lewis_hub.calibration.profile import ImportanceProfile, Measure, SourceImportance
from lewis_hub.calibration.subject import Snapshot, Subject, missing
from lewis_hub.checkpoint.ranges import SourceFiles, SourceTensor
from lewis_hub.display import TextTable, to_html
from lewis_hub.documents import MAX_TABLE_BYTES
from lewis_hub.errors import ProfileError, RecipeError
from lewis_hub.files import text_of, write_whole
from lewis_hub.guides import schedule as schedules
from lewis_hub.guides.registry import RegisteredGuide
from lewis_hub.guides.schedule import DensitySchedule, ScheduleSettings, schedule
from lewis_hub.hub.changes import unchanged
from lewis_hub.hub.source import Source
from lewis_hub.merge.runners import Ray, threads
from lewis_hub.merge.workspace import LOCK, STATES, alone_at, keep_unless_written
from lewis_hub.report.facts import Guided
from lewis_hub.report.profiles import short_name
from lewis_hub.workflow.fetch import ModelLoader
from lewis_hub.workflow.merge import PlanSettings
from lewis_hub.workflow.open import OpenedSource
from lewis_hub.workflow.texts import Sets, remap_token_ids

MEASURED = ".measured"  # folder in the output of a calibration


@dataclass(frozen=True)
class GuideSettings:
    """The settings of a guide."""

    guide: RegisteredGuide
    base: OpenedSource  # its tokenizer cuts the texts
    experts: tuple[OpenedSource, ...]  # in the recipe's order
    schedule: ScheduleSettings
    calibration: Mapping[str, Any]  # the recipe's settings, for the profile
    beside: tuple[Path, ...]  # folders in which measurements of an earlier run may be
    plan: PlanSettings


def guide(
    settings: GuideSettings,
    sets: Sets,
    loader: ModelLoader,
    stores: Sequence[Path],
    wanted: Sequence[GramRequest] = (),
) -> Guided:
    """Measure the sources that are not in a profile yet, and compute the density schedule.

    Known measurements are read from all `stores`, which are files `importance.json`; the first is
    written after each source. Missing and damaged files are skipped. `wanted` are second moments
    of each expert that the same pass can gather.
    """
    chosen, profile = settings.guide, None
    if chosen.needs:
        profile = _measure(settings, sets, loader, stores, wanted)
    decided = schedule(
        chosen,
        settings.schedule,
        [expert.pinned for expert in settings.experts],
        {name: tensor.shape for name, tensor in settings.base.checkpoint.tensors.items()},
        profile,
    )
    for note in decided.notes:
        loader.progress.say(note)
    return Guided(chosen.name, profile, settings.plan.restack(decided.schedule), decided.notes)


def _subjects(
    settings: GuideSettings,
    sets: Sets,
    loader: ModelLoader,
    measure: Measure,
    wanted: Sequence[GramRequest] = (),
) -> tuple[Subject, ...]:
    """Return the base with every distinct set, unless pairs are measured, then each expert."""
    base, is_of_pairs = settings.base, measure in profiles.OF_PAIRS
    facts = {"base": base.digest} if is_of_pairs else {}
    sets = [texts.measured(measure, **facts) for texts in sets]
    subjects: list[Subject] = []
    if not is_of_pairs:
        subjects.append(loader.subject(base, *{id(texts.tokens): texts for texts in sets}.values()))
    against = Snapshot(base.pinned, loader.files.folders[base.pinned]) if is_of_pairs else None
    moments: Sequence[GramRequest | None] = wanted or [None] * len(sets)
    for expert, texts, moment in zip(settings.experts, sets, moments, strict=True):
        own = remap_token_ids(texts, expert, base.name)
        subjects.append(replace(loader.subject(expert, own), against=against, wanted=moment))
    return tuple(subjects)


def _measure(
    settings: GuideSettings,
    sets: Sets,
    loader: ModelLoader,
    stores: Sequence[Path],
    wanted: Sequence[GramRequest],
) -> ImportanceProfile:
    """Run each measure that the guide needs."""
    known = _known(settings, stores)
    entries: list[SourceImportance] = []

    def keep(now: ImportanceProfile) -> None:
        write_whole(stores[0], replace(now, sources=(*entries, *now.sources)).to_json())

    for measure in settings.guide.needs:
        if measure in profiles.WITHOUT_TEXTS:
            measured: tuple[SourceImportance, ...] = ()
            for one in measure_task_vectors(settings, loader, known):
                measured = (*measured, one)
                keep(replace(known, sources=(*known.sources, *measured)))
        else:
            subjects = _subjects(settings, sets, loader, measure, wanted)
            measured = _on_texts(settings, measure, subjects, known, loader, keep).sources
        entries += measured
    return replace(known, sources=tuple(entries))


def _on_texts(
    settings: GuideSettings,
    measure: Measure,
    subjects: tuple[Subject, ...],
    known: ImportanceProfile,
    loader: ModelLoader,
    keep: Callable[[ImportanceProfile], None],
) -> ImportanceProfile:
    from lewis_hub.calibration.measure import calibrate  # torch: only here

    unknown = missing(subjects, known)
    left = {one.source for one in unknown}
    if any(one.against for one in unknown):
        base = settings.base
        against = Snapshot(base.pinned, loader.materialize_checkpoint(base))
        subjects = tuple(replace(one, against=against) for one in subjects)
    opened = {one.pinned: one for one in (settings.base, *settings.experts)}
    subjects = tuple(
        loader.load_for_calibration(one, opened[one.source]) if one.source in left else one
        for one in subjects
    )
    n_tokens = sum(subject.n_tokens for subject in unknown)
    with loader.progress.stage("Calibrating", n_tokens, "tokens") as advance:
        return calibrate(subjects, known, loader.loading.device, advance, keep, measure)


@contextmanager
def measurements(output: Path, sources: Iterable[Source]) -> Iterator[Path]:
    """Yield a folder in `output` for measurements, whose files get into `output` at the end.

    They stay there, and a rerun uses them, if it ends before that, unless a local model was written
    meanwhile: then the files may be of bytes that no digest names, and a rerun deletes them.

    Raises:
        SourceError: a local model was written meanwhile.
        OutputError: another run measures for this output.
    """
    folder = output / MEASURED

    def empty() -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    with alone_at(output / LOCK, output):
        with unchanged(sources) as states:
            folder.mkdir(parents=True, exist_ok=True)
            keep_unless_written(folder / STATES, states, empty)
            yield folder
        (folder / STATES).unlink(missing_ok=True)
        for file in folder.iterdir():
            file.replace(output / file.name)
        folder.rmdir()


def require_by_ranges(
    settings: GuideSettings, sets: Sets, loader: ModelLoader, stores: Sequence[Path]
) -> None:
    """Refuse a guide that would have to load whole models; nothing is loaded here."""
    known = _known(settings, stores)
    unknown = [
        subject.source
        for measure in settings.guide.needs
        if measure in profiles.OF_WHOLE_MODELS
        for subject in missing(_subjects(settings, sets, loader, measure), known)
    ]
    if unknown:
        models = ", ".join(dict.fromkeys(unknown))
        problem = f"it has to load {models} as whole models, and --stream keeps no whole model."
        remedy = (
            "Run `lewis-hub importance` on a machine with enough room: this run uses the folder "
            "importance/ that it writes beside the recipe. Or name a guide that measures block by "
            "block, such as `lewis`."
        )
        raise RecipeError("recipe", "guide", problem, remedy)


def _known(settings: GuideSettings, stores: Sequence[Path]) -> ImportanceProfile:
    found = [profile for path in stores if (profile := known_profile(path))]
    return ImportanceProfile(
        settings.guide.name,
        settings.calibration,
        tuple(entry for profile in found for entry in profile.sources),
    )


def known_profile(path: Path) -> ImportanceProfile | None:
    """Read the profile of an earlier run; None if it is missing or damaged."""
    try:
        return ImportanceProfile.from_json(text_of(path, MAX_TABLE_BYTES), str(path))
    except (OSError, ProfileError):
        return None


def measure_task_vectors(
    settings: GuideSettings, loader: ModelLoader, known: ImportanceProfile
) -> Iterator[SourceImportance]:
    """Measure the task vector of each expert that `known` lacks, with the weights as merged."""
    base = settings.base
    facts = {"measure": "task_vector", "base": base.digest}
    tensors = base.checkpoint.tensors
    matrices = schedules.block_matrices({name: tensor.shape for name, tensor in tensors.items()})
    for expert in settings.experts:
        entry = profiles.reusable(known, expert.digest, facts)
        if entry and entry.modules.keys() == set(matrices):  # versions may differ in their matrices
            modules = entry.modules
        else:
            modules = _task_vector_sizes(base, expert, matrices, loader)
        yield SourceImportance(expert.pinned, expert.digest, "expert", 0, facts, modules)


def _task_vector_sizes(
    base: OpenedSource, expert: OpenedSource, matrices: Sequence[str], loader: ModelLoader
) -> dict[str, float]:
    """Return the size of each module's task vector, relative to the base's weight."""
    from lewis_hub.merge.readers import open_source  # imports the compiler
    from lewis_hub.merge.task_vectors import relative_changes

    first, second = base.checkpoint, expert.checkpoint
    modules = {schedules.checkpoint_tensor(module, first.tensors): module for module in matrices}
    tensors = list(modules)
    n_elements = sum(first.tensors[name].n_elements for name in tensors)
    steps = [
        [
            SourceTensor(one.label, one.tensors[name], one.base)
            for one in (first, second)
            if name in one.tensors
        ]
        for name in tensors
    ]
    workers = loader.means.runner
    with (
        SourceFiles(
            loader.files.locations, steps, loader.scratch / "ranges", loader.max_shard_bytes
        ) as files,
        open_source(base.pinned, first.base, files.reader) as of_base,
        open_source(expert.pinned, second.base, files.reader) as of_expert,
        loader.progress.stage(f"Measuring {expert.name}", n_elements, "items") as advance,
    ):

        def done(n_elements: int) -> None:
            files.step_done()
            advance(n_elements)

        changes = relative_changes(
            (first, of_base),
            (second, of_expert),
            tensors,
            threads() if isinstance(workers, Ray) else workers,
            done,
        )
    return {modules[name]: change for name, change in changes.items()}


@dataclass(frozen=True)
class Calibrated:
    """A finished calibration: a folder with the profile, the schedule and their plots."""

    output: Path
    profile: ImportanceProfile | None
    schedule: DensitySchedule
    sizes: Mapping[str, int]  # tensor -> number of parameters, of the merge

    @property
    def table(self) -> TextTable:
        """Mean (over parameters), lowest and highest density or, without any, weight per expert."""
        rows = []
        for expert in self.schedule.experts:
            densities = expert.tensors or expert.weights
            top = max(densities, key=lambda name: densities[name], default="-")
            values = densities.values()
            mean = schedules.weighted_mean(densities, self.sizes) if values else 0.0
            numbers = (mean, min(values, default=0.0), max(values, default=0.0))
            cells = (str(len(values)), *(f"{number:.3f}" for number in numbers))
            rows.append((short_name(expert.source), top.removesuffix(".weight"), *cells))
        header = ("expert", "highest at", "scheduled", "mean", "lowest", "highest")
        return TextTable(header, tuple(rows))

    def __repr__(self) -> str:
        rows = (
            f"{expert}: {n} tensors scheduled, mean {mean}, from {lowest} to {highest} at {top}"
            for expert, top, n, mean, lowest, highest in self.table.rows
        )
        return "\n".join([f"Calibrated, in {self.output}", *rows])

    def _repr_html_(self) -> str:
        return to_html(self.table, f"In {self.output}")
