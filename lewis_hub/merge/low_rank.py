"""Merge LoRA adapters of one base into one adapter, module by module and without the base.

The update of a module is B @ A times a factor. A method that adds updates, each times a number,
puts their ranks side by side, which is exact. Other methods drop or select entries: they merge the
matrices of one module, and the result is cut to a rank by singular values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.calibration.grams import write_tensors
from lewis_hub.checkpoint.header import LowRank, TensorHeader, torch_dtypes
from lewis_hub.checkpoint.lora import EMBEDDING, adapted_module
from lewis_hub.checkpoint.reader import Checkpoint, Reader, read_tensor
from lewis_hub.checkpoint.writer import OutputTensor
from lewis_hub.display import Advance, size
from lewis_hub.errors import MERGE, MergeError, NonFiniteError
from lewis_hub.hub.source import ADAPTERS
from lewis_hub.merge.plan import MergePlan, Moments, ShardPlan, TensorPlan
from lewis_hub.merge.task_vectors import Extracted, Fit, adapter_config, fitted, stored_factors
from lewis_hub.methods import registry
from lewis_hub.methods.numerics import product
from lewis_hub.system import memory_bytes

if TYPE_CHECKING:
    from torch import Tensor

SUMS = frozenset({"linear", "task_arithmetic"})  # an update of the merge is a sum of updates
MATRICES = 16  # of the largest module in float32, while entries are selected and cut to a rank
FROM_BASE = "Merge the adapters on their base instead: `lewis-hub merge` takes this recipe."


@dataclass(frozen=True)
class MergedUpdate:
    """The low-rank update of one module, left @ right, in float32.

    It has the shape of the module's weight, (out, in), also where that is stored as (in, out); an
    embedding's has that of the table.
    """

    tensor: str  # of the base
    module: str  # as PEFT calls it
    left: Tensor
    right: Tensor
    error: float  # Frobenius norm of what was cut off, as a share of the merged update's
    is_embedding: bool  # whether PEFT has factors of an embedding for the module
    is_transposed: bool  # whether a Linear's weight is stored as (in, out)


@dataclass(frozen=True)
class Truncation:
    """How far an update is cut down."""

    most: (
        int | None
    )  # highest rank of a module; None: the adapters' ranks, or with `error` no limit
    error: float  # highest relative error; 0: the highest rank


def require_low_rank(plan: MergePlan) -> None:
    """Refuse, by headers alone, a merge whose result is no low-rank update.

    Raises:
        MergeError: a source is no adapter, an adapter stores whole tensors or DoRA's magnitudes, or
            the method takes no task vectors.
    """
    method = registry.find(plan.shards[0].method)
    if not (method.name in SUMS or method.takes_task_vectors):
        problem = "its result is no sum of updates of the base"
        remedy = "Use `linear`, `task_arithmetic`, `ties`, `dare_linear` or `dare_ties`."
        raise MergeError(f"method `{method.name}`", problem, remedy)
    for shard in plan.shards:
        for number, base in enumerate(shard.bases):
            if base is None and number != _base_number(shard):
                problem = "it is a whole model, and only LoRA adapters make an adapter"
                raise MergeError(shard.labels[number], problem, FROM_BASE)
        for tensor in shard.tensors:
            _require_updates(shard, tensor)


def _base_number(shard: ShardPlan) -> int | None:
    """The number of the base among the sources; None for a method without a base."""
    return 0 if registry.find(shard.method).takes_base else None


def _require_updates(shard: ShardPlan, tensor: TensorPlan) -> None:
    if shard.method == "linear" and not tensor.options.get("normalize"):
        problem = "the weights do not add up to 1, so the base would be multiplied too"
        remedy = "Remove `normalize: false`, or use `task_arithmetic`."
        raise MergeError("parameter `normalize`", problem, remedy)
    for number, header in zip(tensor.sources, tensor.inputs, strict=True):
        label, change = shard.labels[number], header.adapted
        if change and change.saved:
            problem = f"it stores {header.name} whole, so its update depends on the base"
            raise MergeError(label, problem, FROM_BASE)
        if change and change.update and change.update.magnitude:
            problem = f"it is a DoRA: the update of {header.name} depends on the base"
            raise MergeError(label, problem, FROM_BASE)


def require_memory(plan: MergePlan, cut: Truncation) -> None:
    """Refuse a merge of whole matrices for which the machine has not enough memory.

    Raises:
        MergeError: it names the largest matrix.
    """
    if plan.shards[0].method in SUMS and not (cut.most or cut.error):
        return  # the factors alone are held
    changed = [
        (tensor.output.n_elements, tensor.output.name)
        for shard in plan.shards
        for tensor in shard.tensors
        if any(_update(header) for header in tensor.inputs)
    ]
    n_elements, name = max(changed, default=(0, ""))
    needed, at_hand = MATRICES * 4 * n_elements, memory_bytes()
    if at_hand and needed > at_hand:
        problem = f"its update takes up to {size(needed)} of memory, and this machine has "
        raise MergeError(name, f"{problem}{size(at_hand)}", FROM_BASE)


def merge_updates(
    plan: MergePlan, open_source: Callable[[str], Reader], cut: Truncation, advance: Advance
) -> Iterator[MergedUpdate]:
    """Merge the updates of all modules that an adapter changes; imports torch.

    `open_source` returns the reader of an adapter's own file, by the adapter's label. `advance` is
    called with the number of tensors done.

    Raises:
        NonFiniteError: an adapter or the result holds NaN or infinity.
    """
    for shard in plan.shards:
        sources = zip(shard.labels, shard.bases, strict=True)
        readers = {label: open_source(label) for label, base in sources if base}
        for tensor in shard.tensors:
            if any(_update(header) for header in tensor.inputs):
                yield _merged(shard, tensor, readers, cut)
            advance(1)


def _update(header: TensorHeader) -> LowRank | None:
    return header.adapted.update if header.adapted else None


def _merged(
    shard: ShardPlan, tensor: TensorPlan, readers: Mapping[str, Reader], cut: Truncation
) -> MergedUpdate:
    n_experts = len(tensor.weights)
    factors = [
        _factors(readers, shard.labels[number], update) if (update := _update(header)) else None
        for number, header in zip(tensor.sources, tensor.inputs, strict=True)
    ][-n_experts:]
    n_ranks, error = sum(one[0].shape[1] for one in factors if one), 0.0
    most = cut.most or (min(tensor.output.shape) if cut.error else n_ranks)
    if shard.method in SUMS:
        left, right = _side_by_side(shard, tensor, factors)
        if most < n_ranks or cut.error:
            left, right, error = _cut(left @ right, most, cut.error, tensor.output.name)
    else:
        merged = _by_entries(shard, tensor, factors)
        left, right, error = _cut(merged, most, cut.error, tensor.output.name)
    factor = next(update.a for header in tensor.inputs if (update := _update(header)))
    embeds, flips = factor.name.endswith(EMBEDDING[0]), _is_transposed(tensor)
    if embeds:
        left, right, flips = right.T, left.T, False
    of = (tensor.output.name, adapted_module(factor))
    return MergedUpdate(*of, left, right, error, is_embedding=embeds, is_transposed=flips)


def _is_transposed(tensor: TensorPlan) -> bool:
    return any(update.transposed for header in tensor.inputs if (update := _update(header)))


Factors = tuple["Tensor", "Tensor"]  # B times the adapter's factor, and A


def _factors(readers: Mapping[str, Reader], label: str, update: LowRank) -> Factors:
    left, right = (read_tensor(readers[label], part) for part in (update.b, update.a))
    left = update.scale * left
    for part, values in ((update.b, left), (update.a, right)):
        if not values.isfinite().all():
            raise NonFiniteError(part.name, label, "Use another revision of it, or leave it out.")
    return left, right


def _side_by_side(
    shard: ShardPlan, tensor: TensorPlan, factors: Sequence[Factors | None]
) -> Factors:
    """The sum of updates, each times the number that the method multiplies it with."""
    import torch

    numbers = _coefficients(shard, tensor)
    parts = [(number, *one) for number, one in zip(numbers, factors, strict=True) if one]
    left = torch.cat([number * b for number, b, _ in parts], dim=1)
    return left, torch.cat([a for _, _, a in parts], dim=0)


def _coefficients(shard: ShardPlan, tensor: TensorPlan) -> list[float]:
    """What a linear method multiplies each update with: its result on unit vectors."""
    import torch

    n_experts = len(tensor.weights)
    units = torch.eye(n_experts)
    output = OutputTensor(tensor.output.name, "F32", (n_experts,))
    base = [torch.zeros(n_experts)] * (len(tensor.inputs) - n_experts)
    return _defined(shard, tensor, output, [*base, *units]).tolist()


def _by_entries(shard: ShardPlan, tensor: TensorPlan, factors: Sequence[Factors | None]) -> Tensor:
    """The merge of the updates as matrices, which the method sees as the base stores them."""
    import torch

    transposed = _is_transposed(tensor)
    empty = torch.zeros(tensor.output.shape)
    matrices = [product(*one) if one else None for one in factors]
    oriented = [
        empty if one is None else one.T.contiguous() if transposed else one for one in matrices
    ]
    output = replace(tensor.output, dtype="F32")
    base = [empty] * (len(tensor.inputs) - len(factors))
    merged = _defined(shard, tensor, output, [*base, *oriented])
    return merged.T.contiguous() if transposed else merged


def _defined(
    shard: ShardPlan, tensor: TensorPlan, output: OutputTensor, sources: Sequence[Tensor]
) -> Tensor:
    from lewis_hub.merge.tensor import merge_by_definition

    moments = Moments([None] * len(tensor.weights))
    return merge_by_definition(shard, replace(tensor, output=output), sources, moments)


def _cut(merged: Tensor, most: int, error: float, name: str) -> tuple[Tensor, Tensor, float]:
    import torch

    if not merged.any():
        return merged[:, :1].clone(), merged[:1].clone(), 0.0
    found = fitted(merged, most, error, torch.float32, (name, MERGE))
    return found.left, found.right, found.error


def write_adapter(
    updates: Iterable[MergedUpdate],
    base: Checkpoint,
    dtype: str,
    folder: Path,
    task: str | None,
) -> Extracted:
    """Write updates of a base, which does the `task`, as an adapter in PEFT's format.

    `dtype` is as safetensors writes it. Rounding to it is not part of the errors.

    Raises:
        MergeError: there is no update.
        NonFiniteError: a value does not fit into the dtype.
    """
    held: dict[str, Tensor] = {}
    fits: dict[str, Fit] = {}
    is_transposed = False
    kind = torch_dtypes()[dtype]
    for update in updates:
        left, right = update.left.to(kind), update.right.to(kind)
        if not (left.isfinite().all() and right.isfinite().all()):
            remedy = f"It does not fit into {dtype}: choose another `dtype`, or lower the weights."
            raise NonFiniteError(update.tensor, MERGE, remedy)
        held |= stored_factors(update.module, left, right, embeds=update.is_embedding)
        fits[update.module] = Fit(left.shape[1], update.error)
        is_transposed = is_transposed or update.is_transposed
    if not held:
        raise MergeError("models", "no adapter changes a module", "Use intact adapters.")
    settings, weights = ADAPTERS
    write_tensors(held, folder / weights)
    config = adapter_config(base, fits, (), task) | {"fan_in_fan_out": is_transposed}
    (folder / settings).write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n"
    )
    return Extracted(fits, (), (folder / weights).stat().st_size)
