"""Measure a model with one block of it in memory at a time.

All texts run through a block before the next one is read. In memory are, at most, the embeddings
and a block, twice while it is fused, and what one batch takes on its way. The hidden states of all
texts wait on the disk, unless they are few.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lewis_hub.calibration.determinism import ByOneDNN, threads, whole_shares
from lewis_hub.calibration.fused_experts import Products, stored_blocks, stored_names
from lewis_hub.calibration.grams import (
    ModuleGram,
    Wanted,
    second_moments,
    write_blocks,
    write_index,
)
from lewis_hub.calibration.hooks import (
    N_TRIED,
    InputSum,
    OutOfStepError,
    Recorder,
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
from lewis_hub.calibration.meta_model import FEWER, HELD_BYTES, STATES, Skeleton, Weights, skeleton
from lewis_hub.calibration.model import Linear, has_stacks, linears, loose_parameters, matrix
from lewis_hub.calibration.profile import importances, sum_of_squares
from lewis_hub.calibration.texts import Batch, CalibrationTokens, batches
from lewis_hub.errors import NotByBlockError, OutputError
from lewis_hub.files import require_room
from lewis_hub.progress import Advance, shared


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies; `room_bytes` may be more than it takes."""

    start: int
    room_bytes: int
    like: Tensor  # on meta
    device: torch.device


class States:
    """Tensors by numbers, one of them in memory at a time where all take more than HELD_BYTES.

    The file has no name, so it is gone once it is closed, in whatever way the process ends. A
    tensor is read and written rather than mapped: mapped pages would count as the process's memory.

    Args:
        folder: for the file; None: the system's for such.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path(gettempdir())
        self._file = SpooledTemporaryFile(HELD_BYTES, dir=str(self._folder))  # noqa: SIM115
        self._slots: list[Slot] = []
        self._end = 0

    def __enter__(self) -> States:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def require_room(self, n_bytes: int) -> None:
        """Refuse more than the disk holds.

        Raises:
            OutputError: so many bytes more do not fit.
        """
        if self._end + n_bytes > HELD_BYTES:
            require_room(self._folder, n_bytes, STATES, FEWER)

    def add(self, tensor: Tensor) -> int:
        """Keep a tensor; returns its number."""
        self._slots.append(self._placed(tensor))
        self._write(self._slots[-1], tensor)
        return len(self._slots) - 1

    def read(self, number: int) -> Tensor:
        """The tensor of a number, which is the caller's."""
        slot = self._slots[number]
        found = torch.empty_like(slot.like, device="cpu")
        self._file.seek(slot.start)
        self._file.readinto(_bytes(found))
        return found.to(slot.device)

    def write(self, number: int, tensor: Tensor) -> None:
        """Keep another tensor in the place of one."""
        slot = replace(self._slots[number], like=tensor.to("meta"), device=tensor.device)
        if tensor.nbytes > slot.room_bytes:  # the first block may return a wider dtype
            slot = self._placed(tensor)
        self._slots[number] = slot
        self._write(slot, tensor)

    def _placed(self, tensor: Tensor) -> Slot:
        start, self._end = self._end, self._end + tensor.nbytes
        return Slot(start, tensor.nbytes, tensor.to("meta"), tensor.device)

    def _write(self, slot: Slot, tensor: Tensor) -> None:
        try:
            self._file.seek(slot.start)
            self._file.write(_bytes(torch.empty_like(slot.like, device="cpu").copy_(tensor)))
        except OSError as error:
            problem = f"{STATES} cannot be written: {error.strerror}."
            remedy = f"Free some space, or {FEWER}."
            raise OutputError(str(self._folder), problem, remedy) from None


def _bytes(tensor: Tensor) -> memoryview:
    """Of a dense tensor on the CPU, in the order in which they lie."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


SEVERAL = (tuple, list)  # that a block may return, the hidden states first; no class of its own

Run = Callable[[Batch], None]  # puts texts through the whole model


class NotAChainError(Exception):
    """The decoder does not hand each block exactly what the one before it returned."""


@dataclass(frozen=True)
class Call:
    """What the decoder calls a block with, beside the hidden states.

    Attributes:
        keyword: that hands over the hidden states; None: they are the first argument.
    """

    args: tuple[Any, ...]
    named: Mapping[str, Any]
    keyword: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after a block."""
        if self.keyword is None:
            returned = block(hidden, *self.args, **self.named)
        else:
            returned = block(*self.args, **{self.keyword: hidden}, **self.named)
        return _hidden(returned)


@dataclass(frozen=True)
class Flow:
    """Texts that have come to a block.

    Attributes:
        states: hold its input, (n_texts, n_tokens, width), under `number`.
        calls: what each block is called with, of texts.
    """

    batch: Batch
    states: States
    number: int
    calls: Callable[[Batch], Sequence[Call]]

    def call(self, number: int) -> Call:
        """What a block is called with beside the hidden states."""
        return self.calls(self.batch)[number]

    @property
    def hidden(self) -> Tensor:
        """The input of the block; a copy."""
        return self.states.read(self.number)

    def move(self, hidden: Tensor) -> None:
        """Come to the next block, whose input it is."""
        self.states.write(self.number, hidden)


def beside(blocks: Sequence[nn.Module], batch: Batch, run: Run) -> tuple[Any, ...] | None:
    """What blocks return after the hidden states, as the first one does; None: they are alone.

    Raises:
        NotAChainError: it is never called, or returns something else.
    """
    seen: list[Any] = []

    def leave(_: nn.Module, _inputs: object, returned: Any) -> None:
        seen.append(returned)
        raise _SeenError

    handle = blocks[0].register_forward_hook(leave)
    try:
        run(batch)
    except _SeenError:
        _hidden(seen[0])
        return tuple(seen[0][1:]) if type(seen[0]) in SEVERAL else None
    finally:
        handle.remove()
    raise NotAChainError


def enter(
    blocks: Sequence[nn.Module], batch: Batch, run: Run, rest: tuple[Any, ...] | None
) -> tuple[Tensor, list[Call]]:
    """Bring texts to the first block, and see what all of them are called with.

    Args:
        blocks: of the decoder; none of them computes anything here.
        batch: texts.
        run: the model, in which all that is not in a block has its weights.
        rest: from `beside`.

    Returns:
        The input of the first block, and a call for each block.

    Raises:
        NotAChainError: a block is left out, called twice, called with anything that the one before
            it did not hand on, or with more that it returned than the hidden states.
    """
    calls: list[Call] = []
    hiddens: list[Tensor] = []

    def stand_in(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **named: Any) -> Any:
            call, hidden = _split(args, named)
            given = (*call.args, *call.named.values())
            leaks = any(one is value for one in rest or () if one is not None for value in given)
            if number != len(calls) or leaks or any(hidden is not one for one in hiddens):
                raise NotAChainError
            calls.append(call)
            hiddens[:] = [hidden]
            return hidden if rest is None else (hidden, *rest)

        return forward

    with _replaced(blocks, stand_in):
        run(batch)
    if len(calls) != len(blocks):
        raise NotAChainError
    return hiddens[0], calls


@contextmanager
def _replaced(
    blocks: Sequence[nn.Module], stand_in: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Other `forward`s for the time being; the blocks keep what else the loop looks at."""
    try:
        for number, block in enumerate(blocks):
            vars(block)["forward"] = stand_in(number)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _split(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Call, Tensor]:
    if args:
        return Call(args[1:], named, None), args[0]
    keyword = next(iter(named))
    others = {name: value for name, value in named.items() if name != keyword}
    return Call((), others, keyword), named[keyword]


def _hidden(returned: Any) -> Tensor:
    hidden = returned[0] if type(returned) in SEVERAL and returned else returned
    if not isinstance(hidden, Tensor):
        raise NotAChainError
    return hidden


class _SeenError(Exception):
    """The first block has returned."""


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
