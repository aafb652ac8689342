"""Measure a model with one block of it in memory at a time.

All texts run through a block before the next one is read. In memory are, at most, the embeddings
and a block, twice while it is fused, and what one batch takes on its way. The hidden states of all
texts wait on the disk, unless they are few.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from lewis_hub.errors import NotByBlockError
from lewis_hub.guides.activations import (
    N_TRIED,
    Summary,
    alone,
    block_linears,
    check_tokens_fit,
    forward,
    hooked,
    norms_of,
    require_finite,
    require_seen,
)
from lewis_hub.guides.blocks import Linear, has_stacks, linears, loose_parameters, matrix
from lewis_hub.guides.flow import Call, Flow, NotAChainError, beside, enter
from lewis_hub.guides.gram_files import ModuleGram, Wanted, write_blocks, write_index
from lewis_hub.guides.grams import second_moments
from lewis_hub.guides.importance import importances, sum_of_squares
from lewis_hub.guides.onednn import ByOneDNN
from lewis_hub.guides.products import Products
from lewis_hub.guides.recording import InputSum, OutOfStepError, Recorder
from lewis_hub.guides.skeleton import Skeleton, skeleton
from lewis_hub.guides.states import States
from lewis_hub.guides.stored import stored_blocks, stored_names
from lewis_hub.guides.threads import threads, whole_shares
from lewis_hub.guides.tokens import Batch, CalibrationTokens, batches
from lewis_hub.guides.weights import Weights
from lewis_hub.progress import Advance, shared

Summed = Callable[[Tensor], Tensor]  # (n_tokens, in_features) -> the sum over the tokens
Grouped = Callable[[CalibrationTokens], Iterator[Batch]]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Visit:
    """What one block met; it has its weights until the next visit.

    Attributes:
        path: of the block.
        modules: path -> Linear of the block.
        sums: for each calibration set and each statistic, path -> the sum over its tokens.
        products: for each set, what parameters that no Linear owns were multiplied with.
    """

    path: str
    block: nn.Module
    modules: Mapping[str, Linear]
    sums: Sequence[Sequence[Mapping[str, InputSum]]]
    products: Sequence[Products | None]


def measure(
    weights: Weights,
    sets: Sequence[CalibrationTokens],
    device: str,
    advance: Advance,
    summarise: Summary = importances,
    wanted: Wanted | None = None,
) -> list[dict[str, float]]:
    """What `activations.measure` returns, of a model that is never in memory as a whole.

    Args:
        weights: of the model.
        sets: one or more, one where second moments are wanted; weights are read once for all.
        device: as torch names it.
        advance: called with the number of tokens done.
        summarise: makes one number a module of weights and activation norms.
        wanted: second moments to leave, in the bytes of `gather_grams`. Where texts run without
            padding here none are left: there they may run with it, and sums are rounded otherwise.

    Raises:
        CalibrationModelError: as there.
        NotByBlockError: from `skeleton`; or the decoder does more with the hidden states than to
            hand them from block to block.
    """

    def of_block(visit: Visit, n_set: int) -> dict[str, float]:
        n_tokens = sets[n_set].n_tokens
        norms, products = norms_of(visit.sums[n_set][0], n_tokens), visit.products[n_set]
        parameters = visit.block.named_parameters(prefix=visit.path)
        met = (parameters, visit.modules, norms, products, n_tokens, kept)
        found: dict[str, float] = {}
        for block in stored_blocks(made.model, *met):
            found |= summarise(block.weights, block.norms)
        return found

    def measured(visits: Iterator[Visit]) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{} for _ in sets]
        grams: dict[str, ModuleGram] = {}
        for visit in visits:
            if wanted:
                for moments in visit.sums[0][1:]:
                    grams |= write_blocks(moments, visit.modules, kept, wanted.folder)
            for n_set, one in enumerate(found):
                one |= of_block(visit, n_set)
        for one in found:
            require_seen(one, made.name)
        if wanted and grams:
            write_index(grams, wanted)
        return found

    made = skeleton(weights, device)
    kept = stored_names(made.model)
    summed: list[Summed] = [sum_of_squares]
    if wanted:
        summed.append(partial(second_moments, widest=wanted.widest))
    return visited(made, sets, summed, advance, measured, products=True)


def visited(
    made: Skeleton,
    sets: Sequence[CalibrationTokens],
    summed: Sequence[Summed],
    advance: Advance,
    take: Callable[[Iterator[Visit]], Found],
    *,
    products: bool,
) -> Found:
    """Hand every block on once all texts went through it.

    Args:
        made: the model.
        sets: one or more; weights are read once for all.
        summed: one or more, of the inputs of each Linear; where texts run without padding the
            first alone.
        advance: called with the number of tokens done, as if there were one block.
        take: what to do with the blocks. It is called anew where it shows no earlier than on the
            way that texts have to run without padding, as `activations.input_sums` decides it for
            a batch.
        products: whether to look at what parameters that no Linear owns are multiplied with.

    Raises:
        OutputError: the disk has no room for the hidden states.
    """
    for tokens in sets:
        check_tokens_fit(made.model, made.name, tokens)
    widths = {matrix(module).shape[1] for module in block_linears(made.model, made.name).values()}

    def visit(grouped: Grouped) -> Found:
        of = summed[:1] if grouped is alone else summed
        with closing(_visits(made, sets, grouped, of, advance, products=products)) as visits:
            return take(visits)

    with threads(whole_shares(widths, torch.get_num_threads())):
        try:
            return visit(alone if products and has_stacks(made.model) else batches)
        except OutOfStepError:
            return visit(alone)


def _visits(
    made: Skeleton,
    sets: Sequence[CalibrationTokens],
    grouped: Grouped,
    summed: Sequence[Summed],
    advance: Advance,
    *,
    products: bool,
) -> Generator[Visit, None, None]:
    advance = shared(advance, len(made.blocks))
    loose = loose_parameters(made.model) if products else {}
    ids = torch.tensor([sets[0].ids[0][:N_TRIED]])
    tried = Batch(ids, torch.ones_like(ids))
    groups = [[tried], *(list(grouped(tokens)) for tokens in sets)]
    with States(made.weights.scratch) as states, closing(made.walk()) as walk:
        for number, block in enumerate(walk):
            if number == 0:
                [trial], *flows = entered(made, groups, states)
            inside = f"{made.path}.{number}"
            modules = dict(linears(inside, block))
            used = _used(made, number, trial, loose) if loose else {}
            if used and grouped is not alone:
                raise OutOfStepError
            sums, watched = [], []
            for texts in flows:
                recorders = [Recorder(one) for one in summed]
                seen = Products(used) if used else None
                with hooked(modules, *recorders):
                    for flow in texts:
                        for recorder in recorders:
                            recorder.start(flow.batch)
                        with seen or nullcontext():
                            hidden = run_block(made, number, flow)
                        flow.move(hidden)
                        for recorder in recorders:
                            recorder.finish()
                        advance(int(flow.batch.attention_mask.sum()))
                for recorder in recorders:
                    require_finite(recorder.totals, made.name)
                sums.append([recorder.totals for recorder in recorders])
                watched.append(seen)
            yield Visit(inside, block, modules, sums, watched)


def entered(made: Skeleton, groups: Sequence[Sequence[Batch]], states: States) -> list[list[Flow]]:
    """All texts before the first block, which has its weights, as all before it has.

    Raises:
        OutputError: the disk has no room for their hidden states.
    """
    run, blocks, first = partial(forward, made.model), list(made.blocks), groups[0][0]
    with torch.no_grad(), _chain(made):
        rest = beside(blocks, first, run)

        def hidden(batch: Batch) -> Tensor:
            return enter(blocks, batch, run, rest)[0]

        def calls(batch: Batch) -> Sequence[Call]:
            return enter(blocks, batch, run, rest)[1]

        token_bytes = hidden(first).nbytes // first.input_ids.numel()
        n_tokens = sum(batch.input_ids.numel() for group in groups for batch in group)
        states.require_room(token_bytes * n_tokens)
        return [
            [Flow(batch, states, states.add(hidden(batch)), calls) for batch in group]
            for group in groups
        ]


def run_block(made: Skeleton, number: int, flow: Flow) -> Tensor:
    """Hidden states of texts after a block, which has its weights; they stay before it."""
    with torch.no_grad(), _chain(made):
        call = flow.call(number)
        with ByOneDNN():
            return call.run(made.blocks[number], flow.hidden)


def _used(made: Skeleton, number: int, trial: Flow, loose: Collection[str]) -> dict[str, Tensor]:
    """The block's `loose` parameters that `trial` is multiplied with on its way to the next."""
    inside = f"{made.path}.{number}"
    named = made.blocks[number].named_parameters(prefix=inside)
    own = {path: parameter for path, parameter in named if path in loose}
    with Products(own) as tried:
        hidden = run_block(made, number, trial)
    trial.move(hidden)
    return {path: parameter for path, parameter in own.items() if path in tried.used}


@contextmanager
def _chain(made: Skeleton) -> Iterator[None]:
    """Say what a decoder is that cannot be run block by block."""
    try:
        yield
    except (NotAChainError, RuntimeError) as error:
        if not isinstance(error, NotAChainError) and "meta" not in str(error):
            raise
        problem = "its decoder does more between its blocks than to hand on hidden states"
        raise NotByBlockError(made.name, problem, made.weights.remedy) from error
