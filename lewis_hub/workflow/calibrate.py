"""Calibrate and guide: calibration data to a profile, the profile to a density schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.calibration.grams import Wanted
from lewis_hub.calibration.measure import (
    SUMMARIES,
    CalibrationSet,
    Place,
    Subject,
    calibrate,
    missing,
)
from lewis_hub.calibration.meta_model import Weights, in_folder
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
from lewis_hub.checkpoint.header import TensorHeader, torch_dtypes
from lewis_hub.checkpoint.ranges import Locations, SourceFiles, SourceTensor
from lewis_hub.checkpoint.reader import Checkpoint, Reader
from lewis_hub.errors import CalibrationError, ProfileError
from lewis_hub.evaluate import items
from lewis_hub.evaluate.items import chat_of
from lewis_hub.files import write_whole
from lewis_hub.guides import registry
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
from lewis_hub.merge.engine import open_source
from lewis_hub.merge.runners import Ray, threads
from lewis_hub.progress import Progress
from lewis_hub.recipe.schema import Calibration, Recipe
from lewis_hub.workflow.contamination import DrawnText, drawn_texts, refuse_overlap
from lewis_hub.workflow.fetch import small_files
from lewis_hub.workflow.job import Folders, Step
from lewis_hub.workflow.memory import Loading
from lewis_hub.workflow.merge import configured, loadable, plan_of
from lewis_hub.workflow.resolve import PinnedTask, calibrations, measures_on_texts
from lewis_hub.workflow.slices import restacked

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from torch import Tensor


@dataclass(frozen=True)
class Drawing:
    """What is the same for all calibrations of a merge.

    Attributes:
        donor: whose tokenizer makes tokens of the texts.
        allow_code: whether tasks may run code.
    """

    api: HfApi
    donor: Source
    seed: int
    allow_code: bool


@dataclass(frozen=True)
class Drawn:
    """Tokens to measure on, and each text as `overlap` compares it."""

    tokens: CalibrationSet
    values: list[DrawnText]


def draw(
    how: Drawing, calibration: Calibration, data: Source | PinnedTask, progress: Progress
) -> Drawn:
    """Draw, render and tokenise.

    Raises:
        SourceError: a configuration or split is not there.
        EvaluationError: a task has no such split, or its items cannot be rendered.
        CalibrationError: the template does not fit, or no text is left.
    """
    tokenizer = load_tokenizer(str(small_files(how.api, how.donor)), how.donor.name)
    rows = _rows(how, calibration, data)
    template = template_of(calibration, tokenizer)
    if isinstance(rows, items.TaskRows) and calibration.chat_template:
        rows = replace(rows, chat=chat_of(tokenizer))
    tokens = calibration_tokens(rows, calibration, tokenizer, how.seed)
    drawn = f"{len(tokens.ids):,} texts, {tokens.n_tokens:,} tokens"
    progress.say(f"{calibration.data}: {'; '.join((drawn, *tokens.notes))}.")
    facts = calibration_facts(calibration, _facts(data), how.seed, _tokenizer_digest(how.donor))
    texts = drawn_texts(rows, template, tokens)
    return Drawn(CalibrationSet(facts | tokens.facts, tokens), texts)


def _rows(how: Drawing, calibration: Calibration, data: Source | PinnedTask) -> Rows:
    if isinstance(data, Source):
        return load_rows(how.api, data, calibration.config, calibration.split)
    selection = replace(data.selection, allow_code=how.allow_code)
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


REMEDY = (
    "So --stream cannot measure it: merge without --stream where it fits. For a guide `lewis-hub "
    "importance` is enough there: the folder importance/ that it leaves beside the recipe is used."
)


def brought(step: Step, subject: Subject, folders: Folders, scratch: Path) -> Subject:
    """The same subject, in a folder that can be loaded, or block by block.

    Block by block goes what is too large to be in memory, and in a stream everything; and where it
    can be, what takes less memory so.

    Args:
        step: of a merge that was examined.
        subject: one of its sources.
        folders: of all sources; in a stream they hold small files alone.
        scratch: for what measuring needs and nobody keeps.

    Raises:
        CheckpointError: a source is broken.
        OutputError: there is not enough room.
    """
    source = next(one for one in step.inputs.models if one.pinned == subject.source)
    if step.places:
        return replace(subject, weights=_on_the_way(step, source, folders, scratch))
    folder = loadable(step, source, folders, scratch)
    placed = replace(subject, folder=folder)
    checkpoint = step.examined.checkpoints[source.pinned]
    return in_memory(placed, checkpoint, step.execution.loading, scratch)


def in_memory(subject: Subject, checkpoint: Checkpoint, loading: Loading, scratch: Path) -> Subject:
    """The same subject, of a complete folder, block by block where that must be or is better."""
    must_be = loading.is_by_block(checkpoint)
    by_block = must_be or loading.is_less_by_block(checkpoint, subject.n_tokens)
    weights = in_folder(subject.source, subject.folder, scratch) if by_block else None
    return replace(subject, weights=weights, may_be_whole=not must_be)


def _on_the_way(step: Step, source: Source, folders: Folders, scratch: Path) -> Weights:
    """The weights of a source by ranges: those of a block while the one before it is measured."""
    checkpoint = step.examined.checkpoints[source.pinned]
    folder = folders[source.pinned]
    if checkpoint.is_computed:
        folder = configured(step, source, folders, scratch)
    places, base = step.places, checkpoint.base
    ranges = scratch / f"ranges-{step.inputs.models.index(source)}"  # several may be on their way

    def parts(
        lists: Sequence[Sequence[TensorHeader]],
    ) -> Generator[dict[str, Tensor], None, None]:
        steps = [[SourceTensor(source.pinned, t, base) for t in tensors] for tensors in lists]
        with (
            SourceFiles(places, steps, ranges, step.execution.max_shard_bytes) as files,
            open_source(source.pinned, base, files.reader) as reader,
        ):
            for tensors in lists:
                yield _part(tensors, reader, files)

    return Weights(folder, checkpoint, parts, REMEDY, scratch)


def _part(tensors: Sequence[TensorHeader], reader: Reader, files: SourceFiles) -> dict[str, Tensor]:
    found = {tensor.name: _as_written(reader, tensor) for tensor in tensors}
    files.step_done()
    return found


def _as_written(reader: Reader, tensor: TensorHeader) -> Tensor:
    """A tensor in float32; one that is computed is rounded as it is where it is written out."""
    found = reader.tensor(tensor)
    if not tensor.is_computed:
        return found
    return found.to(torch_dtypes()[tensor.kept_dtype]).float()


def measure_task_vectors(
    step: Step, folders: Folders, known: ImportanceProfile, scratch: Path
) -> Iterator[SourceImportance]:
    """Measure every expert against the base; adapters and 8-bit floats as they are merged.

    Args:
        step: of a recipe with a base.
        folders: of all sources.
        known: earlier measurements; those of the same sources are taken over.
        scratch: for ranges of weights that are elsewhere.

    Raises:
        BrokenCheckpointError: a file is missing or ends too early.
        SourceError: bytes of a source cannot be had.
    """
    base = step.inputs.base
    assert base
    facts = {"measure": "task_vector", "base": step.inputs.content(base)}
    tensors = step.examined.checkpoints[base.pinned].tensors
    matrices = block_matrices({name: tensor.shape for name, tensor in tensors.items()})
    for expert in step.inputs.experts:
        content = step.inputs.content(expert)
        entry = reusable(known, content, facts)
        if entry and entry.modules.keys() == set(matrices):  # another version may take others
            modules = entry.modules
        else:
            modules = _measured(step, base, expert, matrices, step.places or folders, scratch)
        yield SourceImportance(expert.pinned, content, "expert", 0, modules, facts)


def _measured(  # noqa: PLR0913
    step: Step,
    base: Source,
    expert: Source,
    matrices: Sequence[str],
    places: Locations,
    scratch: Path,
) -> dict[str, float]:
    """Module -> how far the expert's weight is from the base's, as a share of it."""
    from lewis_hub.merge.task_vectors import relative_changes  # imports llvmlite

    first, second = (step.examined.checkpoints[one.pinned] for one in (base, expert))
    modules = {checkpoint_tensor(module, first.tensors): module for module in matrices}
    tensors = list(modules)
    n_elements = sum(first.tensors[name].n_elements for name in tensors)
    both = {base.pinned: first, expert.pinned: second}
    steps = [
        [SourceTensor(k, c.tensors[name], c.base) for k, c in both.items() if name in c.tensors]
        for name in tensors
    ]
    workers, most_bytes = step.execution.workers, step.execution.max_shard_bytes
    with (
        SourceFiles(places, steps, scratch / "ranges", most_bytes) as files,
        open_source(base.pinned, first.base, files.reader) as of_base,
        open_source(expert.pinned, second.base, files.reader) as of_expert,
        step.progress.stage(f"Measuring {expert.name}", n_elements, "items") as advance,
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


def translated(step: Step, source: Source, one: CalibrationSet) -> CalibrationSet:
    """A set in the ids of a source; itself where they are the base's.

    Raises:
        CalibrationError: the texts have a token that the source lacks.
    """
    found = step.examined.tokens.translations.get(source.pinned)
    if found is None:
        return one
    used = dict.fromkeys(i for text in one.tokens.ids for i in text)
    base = step.inputs.donor.name
    if lacking := [found.lacking.get(i, f"number {i}") for i in used if i not in found.ids]:
        problem = f"{source.name} has no token {lacking[0]!r}"
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        remedy = "Both have to see the same tokens: choose other texts, use guide `uniform`, or "
        remedy += "leave this model out."
        where = f"calibration texts, cut by the tokenizer of {base}"
        raise CalibrationError(where, problem + more, remedy)
    tokens = one.tokens
    ids = tuple(tuple(found.ids[i] for i in text) for text in tokens.ids)
    end = None if tokens.end is None else found.ids.get(tokens.end)
    own: CalibrationTokens = replace(tokens, ids=ids, end=end)
    return replace(one, tokens=own)


def require_understood(step: Step, sets: Sequence[CalibrationSet]) -> None:
    """Refuse texts that an expert cannot read, before its weights are downloaded.

    Args:
        step: what is calibrated.
        sets: one an expert.

    Raises:
        CalibrationError: they have a token that it lacks.
    """
    for expert, one in zip(step.inputs.experts, sets, strict=True):
        translated(step, expert, one)


Sets = Sequence[CalibrationSet]  # one an expert; none where nothing is measured


@dataclass(frozen=True)
class Guidance:
    """What was measured, what the guide made of it, and what a user should know about it.

    Attributes:
        profile: None where the guide measures nothing.
        rows: of each expert, the rows that it was measured on; none where nothing is measured.
    """

    profile: ImportanceProfile | None
    schedule: DensitySchedule
    notes: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]


def calibration_sets(step: Step) -> tuple[CalibrationSet, ...]:
    """Draw and tokenise each expert's calibration texts: one set per expert, equal ones shared.

    Nothing here needs a weight, so what is wrong with the data shows before a large download.
    Where neither guide nor method measures, no set is needed.

    Raises:
        SourceError, EvaluationError: a configuration or split is not there.
        CalibrationError: the template does not fit, no text is left, or items are scored.
    """
    sets = in_order(step.recipe, drawn_sets(step))
    if sets:
        require_understood(step, sets)
    return sets


def in_order(recipe: Recipe, drawn: Mapping[Calibration, Drawn]) -> tuple[CalibrationSet, ...]:
    """One set per expert, of what was drawn."""
    return tuple(drawn[one].tokens for one in calibrations(recipe) if one in drawn)


def drawn_sets(step: Step) -> dict[Calibration, Drawn]:
    """The same texts by what asks for them, each with what tells it from others."""
    recipe, inputs = step.recipe, step.inputs
    if not measures_on_texts(recipe):
        return {}
    how = Drawing(step.api, inputs.donor, recipe.seed, step.execution.allow_code)
    asked = dict.fromkeys(calibrations(recipe))
    drawn = {one: draw(how, one, inputs.data_of(one), step.progress) for one in asked}
    refuse_overlap(step, {one: found.values for one, found in drawn.items()})
    return drawn


def guide(
    step: Step,
    sets: Sets,
    folders: Folders,
    scratch: Path,
    stores: Sequence[Path],
    wanted: Sequence[Wanted] = (),
) -> Guidance:
    """Measure what is not known yet, and let the recipe's guide decide.

    Args:
        step: of a recipe with a guide.
        sets: from `calibration_sets`.
        folders: of all sources.
        scratch: for what measuring needs and nobody keeps.
        stores: files `importance.json`: the first is written after every source, from all of them
            measurements are taken. Those that are not there, or cannot be read, are passed over.
        wanted: one an expert, or none: second moments to leave where the same pass can.

    Raises:
        CalibrationError: a source cannot be measured, or the guide cannot decide.
    """
    asked, inputs = step.recipe.guide, step.inputs
    assert asked
    assert inputs.base
    chosen = registry.find(asked.name)
    profile = None
    if chosen.needs:
        profile = _measure(step, chosen, sets, folders, scratch, stores, wanted)
    tensors = step.examined.checkpoints[inputs.base.pinned].tensors
    decided = schedule(
        chosen,
        Bounds(asked.gamma, asked.epsilon, asked.default_density, asked.mean_density),
        [expert.pinned for expert in inputs.experts],
        {name: tensor.shape for name, tensor in tensors.items()},
        profile,
        Use(asked.apply_to, step.recipe.seed),
    )
    for note in decided.notes:
        step.progress.say(note)
    found = decided.schedule
    if step.recipe.slices:
        found = restacked(found, plan_of(step, None))
    rows = tuple(one.tokens.rows for one in sets)
    return Guidance(profile, found, decided.notes, rows)


def _subjects(
    step: Step, sets: Sets, folders: Folders, measure: Measure, wanted: Sequence[Wanted] = ()
) -> tuple[Subject, ...]:
    """The base with every distinct set, then each expert with its own, in its own ids.

    For a measure of pairs the experts alone, each against the base.
    """
    inputs, base = step.inputs, step.inputs.base
    assert base
    against_base = {"base": inputs.content(base)} if measure in OF_PAIRS else {}
    sets = [one.measured(measure, **against_base) for one in sets]
    measured: list[tuple[Source, Role, tuple[CalibrationSet, ...]]] = []
    if measure not in OF_PAIRS:
        distinct = tuple({id(one.tokens): one for one in sets}.values())
        measured.append((base, "base", distinct))
    for expert, one in zip(inputs.experts, sets, strict=True):
        measured.append((expert, "expert", (translated(step, expert, one),)))
    against = Place(base.pinned, folders[base.pinned]) if measure in OF_PAIRS else None
    left = [*[None] * (len(measured) - len(wanted)), *wanted]
    return tuple(
        Subject(
            *(source.pinned, inputs.content(source), role, folders[source.pinned], own, against),
            wanted=leave,
        )
        for (source, role, own), leave in zip(measured, left, strict=True)
    )


def _measure(  # noqa: PLR0913
    step: Step,
    chosen: Guide,
    sets: Sets,
    folders: Folders,
    scratch: Path,
    stores: Sequence[Path],
    wanted: Sequence[Wanted],
) -> ImportanceProfile:
    """Everything that the guide needs, one measure after the other."""
    known = _known(step, stores)
    entries: list[SourceImportance] = []

    def keep(now: ImportanceProfile) -> None:
        write_whole(stores[0], replace(now, sources=(*entries, *now.sources)).to_json())

    for measure in chosen.needs:
        if measure in WITHOUT_TEXTS:
            measured: tuple[SourceImportance, ...] = ()
            for one in measure_task_vectors(step, folders, known, scratch):
                measured = (*measured, one)
                keep(replace(known, sources=(*known.sources, *measured)))
        else:
            subjects = _subjects(step, sets, folders, measure, wanted)
            measured = _on_texts(step, measure, subjects, known, folders, scratch, keep).sources
        entries += measured
    return replace(known, sources=tuple(entries))


def _on_texts(  # noqa: PLR0913
    step: Step,
    measure: Measure,
    subjects: tuple[Subject, ...],
    known: ImportanceProfile,
    folders: Folders,
    scratch: Path,
    keep: Callable[[ImportanceProfile], None],
) -> ImportanceProfile:
    unknown = missing(subjects, known)
    left = {one.source for one in unknown}
    base = step.inputs.base
    if base and any(one.against for one in unknown):
        against = Place(base.pinned, loadable(step, base, folders, scratch))
        subjects = tuple(replace(one, against=against) for one in subjects)
    subjects = tuple(
        brought(step, one, folders, scratch) if one.source in left else one for one in subjects
    )
    n_tokens = sum(subject.n_tokens for subject in unknown)
    with step.progress.stage("Calibrating", n_tokens, "tokens") as advance:
        return calibrate(subjects, known, step.execution.device, advance, keep, measure)


def loaded_whole(
    step: Step, sets: Sets, folders: Folders, stores: Sequence[Path]
) -> tuple[str, ...]:
    """The sources that `guide` cannot measure block by block; of `folders` nothing is read."""
    asked, known = step.recipe.guide, _known(step, stores)
    assert asked
    return tuple(
        subject.source
        for measure in registry.find(asked.name).needs
        if measure not in {*SUMMARIES, *WITHOUT_TEXTS}
        for subject in missing(_subjects(step, sets, folders, measure), known)
    )


def _known(step: Step, stores: Sequence[Path]) -> ImportanceProfile:
    asked = step.recipe.guide
    assert asked
    found = [profile for path in stores if (profile := known_profile(path))]
    return ImportanceProfile(
        asked.name,
        asked.calibration.model_dump(mode="json", exclude_none=True) if asked.calibration else {},
        tuple(entry for profile in found for entry in profile.sources),
    )


def known_profile(path: Path) -> ImportanceProfile | None:
    """What an earlier run measured; None where there is nothing that can be read."""
    try:
        return ImportanceProfile.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ProfileError):
        return None
