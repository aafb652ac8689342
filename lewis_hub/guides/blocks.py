"""Where a model's decoder blocks are, and the matrices in them. No list of architectures."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The path and the list of the decoder's blocks: the largest outermost ModuleList.

    "Outermost" leaves out lists inside a block, such as its experts; "largest", by parameters,
    leaves out vision towers and extra heads.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inner and any(linears(name, module)):
            lists[name] = module
    if not lists:
        return None
    return max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def linears(path: str, root: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every Linear and Conv1D under `root`, which lies at `path` in the model, in order."""
    for name, module in root.named_modules(prefix=path):
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def matrix(module: Linear) -> Tensor:
    """The weight as (out_features, in_features); a view."""
    weight: Tensor = module.weight
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()
