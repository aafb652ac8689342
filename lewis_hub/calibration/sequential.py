"""Fit a merge block by block: each Linear on the inputs that it gets in the merged model.

The texts of each expert run through the expert and through the merged model, as far as it is
fitted. A Linear is fitted on E[x x^T] and E[z x^T]: x is its input in the merged model, z its input
in the expert. Within a block one level follows the other: q, k and v are fitted and replaced before
the input of o is computed. The last Linear of a block is fitted so that it compensates the
difference between the outputs of the expert's block and the merged block that earlier matrices
leave, where it is added to the block's output (`LayerMoments.residual_covariance`). A module that
sees chosen tokens alone, such as a routed matrix, has no x for each z: it is fitted on E[z z^T].
So are experts that are fused into a stack of matrices, each on the tokens that the expert's router
sends to it, and routers that are no Linear.
With `inputs: merged_block` (RegMean++) the expert's block gets the hidden states of the merged
model, as far as it is fitted, and x = z is the input of the expert's Linear there. All Linears of a
block are fitted on E[x x^T] before they are replaced.
The blocks of an encoder are fitted before those of its decoder, which attend to the output of the
merged encoder, and in the expert to that of the expert's encoder.

In memory are one block of the merged model and of every expert, the moments of one level, and
some inputs and outputs of the block's Linears (`block_runs.py`); on disk are the hidden states of
all texts, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lewis_hub.calibration import affine, grams
from lewis_hub.calibration.affine import AffineOptionsOf
from lewis_hub.calibration.block_runs import (
    BatchPair,
    BlockRuns,
    Pairs,
    is_added,
    levels,
    linear_at,
)
from lewis_hub.calibration.forward import (
    ActivationCache,
    BatchState,
    deterministic_threads,
    enter_blocks,
)
from lewis_hub.calibration.fused import FusedMoments, fused_moments
from lewis_hub.calibration.grams import InputSum
from lewis_hub.calibration.hooks import OutOfStepError, ProductRecorder, require_finite
from lewis_hub.calibration.meta_model import MetaModel, build_stacks, weight_names
from lewis_hub.calibration.model import check_tokens_fit, fused_parameters, linears
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

# the fitted tensors of a block, by how texts were batched: sums in another order round otherwise
FITTED: dict[Grouping, str] = {
    batches: "{}.safetensors",
    unpadded_batches: "unpadded-{}.safetensors",
}

InSequence = Literal["merged", "merged_block"]  # `inputs` of a recipe that fits in sequence

UNLIKE = "its blocks have other matrices than the merge's, so they cannot go side by side"


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one Linear's inputs on one expert's texts, float32.

    d is the output of the expert's block minus that of the merged block, each without what the
    Linear adds.
    """

    gram: Tensor  # E[x x^T], (n_parts, width, width); (n_matrices, ...) of a stack
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
    n_before: int  # the number of blocks of stacks before this one
    inputs: InSequence = "merged"
    affine_of: AffineOptionsOf | None = None  # None: norms and biases stay as they are
    fused: frozenset[str] = frozenset()  # parameters of a mixture that no Linear owns


@dataclass(frozen=True)
class Entered:
    """All texts before the same block, or behind the last one."""

    trial: BatchState  # a few tokens in the merged model
    pairs: Pairs

    @property
    def states(self) -> Iterator[BatchState]:
        """Those of all texts."""
        yield self.trial
        for pair in chain.from_iterable(self.pairs):
            yield pair.merged
            if pair.own.key != pair.merged.key:
                yield pair.own


def fit(  # noqa: PLR0913
    merged: Weights,
    texts: Sequence[ExpertTexts],
    solve: Solve,
    folder: Path,
    widest: int,
    device: str,
    advance: Advance,
    affine_of: AffineOptionsOf | None = None,
    inputs: InSequence = "merged",
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
    stacks = build_stacks(merged, device)
    experts = [build_stacks(one.weights, device) for one in texts]
    for expert, one in zip(experts, texts, strict=True):
        check_tokens_fit(expert[0].model, expert[0].name, one.own)
        if _paths(stacks) != _paths(expert):
            raise NotByBlockError(expert[0].name, UNLIKE, expert[0].weights.remedy)
    n_threads = torch.get_num_threads() if device == "cpu" else 1
    stored_as = weight_names(stacks[0].model)
    fused = frozenset(fused_parameters(stacks[0].model))
    grouping = unpadded_batches if fused else batches
    jobs = []
    for number, stack in enumerate(stacks):
        beside = [expert[number] for expert in experts]
        n_before = sum(len(one.blocks) for one in stacks[:number])
        made = SequentialFit(
            *(stack, beside, stored_as, solve, folder, widest, grouping, n_threads, n_before),
            inputs=inputs,
            affine_of=affine_of,
            fused=fused,
        )
        jobs.append(made)
    modules = (module for one in stacks for _, module in linears(one.path, one.blocks))
    with deterministic_threads(modules):
        try:
            return _fit_stacks(jobs, texts, advance)
        except OutOfStepError:
            unpadded = [replace(job, grouping=unpadded_batches) for job in jobs]
            return _fit_stacks(unpadded, texts, advance)


def _paths(stacks: Sequence[MetaModel]) -> set[str]:
    return {path for one in stacks for path, _ in linears(one.path, one.blocks)}


def require_beside(stacks: Sequence[MetaModel], experts: Iterable[Checkpoint]) -> None:
    """Refuse as `fit` does, by its headers, an expert that lacks a matrix of the merge's blocks."""
    stored_as = weight_names(stacks[0].model)
    needed = [stored_as.get(f"{path}.weight") for path in _paths(stacks)]
    for expert in experts:
        if any(name and name not in expert.tensors for name in needed):
            raise NotByBlockError(expert.label, UNLIKE, stacks[0].weights.remedy)


def _fit_stacks(
    jobs: Sequence[SequentialFit], texts: Sequence[ExpertTexts], advance: Advance
) -> list[Path]:
    advance = shared(advance, sum(len(job.merged.blocks) for job in jobs))
    files: list[Path] = []
    before: Entered | None = None
    with ActivationCache(jobs[0].folder) as cache:
        for job in jobs:
            with ExitStack() as opened:
                models = (job.merged, *job.experts)
                walks = [opened.enter_context(closing(one.walk())) for one in models]
                for number, _ in enumerate(zip(*walks, strict=True)):
                    if number == 0:
                        entered = _enter(job, texts, cache, before)
                    files += _fit_and_move(job, entered, number, advance)
                    if job is not jobs[-1] and number == len(job.merged.blocks) - 1:
                        for state in entered.states:
                            state.leave()
            before = entered
    return files


def _fit_and_move(
    job: SequentialFit, entered: Entered, number: int, advance: Advance
) -> list[Path]:
    """Fit a block, unless an earlier run did, and move all texts behind it; returns its file."""
    runs, trial, pairs = BlockRuns(), entered.trial, entered.pairs
    file = job.folder / FITTED[job.grouping].format(job.n_before + number)
    if file.exists():
        _put(job, trial, load_file(file))
    elif found := _fit_block(job, trial, pairs, runs):
        grams.write_tensors(found, file)
    trial.move(trial.run())
    for pair in chain.from_iterable(pairs):
        runs.move(pair)
        advance(pair.own.n_tokens)
    return [file] if file.exists() else []


def _enter(
    job: SequentialFit, texts: Sequence[ExpertTexts], cache: ActivationCache, before: Entered | None
) -> Entered:
    """A few tokens in the merged model; and for each expert all texts, in both models.

    `before` are the texts behind the encoder.
    """
    trial = [first_tokens(texts[0].merged)]
    groups = [trial, *(list(job.grouping(one.merged)) for one in texts)]
    encoded = before and [[before.trial], *([p.merged for p in own] for own in before.pairs)]
    [[first], *merged] = enter_blocks(job.merged, groups, cache, encoded or ())
    pairs = []
    for place, (expert, one) in enumerate(zip(job.experts, texts, strict=True)):
        encoded = before and [[pair.own for pair in before.pairs[place]]]
        [own] = enter_blocks(expert, [list(job.grouping(one.own))], cache, encoded or ())
        if job.inputs == "merged_block":
            for state, shared_with in zip(own, merged[place], strict=True):
                state.key = shared_with.key
        pairs.append([BatchPair(*both) for both in zip(own, merged[place], strict=True)])
    return Entered(first, pairs)


def _fit_block(
    job: SequentialFit, trial: BatchState, pairs: Pairs, runs: BlockRuns
) -> dict[str, Tensor]:
    """Fit one block, which has its weights in all models: tensor of the checkpoint -> its values.

    All texts stay before the block.
    """
    if job.inputs == "merged_block":
        paths = [path for path, _ in linears("", trial.block)]
        return _fit_fused(job, trial, pairs) | _fit_unpaired(job, trial, pairs, paths)
    in_order = levels(trial)
    paired = {path for level in in_order for path in level}
    unpaired = [path for path, _ in linears("", trial.block) if path not in paired]
    found = _fit_fused(job, trial, pairs) | _fit_unpaired(job, trial, pairs, unpaired)
    if in_order:
        for pair in chain.from_iterable(pairs):
            runs.watch(pair.own, [level[0] for level in in_order])
    norms = affine.norms_by_level(trial, in_order) if job.affine_of else [[]] * (len(in_order) + 1)
    for number, level in enumerate(in_order):
        found |= _fit_norms(job, trial, pairs, norms[number])
        is_last = level is in_order[-1] and len(level) == 1
        try:
            is_residual = is_last and is_added(trial, level[0])
            moments = [
                paired_moments(own, level[0], job.widest, runs, with_residual=is_residual)
                for own in pairs
            ]
        except OutOfStepError:
            if job.grouping is not unpadded_batches:
                raise
            found |= _fit_unpaired(job, trial, pairs, level)  # some tokens alone reach it
        else:
            found |= _solve(job, trial, dict.fromkeys(level, moments))
            found |= _fit_biases(job, trial, pairs, level, of_block=is_residual)
            runs.fitted(level)
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


def _fit_fused(job: SequentialFit, trial: BatchState, pairs: Pairs) -> dict[str, Tensor]:
    """Fit experts that are fused into stacks on each expert's own inputs, where all have tokens."""
    if not _fused_of(job, trial):
        return {}
    each = [_own_fused(job, [pair.own for pair in texts]) for texts in pairs]
    reached = [tensor for tensor in each[0] if all(tensor in one for one in each)]

    def solve(tensor: str) -> tuple[str, Tensor]:
        moments = [LayerMoments(one[tensor].gram) for one in each]
        return tensor, job.solve(tensor, moments, each[0][tensor].transposed).cpu()

    with ThreadPoolExecutor(job.n_threads) as pool:
        found = dict(pool.map(solve, reached))
    _put(job, trial, found)
    return found


def _own_fused(job: SequentialFit, texts: Sequence[BatchState]) -> dict[str, FusedMoments]:
    """Moments of what is fused in an expert's block, by the tensors of the checkpoint."""
    first = texts[0]
    moments = partial(grams.second_moments, widest=job.widest)
    recorder = ProductRecorder(_fused_of(job, first), moments)
    for state in texts:
        state.run(recorder)
    return fused_moments(first.model.model, first.model.name, recorder, job.widest)


def _fused_of(job: SequentialFit, state: BatchState) -> dict[str, Tensor]:
    """The parameters of a block that no Linear owns, in a model of which some are stacks."""
    named = state.block.named_parameters(prefix=state.path)
    return {name: parameter for name, parameter in named if name in job.fused}


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
    if not fitted.keys() <= set(job.stored_as.values()):  # converting stacks copies them all
        fused = _fused_of(job, trial).items()
        job.merged.replace_fused({n: one for n, one in fused if n not in job.stored_as}, fitted)
    for name, parameter in trial.block.named_parameters(prefix=trial.path):
        if (tensor := job.stored_as.get(name, "")) in fitted:
            parameter.data.copy_(fitted[tensor])


def paired_moments(
    pairs: Sequence[BatchPair], path: str, widest: int, runs: BlockRuns, *, with_residual: bool
) -> LayerMoments:
    """Moments of a Linear's inputs in the merged model and in an expert, token by token.

    `with_residual` needs a Linear that `is_added`. An input without a row for every token is an
    OutOfStepError, one that is not finite a CalibrationModelError.
    """
    gram = cross = residual = None
    n_tokens = 0
    for pair in pairs:
        seen = runs.seen(pair, path, with_residual=with_residual)
        n_tokens += len(seen.x)
        gram = grams.upper_moments(seen.x, widest, gram)
        cross = grams.cross_moments(seen.z, seen.x, widest, cross)
        if seen.residual is not None:
            residual = grams.residual_moments(seen.residual, seen.x, widest, residual)
    assert gram is not None
    grams.mirrored(gram)
    merged, own = pairs[0].merged, pairs[0].own
    for one, state in ((gram, merged), (cross, own), (residual, own)):
        if one is not None:
            require_finite({f"{merged.path}.{path}": InputSum(one, n_tokens)}, state.model.name)
            one.div_(n_tokens)
    return LayerMoments(gram, cross, residual)


def own_moments(
    texts: Sequence[BatchState], paths: Iterable[str], widest: int
) -> dict[str, LayerMoments]:
    """Moments of an expert's own inputs, for the Linears at `paths` that a token reaches."""
    modules = {path: linear_at(texts[0], path) for path in paths}
    statistic = partial(grams.second_moments, widest=widest)
    [totals] = block_sums(texts, modules, [statistic], lambda state: state.run())
    of_sum = {id(one): LayerMoments(one.mean()) for one in totals.values()}
    return {path: of_sum[id(one)] for path, one in totals.items()}
