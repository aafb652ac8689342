"""Needs: how many bytes of disk and memory a merge takes, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lewis_hub.checkpoint.header import WIDTHS
from lewis_hub.checkpoint.layout import DTYPES
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.hub.fetch import weight_files
from lewis_hub.merge.fused import AVERAGED, FUSED
from lewis_hub.recipe import Recipe
from lewis_hub.stages.evaluation import has_twin
from lewis_hub.stages.merging import loaded
from lewis_hub.stages.sources import Inputs

ENGINE_BYTES = 300_000_000  # interpreter and the engine's buffers, whatever the models' size
TORCH_BYTES = 900_000_000  # torch and transformers, loaded to calibrate and to evaluate
DEFINED_COPIES = 4  # of a tensor in float64, beside its sources, while a definition is at work


@dataclass(frozen=True)
class Needs:
    """Bytes.

    Attributes:
        disk_bytes: beside the download.
        memory_bytes: at most, of the largest step.
    """

    output_bytes: int
    disk_bytes: int
    memory_bytes: int


def needs(
    recipe: Recipe, inputs: Inputs, checkpoints: Mapping[str, Checkpoint], output: Checkpoint
) -> Needs:
    """What a merge takes.

    Args:
        recipe: what is asked.
        inputs: pinned.
        checkpoints: pinned source -> its headers; without tensors where it is not read yet.
        output: what is made, in the dtypes of its sources.
    """
    pickles = {s.pinned: s.size_bytes(weight_files(s)) for s in inputs.models if s.is_pickled}
    largest_pickle_bytes = max(pickles.values(), default=0)
    output_bytes = _output_bytes(output, recipe.output_dtype)
    output_bytes = pickles.get(inputs.donor.pinned, output_bytes)
    disk_bytes = _disk_bytes(recipe, inputs, checkpoints, output_bytes)
    return Needs(
        output_bytes,
        disk_bytes + sum(pickles.values()),
        max(
            _merging_bytes(recipe, output, tuple(checkpoints.values())),
            _loading_bytes(recipe, (output, *checkpoints.values()), largest_pickle_bytes),
        ),
    )


def _output_bytes(checkpoint: Checkpoint, dtype: str | None) -> int:
    asked = DTYPES[dtype] if dtype else None
    tensors = checkpoint.tensors.values()
    return sum(t.n_elements * WIDTHS[asked or t.kept_dtype] for t in tensors)


def _disk_bytes(
    recipe: Recipe, inputs: Inputs, checkpoints: Mapping[str, Checkpoint], output_bytes: int
) -> int:
    """The merge, its twin, and each source that is written out to be loaded."""
    asked = [checkpoints[source.pinned] for source in loaded(recipe, inputs)]
    written_bytes = sum(_output_bytes(one, None) for one in asked if one.is_computed)
    return output_bytes * (2 if has_twin(recipe) else 1) + written_bytes


def _merging_bytes(recipe: Recipe, output: Checkpoint, checkpoints: Sequence[Checkpoint]) -> int:
    """Kernels hold pieces; a definition holds its sources' largest tensor, in torch.

    Of an adapter the two narrow matrices of each module are held.
    """
    adapted = [t.adapted for one in checkpoints for t in one.tensors.values() if t.adapted]
    updates = [one.update for one in adapted if one.update]
    narrow_bytes = 4 * sum(update.a.n_elements + update.b.n_elements for update in updates)
    rescales = (
        recipe.merge_method == "ties" and recipe.parameters.get("rescale", False) is not False
    )
    if recipe.merge_method in (AVERAGED, *FUSED) and not rescales:
        return ENGINE_BYTES + narrow_bytes
    largest = max((t.n_elements for t in output.tensors.values()), default=0)
    held_bytes = (4 * len(checkpoints) + 8 * DEFINED_COPIES) * largest
    return TORCH_BYTES + held_bytes + narrow_bytes


def _loading_bytes(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], largest_pickle_bytes: int
) -> int:
    """Calibration and evaluation hold one model, in float32 on a CPU.

    A pickle is taken to hold numbers of two bytes, the smallest that are merged.
    """
    if recipe.guide is None and recipe.evaluate is None:
        return 0
    largest = max(sum(t.n_elements for t in one.tensors.values()) for one in checkpoints)
    return TORCH_BYTES + 4 * max(largest, largest_pickle_bytes // 2)
