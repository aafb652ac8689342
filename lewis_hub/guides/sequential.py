"""Fit a merge block by block: each Linear on what the merged model itself hands it.

The texts of each expert run through the expert and, beside it, through the merged model as far as
it is fitted. A Linear is fitted by E[x x^T] and E[z x^T]: x is what the merged model hands it, z
what the expert is handed in the same place. Within a block one level follows the other: q, k and v
are fitted and put in before the input of o is looked at. A module that sees chosen tokens alone,
such as a routed expert, has no x beside each z: there E[z z^T] is all.

In memory are what `by_block` holds of the merged model and of every expert, and the moments of one
level.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import NotByBlockError
from lewis_hub.guides.activations import N_TRIED, check_tokens_fit, hooked, require_finite
from lewis_hub.guides.blocks import linears
from lewis_hub.guides.by_block import Grouped, alone, entered, run_block
from lewis_hub.guides.flow import Flow
from lewis_hub.guides.grams import n_inputs, products, second_moments
from lewis_hub.guides.recording import (
    First,
    HandedError,
    InputSum,
    Order,
    OutOfStepError,
    Recorder,
)
from lewis_hub.guides.skeleton import Skeleton, skeleton
from lewis_hub.guides.stored import stored_names
from lewis_hub.guides.threads import threads, whole_shares
from lewis_hub.guides.tokens import Batch, CalibrationTokens, batches
from lewis_hub.guides.weights import Weights
from lewis_hub.progress import Advance, shared

# the fitted tensors of a block, by how texts were grouped: sums in another order round otherwise
DONE: dict[Grouped, str] = {batches: "{}.safetensors", alone: "unpadded-{}.safetensors"}

UNLIKE = "its blocks have other matrices than the merge's, so they cannot go side by side"


@dataclass(frozen=True)
class Seen:
    """What one Linear is handed on one expert's texts: (n_parts, width, width) float32 each.

    Attributes:
        gram: E[x x^T].
        cross: E[z x^T]; None: z is x.
    """

    gram: Tensor
    cross: Tensor | None = None


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
class Pair:
    """The same texts in an expert and in the merged model, before the same block."""

    own: Flow
    merged: Flow


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


def require_beside(merged: Skeleton, expert: Checkpoint) -> None:
    """Refuse, by its headers, an expert that lacks a matrix of the merge's blocks.

    Raises:
        NotByBlockError: as `fit` does.
    """
    kept = stored_names(merged.model)
    named = [kept.get(f"{path}.weight") for path, _ in linears(merged.path, merged.blocks)]
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
        walks = [opened.enter_context(closing(one.walk())) for one in (told.merged, *told.experts)]
        for walk in walks:
            next(walk)
        trial, pairs = _entered(told, texts)
        for number, _ in enumerate(zip(*walks, strict=True)):
            file = told.folder / DONE[told.grouped].format(number)
            if file.exists():
                _put(told, number, load_file(file))
            elif found := _fit_block(told, number, trial, pairs):
                save_file(found, file.with_suffix(".new"))
                file.with_suffix(".new").replace(file)
            files += [file] if file.exists() else []
            run_block(told.merged, number, trial)
            for expert, own_pairs in zip(told.experts, pairs, strict=True):
                for pair in own_pairs:
                    run_block(expert, number, pair.own)
                    run_block(told.merged, number, pair.merged)
                    advance(int(pair.own.batch.attention_mask.sum()))
    return files


def _entered(told: Fit, texts: Sequence[Texts]) -> tuple[Flow, list[list[Pair]]]:
    """A few tokens in the merged model; and of each expert all texts, in both."""
    ids = torch.tensor([texts[0].merged.ids[0][:N_TRIED]])
    tried = Batch(ids, torch.ones_like(ids))
    groups = [[tried], *(list(told.grouped(one.merged)) for one in texts)]
    [trial], *merged = entered(told.merged, groups)
    pairs = []
    for expert, one, flows in zip(told.experts, texts, merged, strict=True):
        [own] = entered(expert, [list(told.grouped(one.own))])
        pairs.append([Pair(*both) for both in zip(own, flows, strict=True)])
    return trial, pairs


def _fit_block(
    told: Fit, number: int, trial: Flow, pairs: Sequence[Sequence[Pair]]
) -> dict[str, Tensor]:
    """Fit one block, which has its weights in all models; tensor of the checkpoint -> its values.

    All texts stay before the block.
    """
    modules = dict(linears("", told.merged.blocks[number]))
    levels = _levels(told, number, trial)
    each = list(zip(told.experts, pairs, strict=True))
    apart = modules.keys() - {path for level in levels for path in level}
    found = _fit_apart(told, number, each, [path for path in modules if path in apart])
    for level in levels:
        try:
            seen = [_seen(told, number, expert, own, level[0]) for expert, own in each]
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
    own = [_seen_apart(told, number, expert, texts, paths) for expert, texts in each]
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


def _levels(told: Fit, number: int, trial: Flow) -> list[list[str]]:
    """The Linears that see every token once, in the order in which they are called.

    Those that are handed the very same tensor are one level.
    """
    order = Order()
    with hooked(dict(linears("", told.merged.blocks[number])), order):
        run_block(told.merged, number, replace(trial))
    n_tokens = trial.batch.input_ids.numel()
    paired = [[path for path in one if order.n_rows[path] == [n_tokens]] for one in order.levels]
    return [level for level in paired if level]


def _seen(told: Fit, number: int, expert: Skeleton, pairs: Sequence[Pair], path: str) -> Seen:
    """What a Linear is handed in the merged model, and beside it in an expert."""
    gram: Tensor | None = None
    cross: Tensor | None = None
    n_tokens = 0
    for pair in pairs:
        x = _handed(told.merged, number, pair.merged, path)
        z = _handed(expert, number, pair.own, path)
        added = products(x, x, told.widest), products(z, x, told.widest)
        gram, cross = (
            one if sums is None else sums + one
            for sums, one in zip((gram, cross), added, strict=True)
        )
        n_tokens += len(x)
    assert gram is not None
    assert cross is not None
    whole = f"{told.merged.path}.{number}.{path}"
    require_finite({whole: InputSum(gram, n_tokens)}, told.merged.name)
    require_finite({whole: InputSum(cross, n_tokens)}, expert.name)
    return Seen(gram / n_tokens, cross / n_tokens)


def _seen_apart(
    told: Fit, number: int, expert: Skeleton, pairs: Sequence[Pair], paths: Collection[str]
) -> dict[str, Seen]:
    """What an expert's own modules are handed, of those that a token reaches."""
    recorder = Recorder(partial(second_moments, widest=told.widest))
    modules = dict(linears("", expert.blocks[number]))
    with hooked({path: modules[path] for path in paths}, recorder):
        for pair in pairs:
            recorder.start(pair.own.batch)
            run_block(expert, number, replace(pair.own))
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
            run_block(made, number, replace(flow))
        except HandedError as handed:
            x, mask = handed.x, flow.batch.attention_mask.flatten().bool()
            rows = x.detach().reshape(-1, x.shape[-1])
            if len(rows) == len(mask):
                return rows[mask.to(rows.device)]
    raise OutOfStepError
