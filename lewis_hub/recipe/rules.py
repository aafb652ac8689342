"""What each field of a recipe allows and the whole does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lewis_hub.recipe.schema import CHAT_TEMPLATES, REPO, Evaluation, ModelReference, Recipe, Slice

SETTING = "a number, a list of numbers (a gradient over blocks) or a list of {filter, value}"

LEAVE_OUT = "Leave it out."
STATISTICAL = frozenset({"regmean"})  # methods that merge by statistics of their experts' inputs

Place = tuple[str | int, ...]  # a path in the document, such as ("models", 0, "parameters")
Complaint = tuple[Place, str, str]  # where, the problem, what to do


def contradictions(recipe: Recipe) -> Iterator[Complaint]:
    """What each field allows and the whole does not."""
    yield from _tokenizer_contradictions(recipe)
    base = recipe.base_model
    if base and base.on:
        remedy = "Name the whole model, and list the adapter under `models`."
        yield ("base_model",), "a base is a whole model, and this puts an adapter on one.", remedy
    yield from _slice_contradictions(recipe) if recipe.slices else _model_contradictions(recipe)
    if recipe.guide:
        yield from _guide_contradictions(recipe)
    if recipe.evaluate:
        yield from _gate_contradictions(recipe, recipe.evaluate)
        yield from _benchmark_contradictions(recipe.evaluate)
    yield from _statistical_contradictions(recipe)
    yield from _bad_numbers(recipe)


def asks_for_statistics(recipe: Recipe) -> bool:
    """Whether a method of ours has to know what its experts' inputs are like."""
    by_activation = "activation" in _values(recipe.parameters.get("trim", ()))
    return recipe.merge_method in STATISTICAL or by_activation


def fits_in_sequence(recipe: Recipe) -> bool:
    """Whether matrices are fitted one after the other, on what the merged model is handed."""
    return recipe.merge_method in STATISTICAL and recipe.parameters.get("inputs") == "merged"


def _tokenizer_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    known = [recipe.base_model, *(entry.model for entry in recipe.models or recipe.experts)]
    models = ", ".join(dict.fromkeys(f"`{model}`" for model in known if model))
    if recipe.tokenizer_source is not None and recipe.tokenizer is not None:
        remedy = "Keep one of the two; `tokenizer.source` is the same as `tokenizer_source`."
        yield ("tokenizer",), "both `tokenizer_source` and `tokenizer` are given.", remedy
    asked = recipe.asked_tokenizer
    place: Place = ("tokenizer", "source") if recipe.tokenizer else ("tokenizer_source",)
    if asked and asked.source not in ("base", "union") and not recipe.reference(asked.source):
        problem = f"`{asked.source}` is none of the models."
        yield place, problem, f"Write `base`, `union` or one of {models}."
    for token, embedding in (asked.tokens if asked else {}).items():
        model = embedding.model
        if embedding.source is None and embedding.force:
            remedy = "Give its `source`: a model, {kind: model_token, ...} or {kind: zero}."
            yield ("tokenizer", "tokens", token), "it is forced to nothing.", remedy
        if model and not recipe.reference(model):
            problem = f"`{model}` is none of the models."
            yield ("tokenizer", "tokens", token, "source"), problem, f"Write one of {models}."
    template = recipe.chat_template
    named = template in ("auto", *CHAT_TEMPLATES)
    if template and not named and "{" not in template and not recipe.reference(template):
        problem = f"`{template}` is none of the models, and no template either."
        listed = ", ".join(f"`{name}`" for name in CHAT_TEMPLATES)
        remedy = f"Write `auto`, one of {models}, {listed}, or the template's text (Jinja)."
        yield ("chat_template",), problem, remedy


def _model_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    if not recipe.models:
        remedy = "Add `models:`, or `slices:` to stack blocks; `lewis-hub schema` describes both."
        yield ("models",), "`models` is missing.", remedy
    for index, entry in enumerate(recipe.models):
        yield from _adapter_contradictions(recipe, ("models", index, "model"), entry.model)
    names = [str(entry.model.model_copy(update={"on": None})) for entry in recipe.experts]
    for twice in sorted({name for name in names if names.count(name) > 1}):
        yield ("models",), f"`{twice}` is listed twice.", "List each expert once, with its weight."


def _slice_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    if recipe.models:
        remedy = "List whole models under `models`, or ranges of their blocks under `slices`."
        yield ("slices",), "both `models` and `slices` are given.", remedy
    if recipe.missing != "error":
        yield ("missing",), "slices take tensors as they are.", LEAVE_OUT
    for index, one in enumerate(recipe.slices):
        where: Place = ("slices", index)
        if one.base_model and one.base_model.on:
            remedy = "Name the whole model, and list the adapter under `sources`."
            problem = "a base is a whole model, and this puts an adapter on one."
            yield (*where, "base_model"), problem, remedy
        elif one.base_model and one.base_model not in [source.model for source in one.sources]:
            remedy = "Which of its blocks are meant has to be said: add it with its `layer_range`."
            problem = f"the base `{one.base_model}` is not among the slice's sources."
            yield (*where, "base_model"), problem, remedy
        lengths = [len(source.blocks) for source in one.sources]
        if len(set(lengths)) > 1:
            problem = f"its sources have {_listed(lengths)} blocks."
            remedy = "Block by block they become one: give ranges of equal length."
            yield (*where, "sources"), problem, remedy
        names = [str(source.model.model_copy(update={"on": None})) for source in one.sources]
        for twice in sorted({name for name in names if names.count(name) > 1}):
            remedy = "List each model once in a slice; another slice may have it again."
            yield (*where, "sources"), f"`{twice}` is listed twice.", remedy
        for place, source in enumerate(one.sources):
            inner = (*where, "sources", place, "model")
            yield from _adapter_contradictions(recipe, inner, source.model)


def _adapter_contradictions(
    recipe: Recipe, where: Place, model: ModelReference
) -> Iterator[Complaint]:
    if model.on and model.on != recipe.base_model:
        problem = f"an adapter is put on `{model.on}`, and the base is `{recipe.base_model}`."
        remedy = "It is merged as a task vector of `base_model`: name its base there, or merge "
        remedy += "it into its base with peft (`merge_and_unload`) and list the result."
        yield where, problem, remedy


def _guide_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    assert recipe.guide
    if recipe.base_model is None:
        yield ("guide",), "a guide needs a `base_model` to compare with.", "Name the base model."
    places: list[tuple[Place, Mapping[str, Any]]] = [((), recipe.parameters)]
    for index, entry in enumerate(recipe.models):
        if entry.model != recipe.base_model:
            places.append((("models", index), entry.parameters))
    for index, one in enumerate(recipe.slices):
        places.append((("slices", index), one.parameters))
        for number, source in enumerate(one.sources):
            places.append((("slices", index, "sources", number), source.parameters))
        yield from _guided_slice(recipe, ("slices", index), one)
    if recipe.guide.apply_to == "weight":
        return  # the densities are the recipe's own
    for where, parameters in places:
        if "density" in parameters:
            place = (*where, "parameters", "density")
            yield place, "both a guide and a density are given.", "Remove one of the two."


def _guided_slice(recipe: Recipe, where: Place, one: Slice) -> Iterator[Complaint]:
    """A guide tells how a block of an expert differs from that block of the base."""
    if one.base_model and one.base_model != recipe.base_model:
        problem = f"a guide compares with `{recipe.base_model}`, and this slice has another base."
        yield (*where, "base_model"), problem, "Leave it out, or give densities without a guide."
    ranges = {source.model: source.layer_range for source in one.sources}
    own = ranges.get(recipe.base_model) if recipe.base_model else None
    for number, source in enumerate(one.sources):
        if own and source.layer_range != own:
            problem = f"a guide compares blocks of equal number, and the base has {[*own]} here."
            remedy = "Give the same range, or densities without a guide."
            yield (*where, "sources", number, "layer_range"), problem, remedy


def _gate_contradictions(recipe: Recipe, asked: Evaluation) -> Iterator[Complaint]:
    gates = asked.gate or ()
    for index, gate in enumerate(gates):
        where: Place = ("evaluate", "gate", *([index] if len(gates) > 1 else []))
        if gate.task not in asked.tasks:
            problem = f"`{gate.task}` is none of `evaluate.tasks`."
            yield (*where, "task"), problem, f"Write one of {', '.join(asked.tasks)}, or add it."
        place = (*where, "not_worse_than")
        for rival in gate.not_worse_than:
            if rival != "previous" and rival not in asked.compare:
                problem = f"`{rival}` is not scored: it is none of `evaluate.compare`."
                yield place, problem, f"Add `{rival}` to `evaluate.compare`."
            elif rival == "uniform" and not (recipe.guide or asks_for_statistics(recipe)):
                problem = "without a guide the merge is its own uniform twin."
                yield place, problem, "Write `base`, `experts` or `previous`, or add a `guide`."
            elif rival == "base" and recipe.base_model is None:
                yield place, "there is no `base_model`.", "Write `experts` or `previous`."


def _statistical_contradictions(recipe: Recipe) -> Iterator[Complaint]:
    if recipe.calibration and recipe.guide and recipe.guide.calibration:
        problem = "both `calibration` and `guide.calibration` are given."
        yield ("calibration",), problem, "Keep one: guide and method measure on the same texts."
    asks = asks_for_statistics(recipe)
    if recipe.calibration and not asks and recipe.guide is None:
        problem = f"`{recipe.merge_method}` measures nothing, and there is no guide."
        yield ("calibration",), problem, LEAVE_OUT
    if not asks:
        return
    if isinstance(recipe.parameters.get("inputs"), tuple):
        problem = "all matrices are fitted on inputs of one kind."
        yield ("parameters", "inputs"), problem, "Write `own` or `merged`."
    what = (
        f"`{recipe.merge_method}`" if recipe.merge_method in STATISTICAL else "`trim: activation`"
    )
    if recipe.slices:
        remedy = "List whole models under `models`, or take another method."
        yield ("slices",), f"{what} works with `models` only.", remedy
        return
    for entry in recipe.experts:
        if recipe.calibration_of(entry) is None:
            problem = f"{what} needs calibration data, and there is none for `{entry.model}`."
            remedy = "Add `calibration` to this model, or to the recipe for all that have none: "
            remedy += "some of the expert's own training texts, in the benchmark's prompt format."
            yield ("models",), problem, remedy


def _benchmark_contradictions(asked: Evaluation) -> Iterator[Complaint]:
    for task, benchmark in (asked.benchmarks or {}).items():
        where: Place = ("evaluate", "benchmarks", task)
        if task not in asked.tasks:
            problem = f"`{task}` is none of `evaluate.tasks`."
            yield where, problem, f"Write one of {', '.join(asked.tasks)}, or add it."
        if asked.limit is not None:
            problem = "with `limit` only a part of the items is scored: no result of a benchmark."
            yield where, problem, "Remove `limit`, or `benchmarks`."
        if not REPO.fullmatch(benchmark.dataset):
            problem = f"{benchmark.dataset!r} is not owner/name (letters, digits, `-`, `_`, `.`)."
            yield (*where, "dataset"), problem, "Name the benchmark's dataset on the Hub."


def _bad_numbers(recipe: Recipe) -> Iterator[Complaint]:
    places: list[tuple[Place, Mapping[str, Any]]] = [(("parameters",), recipe.parameters)]
    for index, entry in enumerate(recipe.models):
        places.append((("models", index, "parameters"), entry.parameters))
    for index, one in enumerate(recipe.slices):
        places.append((("slices", index, "parameters"), one.parameters))
        for place, source in enumerate(one.sources):
            inner = ("slices", index, "sources", place, "parameters")
            places.append((inner, source.parameters))
    for where, settings in places:
        for name in ("weight", "density"):
            for value in _values(settings.get(name, ())):
                if isinstance(value, bool | str):
                    yield (*where, name), f"expected numbers, found {value!r}.", f"Give {SETTING}."
                elif name == "density" and not 0 <= value <= 1:
                    problem = f"a density lies between 0 and 1, found {value:g}."
                    yield (*where, name), problem, "It is the fraction of entries kept."


def _values(setting: Any) -> list[Any]:
    if isinstance(setting, tuple):
        return [value for item in setting for value in _values(getattr(item, "value", item))]
    return [setting]


def _listed(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}"
