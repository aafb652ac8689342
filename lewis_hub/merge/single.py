"""Single tensors of a plan, in memory: in any order, and with moments that were just taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.layout import ShardLayout
from lewis_hub.checkpoint.reader import Reader
from lewis_hub.merge.assembled import assembling
from lewis_hub.merge.definition import Moments, merge_by_definition
from lewis_hub.merge.engine import open_source
from lewis_hub.merge.held import HeldShard
from lewis_hub.merge.mending import MendingReader, mending
from lewis_hub.merge.plan import ShardPlan, TensorPlan
from lewis_hub.merge.runners import Inline

if TYPE_CHECKING:
    from torch import Tensor

    from lewis_hub.merge.pieces import Desks

Single = Callable[[str, Moments | None], "Tensor"]


@contextmanager
def singly(
    plan: ShardPlan, reader: Callable[[str], Reader], mended: set[tuple[str, str]]
) -> Iterator[Single]:
    """Make tensors of a shard one by one, in any order; the sources are open meanwhile.

    Args:
        plan: of the shard.
        reader: opens the files of a label.
        mended: takes the label of each source that holds NaN or infinity, and the tensor; of those
            that are made with moments.

    Yields:
        What makes a tensor by its name, in the output's dtype: with the moments of its inputs where
        they are, or without, on the CPU.
    """
    from lewis_hub.merge.pieces import Desks  # imports llvmlite

    tensors = {tensor.output.name: tensor for tensor in plan.tensors}
    with ExitStack() as opened:
        pairs = zip(plan.labels, plan.bases, strict=True)
        own = [opened.enter_context(open_source(label, base, reader)) for label, base in pairs]
        readers = assembling(plan, own)
        desks = Desks(max(len(tensor.inputs) for tensor in plan.tensors))

        def make(name: str, moments: Moments | None) -> Tensor:
            tensor = tensors[name]
            if moments is None or tensor.is_copied:
                return _alone(plan, readers, desks, tensor)
            found = tuple(readers[number] for number in tensor.sources)
            if plan.allow_nan:
                found = mending(tensor, found)
            sources = [r.tensor(h) for r, h in zip(found, tensor.inputs, strict=True)]
            mended.update(
                (plan.labels[number], name)
                for number, one in zip(tensor.sources, found, strict=True)
                if isinstance(one, MendingReader) and one.has_mended
            )
            known = next(gram for gram in moments.grams if gram is not None)
            there = [source.to(known.device) for source in sources]
            return merge_by_definition(plan, tensor, there, moments)

        yield make


def _alone(plan: ShardPlan, readers: Sequence[Reader], desks: Desks, tensor: TensorPlan) -> Tensor:
    """Make a tensor as a shard of its own, as the engine does."""
    from lewis_hub.merge.pieces import Job, Site
    from lewis_hub.merge.tensors import make_tensor

    layout = ShardLayout(tensor.output.name, (tensor.output,))
    held = HeldShard(layout)
    make_tensor(Job(Site(plan, readers, held, desks), tensor, *layout.starts), Inline())
    return held.tensors()[tensor.output.name]
