"""Passes of the calibration texts through a model, and what is measured on the way.

A model runs whole, or with one block in memory at a time: all texts run through a block before the
next one is read. In memory are then, at most, the embeddings and a block, twice while it is fused,
and the activations of one batch. Both ways find the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from lewis_hub.calibration.activation_cache import ActivationCache
from lewis_hub.calibration.block_runner import BatchState, enter_blocks, run_block
from lewis_hub.calibration.determinism import deterministic_threads
from lewis_hub.calibration.grams import (
    GramRequest,
    ModuleGram,
    second_moments,
    shares_in_memory,
    write_grams,
    write_index,
)
from lewis_hub.calibration.hooks import (
    InputRecorder,
    InputSum,
    OutOfStepError,
    Statistic,
    block_linears,
    check_tokens_fit,
    evaluating,
    forward,
    hooked,
    require_finite,
    require_seen,
    unpadded,
    unpadded_batches,
)
from lewis_hub.calibration.meta_model import MetaModel, build_meta_model
from lewis_hub.calibration.model import Linear, has_stacks, linears, load_model, loose_parameters
from lewis_hub.calibration.moe import BlockNorms, ProductRecorder
from lewis_hub.calibration.subject import Snapshot, Weights
from lewis_hub.calibration.summaries import Summary, importances, sum_of_squares
from lewis_hub.calibration.texts import CalibrationTokens, TokenBatch, batches, first_tokens
from lewis_hub.calibration.weight_names import weight_names
from lewis_hub.progress import Advance, shared

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Grouping = Callable[[CalibrationTokens], Iterator[TokenBatch]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class BlockInputs:
    """What the Linears of one or more blocks got; the blocks have their weights until the next.

    Attributes:
        module: the block, or the model with all blocks.
        path: of the module in the model.
        modules: path -> Linear of the blocks.
        sums: for each calibration set and each statistic, path -> the sum over its tokens.
        products: for each set, the recorder of parameters that no Linear owns.
    """

    module: nn.Module
    path: str
    modules: Mapping[str, Linear]
    sums: Sequence[Sequence[Mapping[str, InputSum]]]
    products: Sequence[ProductRecorder | None]


def measure_whole(
    snapshot: Snapshot,
    sets: Sequence[CalibrationTokens],
    device: str,
    advance: Advance,
    summarise: Summary = importances,
) -> list[dict[str, float]]:
    """Measure one source on each calibration set; its model is loaded once and freed on return.

    Returns:
        For each set, module -> its number, in the model's order: modules as the checkpoint stores
        them. A module that saw no token is left out.

    Raises:
        CalibrationModelError: it cannot be loaded, the tokens do not fit it, or its activations
            are not finite.
        EmptyCalibrationError: no token counts.
    """
    model = load_model(snapshot.folder, device, snapshot.name)
    modules = block_linears(model, snapshot.name)
    with deterministic_threads(modules.values()):
        blocks = whole_pass(model, snapshot.name, [modules], sets, sum_of_squares, advance)
        return _summarised(model, snapshot.name, blocks, sets, summarise)


def measure_by_block(
    weights: Weights,
    sets: Sequence[CalibrationTokens],
    device: str,
    advance: Advance,
    summarise: Summary = importances,
    request: GramRequest | None = None,
) -> list[dict[str, float]]:
    """What `measure_whole` returns, of a model that is never in memory as a whole.

    With a `request`, for one set, the pass also writes second moments, with the bytes of
    `gather_by_block`. If texts run without padding here none are written, as they may run with it
    there and round otherwise.

    Raises:
        CalibrationModelError: as `measure_whole` does.
        NotByBlockError: from `build_meta_model`, or the decoder is not a chain of blocks.
    """
    model = build_meta_model(weights, device)
    statistics: list[Statistic] = [sum_of_squares]
    if request:
        statistics.append(partial(second_moments, widest=request.widest))

    def measured(blocks: Iterator[BlockInputs]) -> list[dict[str, float]]:
        grams: dict[str, ModuleGram] = {}
        if request:
            blocks = _written(model.model, blocks, request, grams, first=1)
        found = _summarised(model.model, model.name, blocks, sets, summarise)
        if request and grams:
            write_index(grams, request)
        return found

    return block_pass(model, sets, statistics, advance, measured, with_products=True)


def gather_whole(
    snapshot: Snapshot,
    tokens: CalibrationTokens,
    request: GramRequest,
    device: str,
    advance: Advance,
) -> dict[str, ModuleGram]:
    """Write the second moments of a model that is loaded whole; several passes if they are many."""
    model = load_model(snapshot.folder, device, snapshot.name)
    stored_as = weight_names(model)
    modules = block_linears(model, snapshot.name)
    modules = {path: module for path, module in modules.items() if f"{path}.weight" in stored_as}
    shares = list(shares_in_memory(modules, request.widest))
    summed = partial(second_moments, widest=request.widest)
    grams: dict[str, ModuleGram] = {}
    with deterministic_threads(modules.values()):
        advance = shared(advance, len(shares))
        inputs = (model, snapshot.name, shares, [tokens], summed, advance)
        blocks = whole_pass(*inputs, with_products=False)
        for _ in _written(model, blocks, request, grams, first=0):
            pass
    return grams


def gather_by_block(
    weights: Weights,
    tokens: CalibrationTokens,
    request: GramRequest,
    device: str,
    advance: Advance,
) -> dict[str, ModuleGram]:
    """Write the second moments in one pass, with the matrices of one block in memory at a time."""
    model = build_meta_model(weights, device)

    def gathered(blocks: Iterator[BlockInputs]) -> dict[str, ModuleGram]:
        grams: dict[str, ModuleGram] = {}
        for _ in _written(model.model, blocks, request, grams, first=0):
            pass
        return grams

    summed = [partial(second_moments, widest=request.widest)]
    return block_pass(model, [tokens], summed, advance, gathered, with_products=False)


def _written(
    model: PreTrainedModel,
    blocks: Iterable[BlockInputs],
    request: GramRequest,
    grams: dict[str, ModuleGram],
    *,
    first: int,
) -> Iterator[BlockInputs]:
    """Write the statistics of each block from number `first` on, into `grams` and to disk."""
    stored_as = weight_names(model)
    for block in blocks:
        for sums in block.sums[0][first:]:
            grams |= write_grams(sums, block.modules, stored_as, request.folder)
        yield block


def _summarised(
    model: PreTrainedModel,
    name: str,
    blocks: Iterable[BlockInputs],
    sets: Sequence[CalibrationTokens],
    summarise: Summary,
) -> list[dict[str, float]]:
    stored_as = weight_names(model)
    found: list[dict[str, float]] = [{} for _ in sets]

    def add(block: BlockInputs, n_set: int) -> None:  # on return, nothing holds the weights
        n_tokens = sets[n_set].n_tokens
        norms = BlockNorms(
            block.module.named_parameters(prefix=block.path),
            block.modules,
            norms_of(block.sums[n_set][0], n_tokens),
            block.products[n_set],
            n_tokens,
        )
        for stored in norms.stored(model, stored_as):
            found[n_set] |= summarise(stored.weights, stored.norms)

    for block in blocks:
        for n_set in range(len(sets)):
            add(block, n_set)
    for one in found:
        require_seen(one, name)
    return found


def norms_of(totals: Mapping[str, InputSum], n_tokens: int) -> dict[str, Tensor]:
    """The activation norms of sums of squares, by the path of a module.

    The root of the mean square over all tokens: a_j = sqrt(mean_t x_tj²). A token that a module
    does not see counts as zero, so that a routed matrix has weight according to its tokens.

    Source:
        Wanda, arXiv:2306.11695, measures the same up to a factor; padding counts in the published
        LEWIS code and does not here.
    """
    return {path: (one.total / n_tokens).sqrt().float() for path, one in totals.items()}


def whole_pass(  # noqa: PLR0913
    model: PreTrainedModel,
    name: str,
    shares: Iterable[Mapping[str, Linear]],
    sets: Sequence[CalibrationTokens],
    statistic: Statistic,
    advance: Advance,
    *,
    with_products: bool = True,
) -> Iterator[BlockInputs]:
    """Run all texts through a model that is loaded whole, once for each share of its Linears."""
    grouping = unpadded_batches if with_products and has_stacks(model) else batches
    for modules in shares:
        sums, products = [], []
        for tokens in sets:
            check_tokens_fit(model, name, tokens)
            watched = _watched(model, tokens) if with_products else None
            calibration = grouping(tokens)
            sums.append(
                [input_sums(model, name, modules, calibration, statistic, advance, watched)]
            )
            products.append(watched)
        yield BlockInputs(model, "", modules, sums, products)


def _watched(model: PreTrainedModel, tokens: CalibrationTokens) -> ProductRecorder | None:
    """An empty recorder for what a few tokens are multiplied with; None if Linears own it all."""
    loose = loose_parameters(model)
    if not loose:
        return None
    trial = ProductRecorder(loose)
    with torch.no_grad():
        forward(model, first_tokens(tokens), trial)
    return trial.only_used()


def input_sums(  # noqa: PLR0913
    model: PreTrainedModel,
    name: str,
    modules: Mapping[str, Linear],
    calibration: Iterable[TokenBatch],
    statistic: Statistic,
    advance: Advance,
    products: ProductRecorder | None = None,
) -> dict[str, InputSum]:
    """Sum a statistic over the inputs of modules, of the tokens that the mask keeps.

    Batches run without padding if there are `products`, or a module regroups the tokens.

    The model's mode, gradients and hooks are left as they were. `advance` is called with the number
    of kept tokens after each batch.

    Returns:
        In the model's order, for the modules that saw a token. Modules with the same input tensor
        share one sum.

    Raises:
        EmptyCalibrationError: no batch, or no token is kept.
        CalibrationModelError: a sum that is not finite.
    """
    recorder = InputRecorder(statistic)
    with hooked(modules, recorder), evaluating(model), torch.no_grad():
        for batch in calibration:
            try:
                _record_parts(model, unpadded(batch) if products else [batch], recorder, products)
            except OutOfStepError:
                _record_parts(model, unpadded(batch), recorder, products)
            advance(int(batch.attention_mask.sum()))
    require_seen(recorder.totals, name)
    require_finite(recorder.totals, name)
    return recorder.totals


def _record_parts(
    model: PreTrainedModel,
    parts: Iterable[TokenBatch],
    recorder: InputRecorder,
    products: ProductRecorder | None,
) -> None:
    for part in parts:
        recorder.start(part)
        forward(model, part, products)
        recorder.finish()


def block_pass(  # noqa: PLR0913
    model: MetaModel,
    sets: Sequence[CalibrationTokens],
    statistics: Sequence[Statistic],
    advance: Advance,
    take: Callable[[Iterator[BlockInputs]], Result],
    *,
    with_products: bool,
) -> Result:
    """Run all texts through a model block by block.

    Args:
        model: without weights; they are read once for all sets.
        sets: one or more.
        statistics: of the inputs of each Linear; the first alone if texts run without padding.
        advance: called with the number of tokens done, as if there were one block.
        take: uses the blocks. It is called again, with all blocks, if a block shows that texts have
            to run without padding.
        with_products: whether parameters that no Linear owns are watched.

    Raises:
        OutputError: the disk has no room for the hidden states.
    """
    for tokens in sets:
        check_tokens_fit(model.model, model.name, tokens)

    def run(grouping: Grouping) -> Result:
        used = statistics[:1] if grouping is unpadded_batches else statistics
        found = _blocks(model, sets, grouping, used, advance, with_products=with_products)
        with closing(found) as blocks:
            return take(blocks)

    with deterministic_threads(block_linears(model.model, model.name).values()):
        try:
            return run(unpadded_batches if with_products and has_stacks(model.model) else batches)
        except OutOfStepError:
            return run(unpadded_batches)


def _blocks(
    model: MetaModel,
    sets: Sequence[CalibrationTokens],
    grouping: Grouping,
    statistics: Sequence[Statistic],
    advance: Advance,
    *,
    with_products: bool,
) -> Generator[BlockInputs, None, None]:
    advance = shared(advance, len(model.blocks))
    loose = loose_parameters(model.model) if with_products else {}
    groups = [[first_tokens(sets[0])], *(list(grouping(tokens)) for tokens in sets)]
    with ActivationCache(model.weights.scratch) as cache, closing(model.walk()) as walk:
        for number, block in enumerate(walk):
            if number == 0:
                [trial], *states = enter_blocks(model, groups, cache)
            path = f"{model.path}.{number}"
            used = _used(model, number, trial, loose)
            if used and grouping is not unpadded_batches:
                raise OutOfStepError
            modules, sums, products = dict(linears(path, block)), [], []
            for texts in states:
                recorders = [InputRecorder(one) for one in statistics]
                watched = ProductRecorder(used) if used else None
                with hooked(modules, *recorders):
                    for state in texts:
                        for recorder in recorders:
                            recorder.start(state.batch)
                        state.move(run_block(model, number, state, watched))
                        for recorder in recorders:
                            recorder.finish()
                        advance(state.n_tokens)
                for recorder in recorders:
                    require_finite(recorder.totals, model.name)
                sums.append([recorder.totals for recorder in recorders])
                products.append(watched)
            yield BlockInputs(block, path, modules, sums, products)


def _used(
    model: MetaModel,
    number: int,
    trial: BatchState,
    loose: Collection[str],
) -> dict[str, Tensor]:
    """The block's `loose` parameters that `trial` is multiplied with on its way to the next."""
    if not loose:
        return {}
    parameters = model.blocks[number].named_parameters(prefix=f"{model.path}.{number}")
    own = {path: parameter for path, parameter in parameters if path in loose}
    recorder = ProductRecorder(own)
    trial.move(run_block(model, number, trial, recorder))
    return {path: parameter for path, parameter in own.items() if path in recorder.used}
