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

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lewis_hub.calibration.activation_cache import ActivationCache
from lewis_hub.calibration.block_runner import BatchState, enter_blocks, run_block
from lewis_hub.calibration.determinism import deterministic_threads
from lewis_hub.calibration.grams import (
    cross_moments,
    residual_moments,
    second_moments,
    write_tensors,
)
from lewis_hub.calibration.hooks import (
    CallOrder,
    FirstInput,
    FirstInputError,
    InputRecorder,
    InputSum,
    OutOfStepError,
    check_tokens_fit,
    hooked,
    require_finite,
    unpadded_batches,
)
from lewis_hub.calibration.meta_model import MetaModel, build_meta_model
from lewis_hub.calibration.model import Linear, linears
from lewis_hub.calibration.passes import Grouping
from lewis_hub.calibration.subject import Weights
from lewis_hub.calibration.texts import CalibrationTokens, batches, first_tokens
from lewis_hub.calibration.weight_names import weight_names
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import NotByBlockError
from lewis_hub.progress import Advance, shared

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

    Attributes:
        gram: E[x x^T], (n_parts, width, width).
        cross_covariance: E[z x^T], of that shape; None: z is x.
        residual_covariance: E[d x^T], (n_parts, out, width), where d is the output of the expert's
            block minus that of the merged block, each without what the Linear adds; None: unknown.
    """

    gram: Tensor
    cross_covariance: Tensor | None = None
    residual_covariance: Tensor | None = None


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


@dataclass(frozen=True)
class SequentialFit:
    """What all blocks are fitted with.

    Attributes:
        merged: has the weights of a merge without statistics in all blocks not fitted yet.
        stored_as: parameter of the merged model -> tensor of the checkpoint.
        folder: for the tensors of each block.
        widest: the most inputs of one matrix.
        grouping: `batches`; or `unpadded_batches`, if a module has not a row for each token.
        n_threads: the number of matrices solved at a time.
    """

    merged: MetaModel
    experts: Sequence[MetaModel]
    stored_as: Mapping[str, str]
    solve: Solve
    folder: Path
    widest: int
    grouping: Grouping
    n_threads: int


def fit(  # noqa: PLR0913
    merged: Weights,
    texts: Sequence[ExpertTexts],
    solve: Solve,
    folder: Path,
    widest: int,
    device: str,
    advance: Advance,
) -> list[Path]:
    """Fit the Linears of all blocks.

    Args:
        merged: of a merge without statistics.
        texts: one per expert.
        solve: makes a tensor of its moments, on several threads at a time; not called if no token
            of some expert reached the module.
        folder: for the fitted tensors; blocks that an earlier run finished are kept.
        widest: the most inputs of one matrix; longer inputs are split into parts.
        device: as torch names it.
        advance: called with the number of tokens done, as if there were one block.

    Returns:
        A file of safetensors for each block in which a Linear was fitted.

    Raises:
        CalibrationModelError: a model cannot be loaded or measured.
        NotByBlockError: a model cannot be run block by block, or not beside the merged model.
        OutputError: the disk has no room for the hidden states.
    """
    model = build_meta_model(merged, device)
    experts = [build_meta_model(one.weights, device) for one in texts]
    for expert, one in zip(experts, texts, strict=True):
        check_tokens_fit(expert.model, expert.name, one.own)
        _require_alike(model, expert)
    n_threads = torch.get_num_threads() if device == "cpu" else 1
    stored_as = weight_names(model.model)
    job = SequentialFit(model, experts, stored_as, solve, folder, widest, batches, n_threads)
    with deterministic_threads(module for _, module in linears(model.path, model.blocks)):
        try:
            return _fit_blocks(job, texts, advance)
        except OutOfStepError:
            return _fit_blocks(replace(job, grouping=unpadded_batches), texts, advance)


def require_beside(merged: MetaModel, experts: Iterable[Checkpoint]) -> None:
    """Refuse, by its headers, an expert that lacks a matrix of the merge's blocks.

    Raises:
        NotByBlockError: as `fit` does.
    """
    stored_as = weight_names(merged.model)
    needed = [stored_as.get(f"{path}.weight") for path, _ in linears(merged.path, merged.blocks)]
    for expert in experts:
        if any(name and name not in expert.tensors for name in needed):
            raise NotByBlockError(expert.label, UNLIKE, merged.weights.remedy)


def _require_alike(merged: MetaModel, expert: MetaModel) -> None:
    """Refuse an expert that has other blocks, or other matrices in them."""
    paths = [{path for path, _ in linears("", one.blocks)} for one in (merged, expert)]
    if paths[0] != paths[1]:
        raise NotByBlockError(expert.name, UNLIKE, expert.weights.remedy)


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
                _put(job, number, load_file(file))
            elif found := _fit_block(job, number, trial, pairs):
                write_tensors(found, file)
            files += [file] if file.exists() else []
            trial.move(run_block(job.merged, number, trial))
            for expert, own_pairs in zip(job.experts, pairs, strict=True):
                for pair in own_pairs:
                    pair.own.move(run_block(expert, number, pair.own))
                    pair.merged.move(run_block(job.merged, number, pair.merged))
                    advance(pair.own.n_tokens)
    return files


def _enter(
    job: SequentialFit, texts: Sequence[ExpertTexts], cache: ActivationCache
) -> tuple[BatchState, list[list[BatchPair]]]:
    """A few tokens in the merged model; and for each expert all texts, in both models."""
    trial = [first_tokens(texts[0].merged)]
    groups = [trial, *(list(job.grouping(one.merged)) for one in texts)]
    [[first], *merged] = enter_blocks(job.merged, groups, cache)
    pairs = []
    for expert, one, states in zip(job.experts, texts, merged, strict=True):
        [own] = enter_blocks(expert, [list(job.grouping(one.own))], cache)
        pairs.append([BatchPair(*both) for both in zip(own, states, strict=True)])
    return first, pairs


def _fit_block(
    job: SequentialFit, number: int, trial: BatchState, pairs: Sequence[Sequence[BatchPair]]
) -> dict[str, Tensor]:
    """Fit one block, which has its weights in all models: tensor of the checkpoint -> its values.

    All texts stay before the block.
    """
    modules = dict(linears("", job.merged.blocks[number]))
    in_order = levels(job.merged, number, trial)
    each = list(zip(job.experts, pairs, strict=True))
    unpaired = modules.keys() - {path for level in in_order for path in level}
    found = _fit_unpaired(job, number, each, [path for path in modules if path in unpaired])
    for level in in_order:
        is_last = level is in_order[-1] and len(level) == 1
        try:
            with_residual = is_last and is_added(job.merged, number, trial, level[0])
            moments = [
                paired_moments(
                    (job.merged, expert),
                    number,
                    own,
                    level[0],
                    job.widest,
                    with_residual=with_residual,
                )
                for expert, own in each
            ]
        except OutOfStepError:
            if job.grouping is not unpadded_batches:
                raise
            found |= _fit_unpaired(job, number, each, level)  # some tokens alone reach it
        else:
            found |= _solve(job, number, dict.fromkeys(level, moments))
    return found


def _fit_unpaired(
    job: SequentialFit,
    number: int,
    each: Sequence[tuple[MetaModel, Sequence[BatchPair]]],
    paths: Sequence[str],
) -> dict[str, Tensor]:
    """Fit modules of a block on the experts' own inputs, if tokens of each expert reach them."""
    if not paths:
        return {}
    own = [own_moments(expert, number, texts, paths, job.widest) for expert, texts in each]
    known = {path: [one[path] for one in own] for path in paths if all(path in one for one in own)}
    return _solve(job, number, known)


def _solve(
    job: SequentialFit, number: int, moments: Mapping[str, Sequence[LayerMoments]]
) -> dict[str, Tensor]:
    """Fit modules, several at a time, and replace them in the merged model.

    Modules whose weights the checkpoint stores otherwise are left out.
    """
    prefix, block = f"{job.merged.path}.{number}", job.merged.blocks[number]

    def solve(path: str) -> tuple[str, Tensor]:
        tensor = job.stored_as[f"{prefix}.{path}.weight"]
        transposed = isinstance(block.get_submodule(path), Conv1D)
        return tensor, job.solve(tensor, moments[path], transposed).cpu()

    paths = [path for path in moments if f"{prefix}.{path}.weight" in job.stored_as]
    with ThreadPoolExecutor(job.n_threads) as pool:
        found = dict(pool.map(solve, paths))
    _put(job, number, found)
    return found


def _put(job: SequentialFit, number: int, fitted: Mapping[str, Tensor]) -> None:
    """Replace weights of a block of the merged model."""
    prefix = f"{job.merged.path}.{number}"
    for name, parameter in job.merged.blocks[number].named_parameters(prefix=prefix):
        if (tensor := job.stored_as.get(name, "")) in fitted:
            parameter.data.copy_(fitted[tensor])


def levels(merged: MetaModel, number: int, trial: BatchState) -> list[list[str]]:
    """The Linears of a block that see every token once, in the order of their calls.

    Linears with the same input tensor are one level. `trial` is a few tokens.
    """
    order = CallOrder()
    with hooked(dict(linears("", merged.blocks[number])), order):
        run_block(merged, number, trial)
    n_tokens = trial.batch.input_ids.numel()
    paired = [[path for path in one if order.n_rows[path] == [n_tokens]] for one in order.levels]
    return [level for level in paired if level]


def is_added(model: MetaModel, number: int, trial: BatchState, path: str) -> bool:
    """Whether a block adds the output of a Linear unchanged to terms that do not depend on it."""
    _, added, plain = _linear_and_block(model, number, trial, path)
    push = added * (plain.abs().max() / added.abs().max())
    module = _linear(model, number, path)
    handle = module.register_forward_hook(lambda _, _args, returned: returned + push)
    try:
        moved = run_block(model, number, trial) - plain
    finally:
        handle.remove()
    if moved.shape != push.shape:
        return False
    most = ROUNDINGS * torch.finfo(push.dtype).eps * push.abs().max()
    return bool(((moved - push).abs() <= most).all())


def paired_moments(  # noqa: PLR0913
    models: tuple[MetaModel, MetaModel],
    number: int,
    pairs: Sequence[BatchPair],
    path: str,
    widest: int,
    *,
    with_residual: bool,
) -> LayerMoments:
    """Moments of a Linear's inputs in the merged model and in an expert, token by token.

    Args:
        models: the merged one and the expert; both have the block's weights.
        number: of the block.
        pairs: texts before the block.
        path: of the Linear in the block.
        widest: the most inputs of one matrix.
        with_residual: whether the residual covariance is computed; only if the Linear `is_added`.

    Raises:
        OutOfStepError: its input has not a row for every token.
        CalibrationModelError: its input is not finite.
    """
    merged, expert = models

    def summed(pair: BatchPair) -> list[InputSum]:
        residuals = []
        if with_residual:
            x, merged_rest = _input_and_rest(merged, number, pair.merged, path)
            z, expert_rest = _input_and_rest(expert, number, pair.own, path)
            residuals.append(residual_moments(expert_rest - merged_rest, x, widest))
        else:
            x = _input(merged, number, pair.merged, path)
            z = _input(expert, number, pair.own, path)
        sums = (cross_moments(x, x, widest), cross_moments(z, x, widest), *residuals)
        return [InputSum(one, len(x)) for one in sums]

    totals = reduce(
        lambda one, two: [a + b for a, b in zip(one, two, strict=True)], map(summed, pairs)
    )
    whole_path = f"{merged.path}.{number}.{path}"
    require_finite({whole_path: totals[0]}, merged.name)
    for one in totals[1:]:
        require_finite({whole_path: one}, expert.name)
    return LayerMoments(*(one.mean() for one in totals))


def own_moments(
    expert: MetaModel, number: int, pairs: Sequence[BatchPair], paths: Collection[str], widest: int
) -> dict[str, LayerMoments]:
    """Moments of an expert's own inputs, of those of the Linears at `paths` that a token reaches.

    Raises:
        OutOfStepError: an input has not a row for every token, and some tokens are padding.
        CalibrationModelError: an input is not finite.
    """
    recorder = InputRecorder(partial(second_moments, widest=widest))
    modules = dict(linears("", expert.blocks[number]))
    with hooked({path: modules[path] for path in paths}, recorder):
        for pair in pairs:
            recorder.start(pair.own.batch)
            run_block(expert, number, pair.own)
            recorder.finish()
    require_finite(recorder.totals, expert.name)
    return {path: LayerMoments(one.mean()) for path, one in recorder.totals.items()}


def _input(model: MetaModel, number: int, state: BatchState, path: str) -> Tensor:
    """The input of a Linear of a block, (n_tokens, in_features), without padding.

    The texts stay before the block, which runs no further than to the Linear.
    """
    with hooked({path: _linear(model, number, path)}, FirstInput()):
        try:
            run_block(model, number, state)
        except FirstInputError as reached:
            return _rows(reached.x, state)
    raise OutOfStepError


def _input_and_rest(
    model: MetaModel, number: int, state: BatchState, path: str
) -> tuple[Tensor, Tensor]:
    """The input of a Linear, and the block's output minus its product, without padding.

    Its bias counts as part of the rest.
    """
    x, added, returned = _linear_and_block(model, number, state, path)
    rest = returned.float() - added.float()
    bias = _linear(model, number, path).bias
    return _rows(x, state), _rows(rest if bias is None else rest + bias, state)


def _linear_and_block(
    model: MetaModel, number: int, state: BatchState, path: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The input and the output of a Linear of a block, and the block's output."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = _linear(model, number, path).register_forward_hook(
        lambda _, args, returned: calls.append((args[0], returned.clone()))
    )
    try:
        returned = run_block(model, number, state)
    finally:
        handle.remove()
    if len(calls) != 1:
        raise OutOfStepError
    return *calls[0], returned


def _linear(model: MetaModel, number: int, path: str) -> Linear:
    """A Linear of a block, by its path in it."""
    return dict(linears("", model.blocks[number]))[path]


def _rows(x: Tensor, state: BatchState) -> Tensor:
    """The rows of the tokens that are not padding."""
    mask, rows = state.batch.attention_mask.flatten().bool(), x.detach().reshape(-1, x.shape[-1])
    if len(rows) != len(mask):
        raise OutOfStepError
    return rows[mask.to(rows.device)]
