"""Task vectors of one expert: their size, and a LoRA adapter that approximates them.

In an adapter, matrices of the blocks become low-rank updates. All other tensors that differ from
the base (norms, biases, embeddings, head) are stored whole, so that only the rank is lost.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.lora import BASE_LAYER, EMBEDDING, LINEAR, PREFIX
from lewis_hub.checkpoint.reader import Checkpoint, Reader, read_tensor
from lewis_hub.display import Advance
from lewis_hub.errors import MergeError, NonFiniteError
from lewis_hub.hub.source import ADAPTERS
from lewis_hub.kernels.calls import Floats
from lewis_hub.merge.adapted_model import HEAD, AdaptedModel
from lewis_hub.merge.adapter_settings import Form, LoraSettings, is_embedding
from lewis_hub.merge.quantised import read_floats
from lewis_hub.merge.runners import Runner
from lewis_hub.methods.numerics import torch_threads

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE = 1 << 18  # elements that are read together
WEIGHT, BIAS = ".weight", ".bias"
OVERSAMPLED = 10  # directions that are iterated in addition to those that are kept
N_ROUNDS = 6  # of the iteration; each sharpens the gap between singular values
SEED = 0
FIRST_RANK = 8
MAX_SQUARES = 1e30  # of the entries of a matrix together; float32 ends at 3e38


def relative_changes(
    base: tuple[Checkpoint, Reader],
    expert: tuple[Checkpoint, Reader],
    tensors: Sequence[str],
    runner: Runner,
    advance: Advance,
) -> dict[str, float]:
    """Return ‖expert - base‖ / ‖base‖ of each tensor, by the Frobenius norm.

    A tensor that the expert lacks counts as the base's. Entries that are not finite are ignored, as
    the merge refuses or replaces them. If the base is zero and the expert is not, the ratio is 1.
    `advance` is called with the number of elements done.
    """

    def change(name: str) -> tuple[float, int]:
        of_base, of_expert = base[0].tensors[name], expert[0].tensors.get(name)
        if of_expert is None or of_base.dtype not in MERGEABLE:
            return 0.0, of_base.n_elements
        difference = norm = 0.0
        for first in range(0, of_base.n_elements, PIECE):
            n = min(PIECE, of_base.n_elements - first)
            before = read_floats(base[1], of_base, first, n)
            after = read_floats(expert[1], of_expert, first, n)
            difference += _square_sum(after - before)
            norm += _square_sum(before)
        return sqrt(difference / norm) if norm else float(difference > 0), of_base.n_elements

    found = {}
    for name, (value, n_elements) in zip(tensors, runner.map(change, tensors), strict=True):
        found[name] = value
        advance(n_elements)
    return found


def _square_sum(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(np.square(finite, dtype=np.float64).sum())


@dataclass(frozen=True)
class Fit:
    """The rank of a low-rank update, and its error as a share of the task vector's norm."""

    rank: int
    error: float


@dataclass(frozen=True)
class Extracted:
    """An adapter on disk."""

    fits: Mapping[str, Fit]  # module -> its low-rank update
    whole: tuple[str, ...]  # tensors that are stored whole
    n_bytes: int  # of the adapter's weights
    files: tuple[str, ...] = ADAPTERS
    left_out: tuple[str, ...] = ()  # tensors that differ and are not stored


def extract(
    base: tuple[Checkpoint, Reader],
    expert: tuple[Checkpoint, Reader],
    settings: LoraSettings,
    output: Path,
    advance: Advance,
    model: AdaptedModel,
) -> Extracted:
    """Write `adapter_model.safetensors` and `adapter_config.json` into a folder; imports torch.

    Both checkpoints have the names of the loaded `model`. `advance` is called with the number of
    elements done. Embeddings that are stored whole are stored as their tied head too: PEFT would
    change the embeddings alone.

    Raises:
        MergeError: the models are equal, or an adapter cannot store their difference.
        NonFiniteError: a task vector holds NaN or infinity.
    """
    import torch

    from lewis_hub.calibration.grams import write_tensors

    whole_dtypes = defaultdict(lambda: torch.bfloat16, F32=torch.float32, F16=torch.float16)
    factor_dtypes = defaultdict(lambda: torch.bfloat16, F32=torch.float32)  # float16 overflows
    found = _Updates()
    for name, header in base[0].tensors.items():
        if header.dtype in MERGEABLE:
            change, theirs = _change(name, base, expert)
            form = _form(header, base[0], settings, model) if change.any() else None
            if form == "low-rank":
                most = settings.most or min(change.shape)
                of = (name, expert[0].label)
                dtype = factor_dtypes[expert[0].tensors[name].dtype]
                found.add_factors(header, fitted(change, most, settings.error, dtype, of))
            elif form == "whole":
                dtype = whole_dtypes[expert[0].tensors[name].dtype]
                found.held[f"{PREFIX}{name}"] = theirs.to(dtype)
                found.whole.append(name)
            elif form:
                found.left_out.append(name)
            advance(header.n_elements)
    found.require_any(expert[0].label)
    held, fits, whole = _with_bias_of_base_layer(found.held, found.fits), found.fits, found.whole
    configuration, weights = ADAPTERS
    heads = {model.heads[name]: name for name in whole if name in model.heads}
    held |= {f"{PREFIX}{head}": held[f"{PREFIX}{name}"].clone() for head, name in heads.items()}
    config = adapter_config(base[0], fits, [*whole, *heads], model.task)
    if _is_tied(held, whole):
        config["ensure_weight_tying"] = True
    write_tensors(held, output / weights, {"format": "pt"})
    (output / configuration).write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n"
    )
    n_bytes = (output / weights).stat().st_size
    return Extracted(fits, tuple(whole), n_bytes, left_out=tuple(found.left_out))


@dataclass
class _Updates:
    """What an adapter stores, by the names of its file, and how."""

    held: dict[str, Tensor] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)  # of modules
    whole: list[str] = field(default_factory=list)  # tensors
    left_out: list[str] = field(default_factory=list)  # tensors that differ

    def add_factors(self, header: TensorHeader, found: LowRankFactors) -> None:
        """Add the low-rank update of a matrix."""
        module = names.module(header.name)
        self.held |= stored_factors(module, found.left, found.right, embeds=is_embedding(header))
        self.fits[module] = Fit(found.rank, found.error)

    def require_any(self, label: str) -> None:
        """Refuse an empty adapter."""
        if self.held:
            return
        if self.left_out:
            problem = f"`include` and `exclude` leave out all {len(self.left_out)} tensors that "
            remedy = f"They are searched in names such as {names.module(self.left_out[0])}."
            raise MergeError(label, f"{problem}differ", remedy)
        problem = "it is equal to the base, so there is nothing to extract"
        raise MergeError(label, problem, "Name the fine-tuned model and its base.")


def _change(
    name: str, base: tuple[Checkpoint, Reader], expert: tuple[Checkpoint, Reader]
) -> tuple[Tensor, Tensor]:
    """The task vector of a tensor, and the expert's values, in float32."""
    theirs = read_tensor(expert[1], expert[0].tensors[name])
    change = theirs - read_tensor(base[1], base[0].tensors[name])
    if not change.isfinite().all():
        remedy = "That model is broken: use another revision of it."
        raise NonFiniteError(name, expert[0].label, remedy)
    return change, theirs


def _with_bias_of_base_layer(
    held: Mapping[str, Tensor], adapted: Collection[str]
) -> dict[str, Tensor]:
    """Name the biases of adapted modules as PEFT does, which looks for them nowhere else."""
    moved = {f"{PREFIX}{one}{BIAS}": f"{PREFIX}{one}{BASE_LAYER}bias" for one in adapted}
    return {moved.get(name, name): tensor for name, tensor in held.items()}


def _form(
    tensor: TensorHeader, base: Checkpoint, settings: LoraSettings, model: AdaptedModel
) -> Form:
    if settings.form(tensor, is_matrix=False) == "left out":
        return "left out"  # also if PEFT could not store it
    if problem := model.unfit.get(tensor.name):
        remedy = f"Leave it out: `exclude` {names.kind(tensor.name)}."
        raise MergeError(base.label, f"{tensor.name} {problem}", remedy)
    is_linear = model.linears is None or names.module(tensor.name) in model.linears
    return settings.form(tensor, is_matrix=_is_update(tensor, base) and is_linear)


def _is_tied(held: Mapping[str, Tensor], whole: Sequence[str]) -> bool:
    """Whether a head that is stored whole is equal to embeddings that are."""
    head, tables = held.get(f"{PREFIX}{HEAD}"), filter(names.is_token_embedding, whole)
    return head is not None and any(head.equal(held[f"{PREFIX}{name}"]) for name in tables)


def stored_factors(module: str, left: Tensor, right: Tensor, *, embeds: bool) -> dict[str, Tensor]:
    """The tensors of an adapter's file for the update `left @ right` of a module's weight.

    PEFT stores the factors of an embedding as those of the transposed table.
    """
    if embeds:
        a, b = left.T.contiguous(), right.T.contiguous()
        return {f"{PREFIX}{module}.{EMBEDDING[0]}": a, f"{PREFIX}{module}.{EMBEDDING[1]}": b}
    a, b = right.contiguous(), left.contiguous()
    return {f"{PREFIX}{module}.{LINEAR[0]}.weight": a, f"{PREFIX}{module}.{LINEAR[1]}.weight": b}


def _is_update(tensor: TensorHeader, base: Checkpoint) -> bool:
    """Whether a tensor can be a low-rank update: a matrix of a block, (out, in) as in a Linear.

    A MergeError is raised if PEFT has no adapter for it.
    """
    shape = f"{tensor.name} of shape {list(tensor.shape)}"
    remedy = "Publish the whole model instead."
    if names.block(tensor.name) is None:
        return False
    if not tensor.name.endswith(WEIGHT):
        if len(tensor.shape) > 1:
            raise MergeError(base.label, f"{shape} is no module's weight", remedy)
        return False
    if len(tensor.shape) > 2:
        problem = f"{shape} is no matrix, and an adapter changes matrices"
        raise MergeError(base.label, problem, remedy)
    bias = base.tensors.get(f"{names.module(tensor.name)}{BIAS}")
    if len(tensor.shape) == 2 and bias and bias.shape != tensor.shape[:1]:
        problem = f"{tensor.name} lies as (in, out), as GPT-2's do"
        raise MergeError(base.label, problem, "Only models of Linear modules can be extracted.")
    return len(tensor.shape) == 2


def adapter_config(
    base: Checkpoint, fits: Mapping[str, Fit], whole: Sequence[str], task: str | None
) -> dict[str, Any]:
    """PEFT's configuration. Alpha equals the rank everywhere, so that no factor is scaled."""
    highest = max((fit.rank for fit in fits.values()), default=1)
    thinner = {module: fit.rank for module, fit in fits.items() if fit.rank != highest}
    kept = [name for name in whole if not name.endswith(BIAS)]
    name, _, revision = base.label.partition("@")
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": thinner,
        "alpha_pattern": thinner,
        "target_modules": _targets(base, fits),
        "modules_to_save": sorted({names.module(name) for name in kept}) or None,
        "bias": "all" if len(kept) < len(whole) else "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _targets(base: Checkpoint, fits: Collection[str]) -> list[str]:
    """PEFT's names of the modules: the last part, or the whole name if others end so too."""
    modules = {names.module(name) for name, tensor in base.tensors.items() if len(tensor.shape) > 1}
    ends = {module.rpartition(".")[2] for module in modules - {*fits}}
    found = ((module, module.rpartition(".")[2]) for module in fits)
    return sorted({module if end in ends else end for module, end in found})


@dataclass(frozen=True)
class LowRankFactors:
    """Two thin matrices whose product approximates a matrix, in the dtype of the file."""

    left: Tensor  # (rows, rank)
    right: Tensor  # (rank, columns)
    error: float  # Frobenius norm of the difference, as a share of the matrix's

    @property
    def rank(self) -> int:
        """The number of columns of `left`."""
        return int(self.left.shape[1])


class SingularVectors(NamedTuple):
    """The first singular vectors and values of a matrix."""

    left: Tensor  # (rows, rank)
    values: Tensor  # (rank,)
    right: Tensor  # (rank, columns)


def fitted(
    matrix: Tensor, most: int, error: float, dtype: torch.dtype, of: tuple[str, str]
) -> LowRankFactors:
    """Approximate the update `of` a tensor in a source, as `fit` does.

    Raises:
        MergeError: its values are so large that products of them exceed float32.
    """
    if not float(matrix.double().square().sum()) < MAX_SQUARES:
        tensor, source = of
        problem = f"the values of {tensor} are too large for a low-rank update"
        raise MergeError(source, problem, "It is broken: use another revision of it.")
    return fit(matrix, most, error, dtype)


def fit(matrix: Tensor, most: int, error: float, dtype: torch.dtype) -> LowRankFactors:
    """Approximate a float32 matrix, not zero, by two thin ones of the lowest rank within an error.

    With error 0 the rank is the highest. If rounding to `dtype` alone exceeds the error, the
    factors are float32.
    """
    limit = min(most, *matrix.shape)
    rank = min(limit, FIRST_RANK) if error else limit
    with torch_threads(1):
        total = float(matrix.double().square().sum())
        while True:
            leading = _leading(matrix, rank)
            found = _lowest(matrix, leading, error, dtype, total) if error else None
            if found or rank == limit:
                return found or _factors(matrix, leading, rank, dtype=dtype, total=total)
            rank = min(limit, 2 * rank)


def _lowest(
    matrix: Tensor, leading: SingularVectors, error: float, dtype: torch.dtype, total: float
) -> LowRankFactors | None:
    """The lowest rank within an error; None if it takes more than the leading vectors."""
    import torch

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
    """It grows with the rank, as far as rounding allows."""
    return -tried(rank).error


def _factors(
    matrix: Tensor, leading: SingularVectors, rank: int, *, dtype: torch.dtype, total: float
) -> LowRankFactors:
    root = leading.values[:rank].sqrt()
    left = (leading.left[:, :rank] * root).to(dtype)
    right = (root[:, None] * leading.right[:rank]).to(dtype)
    missed = (matrix - left.float() @ right.float()).double().square().sum()
    return LowRankFactors(left, right, float((missed / total).sqrt()))


def _leading(matrix: Tensor, rank: int) -> SingularVectors:
    """The first singular vectors; by randomised subspace iteration if that is faster."""
    import torch

    n_directions = min(rank + OVERSAMPLED, *matrix.shape)
    if 2 * n_directions >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return SingularVectors(left[:, :rank], values[:rank], right[:rank])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        left, values, columns = torch.svd_lowrank(matrix, n_directions, N_ROUNDS)
    return SingularVectors(left[:, :rank], values[:rank], columns.T[:rank])
