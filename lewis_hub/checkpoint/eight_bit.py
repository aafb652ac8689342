"""A checkpoint of 8-bit floats and scales, as one of float32: which scale belongs to which tensor.

Only headers are looked at.
"""

from __future__ import annotations

from dataclasses import replace

from lewis_hub.checkpoint.codes import Scaled
from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import BrokenCheckpointError

BLOCK = (128, 128)  # rows and columns that share a scale, unless a configuration says others
STORED = "F8_E4M3"
SCALES = ("_scale_inv", "_scale")  # after the tensor's name; both are multiplied by
OF_ACTIVATIONS = (  # measured for running the quantised model: the weights are what they are
    ".input_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".output_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
    ".input_zero_point",
    ".output_zero_point",
)


def scaled(checkpoint: Checkpoint, block: tuple[int, int] = BLOCK) -> Checkpoint:
    """The same checkpoint with its 8-bit floats in float32, and without their scales.

    Tensors that have no scale are left as they are.

    Args:
        checkpoint: as its files hold it.
        block: rows and columns that share a scale, where a scale is for neither row nor tensor.

    Raises:
        BrokenCheckpointError: a scale does not fit its tensor.
    """
    tensors = checkpoint.tensors
    scales = {
        name: tensors[name + ending]
        for name, tensor in tensors.items()
        if tensor.dtype == STORED
        for ending in SCALES
        if name + ending in tensors
    }
    if not scales:
        return checkpoint
    dropped = {scale.name for scale in scales.values()}
    dropped |= {name for name in tensors if name.endswith(OF_ACTIVATIONS)}
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    for name, scale in scales.items():
        stored = tensors[name]
        made = Scaled(stored, scale, block_of(checkpoint.label, stored, scale, block))
        kept[name] = replace(stored, dtype="F32", n_bytes=4 * stored.n_elements, scaled=made)
    return replace(checkpoint, tensors=kept)


def block_of(
    label: str, stored: TensorHeader, scale: TensorHeader, block: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns that share a scale, by the shapes.

    Args:
        label: the source, for messages.
        stored: of the shape that the values have.
        scale: of the tensor.
        block: rows and columns of a block, where the scales are for blocks.

    Raises:
        BrokenCheckpointError: the scale does not fit.
    """
    where = f"{label}: {scale.shard}"
    if scale.dtype not in MERGEABLE:
        problem = f"`{scale.name}` is {scale.dtype}, which is not read as a scale"
        remedy = "Use the model that it was quantised from, in bfloat16, float16 or float32."
        raise BrokenCheckpointError(where, problem, remedy)
    if scale.n_elements == 1:
        return max(1, stored.n_elements), max((1, *stored.shape[-1:]))
    if len(stored.shape) == 2:
        n_rows, n_columns = stored.shape
        if scale.shape in ((n_rows, 1), (n_rows,)):
            return 1, max(1, n_columns)
        if scale.shape == (-(-n_rows // block[0]), -(-n_columns // block[1])):
            return block
        if len(scale.shape) == 2 and scale.shape[0] == n_rows and _divides(scale.shape, n_columns):
            return 1, n_columns // scale.shape[1]
    problem = (
        f"`{scale.name}` has shape {list(scale.shape)}, which fits {stored.name} of shape "
        f"{list(stored.shape)} neither by tensor, by row, by group, nor by blocks of {list(block)}"
    )
    remedy = "Use an intact copy, or the model that it was quantised from."
    raise BrokenCheckpointError(where, problem, remedy)


def _divides(scale: tuple[int, ...], n_columns: int) -> bool:
    return scale[1] > 0 and n_columns % scale[1] == 0
