"""A method that has no fused kernel: its definition, on whole tensors. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.header import torch_dtypes
from lewis_hub.errors import MERGE, NonFiniteError
from lewis_hub.merge.plan import ShardPlan, TensorPlan
from lewis_hub.methods import registry
from lewis_hub.methods.registry import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Of a matrix's inputs, on the device that the matrix is merged on.

    Attributes:
        grams: E[x x^T], one an expert; None where there are none.
        cross_covariances: E[z x^T], z being the input in the expert; empty: z is x.
        transposed: whether the matrix is stored as (in, out).
        residual_covariances: E[d x^T], d being what the output has to compensate; empty: d is 0.
    """

    grams: Sequence[Tensor | None]
    cross_covariances: Sequence[Tensor | None] = ()
    transposed: bool = False
    residual_covariances: Sequence[Tensor | None] = ()


def merge_by_definition(
    plan: ShardPlan, tensor: TensorPlan, sources: Sequence[Tensor], moments: Moments
) -> Tensor:
    """Merge one tensor with the method's own function, on the device that its sources are on.

    Args:
        plan: of the shard that the tensor is in.
        tensor: of it.
        sources: in float32, one an input of the tensor.
        moments: of its inputs.

    Returns:
        The result in the output's dtype, contiguous, on the same device.

    Raises:
        NonFiniteError: a source or the result holds NaN or infinity.
    """
    import torch

    method = registry.find(plan.method)
    for number, source in zip(tensor.sources, sources, strict=True):
        if not source.isfinite().all():
            raise broken_source(tensor.output.name, plan.labels[number])
    given: dict[str, Any] = {
        "weights": torch.tensor(tensor.weights, dtype=torch.float32, device=sources[0].device),
        "densities": tensor.densities,
        "streams": tensor.streams,
        "grams": moments.grams,
        "cross_covariances": moments.cross_covariances,
        "transposed": moments.transposed,
        "residual_covariances": moments.residual_covariances,
        **tensor.own,
    }
    keywords = {key: value for key, value in given.items() if method.takes(key)}
    keywords |= {method.keyword(option): value for option, value in tensor.options.items()}
    merged = method.function(*_arguments(method, sources, len(tensor.weights)), **keywords)
    rounded = merged.to(torch_dtypes()[tensor.output.dtype]).contiguous()
    if not rounded.isfinite().all():
        remedy = f"It does not fit into {tensor.output.dtype}: lower the weights."
        raise NonFiniteError(tensor.output.name, MERGE, remedy)
    return rounded


def broken_source(tensor: str, source: str) -> NonFiniteError:
    """What is said of a source that holds NaN or infinity."""
    remedy = "Use another revision of that model, leave it out, or carry on with `--allow-nan`."
    return NonFiniteError(tensor, source, remedy)


def bytes_of(merged: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in the host's memory, as a file has them."""
    import torch

    return merged.flatten().view(torch.uint8).numpy().data


def _arguments(method: Method, sources: Sequence[Tensor], n_experts: int) -> tuple[Tensor, ...]:
    """What the function takes before its keywords; the base is zero where there is none."""
    import torch

    experts = torch.stack(tuple(sources[len(sources) - n_experts :]))
    if not method.takes_base:
        return (experts,)
    base = sources[0] if len(sources) > n_experts else torch.zeros_like(sources[0])
    return base, experts - base if method.takes_task_vectors else experts
