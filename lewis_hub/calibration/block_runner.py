"""Run texts through one block of a decoder at a time.

The decoder's own loop runs once for each batch, with blocks that compute nothing, and shows what it
calls each block with. After that a block needs its weights, the hidden states and those arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lewis_hub.calibration.activation_cache import ActivationCache
from lewis_hub.calibration.determinism import ByOneDNN
from lewis_hub.calibration.hooks import forward
from lewis_hub.calibration.meta_model import MetaModel
from lewis_hub.calibration.moe import ProductRecorder
from lewis_hub.calibration.texts import TokenBatch
from lewis_hub.errors import NotByBlockError

SEVERAL = (tuple, list)  # types that a block may return, hidden states first; no subclasses

RunModel = Callable[[TokenBatch], None]


class NotAChainError(Exception):
    """The decoder does not give each block exactly what the block before it returned."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block without the hidden states.

    Attributes:
        keyword: of the hidden states; None: they are the first positional argument.
    """

    args: tuple[Any, ...]
    named: Mapping[str, Any]
    keyword: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after a block."""
        if self.keyword is None:
            returned = block(hidden, *self.args, **self.named)
        else:
            returned = block(*self.args, **{self.keyword: hidden}, **self.named)
        return _hidden_of(returned)


@dataclass(frozen=True)
class BatchState:
    """A batch of texts before a block.

    Attributes:
        cache: holds the block's input, (n_texts, n_tokens, width), under `number`.
        calls: the arguments of all blocks, for a batch.
    """

    batch: TokenBatch
    cache: ActivationCache
    number: int
    calls: Callable[[TokenBatch], Sequence[BlockCall]]

    @property
    def n_tokens(self) -> int:
        """The number of tokens without padding."""
        return int(self.batch.attention_mask.sum())

    @property
    def hidden(self) -> Tensor:
        """A copy of the block's input."""
        return self.cache.read(self.number)

    def move(self, hidden: Tensor) -> None:
        """Go on to the next block, with its input."""
        self.cache.write(self.number, hidden)


def enter_blocks(
    model: MetaModel, groups: Sequence[Sequence[TokenBatch]], cache: ActivationCache
) -> list[list[BatchState]]:
    """Run all batches up to the first block; the model has the weights of all before it.

    Raises:
        OutputError: the disk has no room for the hidden states.
        NotByBlockError: the decoder is not a chain of blocks.
    """
    run, blocks, first = partial(forward, model.model), list(model.blocks), groups[0][0]
    with torch.no_grad(), _chain_errors(model):
        rest = further_outputs(blocks, first, run)

        def hidden(batch: TokenBatch) -> Tensor:
            return enter(blocks, batch, run, rest)[0]

        def calls(batch: TokenBatch) -> Sequence[BlockCall]:
            return enter(blocks, batch, run, rest)[1]

        token_bytes = hidden(first).nbytes // first.input_ids.numel()
        n_tokens = sum(batch.input_ids.numel() for group in groups for batch in group)
        cache.require_room(token_bytes * n_tokens)
        return [
            [BatchState(batch, cache, cache.add(hidden(batch)), calls) for batch in group]
            for group in groups
        ]


def run_block(
    model: MetaModel, number: int, state: BatchState, products: ProductRecorder | None = None
) -> Tensor:
    """The hidden states after a block, which has its weights; `state` stays before it."""
    with torch.no_grad(), _chain_errors(model):
        call = state.calls(state.batch)[number]
        with ByOneDNN(), products or nullcontext():
            return call.run(model.blocks[number], state.hidden)


@contextmanager
def _chain_errors(model: MetaModel) -> Iterator[None]:
    """Explain why a decoder cannot be run block by block."""
    try:
        yield
    except (NotAChainError, RuntimeError) as error:
        if not isinstance(error, NotAChainError) and "meta" not in str(error):
            raise
        problem = "its decoder does more between its blocks than to hand on hidden states"
        raise NotByBlockError(model.name, problem, model.weights.remedy) from error


def further_outputs(
    blocks: Sequence[nn.Module], batch: TokenBatch, run: RunModel
) -> tuple[Any, ...] | None:
    """What the first block returns after the hidden states; None if it returns them alone.

    Raises:
        NotAChainError: it is never called, or returns something else.
    """
    outputs = block_output(blocks[0], partial(run, batch))
    if not outputs:
        raise NotAChainError
    _hidden_of(outputs[0])
    return tuple(outputs[0][1:]) if type(outputs[0]) in SEVERAL else None


class _BlockOutputError(Exception):
    """Leaves a forward pass after a block."""


def block_output(block: nn.Module, run: Callable[[], None]) -> list[Any]:
    """The output of a block, in a list, which is empty if `run` does not reach it.

    `run` is a forward pass; it ends after the block.
    """
    outputs: list[Any] = []

    def leave(_: nn.Module, _inputs: object, returned: Any) -> None:
        outputs.append(returned)
        raise _BlockOutputError

    handle = block.register_forward_hook(leave)
    try:
        run()
    except _BlockOutputError:
        pass
    finally:
        handle.remove()
    return outputs


def enter(
    blocks: Sequence[nn.Module], batch: TokenBatch, run: RunModel, rest: tuple[Any, ...] | None
) -> tuple[Tensor, list[BlockCall]]:
    """Run a batch up to the first block, and record what each block is called with.

    Args:
        blocks: of the decoder; none of them computes anything here.
        batch: texts.
        run: the model; all modules outside the blocks have their weights.
        rest: from `further_outputs`.

    Returns:
        The input of the first block, and a call for each block.

    Raises:
        NotAChainError: a block is left out, called twice, called with hidden states that the block
            before it did not return, or with further outputs of it.
    """
    calls: list[BlockCall] = []
    hiddens: list[Tensor] = []

    def recorder(number: int) -> Callable[..., Any]:
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

    with replaced_forwards(blocks, recorder):
        run(batch)
    if len(calls) != len(blocks):
        raise NotAChainError
    return hiddens[0], calls


@contextmanager
def replaced_forwards(
    blocks: Sequence[nn.Module], forward_of: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Other `forward` functions inside the context; the blocks keep all other attributes."""
    try:
        for number, block in enumerate(blocks):
            vars(block)["forward"] = forward_of(number)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _split(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[BlockCall, Tensor]:
    if args:
        return BlockCall(args[1:], named, None), args[0]
    keyword = next(iter(named))
    others = {name: value for name, value in named.items() if name != keyword}
    return BlockCall((), others, keyword), named[keyword]


def _hidden_of(returned: Any) -> Tensor:
    hidden = returned[0] if type(returned) in SEVERAL and returned else returned
    if not isinstance(hidden, Tensor):
        raise NotAChainError
    return hidden
