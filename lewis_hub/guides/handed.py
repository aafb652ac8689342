"""What the Linears of a block are handed: in a model that is being merged, and in its experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial, reduce

from torch import Tensor

from lewis_hub.guides.activations import hooked, require_finite
from lewis_hub.guides.blocks import linears
from lewis_hub.guides.by_block import run_block
from lewis_hub.guides.flow import Flow
from lewis_hub.guides.grams import products, second_moments
from lewis_hub.guides.recording import (
    First,
    HandedError,
    InputSum,
    Order,
    OutOfStepError,
    Recorder,
)
from lewis_hub.guides.skeleton import Skeleton


@dataclass(frozen=True)
class Seen:
    """What one Linear is handed on one expert's texts: (n_parts, width, width) float32 each.

    Attributes:
        gram: E[x x^T].
        cross: E[z x^T]; None: z is x.
    """

    gram: Tensor
    cross: Tensor | None = None


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


def seen_beside(
    models: tuple[Skeleton, Skeleton], number: int, pairs: Sequence[Pair], path: str, widest: int
) -> Seen:
    """What a Linear is handed in the merged model, and beside it in an expert.

    Args:
        models: the merged one and the expert; both have the block's weights.
        number: of the block.
        pairs: texts, which stay before it.
        path: of the Linear in the block.
        widest: inputs of one matrix.

    Raises:
        OutOfStepError: it is not handed a row for every token.
        CalibrationModelError: what it is handed is not finite.
    """
    merged, expert = models

    def summed(pair: Pair) -> tuple[InputSum, InputSum]:
        x = _handed(merged, number, pair.merged, path)
        z = _handed(expert, number, pair.own, path)
        return InputSum(products(x, x, widest), len(x)), InputSum(products(z, x, widest), len(x))

    gram, cross = reduce(lambda one, two: (one[0] + two[0], one[1] + two[1]), map(summed, pairs))
    whole = f"{merged.path}.{number}.{path}"
    require_finite({whole: gram}, merged.name)
    require_finite({whole: cross}, expert.name)
    return Seen(gram.mean(), cross.mean())


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
    module = dict(linears("", made.blocks[number]))[path]
    with hooked({path: module}, first):
        try:
            run_block(made, number, flow)
        except HandedError as handed:
            x, mask = handed.x, flow.batch.attention_mask.flatten().bool()
            rows = x.detach().reshape(-1, x.shape[-1])
            if len(rows) == len(mask):
                return rows[mask.to(rows.device)]
    raise OutOfStepError
