"""Which tensors a guide decides: the same for all guides, told by names and shapes alone.

These are the matrices of the blocks that texts run through, and stacks of them, as near as names
tell it: what `lewis` measures. `tests/test_matrices.py` holds the two against each other.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from lewis_hub.checkpoint import names
from lewis_hub.errors import GuideError

TOWER = re.compile(  # the list of blocks of a model's part that sees or hears, or hands that on
    r"(?:^|[._])(?:vision|visual|vit|vq|image|img|video|audio|speech|"
    r"qformer|perceiver|resampler|projector|projection|connector|merger)"
)
NO_PRODUCT = re.compile(  # the end of a component: not what hidden states are multiplied with
    r"(?:conv|norm|embed|time_mix)[^.]*$|(?:bias|scale|decay|slope_rate)$|"
    r"(?:^|\.)(?:A_log|D|ape|tid2eid)$|(?:mixer|mamba)\.dt_proj$"
)
ACROSS = re.compile(r"encoder_att|cross_?att|EncDecAttention", re.IGNORECASE)
ENCODER = re.compile(r"(?:^|[._])encoder")


def block_matrices(tensors: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """The modules that every guide gives a density.

    A tensor counts whose name has the number of a block of the text's part, and that is a `.weight`
    or a bare tensor of two dimensions or more; but not one that its name shows to be a bias, a
    norm, an embedding, a convolution or a part of a recurrence. What attends to an encoder counts
    where there is one.

    Args:
        tensors: name -> shape, of a checkpoint.
    """
    found = [name for name, shape in tensors.items() if len(shape) >= 2 and _is_matrix(name)]
    has_encoder = any(ENCODER.search(names.stack(name) or "") for name in found)
    return tuple(
        names.module(name)
        for name in found
        if has_encoder or not ACROSS.search(names.component(name))
    )


def _is_matrix(name: str) -> bool:
    stack, component = names.stack(name), names.component(name)
    is_item = component == "weight"  # of a list of matrices, which are no blocks
    return not (stack is None or is_item or TOWER.search(stack) or NO_PRODUCT.search(component))


def checkpoint_tensor(module: str, tensors: Collection[str]) -> str:
    """The checkpoint's name for a module's weight; the module's own for a stack of experts.

    Raises:
        GuideError: no tensor, or more than one, has the name.
    """
    name = f"{module}.weight"
    if module in tensors and name not in tensors:
        return module
    found = names.find(name, tensors)
    if len(found) == 1:
        return found[0]
    near = difflib.get_close_matches(name, tensors, n=1)
    hint = f"The nearest is {near[0]}. " if near else ""
    problem = f"a density is given to {name}, which {'several' if found else 'no'} tensors match"
    remedy = hint + "The checkpoint stores this architecture otherwise: use guide `uniform`."
    raise GuideError("schedule", problem, remedy)
