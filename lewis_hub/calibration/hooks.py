"""A model and token batches to activation norms. The only place that hooks a model."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn

from lewis_hub.calibration.determinism import ByOneDNN, threads, whole_shares
from lewis_hub.calibration.fused_experts import Products, stored_blocks, stored_names, watched
from lewis_hub.calibration.model import (
    Linear,
    block_lists,
    config_value,
    has_stacks,
    linears,
    load_model,
    matrix,
)
from lewis_hub.calibration.profile import importances, sum_of_squares
from lewis_hub.calibration.texts import Batch, CalibrationTokens, batches
from lewis_hub.errors import CalibrationModelError, EmptyCalibrationError
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class InputSum:
    """A statistic of a module's inputs, summed over `n_tokens` tokens."""

    total: Tensor
    n_tokens: int

    def __add__(self, other: InputSum) -> InputSum:
        return InputSum(self.total + other.total, self.n_tokens + other.n_tokens)

    def mean(self) -> Tensor:
        """Over the tokens, in the sum's dtype."""
        return self.total / self.n_tokens


class OutOfStepError(Exception):
    """A module's input has not one row per token, so the mask cannot say which rows count."""


class Sees(Protocol):
    """Takes the inputs of modules."""

    def see(self, path: str, x: Tensor) -> None:
        """Take the input, (..., in_features), that the module at `path` is about to be run on."""


class _Latest:
    """The tensor that was seen last, by a weak reference; another one once it was written to."""

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = -1

    def is_still(self, x: Tensor) -> bool:
        """Whether a tensor is that one, as it was."""
        return self._x is not None and self._x() is x and self._version == x._version

    def set(self, x: Tensor) -> None:
        """Remember a tensor."""
        self._x, self._version = weakref.ref(x), x._version


class Recorder:
    """Sums a statistic over the kept tokens of each module's input.

    q, k and v are handed the same tensor, and so are gate and up: summing once is most of what
    keeps the pass near the price of a plain forward. What is remembered is a weak reference and
    one sum, void once the tensor was written to; never an activation.
    """

    def __init__(self, summed: Callable[[Tensor], Tensor]) -> None:
        self.totals: dict[str, InputSum] = {}
        self._summed = summed
        self._of_batch: dict[str, InputSum] = {}
        self._n_rows = 0
        self._kept: Tensor | None = None  # flat indices of the kept tokens; None: all of them
        self._latest = _Latest()
        self._latest_sum: InputSum | None = None

    def start(self, batch: Batch) -> None:
        """Expect the inputs of a batch."""
        mask = batch.attention_mask.flatten()
        self._n_rows = len(mask)
        self._kept = None if bool(mask.all()) else mask.nonzero().flatten()
        self._of_batch = {}

    def finish(self) -> None:
        """Count the batch; one that was not finished counts for nothing."""
        made: dict[tuple[int, int], InputSum] = {}  # modules that share a sum share the next one
        for path, added in self._of_batch.items():
            before = self.totals.get(path)
            both = id(before), id(added)
            if both not in made:
                made[both] = before + added if before else added
            self.totals[path] = made[both]

    def see(self, path: str, x: Tensor) -> None:
        """Take a module's input: (..., in_features), a row for each token of the batch.

        Raises:
            OutOfStepError: it has not one row per token, and some are padding.
        """
        seen = self._sum(x)
        if seen.n_tokens:
            before = self._of_batch.get(path)
            self._of_batch[path] = before + seen if before else seen

    def _sum(self, x: Tensor) -> InputSum:
        if self._latest_sum is None or not self._latest.is_still(x):
            rows = x.detach().reshape(-1, x.shape[-1])
            if self._kept is not None:
                if len(rows) != self._n_rows:
                    raise OutOfStepError
                rows = rows.index_select(0, self._kept.to(rows.device))
            self._latest_sum = InputSum(self._summed(rows), len(rows))
            self._latest.set(x)
        return self._latest_sum


class HandedError(Exception):
    """A module is about to be run on `x`."""

    def __init__(self, x: Tensor) -> None:
        super().__init__("seen")
        self.x = x


class First:
    """Stops at the first input."""

    def see(self, path: str, x: Tensor) -> NoReturn:  # noqa: ARG002
        """Take it.

        Raises:
            HandedError: always.
        """
        raise HandedError(x)


class Order:
    """Sees in which order modules are called, and which are handed the very same tensor."""

    def __init__(self) -> None:
        self.levels: list[list[str]] = []
        self.n_rows: dict[str, list[int]] = {}  # of each call
        self._latest = _Latest()

    def see(self, path: str, x: Tensor) -> None:
        """Take a module's input."""
        calls = self.n_rows.setdefault(path, [])
        calls.append(x.numel() // x.shape[-1])
        if not self._latest.is_still(x):
            self.levels.append([])  # stays empty where those that are handed it were called before
        if len(calls) == 1:
            self.levels[-1].append(path)
        self._latest.set(x)


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
