"""Where a model's blocks are, and the matrices in them. No list of architectures."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every list of blocks by its path: the outermost ModuleLists whose items hold a Linear.

    A decoder has one, an encoder-decoder two; others are a vision tower's or an extra head's, which
    calibration texts do not reach. "Outermost" leaves out lists inside a block, such as its
    experts. An item that is itself a Linear is no block.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inner and any(map(_is_block, module)):
            lists[name] = module
    return lists


def linears(path: str, root: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every Linear and Conv1D under `root`, which lies at `path` in the model, in order."""
    for name, module in root.named_modules(prefix=path):
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def _is_block(item: nn.Module) -> bool:
    return not isinstance(item, (nn.Linear, Conv1D)) and any(linears("", item))


def loose_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Matrices in the blocks, and stacks of them, that no Linear owns."""
    found: dict[str, Tensor] = {}
    for path, blocks in block_lists(model).items():
        owned = {id(module.weight) for _, module in linears(path, blocks)}
        for name, parameter in blocks.named_parameters(prefix=path):
            if parameter.dim() > 1 and id(parameter) not in owned:
                found[name] = parameter
    return found


def has_stacks(model: nn.Module) -> bool:
    """Whether a model's blocks have stacks of matrices, such as experts that are fused.

    What a convolution owns looks like one, and is none.
    """
    return any(
        parameter.dim() == 3 and 1 not in parameter.shape
        for blocks in block_lists(model).values()
        for module in blocks.modules()
        if not isinstance(module, _ConvNd)
        for parameter in module.parameters(recurse=False)
    )


def matrix(module: Linear) -> Tensor:
    """The weight as (out_features, in_features); a view."""
    weight: Tensor = module.weight
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()
