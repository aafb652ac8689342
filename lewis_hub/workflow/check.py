"""Check: all that can be known before a download, from headers and JSON files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration import meta_model
from lewis_hub.calibration.grams import HELD_BYTES, WIDEST, n_entries
from lewis_hub.calibration.model import check_padding
from lewis_hub.calibration.texts import check_columns
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.lora import own_tensors
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.checkpoint.writer import DTYPES
from lewis_hub.errors import (
    CalibrationError,
    CalibrationModelError,
    CheckFailedError,
    EvaluationError,
    MergeError,
    PublishError,
    SourceError,
)
from lewis_hub.evaluate.tasks import TaskSelection, check_tasks, locate_tasks, require_metric
from lewis_hub.guides import registry as guides
from lewis_hub.hub.facts import ModelFacts, combined_licence, model_facts
from lewis_hub.hub.fetch import bytes_to_download, read_small, weight_files
from lewis_hub.hub.rows import describe, load_rows
from lewis_hub.hub.source import Source
from lewis_hub.merge.chunks import AVERAGED, FUSED
from lewis_hub.merge.compare import compare, passed_over, settle_heads
from lewis_hub.methods import registry
from lewis_hub.recipe.rules import fits_in_sequence
from lewis_hub.recipe.schema import Calibration, Recipe
from lewis_hub.tokenizer.union import KEEPERS, template_of
from lewis_hub.workflow.evaluate import has_uniform_twin, n_twins, selection
from lewis_hub.workflow.memory import (
    Loading,
    batch_bytes,
    blocks_bytes,
    loading_notes,
    loading_problems,
    most_tokens,
    on_disk_bytes,
    states_bytes,
)
from lewis_hub.workflow.merge import loaded, plan
from lewis_hub.workflow.open import (
    Adapter,
    Opened,
    adapter_notes,
    open_adapter,
    open_model,
    pickle_notes,
    quantised_notes,
    ties,
)
from lewis_hub.workflow.resolve import (
    Inputs,
    calibrations,
    measures_on_texts,
    needs_grams,
    widest_input,
)
from lewis_hub.workflow.slices import outline, uncompared
from lewis_hub.workflow.tokenizers import Tokens, calibration_notes, examine_tokens

if TYPE_CHECKING:
    from huggingface_hub import HfApi


POSITIONS = ("max_position_embeddings", "n_positions")  # what configurations call their number


def refusals(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    tokens: Tokens,
    facts: Mapping[str, ModelFacts],
) -> list[str]:
    """What the rooms would refuse later: settings, guide, licence; one message each."""
    found = []
    try:
        if all(checkpoint.tensors for checkpoint in checkpoints.values()):
            plan(recipe, inputs, checkpoints, tokens.alignment, None, max_shard_bytes=1 << 40)
        found += guide_refusals(recipe)
        if recipe.guide and recipe.slices and guides.find(recipe.guide.name).needs:
            found += uncompared(inputs, checkpoints)
    except MergeError as error:
        found.append(str(error))
    try:
        if recipe.publish:
            combined_licence([facts[s.pinned] for s in inputs.models], recipe.publish.license)
    except PublishError as error:
        found.append(str(error))
    return found


def guide_refusals(recipe: Recipe) -> list[str]:
    """Why a recipe's guide would do nothing under its method."""
    method = registry.find(recipe.merge_method)
    if recipe.guide is None:
        return []
    if recipe.slices and recipe.guide.apply_to != "density":
        return ["guide: a stack takes densities alone. Set `apply_to: density`."]
    weighs = method.takes_task_vectors and method.takes("weights")
    if recipe.guide.apply_to != "density" and not weighs:
        return [
            f"guide: `{method.name}` has no weights of task vectors for `apply_to` to scale. "
            "Set `apply_to: density`, or use `ties`, `dare_ties` or `task_arithmetic`."
        ]
    if recipe.guide.apply_to != "weight" and not method.takes_density:
        return [
            f"guide: `{method.name}` keeps every entry, so densities would do nothing. "
            "Use `ties`, `dare_ties` or `dare_linear`, or remove the guide."
        ]
    return []


def padding_refusals(
    recipe: Recipe, inputs: Inputs, configs: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Which models have no room for what `lewis_reference` pads, as their configurations say."""
    measured = guides.find(recipe.guide.name).needs if recipe.guide else ()
    if "lewis_reference" not in measured:
        return []
    longest = max((one.max_tokens for one in calibrations(recipe)), default=0)
    found = []
    for source in dict.fromkeys(inputs.models):
        config = configs[source.pinned]
        text = config.get("text_config") or config
        told = next((text[key] for key in POSITIONS if key in text), None)
        try:
            check_padding(source.name, longest, told if isinstance(told, int) else None)
        except CalibrationModelError as error:
            found.append(str(error))
    return found


def benchmark_refusals(recipe: Recipe, *, allow_code: bool) -> list[str]:
    """What is wrong with the tasks, with the gate's metrics or with those of leaderboards."""
    asked = recipe.evaluate
    if asked is None:
        return []
    try:
        selected = selection(recipe, asked, allow_code=allow_code)
        check_tasks(selected)
        for gate in asked.gate or ():
            require_metric(selected, gate.task, gate.metric)
        for task, benchmark in (asked.benchmarks or {}).items():
            require_metric(selected, task, benchmark.metric)
    except EvaluationError as error:
        return [str(error)]
    return []


def chat_refusals(recipe: Recipe, inputs: Inputs, api: HfApi) -> list[str]:
    """Which of the models that are scored have no chat template, where prompts go through it.

    An adapter's expert has its base's, and the merge what the recipe gives it.
    """
    asked = recipe.evaluate
    if asked is None or not asked.chat_template:
        return []
    merged = inputs.donor if recipe.chat_template in (None, "auto") else None
    base = inputs.base if "base" in asked.compare else None
    experts = inputs.experts if "experts" in asked.compare else ()
    scored = {one.pinned: one for one in (merged, base, *experts) if one and not one.is_adapter}
    found = []
    for source in scored.values():
        files = {name: read_small(api, source, name) for name in KEEPERS}
        there = {name: content for name, content in files.items() if content is not None}
        if template_of(source.name, there) is None:
            found.append(
                f"evaluate.chat_template: {source.pinned} has no chat template.\n"
                "Leave it out of `evaluate.compare`, or score without `chat_template`."
            )
    return found


SMALL_BYTES = 20_000_000  # of a dataset: then its rows are read to see their columns


def data_problems(recipe: Recipe, inputs: Inputs, api: HfApi, *, allow_code: bool) -> list[str]:
    """What is known to be wrong with the calibration data; nothing where none is used."""
    if not measures_on_texts(recipe):
        return []
    return [
        problem
        for calibration in dict.fromkeys(calibrations(recipe))
        for problem in _problems(api, calibration, inputs, allow_code=allow_code)
    ]


def _problems(
    api: HfApi, calibration: Calibration, inputs: Inputs, *, allow_code: bool
) -> Iterator[str]:
    data = inputs.data_of(calibration)
    try:
        if isinstance(data, Source):
            check_columns(calibration, _columns(api, calibration, data))
        else:
            _check_task(replace(data.selection, allow_code=allow_code), calibration)
    except (CalibrationError, EvaluationError, SourceError) as error:
        yield str(error)


def _columns(api: HfApi, calibration: Calibration, source: Source) -> tuple[str, ...]:
    """Of the split; none where only many rows would tell."""
    told = describe(api, source, calibration.config, calibration.split)
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
    recipe: Recipe, inputs: Inputs, checkpoints: Mapping[str, Checkpoint], tokens: Tokens
) -> list[str]:
    """What keeps the sources from being merged tensor by tensor; what tokenizers say goes first."""
    first, *others = (checkpoints[source.pinned] for source in inputs.models)
    tensors = tokens.alignment.tensors if tokens.alignment else ()
    found = compare(first, others, recipe.missing, tensors)
    return [str(one) for one in found if not (tokens.problems and one.kind == "vocabulary")]


def left_alone(
    recipe: Recipe, inputs: Inputs, checkpoints: Mapping[str, Checkpoint]
) -> tuple[str, ...]:
    """What `missing: base` keeps out of the merge, a sentence each."""
    first, *others = (checkpoints[source.pinned] for source in inputs.models)
    return passed_over(first, others) if recipe.missing == "base" else ()


ENGINE_BYTES = 300_000_000  # interpreter and the engine's buffers, whatever the models' size
TORCH_BYTES = 900_000_000  # torch and transformers, loaded to calibrate and to evaluate
GRAM_COPIES = 3  # of a matrix, beside each expert's own and its shrunk one, while it is factored
DEFINED_COPIES = 4  # of a tensor in float64, beside its sources, while a definition is at work


@dataclass(frozen=True)
class Needs:
    """Bytes.

    Attributes:
        disk_bytes: beside the download and the hidden states.
        states_bytes: of hidden states on the disk, at most, while models are measured.
        memory_bytes: at most, of the largest step.
    """

    output_bytes: int
    disk_bytes: int
    states_bytes: int
    memory_bytes: int


def needs(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    output: Checkpoint,
    loading: Loading,
) -> Needs:
    """What a merge takes.

    Args:
        recipe: what is asked.
        inputs: pinned.
        checkpoints: pinned source -> its headers; without tensors where it is not read yet.
        output: what is made, in the dtypes of its sources.
        loading: whether models are measured whole.
    """
    pickles = {s.pinned: s.size_bytes(weight_files(s)) for s in inputs.models if s.is_pickled}
    largest_pickle_bytes = max(pickles.values(), default=0)
    output_bytes = _output_bytes(output, recipe.output_dtype)
    output_bytes = pickles.get(inputs.donor.pinned, output_bytes)
    disk_bytes = _disk_bytes(recipe, inputs, checkpoints, output, output_bytes)
    return Needs(
        output_bytes,
        disk_bytes + sum(pickles.values()),
        on_disk_bytes(recipe, most_tokens(recipe), checkpoints.values(), loading),
        max(
            _merging_bytes(recipe, output, tuple(checkpoints.values())),
            _scoring_bytes(recipe, (output, *checkpoints.values()), largest_pickle_bytes),
            _measuring_bytes(
                recipe, (output, *checkpoints.values()), largest_pickle_bytes, loading
            ),
        ),
    )


def _output_bytes(checkpoint: Checkpoint, dtype: str | None) -> int:
    asked = DTYPES[dtype] if dtype else None
    tensors = checkpoint.tensors.values()
    return sum(t.n_elements * WIDTHS[asked or t.kept_dtype] for t in tensors)


def _disk_bytes(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    output: Checkpoint,
    output_bytes: int,
) -> int:
    """The merge, its twins, statistics, and each source that is written out to be loaded."""
    asked = [checkpoints[source.pinned] for source in loaded(recipe, inputs)]
    written_bytes = sum(_output_bytes(one, None) for one in asked if one.is_computed)
    n_bytes = statistics_bytes(recipe, len(inputs.experts), output)
    return output_bytes * (1 + n_twins(recipe)) + written_bytes + n_bytes


def statistics_bytes(recipe: Recipe, n_experts: int, output: Checkpoint) -> int:
    """Second moments of all experts on disk; or the matrices that are fitted by them."""
    if not fits_in_sequence(recipe):
        return n_experts * grams_bytes(recipe, output)
    asked = DTYPES[recipe.output_dtype] if recipe.output_dtype else None
    fitted_bytes = sum(
        one.n_elements * WIDTHS[asked or one.kept_dtype] for one in _matrices(output)
    )
    return fitted_bytes * (1 + has_uniform_twin(recipe))


def grams_bytes(recipe: Recipe, output: Checkpoint) -> int:
    """Second moments of one expert, at most: modules that share inputs share them."""
    if not needs_grams(recipe):
        return 0
    shapes = [tensor.shape for tensor in _matrices(output)]
    return sum(4 * n_entries(shape[1], widest_input(recipe)) for shape in shapes)


def _matrices(output: Checkpoint) -> list[TensorHeader]:
    """Those of the blocks."""
    return [
        tensor
        for name, tensor in output.tensors.items()
        if len(tensor.shape) == 2 and names.block(name) is not None
    ]


def _merging_bytes(recipe: Recipe, output: Checkpoint, checkpoints: Sequence[Checkpoint]) -> int:
    """Kernels hold pieces; a definition holds the largest tensor that it is asked for, in torch.

    Of an adapter the two narrow matrices of each module are held.
    """
    adapted = [t.adapted for one in checkpoints for t in one.tensors.values() if t.adapted]
    updates = [one.update for one in adapted if one.update]
    narrow_bytes = 4 * sum(update.a.n_elements + update.b.n_elements for update in updates)
    rescales = (
        recipe.merge_method == "ties" and recipe.parameters.get("rescale", False) is not False
    )
    has_kernel = recipe.merge_method in (AVERAGED, *FUSED) and not rescales
    if has_kernel and not needs_grams(recipe):
        return ENGINE_BYTES + narrow_bytes
    defined = _matrices(output) if has_kernel else output.tensors.values()
    largest = max((tensor.n_elements for tensor in defined), default=0)
    held_bytes = (4 * len(checkpoints) + 8 * DEFINED_COPIES) * largest
    if registry.find(recipe.merge_method).needs_grams:
        held_bytes += _solving_bytes(output, len(checkpoints))
    return TORCH_BYTES + held_bytes + narrow_bytes


def _solving_bytes(output: Checkpoint, n_sources: int) -> int:
    """Moments of the widest matrix, of each as they are and shrunk, while one is factored."""
    widths = [tensor.shape[-1] for tensor in output.tensors.values() if tensor.shape]
    widest = min(max(widths, default=0), WIDEST)
    return 4 * (2 * n_sources + GRAM_COPIES) * widest**2


def _scoring_bytes(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], largest_pickle_bytes: int
) -> int:
    """Evaluation holds one model, in float32 on a CPU.

    A pickle is taken to hold numbers of two bytes, the smallest that are merged.
    """
    if recipe.evaluate is None:
        return 0
    largest = max(sum(t.n_elements for t in one.tensors.values()) for one in checkpoints)
    return TORCH_BYTES + 4 * max(largest, largest_pickle_bytes // 2)


def _measuring_bytes(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], largest_pickle_bytes: int, loading: Loading
) -> int:
    """Calibration holds one model, or a part; two where they are compared.

    Statistics are held beside the one that they are gathered of.
    """
    if not measures_on_texts(recipe):
        return 0
    if fits_in_sequence(recipe):
        return _fitting_bytes(recipe, checkpoints)
    guide = guides.find(recipe.guide.name) if recipe.guide else None
    n_models = 2 if guide and "output_shift" in guide.needs else 1
    found = [4 * (largest_pickle_bytes // 2)]
    for one in checkpoints:
        held_bytes = 2 * grams_bytes(recipe, one)
        if loading.is_by_block(one):
            n_blocks = len({names.block(name) for name in one.tensors} - {None})
            held_bytes //= max(n_blocks, 1)
            held_bytes += _texts_bytes(recipe, one, sum(most_tokens(recipe).values()))
            found.append(blocks_bytes(one) + held_bytes)
        else:
            model_bytes = 4 * sum(t.n_elements for t in one.tensors.values())
            with_grams = model_bytes + min(HELD_BYTES, held_bytes)
            found.append(max(n_models * model_bytes, with_grams))
    return TORCH_BYTES + max(found)


def _fitting_bytes(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> int:
    """Blocks of all models at once, one batch of texts, moments of two kinds, and gaps.

    `checkpoints` are the output's and those of all sources.
    """
    blocks = sum(map(blocks_bytes, checkpoints))
    drawn = most_tokens(recipe)
    n_tokens = 2 * sum(drawn[one] for one in calibrations(recipe))
    texts = max(_texts_bytes(recipe, one, n_tokens) for one in checkpoints)
    largest = max((tensor.n_elements for tensor in _matrices(checkpoints[0])), default=0)
    moments = 2 * _solving_bytes(checkpoints[0], len(checkpoints)) + 4 * len(checkpoints) * largest
    return TORCH_BYTES + blocks + texts + moments


def _texts_bytes(recipe: Recipe, checkpoint: Checkpoint, n_tokens: int) -> int:
    """One batch, and the hidden states of all texts as far as they are not on the disk."""
    held_bytes = min(states_bytes(checkpoint, n_tokens), meta_model.HELD_BYTES)
    return batch_bytes(calibrations(recipe), checkpoint) + held_bytes


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
    checkpoints |= {s.pinned: Checkpoint(s.pinned, {}) for s in inputs.adapters}
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
