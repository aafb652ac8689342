"""Passes of the calibration texts through a model, whole or with one block in memory at a time.

Block by block, all texts run through a block before the next one is read. In memory are then, at
most, the embeddings and a block, twice while it is fused, and the activations of one batch. Both
ways find the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from lewis_hub.calibration.forward import (
    ActivationCache,
    BatchState,
    deterministic_threads,
    enter_blocks,
    forward,
)
from lewis_hub.calibration.grams import InputSum, sum_of_squares
from lewis_hub.calibration.hooks import (
    InputRecorder,
    OutOfStepError,
    ProductRecorder,
    Statistic,
    hooked,
    require_finite,
    require_seen,
)
from lewis_hub.calibration.meta_model import MetaModel
from lewis_hub.calibration.model import (
    Linear,
    block_linears,
    check_tokens_fit,
    further_uses,
    linears,
    loose_parameters,
    stacks,
)
from lewis_hub.calibration.texts import (
    CalibrationTokens,
    Grouping,
    TokenBatch,
    batches,
    first_tokens,
    unpadded,
    unpadded_batches,
)
from lewis_hub.checkpoint import names
from lewis_hub.display import Advance, shared

Result = TypeVar("Result")


@dataclass(frozen=True)
class Watched:
    """Parameters that no Linear owns, and what is summed over the tokens multiplied with them."""

    find: Callable[[nn.Module], Mapping[str, Tensor]]  # those of a model, by their names
    statistic: Statistic


LOOSE = Watched(loose_parameters, sum_of_squares)


@dataclass(frozen=True)
class BlockInputs:
    """What the Linears of one or more blocks got; the blocks have their weights until the next."""

    module: nn.Module  # the block, or the model with all blocks
    path: str  # of the module in the model
    modules: Mapping[str, Linear]  # by their paths
    sums: Sequence[Sequence[Mapping[str, InputSum]]]  # for each set and each statistic, by paths
    products: Sequence[ProductRecorder | None]  # for each set, of parameters that no Linear owns


def whole_pass(  # noqa: PLR0913
    model: PreTrainedModel,
    name: str,
    shares: Iterable[Mapping[str, Linear]],
    sets: Sequence[CalibrationTokens],
    statistic: Statistic,
    advance: Advance,
    watched: Watched = LOOSE,
) -> Iterator[BlockInputs]:
    """Run all texts through a model that is loaded whole, once for each share of its Linears.

    A share holds whole blocks; parameters are `watched` with the Linears of their block.
    """
    grouping = unpadded_batches if stacks(model) else batches
    every, shares = watched.find(model), list(shares)
    for modules in shares:
        inside = {_block_of(path) for path in modules}
        is_all = len(shares) == 1  # then also of blocks without a Linear
        loose = {name: one for name, one in every.items() if is_all or _block_of(name) in inside}
        sums, products = [], []
        for tokens in sets:
            check_tokens_fit(model, name, tokens)
            trial = partial(forward, model, first_tokens(tokens))
            used = _used(loose, trial) if loose else {}
            recorder = ProductRecorder(used, watched.statistic) if used else None
            found = input_sums(model, name, modules, grouping(tokens), statistic, advance, recorder)
            sums.append([found])
            products.append(recorder)
        yield BlockInputs(model, "", modules, sums, products)


def _block_of(name: str) -> tuple[str | None, int | None]:
    return names.stack(name), names.block(name)


def _used(
    loose: Mapping[str, Tensor], run: Callable[[ProductRecorder], object]
) -> dict[str, Tensor]:
    """The `loose` parameters that a few tokens are multiplied with in `run`."""
    recorder = ProductRecorder(loose)
    run(recorder)
    return recorder.used


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

    Batches run without padding if there are `products`, or a module regroups the tokens. The
    model, in eval mode, is left as it was. Modules that saw no token are left out; those with the
    same input tensor share one sum. Inputs of other Linears with the same weight count too. A
    CalibrationError says that no token is kept, or that a sum is not finite.
    """
    recorder = InputRecorder(statistic)

    def record(parts: Iterable[TokenBatch]) -> None:
        for part in parts:
            recorder.start(part)
            forward(model, part, products)
            recorder.finish()

    with ExitStack() as hooks:
        for used in (modules, *further_uses(model, modules)):
            hooks.enter_context(hooked(used, recorder.see))
        for batch in calibration:
            try:
                record(unpadded(batch) if products else [batch])
            except OutOfStepError:
                record(unpadded(batch))
            advance(int(batch.attention_mask.sum()))
    require_seen(recorder.totals, name)
    require_finite(recorder.totals, name)
    return recorder.totals


def block_pass(  # noqa: PLR0913
    model: MetaModel,
    sets: Sequence[CalibrationTokens],
    statistics: Sequence[Statistic],
    advance: Advance,
    take: Callable[[Iterator[BlockInputs]], Result],
    watched: Watched = LOOSE,
) -> Result:
    """Run all texts through a model block by block; its weights are read once for all sets.

    Of the `statistics` of inputs the first alone is computed if texts run without padding. `take`
    uses the blocks; it is called again, with all blocks, if a block shows that texts have to run
    so. `advance` is called with the number of tokens done, as if there were one block.
    Raises as `enter_blocks` does.
    """
    for tokens in sets:
        check_tokens_fit(model.model, model.name, tokens)

    def run(grouping: Grouping) -> Result:
        used = statistics[:1] if grouping is unpadded_batches else statistics
        with closing(_blocks(model, sets, grouping, used, advance, watched)) as blocks:
            return take(blocks)

    with deterministic_threads(block_linears(model.model, model.name).values()):
        try:
            return run(unpadded_batches if stacks(model.model) else batches)
        except OutOfStepError:
            return run(unpadded_batches)


def _blocks(  # noqa: PLR0913
    model: MetaModel,
    sets: Sequence[CalibrationTokens],
    grouping: Grouping,
    statistics: Sequence[Statistic],
    advance: Advance,
    watched: Watched,
) -> Generator[BlockInputs, None, None]:
    advance, loose = shared(advance, len(model.blocks)), watched.find(model.model).keys()
    groups = [[first_tokens(sets[0])], *(list(grouping(tokens)) for tokens in sets)]

    def run_trial(products: ProductRecorder) -> None:
        trial.move(trial.run(products))

    with ActivationCache(model.weights.scratch) as cache, closing(model.walk()) as walk:
        for number, block in enumerate(walk):
            if number == 0:
                [[trial], *states] = enter_blocks(model, groups, cache)
            path = f"{model.path}.{number}"
            parameters = block.named_parameters(prefix=path)
            own = ((name, parameter) for name, parameter in parameters if name in loose)
            used = _used(dict(own), run_trial) if loose else {}
            if used and grouping is not unpadded_batches:
                raise OutOfStepError
            modules, sums, products = dict(linears(path, block)), [], []
            for texts in states:
                recorder = ProductRecorder(used, watched.statistic) if used else None
                run = partial(_run_and_move, recorder, advance)
                sums.append(block_sums(texts, modules, statistics, run))
                products.append(recorder)
            yield BlockInputs(block, path, modules, sums, products)


def _run_and_move(products: ProductRecorder | None, advance: Advance, state: BatchState) -> None:
    state.move(state.run(products))
    advance(state.n_tokens)


def block_sums(
    texts: Sequence[BatchState],
    modules: Mapping[str, Linear],
    statistics: Sequence[Statistic],
    run: Callable[[BatchState], object],
) -> list[dict[str, InputSum]]:
    """Sum statistics over the inputs of modules of a block, while `run` runs texts through it.

    It is an OutOfStepError if an input has not a row for every token and some tokens are padding,
    and a CalibrationModelError if an input is not finite.
    """
    recorders = [InputRecorder(statistic) for statistic in statistics]
    with hooked(modules, *(recorder.see for recorder in recorders)):
        for state in texts:
            for recorder in recorders:
                recorder.start(state.batch)
            run(state)
            for recorder in recorders:
                recorder.finish()
    for recorder in recorders:
        require_finite(recorder.totals, texts[0].model.name)
    return [recorder.totals for recorder in recorders]
