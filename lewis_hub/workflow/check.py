"""Check a merge before the download, with headers and JSON files only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from huggingface_hub import HfApi

from lewis_hub import errors
from lewis_hub.calibration.grams import WIDEST, part_width
from lewis_hub.calibration.texts import check_columns, check_padding
from lewis_hub.checkpoint.lora import own_tensors
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.display import TextTable, size, to_html
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.embedding_files import of_source
from lewis_hub.evaluate.embeddings import require_embedder
from lewis_hub.evaluate.libraries import library_of
from lewis_hub.evaluate.scorable import require_tokenizer_files
from lewis_hub.evaluate.tasks import TaskSelection, locate_tasks
from lewis_hub.hub.facts import Licence, ModelFacts
from lewis_hub.hub.fetch import bytes_to_download, read_small, weight_files
from lewis_hub.hub.rows import describe_dataset, load_rows
from lewis_hub.hub.source import Source
from lewis_hub.merge.slices import count_blocks
from lewis_hub.methods.registry import Method
from lewis_hub.recipe.schema import ApplyTo, Calibration
from lewis_hub.tokenizer import TEMPLATE_SOURCES, template_of
from lewis_hub.workflow.alignment_needs import AlignmentNeeds
from lewis_hub.workflow.open import MergeSources, OpenedSource, ties
from lewis_hub.workflow.resources import (
    ANY_WIDTH,
    Measurement,
    Workload,
    grams_bytes,
    solving_bytes,
    weight_bytes,
)
from lewis_hub.workflow.task_data import PinnedTask

FREE_BYTES = 1 << 30  # of second moments of a model
MOST_MOMENTS = 16  # times the bytes of its weights; published models have up to 7 times the bytes
MAX_PARTS = 64  # equal ones of a matrix's inputs; published models have 8 at most
UNUSUAL = (
    "Merge models with matrices of the usual proportions, or choose a method that needs no second "
    "moments of their inputs."
)
POSITIONS = ("max_position_embeddings", "n_positions")  # keys of `config.json`
SMALL_BYTES = 20_000_000  # rows of a smaller dataset are read to find its columns


@dataclass(frozen=True)
class SourceReport:
    """A source, described by its headers and JSON files."""

    role: str
    name: str
    commit_sha: str
    size_bytes: int
    dtype: str  # the dtype of most parameters; `?` for pickles, which are not opened yet
    n_parameters: int  # 0 for pickles
    n_vocabulary: int | None
    licence: str | None
    tied: bool  # input and output embeddings share one tensor


@dataclass(frozen=True)
class CheckReport:
    """The result of a check: problems, notes, and the resources of the merge."""

    sources: tuple[SourceReport, ...]
    problems: tuple[str, ...]  # reasons why the merge cannot run; empty if it can
    notes: tuple[str, ...]  # facts that a user should know, without an action
    download_bytes: int  # size of the files that are not in the cache yet
    output_bytes: int
    # peak size of all other files: the merged model, its twins, statistics, sources that are
    # written out to be measured or scored, converted pickles, and `states_bytes`
    disk_bytes: int
    # upper bound for hidden states of calibration texts on the disk; 0 if they fit into memory
    states_bytes: int
    memory_bytes: int  # upper bound for the largest step

    def to_json(self) -> dict[str, Any]:
        """Return the document of `lewis-hub check --json`."""
        return {"status": "failed" if self.problems else "fine", **asdict(self)}

    @property
    def table(self) -> TextTable:
        """A row per source."""
        header = ("role", "source", "commit", "size", "dtype", "parameters", "vocabulary")
        rows = (
            (
                source.role,
                source.name,
                source.commit_sha.removeprefix("sha256:")[:8],
                size(source.size_bytes),
                source.dtype,
                f"{source.n_parameters:,}" if source.n_parameters else "?",
                f"{source.n_vocabulary:,}" if source.n_vocabulary else "?",
                "yes" if source.tied else "no",
                source.licence or "none given",
            )
            for source in self.sources
        )
        return TextTable((*header, "tied", "licence"), tuple(rows))

    @property
    def lines(self) -> tuple[str, ...]:
        """The resources that the merge needs, then notes and problems."""
        return (
            f"download {size(self.download_bytes)}, disk {size(self.disk_bytes)}, "
            f"memory at most {size(self.memory_bytes)}, merged model {size(self.output_bytes)}",
            *(f"note: {note}" for note in self.notes),
            *(f"problem: {problem}" for problem in self.problems),
            *(() if self.problems else ("No problems found.",)),
        )

    def __repr__(self) -> str:
        return "\n".join(self.lines)

    def _repr_html_(self) -> str:
        return to_html(self.table, *self.lines)


def require_fine(report: CheckReport) -> None:
    """Refuse a merge with problems."""
    if report.problems:
        raise errors.CheckFailedError(report.problems)


def together(reports: Mapping[str, CheckReport], problems: Sequence[str]) -> CheckReport:
    """Join the reports of merges that are made one after the other, by their names.

    A later merge that reads their results is examined when these exist.
    """
    every = [*reports.values()]
    notes = [f"{name}: {note}" for name, one in reports.items() for note in one.notes]
    found = [f"{name}: {problem}" for name, one in reports.items() for problem in one.problems]
    known = ", ".join(reports)
    later = f"what uses {known} is checked when that is merged; the sizes are those of {known}."
    return CheckReport(
        sources=tuple(dict.fromkeys(source for one in every for source in one.sources)),
        problems=(*found, *problems),
        notes=(*notes, later),
        download_bytes=sum(one.download_bytes for one in every),
        output_bytes=sum(one.output_bytes for one in every),
        disk_bytes=sum(one.disk_bytes for one in every),
        states_bytes=max(one.states_bytes for one in every),
        memory_bytes=max(one.memory_bytes for one in every),
    )


def make_report(
    workload: Workload,
    facts: Mapping[str, ModelFacts],  # by pinned source
    problems: Sequence[str],
    notes: Sequence[str],
    aligning: AlignmentNeeds,
) -> CheckReport:
    """Describe the sources, and estimate the disk and memory that the merge takes."""
    models, states_bytes = workload.sources.models, workload.states_bytes()
    return CheckReport(
        sources=tuple(_report_source(model, facts[model.pinned].licence) for model in models),
        problems=tuple(problems),
        notes=tuple(notes),
        download_bytes=sum(bytes_to_download(model.source) for model in models),
        output_bytes=workload.output_bytes(),
        disk_bytes=workload.disk_bytes() + aligning.disk_bytes + states_bytes,
        states_bytes=states_bytes,
        memory_bytes=max(workload.memory_bytes(), aligning.memory_bytes),
    )


def _report_source(opened: OpenedSource, licence: Licence | None) -> SourceReport:
    checkpoint, source = opened.checkpoint, opened.source
    tensors = own_tensors(checkpoint) if source.is_adapter else tuple(checkpoint.tensors.values())
    role = "adapter" if source.is_adapter else "expert"
    by_dtype: Counter[str] = Counter()
    for tensor in tensors:
        dtype = tensor.scaled.codes if tensor.scaled else tensor.dtype
        by_dtype[dtype] += tensor.n_elements
    config = opened.config
    text_config = config.get("text_config") or config
    return SourceReport(
        role="base" if opened.role == "base" else role,
        name=source.name + (f"@{source.revision}" if source.revision else ""),
        commit_sha=source.commit_sha,
        size_bytes=source.size_bytes(weight_files(source)),
        dtype=next((dtype for dtype, _ in by_dtype.most_common(1)), "?"),
        n_parameters=sum(by_dtype.values()),
        n_vocabulary=text_config.get("vocab_size"),
        licence=licence.identifier if licence else None,
        tied=bool(ties(config)),
    )


def guide_refusals(apply_to: ApplyTo, method: Method, *, is_stack: bool) -> list[str]:
    """Return the reason why a guide would have no effect with a method, if there is one."""
    if is_stack and apply_to != "density":
        return ["guide: in a stack a guide can only set densities. Set `apply_to: density`."]
    weighs = method.takes_task_vectors and method.takes("weights")
    if apply_to != "density" and not weighs:
        return [
            f"guide: `{method.name}` has no task vector weights that `apply_to` could scale. "
            "Set `apply_to: density`, or use `ties`, `dare_ties` or `task_arithmetic`."
        ]
    if apply_to != "weight" and not method.takes_density:
        return [
            f"guide: `{method.name}` keeps every entry, so densities would have no effect. "
            "Use `ties`, `dare_ties` or `dare_linear`, or remove the guide."
        ]
    return []


def depth_refusals(sources: MergeSources) -> list[str]:
    """Refuse experts whose blocks a guide cannot compare with those of the base."""
    donor = count_blocks(sources.donor.checkpoint)
    depths = [(expert.name, count_blocks(expert.checkpoint)) for expert in sources.experts]
    return [
        f"guide: {name} has {depth} blocks and the base {donor}, so their importance cannot be "
        "compared block by block. Use guide `uniform`, or set `density`."
        for name, depth in depths
        if depth != donor
    ]


def padding_refusals(measurement: Measurement, sources: MergeSources) -> list[str]:
    """Refuse models whose configuration allows fewer positions than `lewis_reference` pads to."""
    if "lewis_reference" not in measurement.measures:
        return []
    longest = max((one.max_tokens for one in measurement.calibrations), default=0)
    problems = []
    for source in sources.distinct:
        text_config = source.config.get("text_config") or source.config
        n_positions = next((text_config[key] for key in POSITIONS if key in text_config), None)
        try:
            known = n_positions if isinstance(n_positions, int) else None
            check_padding(source.name, longest, known)
        except errors.CalibrationModelError as error:
            problems.append(str(error))
    return problems


def moments_refusals(measurement: Measurement, sources: MergeSources) -> list[str]:
    """Refuse models whose second moments are far larger than their weights, or in many parts."""
    problems = []
    for source in sources.distinct:
        n_bytes = grams_bytes(source.checkpoint, measurement.moments)
        stored_bytes = weight_bytes(source.checkpoint.tensors.values())
        if n_bytes > FREE_BYTES + MOST_MOMENTS * stored_bytes:
            problems.append(
                f"{source.name} has {size(stored_bytes)} of weights, and its second moments take "
                f"{size(n_bytes)}. {UNUSUAL}"
            )
        problems += [
            f"{source.name} has a matrix with {width:,} inputs, whose second moments are in "
            f"{n_parts:,} parts. {UNUSUAL}"
            for width in sorted(_widths(source.checkpoint) if measurement.solves else ())
            if (n_parts := width // part_width(width, WIDEST)) > MAX_PARTS
        ]
    return problems


def _widths(checkpoint: Checkpoint) -> set[int]:
    shapes = [tensor.shape for tensor in checkpoint.tensors.values()]
    return {shape[-1] for shape in shapes if len(shape) > 1 and shape[-1]}


def solving_refusals(
    measurement: Measurement, sources: MergeSources, *, makes_squares: bool
) -> list[str]:
    """Refuse models whose widest matrix takes far more memory to fit than all their weights."""
    if not (measurement.solves or makes_squares):
        return []
    models = [source.checkpoint for source in sources.distinct]
    widest = ANY_WIDTH if makes_squares else WIDEST
    squares_bytes = max(solving_bytes(one, len(models), widest) for one in models)
    squares_bytes *= 2 if measurement.in_sequence else 1
    stored_bytes = sum(weight_bytes(one.tensors.values()) for one in models)
    if squares_bytes <= 2 * FREE_BYTES + 2 * stored_bytes:
        return []
    return [
        f"The method takes {size(squares_bytes)} of memory for the inputs of one matrix, and the "
        f"models have {size(stored_bytes)} of weights. {UNUSUAL}"
    ]


def benchmark_refusals(selection: TaskSelection, metrics: Iterable[tuple[str, str]]) -> list[str]:
    """Refuse unknown tasks, and unknown metrics of gates and leaderboards as (task, metric)."""
    library = library_of(selection)
    try:
        library.require_tasks(selection)
        for task, metric in metrics:
            library.require_metric(selection, task, metric)
    except EvaluationError as error:
        return [str(error)]
    return []


def chat_refusals(scored: Iterable[Source], api: HfApi) -> list[str]:
    """Refuse whole models without a chat template; an adapter uses the template of its base."""
    problems = []
    for source in {model.pinned: model for model in scored if not model.is_adapter}.values():
        files = {name: read_small(api, source, name) for name in TEMPLATE_SOURCES}
        known = {name: content for name, content in files.items() if content is not None}
        if template_of(source.name, known) is None:
            problems.append(
                f"evaluate.chat_template: {source.pinned} has no chat template.\n"
                "Leave it out of `evaluate.compare`, or score without `chat_template`."
            )
    return problems


def tokenizer_refusals(scored: Iterable[OpenedSource]) -> list[str]:
    """Return the whole models without a tokenizer; an adapter uses that of its base."""
    problems = []
    whole = (model for model in scored if not model.source.is_adapter)
    for model in {one.pinned: one for one in whole}.values():
        try:
            paths = (file.path for file in model.source.files)
            require_tokenizer_files(model.pinned, paths, model.config)
        except EvaluationError as error:
            problems.append(str(error))
    return problems


def embedding_refusals(scored: Iterable[Source], api: HfApi) -> list[str]:
    """Return the reasons why models cannot be scored as embedding models."""
    problems = []
    for source in {model.pinned: model for model in scored if not model.is_adapter}.values():
        try:
            require_embedder(of_source(api, source))
        except errors.LewisHubError as error:
            problems.append(str(error))
    return problems


def data_refusals(
    calibrations: Iterable[Calibration],
    data: Mapping[Calibration, Source | PinnedTask],
    api: HfApi,
    *,
    allow_code: bool,
) -> list[str]:
    """Return the problems of calibration data that are known before its rows are loaded."""
    problems = []
    for calibration in dict.fromkeys(one for one in calibrations if one in data):
        source = data[calibration]
        try:
            if isinstance(source, Source):
                check_columns(calibration, _columns(api, calibration, source) or None)
            else:
                _check_task(replace(source.selection, allow_code=allow_code), calibration)
        except (errors.CalibrationError, EvaluationError, errors.SourceError) as error:
            problems.append(str(error))
    return problems


def _columns(api: HfApi, calibration: Calibration, source: Source) -> tuple[str, ...]:
    """Return the columns of the split; empty if only the rows of a large dataset show them."""
    description = describe_dataset(api, source, calibration.config, calibration.split)
    n_bytes = sum(file.size_bytes for file in source.files)
    if description.columns or n_bytes > SMALL_BYTES:
        return description.columns
    return load_rows(api, source, calibration.config, calibration.split).columns


def _check_task(selection: TaskSelection, calibration: Calibration) -> None:
    """Refuse a split that the task scores; whether the split exists is known once it is loaded."""
    for file in locate_tasks(selection).files:
        splits = [file.config.get(f"{kind}_split") for kind in ("training", "fewshot")]
        scored = file.config.get("test_split") or file.config.get("validation_split")
        if scored == calibration.split and not calibration.allow_overlap:
            listed = " or ".join(f"`{split}`" for split in dict.fromkeys(filter(None, splits)))
            problem = f"the task scores split `{scored}`, so calibration must not use it."
            remedy = f"Set `split` to {listed}." if listed else "Name a `dataset` instead."
            raise EvaluationError(file.name, problem, remedy)
