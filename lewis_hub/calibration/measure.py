"""Measure sources on calibration sets, with one source in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import isfinite, sqrt

from torch import Tensor, nn
from transformers import PreTrainedModel

from lewis_hub.calibration import grams
from lewis_hub.calibration.forward import deterministic_threads, forward
from lewis_hub.calibration.fused import fused_moments, write_fused
from lewis_hub.calibration.grams import (
    GramFiles,
    GramRequest,
    ModuleGram,
    sum_of_squares,
    widest_float,
)
from lewis_hub.calibration.hooks import Statistic, not_finite, require_measured
from lewis_hub.calibration.meta_model import build_meta_model, weight_names
from lewis_hub.calibration.model import (
    Linear,
    block_linears,
    check_tokens_fit,
    fused_parameters,
    load_model,
    run_refusals,
    stacks,
)
from lewis_hub.calibration.passes import BlockInputs, Watched, block_pass, whole_pass
from lewis_hub.calibration.profile import ImportanceProfile, Measure, SourceImportance, reusable
from lewis_hub.calibration.reference import measure_reference
from lewis_hub.calibration.subject import CalibrationSet, Snapshot, Subject, Weights, missing
from lewis_hub.calibration.summaries import SUMMARIES, Summary, importances, stored_blocks
from lewis_hub.calibration.texts import CalibrationTokens, single_text
from lewis_hub.checkpoint import names
from lewis_hub.display import Advance, shared
from lewis_hub.errors import CalibrationModelError


def calibrate(  # noqa: PLR0913
    subjects: Sequence[Subject],
    known: ImportanceProfile,
    device: str,
    advance: Advance,
    keep: Callable[[ImportanceProfile], None],
    how: Measure = "lewis",
) -> ImportanceProfile:
    """Measure all that is not known yet; returns the profile of the subjects, in their order.

    `subjects` are the base with every distinct set, then each expert with its own; for a measure of
    pairs, each expert with its own set, against the base, which the facts of its set name. `known`
    measurements of the same source, data and settings are reused. `keep` is called with all
    measurements after each source, so that none is lost, and `advance` with the number of tokens
    done. A source that cannot be loaded or measured is a CalibrationModelError.
    """
    for subject in missing(subjects, known):
        with run_refusals(subject.source, f"guide `{known.guide}`"):
            found = _measured(how, subject, device, advance)
        added = map(partial(_measurement, subject), subject.sets, found)
        known = ImportanceProfile(known.guide, known.calibration, (*known.sources, *added))
        keep(known)
    ordered = tuple(
        _measurement(subject, one, entry.modules)
        for subject in subjects
        for one in subject.sets
        if (entry := reusable(known, subject.commit_sha, one.facts))
    )
    return ImportanceProfile(known.guide, known.calibration, ordered)


def _measured(
    how: Measure, subject: Subject, device: str, advance: Advance
) -> list[dict[str, float]]:
    tokens = [one.tokens for one in subject.sets]
    if how == "lewis_reference":
        return measure_reference(subject.snapshot, tokens, device, advance)
    if subject.against:
        return measure_shifts(subject.against, subject.snapshot, tokens, device, advance)
    request = None if subject.wanted and grams.read_grams(subject.wanted) else subject.wanted
    return subject.measured(
        lambda model: measure_inputs(model, tokens, device, advance, SUMMARIES[how], request)
    )


def _measurement(
    subject: Subject, one: CalibrationSet, modules: Mapping[str, float]
) -> SourceImportance:
    pads = one.facts.get("measure") == "lewis_reference"
    return SourceImportance(
        source=subject.source,
        commit_sha=subject.commit_sha,
        role=subject.role,
        n_tokens=len(one.tokens.ids) * one.tokens.limit if pads else one.tokens.n_tokens,
        modules=modules,
        calibration=one.facts,
    )


def measure_inputs(  # noqa: PLR0913
    source: Snapshot | Weights,
    sets: Sequence[CalibrationTokens],
    device: str,
    advance: Advance,
    summarise: Summary = importances,
    request: GramRequest | None = None,
) -> list[dict[str, float]]:
    """Measure one source on each calibration set, by the inputs of its Linears.

    The model of a Snapshot is loaded whole, once for all sets, and freed on return; that of Weights
    is in memory block by block. Both ways find the same numbers.

    With a `request`, for one set, a pass block by block also writes second moments, with the bytes
    of `gather_grams`; none if texts run without padding, as they may run with it there.

    Returns:
        For each set, module -> its number, in the model's order: modules as the checkpoint stores
        them. A module that saw no token is left out.

    Raises:
        CalibrationError: it cannot be loaded or run, the tokens do not fit it, no token counts, or
            its activations are not finite.
    """
    if isinstance(source, Snapshot):
        model = load_model(source.folder, device, source.name)
        modules = block_linears(model, source.name)
        run = partial(whole_pass, model, source.name, [modules], sets, sum_of_squares, advance)
        with deterministic_threads(modules.values()):
            return _summarised(model, source.name, run(), sets, summarise)
    meta_model = build_meta_model(source, device)
    statistics: list[Statistic] = [sum_of_squares]
    if request:
        statistics.append(partial(grams.second_moments, widest=request.widest))

    def summarised(blocks: Iterator[BlockInputs]) -> list[dict[str, float]]:
        return _summarised(meta_model.model, meta_model.name, blocks, sets, summarise, request)

    return block_pass(meta_model, sets, statistics, advance, summarised)


def _summarised(  # noqa: PLR0913
    model: PreTrainedModel,
    name: str,
    blocks: Iterable[BlockInputs],
    sets: Sequence[CalibrationTokens],
    summarise: Summary,
    request: GramRequest | None = None,
) -> list[dict[str, float]]:
    stored_as = weight_names(model)
    stored: dict[str, ModuleGram] = {}
    found: list[dict[str, float]] = [{} for _ in sets]

    def add(block: BlockInputs, n_set: int) -> None:  # on return, nothing holds the weights
        for weights, norms in stored_blocks(model, stored_as, block, n_set, sets[n_set].n_tokens):
            found[n_set] |= summarise(weights, norms)

    for block in blocks:
        if request:
            for moments in block.sums[0][1:]:
                stored |= grams.write_grams(moments, block.modules, stored_as, request.folder)
        for n_set in range(len(sets)):
            add(block, n_set)
    for one in found:
        require_measured(one, name)
    if request and stored:
        grams.write_index(stored, request)
    return found


def gather_grams(
    subject: Subject, request: GramRequest, device: str, advance: Advance
) -> GramFiles:
    """Run a source's one calibration set through it, and store second moments of its Linears.

    So are those of experts that are fused into stacks, of the tokens routed to each, and those of
    routers. A model that is loaded whole takes several passes if its second moments do not fit into
    memory; it is freed on return. `advance` is called with the number of tokens done, as if one
    pass. A CalibrationError says that the source cannot be loaded or measured, or no token counts.
    """
    tokens = [subject.sets[0].tokens]
    moments = partial(grams.second_moments, widest=request.widest)
    watched = Watched(fused_parameters, moments)

    def written(model: PreTrainedModel, blocks: Iterable[BlockInputs]) -> dict[str, ModuleGram]:
        stored: dict[str, ModuleGram] = {}
        stored_as = weight_names(model)
        for block in blocks:
            stored |= grams.write_grams(block.sums[0][0], block.modules, stored_as, request.folder)
            if recorder := block.products[0]:
                found = fused_moments(model, subject.source, recorder, request.widest)
                stored |= write_fused(found, request.folder)
        return stored

    def gather(source: Snapshot | Weights) -> dict[str, ModuleGram]:
        if isinstance(source, Weights):
            meta_model = build_meta_model(source, device)
            take = partial(written, meta_model.model)
            return block_pass(meta_model, tokens, [moments], advance, take, watched)
        model = load_model(source.folder, device, source.name)
        stored_as = weight_names(model)
        modules = block_linears(model, source.name)
        modules = {path: one for path, one in modules.items() if f"{path}.weight" in stored_as}
        shares = list(grams.shares_in_memory(modules, stacks(model), request.widest))
        each = shared(advance, len(shares))
        run = partial(whole_pass, model, source.name, shares, tokens, moments, each, watched)
        with deterministic_threads(modules.values()):
            return written(model, run())

    return grams.write_index(subject.measured(gather), request)


def measure_shifts(
    base: Snapshot,
    expert: Snapshot,
    sets: Sequence[CalibrationTokens],
    device: str,
    advance: Advance,
) -> list[dict[str, float]]:
    """Measure how much the outputs of an expert's modules differ from the base's on each set.

    Both models have one architecture, are loaded once for all sets, and freed on return. Raises as
    `load_model` and `output_shifts` do.

    Returns:
        For each set, module -> sqrt(Σ‖y_expert - y_base‖² / Σ‖y_base‖²) over all tokens, in the
        base's order: 0 if nothing differs.
    """
    models = [load_model(one.folder, device, one.name) for one in (base, expert)]
    for model, one in zip(models, (base, expert), strict=True):
        for tokens in sets:
            check_tokens_fit(model, one.name, tokens)
    with deterministic_threads(block_linears(models[0], base.name).values()):
        return [
            output_shifts(models[0], models[1], expert.name, tokens, advance) for tokens in sets
        ]


def output_shifts(
    base: PreTrainedModel,
    expert: PreTrainedModel,
    name: str,
    tokens: CalibrationTokens,
    advance: Advance,
) -> dict[str, float]:
    """What `measure_shifts` returns, for one set and models that are loaded.

    A module that does not see every token of a text in both models, such as a routed matrix, does
    not count for that text: its rows belong to other tokens. Left out are modules that never count,
    that the checkpoint stores otherwise, or that return more than their product, as some routers
    do. Modules have the checkpoint's names. A CalibrationModelError says that an output is not
    finite, or that no module counts.
    """
    of_base, of_expert = block_linears(base, name), block_linears(expert, name)
    held: dict[str, Tensor] = {}  # the base's outputs on the current text
    sums: dict[str, tuple[float, float]] = {}  # Σ‖y_expert - y_base‖², Σ‖y_base‖²

    def hold(path: str, y: Tensor) -> None:
        held[path] = y.clone()  # later code may write into the output

    def compare(path: str, y: Tensor) -> None:
        before = held.pop(path, None)
        if before is not None and len(before) == len(y) == batch.input_ids.numel():
            difference, total = sums.get(path, (0.0, 0.0))
            difference += _square_sum(y - before.to(y.device))  # GPUs may differ
            sums[path] = difference, total + _square_sum(before)

    for ids in tokens.ids:
        batch = single_text(ids)
        with _outputs(of_base, hold):
            forward(base, batch)
        with _outputs(of_expert, compare):
            forward(expert, batch)
        held.clear()
        advance(len(ids))
    stored_as = weight_names(base)
    found = {
        names.module(stored_as[f"{path}.weight"]): _shift(name, path, *sums[path])
        for path in of_base
        if path in sums and f"{path}.weight" in stored_as
    }
    if not found:
        problem = "no Linear in its blocks has one output for each token of a text"
        raise CalibrationModelError(name, problem, "Use guide `lewis`, which looks at inputs.")
    return found


def _shift(name: str, path: str, difference: float, base: float) -> float:
    ratio = difference / base if base else float(difference > 0)
    if not isfinite(ratio):
        raise not_finite(f"the outputs of {path}", name)
    return sqrt(ratio)


def _square_sum(y: Tensor) -> float:
    """The sum of squares of all entries: float32 in a row, the widest float over the rows."""
    rows = y.float().square().sum(dim=-1)
    return float(rows.to(widest_float(rows.device)).sum())


@contextmanager
def _outputs(modules: Mapping[str, Linear], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Pass the output of each module to `take`, as (rows, out_features)."""

    def hook(path: str, _: nn.Module, _inputs: object, y: object) -> None:
        if isinstance(y, Tensor):
            take(path, y.detach().reshape(-1, y.shape[-1]))

    with ExitStack() as handles:
        for path, module in modules.items():
            handles.enter_context(module.register_forward_hook(partial(hook, path)))
        yield
