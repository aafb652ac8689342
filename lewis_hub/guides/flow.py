"""Texts on their way through a decoder, one block after the other.

The decoder's own loop runs with blocks that hand on what they are given. It tells what each block
is called with beside the hidden states: masks and positions may differ by the kind of block. It
runs anew before every block, for that costs little, and masks of all texts would take much memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lewis_hub.guides.states import States
from lewis_hub.guides.tokens import Batch

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
