"""Changes: how large each expert's task vectors are, from the files alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lewis_hub.checkpoint.reader import TensorReader
from lewis_hub.guides.density import block_matrices, checkpoint_tensor
from lewis_hub.guides.importance import ImportanceProfile, SourceImportance, reusable
from lewis_hub.hub.source import Source
from lewis_hub.merge.cluster import Ray
from lewis_hub.merge.engine import open_source
from lewis_hub.merge.runners import threads

if TYPE_CHECKING:
    from lewis_hub.stages.execution import Folders, Step


def measure_task_vectors(
    step: Step, folders: Folders, known: ImportanceProfile
) -> tuple[SourceImportance, ...]:
    """Measure every expert against the base; adapters and 8-bit floats as they are merged.

    Args:
        step: of a recipe with a base.
        folders: of all sources.
        known: earlier measurements; those of the same sources are taken over.

    Raises:
        BrokenCheckpointError: a file is missing or ends too early.
    """
    return tuple(_measured(step, expert, folders, known) for expert in step.inputs.experts)


def unmeasured_task_vectors(step: Step, known: ImportanceProfile) -> tuple[Source, ...]:
    """The experts whose weights `measure_task_vectors` would have to read."""
    inputs, facts = step.inputs, _facts(step)
    return tuple(e for e in inputs.experts if not reusable(known, inputs.content(e), facts))


def _facts(step: Step) -> dict[str, str]:
    base = step.inputs.base
    assert base
    return {"measure": "task_vector", "base": step.inputs.content(base)}


def _measured(
    step: Step, expert: Source, folders: Folders, known: ImportanceProfile
) -> SourceImportance:
    from lewis_hub.merge.change import relative_changes  # imports llvmlite

    base, content = step.inputs.base, step.inputs.content(expert)
    assert base
    facts = _facts(step)
    entry = reusable(known, content, facts)
    if entry:
        return SourceImportance(expert.pinned, content, "expert", 0, entry.modules, facts)
    first, second = (step.examined.checkpoints[one.pinned] for one in (base, expert))
    shapes = {name: tensor.shape for name, tensor in first.tensors.items()}
    modules = {checkpoint_tensor(module, shapes): module for module in block_matrices(shapes)}
    tensors = list(modules)
    n_elements = sum(first.tensors[name].n_elements for name in tensors)
    workers = step.execution.workers

    def local(label: str) -> TensorReader:
        return TensorReader(folders[label], label)

    with (
        open_source(base.pinned, first.base, local) as of_base,
        open_source(expert.pinned, second.base, local) as of_expert,
        step.progress.stage(f"Measuring {expert.name}", n_elements, "items") as advance,
    ):
        changes = relative_changes(
            (first, of_base),
            (second, of_expert),
            tensors,
            threads() if isinstance(workers, Ray) else workers,
            advance,
        )
    values = {modules[name]: change for name, change in changes.items()}
    return SourceImportance(expert.pinned, content, "expert", 0, values, facts)
