"""Check: all that can be known before a download, from headers and JSON files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.model import check_padding
from lewis_hub.calibration.texts import check_columns
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.lora import own_tensors
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import (
    CalibrationError,
    CalibrationModelError,
    CheckFailedError,
    EvaluationError,
    SourceError,
)
from lewis_hub.evaluate.tasks import TaskSelection, check_tasks, locate_tasks, require_metric
from lewis_hub.hub.fetch import read_small, weight_files
from lewis_hub.hub.rows import describe_dataset, load_rows
from lewis_hub.hub.source import Source
from lewis_hub.merge.compare import compare, passed_over, settle_heads
from lewis_hub.methods.registry import Method
from lewis_hub.recipe.schema import ApplyTo, Calibration, Missing
from lewis_hub.tokenizer.union import KEEPERS, template_of
from lewis_hub.workflow.open import MergeSources, OpenedSource, ties
from lewis_hub.workflow.resolve import PinnedTask
from lewis_hub.workflow.resources import Measurement

if TYPE_CHECKING:
    from huggingface_hub import HfApi


POSITIONS = ("max_position_embeddings", "n_positions")  # what configurations call their number
SMALL_BYTES = 20_000_000  # of a dataset: then its rows are read to see their columns


@dataclass(frozen=True)
class SourceReport:
    """What the headers and JSON files of one source say."""

    role: str
    name: str
    commit_sha: str
    size_bytes: int
    dtype: str  # the dtype that most parameters have; `?` of pickles, where nobody knows yet
    n_parameters: int  # 0 there
    n_vocabulary: int | None
    licence: str | None
    tied: bool  # input and output embeddings share one tensor


@dataclass(frozen=True)
class CheckReport:
    """Whether a merge can be done, and what it will take.

    Attributes:
        problems: what keeps it from being done; none means that it can.
        notes: what a user should know and need not answer.
        download_bytes: what is not in the cache yet.
        disk_bytes: beside the download: the merged model, and for as long as they are measured or
            scored its twins, statistics, each source that is written out for that, and
            `states_bytes`; pickles as safetensors.
        states_bytes: at most, of the hidden states of calibration texts: none where they are few.
        memory_bytes: at most, of the largest step.
    """

    sources: tuple[SourceReport, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    download_bytes: int
    output_bytes: int
    disk_bytes: int
    states_bytes: int
    memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The document of `lewis-hub check --json`."""
        return {"status": "failed" if self.problems else "fine", **asdict(self)}


def require_fine(report: CheckReport) -> None:
    """Stop before any download.

    Raises:
        CheckFailedError: the report has problems.
    """
    if report.problems:
        raise CheckFailedError(report.problems)


def report_source(source: OpenedSource) -> SourceReport:
    """Say what the headers and JSON files of a source say."""
    checkpoint, found = source.checkpoint, source.source
    tensors = own_tensors(checkpoint) if found.is_adapter else tuple(checkpoint.tensors.values())
    role = "adapter" if found.is_adapter else "expert"
    by_dtype: Counter[str] = Counter()
    for tensor in tensors:
        dtype = tensor.scaled.codes if tensor.scaled else tensor.dtype
        by_dtype[dtype] += tensor.n_elements
    config = source.config
    text_config = config.get("text_config") or config
    return SourceReport(
        role="base" if source.role == "base" else role,
        name=found.name + (f"@{found.revision}" if found.revision else ""),
        commit_sha=found.commit_sha,
        size_bytes=found.size_bytes(weight_files(found)),
        dtype=next((dtype for dtype, _ in by_dtype.most_common(1)), "?"),
        n_parameters=sum(by_dtype.values()),
        n_vocabulary=text_config.get("vocab_size"),
        licence=source.facts.licence,
        tied=bool(ties(config)),
    )


def guide_refusals(apply_to: ApplyTo, method: Method, *, is_stack: bool) -> list[str]:
    """Say why a guide would do nothing under a method.

    Args:
        apply_to: what its schedule sets.
        method: of the merge.
        is_stack: whether blocks are stacked.
    """
    if is_stack and apply_to != "density":
        return ["guide: a stack takes densities alone. Set `apply_to: density`."]
    weighs = method.takes_task_vectors and method.takes("weights")
    if apply_to != "density" and not weighs:
        return [
            f"guide: `{method.name}` has no weights of task vectors for `apply_to` to scale. "
            "Set `apply_to: density`, or use `ties`, `dare_ties` or `task_arithmetic`."
        ]
    if apply_to != "weight" and not method.takes_density:
        return [
            f"guide: `{method.name}` keeps every entry, so densities would do nothing. "
            "Use `ties`, `dare_ties` or `dare_linear`, or remove the guide."
        ]
    return []


def padding_refusals(measurement: Measurement, sources: MergeSources) -> list[str]:
    """Refuse models whose configuration allows fewer positions than `lewis_reference` pads to."""
    if "lewis_reference" not in measurement.measures:
        return []
    longest = max((one.max_tokens for one in measurement.calibrations), default=0)
    found = []
    for source in sources.distinct:
        text = source.config.get("text_config") or source.config
        told = next((text[key] for key in POSITIONS if key in text), None)
        try:
            check_padding(source.name, longest, told if isinstance(told, int) else None)
        except CalibrationModelError as error:
            found.append(str(error))
    return found


def benchmark_refusals(selection: TaskSelection, metrics: Iterable[tuple[str, str]]) -> list[str]:
    """Refuse tasks that are not there, and metrics that they lack.

    Args:
        selection: tasks to score.
        metrics: (task, metric) of gates and of leaderboards.
    """
    try:
        check_tasks(selection)
        for task, metric in metrics:
            require_metric(selection, task, metric)
    except EvaluationError as error:
        return [str(error)]
    return []


def chat_refusals(scored: Iterable[Source], api: HfApi) -> list[str]:
    """Refuse models without a chat template, where prompts go through it.

    An adapter's expert has its base's.
    """
    found = []
    for source in {one.pinned: one for one in scored if not one.is_adapter}.values():
        files = {name: read_small(api, source, name) for name in KEEPERS}
        there = {name: content for name, content in files.items() if content is not None}
        if template_of(source.name, there) is None:
            found.append(
                f"evaluate.chat_template: {source.pinned} has no chat template.\n"
                "Leave it out of `evaluate.compare`, or score without `chat_template`."
            )
    return found


def data_refusals(
    calibrations: Iterable[Calibration],
    data: Mapping[Calibration, Source | PinnedTask],
    api: HfApi,
    *,
    allow_code: bool,
) -> list[str]:
    """Say what is known to be wrong with the calibration data.

    Args:
        calibrations: that are measured on.
        data: what each draws from.
        api: the Hub.
        allow_code: whether tasks may run code.
    """
    return [
        problem
        for calibration in dict.fromkeys(calibrations)
        for problem in _problems(api, calibration, data[calibration], allow_code=allow_code)
    ]


def _problems(
    api: HfApi, calibration: Calibration, data: Source | PinnedTask, *, allow_code: bool
) -> Iterator[str]:
    try:
        if isinstance(data, Source):
            check_columns(calibration, _columns(api, calibration, data))
        else:
            _check_task(replace(data.selection, allow_code=allow_code), calibration)
    except (CalibrationError, EvaluationError, SourceError) as error:
        yield str(error)


def _columns(api: HfApi, calibration: Calibration, source: Source) -> tuple[str, ...]:
    """Of the split; none where only many rows would tell."""
    told = describe_dataset(api, source, calibration.config, calibration.split)
    n_bytes = sum(file.size_bytes for file in source.files)
    if told.columns or n_bytes > SMALL_BYTES:
        return told.columns
    return load_rows(api, source, calibration.config, calibration.split).columns


def _check_task(selection: TaskSelection, calibration: Calibration) -> None:
    """What its files tell; whether its data have the split shows when they are loaded."""
    for file in locate_tasks(selection).files:
        splits = [file.config.get(f"{kind}_split") for kind in ("training", "fewshot")]
        scored = file.config.get("test_split") or file.config.get("validation_split")
        if scored == calibration.split and not calibration.allow_overlap:
            listed = " or ".join(f"`{one}`" for one in dict.fromkeys(filter(None, splits)))
            problem = f"`{scored}` is the split that it scores, and calibration must not see it."
            remedy = f"Set `split` to {listed}." if listed else "Name a `dataset` instead."
            raise EvaluationError(file.name, problem, remedy)


Configs = Mapping[str, Mapping[str, Any]]  # pinned source -> its config.json


def settle(
    donor: str, checkpoints: Mapping[str, Checkpoint], configs: Configs
) -> dict[str, Checkpoint]:
    """Give sources that tie head and embeddings, as the base does, a head where the base has one.

    A configuration that is silent means what its architecture means by that: to tie, where a
    source with a silent one stores no head. `donor` is the base's key in both mappings.
    """
    stated = {pinned: ties(configs[pinned]) for pinned in checkpoints}
    silent = any(
        stated[pinned] is None and not any(map(names.is_head, checkpoint.tensors))
        for pinned, checkpoint in checkpoints.items()
    )
    tied = {pinned: silent if said is None else said for pinned, said in stated.items()}
    base = checkpoints[donor]
    return {
        pinned: settle_heads(base, one) if tied[pinned] and tied[donor] else one
        for pinned, one in checkpoints.items()
    }


def misfits(
    donor: Checkpoint,
    experts: Sequence[Checkpoint],
    missing: Missing,
    rows: Collection[str],
    *,
    tokenizers_clash: bool,
) -> list[str]:
    """Say what keeps the sources from being merged tensor by tensor.

    Args:
        donor: headers that the others are compared with.
        experts: headers of the others.
        missing: "base": the donor's tensors stand in for those that an expert lacks.
        rows: tensors that are put together row by row.
        tokenizers_clash: then that message comes first, and numbers of rows are not told.
    """
    found = compare(donor, experts, missing, rows)
    return [str(one) for one in found if not (tokenizers_clash and one.kind == "vocabulary")]


def left_alone(
    donor: Checkpoint, experts: Sequence[Checkpoint], missing: Missing
) -> tuple[str, ...]:
    """Say what `missing: base` keeps out of the merge, a sentence each."""
    return passed_over(donor, experts) if missing == "base" else ()
