"""Check: all that can be known before a download, from headers and JSON files alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.adapter import own_tensors
from lewis_hub.checkpoint.reader import Checkpoint, read_headers
from lewis_hub.errors import CheckFailedError, EvaluationError, MergeError, PublishError
from lewis_hub.evaluate.tasks import check_tasks
from lewis_hub.hub.facts import ModelFacts, combined_licence, model_facts
from lewis_hub.hub.fetch import bytes_to_download, read_small, weight_files
from lewis_hub.hub.remote import read_range
from lewis_hub.hub.source import Source
from lewis_hub.methods import registry
from lewis_hub.recipe import Recipe
from lewis_hub.stages.adapters import Adapter, adapter_notes, are_loaded, open_adapter
from lewis_hub.stages.evaluation import has_twin, selection
from lewis_hub.stages.fitting import left_alone, misfits, settle
from lewis_hub.stages.merging import plan
from lewis_hub.stages.slicing import outline
from lewis_hub.stages.sources import Inputs
from lewis_hub.stages.tokenizers import Tokens
from lewis_hub.stages.vocabulary import examine_tokens, not_calibrated

if TYPE_CHECKING:
    from huggingface_hub import HfApi

INDEX = "model.safetensors.index.json"
ENGINE_BYTES = 300_000_000  # interpreter and the engine's buffers, whatever the models' size
TORCH_BYTES = 900_000_000  # torch and transformers, loaded to calibrate and to evaluate


@dataclass(frozen=True)
class SourceReport:
    """What the headers and JSON files of one source say."""

    role: str
    name: str
    commit_sha: str
    size_bytes: int
    dtype: str  # the dtype that most parameters have
    n_parameters: int
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
            scored its uniform twin and each adapter's expert.
        memory_bytes: at most, of the largest step.
    """

    sources: tuple[SourceReport, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    download_bytes: int
    output_bytes: int
    disk_bytes: int
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


def examine(recipe: Recipe, inputs: Inputs, api: HfApi, *, allow_code: bool) -> Examined:
    """Read headers, configurations and cards of all sources, and hold them against the recipe.

    Args:
        recipe: what is asked.
        inputs: pinned.
        api: the Hub.
        allow_code: whether benchmarks may run code that a model wrote.

    Raises:
        SourceError: a file cannot be read.
        CheckpointError: a header is broken.
    """
    whole = [source for source in inputs.models if not source.is_adapter]
    checkpoints = {source.pinned: open_headers(api, source) for source in whole}
    facts = {source.pinned: model_facts(api, source) for source in inputs.models}
    configs = {source.pinned: _config(api, source) for source in whole}
    problems = [text for source in whole if (text := _quantised(source, configs))]
    if problems and inputs.adapters:
        raise CheckFailedError(tuple(problems))  # nothing can be put on what cannot be read
    donor = inputs.donor.pinned
    adapters = {s.pinned: open_adapter(api, s, checkpoints[donor]) for s in inputs.adapters}
    checkpoints |= {pinned: adapter.checkpoint for pinned, adapter in adapters.items()}
    configs |= {pinned: configs[donor] for pinned in adapters}
    tokens = Tokens()
    if not recipe.slices:  # of which the parts that are taken are compared, when they are planned
        checkpoints = settle(inputs, checkpoints, configs)
        tokens = examine_tokens(recipe, inputs, api, checkpoints, configs)
        problems += [*tokens.problems, *misfits(recipe, inputs, checkpoints, tokens)]
    output = checkpoints[donor]
    if not problems:
        problems = _refusals(recipe, inputs, checkpoints, tokens, facts)
        problems += _benchmark_refusals(recipe, allow_code=allow_code)
    if recipe.slices and not problems:
        try:
            output = outline(recipe, inputs, checkpoints, configs)
        except MergeError as error:
            problems.append(str(error))
    output_bytes = _output_bytes(output, recipe.output_dtype)
    report = CheckReport(
        sources=tuple(
            _report(source, inputs, checkpoints, configs, facts) for source in inputs.models
        ),
        problems=tuple(problems),
        notes=(
            *_notes(recipe, inputs, configs, adapters),
            *left_alone(recipe, inputs, checkpoints),
            *tokens.notes,
        ),
        download_bytes=sum(bytes_to_download(api, source) for source in inputs.models),
        output_bytes=output_bytes,
        disk_bytes=_disk_bytes(recipe, checkpoints, output_bytes),
        memory_bytes=_memory_bytes(recipe, (output, *checkpoints.values())),
    )
    return Examined(report, checkpoints, facts, tokens)


def open_headers(api: HfApi, source: Source) -> Checkpoint:
    """Read a source's tensor names, shapes and dtypes: by byte ranges where it is a repo."""
    weights = set(weight_files(source))
    sizes = {file.path: file.size_bytes for file in source.files if file.path in weights}
    index = read_small(api, source, INDEX)
    return read_headers(
        source.pinned,
        sizes,
        lambda path, start, stop: read_range(api, source, path, start, stop),
        index,
    )


def _config(api: HfApi, source: Source) -> dict[str, Any]:
    text = read_small(api, source, "config.json")
    if text is None:
        raise CheckFailedError((f"{source.name} has no config.json, so nothing can load it.",))
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckFailedError((f"{source.name}: config.json is not JSON: {error}.",)) from None
    return config if isinstance(config, dict) else {}


def require_fine(report: CheckReport) -> None:
    """Stop before any download.

    Raises:
        CheckFailedError: the report has problems.
    """
    if report.problems:
        raise CheckFailedError(report.problems)


def _quantised(source: Source, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    found = configs[source.pinned].get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
    return (
        f"{source.name} is quantised ({method}), which this version does not read. Use the model "
        "that it was quantised from."
    )


def _refusals(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    tokens: Tokens,
    facts: Mapping[str, ModelFacts],
) -> list[str]:
    """What the rooms would refuse later: settings, guide, licence."""
    found = not_calibrated(recipe, inputs, tokens)
    try:
        plan(recipe, inputs, checkpoints, tokens.alignment, None, max_shard_bytes=1 << 40)
        if recipe.guide and not registry.find(recipe.merge_method).takes_density:
            found.append(
                f"guide: `{recipe.merge_method}` keeps every entry, so densities would do nothing. "
                "Use `ties`, `dare_ties` or `dare_linear`, or remove the guide."
            )
    except MergeError as error:
        found.append(str(error))
    try:
        if recipe.publish:
            combined_licence([facts[s.pinned] for s in inputs.models], recipe.publish.license)
    except PublishError as error:
        found.append(str(error))
    return found


def _benchmark_refusals(recipe: Recipe, *, allow_code: bool) -> list[str]:
    try:
        if recipe.evaluate:
            check_tasks(selection(recipe, recipe.evaluate, allow_code=allow_code))
    except EvaluationError as error:
        return [str(error)]
    return []


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
        by_dtype[tensor.dtype] += tensor.n_elements
    config = configs[source.pinned]
    text_config = config.get("text_config") or config
    return SourceReport(
        role="base" if source is inputs.base else role,
        name=source.name + (f"@{source.revision}" if source.revision else ""),
        commit_sha=source.commit_sha,
        size_bytes=source.size_bytes(weight_files(source)),
        dtype=by_dtype.most_common(1)[0][0],
        n_parameters=sum(by_dtype.values()),
        n_vocabulary=text_config.get("vocab_size"),
        licence=facts[source.pinned].licence,
        tied=_is_tied(config),
    )


def _is_tied(config: Mapping[str, Any]) -> bool:
    text_config = config.get("text_config") or config
    return bool(config.get("tie_word_embeddings", text_config.get("tie_word_embeddings")))


def _notes(
    recipe: Recipe,
    inputs: Inputs,
    configs: Mapping[str, Mapping[str, Any]],
    adapters: Mapping[str, Adapter],
) -> list[str]:
    notes = []
    donor = inputs.donor
    if "auto_map" in configs[donor.pinned] and donor.name not in recipe.allow_code:
        notes.append(
            f"{donor.name} comes with Python code, which is not carried into the merge; list it "
            "under `allow_code` if its architecture needs it."
        )
    asked = recipe.evaluate
    told = asked is not None and "compare" in asked.model_fields_set and "uniform" in asked.compare
    if told and recipe.guide is None:
        notes.append("without a guide the merge is its own uniform twin: it is scored once.")
    tied = _is_tied(configs[donor.pinned])
    return notes + adapter_notes(recipe, inputs, adapters, tied=tied)


def _output_bytes(checkpoint: Checkpoint, dtype: str | None) -> int:
    width = {"float32": 4, "float16": 2, "bfloat16": 2}
    if dtype is None:
        return sum(tensor.n_bytes for tensor in checkpoint.tensors.values())
    return sum(tensor.n_elements * width[dtype] for tensor in checkpoint.tensors.values())


def _disk_bytes(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], output_bytes: int) -> int:
    """The merge, its twin, and each adapter's expert where that is written out to be loaded."""
    bases = [checkpoints[one.base] for one in checkpoints.values() if one.base]
    experts_bytes = sum(_output_bytes(base, None) for base in bases) if are_loaded(recipe) else 0
    return output_bytes * (2 if has_twin(recipe) else 1) + experts_bytes


def _memory_bytes(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> int:
    """Calibration and evaluation hold one model in float32 on a CPU; merging holds none.

    Of an adapter merging holds the two narrow matrices of each module.
    """
    adapted = [t.adapted for one in checkpoints for t in one.tensors.values() if t.adapted]
    updates = [one.update for one in adapted if one.update]
    narrow_bytes = 4 * sum(update.a.n_elements + update.b.n_elements for update in updates)
    if recipe.guide is None and recipe.evaluate is None:
        return ENGINE_BYTES + narrow_bytes
    largest = max(sum(t.n_elements for t in one.tensors.values()) for one in checkpoints)
    return TORCH_BYTES + max(4 * largest, narrow_bytes)
