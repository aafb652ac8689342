"""LEWIS with the arithmetic of the published code, so that anyone can compare us with it.

It differs from `lewis` in three points: every text is padded to `max_tokens` with end-of-sequence
tokens, which the model sees and the sums count, as there is no mask; activations are summed within
a text and averaged over texts; and a measured block is pruned to half before its output feeds the
next one.

Pruning makes it chaotic: which entries of a row are kept depends on the last bit if two entries
matter nearly the same; the next block then gets other inputs, and some blocks later importance
differs by per cents. So every operation is the published one, in its order and in float32: texts
run alone, the mean over them is a running one, and norms are squared again. The rounding of matrix
products is the machine's: other machines find other numbers, with the authors' code as with this.

Source:
    https://arxiv.org/abs/2503.03874 and the code that was published with it, after Wanda,
    arXiv:2306.11695.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lewis_hub.calibration.forward import block_output, deterministic_threads, replaced_forwards
from lewis_hub.calibration.hooks import hooked, require_measured
from lewis_hub.calibration.model import (
    Linear,
    block_lists,
    check_tokens_fit,
    config_value,
    linears,
    load_model,
    matrix,
    n_parameters,
)
from lewis_hub.calibration.subject import Snapshot
from lewis_hub.calibration.texts import CalibrationTokens, check_padding
from lewis_hub.display import Advance
from lewis_hub.errors import CalibrationModelError

PRUNED = 0.5  # of every row of a measured block

Hidden = Any  # what a block returns: a tensor, or a tuple that begins with one


def measure_reference(
    snapshot: Snapshot, sets: Sequence[CalibrationTokens], device: str, advance: Advance
) -> list[dict[str, float]]:
    """Measure one source on each calibration set, as `measure_inputs` does for `lewis`.

    The model is loaded once for each set, as measuring prunes it. A CalibrationModelError says that
    it cannot be loaded or has no blocks that texts reach, that the padded texts do not fit it, or
    that there is no end-of-sequence token to pad with.
    """
    found = []
    for tokens in sets:
        loaded: nn.Module = load_model(snapshot.folder, device, snapshot.name)
        model = cast("PreTrainedModel", loaded.float())
        texts = padded(tokens, snapshot.name)
        n_positions = config_value(model, "max_position_embeddings")
        check_padding(snapshot.name, tokens.limit, n_positions)
        as_padded = replace(tokens, ids=tuple(map(tuple, texts.tolist())))
        check_tokens_fit(model, snapshot.name, as_padded)
        path, blocks = text_blocks(model, snapshot.name, texts[0])
        importance: dict[str, float] = {}
        with deterministic_threads(module for _, module in linears(path, blocks)):
            for b, measured in enumerate(block_importance(model, path, blocks, texts)):
                importance |= measured
                done = [tokens.n_tokens * n // len(blocks) for n in (b, b + 1)]
                advance(done[1] - done[0])
        require_measured(importance, snapshot.name)
        found.append(importance)
    return found


def padded(tokens: CalibrationTokens, name: str) -> Tensor:
    """(n_texts, max_tokens) int64: the tokens of each text, then end-of-sequence tokens."""
    if tokens.end is None:
        problem = f"the tokenizer of {tokens.tokenizer} has no end-of-sequence token to pad with"
        raise CalibrationModelError(name, problem, "Use guide `lewis`, which pads nothing.")
    rows = [[*ids, *[tokens.end] * (tokens.limit - len(ids))] for ids in tokens.ids]
    return torch.tensor(rows, dtype=torch.int64)


def text_blocks(model: PreTrainedModel, name: str, text: Tensor) -> tuple[str, nn.ModuleList]:
    """The path and the list of the blocks that a text, (n_tokens,) int64, runs through.

    If there are several lists, the one with the most parameters; refuses a model with an encoder.
    """
    if model.config.is_encoder_decoder:
        problem = "it has an encoder, and the published procedure knows decoders alone"
        raise CalibrationModelError(name, problem, "Use guide `lewis`.")
    lists, reached = block_lists(model), set[str]()
    modules = {
        f"{path}.{b}": block for path, blocks in lists.items() for b, block in enumerate(blocks)
    }
    with hooked(modules, lambda block, _: reached.add(block.rpartition(".")[0])):
        _forward(model, text)
    if not reached:
        problem = "no list of blocks with a Linear was found that texts run through"
        raise CalibrationModelError(name, problem, "Use guide `uniform` for this architecture.")
    run = {path: blocks for path, blocks in lists.items() if path in reached}
    return max(run.items(), key=lambda item: n_parameters(item[1]))


def block_importance(
    model: PreTrainedModel, path: str, blocks: nn.ModuleList, texts: Tensor
) -> Iterator[dict[str, float]]:
    """Measure block by block, and prune each block after it was measured.

    The model is in float32 and eval mode; every token of the texts, (n_texts, n_tokens) int64,
    counts. Yields for each block module -> importance, in the model's order.
    """
    outputs: list[Hidden] = [None] * len(texts)
    for b, block in enumerate(blocks):
        inside = dict(linears(f"{path}.{b}", block))
        squares = _measured(model, blocks, b, texts, outputs, inside)
        yield {at: _pruned(inside[at], mean) for at, mean in squares.items()}
        outputs = [_run(model, blocks, b, text, outputs[i]) for i, text in enumerate(texts)]


def _measured(
    model: PreTrainedModel,
    modules: nn.ModuleList,
    b: int,
    texts: Tensor,
    outputs: Sequence[Hidden],
    inside: dict[str, Linear],
) -> dict[str, Tensor]:
    """The squared inputs of each Linear of block b, summed over a text, averaged over texts.

    A Linear that is not called for every text has the mean over its calls, as published.
    """
    means: dict[str, Tensor] = {}
    n_calls: Counter[str] = Counter()

    def observe(at: str, x: Tensor) -> None:
        norms = x.reshape(-1, x.shape[-1]).T.norm(dim=1)
        n_calls[at] += 1
        before = means.get(at, torch.zeros_like(norms)) * ((n_calls[at] - 1) / n_calls[at])
        means[at] = before + norms**2 / n_calls[at]

    with hooked(inside, observe):
        for i, text in enumerate(texts):
            _run(model, modules, b, text, outputs[i])
    return {at: means[at] for at in inside if at in means}


def _run(
    model: PreTrainedModel, modules: nn.ModuleList, b: int, text: Tensor, before: Hidden
) -> Hidden:
    """The output of block b for a text, if the blocks before it return `before`.

    The output of a block that the model skips, such as cross-attention to images, is `before`.
    """
    with replaced_forwards(list(modules[:b]), lambda _: lambda *_args, **_named: before):
        outputs = block_output(modules[b], partial(_forward, model, text))
    return outputs[0] if outputs else before


def _forward(model: PreTrainedModel, text: Tensor) -> None:
    with torch.no_grad():
        model.base_model(input_ids=text[None].to(model.device), use_cache=False)


def _pruned(module: Linear, squares: Tensor) -> float:
    """The importance of a module; sets the least important entries of each row to zero.

    Of equal entries the first ones are set to zero. `squares`, (in_features,), are those of its
    inputs, summed over the tokens and averaged over texts.
    """
    weight = matrix(module)
    metric = weight.abs() * squares.sqrt()
    n_pruned = int(weight.shape[1] * PRUNED)
    least = metric.sort(dim=1, stable=True).indices[:, :n_pruned]
    weight.scatter_(1, least, 0.0)
    return float(metric.norm())
