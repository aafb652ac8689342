"""Rules for the recipe as a whole: combinations of fields that are each valid by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lewis_hub.recipe.backend import ADDRESS, unsafe_args
from lewis_hub.recipe.evaluation import Evaluation
from lewis_hub.recipe.mixture import METHOD, WITHOUT_PROMPTS, RoutedExpert
from lewis_hub.recipe.parts import last_sections
from lewis_hub.recipe.reference import REPO, ModelReference
from lewis_hub.recipe.schema import CHAT_TEMPLATES, Recipe, Settings, Slice

SETTING = "a number, a list of numbers (a gradient over blocks) or a list of {filter, value}"

LARGEST = 3.4e38  # in float32
LEAVE_OUT = "Leave it out."
ONE_METHOD = (
    "All slices have the recipe's `merge_method`. To use several methods, write several documents "
    "separated by `---`, each a merge with a `name`; the last can name the others as models."
)
NOT_OF_MIXTURES = (  # fields that have no meaning for a mixture of experts
    *("models", "slices", "parameters", "guide", "calibration"),
    *("tokenizer_source", "tokenizer", "missing"),
)
STATISTICAL = frozenset({"regmean"})  # methods that need statistics of the experts' inputs
MERGED_BLOCK = "merged_block"  # of their `inputs`: those in the expert's block
SEQUENTIAL = ("merged", MERGED_BLOCK)  # `inputs` with which blocks are fitted in sequence

TOP_LEVEL = (  # keys of a recipe that are not parameters
    *("base_model", "chat_template", "dtype", "merge_method", "out_dtype", "random_seed", "seed"),
    "tokenizer_source",
)

FieldPath = tuple[str | int, ...]  # in the document, such as ("models", 0, "parameters")
Complaint = tuple[FieldPath, str, str]  # where, the problem, what to do


def contradictions(recipe: Recipe) -> Iterator[Complaint]:
    """Find all combinations that cannot be merged; needs no network."""
    for number, section, problem, remedy in last_sections(recipe):
        yield ("intermediate", number, section), problem, remedy
    yield from _tokenizer_contradictions(recipe)
    if recipe.routed is not None:
        yield from _mixture_contradictions(recipe)
        return
    yield from _only_for_mixtures(recipe)
    yield from _slice_contradictions(recipe) if recipe.slices else _model_contradictions(recipe)
    if recipe.guide:
        yield from _guide_contradictions(recipe)
    if recipe.evaluate:
        yield from _scoring_contradictions(recipe, recipe.evaluate)
    yield from _statistical_contradictions(recipe)
    yield from _align_contradictions(recipe)
    yield from _bad_parameters(recipe)


def only_by_options(recipe: Recipe) -> Iterator[Complaint]:
    """Find what the file of a recipe, which may be of someone else, may not set."""
    given = recipe.evaluate.backend_args if recipe.evaluate else None
    for name, problem in unsafe_args(given or {}):
        remedy = "Remove it, and give it as an option, if you trust it: "
        if name == ADDRESS:  # which the backend needs
            remedy = "Remove `backend` and `backend_args`, and give them as options, if you trust "
            remedy += "the server: `--backend local-completions` and "
        remedy += f"`--backend-arg {name}=VALUE`."
        yield ("evaluate", "backend_args", name), problem, remedy


def asks_for_statistics(recipe: Recipe) -> bool:
    """Whether the method needs statistics of the experts' inputs."""
    return recipe.merge_method in STATISTICAL or trims_by_activation(recipe)


def trims_by_activation(recipe: Recipe) -> bool:
    """Whether task vectors are trimmed by magnitude times activation norm."""
    return "activation" in _values(recipe.parameters.get("trim", ()))


def fits_in_sequence(recipe: Recipe) -> bool:
    """Whether matrices are fitted one block after the other, on what the merged model computes."""
    return recipe.merge_method in STATISTICAL and recipe.parameters.get("inputs") in SEQUENTIAL


def runs_expert_blocks(recipe: Recipe) -> bool:
    """Whether they are fitted in the experts' blocks, on the merged model's hidden states."""
    return fits_in_sequence(recipe) and recipe.parameters.get("inputs") == MERGED_BLOCK


def aligns_by_texts(recipe: Recipe) -> bool:
    """Whether a model is matched with another by what both compute on texts."""
    return any(one.align and one.align.needs_texts for one in recipe.models)


def _tokenizer_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    known = [recipe.base_model, *(entry.model for entry in recipe.models or recipe.experts)]
    models = ", ".join(dict.fromkeys(f"`{model}`" for model in known if model))
    if recipe.tokenizer_source is not None and recipe.tokenizer is not None:
        remedy = "Keep one of the two; `tokenizer.source` is the same as `tokenizer_source`."
        yield ("tokenizer",), "both `tokenizer_source` and `tokenizer` are given.", remedy
    tokenizer, by_name = recipe.effective_tokenizer, recipe.by_name
    path: FieldPath = ("tokenizer", "source") if recipe.tokenizer else ("tokenizer_source",)
    if tokenizer and tokenizer.source not in ("base", "union") and tokenizer.source not in by_name:
        problem = f"`{tokenizer.source}` is not one of the models."
        yield path, problem, f"Write `base`, `union` or one of {models}."
    for token, embedding in (tokenizer.tokens if tokenizer else {}).items():
        model = embedding.model
        if embedding.source is None and embedding.force:
            remedy = "Give its `source`: a model, {kind: model_token, ...} or {kind: zero}."
            yield ("tokenizer", "tokens", token), "`force` is set without a `source`.", remedy
        if model is not None and model not in by_name:
            problem = f"`{model}` is not one of the models."
            yield ("tokenizer", "tokens", token, "source"), problem, f"Write one of {models}."
    template = recipe.chat_template
    named = template in ("auto", *CHAT_TEMPLATES)
    if template and not named and "{" not in template and template not in by_name:
        problem = f"`{template}` is neither one of the models nor a template."
        listed = ", ".join(f"`{name}`" for name in CHAT_TEMPLATES)
        remedy = f"Write `auto`, one of {models}, {listed}, or the template's text (Jinja)."
        yield ("chat_template",), problem, remedy


def _model_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    if not recipe.models:
        remedy = "Add `models:`, or `slices:` to stack blocks; `lewis-hub schema` describes both."
        yield ("models",), "`models` is missing.", remedy
    for name in _repeated(recipe, (entry.model for entry in recipe.experts)):
        yield ("models",), f"`{name}` is listed twice.", "List each expert once, with its weight."


def _slice_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    if recipe.models:
        remedy = "List whole models under `models`, or ranges of their blocks under `slices`."
        yield ("slices",), "both `models` and `slices` are given.", remedy
    if recipe.missing != "error":
        yield ("missing",), "`missing` does not apply to slices.", LEAVE_OUT
    for index, part in enumerate(recipe.slices):
        where: FieldPath = ("slices", index)
        if part.merge_method not in (None, recipe.merge_method):
            problem = f"it is not the recipe's `{recipe.merge_method}`."
            yield (*where, "merge_method"), problem, ONE_METHOD
        if part.base_model and part.base_model not in [source.model for source in part.sources]:
            remedy = "Add it to `sources` with its `layer_range`."
            problem = f"the base `{part.base_model}` is not among the slice's sources."
            yield (*where, "base_model"), problem, remedy
        lengths = [len(source.blocks) for source in part.sources]
        if len(set(lengths)) > 1:
            problem = f"its sources have {_listed(lengths)} blocks."
            remedy = "The sources are merged block by block: give ranges of equal length."
            yield (*where, "sources"), problem, remedy
        for name in _repeated(recipe, (source.model for source in part.sources)):
            remedy = "List each model once in a slice; another slice may list it again."
            yield (*where, "sources"), f"`{name}` is listed twice.", remedy


def _only_for_mixtures(recipe: Recipe) -> Iterator[Complaint]:
    for key in ("shared_experts", "gate_mode", "experts_per_token", "architecture"):
        if getattr(recipe, key) is not None:
            remedy = "List the routed experts under `experts`, or remove this key."
            yield (key,), f"`{key}` belongs to a mixture, but there are no `experts`.", remedy


def _mixture_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    experts, n_active = recipe.routed or (), recipe.experts_per_token or 0
    if recipe.base_model is None:
        remedy = "Name the dense model that gives all other tensors."
        yield ("base_model",), "a mixture needs a `base_model`.", remedy
    elif recipe.base_model.on:
        remedy = "Name the whole model, and list the adapter under `experts`."
        yield ("base_model",), "the base must be a whole model, not an adapter on a model.", remedy
    for key in NOT_OF_MIXTURES:
        if getattr(recipe, key) != Recipe.model_fields[key].get_default(call_default_factory=True):
            yield (key,), f"`{key}` cannot be used with `experts`.", LEAVE_OUT
    if recipe.merge_method != METHOD:
        problem = f"`{recipe.merge_method}` cannot be used with `experts`."
        yield ("merge_method",), problem, LEAVE_OUT
    if not 1 <= n_active <= len(experts):
        problem = f"each token would pass {n_active} of {len(experts)} experts."
        remedy = f"Give a number from 1 to {len(experts)}, or list more experts."
        yield ("experts_per_token",), problem, remedy
    if len(recipe.shared_experts or ()) > 1:
        problem = f"found {len(recipe.shared_experts or ())} shared experts."
        yield ("shared_experts",), problem, "No architecture takes more than one: keep one."
    yield from _prompt_contradictions(recipe)
    yield from _expert_contradictions(recipe)
    if recipe.evaluate:
        yield from _scoring_contradictions(recipe, recipe.evaluate)


def _expert_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    if recipe.arithmetic == "float64":
        key = "dtype" if recipe.dtype == "float64" else "out_dtype"
        remedy = "Write `float32`: its tensors are copied or multiplied by a number."
        yield (key,), "`float64` cannot be used with `experts`.", remedy
    for where, expert in _places_of_experts(recipe):
        model = expert.source_model
        if model.on and model.on != recipe.base_model:
            problem = f"the adapter's base is `{model.on}`, but `base_model` is "
            problem += f"`{recipe.base_model}`."
            remedy = "Merge it into its base first, and list the result."
            yield (*where, "source_model"), problem, remedy
        if expert.noise_scale:
            problem = "random noise on the weights is not supported."
            yield (*where, "noise_scale"), problem, LEAVE_OUT


def _prompt_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    if recipe.gate_mode in WITHOUT_PROMPTS:
        return
    for where, expert in _places_of_experts(recipe):
        if not expert.positive_prompts:
            problem = f"`{expert.source_model}` has no prompts, but the router weights of "
            problem += f"`gate_mode: {recipe.gate_mode}` are computed from them."
            remedy = "Add some texts that this expert should get, or set `gate_mode: random`."
            yield (*where, "positive_prompts"), problem, remedy
    experts = recipe.routed or ()
    given = {(one.positive_prompts, one.negative_prompts) for one in experts}
    if len(experts) > 1 and len(given) == 1 and experts[0].positive_prompts:
        problem = "all experts have the same prompts, so the router could not tell them apart."
        yield ("experts",), problem, "Give each expert texts of the kind that it should get."


def _places_of_experts(recipe: Recipe) -> Iterator[tuple[FieldPath, RoutedExpert]]:
    """Every expert of a mixture, with its path."""
    for key, experts in (("experts", recipe.routed), ("shared_experts", recipe.shared_experts)):
        for number, expert in enumerate(experts or ()):
            yield (key, number), expert


def _repeated(recipe: Recipe, models: Iterable[ModelReference]) -> list[str]:
    """The models that are listed more than once; adapters are put on `base_model` by default."""
    base = recipe.base_model
    names = (str(one.model_copy(update={"on": None}) if one.on == base else one) for one in models)
    return sorted(name for name, n_times in Counter(names).items() if n_times > 1)


def _guide_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    assert recipe.guide
    if recipe.base_model is None:
        yield ("guide",), "a guide needs a `base_model` to compare with.", "Name the base model."
    for index, part in enumerate(recipe.slices):
        yield from _guided_slice(recipe, ("slices", index), part)
    if recipe.guide.apply_to == "weight":
        return  # the recipe sets the densities
    for where, parameters in all_parameters(recipe):
        is_base = where[0] == "models" and recipe.models[int(where[1])].model == recipe.base_model
        if "density" in parameters and not is_base:
            problem = "both a guide and a density are given."
            yield (*where, "density"), problem, "Remove one of the two."


def _guided_slice(recipe: Recipe, where: FieldPath, part: Slice) -> Iterator[Complaint]:
    """A guide compares each block of an expert with the base's block of the same number."""
    if part.base_model and part.base_model != recipe.base_model:
        problem = f"a guide compares with `{recipe.base_model}`, but this slice has another base."
        yield (*where, "base_model"), problem, "Leave it out, or give densities without a guide."
    ranges = {source.model: source.layer_range for source in part.sources}
    own = ranges.get(recipe.base_model) if recipe.base_model else None
    for number, source in enumerate(part.sources):
        if own and source.layer_range != own:
            problem = "a guide compares blocks with the same number, but the base has the range "
            problem += f"{[*own]} in this slice."
            remedy = "Give the same range, or densities without a guide."
            yield (*where, "sources", number, "layer_range"), problem, remedy


def _scoring_contradictions(recipe: Recipe, evaluation: Evaluation) -> Iterator[Complaint]:
    yield from _gate_contradictions(recipe, evaluation)
    yield from _benchmark_contradictions(evaluation)
    if "model" in (evaluation.backend_args or {}):
        problem = "every model of the recipe would be scored as this one."
        remedy = "Leave it out: requests name the folder of each model. Or score the models one "
        remedy += "by one with `lewis-hub evaluate`."
        yield ("evaluate", "backend_args", "model"), problem, remedy


def _gate_contradictions(recipe: Recipe, evaluation: Evaluation) -> Iterator[Complaint]:
    gates = evaluation.gate or ()
    for index, gate in enumerate(gates):
        where: FieldPath = ("evaluate", "gate", *([index] if len(gates) > 1 else []))
        yield from _unscored(evaluation, (*where, "task"), gate.task)
        path = (*where, "not_worse_than")
        for rival in gate.not_worse_than:
            if rival != "previous" and rival not in evaluation.compare:
                problem = f"`{rival}` is not scored: it is not in `evaluate.compare`."
                yield path, problem, f"Add `{rival}` to `evaluate.compare`."
            elif rival == "uniform" and not (recipe.guide or asks_for_statistics(recipe)):
                problem = "without a guide the merge and its uniform twin are the same."
                yield path, problem, "Write `base`, `experts` or `previous`, or add a `guide`."
            elif rival == "base" and recipe.base_model is None:
                yield path, "the recipe has no `base_model`.", "Write `experts` or `previous`."


def _statistical_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    if recipe.calibration and recipe.guide and recipe.guide.calibration:
        problem = "both `calibration` and `guide.calibration` are given."
        yield ("calibration",), problem, "Keep one: guide and method measure on the same texts."
    asks = asks_for_statistics(recipe)
    if recipe.calibration and not (asks or recipe.guide or aligns_by_texts(recipe)):
        problem = f"`{recipe.merge_method}` uses no calibration, and the recipe has no guide."
        yield ("calibration",), problem, LEAVE_OUT
    if not asks:
        return
    if isinstance(recipe.parameters.get("inputs"), tuple):
        problem = "`inputs` takes one value for all matrices."
        yield ("parameters", "inputs"), problem, "Write `own`, `merged` or `merged_block`."
    in_sequence = fits_in_sequence(recipe) and not runs_expert_blocks(recipe)
    if recipe.parameters.get("affine") and not in_sequence:
        problem = "norms and biases are fitted in sequence only."
        yield ("parameters", "affine"), problem, "Write `inputs: merged` beside it, or remove it."
    option = (
        f"`{recipe.merge_method}`" if recipe.merge_method in STATISTICAL else "`trim: activation`"
    )
    if recipe.slices:
        remedy = "List whole models under `models`, or take another method."
        yield ("slices",), f"{option} works with `models` only.", remedy
        return
    for entry in recipe.experts:
        if recipe.calibration_of(entry) is None:
            problem = f"{option} needs calibration data, but `{entry.model}` has none."
            remedy = "Add `calibration` to this model, or to the recipe for all models without: "
            remedy += "some of the expert's own training texts, in the benchmark's prompt format. "
            remedy += "To prompts without answers it writes them itself: `answers: model`."
            yield ("models",), problem, remedy


def _align_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    first = recipe.base_model or next((one.model for one in recipe.models), None)
    by_texts = aligns_by_texts(recipe)
    for index, entry in enumerate(recipe.models):
        if entry.align and entry.model == first:
            problem = f"`{entry.model}` is the model that the others are aligned with."
            yield ("models", index, "align"), problem, "Remove it here, and set it on the others."
        if recipe.calibration_of(entry) is None and by_texts:
            problem = f"`align` needs calibration data, but `{entry.model}` has none."
            remedy = "Add `calibration` to the recipe."
            if not any(one.align and one.align.always_runs for one in recipe.models):
                remedy += " Or set `weight_similarity: 1` in `align`: weights alone."
            yield ("models", index), problem, remedy


def _benchmark_contradictions(evaluation: Evaluation) -> Iterator[Complaint]:
    for task, benchmark in (evaluation.benchmarks or {}).items():
        where: FieldPath = ("evaluate", "benchmarks", task)
        yield from _unscored(evaluation, where, task)
        if evaluation.limit is not None:
            problem = "`limit` scores a part of the items, which is not a benchmark result."
            yield where, problem, "Remove `limit`, or `benchmarks`."
        if not REPO.fullmatch(benchmark.dataset):
            problem = f"{benchmark.dataset!r} is not owner/name (letters, digits, `-`, `_`, `.`)."
            yield (*where, "dataset"), problem, "Name the benchmark's dataset on the Hub."


def _unscored(evaluation: Evaluation, where: FieldPath, task: str) -> Iterator[Complaint]:
    if task not in evaluation.tasks:
        remedy = f"Write one of {', '.join(evaluation.tasks)}, or add it."
        yield where, f"`{task}` is not in `evaluate.tasks`.", remedy


def _bad_parameters(recipe: Recipe) -> Iterator[Complaint]:
    for where, parameters in all_parameters(recipe):
        for name in (name for name in parameters if name in TOP_LEVEL):
            problem = f"`{name}` is not a parameter of the method."
            remedy = f"Write it without `parameters`, at the top: `{name}: {parameters[name]}`."
            yield (*where, name), problem, remedy
        for name in dict.fromkeys(("weight", "density", *parameters)):
            for value in _values(parameters.get(name, ())):
                if complaint := _bad_value(name, value):
                    yield (*where, name), *complaint


def _bad_value(name: str, value: object) -> tuple[str, str] | None:
    """The problem of a value of a parameter, and what to do."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        if name in ("weight", "density"):
            return f"expected numbers, found {value!r}.", f"Give {SETTING}."
    elif name == "density" and not 0 <= value <= 1:
        problem = f"expected a density between 0 and 1, found {str(value)[:20]}."
        return problem, "It is the fraction of entries kept."
    elif not abs(value) <= LARGEST:
        problem = f"expected a number up to {LARGEST:g}, found {str(value)[:20]}."
        return problem, "Merges are computed in float32, which has no larger ones."
    return None


def all_parameters(recipe: Recipe) -> Iterator[tuple[FieldPath, Settings]]:
    """Every `parameters` mapping of a recipe, with its path."""
    yield ("parameters",), recipe.parameters
    for index, entry in enumerate(recipe.models):
        yield ("models", index, "parameters"), entry.parameters
    for index, part in enumerate(recipe.slices):
        yield ("slices", index, "parameters"), part.parameters
        for number, source in enumerate(part.sources):
            yield ("slices", index, "sources", number, "parameters"), source.parameters


def _values(setting: Any) -> list[Any]:
    """The numbers, switches and words in a setting, whatever its form."""
    if isinstance(setting, tuple):
        return [value for item in setting for value in _values(getattr(item, "value", item))]
    return [setting]


def _listed(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}"
