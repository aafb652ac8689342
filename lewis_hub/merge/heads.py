"""Heads that share a tensor with the embeddings: stored by some tools, left out by others."""

from __future__ import annotations

from dataclasses import replace

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.reader import Checkpoint


def settle_heads(base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    """Give an expert a head exactly where the base has one; both tie the head to the embeddings.

    Where the base stores its head all the same, the expert's embedding is the expert's head. Where
    only the expert stores it, it is a second copy, which is left out.

    Args:
        base: its configuration ties the head to the embeddings.
        expert: likewise.
    """
    tensors = dict(expert.tensors)
    for name in [name for name in tensors if names.is_head(name) and name not in base.tensors]:
        del tensors[name]
    embeddings = [t for name, t in tensors.items() if names.is_token_embedding(name)]
    for name, head in base.tensors.items():
        same = [t for t in embeddings if t.shape[1:] == head.shape[1:]]
        if names.is_head(name) and name not in tensors and len(same) == 1:
            tensors[name] = replace(same[0], name=name)
    return replace(expert, tensors=tensors)
