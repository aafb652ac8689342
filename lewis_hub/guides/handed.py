"""What the Linears of a block are handed: in a model that is being merged, and in its experts.

The last Linear of a block, where what it makes is added to what the block returns, can make good
what the block is off by then: the hidden states that it was handed, and all that is added to them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from lewis_hub.guides.activations import hooked, require_finite
from lewis_hub.guides.blocks import Linear, linears
from lewis_hub.guides.by_block import run_block
from lewis_hub.guides.flow import Flow
from lewis_hub.guides.grams import outer_products, products, second_moments
from lewis_hub.guides.recording import (
    First,
    HandedError,
    InputSum,
    Order,
    OutOfStepError,
    Recorder,
)
from lewis_hub.guides.skeleton import Skeleton

ROUNDINGS = 16  # that a sum may be off by, of its dtype and of the largest that is added


@dataclass(frozen=True)
class Seen:
    """What one Linear is handed on one expert's texts, float32.

    Attributes:
        gram: E[x x^T], (n_parts, width, width).
        cross: E[z x^T], of that shape; None: z is x.
        gap: E[d x^T], (n_parts, out, width): d is what the expert's block returns more than the
            merged one, beside what the Linear adds in each; None: that is not known.
    """

    gram: Tensor
    cross: Tensor | None = None
    gap: Tensor | None = None


@dataclass(frozen=True)
class Pair:
    """The same texts in an expert and in the merged model, before the same block."""

    own: Flow
    merged: Flow


def levels(merged: Skeleton, number: int, trial: Flow) -> list[list[str]]:
    """The Linears of a block that see every token once, in the order in which they are called.

    Those that are handed the very same tensor are one level.

    Args:
        merged: has the block's weights.
        number: of the block.
        trial: a few tokens, which stay before it.
    """
    order = Order()
    with hooked(dict(linears("", merged.blocks[number])), order):
        run_block(merged, number, trial)
    n_tokens = trial.batch.input_ids.numel()
    paired = [[path for path in one if order.n_rows[path] == [n_tokens]] for one in order.levels]
    return [level for level in paired if level]


def is_added(made: Skeleton, number: int, trial: Flow, path: str) -> bool:
    """Whether a block returns what a Linear makes, as it is, added to what does not depend on it.

    Args:
        made: has the block's weights.
        number: of the block.
        trial: a few tokens, which stay before it.
        path: of the Linear in the block.
    """
    _, added, plain = _passed(made, number, trial, path)
    push = added * (plain.abs().max() / added.abs().max())
    module = _linear(made, number, path)
    handle = module.register_forward_hook(lambda _, _given, returned: returned + push)
    try:
        moved = run_block(made, number, trial) - plain
    finally:
        handle.remove()
    if moved.shape != push.shape:
        return False
    most = ROUNDINGS * torch.finfo(push.dtype).eps * push.abs().max()
    return bool(((moved - push).abs() <= most).all())


def seen_beside(  # noqa: PLR0913
    models: tuple[Skeleton, Skeleton],
    number: int,
    pairs: Sequence[Pair],
    path: str,
    widest: int,
    *,
    with_gap: bool,
) -> Seen:
    """What a Linear is handed in the merged model, and beside it in an expert.

    Args:
        models: the merged one and the expert; both have the block's weights.
        number: of the block.
        pairs: texts, which stay before it.
        path: of the Linear in the block.
        widest: inputs of one matrix.
        with_gap: where it `is_added`: ask what is missing beside it.

    Raises:
        OutOfStepError: it is not handed a row for every token.
        CalibrationModelError: what it is handed is not finite.
    """
    merged, expert = models

    def summed(pair: Pair) -> list[InputSum]:
        gaps = []
        if with_gap:
            x, others = _beside(merged, number, pair.merged, path)
            z, wanted = _beside(expert, number, pair.own, path)
            gaps.append(outer_products(wanted - others, x, widest))
        else:
            x = _handed(merged, number, pair.merged, path)
            z = _handed(expert, number, pair.own, path)
        found = (products(x, x, widest), products(z, x, widest), *gaps)
        return [InputSum(one, len(x)) for one in found]

    totals = reduce(
        lambda one, two: [a + b for a, b in zip(one, two, strict=True)], map(summed, pairs)
    )
    whole = f"{merged.path}.{number}.{path}"
    require_finite({whole: totals[0]}, merged.name)
    for one in totals[1:]:
        require_finite({whole: one}, expert.name)
    return Seen(*(one.mean() for one in totals))


def seen_apart(
    expert: Skeleton, number: int, pairs: Sequence[Pair], paths: Collection[str], widest: int
) -> dict[str, Seen]:
    """What an expert's own Linears are handed, of those that a token reaches.

    Args:
        expert: has the block's weights.
        number: of the block.
        pairs: texts, which stay before it.
        paths: of the Linears in the block.
        widest: inputs of one matrix.

    Raises:
        OutOfStepError: one is not handed a row for every token, and some are padding.
        CalibrationModelError: what one is handed is not finite.
    """
    recorder = Recorder(partial(second_moments, widest=widest))
    modules = dict(linears("", expert.blocks[number]))
    with hooked({path: modules[path] for path in paths}, recorder):
        for pair in pairs:
            recorder.start(pair.own.batch)
            run_block(expert, number, pair.own)
            recorder.finish()
    require_finite(recorder.totals, expert.name)
    return {path: Seen(one.mean()) for path, one in recorder.totals.items()}


def _handed(made: Skeleton, number: int, flow: Flow, path: str) -> Tensor:
    """The input of a Linear of a block, (n_tokens, in_features), of the tokens that count.

    The texts stay before the block, of which no more is run than it takes.
    """
    first = First()
    with hooked({path: _linear(made, number, path)}, first):
        try:
            run_block(made, number, flow)
        except HandedError as handed:
            return _rows(handed.x, flow)
    raise OutOfStepError


def _beside(made: Skeleton, number: int, flow: Flow, path: str) -> tuple[Tensor, Tensor]:
    """Of the tokens that count: the input of a Linear, and what the block returns without it.

    Its bias is no part of it.
    """
    x, added, returned = _passed(made, number, flow, path)
    others = returned.float() - added.float()
    bias = _linear(made, number, path).bias
    return _rows(x, flow), _rows(others if bias is None else others + bias, flow)


def _passed(made: Skeleton, number: int, flow: Flow, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """What a Linear of a block is handed, what it makes of it, and what the block returns."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = _linear(made, number, path).register_forward_hook(
        lambda _, given, returned: seen.append((given[0], returned.clone()))
    )
    try:
        returned = run_block(made, number, flow)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise OutOfStepError
    return *seen[0], returned


def _linear(made: Skeleton, number: int, path: str) -> Linear:
    """A Linear of a block, by its path in it."""
    return dict(linears("", made.blocks[number]))[path]


def _rows(x: Tensor, flow: Flow) -> Tensor:
    """Those of the tokens that count."""
    mask, rows = flow.batch.attention_mask.flatten().bool(), x.detach().reshape(-1, x.shape[-1])
    if len(rows) != len(mask):
        raise OutOfStepError
    return rows[mask.to(rows.device)]
