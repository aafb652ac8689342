"""Changes: how large each expert's task vectors are, from the files alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.checkpoint.window import Need, Window, elsewhere
from lewis_hub.guides.importance import ImportanceProfile, SourceImportance, reusable
from lewis_hub.guides.matrices import block_matrices, checkpoint_tensor
from lewis_hub.hub.source import Source
from lewis_hub.merge.cluster import Ray
from lewis_hub.merge.engine import Places, open_source
from lewis_hub.merge.needs import stored
from lewis_hub.merge.runners import threads

if TYPE_CHECKING:
    from lewis_hub.stages.execution import Folders, Step


def measure_task_vectors(
    step: Step, folders: Folders, known: ImportanceProfile, scratch: Path
) -> Iterator[SourceImportance]:
    """Measure every expert against the base; adapters and 8-bit floats as they are merged.

    Args:
        step: of a recipe with a base.
        folders: of all sources.
        known: earlier measurements; those of the same sources are taken over.
        scratch: for ranges of weights that are elsewhere.

    Raises:
        BrokenCheckpointError: a file is missing or ends too early.
        SourceError: bytes of a source cannot be had.
    """
    base = step.inputs.base
    assert base
    facts = {"measure": "task_vector", "base": step.inputs.content(base)}
    tensors = step.examined.checkpoints[base.pinned].tensors
    matrices = block_matrices({name: tensor.shape for name, tensor in tensors.items()})
    for expert in step.inputs.experts:
        content = step.inputs.content(expert)
        entry = reusable(known, content, facts)
        if entry and entry.modules.keys() == set(matrices):  # another version may take others
            modules = entry.modules
        else:
            modules = _measured(step, base, expert, matrices, step.places or folders, scratch)
        yield SourceImportance(expert.pinned, content, "expert", 0, modules, facts)


def _measured(  # noqa: PLR0913
    step: Step,
    base: Source,
    expert: Source,
    matrices: Sequence[str],
    places: Places,
    scratch: Path,
) -> dict[str, float]:
    """Module -> how far the expert's weight is from the base's, as a share of it."""
    from lewis_hub.merge.change import relative_changes  # imports llvmlite

    first, second = (step.examined.checkpoints[one.pinned] for one in (base, expert))
    modules = {checkpoint_tensor(module, first.tensors): module for module in matrices}
    tensors = list(modules)
    n_elements = sum(first.tensors[name].n_elements for name in tensors)
    both = {base.pinned: first, expert.pinned: second}
    needs = [_needs(name, both, elsewhere(places)) for name in tensors]
    workers, most_bytes = step.execution.workers, step.execution.max_shard_bytes
    with (
        Window(places, needs, scratch / "ranges", most_bytes) as window,
        open_source(base.pinned, first.base, window.reader) as of_base,
        open_source(expert.pinned, second.base, window.reader) as of_expert,
        step.progress.stage(f"Measuring {expert.name}", n_elements, "items") as advance,
    ):

        def done(n_elements: int) -> None:
            window.step_done()
            advance(n_elements)

        changes = relative_changes(
            (first, of_base),
            (second, of_expert),
            tensors,
            threads() if isinstance(workers, Ray) else workers,
            done,
        )
    return {modules[name]: change for name, change in changes.items()}


def _needs(name: str, models: Mapping[str, Checkpoint], remote: Collection[str]) -> list[Need]:
    """What has to be fetched of one tensor, of all models that have it."""
    return [
        need
        for pinned, checkpoint in models.items()
        if name in checkpoint.tensors
        for need in stored(pinned, checkpoint.base, checkpoint.tensors[name])
        if need.source in remote
    ]
