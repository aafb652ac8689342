"""Check: all that can be known before a download, from headers and JSON files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.adapter import own_tensors
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import CheckFailedError, MergeError
from lewis_hub.hub.facts import ModelFacts, model_facts
from lewis_hub.hub.fetch import bytes_to_download, weight_files
from lewis_hub.hub.source import Source
from lewis_hub.recipe import Recipe
from lewis_hub.stages.adapters import Adapter, adapter_notes, open_adapter
from lewis_hub.stages.data_checking import data_problems
from lewis_hub.stages.fitting import left_alone, misfits, settle
from lewis_hub.stages.loading import Loading, loading_notes, loading_problems
from lewis_hub.stages.needs import needs
from lewis_hub.stages.opening import Opened, open_model, pickle_notes, quantised_notes, ties
from lewis_hub.stages.refusing import benchmark_refusals, chat_refusals, padding_refusals, refusals
from lewis_hub.stages.slicing import outline
from lewis_hub.stages.sources import Inputs, needs_grams
from lewis_hub.stages.tokenizers import Tokens
from lewis_hub.stages.vocabulary import calibration_notes, examine_tokens

if TYPE_CHECKING:
    from huggingface_hub import HfApi


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


@dataclass(frozen=True)
class Examined:
    """The report, and what was read for it."""

    report: CheckReport
    checkpoints: Mapping[str, Checkpoint]  # by pinned source
    facts: Mapping[str, ModelFacts]  # by pinned source
    tokens: Tokens


def examine(
    recipe: Recipe,
    inputs: Inputs,
    api: HfApi,
    *,
    allow_code: bool,
    loading: Loading = Loading(),  # noqa: B008 - frozen
) -> Examined:
    """Read headers, configurations and cards of all sources, and hold them against the recipe.

    Args:
        recipe: what is asked.
        inputs: pinned.
        api: the Hub.
        allow_code: whether benchmarks may run code that a model wrote.
        loading: where models are measured, and how much of one may be in memory there.

    Raises:
        SourceError: a file cannot be read.
        CheckpointError: a header is broken.
    """
    facts = {source.pinned: model_facts(api, source) for source in inputs.models}
    found = _open(inputs, api)
    checkpoints, tokens, problems = found.checkpoints, Tokens(), list(found.problems)
    if found.is_read and not problems:
        if not recipe.slices:
            checkpoints = settle(inputs.donor.pinned, checkpoints, found.configs)
        tokens = examine_tokens(recipe, inputs, api, checkpoints, found.configs)
        problems = [*tokens.problems]
        if not recipe.slices:  # a stack is compared when planned
            problems += misfits(recipe, inputs, checkpoints, tokens)
    output = checkpoints[inputs.donor.pinned]
    if not problems:
        problems = refusals(recipe, inputs, checkpoints, tokens, facts)
        problems += padding_refusals(recipe, inputs, found.configs)
        problems += benchmark_refusals(recipe, allow_code=allow_code)
        problems += chat_refusals(recipe, inputs, api)
        problems += data_problems(recipe, inputs, api, allow_code=allow_code)
        problems += loading_problems(recipe, inputs, checkpoints, loading)
    if recipe.slices and found.is_read and not problems:
        try:
            output = outline(recipe, inputs, checkpoints, found.configs, tokens.alignment)
        except MergeError as error:
            problems.append(str(error))
    needed = needs(recipe, inputs, checkpoints, output, loading)
    report = CheckReport(
        sources=tuple(
            _report(source, inputs, checkpoints, found.configs, facts) for source in inputs.models
        ),
        problems=tuple(problems),
        notes=(
            *_notes(recipe, inputs, found),
            *loading_notes(recipe, inputs, checkpoints, loading),
            *(left_alone(recipe, inputs, checkpoints) if found.is_read else ()),
            *tokens.notes,
            *calibration_notes(recipe, inputs, tokens),
        ),
        download_bytes=sum(bytes_to_download(api, source) for source in inputs.models),
        output_bytes=needed.output_bytes,
        disk_bytes=needed.disk_bytes + needed.states_bytes,
        states_bytes=needed.states_bytes,
        memory_bytes=needed.memory_bytes,
    )
    return Examined(report, checkpoints, facts, tokens)


@dataclass(frozen=True)
class _Read:
    """What headers and configurations say; `models` are the sources that are no adapters."""

    models: Mapping[str, Opened]
    adapters: Mapping[str, Adapter]
    checkpoints: Mapping[str, Checkpoint]  # empty ones of pickles that were not converted yet
    configs: Mapping[str, Mapping[str, Any]]

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(one.problem for one in self.models.values() if one.problem)

    @property
    def is_read(self) -> bool:
        return all(checkpoint.tensors for checkpoint in self.checkpoints.values())


def _open(inputs: Inputs, api: HfApi) -> _Read:
    models = {s.pinned: open_model(api, s) for s in inputs.models if not s.is_adapter}
    base = models[inputs.donor.pinned]
    unread = _Read(models, {}, {}, {})
    if unread.problems and inputs.adapters:
        raise CheckFailedError(unread.problems)  # nothing can be put on what cannot be read
    put_on = inputs.adapters if base.checkpoint.tensors else ()
    adapters = {s.pinned: open_adapter(api, s, base.checkpoint) for s in put_on}
    checkpoints = {pinned: one.checkpoint for pinned, one in models.items()}
    checkpoints |= {s.pinned: Checkpoint(s.pinned, {}, {}) for s in inputs.adapters}
    checkpoints |= {pinned: adapter.checkpoint for pinned, adapter in adapters.items()}
    configs = {pinned: one.config for pinned, one in models.items()}
    configs |= {source.pinned: base.config for source in inputs.adapters}
    return _Read(models, adapters, checkpoints, configs)


def require_fine(report: CheckReport) -> None:
    """Stop before any download.

    Raises:
        CheckFailedError: the report has problems.
    """
    if report.problems:
        raise CheckFailedError(report.problems)


def _report(
    source: Source,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    configs: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, ModelFacts],
) -> SourceReport:
    checkpoint = checkpoints[source.pinned]
    tensors = own_tensors(checkpoint) if source.is_adapter else tuple(checkpoint.tensors.values())
    role = "adapter" if source.is_adapter else "expert"
    by_dtype: Counter[str] = Counter()
    for tensor in tensors:
        dtype = tensor.scaled.codes if tensor.scaled else tensor.dtype
        by_dtype[dtype] += tensor.n_elements
    config = configs[source.pinned]
    text_config = config.get("text_config") or config
    return SourceReport(
        role="base" if source is inputs.base else role,
        name=source.name + (f"@{source.revision}" if source.revision else ""),
        commit_sha=source.commit_sha,
        size_bytes=source.size_bytes(weight_files(source)),
        dtype=next((dtype for dtype, _ in by_dtype.most_common(1)), "?"),
        n_parameters=sum(by_dtype.values()),
        n_vocabulary=text_config.get("vocab_size"),
        licence=facts[source.pinned].licence,
        tied=bool(ties(config)),
    )


def _notes(recipe: Recipe, inputs: Inputs, found: _Read) -> list[str]:
    notes = []
    donor, configs = inputs.donor, found.configs
    if "auto_map" in configs[donor.pinned] and donor.name not in recipe.allow_code:
        notes.append(
            f"{donor.name} comes with Python code, which is not carried into the merge; list it "
            "under `allow_code` if its architecture needs it."
        )
    asked = recipe.evaluate
    told = asked is not None and "compare" in asked.model_fields_set and "uniform" in asked.compare
    if told and recipe.guide is None and not needs_grams(recipe):
        notes.append("without a guide the merge is its own uniform twin: it is scored once.")
    tied = bool(ties(configs[donor.pinned]))
    notes += adapter_notes(recipe, inputs, found.adapters, tied=tied)
    return [*notes, *quantised_notes(recipe, inputs, found.models), *pickle_notes(inputs)]
