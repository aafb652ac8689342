"""Fit a merge block by block: each Linear on what the merged model itself hands it.

The texts of each expert run through the expert and, beside it, through the merged model as far as
it is fitted. A Linear is fitted by E[x x^T] and E[z x^T]: x is what the merged model hands it, z
what the expert is handed in the same place. Within a block one level follows the other: q, k and v
are fitted and put in before the input of o is looked at. The last one of a block is fitted so that
the block returns what the expert's does, where it can be (`Seen.gap`). A module that sees chosen
tokens alone, such as a routed expert, has no x beside each z: there E[z z^T] is all.

In memory are what `by_block` holds of the merged model and of every expert, and the moments of one
level; on the disk the hidden states of all texts, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lewis_hub.calibration.blockwise import Flow, Grouped, States, entered, run_block
from lewis_hub.calibration.determinism import threads, whole_shares
from lewis_hub.calibration.fused_experts import stored_names
from lewis_hub.calibration.grams import (
    n_inputs,
    outer_products,
    products,
    save_whole,
    second_moments,
)
from lewis_hub.calibration.hooks import (
    N_TRIED,
    First,
    HandedError,
    InputSum,
    Order,
    OutOfStepError,
    Recorder,
    alone,
    check_tokens_fit,
    hooked,
    require_finite,
)
from lewis_hub.calibration.meta_model import Skeleton, Weights, skeleton
from lewis_hub.calibration.model import Linear, linears
from lewis_hub.calibration.texts import Batch, CalibrationTokens, batches
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import NotByBlockError
from lewis_hub.progress import Advance, shared

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


# the fitted tensors of a block, by how texts were grouped: sums in another order round otherwise
DONE: dict[Grouped, str] = {batches: "{}.safetensors", alone: "unpadded-{}.safetensors"}

UNLIKE = "its blocks have other matrices than the merge's, so they cannot go side by side"


# (tensor of the checkpoint, of each expert what was seen, whether it lies as (in, out)) -> the
# fitted tensor, as the output has it
Solve = Callable[[str, Sequence[Seen], bool], Tensor]


@dataclass(frozen=True)
class Texts:
    """One expert, and its calibration texts in its own ids and in those of the merged model."""

    weights: Weights
    own: CalibrationTokens
    merged: CalibrationTokens


@dataclass(frozen=True)
class Fit:
    """A fit on its way.

    Attributes:
        merged: has the weights of a merge without statistics in all blocks that are not fitted yet.
        kept: parameter of the merged model -> tensor of the checkpoint.
        folder: for the tensors of each block.
        widest: inputs of one matrix.
        grouped: `batches`; or `alone`, where a module has not a row for each place of a batch.
    """

    merged: Skeleton
    experts: Sequence[Skeleton]
    kept: Mapping[str, str]
    solve: Solve
    folder: Path
    widest: int
    grouped: Grouped


def fit(  # noqa: PLR0913
    merged: Weights,
    texts: Sequence[Texts],
    solve: Solve,
    folder: Path,
    widest: int,
    device: str,
    advance: Advance,
) -> list[Path]:
    """Fit the Linears of all blocks.

    Args:
        merged: of a merge without statistics.
        texts: one an expert.
        solve: makes a tensor of what was seen; not asked where an expert's tokens reached none.
        folder: for the fitted tensors; blocks that an earlier run finished are kept.
        widest: inputs of one matrix: longer ones are cut into parts that are taken by themselves.
        device: as torch names it.
        advance: called with the number of tokens done, as if there were one block.

    Returns:
        A file of safetensors for each block in which something was fitted.

    Raises:
        CalibrationModelError: a model cannot be loaded or measured.
        NotByBlockError: one cannot be run block by block, or not beside the merged model.
        OutputError: the disk has no room for the hidden states.
    """
    made, experts = skeleton(merged, device), [skeleton(one.weights, device) for one in texts]
    for expert, one in zip(experts, texts, strict=True):
        check_tokens_fit(expert.model, expert.name, one.own)
        _require_alike(made, expert)
    told = Fit(made, experts, stored_names(made.model), solve, folder, widest, batches)
    widths = {n_inputs(module) for _, module in linears(made.path, made.blocks)}
    with threads(whole_shares(widths, torch.get_num_threads())):
        try:
            return _fitted(told, texts, advance)
        except OutOfStepError:
            return _fitted(replace(told, grouped=alone), texts, advance)


def require_beside(merged: Skeleton, experts: Iterable[Checkpoint]) -> None:
    """Refuse, by its headers, an expert that lacks a matrix of the merge's blocks.

    Raises:
        NotByBlockError: as `fit` does.
    """
    kept = stored_names(merged.model)
    named = [kept.get(f"{path}.weight") for path, _ in linears(merged.path, merged.blocks)]
    for expert in experts:
        if any(name and name not in expert.tensors for name in named):
            raise NotByBlockError(expert.label, UNLIKE, merged.weights.remedy)


def _require_alike(merged: Skeleton, expert: Skeleton) -> None:
    """Refuse an expert that has other blocks, or other matrices in them."""
    paths = [{path for path, _ in linears("", one.blocks)} for one in (merged, expert)]
    if paths[0] != paths[1]:
        raise NotByBlockError(expert.name, UNLIKE, expert.weights.remedy)


def _fitted(told: Fit, texts: Sequence[Texts], advance: Advance) -> list[Path]:
    advance = shared(advance, len(told.merged.blocks))
    files = []
    with ExitStack() as opened:
        states = opened.enter_context(States(told.folder))
        walks = [opened.enter_context(closing(one.walk())) for one in (told.merged, *told.experts)]
        for number, _ in enumerate(zip(*walks, strict=True)):
            if number == 0:
                trial, pairs = _entered(told, texts, states)
            file = told.folder / DONE[told.grouped].format(number)
            if file.exists():
                _put(told, number, load_file(file))
            elif found := _fit_block(told, number, trial, pairs):
                save_whole(found, file)
            files += [file] if file.exists() else []
            trial.move(run_block(told.merged, number, trial))
            for expert, own_pairs in zip(told.experts, pairs, strict=True):
                for pair in own_pairs:
                    pair.own.move(run_block(expert, number, pair.own))
                    pair.merged.move(run_block(told.merged, number, pair.merged))
                    advance(int(pair.own.batch.attention_mask.sum()))
    return files


def _entered(told: Fit, texts: Sequence[Texts], states: States) -> tuple[Flow, list[list[Pair]]]:
    """A few tokens in the merged model; and of each expert all texts, in both."""
    ids = torch.tensor([texts[0].merged.ids[0][:N_TRIED]])
    tried = Batch(ids, torch.ones_like(ids))
    groups = [[tried], *(list(told.grouped(one.merged)) for one in texts)]
    [trial], *merged = entered(told.merged, groups, states)
    pairs = []
    for expert, one, flows in zip(told.experts, texts, merged, strict=True):
        [own] = entered(expert, [list(told.grouped(one.own))], states)
        pairs.append([Pair(*both) for both in zip(own, flows, strict=True)])
    return trial, pairs


def _fit_block(
    told: Fit, number: int, trial: Flow, pairs: Sequence[Sequence[Pair]]
) -> dict[str, Tensor]:
    """Fit one block, which has its weights in all models; tensor of the checkpoint -> its values.

    All texts stay before the block.
    """
    modules = dict(linears("", told.merged.blocks[number]))
    in_order = levels(told.merged, number, trial)
    each = list(zip(told.experts, pairs, strict=True))
    apart = modules.keys() - {path for level in in_order for path in level}
    found = _fit_apart(told, number, each, [path for path in modules if path in apart])
    for level in in_order:
        last = level is in_order[-1] and len(level) == 1
        try:
            with_gap = last and is_added(told.merged, number, trial, level[0])
            seen = [
                seen_beside(
                    (told.merged, expert), number, own, level[0], told.widest, with_gap=with_gap
                )
                for expert, own in each
            ]
        except OutOfStepError:
            if told.grouped is not alone:
                raise
            found |= _fit_apart(told, number, each, level)  # it is handed chosen tokens after all
        else:
            for path in level:
                found |= _solved(told, number, path, seen)
    return found


def _fit_apart(
    told: Fit, number: int, each: Sequence[tuple[Skeleton, Sequence[Pair]]], paths: Sequence[str]
) -> dict[str, Tensor]:
    """Fit modules of a block on what the experts' own are handed; where a token reaches each."""
    if not paths:
        return {}
    found: dict[str, Tensor] = {}
    own = [seen_apart(expert, number, texts, paths, told.widest) for expert, texts in each]
    for path in paths:
        seen = [one[path] for one in own if path in one]
        found |= _solved(told, number, path, seen) if len(seen) == len(own) else {}
    return found


def _solved(told: Fit, number: int, path: str, seen: Sequence[Seen]) -> dict[str, Tensor]:
    """Fit a module and put it in; nothing where the checkpoint does not hold it as it is."""
    tensor = told.kept.get(f"{told.merged.path}.{number}.{path}.weight")
    if tensor is None:
        return {}
    module = told.merged.blocks[number].get_submodule(path)
    found = {tensor: told.solve(tensor, seen, isinstance(module, Conv1D)).cpu()}
    _put(told, number, found)
    return found


def _put(told: Fit, number: int, found: Mapping[str, Tensor]) -> None:
    """Give a block of the merged model its fitted weights."""
    inside = f"{told.merged.path}.{number}"
    for name, parameter in told.merged.blocks[number].named_parameters(prefix=inside):
        if (tensor := told.kept.get(name, "")) in found:
            parameter.data.copy_(found[tensor])
