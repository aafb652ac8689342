"""What a tensor's name says: `model.layers.3.self_attn.q_proj.weight` is in block 3.

Pure string functions, for every architecture: the first number in a name counts blocks.
"""

from __future__ import annotations

import re
from collections.abc import Collection

BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
EXPERT = re.compile(r"(experts?[._])\d+(?=\.|$)")  # `experts.3`, `experts.expert_3`
INPUT_SIDE = re.compile(r"(?:^|[._])(?:embed(?!_out)|embedding|wte|wpe|tok_emb|pos_emb)")
NO_TOKENS = re.compile(r"(?:^|[._])(?:wpe|pos_emb|position|patch|class_emb|token_type)")
HEAD = re.compile(r"(?:^|\.)lm_head(?:\.|$)|embed_out$")


def module(name: str) -> str:
    """The module that owns a tensor: the name without `.weight` or `.bias`."""
    for suffix in (".weight", ".bias"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def block(name: str) -> int | None:
    """The block's number: 3 in `model.layers.3.mlp.experts.5.w1`; None outside the blocks."""
    found = BLOCK.search(name)
    return int(found[1]) if found else None


def stack(name: str) -> str | None:
    """The list that a block is in, such as `model.layers`; None outside the blocks.

    A model of several towers has several.
    """
    found = BLOCK.search(name)
    return name[: found.start()] if found else None


def renumbered(name: str, number: int) -> str:
    """The same tensor of another block; the name as it is outside the blocks."""
    found = BLOCK.search(name)
    return f"{name[: found.start(1)]}{number}{name[found.end(1) :]}" if found else name


def component(name: str) -> str:
    """What a tensor is, in whichever block: `self_attn.q_proj`; outside blocks the module."""
    found = BLOCK.search(name)
    return module(name[found.end() :] if found else name)


def kind(name: str) -> str:
    """A component that is the same for all routed experts: `mlp.experts.*.up_proj`."""
    return EXPERT.sub(r"\1*", component(name))


def is_routed(name: str) -> bool:
    """Whether a tensor belongs to one of the routed experts of a block."""
    return EXPERT.search(component(name)) is not None


def is_head(name: str) -> bool:
    """Whether a tensor turns hidden states into one number a token: `lm_head.weight`, its bias."""
    return block(name) is None and HEAD.search(module(name)) is not None


def may_have_tokens(name: str) -> bool:
    """Whether a tensor may have a row a token: outside the blocks, and not called otherwise."""
    return block(name) is None and NO_TOKENS.search(name) is None


def is_token_embedding(name: str) -> bool:
    """Whether a tensor is called an embedding of tokens, and not of positions or types."""
    return is_input_side(name) and may_have_tokens(name)


def is_input_side(name: str) -> bool:
    """Whether a tensor outside the blocks comes before them: an embedding, not norm or head."""
    return block(name) is None and INPUT_SIDE.search(name) is not None


def find(name: str, tensors: Collection[str]) -> list[str]:
    """The checkpoint's tensors that a loaded model may mean by `name`: one where it is clear.

    A loaded model may carry a prefix that its file leaves out (`transformer.h.0` for `h.0`), or
    the file one that the model leaves out; the rest of the name must agree.
    """
    parts = name.split(".")
    for start in range(len(parts) - 1):
        shorter = ".".join(parts[start:])
        if shorter in tensors and block(shorter) == block(name):
            return [shorter]
    return [tensor for tensor in tensors if tensor.endswith(f".{name}")]
