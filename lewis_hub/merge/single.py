"""Single tensors of a plan, in memory: by the method's definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.reader import Reader
from lewis_hub.merge.assembled import assembling
from lewis_hub.merge.definition import Moments, merge_by_definition
from lewis_hub.merge.engine import open_source
from lewis_hub.merge.mending import MendingReader, mending
from lewis_hub.merge.plan import ShardPlan

if TYPE_CHECKING:
    from torch import Tensor

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
    tensors = {tensor.output.name: tensor for tensor in plan.tensors}
    with ExitStack() as opened:
        pairs = zip(plan.labels, plan.bases, strict=True)
        own = [opened.enter_context(open_source(label, base, reader)) for label, base in pairs]
        readers = assembling(plan, own)

        def make(name: str, moments: Moments | None) -> Tensor:
            tensor = tensors[name]
            found = tuple(readers[number] for number in tensor.sources)
            if plan.allow_nan:
                found = mending(tensor, found)
            sources = [r.tensor(h) for r, h in zip(found, tensor.inputs, strict=True)]
            if tensor.is_copied:
                return sources[0]
            if moments is None:
                unknown = Moments([None] * len(tensor.weights))
                return merge_by_definition(plan, tensor, sources, unknown)
            mended.update(
                (plan.labels[number], name)
                for number, one in zip(tensor.sources, found, strict=True)
                if isinstance(one, MendingReader) and one.has_mended
            )
            known = next(gram for gram in moments.grams if gram is not None)
            there = [source.to(known.device) for source in sources]
            return merge_by_definition(plan, tensor, there, moments)

        yield make
