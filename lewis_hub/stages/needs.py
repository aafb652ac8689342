"""Needs: how many bytes of disk and memory a merge takes, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.layout import DTYPES
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.guides import registry as guides
from lewis_hub.guides import weights
from lewis_hub.guides.grams import HELD_BYTES, WIDEST, n_entries
from lewis_hub.hub.fetch import weight_files
from lewis_hub.merge.fused import AVERAGED, FUSED
from lewis_hub.methods import registry
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_rules import fits_in_sequence
from lewis_hub.stages.evaluation import has_uniform_twin, n_twins
from lewis_hub.stages.loading import (
    Loading,
    batch_bytes,
    blocks_bytes,
    most_tokens,
    on_disk_bytes,
    states_bytes,
)
from lewis_hub.stages.sources import (
    Inputs,
    calibrations,
    measures_on_texts,
    needs_grams,
    widest_input,
)
from lewis_hub.stages.writing_out import loaded

ENGINE_BYTES = 300_000_000  # interpreter and the engine's buffers, whatever the models' size
TORCH_BYTES = 900_000_000  # torch and transformers, loaded to calibrate and to evaluate
GRAM_COPIES = 3  # of a matrix, beside each expert's own and its shrunk one, while it is factored
DEFINED_COPIES = 4  # of a tensor in float64, beside its sources, while a definition is at work


@dataclass(frozen=True)
class Needs:
    """Bytes.

    Attributes:
        disk_bytes: beside the download and the hidden states.
        states_bytes: of hidden states on the disk, at most, while models are measured.
        memory_bytes: at most, of the largest step.
    """

    output_bytes: int
    disk_bytes: int
    states_bytes: int
    memory_bytes: int


def needs(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    output: Checkpoint,
    loading: Loading,
) -> Needs:
    """What a merge takes.

    Args:
        recipe: what is asked.
        inputs: pinned.
        checkpoints: pinned source -> its headers; without tensors where it is not read yet.
        output: what is made, in the dtypes of its sources.
        loading: whether models are measured whole.
    """
    pickles = {s.pinned: s.size_bytes(weight_files(s)) for s in inputs.models if s.is_pickled}
    largest_pickle_bytes = max(pickles.values(), default=0)
    output_bytes = _output_bytes(output, recipe.output_dtype)
    output_bytes = pickles.get(inputs.donor.pinned, output_bytes)
    disk_bytes = _disk_bytes(recipe, inputs, checkpoints, output, output_bytes)
    return Needs(
        output_bytes,
        disk_bytes + sum(pickles.values()),
        on_disk_bytes(recipe, most_tokens(recipe), checkpoints.values(), loading),
        max(
            _merging_bytes(recipe, output, tuple(checkpoints.values())),
            _scoring_bytes(recipe, (output, *checkpoints.values()), largest_pickle_bytes),
            _measuring_bytes(
                recipe, (output, *checkpoints.values()), largest_pickle_bytes, loading
            ),
        ),
    )


def _output_bytes(checkpoint: Checkpoint, dtype: str | None) -> int:
    asked = DTYPES[dtype] if dtype else None
    tensors = checkpoint.tensors.values()
    return sum(t.n_elements * WIDTHS[asked or t.kept_dtype] for t in tensors)


def _disk_bytes(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    output: Checkpoint,
    output_bytes: int,
) -> int:
    """The merge, its twins, statistics, and each source that is written out to be loaded."""
    asked = [checkpoints[source.pinned] for source in loaded(recipe, inputs)]
    written_bytes = sum(_output_bytes(one, None) for one in asked if one.is_computed)
    n_bytes = statistics_bytes(recipe, len(inputs.experts), output)
    return output_bytes * (1 + n_twins(recipe)) + written_bytes + n_bytes


def statistics_bytes(recipe: Recipe, n_experts: int, output: Checkpoint) -> int:
    """Second moments of all experts on disk; or the matrices that are fitted by them."""
    if not fits_in_sequence(recipe):
        return n_experts * grams_bytes(recipe, output)
    asked = DTYPES[recipe.output_dtype] if recipe.output_dtype else None
    fitted_bytes = sum(
        one.n_elements * WIDTHS[asked or one.kept_dtype] for one in _matrices(output)
    )
    return fitted_bytes * (1 + has_uniform_twin(recipe))


def grams_bytes(recipe: Recipe, output: Checkpoint) -> int:
    """Second moments of one expert, at most: modules that share inputs share them."""
    if not needs_grams(recipe):
        return 0
    shapes = [tensor.shape for tensor in _matrices(output)]
    return sum(4 * n_entries(shape[1], widest_input(recipe)) for shape in shapes)


def _matrices(output: Checkpoint) -> list[TensorHeader]:
    """Those of the blocks."""
    return [
        tensor
        for name, tensor in output.tensors.items()
        if len(tensor.shape) == 2 and names.block(name) is not None
    ]


def _merging_bytes(recipe: Recipe, output: Checkpoint, checkpoints: Sequence[Checkpoint]) -> int:
    """Kernels hold pieces; a definition holds the largest tensor that it is asked for, in torch.

    Of an adapter the two narrow matrices of each module are held.
    """
    adapted = [t.adapted for one in checkpoints for t in one.tensors.values() if t.adapted]
    updates = [one.update for one in adapted if one.update]
    narrow_bytes = 4 * sum(update.a.n_elements + update.b.n_elements for update in updates)
    rescales = (
        recipe.merge_method == "ties" and recipe.parameters.get("rescale", False) is not False
    )
    has_kernel = recipe.merge_method in (AVERAGED, *FUSED) and not rescales
    if has_kernel and not needs_grams(recipe):
        return ENGINE_BYTES + narrow_bytes
    defined = _matrices(output) if has_kernel else output.tensors.values()
    largest = max((tensor.n_elements for tensor in defined), default=0)
    held_bytes = (4 * len(checkpoints) + 8 * DEFINED_COPIES) * largest
    if registry.find(recipe.merge_method).needs_grams:
        held_bytes += _solving_bytes(output, len(checkpoints))
    return TORCH_BYTES + held_bytes + narrow_bytes


def _solving_bytes(output: Checkpoint, n_sources: int) -> int:
    """Moments of the widest matrix, of each as they are and shrunk, while one is factored."""
    widths = [tensor.shape[-1] for tensor in output.tensors.values() if tensor.shape]
    widest = min(max(widths, default=0), WIDEST)
    return 4 * (2 * n_sources + GRAM_COPIES) * widest**2


def _scoring_bytes(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], largest_pickle_bytes: int
) -> int:
    """Evaluation holds one model, in float32 on a CPU.

    A pickle is taken to hold numbers of two bytes, the smallest that are merged.
    """
    if recipe.evaluate is None:
        return 0
    largest = max(sum(t.n_elements for t in one.tensors.values()) for one in checkpoints)
    return TORCH_BYTES + 4 * max(largest, largest_pickle_bytes // 2)


def _measuring_bytes(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], largest_pickle_bytes: int, loading: Loading
) -> int:
    """Calibration holds one model, or a part; two where they are compared.

    Statistics are held beside the one that they are gathered of.
    """
    if not measures_on_texts(recipe):
        return 0
    if fits_in_sequence(recipe):
        return _fitting_bytes(recipe, checkpoints)
    guide = guides.find(recipe.guide.name) if recipe.guide else None
    n_models = 2 if guide and "output_shift" in guide.needs else 1
    found = [4 * (largest_pickle_bytes // 2)]
    for one in checkpoints:
        held_bytes = 2 * grams_bytes(recipe, one)
        if loading.is_by_block(one):
            n_blocks = len({names.block(name) for name in one.tensors} - {None})
            held_bytes //= max(n_blocks, 1)
            held_bytes += _texts_bytes(recipe, one, sum(most_tokens(recipe).values()))
            found.append(blocks_bytes(one) + held_bytes)
        else:
            model_bytes = 4 * sum(t.n_elements for t in one.tensors.values())
            with_grams = model_bytes + min(HELD_BYTES, held_bytes)
            found.append(max(n_models * model_bytes, with_grams))
    return TORCH_BYTES + max(found)


def _fitting_bytes(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> int:
    """Blocks of all models at once, one batch of texts, moments of two kinds, and gaps.

    `checkpoints` are the output's and those of all sources.
    """
    blocks = sum(map(blocks_bytes, checkpoints))
    drawn = most_tokens(recipe)
    n_tokens = 2 * sum(drawn[one] for one in calibrations(recipe))
    texts = max(_texts_bytes(recipe, one, n_tokens) for one in checkpoints)
    largest = max((tensor.n_elements for tensor in _matrices(checkpoints[0])), default=0)
    moments = 2 * _solving_bytes(checkpoints[0], len(checkpoints)) + 4 * len(checkpoints) * largest
    return TORCH_BYTES + blocks + texts + moments


def _texts_bytes(recipe: Recipe, checkpoint: Checkpoint, n_tokens: int) -> int:
    """One batch, and the hidden states of all texts as far as they are not on the disk."""
    held_bytes = min(states_bytes(checkpoint, n_tokens), weights.HELD_BYTES)
    return batch_bytes(calibrations(recipe), checkpoint) + held_bytes
