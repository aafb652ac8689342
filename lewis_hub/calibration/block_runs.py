"""Runs of one block on the same texts, in the merged model and in the experts, while it is fitted.

Each level of Linears needs the inputs that the levels before it make, so the merged block runs once
a level. Its fitted Linears multiply once: later runs take their outputs from memory. An expert's
block does not change, so it runs once: inputs and output of that run are kept. What does not fit
into KEPT_BYTES is computed again, with the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lewis_hub.calibration.forward import BatchState, ReachedError, replaced_forwards
from lewis_hub.calibration.hooks import CallOrder, OutOfStepError, hooked
from lewis_hub.calibration.model import Linear, linears, matrix
from lewis_hub.calibration.subject import KEPT_BYTES

ROUNDINGS = 16  # errors of a sum, in units of its dtype's epsilon times the largest term
BLOCK = ""  # the path of the block itself


@dataclass(frozen=True)
class BatchPair:
    """A batch in an expert and in the merged model, before the same block."""

    own: BatchState
    merged: BatchState  # the same hidden states as `own`, if both have the same `key`


Pairs = Sequence[Sequence[BatchPair]]  # of all texts of each expert


@dataclass(frozen=True)
class Seen:
    """What a batch shows of a Linear: rows of its tokens that are not padding."""

    x: Tensor  # input in the merged model, (n_tokens, in_features)
    z: Tensor  # input in the expert
    residual: Tensor | None = None  # the expert's block output minus the merged one, without the
    # Linear's products: (n_tokens, hidden)


class BlockRuns:
    """The runs of one block; a batch is known by its state."""

    def __init__(self) -> None:
        self._left_bytes = KEPT_BYTES
        self._kept: dict[tuple[int, str, str], Tensor] = {}
        self._fitted: set[str] = set()

    def watch(self, state: BatchState, paths: Sequence[str]) -> None:
        """Run an expert's block; keep inputs of Linears, the output of the last, and its own."""
        if self._left_bytes <= 0:
            return
        last = linear_at(state, paths[-1])
        modules = {path: linear_at(state, path) for path in paths}
        with (
            hooked(modules, lambda path, x: self._keep(state, "input", path, x)),
            last.register_forward_hook(
                lambda _, _args, made: self._keep(state, "output", paths[-1], made)
            ),
        ):
            self._keep(state, "output", BLOCK, state.run())

    def fitted(self, paths: Iterable[str]) -> None:
        """Note Linears of the merged model that keep their weights from now on."""
        self._fitted.update(paths)

    def seen(self, pair: BatchPair, path: str, *, with_residual: bool) -> Seen:
        """The inputs of a Linear; `with_residual` needs one that `is_added`.

        An input that has not a row for each token is an OutOfStepError.
        """
        if not with_residual:
            with self._known_outputs(pair.merged):
                x = _input(pair.merged, path)
            z = self._find(pair.own, "input", path)
            return Seen(
                _rows(x, pair.merged), _rows(_input(pair.own, path) if z is None else z, pair.own)
            )
        with self._known_outputs(pair.merged):
            x, merged_rest = _input_and_rest(pair.merged, path)
        z, expert_rest = self._expert_input_and_rest(pair.own, path)
        residual = _rows(expert_rest - merged_rest, pair.merged)
        return Seen(_rows(x, pair.merged), _rows(z, pair.own), residual)

    def move(self, pair: BatchPair) -> None:
        """Go on to the next block."""
        if pair.own.key == pair.merged.key:
            pair.own.number += 1
        else:
            returned = self._find(pair.own, "output", BLOCK)
            pair.own.move(pair.own.run() if returned is None else returned)
        with self._known_outputs(pair.merged):
            returned = pair.merged.run()
        pair.merged.move(returned)

    def _keep(
        self, state: BatchState, what: Literal["input", "output"], path: str, tensor: Tensor
    ) -> None:
        self._left_bytes -= tensor.nbytes
        if self._left_bytes >= 0:
            self._kept.setdefault((id(state), what, path), tensor.detach().clone())

    def _find(
        self, state: BatchState, what: Literal["input", "output"], path: str
    ) -> Tensor | None:
        return self._kept.get((id(state), what, path))

    def _expert_input_and_rest(self, state: BatchState, path: str) -> tuple[Tensor, Tensor]:
        z = self._find(state, "input", path)
        added, returned = (self._find(state, "output", one) for one in (path, BLOCK))
        if z is None or added is None or returned is None:
            z, added, returned = _linear_and_block(state, path)
        bias = linear_at(state, path).bias
        rest = returned.float() - added.float()
        return z, rest if bias is None else rest + bias

    @contextmanager
    def _known_outputs(self, state: BatchState) -> Generator[None, None, None]:
        """Inside the context the first call of a fitted Linear takes the output that is known."""
        paths = sorted(self._fitted)
        modules = [linear_at(state, path) for path in paths]
        plain: list[Callable[..., Tensor]] = [module.forward for module in modules]
        called: set[str] = set()

        def forward_of(number: int) -> Callable[..., Any]:
            path = paths[number]

            def forward(*args: Any, **named: Any) -> Tensor:
                if path in called:
                    return plain[number](*args, **named)
                called.add(path)
                known = self._find(state, "output", path)
                if known is not None:
                    return known.clone()  # the model may write into it
                made = plain[number](*args, **named)
                self._keep(state, "output", path, made)
                return made

            return forward

        with replaced_forwards(modules, forward_of):
            yield


def levels(trial: BatchState) -> list[list[str]]:
    """The Linears of a block that see every token once, in the order of their calls.

    Linears with the same input tensor are one level. `trial` is a few tokens. Left out are those
    that return more than their product, as some routers do.
    """
    order, modules = CallOrder(), dict(linears("", trial.block))
    returned: dict[nn.Module, object] = {}
    with ExitStack() as hooks:
        hooks.enter_context(hooked(modules, order.see))
        for module in modules.values():
            keep = module.register_forward_hook(lambda one, _, made: returned.update({one: made}))
            hooks.enter_context(keep)
        trial.run()
    n_tokens = trial.batch.input_ids.numel()
    plain = {path for path, one in modules.items() if isinstance(returned.get(one), Tensor)}
    paired = [
        [path for path in one if path in plain and order.n_rows[path] == [n_tokens]]
        for one in order.levels
    ]
    return [level for level in paired if level]


def is_added(trial: BatchState, path: str) -> bool:
    """Whether a block adds the output of a Linear unchanged to terms that do not depend on it."""
    _, added, plain = _linear_and_block(trial, path)
    push = added * (plain.abs().max() / added.abs().max())
    with linear_at(trial, path).register_forward_hook(lambda _, _args, returned: returned + push):
        moved = trial.run() - plain
    if moved.shape != push.shape:
        return False
    most = ROUNDINGS * torch.finfo(push.dtype).eps * push.abs().max()
    return bool(((moved - push).abs() <= most).all())


def linear_at(state: BatchState, path: str) -> Linear:
    """A Linear of the block."""
    return cast("Linear", state.block.get_submodule(path))


def _input(state: BatchState, path: str) -> Tensor:
    """The input of a Linear, (..., in_features); the block stops there."""

    def leave(_: str, x: Tensor) -> None:
        raise ReachedError(x)

    with hooked({path: linear_at(state, path)}, leave):
        try:
            state.run()
        except ReachedError as reached:
            return cast("Tensor", reached.value)
    raise OutOfStepError


def _input_and_rest(state: BatchState, path: str) -> tuple[Tensor, Tensor]:
    """The input of a Linear that `is_added`, and the block's output without its products.

    The bias is part of the rest.
    """
    calls: list[Tensor] = []
    module = linear_at(state, path)

    def forward_of(_: int) -> Callable[..., Any]:
        def forward(x: Tensor) -> Tensor:
            calls.append(x.clone())
            n_out = matrix(module).shape[0]
            nothing = x.new_zeros(*x.shape[:-1], n_out)
            return nothing if module.bias is None else nothing + module.bias

        return forward

    with replaced_forwards([module], forward_of):
        rest = state.run()
    if len(calls) != 1:
        raise OutOfStepError
    return calls[0], rest.float()


def _linear_and_block(state: BatchState, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """The input and the output of a Linear of a block, and the block's output."""
    calls: list[tuple[Tensor, Tensor]] = []
    with linear_at(state, path).register_forward_hook(
        lambda _, args, returned: calls.append((args[0], returned.clone()))
    ):
        returned = state.run()
    if len(calls) != 1:
        raise OutOfStepError
    return *calls[0], returned


def _rows(x: Tensor, state: BatchState) -> Tensor:
    """The rows of the tokens that are not padding."""
    mask, rows = state.batch.attention_mask.flatten().bool(), x.detach().reshape(-1, x.shape[-1])
    if len(rows) != len(mask):
        raise OutOfStepError
    return rows if bool(mask.all()) else rows[mask.to(rows.device)]
