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

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lewis_hub.calibration.determinism import threads, whole_shares
from lewis_hub.calibration.fused_experts import stored_names
from lewis_hub.calibration.hooks import (
    block_linears,
    check_tokens_fit,
    evaluating,
    forward,
    require_seen,
)
from lewis_hub.calibration.measure import Place
from lewis_hub.calibration.model import (
    Linear,
    block_lists,
    check_padding,
    config_value,
    linears,
    load_model,
    matrix,
)
from lewis_hub.calibration.texts import Batch, CalibrationTokens
from lewis_hub.checkpoint import names
from lewis_hub.errors import CalibrationModelError
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


def measure_shifts(
    base: Place,
    expert: Place,
    sets: Sequence[CalibrationTokens],
    device: str,
    advance: Advance,
) -> list[dict[str, float]]:
    """Measure an expert against its base on each calibration set; both models are gone on return.

    Args:
        base: what task vectors start from.
        expert: of the same architecture.
        sets: one or more; the models are loaded once for all.
        device: as torch names it; it holds both models.
        advance: called with the number of tokens done.

    Returns:
        For each set, module -> sqrt(Σ‖y_expert - y_base‖² / Σ‖y_base‖²) over all tokens, in the
        base's order: 0 where nothing differs.

    Raises:
        CalibrationModelError: a model cannot be loaded, the tokens do not fit it, or an output is
            not finite.
    """
    models = [load_model(one.folder, device, one.name) for one in (base, expert)]
    for model, one in zip(models, (base, expert), strict=True):
        for tokens in sets:
            check_tokens_fit(model, one.name, tokens)
    widths = {matrix(m).shape[1] for m in block_linears(models[0], base.name).values()}
    with threads(whole_shares(widths, torch.get_num_threads())):
        return [
            output_shifts(models[0], models[1], expert.name, tokens, advance) for tokens in sets
        ]


def output_shifts(
    base: PreTrainedModel,
    expert: PreTrainedModel,
    name: str,
    tokens: CalibrationTokens,
    advance: Advance,
) -> dict[str, float]:
    """What `measure` returns, for one set and models that are loaded.

    A module that does not see every token of a text in both models, such as a routed expert, does
    not count for that text: its rows belong to other tokens. One that never counts is left out, and
    so is one that the checkpoint does not hold as it is, or that does not return what it
    multiplied alone, as some routers. Modules have the checkpoint's names.

    Raises:
        CalibrationModelError: an output is not finite, or no module counts.
    """
    of_base, of_expert = block_linears(base, name), block_linears(expert, name)
    sums = _Sums()
    with evaluating(base), evaluating(expert), torch.no_grad():
        for ids in tokens.ids:
            text = torch.tensor([ids])
            batch = Batch(text, torch.ones_like(text))
            with _outputs(of_base, sums.hold):
                forward(base, batch)
            with _outputs(of_expert, partial(sums.compare, len(ids))):
                forward(expert, batch)
            sums.held.clear()
            advance(len(ids))
    kept = stored_names(base)
    found = {
        names.module(kept[f"{path}.weight"]): sums.shift(name, path)
        for path in of_base
        if path in sums.differences and f"{path}.weight" in kept
    }
    if not found:
        problem = "no Linear in its blocks has one output for each token of a text"
        raise CalibrationModelError(name, problem, "Use guide `lewis`, which looks at inputs.")
    return found


class _Sums:
    """Squares over the tokens of all texts; `held` are the base's outputs on the one at hand."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.differences: defaultdict[str, float] = defaultdict(float)
        self._base: defaultdict[str, float] = defaultdict(float)

    def hold(self, path: str, y: Tensor) -> None:
        self.held[path] = y.clone()  # what comes after a module may write into its output

    def compare(self, n_tokens: int, path: str, y: Tensor) -> None:
        before = self.held.pop(path, None)
        if before is not None and len(before) == len(y) == n_tokens:
            self.differences[path] += _square_sum(y - before.to(y.device))  # GPUs may differ
            self._base[path] += _square_sum(before)

    def shift(self, name: str, path: str) -> float:
        difference, base = self.differences[path], self._base[path]
        ratio = difference / base if base else float(difference > 0)
        if not isfinite(ratio):
            problem = f"the outputs of {path} are not finite"
            remedy = "Its weights may be broken, or overflow in float16: try `--device cpu`."
            raise CalibrationModelError(name, problem, remedy)
        return sqrt(ratio)


def _square_sum(y: Tensor) -> float:
    """Over all entries: float32 in a row, float64 over the rows."""
    rows = y.float().square().sum(dim=-1)
    return float(rows.sum() if rows.device.type == "mps" else rows.double().sum())


@contextmanager
def _outputs(modules: Mapping[str, Linear], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand on what each module returns, as (rows, out_features)."""
    handles = []
    try:
        for path, module in modules.items():

            def hook(_: nn.Module, _inputs: object, y: object, path: str = path) -> None:
                if isinstance(y, Tensor):
                    take(path, y.detach().reshape(-1, y.shape[-1]))

            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
