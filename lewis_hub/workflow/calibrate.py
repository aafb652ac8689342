"""Calibrate and guide: calibration texts to a profile, the profile to a density schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.grams import Wanted
from lewis_hub.calibration.measure import (
    SUMMARIES,
    CalibrationSet,
    Place,
    Subject,
    calibrate,
    missing,
)
from lewis_hub.calibration.profile import (
    ImportanceProfile,
    Role,
    SourceImportance,
    calibration_facts,
    reusable,
)
from lewis_hub.calibration.texts import (
    CalibrationTokens,
    Rows,
    calibration_tokens,
    load_tokenizer,
    template_of,
)
from lewis_hub.checkpoint.ranges import Need, Window, elsewhere
from lewis_hub.errors import CalibrationError, ProfileError, RecipeError
from lewis_hub.evaluate import items
from lewis_hub.evaluate.items import chat_of
from lewis_hub.files import write_whole
from lewis_hub.guides.registry import OF_PAIRS, WITHOUT_TEXTS, Guide, Measure
from lewis_hub.guides.schedule import (
    Bounds,
    DensitySchedule,
    Use,
    block_matrices,
    checkpoint_tensor,
    schedule,
)
from lewis_hub.hub.rows import load_rows
from lewis_hub.hub.source import Source
from lewis_hub.merge.byte_ranges import stored
from lewis_hub.merge.engine import open_source
from lewis_hub.merge.runners import Ray, threads
from lewis_hub.progress import Progress
from lewis_hub.recipe.schema import Calibration
from lewis_hub.workflow.contamination import DrawnText, ScoredTasks, drawn_texts, refuse_overlap
from lewis_hub.workflow.fetch import small_files
from lewis_hub.workflow.load import ModelLoader
from lewis_hub.workflow.merge import PlanSettings
from lewis_hub.workflow.open import MergeSources, OpenedSource
from lewis_hub.workflow.resolve import PinnedTask

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Sets = Sequence[CalibrationSet]  # one an expert; none where nothing is measured on texts


@dataclass(frozen=True)
class TextSettings:
    """What calibration texts are drawn from.

    Attributes:
        tokenizer: source whose tokenizer makes tokens of the texts.
        seed: draws the rows.
        allow_code: whether tasks may run code.
        data: a calibration -> what it draws from.
        calibrations: of each expert, in order; none where nothing is measured on texts.
    """

    tokenizer: Source
    seed: int
    allow_code: bool
    data: Mapping[Calibration, Source | PinnedTask]
    calibrations: tuple[Calibration, ...]


@dataclass(frozen=True)
class Drawn:
    """Tokens to measure on, and each text as `contamination` compares it."""

    tokens: CalibrationSet
    values: list[DrawnText]


def draw(settings: TextSettings, calibration: Calibration, api: HfApi, progress: Progress) -> Drawn:
    """Draw the texts of one calibration, render and tokenise them.

    Raises:
        SourceError: a configuration or split is not there.
        EvaluationError: a task has no such split, or its items cannot be rendered.
        CalibrationError: the template does not fit, or no text is left.
    """
    donor, data = settings.tokenizer, settings.data[calibration]
    tokenizer = load_tokenizer(str(small_files(api, donor)), donor.name)
    rows = _rows(settings, calibration, api)
    template = template_of(calibration, tokenizer)
    if isinstance(rows, items.TaskRows) and calibration.chat_template:
        rows = replace(rows, chat=chat_of(tokenizer))
    tokens = calibration_tokens(rows, calibration, tokenizer, settings.seed)
    drawn = f"{len(tokens.ids):,} texts, {tokens.n_tokens:,} tokens"
    progress.say(f"{calibration.data}: {'; '.join((drawn, *tokens.notes))}.")
    facts = calibration_facts(calibration, _facts(data), settings.seed, _tokenizer_digest(donor))
    texts = drawn_texts(rows, template, tokens)
    return Drawn(CalibrationSet(facts | tokens.facts, tokens), texts)


def _rows(settings: TextSettings, calibration: Calibration, api: HfApi) -> Rows:
    data = settings.data[calibration]
    if isinstance(data, Source):
        return load_rows(api, data, calibration.config, calibration.split)
    selection = replace(data.selection, allow_code=settings.allow_code)
    return items.load_rows(
        selection, calibration.split, data.commits, allow_scored=calibration.allow_overlap
    )


def _facts(data: Source | PinnedTask) -> dict[str, str]:
    if isinstance(data, Source):
        return {"dataset": data.pinned, "dataset_sha": data.commit_sha}
    return data.facts


def _tokenizer_digest(source: Source) -> str:
    """Over the tokenizer's files: what fixes token ids, wherever the files lie."""
    files = [file for file in source.files if "token" in file.path or "vocab" in file.path]
    told = "\n".join(f"{file.path} {file.digest}" for file in files)
    return "sha256:" + hashlib.sha256(told.encode()).hexdigest()


def draw_texts(
    settings: TextSettings, scored: ScoredTasks | None, api: HfApi, progress: Progress
) -> dict[Calibration, Drawn]:
    """Draw the texts of all calibrations; nothing here needs a weight.

    Raises:
        SourceError, EvaluationError: a configuration or split is not there.
        CalibrationError: the template does not fit, no text is left, or items are scored.
    """
    asked = dict.fromkeys(settings.calibrations)
    drawn = {one: draw(settings, one, api, progress) for one in asked}
    refuse_overlap(scored, {one: found.values for one, found in drawn.items()}, progress)
    return drawn


def calibration_sets(
    settings: TextSettings, drawn: Mapping[Calibration, Drawn], experts: Sequence[OpenedSource]
) -> tuple[CalibrationSet, ...]:
    """Return one set per expert, equal ones shared; none where nothing is measured on texts.

    Raises:
        CalibrationError: an expert lacks a token of its texts.
    """
    sets = tuple(drawn[one].tokens for one in settings.calibrations)
    if sets:
        for expert, one in zip(experts, sets, strict=True):
            remap_token_ids(one, expert, settings.tokenizer.name)
    return sets


def remap_token_ids(one: CalibrationSet, source: OpenedSource, tokenizer: str) -> CalibrationSet:
    """Return a set in the token ids of a source; itself where they are the same.

    Raises:
        CalibrationError: the texts have a token that the source lacks.
    """
    found = source.translation
    if found is None:
        return one
    used = dict.fromkeys(i for text in one.tokens.ids for i in text)
    if lacking := [found.lacking.get(i, f"number {i}") for i in used if i not in found.ids]:
        problem = f"{source.name} has no token {lacking[0]!r}"
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        remedy = "Both have to see the same tokens: choose other texts, use guide `uniform`, or "
        remedy += "leave this model out."
        where = f"calibration texts, cut by the tokenizer of {tokenizer}"
        raise CalibrationError(where, problem + more, remedy)
    tokens = one.tokens
    ids = tuple(tuple(found.ids[i] for i in text) for text in tokens.ids)
    end = None if tokens.end is None else found.ids.get(tokens.end)
    own: CalibrationTokens = replace(tokens, ids=ids, end=end)
    return replace(one, tokens=own)


@dataclass(frozen=True)
class GuideSettings:
    """How a guide decides densities.

    Attributes:
        guide: from the registry.
        base: what its experts are compared with.
        experts: in the recipe's order.
        tokenizer: name of the model whose tokenizer cuts the texts.
        bounds: of the densities.
        use: what the schedule sets, and its seed.
        calibration: as the recipe says it, for the profile.
        beside: folder in which `lewis-hub importance` leaves its files.
        plan: of the merge.
    """

    guide: Guide
    base: OpenedSource
    experts: tuple[OpenedSource, ...]
    tokenizer: str
    bounds: Bounds
    use: Use
    calibration: Mapping[str, Any]
    beside: Path
    plan: PlanSettings

    @property
    def sources(self) -> MergeSources:
        """Base and experts."""
        return MergeSources(self.base, self.experts)


@dataclass(frozen=True)
class Guidance:
    """What was measured, what the guide made of it, and what a user should know about it.

    Attributes:
        guide: its name.
        profile: None where the guide measures nothing.
        rows: of each expert, the rows that it was measured on; none where nothing is measured.
    """

    guide: str
    profile: ImportanceProfile | None
    schedule: DensitySchedule
    notes: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]


def guide(
    settings: GuideSettings,
    sets: Sets,
    loader: ModelLoader,
    stores: Sequence[Path],
    wanted: Sequence[Wanted] = (),
) -> Guidance:
    """Measure what is not known yet, and let the guide decide.

    Args:
        settings: the guide, its sources and bounds.
        sets: from `calibration_sets`.
        loader: of the sources.
        stores: files `importance.json`: the first is written after every source, from all of them
            measurements are taken. Files that are missing or cannot be read are passed over.
        wanted: one an expert, or none: second moments to leave where the same pass can.

    Raises:
        CalibrationError: a source cannot be measured, or the guide cannot decide.
    """
    chosen, base = settings.guide, settings.base
    profile = None
    if chosen.needs:
        profile = _measure(settings, sets, loader, stores, wanted)
    tensors = base.checkpoint.tensors
    decided = schedule(
        chosen,
        settings.bounds,
        [expert.pinned for expert in settings.experts],
        {name: tensor.shape for name, tensor in tensors.items()},
        profile,
        settings.use,
    )
    for note in decided.notes:
        loader.progress.say(note)
    found = settings.plan.restack(decided.schedule)
    rows = tuple(one.tokens.rows for one in sets)
    return Guidance(chosen.name, profile, found, decided.notes, rows)


def _subjects(
    settings: GuideSettings,
    sets: Sets,
    loader: ModelLoader,
    measure: Measure,
    wanted: Sequence[Wanted] = (),
) -> tuple[Subject, ...]:
    """The base with every distinct set, then each expert with its own, in its own ids.

    For a measure of pairs the experts alone, each against the base.
    """
    base, folders = settings.base, loader.files.folders
    against_base = {"base": base.digest} if measure in OF_PAIRS else {}
    sets = [one.measured(measure, **against_base) for one in sets]
    measured: list[tuple[OpenedSource, Role, tuple[CalibrationSet, ...]]] = []
    if measure not in OF_PAIRS:
        distinct = tuple({id(one.tokens): one for one in sets}.values())
        measured.append((base, "base", distinct))
    for expert, one in zip(settings.experts, sets, strict=True):
        own = remap_token_ids(one, expert, settings.tokenizer)
        measured.append((expert, "expert", (own,)))
    against = Place(base.pinned, folders[base.pinned]) if measure in OF_PAIRS else None
    left = [*[None] * (len(measured) - len(wanted)), *wanted]
    return tuple(
        Subject(
            *(source.pinned, source.digest, role, folders[source.pinned], own, against),
            wanted=leave,
        )
        for (source, role, own), leave in zip(measured, left, strict=True)
    )


def _measure(
    settings: GuideSettings,
    sets: Sets,
    loader: ModelLoader,
    stores: Sequence[Path],
    wanted: Sequence[Wanted],
) -> ImportanceProfile:
    """Measure everything that the guide needs, one measure after the other."""
    known = _known(settings, stores)
    entries: list[SourceImportance] = []

    def keep(now: ImportanceProfile) -> None:
        write_whole(stores[0], replace(now, sources=(*entries, *now.sources)).to_json())

    for measure in settings.guide.needs:
        if measure in WITHOUT_TEXTS:
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
    unknown = missing(subjects, known)
    left = {one.source for one in unknown}
    if any(one.against for one in unknown):
        base = settings.base
        against = Place(base.pinned, loader.materialize_checkpoint(base))
        subjects = tuple(replace(one, against=against) for one in subjects)
    opened = {one.pinned: one for one in settings.sources.models}
    subjects = tuple(
        loader.load_for_calibration(one, opened[one.source]) if one.source in left else one
        for one in subjects
    )
    n_tokens = sum(subject.n_tokens for subject in unknown)
    with loader.progress.stage("Calibrating", n_tokens, "tokens") as advance:
        return calibrate(subjects, known, loader.loading.device, advance, keep, measure)


def require_by_ranges(
    settings: GuideSettings, sets: Sets, loader: ModelLoader, stores: Sequence[Path]
) -> None:
    """Refuse sources that have to be loaded whole to be measured; nothing is loaded.

    Raises:
        RecipeError: the guide measures whole models.
    """
    known = _known(settings, stores)
    unknown = [
        subject.source
        for measure in settings.guide.needs
        if measure not in {*SUMMARIES, *WITHOUT_TEXTS}
        for subject in missing(_subjects(settings, sets, loader, measure), known)
    ]
    if unknown:
        found = ", ".join(dict.fromkeys(unknown))
        problem = f"it has to load {found} whole, and --stream keeps no whole model."
        remedy = (
            "Run `lewis-hub importance` where they fit: the folder importance/ that it leaves "
            "beside the recipe is used here. Or name a guide that measures block by block, such "
            "as `lewis`."
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
    """Read what an earlier run measured; None where there is nothing that can be read."""
    try:
        return ImportanceProfile.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ProfileError):
        return None


def measure_task_vectors(
    settings: GuideSettings, loader: ModelLoader, known: ImportanceProfile
) -> Iterator[SourceImportance]:
    """Measure every expert against the base; adapters and 8-bit floats as they are merged.

    Raises:
        BrokenCheckpointError: a file is missing or ends too early.
        SourceError: bytes of a source cannot be had.
    """
    base = settings.base
    facts = {"measure": "task_vector", "base": base.digest}
    tensors = base.checkpoint.tensors
    matrices = block_matrices({name: tensor.shape for name, tensor in tensors.items()})
    for expert in settings.experts:
        entry = reusable(known, expert.digest, facts)
        if entry and entry.modules.keys() == set(matrices):  # another version may take others
            modules = entry.modules
        else:
            modules = _task_vector_sizes(base, expert, matrices, loader)
        yield SourceImportance(expert.pinned, expert.digest, "expert", 0, modules, facts)


def _task_vector_sizes(
    base: OpenedSource, expert: OpenedSource, matrices: Sequence[str], loader: ModelLoader
) -> dict[str, float]:
    """Module -> how far the expert's weight is from the base's, as a share of it."""
    from lewis_hub.merge.task_vectors import relative_changes  # imports the compiler

    first, second, places = base.checkpoint, expert.checkpoint, loader.places
    modules = {checkpoint_tensor(module, first.tensors): module for module in matrices}
    tensors = list(modules)
    n_elements = sum(first.tensors[name].n_elements for name in tensors)
    needs = [_needs(name, (base, expert), elsewhere(places)) for name in tensors]
    workers = loader.means.runner
    with (
        Window(places, needs, loader.scratch / "ranges", loader.max_shard_bytes) as window,
        open_source(base.pinned, first.base, window.reader) as of_base,
        open_source(expert.pinned, second.base, window.reader) as of_expert,
        loader.progress.stage(f"Measuring {expert.name}", n_elements, "items") as advance,
    ):

        def done(n_elements: int) -> None:
            window.step_done()
            advance(n_elements)

        changes = relative_changes(
            (first, of_base),
            (second, of_expert),
            tensors,
            threads() if isinstance(workers, Ray) else workers,
            done,
        )
    return {modules[name]: change for name, change in changes.items()}


def _needs(name: str, models: Sequence[OpenedSource], remote: Collection[str]) -> list[Need]:
    """What has to be fetched of one tensor, of all models that have it."""
    return [
        need
        for source in models
        if name in source.checkpoint.tensors
        for need in stored(source.pinned, source.checkpoint.base, source.checkpoint.tensors[name])
        if need.source in remote
    ]
