"""A model and token batches to activation norms. The only place that hooks a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lewis_hub.errors import CalibrationModelError, EmptyCalibrationError
from lewis_hub.guides.blocks import Linear, block_lists, has_stacks, linears, matrix
from lewis_hub.guides.importance import importances, sum_of_squares
from lewis_hub.guides.loading import config_value, load_model
from lewis_hub.guides.onednn import ByOneDNN
from lewis_hub.guides.products import Products, watched
from lewis_hub.guides.recording import InputSum, OutOfStepError, Recorder, Sees
from lewis_hub.guides.stored import stored_blocks, stored_names
from lewis_hub.guides.threads import threads, whole_shares
from lewis_hub.guides.tokens import Batch, CalibrationTokens, batches
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (module -> weight, module -> activation norms), of whole blocks -> module -> its number. Norms are
# (in_features,) for a weight (out_features, in_features), or one for each entry of the weight.
Summary = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, float]]

N_TRIED = 8  # tokens that show what a model multiplies


def measure(
    folder: Path,
    name: str,
    sets: Sequence[CalibrationTokens],
    device: str,
    advance: Advance,
    summarise: Summary = importances,
) -> list[dict[str, float]]:
    """Measure one source on each calibration set; its model is gone on return.

    Args:
        folder: a complete local snapshot of the source.
        name: the source as the user knows it, for messages.
        sets: one or more; the model is loaded once for all.
        device: as torch names it.
        advance: called with the number of tokens done.
        summarise: makes one number a module of weights and activation norms.

    Returns:
        For each set, module -> its number, in the model's order: modules as the checkpoint stores
        them. One that saw no token, such as an expert that none was routed to, is not in it.

    Raises:
        CalibrationModelError: it cannot be loaded, the tokens do not fit it, or its activations
            are not finite.
    """
    model = load_model(folder, device, name)
    modules = block_linears(model, name)
    widths = {matrix(module).shape[1] for module in modules.values()}
    measured, kept = [], stored_names(model)
    grouped = alone if has_stacks(model) else batches
    with threads(whole_shares(widths, torch.get_num_threads())):
        for tokens in sets:
            check_tokens_fit(model, name, tokens)
            ids = torch.tensor([tokens.ids[0][:N_TRIED]])
            products = watched(model, partial(forward, model, Batch(ids, torch.ones_like(ids))))
            norms = activation_norms(model, name, grouped(tokens), advance, products)
            found: dict[str, float] = {}
            met = (model.named_parameters(), modules, norms, products, tokens.n_tokens, kept)
            for block in stored_blocks(model, *met):
                found |= summarise(block.weights, block.norms)
            measured.append(found)
    return measured


def check_tokens_fit(model: PreTrainedModel, name: str, tokens: CalibrationTokens) -> None:
    """Refuse token ids and lengths that the model has no embedding for."""
    n_rows = len(cast("Tensor", model.get_input_embeddings().weight))
    highest = max(map(max, tokens.ids))
    if highest >= n_rows:
        problem = f"token {highest} of {tokens.tokenizer} is not among its {n_rows} embeddings"
        remedy = "Calibrate with the tokenizer that base and experts share."
        raise CalibrationModelError(name, problem, remedy)
    n_positions = config_value(model, "max_position_embeddings")
    longest = max(map(len, tokens.ids))
    if longest > (n_positions or 0) > 0:  # some say -1, and mean that there is no end
        problem = f"a calibration text has {longest} tokens, the model {n_positions} positions"
        remedy = f"Set `max_tokens: {n_positions}`, or less, in the calibration."
        raise CalibrationModelError(name, problem, remedy)


def activation_norms(
    model: PreTrainedModel,
    name: str,
    calibration: Iterable[Batch],
    advance: Advance,
    products: Products | None = None,
) -> dict[str, Tensor]:
    """Measure how strongly calibration tokens drive each input feature of each Linear of a block.

    The root of the mean square over the tokens that the mask keeps: a_j = sqrt(mean_t x_tj²). A
    token that a module does not see counts as zero there, so that a routed expert has weight
    according to the tokens that are routed to it.

    Args:
        model: causal language model; its mode, gradients and hooks are left as they were.
        name: the source as the user knows it, for messages.
        calibration: batches of texts, padded on the right.
        advance: called with the number of kept tokens after each batch.
        products: sees the same tokens where parameters that no Linear owns are multiplied.

    Returns:
        Module -> (in_features,) float32 on the module's device, in the model's order. A module
        that saw no token is not in it.

    Raises:
        EmptyCalibrationError: no batch, or no token is kept.
        CalibrationModelError: no Linear in a block, or a norm that is not finite.

    Source:
        Wanda, arXiv:2306.11695, measures the same up to a factor; padding counts in the published
        LEWIS code and does not here.
    """
    calibration = list(calibration)
    n_tokens = sum(int(batch.attention_mask.sum()) for batch in calibration)
    modules = block_linears(model, name)
    totals = input_sums(model, name, modules, calibration, sum_of_squares, advance, products)
    return norms_of(totals, n_tokens)


def norms_of(totals: Mapping[str, InputSum], n_tokens: int) -> dict[str, Tensor]:
    """The root of the mean square over all tokens, of sums of squares by the path of a module."""
    return {path: (one.total / n_tokens).sqrt().float() for path, one in totals.items()}


def input_sums(  # noqa: PLR0913
    model: PreTrainedModel,
    name: str,
    modules: Mapping[str, Linear],
    calibration: Iterable[Batch],
    summed: Callable[[Tensor], Tensor],
    advance: Advance,
    products: Products | None = None,
) -> dict[str, InputSum]:
    """Sum a statistic over the inputs of modules, of the tokens that the mask keeps.

    Args:
        model: its mode, gradients and hooks are left as they were.
        name: the source as the user knows it, for messages.
        modules: path -> module of the model.
        calibration: batches of texts, padded on the right.
        summed: (n_tokens, in_features) -> the sum over the tokens.
        advance: called with the number of kept tokens after each batch.
        products: sees the same tokens where parameters that no Linear owns are multiplied.

    Returns:
        In the model's order, for the modules that saw a token. Those that were handed the very same
        inputs share one sum.

    Raises:
        EmptyCalibrationError: no batch, or no token is kept.
        CalibrationModelError: a sum that is not finite.
    """
    recorder = Recorder(summed)
    with hooked(modules, recorder), evaluating(model), torch.no_grad():
        for batch in calibration:
            _observe(model, batch, recorder, products)
            advance(int(batch.attention_mask.sum()))
    require_seen(recorder.totals, name)
    require_finite(recorder.totals, name)
    return recorder.totals


def require_seen(found: Mapping[str, object], name: str) -> None:
    """Refuse that nothing was measured."""
    if not found:
        remedy = "Choose calibration data with texts in it."
        raise EmptyCalibrationError(name, "no calibration token reached a block", remedy)


def require_finite(totals: Mapping[str, InputSum], name: str) -> None:
    """Refuse sums that say nothing."""
    for path, one in totals.items():
        if not torch.isfinite(one.total).all():
            problem = f"the activations before {path} are not finite"
            remedy = "Its weights may be broken, or overflow in float16: try `--device cpu`."
            raise CalibrationModelError(name, problem, remedy)


def block_linears(model: nn.Module, name: str) -> dict[str, Linear]:
    """Every Linear of a block by its path; a module under two paths goes by the first."""
    found: dict[str, Linear] = {}
    for path, blocks in block_lists(model).items():
        found |= linears(path, blocks)
    if not found:
        problem = "no Linear module in a list of blocks was found"
        remedy = "Importance is measured on those; use guide `uniform` for this architecture."
        raise CalibrationModelError(name, problem, remedy)
    return found


def _observe(
    model: PreTrainedModel, batch: Batch, recorder: Recorder, products: Products | None
) -> None:
    """Run one batch; without padding where there are products, or a module regroups the tokens."""
    if products is None:
        try:
            recorder.start(batch)
            forward(model, batch)
            recorder.finish()
            return
        except OutOfStepError:
            pass
    for part in unpadded(batch):
        recorder.start(part)
        with products or nullcontext():
            forward(model, part)
        recorder.finish()


def unpadded(batch: Batch) -> Iterator[Batch]:
    """Split into batches of texts of one length."""
    lengths = batch.attention_mask.sum(dim=1)
    for length in sorted(set(lengths.tolist()) - {0}):
        texts = lengths == length
        yield Batch(batch.input_ids[texts, :length], batch.attention_mask[texts, :length])


def alone(tokens: CalibrationTokens) -> Iterator[Batch]:
    """Batches without padding."""
    for batch in batches(tokens):
        yield from unpadded(batch)


def forward(model: PreTrainedModel, batch: Batch) -> None:
    """Run the blocks, without the head where that can be: it costs, and is not asked.

    A decoder that stands after an encoder gets the same text, one place to the right.
    """
    body = model.base_model
    accepted = inspect.signature(type(body).forward).parameters
    device = next(one.device for one in model.parameters() if not one.is_meta)
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    if "decoder_input_ids" in accepted:
        start = config_value(model, "decoder_start_token_id") or 0
        shifted = ids.roll(1, dims=1)
        shifted[:, 0] = start
        options |= {"decoder_input_ids": shifted, "decoder_attention_mask": mask}
    options = {key: value for key, value in options.items() if key in accepted}
    with ByOneDNN():
        body(input_ids=ids, attention_mask=mask, **options)


@contextmanager
def hooked(modules: Mapping[str, Linear], *recorders: Sees) -> Iterator[None]:
    """Let recorders see the inputs of modules, by their paths, for the time being."""
    handles = []
    try:
        for path, module in modules.items():
            for recorder in recorders:
                hook = _input_hook(path, recorder)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(path: str, recorder: Sees) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        recorder.see(path, args[0] if args else next(iter(named.values())))

    return hook


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time being; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
