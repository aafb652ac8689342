"""Pin and open the sources of a recipe, and check the recipe against them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from lewis_hub.calibration.grams import DIAGONAL, WIDEST
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.display import Progress
from lewis_hub.errors import EvaluationError, MergeError, PublishError
from lewis_hub.evaluate.harness import logits_bytes
from lewis_hub.evaluate.scorable import only, require_scorable, scored_elsewhere, unscorable
from lewis_hub.evaluate.tasks import LibraryName, TaskSelection
from lewis_hub.guides import registry as guides
from lewis_hub.hub.facts import ModelFacts, combined_licence, model_facts
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.source import MODULES
from lewis_hub.merge.chunks import AVERAGED, FUSED
from lewis_hub.merge.compare import compare, passed_over
from lewis_hub.merge.mixture import MixtureSettings
from lewis_hub.merge.modules import module_problems
from lewis_hub.merge.plan import MergeSettings, MergeSource
from lewis_hub.merge.slices import StackSettings
from lewis_hub.methods import registry
from lewis_hub.recipe.evaluation import Evaluation
from lewis_hub.recipe.mixture import WITHOUT_PROMPTS
from lewis_hub.recipe.read import dotted
from lewis_hub.recipe.rules import (
    aligns_by_texts,
    all_parameters,
    fits_in_sequence,
    runs_expert_blocks,
)
from lewis_hub.recipe.schema import Recipe, Settings
from lewis_hub.workflow import check, heads, resolve, resources, tokenizers
from lewis_hub.workflow import open as opening
from lewis_hub.workflow.align import alignment_problems, alignment_settings
from lewis_hub.workflow.alignment_needs import AlignmentNeeds, alignment_needs, excessive_costs
from lewis_hub.workflow.check import CheckReport
from lewis_hub.workflow.configurations import configuration_notes, label_problems
from lewis_hub.workflow.fetch import convert_pickles
from lewis_hub.workflow.generated import writing_notes
from lewis_hub.workflow.merge import PlanSettings, merge_slices, output_headers, stack_config
from lewis_hub.workflow.mixture import config_of, mixture_notes, mixture_settings
from lewis_hub.workflow.open import MergeSources, OpenedSource, open_sources
from lewis_hub.workflow.resolve import Inputs, by_reference, merged_entries, needs_moments
from lewis_hub.workflow.resources import Execution, Measurement, Workload
from lewis_hub.workflow.size import in_size, size_notes, size_problems
from lewis_hub.workflow.statistics import uncompensated_notes
from lewis_hub.workflow.tensor_names import with_common_names
from lewis_hub.workflow.tokenizers import TokenizerRequest, Tokens


def measurement_of(recipe: Recipe) -> Measurement:
    """Return which measurements a merge needs."""
    guide = guides.find(recipe.guide.name) if recipe.guide else None
    moments = None
    if needs_moments(recipe):
        solved = registry.find(recipe.merge_method).needs_grams
        widest = WIDEST if solved else DIAGONAL  # a trim needs only the diagonal
        moments = resources.MomentSettings(
            *(widest, solved, fits_in_sequence(recipe), runs_expert_blocks(recipe)),
            fits_tables=bool(recipe.parameters.get("embeddings")),
        )
    on_texts = moments is not None or aligns_by_texts(recipe)
    on_texts = on_texts or (guide is not None and guide.needs_texts)
    return Measurement(guide, moments, resolve.calibrations_of(recipe) if on_texts else ())


@dataclass(frozen=True)
class Examined:
    """The opened sources of a recipe and the result of the check."""

    report: CheckReport
    inputs: Inputs
    sources: MergeSources  # sources with pickled weights have no tensors yet
    facts: Mapping[str, ModelFacts]  # pinned source -> facts from its card
    tokens: Tokens
    output: Checkpoint  # headers of the merge, in the dtypes of its sources


def examine_sources(
    recipe: Recipe, execution: Execution, api: HfApi, progress: Progress
) -> Examined:
    """Pin, open and check the sources, as far as possible before pickled weights are converted."""
    execution.require_usable()
    inputs = resolve.resolve_inputs(recipe, api, progress, allow_pickle=execution.allow_pickle)
    pickled = tuple(dict.fromkeys(source for source in inputs.models if source.is_pickled))
    if pickled:
        check.require_fine(examine(recipe, replace(execution, allow_code=True), inputs, api).report)
        converted = convert_pickles(pickled, recipe.allow_code, api, progress)
        base = converted.get(inputs.base, inputs.base) if inputs.base else None
        experts = tuple(converted.get(expert, expert) for expert in inputs.experts)
        inputs = replace(inputs, base=base, experts=experts)
    examined = examine(recipe, execution, inputs, api)
    check.require_fine(examined.report)
    for note in examined.report.notes:
        progress.say(f"note: {note}")
    return examined


def examine(recipe: Recipe, execution: Execution, inputs: Inputs, api: HfApi) -> Examined:
    """Check a recipe against headers, configurations and cards; pickles are not opened."""
    facts = {source.pinned: model_facts(api, source) for source in inputs.models}
    sources, measurement, tokens = open_sources(inputs, api), measurement_of(recipe), Tokens()
    problems = [one.problem for one in sources.distinct if one.problem]
    whole = [one.source for one in sources.distinct if not one.source.is_adapter]
    problems += module_problems(whole, partial(read_small, api))
    if sources.are_read and not problems:
        takes_parts = bool(recipe.slices or recipe.mixed)  # they are compared when it is planned
        sources = with_common_names(sources)
        if not recipe.mixed:  # a mixture has the embeddings and head of one model
            sources = heads.without_copies(sources)
            heads.require_copies(api, sources.distinct, heads.FIRST_BYTES)
        tokens = tokenizers.compare_tokenizers(
            _tokenizer_request(recipe, sources, measurement, api)
        )
        known = tokens.translations
        sources = sources.replaced(lambda one: replace(one, translation=known.get(one.pinned)))
        problems += tokens.problems
        problems += () if recipe.mixed else label_problems(sources.distinct)
        problems += (of_size := size_problems(merged_entries(recipe), sources))
        if not takes_parts and not of_size:
            problems += _misfits(recipe, sources, tokens)
    output = sources.donor.checkpoint
    if not problems:
        try:
            output = _check_plan(recipe, sources, tokens)
            problems += _guide_problems(recipe, sources, measurement)
        except MergeError as error:
            problems.append(str(error))
        if sources.are_read:
            aligned = alignment_settings(merged_entries(recipe), sources)
            problems += alignment_problems(aligned, tokens, execution.loading)
            problems += () if problems else excessive_costs(merged_entries(recipe), sources)
        problems += _licence_problems(recipe, facts.values())
        problems += _refusals(recipe, execution, inputs, sources, measurement, api)
    workload = workload_of(recipe, execution, sources, measurement, output)
    notes = [*_notes(recipe, sources, workload), *tokens.notes]
    notes += tokenizers.calibration_notes(sources) if measurement.calibrations else ()
    notes += size_notes(merged_entries(recipe), sources) if not problems else ()
    aligning = _alignment_needs(recipe, workload, problems)
    report = check.make_report(workload, facts, problems, notes, aligning)
    return Examined(report, inputs, sources, facts, tokens, output)


def _alignment_needs(recipe: Recipe, workload: Workload, problems: Sequence[str]) -> AlignmentNeeds:
    """Return the disk and memory that matching takes; none if a model is refused or not read."""
    if problems or not workload.sources.are_read:
        return AlignmentNeeds()
    measured = workload.measurement
    n_tokens = [measured.n_tokens[texts] for texts in measured.calibrations]
    return alignment_needs(merged_entries(recipe), workload.sources, n_tokens, workload.loaded)


def _tokenizer_request(
    recipe: Recipe, sources: MergeSources, measurement: Measurement, api: HfApi
) -> TokenizerRequest:
    """Compare only models whose embeddings or head are used, unless texts run through all.

    These are all models, the ends of a stack, and the base of a mixture.
    """
    references = by_reference(recipe, sources.base, sources.experts)
    tokenizer = recipe.effective_tokenizer
    names = [recipe.chat_template] if recipe.chat_template else []
    if tokenizer:
        tokens = (token.model for token in tokenizer.tokens.values())
        names += [tokenizer.source, *(model for model in tokens if model)]
    by_name = recipe.by_name
    named = {name: references[by_name[name]] for name in names if name in by_name}
    models = (sources.donor,) if recipe.mixed else sources.models
    if recipe.slices and not tokenizer and not measurement.calibrations:
        ends = (recipe.slices[0], recipe.slices[-1])
        used = {references[source.model].pinned for end in ends for source in end.sources}
        models = tuple(one for one in models if one.pinned in used or one is sources.donor)
    return TokenizerRequest(tokenizer, recipe.chat_template, named, models, api)


def _misfits(recipe: Recipe, sources: MergeSources, tokens: Tokens) -> list[str]:
    """Return why the sources do not fit, without row counts that the tokenizers explain."""
    fitting = in_size(merged_entries(recipe), sources)
    donor, *others = (one.checkpoint for one in fitting.models)
    rows = tokens.alignment.tensors if tokens.alignment else ()
    found = compare(donor, others, recipe.missing, rows)
    return [str(one) for one in found if not (tokens.problems and one.kind == "vocabulary")]


def plan_settings(
    recipe: Recipe, execution: Execution, sources: MergeSources, tokens: Tokens
) -> PlanSettings:
    """Return the settings that determine the plan of a merge."""
    sources = in_size(merged_entries(recipe), sources)
    base, references = sources.base, by_reference(recipe, sources.base, sources.experts)
    takes_base = registry.find(recipe.merge_method).takes_base
    settings: MergeSettings | StackSettings | MixtureSettings
    if recipe.mixed:
        settings = mixture_settings(recipe, sources, references)
    elif recipe.slices:
        settings = StackSettings(
            method=recipe.merge_method,
            slices=merge_slices(
                recipe.slices, recipe.base_model, references, takes_base=takes_base
            ),
            donor=sources.donor.checkpoint,
            parameters=recipe.parameters,
            dtype=recipe.output_dtype,
            seed=recipe.seed,
            alignment=tokens.alignment,
            arithmetic=recipe.arithmetic,
        )
    else:
        settings = MergeSettings(
            method=recipe.merge_method,
            base=MergeSource(base.checkpoint, base.digest) if base else None,
            experts=tuple(
                MergeSource(expert.checkpoint, expert.digest, entry.parameters)
                for expert, entry in zip(sources.experts, merged_entries(recipe), strict=True)
            ),
            parameters=recipe.parameters,
            dtype=recipe.output_dtype,
            seed=recipe.seed,
            missing=recipe.missing,
            alignment=tokens.alignment,
            arithmetic=recipe.arithmetic,
        )
    return PlanSettings(settings, execution.max_shard_bytes, execution.allow_nan)


def _check_plan(recipe: Recipe, sources: MergeSources, tokens: Tokens) -> Checkpoint:
    """Plan the merge if all tensors are known; return the headers of its output."""
    planned = plan_settings(recipe, Execution(max_shard_bytes=1 << 40), sources, tokens)
    if sources.are_read:
        made = planned.plan(None)
        model_config(recipe, planned, sources)
        if not isinstance(planned.settings, MergeSettings):
            return output_headers(made)
    return sources.donor.checkpoint


def model_config(
    recipe: Recipe, planned: PlanSettings, sources: MergeSources
) -> dict[str, Any] | None:
    """Return the `config.json` of a stack or mixture; None: that of the donor."""
    if isinstance(planned.settings, StackSettings):
        return stack_config(planned.settings, sources)
    if isinstance(planned.settings, MixtureSettings):
        return config_of(recipe, planned.settings, sources)
    return None


def _licence_problems(recipe: Recipe, facts: Iterable[ModelFacts]) -> list[str]:
    try:
        if recipe.publish:
            combined_licence([*facts], recipe.publish.license)
    except PublishError as error:
        return [str(error)]
    return []


def _guide_problems(recipe: Recipe, sources: MergeSources, measurement: Measurement) -> list[str]:
    if recipe.guide is None:
        return []
    method = registry.find(recipe.merge_method)
    is_stack = bool(recipe.slices)
    problems = check.guide_refusals(recipe.guide.apply_to, method, is_stack=is_stack)
    return problems + (check.depth_refusals(sources) if is_stack and measurement.measures else [])


def _refusals(
    recipe: Recipe,
    execution: Execution,
    inputs: Inputs,
    sources: MergeSources,
    measurement: Measurement,
    api: HfApi,
) -> list[str]:
    """Return the reasons why a later step would refuse: texts, tasks, too large models."""
    problems = check.padding_refusals(measurement, sources)
    problems += check.moments_refusals(measurement, sources)
    makes_squares = registry.find(recipe.merge_method).makes_squares
    problems += check.solving_refusals(measurement, sources, makes_squares=makes_squares)
    own = [sources.donor] if recipe.effective_tokenizer is None else []
    with_texts = [*own] if measurement.calibrations else []
    evaluation, allow_code = recipe.evaluate, execution.allow_code
    embeds = sources.donor.source.file(MODULES) is not None
    if evaluation:
        rivals = [*rivals_of(evaluation, sources).values()]
        gates = [(gate.task, gate.metric) for gate in evaluation.gate or ()]
        boards = [(task, board.metric) for task, board in (evaluation.benchmarks or {}).items()]
        selection = task_selection(evaluation, recipe.locate, allow_code=allow_code)
        problems += check.benchmark_refusals(selection, [*gates, *boards])
        try:
            donor, backend = sources.donor, evaluation.backend or "hf"
            require_scorable(f"evaluate: {donor.name}", donor.config, backend, has_modules=embeds)
        except EvaluationError as error:
            problems.append(f"{error} Or remove `evaluate`: then the merge is not scored.")
        else:
            with_texts += [*own, *rivals]
        scored = [rival.source for rival in rivals]
        if evaluation.backend == "mteb":
            problems += check.embedding_refusals([inputs.donor, *scored], api)
        if evaluation.chat_template:
            merged = [inputs.donor] if recipe.chat_template in (None, "auto") else []
            problems += check.chat_refusals([*merged, *scored], api)
    problems += check.data_refusals(
        measurement.calibrations, inputs.data, api, allow_code=allow_code
    )
    problems += check.tokenizer_refusals(with_texts)
    return problems + resources.loading_problems(measurement, sources, execution.loading)


def task_selection(
    evaluation: Evaluation, locate: Callable[[str], str], *, allow_code: bool
) -> TaskSelection:
    """Return the tasks of an evaluation; `locate` finds the folder of the user's task files."""
    include = Path(locate(evaluation.include)) if evaluation.include else None
    library: LibraryName = "mteb" if evaluation.backend == "mteb" else "lm-eval"
    return TaskSelection(evaluation.tasks, include, allow_code=allow_code, library=library)


def code_notes(recipe: Recipe) -> list[str]:
    """Say which benchmarks of a recipe without problems are refused unless code is allowed."""
    if recipe.evaluate is None:
        return []
    selection = task_selection(recipe.evaluate, recipe.locate, allow_code=False)
    return [" ".join(refusal.split()) for refusal in check.benchmark_refusals(selection, ())]


def rivals_of(evaluation: Evaluation, sources: MergeSources) -> dict[str, OpenedSource]:
    """Return the sources that are scored beside the merge, by the labels of their scores."""
    base = {"base": sources.base} if sources.base and "base" in evaluation.compare else {}
    experts = sources.experts if "experts" in evaluation.compare else ()
    return base | {f"expert:{expert.pinned}": expert for expert in experts}


def has_uniform_twin(recipe: Recipe) -> bool:
    """Return whether a twin with uniform densities is made, to be scored beside the merge."""
    evaluation = recipe.evaluate
    return recipe.guide is not None and evaluation is not None and "uniform" in evaluation.compare


def plain_twin(recipe: Recipe) -> tuple[str, Recipe] | None:
    """Return label and recipe of the same merge without statistics, to be scored beside it.

    The twin of a method that solves with second moments is the mean of the task vectors with the
    same weights, which equal moments would give. The twin of a trim trims by magnitude.
    """
    evaluation = recipe.evaluate
    if evaluation is None or "uniform" not in evaluation.compare or not needs_moments(recipe):
        return None
    if not registry.find(recipe.merge_method).needs_grams:
        kept = {k: v for k, v in recipe.parameters.items() if k not in ("trim", "trim_exponent")}
        return "by_magnitude", recipe.model_copy(update={"parameters": kept})
    plain = registry.find("task_arithmetic")

    def known(settings: Settings) -> Settings:
        names = (*plain.settings, *plain.options)
        return {name: value for name, value in settings.items() if name in names}

    models = tuple(
        entry.model_copy(update={"parameters": known(entry.parameters)}) for entry in recipe.models
    )
    mean = {**known(recipe.parameters), "normalize": True}
    changed = {"merge_method": plain.name, "parameters": mean, "models": models}
    return plain.name, recipe.model_copy(update=changed)


def workload_of(
    recipe: Recipe,
    execution: Execution,
    sources: MergeSources,
    measurement: Measurement,
    output: Checkpoint,
) -> Workload:
    """Return the values that determine the disk and memory of a merge."""
    rescales = recipe.merge_method == "ties" and bool(recipe.parameters.get("rescale", False))
    uniform = has_uniform_twin(recipe)
    measured: Iterable[OpenedSource] = sources.experts if measurement.moments else ()
    if measurement.guide and measurement.guide.needs_texts:
        measured = sources.models
    if recipe.mixed and recipe.gate_mode not in WITHOUT_PROMPTS:
        measured = (sources.donor,)
    rivals = rivals_of(recipe.evaluate, sources).values() if recipe.evaluate else ()
    by_transformers = recipe.evaluate and recipe.evaluate.backend in (None, "hf")
    on_cpu = by_transformers and execution.loading.device == "cpu"
    return Workload(
        sources=sources,
        output=output,
        dtype=recipe.output_dtype,
        has_kernel=bool(recipe.mixed)
        or (
            recipe.merge_method in (AVERAGED, *FUSED)
            and not rescales
            and recipe.arithmetic == "float32"
        ),
        makes_squares=registry.find(recipe.merge_method).makes_squares,
        measurement=measurement,
        loading=execution.loading,
        scores=recipe.evaluate is not None,
        logits_bytes=logits_bytes(sources.donor.config) if on_cpu else 0,
        n_twins=uniform + (plain_twin(recipe) is not None),
        uniform_twin=uniform,
        loaded=frozenset(source.pinned for source in (*measured, *rivals)),
    )


def _unused_parameters(recipe: Recipe) -> list[str]:
    """Return a note on each parameter without effect; mergekit ignores them too."""
    method, places = registry.find(recipe.merge_method), dict[str, list[str]]()
    for where, settings in all_parameters(recipe):
        is_own = "models" in where or "sources" in where
        for name in settings:
            if not method.uses(name, per_source=is_own):
                places.setdefault(name, []).append(f"`{dotted(where)}`")
    notes = []
    for name, found in places.items():
        note = f"`{method.name}` does not use `{name}` in {', '.join(found)}: it has no effect."
        if name in method.known:
            note += " It takes one value for all models: write it in the recipe's `parameters`."
        notes.append(note)
    return notes


def _notes(recipe: Recipe, sources: MergeSources, workload: Workload) -> list[str]:
    """Return the notes of a check."""
    notes, donor = mixture_notes(recipe) if recipe.mixed else [], sources.donor
    if "auto_map" in donor.config and donor.name not in recipe.allow_code:
        notes.append(
            f"{donor.name} contains Python code, which is not copied into the merge; list it "
            "under `allow_code` if its architecture needs it."
        )
    notes += _unused_parameters(recipe)
    evaluation, measurement = recipe.evaluate, workload.measurement
    if not evaluation and (named := unscorable(donor.config)):
        elsewhere = scored_elsewhere(named, has_modules=donor.source.file(MODULES) is not None)
        notes.append(f"{donor.name} is a {named}, and {only('hf')}. {elsewhere}")
    names_uniform = (
        evaluation is not None
        and "compare" in evaluation.model_fields_set
        and "uniform" in evaluation.compare
    )
    if names_uniform and recipe.guide is None and measurement.moments is None:
        notes.append("without a guide the merge equals its uniform twin, so it is scored once.")

    def is_base(name: str) -> bool:
        folder = donor.source.folder
        if folder is None:
            return name == donor.name
        with suppress(OSError, ValueError, RuntimeError):  # any text may stand there
            return Path(recipe.locate(name)).resolve() == folder.resolve()
        return False

    notes += opening.adapter_notes(sources, is_base)
    notes += heads.copy_notes(donor)
    notes += configuration_notes(sources.distinct)
    notes += opening.quantised_notes(sources, recipe.output_dtype)
    notes += opening.pickle_notes(sources)
    notes += resources.loading_notes(measurement, sources, workload.loading, scores=workload.scores)
    notes += writing_notes(measurement, sources, workload.loading)
    notes += uncompensated_notes(measurement.moments, donor)
    if sources.are_read and recipe.missing == "base":  # tensors that are kept out of the merge
        first, *others = (one.checkpoint for one in sources.models)
        notes += passed_over(first, others)
    return notes
