"""Fit the scales and biases of a block's norms, and the biases of its Linears, in sequence.

A norm computes y = g x + b: x is what its scale multiplies, without the scale and the bias. In the
merged model it gets new values, so that y is nearest to what the expert's norm gives for the same
token. A Linear, whose weight is fitted before, gets the bias that leaves no mean difference.
FeatCal (arXiv 2605.13030) fits norms to what the expert's scale and bias give on the merged model's
x, and all parameters of a block at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lewis_hub.calibration.forward import BatchState, ReachedError
from lewis_hub.calibration.grams import ROWS_AT_ONCE, InputSum, widest_float
from lewis_hub.calibration.hooks import OutOfStepError, hooked
from lewis_hub.calibration.model import linears
from lewis_hub.methods.numerics import torch_threads

FLOOR = 1e-6  # times the mean E[x^2], added to each entry's: as for matrices
ROUNDINGS = 64  # errors of y = g x + b, in units of the dtype's epsilon times the largest entry


@dataclass(frozen=True)
class AffineOptions:
    """How one tensor is fitted."""

    weights: Sequence[float]  # per expert
    ridge: float  # pulls towards the values of the merge without statistics
    dtype: torch.dtype  # of the output


# tensor of the checkpoint -> how it is fitted; None: it is not
AffineOptionsOf = Callable[[str], AffineOptions | None]


class StatePair(Protocol):
    """A batch in an expert and in the merged model, before the same block."""

    @property
    def own(self) -> BatchState:
        """In the expert."""

    @property
    def merged(self) -> BatchState:
        """In the merged model."""


Pairs = Iterable[Sequence[StatePair]]  # of all texts of each expert


@dataclass(frozen=True)
class AffineMoments:
    """Moments on one expert's texts, (n,) in the widest float; d: the output that is missing."""

    squares: Tensor  # E[x^2]
    means: Tensor  # E[x]
    products: Tensor  # E[d x]
    residuals: Tensor  # E[d]


@dataclass(frozen=True)
class AffineUpdate:
    """What is added to a scale and a bias, (n,) each."""

    scale: Tensor
    bias: Tensor


def affine_update(
    moments: Sequence[AffineMoments], weights: Sequence[float], ridge: float, *, has_bias: bool
) -> AffineUpdate:
    """The s and b that minimise sum_i w_i E_i[(s x + b - d)^2] + r s^2 + q b^2, entry by entry.

    r is `ridge` times the mean of sum_i w_i E_i[x^2], and q is `ridge` times the sum of the
    weights. Without a bias, b is 0.
    """
    total = AffineMoments(
        *(
            torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum(dim=0)
            for parts in zip(*(_parts(one) for one in moments), strict=True)
        )
    )
    squares = total.squares + (FLOOR + ridge) * total.squares.mean()
    squares = squares.where(squares > 0, 1.0)
    if not has_bias:
        return AffineUpdate(total.products / squares, torch.zeros_like(squares))
    count = sum(weights) * (1.0 + ridge)
    determinant = squares * count - total.means.square()
    scale = (total.products * count - total.means * total.residuals) / determinant
    return AffineUpdate(scale, (total.residuals - total.means * scale) / count)


def _parts(moments: AffineMoments) -> tuple[Tensor, ...]:
    return moments.squares, moments.means, moments.products, moments.residuals


def norms_by_level(trial: BatchState, levels: Sequence[Sequence[str]]) -> list[list[str]]:
    """Modules that compute y = g x + b for each token once, before each level, then after all.

    `trial` is a few tokens, and `levels` are the Linears that are fitted, by their calls.
    """
    block, calls = trial.block, list[str]()
    skipped = {path for path, _ in linears("", block)}
    found = {p: m for p, m in block.named_modules() if p not in skipped and _has_scale(m)}
    firsts = {level[0]: block.get_submodule(level[0]) for level in levels}
    with hooked({**found, **firsts}, lambda path, _: calls.append(path)):
        trial.run()
    before: list[list[str]] = [[] for _ in range(len(levels) + 1)]
    n_begun = 0
    for path in calls:
        if path in firsts:
            n_begun += 1
        elif calls.count(path) == 1 and _is_affine(trial, path):
            before[n_begun].append(path)
    return before


def _has_scale(module: nn.Module) -> bool:
    own = dict(module.named_parameters())
    scale = own.get("weight")
    return scale is not None and scale.dim() == 1 and own.keys() <= {"weight", "bias"}


def _is_affine(trial: BatchState, path: str) -> bool:
    """Whether a module's output is a row for each token, and g x + b."""
    try:
        call = _call(trial, path)
        _rows(call.y, trial, len(call.scale))
    except OutOfStepError:
        return False
    error = (call.x * call.scale + call.shift - call.y).abs().max()
    most = call.y.abs().max().clamp(min=float(call.shift.abs().max()))
    return bool(error <= ROUNDINGS * torch.finfo(call.y.dtype).eps * most)


@dataclass(frozen=True)
class _Call:
    """One call of a norm: y = scale x + shift."""

    y: Tensor
    x: Tensor
    shift: Tensor
    scale: Tensor


def _call(state: BatchState, path: str) -> _Call:
    module = state.block.get_submodule(path)
    args, named, y = _reached(state, [path])[path]
    scale = cast("Tensor", module.weight)

    def made(value: float) -> Tensor:
        scales = {"weight": torch.full_like(scale, value)}
        with torch.no_grad():
            return cast("Tensor", functional_call(module, scales, args, named))

    shift = made(0.0)
    return _Call(y, made(1.0) - shift, shift, scale.detach())


def _reached(
    state: BatchState, paths: Sequence[str]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Arguments and output of modules of a block; the block stops after the last of them."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def see(path: str) -> Callable[..., None]:
        def hook(
            _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], returned: Tensor
        ) -> None:
            seen[path] = args, named, returned.clone()
            if len(seen) == len(paths):
                raise ReachedError(None)

        return hook

    modules = [state.block.get_submodule(path) for path in paths]
    handles = [
        module.register_forward_hook(see(path), with_kwargs=True)
        for path, module in zip(paths, modules, strict=True)
    ]
    try:
        state.run()
    except ReachedError:
        return seen
    finally:
        for handle in handles:
            handle.remove()
    raise OutOfStepError


def fit_norm(
    pairs: Pairs, path: str, stored_as: Mapping[str, str], options_of: AffineOptionsOf
) -> dict[str, Tensor]:
    """Fit a norm of a block: tensor of the checkpoint -> values; empty if it is not asked for."""

    def sums(pair: StatePair) -> InputSum:
        merged = _call(pair.merged, path)
        *_, wanted = _reached(pair.own, [path])[path]
        n = len(merged.scale)
        x, missing = _rows(merged.x, pair.merged, n), _rows(wanted, pair.own, n)
        return _summed(x, missing - _rows(merged.y, pair.merged, n))

    texts = list(pairs)
    state = texts[0][0].merged
    module = state.block.get_submodule(path)
    names = {key: stored_as.get(f"{state.path}.{path}.{key}", "") for key in _own(module)}
    options = options_of(names["weight"]) if names["weight"] else None
    if options is None:
        return {}
    try:
        moments = [_mean(map(sums, own)) for own in texts]
    except OutOfStepError:
        return {}  # its rows are not tokens with every batch
    has_bias = bool(names.get("bias")) and options_of(names["bias"]) is not None
    update = affine_update(moments, options.weights, options.ridge, has_bias=has_bias)
    changes = {"weight": update.scale} | ({"bias": update.bias} if has_bias else {})
    return {
        names[key]: _moved(_own(module)[key], change, options) for key, change in changes.items()
    }


def fit_biases(
    pairs: Pairs,
    level: Sequence[str],
    stored_as: Mapping[str, str],
    options_of: AffineOptionsOf,
    *,
    of_block: bool,
) -> dict[str, Tensor]:
    """Fit the biases of Linears that run after each other and have fitted weights.

    `of_block`: their outputs are added to the block's, whose mean difference the bias removes.
    """
    texts = list(pairs)
    state = texts[0][0].merged
    names = {path: stored_as.get(f"{state.path}.{path}.bias", "") for path in level}
    asked = {p: made for p, name in names.items() if name and (made := options_of(name))}
    paths = list(asked)
    if not paths:
        return {}

    def outputs(state: BatchState) -> dict[str, Tensor]:
        if of_block:
            return dict.fromkeys(paths, state.run())
        return {path: y for path, (*_, y) in _reached(state, paths).items()}

    def sums(pair: StatePair) -> list[InputSum]:
        wanted, made = outputs(pair.own), outputs(pair.merged)
        rows = [
            _rows(wanted[p], pair.own, n) - _rows(made[p], pair.merged, n)
            for p in paths
            if (n := made[p].shape[-1])
        ]
        return [_summed(torch.zeros_like(one), one) for one in rows]

    try:
        each = [list(zip(*map(sums, own), strict=True)) for own in texts]
    except OutOfStepError:
        return {}
    found = {}
    for number, (path, options) in enumerate(asked.items()):
        moments = [_mean(parts[number]) for parts in each]
        update = affine_update(moments, options.weights, options.ridge, has_bias=True)
        bias = _own(state.block.get_submodule(path))["bias"]
        found[names[path]] = _moved(bias, update.bias, options)
    return found


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in module.named_parameters() if name in ("weight", "bias")}


def _moved(now: Tensor, change: Tensor, options: AffineOptions) -> Tensor:
    return (now.detach().to(change.dtype) + change).to(options.dtype).cpu()


def _rows(y: Tensor, state: BatchState, n: int) -> Tensor:
    """The rows of n entries of the tokens that are not padding; a token may have several."""
    mask = state.batch.attention_mask
    is_flat = y.dim() == 2 and len(y) == mask.numel()
    if y.shape[-1] != n or not (is_flat or y.shape[:2] == mask.shape):
        raise OutOfStepError
    kept = y.detach().reshape(mask.numel(), -1, n)[mask.flatten().bool().to(y.device)]
    return kept.reshape(-1, n)


def _summed(x: Tensor, missing: Tensor) -> InputSum:
    """Sums of x^2, x, d x and d over the rows, (4, n); d is `missing`."""
    total = x.new_zeros((4, x.shape[1]), dtype=widest_float(x.device))
    with torch_threads(1):
        for start in range(0, len(x), ROWS_AT_ONCE):
            rows, d = (one[start : start + ROWS_AT_ONCE].to(total.dtype) for one in (x, missing))
            parts = (rows.square(), rows, d * rows, d)
            total += torch.stack([part.sum(dim=0) for part in parts])
    return InputSum(total, len(x))


def _mean(sums: Iterable[InputSum]) -> AffineMoments:
    first, *others = sums
    for one in others:
        first += one
    return AffineMoments(*first.mean())
