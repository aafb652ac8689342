"""Fit a merge block by block: each Linear on the inputs that it gets in the merged model.

The texts of each expert run through the expert and through the merged model, as far as it is
fitted. A Linear is fitted on E[x x^T] and E[z x^T]: x is its input in the merged model, z its input
in the expert. Within a block one level follows the other: q, k and v are fitted and replaced before
the input of o is computed. The last Linear of a block is fitted so that it compensates the
difference between the outputs of the expert's block and the merged block that earlier matrices
leave, where it is added to the block's output (`LayerMoments.residual_covariance`). A module that
sees chosen tokens alone, such as a routed matrix, has no x for each z: it is fitted on E[z z^T].

In memory are one block of the merged model and of every expert, and the moments of one level; on
disk are the hidden states of all texts, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lewis_hub.calibration import affine, grams
from lewis_hub.calibration.affine import AffineOptionsOf
from lewis_hub.calibration.forward import (
    ActivationCache,
    BatchState,
    ReachedError,
    deterministic_threads,
    enter_blocks,
)
from lewis_hub.calibration.grams import InputSum
from lewis_hub.calibration.hooks import CallOrder, OutOfStepError, hooked, require_finite
from lewis_hub.calibration.meta_model import MetaModel, build_meta_model, weight_names
from lewis_hub.calibration.model import Linear, check_tokens_fit, linears
from lewis_hub.calibration.passes import block_sums
from lewis_hub.calibration.subject import Weights
from lewis_hub.calibration.texts import (
    CalibrationTokens,
    Grouping,
    batches,
    first_tokens,
    unpadded_batches,
)
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.display import Advance, shared
from lewis_hub.errors import NotByBlockError

ROUNDINGS = 16  # errors of a sum, in units of its dtype's epsilon times the largest term

# the fitted tensors of a block, by how texts were batched: sums in another order round otherwise
FITTED: dict[Grouping, str] = {
    batches: "{}.safetensors",
    unpadded_batches: "unpadded-{}.safetensors",
}

UNLIKE = "its blocks have other matrices than the merge's, so they cannot go side by side"


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one Linear's inputs on one expert's texts, float32.

    d is the output of the expert's block minus that of the merged block, each without what the
    Linear adds.
    """

    gram: Tensor  # E[x x^T], (n_parts, width, width)
    cross_covariance: Tensor | None = None  # E[z x^T], of that shape; None: z is x
    residual_covariance: Tensor | None = None  # E[d x^T], (n_parts, out, width); None: unknown


# (tensor of the checkpoint, moments of each expert, whether it is stored as (in, out))
# -> the fitted tensor, in the output's dtype
Solve = Callable[[str, Sequence[LayerMoments], bool], Tensor]


@dataclass(frozen=True)
class ExpertTexts:
    """One expert, and its calibration texts in its own ids and in those of the merged model."""

    weights: Weights
    own: CalibrationTokens
    merged: CalibrationTokens


@dataclass(frozen=True)
class BatchPair:
    """A batch in an expert and in the merged model, before the same block."""

    own: BatchState
    merged: BatchState


Pairs = Sequence[Sequence[BatchPair]]  # of all texts of each expert


@dataclass(frozen=True)
class SequentialFit:
    """What all blocks are fitted with."""

    merged: MetaModel  # with the weights of a merge without statistics in blocks not fitted yet
    experts: Sequence[MetaModel]
    stored_as: Mapping[str, str]  # parameter of the merged model -> tensor of the checkpoint
    solve: Solve
    folder: Path  # for the tensors of each block
    widest: int  # the most inputs of one matrix
    grouping: Grouping  # unpadded_batches if a module has not a row for each token
    n_threads: int  # the number of matrices solved at a time
    affine_of: AffineOptionsOf | None = None  # None: norms and biases stay as they are


def fit(  # noqa: PLR0913
    merged: Weights,
    texts: Sequence[ExpertTexts],
    solve: Solve,
    folder: Path,
    widest: int,
    device: str,
    advance: Advance,
    affine_of: AffineOptionsOf | None = None,
) -> list[Path]:
    """Fit the Linears of all blocks of a merge without statistics, on the `texts` of each expert.

    Several threads call `solve`, but not for a module that no token of some expert reached. Inputs
    longer than `widest` are split into parts. `advance` is called with the number of tokens done,
    as if there were one block. With `affine_of` norms and biases are fitted too. Returns a file in
    `folder` for each block in which a Linear was fitted; those that an earlier run finished are
    kept.

    Raises:
        CalibrationModelError: a model cannot be loaded or measured.
        NotByBlockError: a model cannot be run block by block, or not beside the merged model.
        OutputError: the disk has no room for the hidden states.
    """
    model = build_meta_model(merged, device)
    experts = [build_meta_model(one.weights, device) for one in texts]
    paths = {path for path, _ in linears("", model.blocks)}
    for expert, one in zip(experts, texts, strict=True):
        check_tokens_fit(expert.model, expert.name, one.own)
        if paths != {path for path, _ in linears("", expert.blocks)}:
            raise NotByBlockError(expert.name, UNLIKE, expert.weights.remedy)
    n_threads = torch.get_num_threads() if device == "cpu" else 1
    stored_as = weight_names(model.model)
    job = SequentialFit(
        model, experts, stored_as, solve, folder, widest, batches, n_threads, affine_of
    )
    with deterministic_threads(module for _, module in linears(model.path, model.blocks)):
        try:
            return _fit_blocks(job, texts, advance)
        except OutOfStepError:
            return _fit_blocks(replace(job, grouping=unpadded_batches), texts, advance)


def require_beside(merged: MetaModel, experts: Iterable[Checkpoint]) -> None:
    """Refuse as `fit` does, by its headers, an expert that lacks a matrix of the merge's blocks."""
    stored_as = weight_names(merged.model)
    needed = [stored_as.get(f"{path}.weight") for path, _ in linears(merged.path, merged.blocks)]
    for expert in experts:
        if any(name and name not in expert.tensors for name in needed):
            raise NotByBlockError(expert.label, UNLIKE, merged.weights.remedy)


def _fit_blocks(job: SequentialFit, texts: Sequence[ExpertTexts], advance: Advance) -> list[Path]:
    advance = shared(advance, len(job.merged.blocks))
    files = []
    with ExitStack() as opened:
        cache = opened.enter_context(ActivationCache(job.folder))
        walks = [opened.enter_context(closing(one.walk())) for one in (job.merged, *job.experts)]
        for number, _ in enumerate(zip(*walks, strict=True)):
            if number == 0:
                trial, pairs = _enter(job, texts, cache)
            file = job.folder / FITTED[job.grouping].format(number)
            if file.exists():
                _put(job, trial, load_file(file))
            elif found := _fit_block(job, trial, pairs):
                grams.write_tensors(found, file)
            files += [file] if file.exists() else []
            trial.move(trial.run())
            for pair in chain.from_iterable(pairs):
                pair.own.move(pair.own.run())
                pair.merged.move(pair.merged.run())
                advance(pair.own.n_tokens)
    return files


def _enter(
    job: SequentialFit, texts: Sequence[ExpertTexts], cache: ActivationCache
) -> tuple[BatchState, Pairs]:
    """A few tokens in the merged model; and for each expert all texts, in both models."""
    trial = [first_tokens(texts[0].merged)]
    groups = [trial, *(list(job.grouping(one.merged)) for one in texts)]
    [[first], *merged] = enter_blocks(job.merged, groups, cache)
    pairs = []
    for expert, one, states in zip(job.experts, texts, merged, strict=True):
        [own] = enter_blocks(expert, [list(job.grouping(one.own))], cache)
        pairs.append([BatchPair(*both) for both in zip(own, states, strict=True)])
    return first, pairs


def _fit_block(job: SequentialFit, trial: BatchState, pairs: Pairs) -> dict[str, Tensor]:
    """Fit one block, which has its weights in all models: tensor of the checkpoint -> its values.

    All texts stay before the block.
    """
    in_order = levels(trial)
    paired = {path for level in in_order for path in level}
    unpaired = [path for path, _ in linears("", trial.block) if path not in paired]
    found = _fit_unpaired(job, trial, pairs, unpaired)
    norms = affine.norms_by_level(trial, in_order) if job.affine_of else [[]] * (len(in_order) + 1)
    for number, level in enumerate(in_order):
        found |= _fit_norms(job, trial, pairs, norms[number])
        is_last = level is in_order[-1] and len(level) == 1
        try:
            is_residual = is_last and is_added(trial, level[0])
            moments = [
                paired_moments(own, level[0], job.widest, with_residual=is_residual)
                for own in pairs
            ]
        except OutOfStepError:
            if job.grouping is not unpadded_batches:
                raise
            found |= _fit_unpaired(job, trial, pairs, level)  # some tokens alone reach it
        else:
            found |= _solve(job, trial, dict.fromkeys(level, moments))
            found |= _fit_biases(job, trial, pairs, level, of_block=is_residual)
    return found | _fit_norms(job, trial, pairs, norms[-1])


def _fit_norms(
    job: SequentialFit, trial: BatchState, pairs: Pairs, paths: Sequence[str]
) -> dict[str, Tensor]:
    """Fit norms of a block one after the other, and put them into the merged model."""
    found: dict[str, Tensor] = {}
    if job.affine_of is None:
        return found
    for path in paths:
        fitted = affine.fit_norm(pairs, path, job.stored_as, job.affine_of)
        _put(job, trial, fitted)
        found |= fitted
    return found


def _fit_biases(
    job: SequentialFit, trial: BatchState, pairs: Pairs, level: Sequence[str], *, of_block: bool
) -> dict[str, Tensor]:
    """Fit the biases of one level, and put them into the merged model."""
    if job.affine_of is None:
        return {}
    fitted = affine.fit_biases(pairs, level, job.stored_as, job.affine_of, of_block=of_block)
    _put(job, trial, fitted)
    return fitted


def _fit_unpaired(
    job: SequentialFit, trial: BatchState, pairs: Pairs, paths: Sequence[str]
) -> dict[str, Tensor]:
    """Fit modules of a block on the experts' own inputs, if tokens of each expert reach them."""
    if not paths:
        return {}
    each = [own_moments([pair.own for pair in texts], paths, job.widest) for texts in pairs]
    reached = [path for path in paths if all(path in moments for moments in each)]
    return _solve(job, trial, {path: [moments[path] for moments in each] for path in reached})


def _solve(
    job: SequentialFit, trial: BatchState, moments: Mapping[str, Sequence[LayerMoments]]
) -> dict[str, Tensor]:
    """Fit modules whose weights are stored unchanged, and put them into the merged model."""

    def solve(path: str) -> tuple[str, Tensor]:
        tensor = job.stored_as[f"{trial.path}.{path}.weight"]
        transposed = isinstance(trial.block.get_submodule(path), Conv1D)
        return tensor, job.solve(tensor, moments[path], transposed).cpu()

    paths = [path for path in moments if f"{trial.path}.{path}.weight" in job.stored_as]
    with ThreadPoolExecutor(job.n_threads) as pool:
        found = dict(pool.map(solve, paths))
    _put(job, trial, found)
    return found


def _put(job: SequentialFit, trial: BatchState, fitted: Mapping[str, Tensor]) -> None:
    """Replace weights of a block of the merged model."""
    for name, parameter in trial.block.named_parameters(prefix=trial.path):
        if (tensor := job.stored_as.get(name, "")) in fitted:
            parameter.data.copy_(fitted[tensor])


def levels(trial: BatchState) -> list[list[str]]:
    """The Linears of a block that see every token once, in the order of their calls.

    Linears with the same input tensor are one level. `trial` is a few tokens.
    """
    order = CallOrder()
    with hooked(dict(linears("", trial.block)), order.see):
        trial.run()
    n_tokens = trial.batch.input_ids.numel()
    paired = [[path for path in one if order.n_rows[path] == [n_tokens]] for one in order.levels]
    return [level for level in paired if level]


def is_added(trial: BatchState, path: str) -> bool:
    """Whether a block adds the output of a Linear unchanged to terms that do not depend on it."""
    _, added, plain = _linear_and_block(trial, path)
    push = added * (plain.abs().max() / added.abs().max())
    with _linear(trial, path).register_forward_hook(lambda _, _args, returned: returned + push):
        moved = trial.run() - plain
    if moved.shape != push.shape:
        return False
    most = ROUNDINGS * torch.finfo(push.dtype).eps * push.abs().max()
    return bool(((moved - push).abs() <= most).all())


def paired_moments(
    pairs: Sequence[BatchPair], path: str, widest: int, *, with_residual: bool
) -> LayerMoments:
    """Moments of a Linear's inputs in the merged model and in an expert, token by token.

    `with_residual` needs a Linear that `is_added`. An input without a row for every token is an
    OutOfStepError, one that is not finite a CalibrationModelError.
    """

    def summed(pair: BatchPair) -> list[InputSum]:
        residuals = []
        if with_residual:
            x, merged_rest = _input_and_rest(pair.merged, path)
            z, expert_rest = _input_and_rest(pair.own, path)
            residuals.append(grams.residual_moments(expert_rest - merged_rest, x, widest))
        else:
            x, z = _input(pair.merged, path), _input(pair.own, path)
        sums = (grams.cross_moments(x, x, widest), grams.cross_moments(z, x, widest), *residuals)
        return [InputSum(one, len(x)) for one in sums]

    totals = reduce(
        lambda one, two: [a + b for a, b in zip(one, two, strict=True)], map(summed, pairs)
    )
    states = (pairs[0].merged, pairs[0].own, pairs[0].own)
    for one, state in zip(totals, states, strict=False):
        require_finite({f"{pairs[0].merged.path}.{path}": one}, state.model.name)
    return LayerMoments(*(one.mean() for one in totals))


def own_moments(
    texts: Sequence[BatchState], paths: Iterable[str], widest: int
) -> dict[str, LayerMoments]:
    """Moments of an expert's own inputs, for the Linears at `paths` that a token reaches."""
    modules = {path: _linear(texts[0], path) for path in paths}
    statistic = partial(grams.second_moments, widest=widest)
    [totals] = block_sums(texts, modules, [statistic], lambda state: state.run())
    return {path: LayerMoments(one.mean()) for path, one in totals.items()}


def _input(state: BatchState, path: str) -> Tensor:
    """The input of a Linear, (n_tokens, in_features), without padding; the block stops there."""

    def leave(_: str, x: Tensor) -> None:
        raise ReachedError(x)

    with hooked({path: _linear(state, path)}, leave):
        try:
            state.run()
        except ReachedError as reached:
            return _rows(reached.value, state)
    raise OutOfStepError


def _input_and_rest(state: BatchState, path: str) -> tuple[Tensor, Tensor]:
    """A Linear's input, and the block's output minus its product; the bias is part of the rest."""
    x, added, returned = _linear_and_block(state, path)
    rest = returned.float() - added.float()
    bias = _linear(state, path).bias
    return _rows(x, state), _rows(rest if bias is None else rest + bias, state)


def _linear_and_block(state: BatchState, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """The input and the output of a Linear of a block, and the block's output."""
    calls: list[tuple[Tensor, Tensor]] = []
    with _linear(state, path).register_forward_hook(
        lambda _, args, returned: calls.append((args[0], returned.clone()))
    ):
        returned = state.run()
    if len(calls) != 1:
        raise OutOfStepError
    return *calls[0], returned


def _linear(state: BatchState, path: str) -> Linear:
    return cast("Linear", state.block.get_submodule(path))


def _rows(x: Tensor, state: BatchState) -> Tensor:
    """The rows of the tokens that are not padding."""
    mask, rows = state.batch.attention_mask.flatten().bool(), x.detach().reshape(-1, x.shape[-1])
    if len(rows) != len(mask):
        raise OutOfStepError
    return rows[mask.to(rows.device)]
