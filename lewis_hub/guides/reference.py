"""LEWIS as the authors' code computes it, quirk by quirk, so that anyone can check us against it.

What differs from `lewis`: every text is padded to `max_tokens` with end-of-sequence tokens, which
the model sees and the sums count, as no mask is handed on; activations are summed within a text
and averaged over texts; and a block that was measured is pruned to half before its output feeds
the next one.

Pruning makes it chaotic: what is kept of a row turns on the last bit where two entries matter
nearly the same; the next block then gets other inputs, and some blocks later importance differs by
per cents. So every operation is the published one, in its order and in float32: texts run alone,
the mean over them is a running one, and norms are squared again. What a product of matrices rounds
to is left to the machine: another one finds other numbers, by the authors' code as by this.

Source:
    https://arxiv.org/abs/2503.03874 and the code that was published with it, after Wanda,
    arXiv:2306.11695.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lewis_hub.errors import CalibrationModelError
from lewis_hub.guides.activations import check_tokens_fit, require_seen
from lewis_hub.guides.blocks import Linear, block_lists, linears, matrix
from lewis_hub.guides.loading import check_padding, config_value, load_model
from lewis_hub.guides.threads import threads, whole_shares
from lewis_hub.guides.tokens import CalibrationTokens
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRUNED = 0.5  # of every row of a measured block

Hidden = Any  # what a block returns: a tensor, or a tuple that begins with one


def measure(
    folder: Path, name: str, sets: Sequence[CalibrationTokens], device: str, advance: Advance
) -> list[dict[str, float]]:
    """Measure one source on each calibration set, as `activations.measure` does for `lewis`.

    The model is loaded anew for each set, as measuring prunes it.

    Raises:
        CalibrationModelError: it cannot be loaded or has no blocks that texts reach, the padded
            texts do not fit it, or there is no end-of-sequence token to pad with.
    """
    found = []
    for tokens in sets:
        loaded: Any = load_model(folder, device, name)
        model = loaded.float()
        texts = padded(tokens, name)
        check_padding(name, tokens.limit, config_value(model, "max_position_embeddings"))
        check_tokens_fit(model, name, replace(tokens, ids=tuple(map(tuple, texts.tolist()))))
        path, blocks = text_blocks(model, name, texts[0])
        widths = {matrix(module).shape[1] for _, module in linears(path, blocks)}
        importance: dict[str, float] = {}
        with threads(whole_shares(widths, torch.get_num_threads())):
            for b, measured in enumerate(block_importance(model, path, blocks, texts)):
                importance |= measured
                told = [tokens.n_tokens * n // len(blocks) for n in (b, b + 1)]
                advance(told[1] - told[0])
        require_seen(importance, name)
        found.append(importance)
    return found


def padded(tokens: CalibrationTokens, name: str) -> Tensor:
    """(n_texts, max_tokens) int64: what there is of each text, then end-of-sequence tokens.

    Raises:
        CalibrationModelError: the tokenizer has no such token.
    """
    if tokens.end is None:
        problem = f"the tokenizer of {tokens.tokenizer} has no end-of-sequence token to pad with"
        raise CalibrationModelError(name, problem, "Use guide `lewis`, which pads nothing.")
    rows = [[*ids, *[tokens.end] * (tokens.limit - len(ids))] for ids in tokens.ids]
    return torch.tensor(rows, dtype=torch.int64)


def text_blocks(model: PreTrainedModel, name: str, text: Tensor) -> tuple[str, nn.ModuleList]:
    """The path and the list of the blocks that a text, (n_tokens,) int64, runs through.

    Of several lists it is the one of most parameters; a vision tower's is not among them.

    Raises:
        CalibrationModelError: there is none, or an encoder.
    """
    if model.config.is_encoder_decoder:
        problem = "it has an encoder, and the published procedure knows decoders alone"
        raise CalibrationModelError(name, problem, "Use guide `lewis`.")
    lists, reached = block_lists(model), set()
    with ExitStack() as hooks:
        for path, blocks in lists.items():

            def reach(_: nn.Module, _args: Any, path: str = path) -> None:
                reached.add(path)

            for block in blocks:
                hooks.callback(block.register_forward_pre_hook(reach).remove)
        _forward(model, text)
    if not reached:
        problem = "no list of blocks with a Linear was found that texts run through"
        raise CalibrationModelError(name, problem, "Use guide `uniform` for this architecture.")
    run = {path: blocks for path, blocks in lists.items() if path in reached}
    return max(run.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def block_importance(
    model: PreTrainedModel, path: str, blocks: nn.ModuleList, texts: Tensor
) -> Iterator[dict[str, float]]:
    """Measure block by block; a block is pruned once it was measured.

    Args:
        model: causal language model in float32 and eval mode.
        path: of the blocks.
        blocks: from `text_blocks`.
        texts: (n_texts, n_tokens) int64, every token counts.

    Yields:
        Of each block: module -> importance, in the model's order.
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
    """Squares of the inputs of each Linear of block b: of each text summed, and their mean.

    A Linear that is not called for every text has the mean over the calls, as published.
    """
    means: dict[str, Tensor] = {}
    n_calls: Counter[str] = Counter()

    def observing(at: str) -> Callable[..., None]:
        def observe(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(named.values()))
            norms = x.reshape(-1, x.shape[-1]).T.norm(dim=1)
            n_calls[at] += 1
            before = means.get(at, torch.zeros_like(norms)) * ((n_calls[at] - 1) / n_calls[at])
            means[at] = before + norms**2 / n_calls[at]

        return observe

    with ExitStack() as hooks:
        for at, module in inside.items():
            handle = module.register_forward_pre_hook(observing(at), with_kwargs=True)
            hooks.callback(handle.remove)
        for i, text in enumerate(texts):
            _run(model, modules, b, text, outputs[i])
    return {at: means[at] for at in inside if at in means}


class _Reached(Exception):  # noqa: N818 - no error: the way out of a forward pass
    """The block whose output is asked for has returned."""


def _run(
    model: PreTrainedModel, modules: nn.ModuleList, b: int, text: Tensor, before: Hidden
) -> Hidden:
    """What block b returns for a text, when the blocks before it return `before`.

    One that the model passes over, as it does with what looks at pictures alone, returns `before`.
    """
    reached: list[Hidden] = []

    def leave(_: nn.Module, _args: Any, output: Hidden) -> None:
        reached.append(output)
        raise _Reached

    with _standing_in(modules, b, before):
        handle = modules[b].register_forward_hook(leave)
        try:
            _forward(model, text)
        except _Reached:
            pass
        finally:
            handle.remove()
    return reached[0] if reached else before


def _forward(model: PreTrainedModel, text: Tensor) -> None:
    with torch.no_grad():
        model.base_model(input_ids=text[None].to(model.device), use_cache=False)


@contextmanager
def _standing_in(modules: nn.ModuleList, b: int, output: Hidden) -> Iterator[None]:
    """Let the blocks before b return at once what the last of them returned."""
    originals = [module.forward for module in modules[:b]]
    try:
        for module in modules[:b]:
            module.forward = lambda *_args, **_named: output
        yield
    finally:
        for module, original in zip(modules[:b], originals, strict=True):
            module.forward = original


def _pruned(module: Linear, squares: Tensor) -> float:
    """Importance; the entries of each row that matter least are zero then, of equal ones the first.

    Args:
        module: half of the entries of its matrix are set to zero.
        squares: (in_features,) of its inputs, summed over the tokens and averaged over texts.
    """
    weight = matrix(module)
    metric = weight.abs() * squares.sqrt()
    n_pruned = int(weight.shape[1] * PRUNED)
    least = metric.sort(dim=1, stable=True).indices[:, :n_pruned]
    weight.scatter_(1, least, 0.0)
    return float(metric.norm())
