"""A fine-tuned model and its base to a LoRA adapter, in the form that PEFT reads.

Matrices of the blocks become low-rank updates; what else differs (norms, biases, embeddings, head)
is kept whole, so that nothing of the expert is lost but the rank that was left out.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.lora import PREFIX
from lewis_hub.checkpoint.reader import Checkpoint, Reader, read_tensor
from lewis_hub.errors import MergeError, NonFiniteError
from lewis_hub.hub.source import ADAPTERS
from lewis_hub.progress import Advance

WEIGHT, BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class Fit:
    """How thin the update of a module became, and what it misses of the task vector."""

    rank: int
    error: float  # Frobenius norm of what is missed, as a share of the task vector's


@dataclass(frozen=True)
class Extracted:
    """An adapter on disk.

    Attributes:
        fits: module -> its low-rank update.
        whole: tensors that are kept whole, because they differ and are no matrix of a block.
        n_bytes: of the adapter's weights.
        files: their names.
    """

    fits: Mapping[str, Fit]
    whole: tuple[str, ...]
    n_bytes: int
    files: tuple[str, ...] = ADAPTERS


def extract(
    base: tuple[Checkpoint, Reader],
    expert: tuple[Checkpoint, Reader],
    most: int | None,
    error: float,
    output: Path,
    advance: Advance,
) -> Extracted:
    """Write `adapter_model.safetensors` and `adapter_config.json` into a folder.

    Args:
        base: headers and reader.
        expert: the same of the fine-tuned model; its tensors fit the base's.
        most: highest rank of an update; None: as high as it takes.
        error: per module, the lowest rank within this error is taken; 0 takes the highest rank.
        output: exists.
        advance: called with the number of elements that were looked at.

    Raises:
        MergeError: the models are equal, or differ in what no adapter can say.
        NonFiniteError: a task vector holds NaN or infinity.
    """
    import torch
    from safetensors.torch import save_file

    held: dict[str, Tensor] = {}
    fits: dict[str, Fit] = {}
    whole: list[str] = []
    kept_as = defaultdict(lambda: torch.bfloat16, F32=torch.float32, F16=torch.float16)
    factors_as = defaultdict(lambda: torch.bfloat16, F32=torch.float32)  # float16 ends too soon
    for name, header in base[0].tensors.items():
        if header.dtype in MERGEABLE:
            their_header = expert[0].tensors[name]
            ours, theirs = read_tensor(base[1], header), read_tensor(expert[1], their_header)
            change = theirs - ours
            if not change.isfinite().all():
                remedy = "That model is broken: use another revision of it."
                raise NonFiniteError(name, expert[0].label, remedy)
            if change.any() and _is_update(header, base[0]):
                module, dtype = names.module(name), factors_as[their_header.dtype]
                fits[module] = _put_update(held, module, change, most, error, dtype)
            elif change.any():
                held[f"{PREFIX}{name}"] = theirs.to(kept_as[their_header.dtype])
                whole.append(name)
            advance(header.n_elements)
    if not held:
        problem = "it is equal to the base, so there is nothing to extract"
        raise MergeError(expert[0].label, problem, "Name the fine-tuned model and its base.")
    settings, weights = ADAPTERS
    save_file(held, output / weights, {"format": "pt"})
    config = json.dumps(_config(base[0].label, fits, whole), indent=2) + "\n"
    (output / settings).write_text(config, encoding="utf-8")
    return Extracted(fits, tuple(whole), (output / weights).stat().st_size)


def _is_update(tensor: TensorHeader, base: Checkpoint) -> bool:
    """Whether a tensor can be a low-rank update: a matrix of a block, (out, in) as Linear has it.

    Raises:
        MergeError: it is a stack of matrices, which PEFT's adapters of modules cannot change.
    """
    if names.block(tensor.name) is None or not tensor.name.endswith(WEIGHT):
        if names.block(tensor.name) is not None and len(tensor.shape) > 1:
            problem = f"{tensor.name} of shape {list(tensor.shape)} is no module's weight"
            raise MergeError(base.label, problem, "Publish the whole model instead.")
        return False
    if len(tensor.shape) > 2:
        problem = (
            f"{tensor.name} of shape {list(tensor.shape)} is no matrix, and an adapter changes"
        )
        raise MergeError(base.label, f"{problem} matrices", "Publish the whole model instead.")
    bias = base.tensors.get(f"{names.module(tensor.name)}{BIAS}")
    if len(tensor.shape) == 2 and bias and bias.shape != tensor.shape[:1]:
        problem = f"{tensor.name} lies as (in, out), as GPT-2's do"
        raise MergeError(base.label, problem, "Only models of Linear modules can be extracted.")
    return len(tensor.shape) == 2


def _put_update(
    held: dict[str, Tensor], module: str, change: Tensor, most: int | None, error: float, dtype: Any
) -> Fit:

    found = fit(change, most or min(change.shape), error, dtype)
    held[f"{PREFIX}{module}.lora_A.weight"] = found.right.contiguous()
    held[f"{PREFIX}{module}.lora_B.weight"] = found.left.contiguous()
    return Fit(found.rank, found.error)


def _config(base: str, fits: Mapping[str, Fit], whole: list[str]) -> dict[str, Any]:
    """In PEFT's words; alpha equals the rank everywhere, so that the factors count as they are."""
    highest = max((fit.rank for fit in fits.values()), default=1)
    thinner = {module: fit.rank for module, fit in fits.items() if fit.rank != highest}
    kept = [name for name in whole if not name.endswith(BIAS)]
    name, _, revision = base.partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": thinner,
        "alpha_pattern": thinner,
        "target_modules": sorted({module.rpartition(".")[2] for module in fits}),
        "modules_to_save": sorted({names.module(name) for name in kept}) or None,
        "bias": "all" if len(kept) < len(whole) else "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


OVERSAMPLED = 10  # directions beside those that are kept
N_ROUNDS = 6  # of the iteration; each sharpens the gap between singular values
SEED = 0
FIRST_RANK = 8


@dataclass(frozen=True)
class LowRankFactors:
    """left @ right, and how far that is from the matrix.

    Attributes:
        left: (rows, rank), in the dtype of the file.
        right: (rank, columns), the same.
        error: Frobenius norm of the rest, as a share of the matrix's.
    """

    left: Tensor
    right: Tensor
    error: float

    @property
    def rank(self) -> int:
        """The number of columns of `left`."""
        return int(self.left.shape[1])


class Leading(NamedTuple):
    """The first singular vectors and values."""

    left: Tensor  # (rows, rank)
    values: Tensor  # (rank,)
    right: Tensor  # (rank, columns)


def fit(matrix: Tensor, most: int, error: float, dtype: torch.dtype) -> LowRankFactors:
    """Fit a matrix by two thin ones, rounded to the dtype that they are stored in.

    Args:
        matrix: (rows, columns) float32, not zero.
        most: rank that is never exceeded.
        error: the lowest rank whose error is no more than this is taken; 0 takes the highest.
        dtype: of the factors on disk; float32 where rounding to it would miss more than the error.
    """
    limit = min(most, *matrix.shape)
    rank = min(limit, FIRST_RANK) if error else limit
    total = float(matrix.double().square().sum())
    while True:
        leading = _leading(matrix, rank)
        found = _lowest(matrix, leading, error, dtype, total) if error else None
        if found or rank == limit:
            return found or _factors(matrix, leading, rank, dtype=dtype, total=total)
        rank = min(limit, 2 * rank)


def _lowest(
    matrix: Tensor, leading: Leading, error: float, dtype: torch.dtype, total: float
) -> LowRankFactors | None:
    """The lowest rank within an error, of those whose vectors are known; None: more are needed."""
    squares = leading.values.double().square()
    rest = (1 - squares.cumsum(0) / total).clamp(min=0).sqrt()
    ranks = range(int((rest > error).sum()) + 1, len(squares) + 1)
    for stored in (dtype, torch.float32):
        tried = cache(partial(_factors, matrix, leading, dtype=stored, total=total))
        lowest = bisect_left(ranks, -error, key=partial(_nearness, tried))
        if lowest < len(ranks):
            return tried(ranks[lowest])
    return None


def _nearness(tried: Callable[[int], LowRankFactors], rank: int) -> float:
    """It grows with the rank, as far as rounding lets it."""
    return -tried(rank).error


def _factors(
    matrix: Tensor, leading: Leading, rank: int, *, dtype: torch.dtype, total: float
) -> LowRankFactors:
    root = leading.values[:rank].sqrt()
    left = (leading.left[:, :rank] * root).to(dtype)
    right = (root[:, None] * leading.right[:rank]).to(dtype)
    missed = (matrix - left.float() @ right.float()).double().square().sum()
    return LowRankFactors(left, right, float((missed / total).sqrt()))


def _leading(matrix: Tensor, rank: int) -> Leading:
    n_directions = min(rank + OVERSAMPLED, *matrix.shape)
    if 2 * n_directions >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return Leading(left[:, :rank], values[:rank], right[:rank])
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(matrix.shape[1], n_directions, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(N_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    turned, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Leading((basis @ turned)[:, :rank], values[:rank], right[:rank])
