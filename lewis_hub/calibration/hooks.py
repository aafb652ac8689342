"""Hooks that record the inputs of a model's Linears."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn

from lewis_hub.calibration.determinism import ByOneDNN
from lewis_hub.calibration.model import Linear, block_lists, config_value, linears
from lewis_hub.calibration.texts import CalibrationTokens, TokenBatch, batches
from lewis_hub.errors import CalibrationModelError, EmptyCalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lewis_hub.calibration.moe import ProductRecorder


Statistic = Callable[[Tensor], Tensor]  # (n_tokens, in_features) -> its sum over the tokens


@dataclass(frozen=True)
class InputSum:
    """A statistic of a module's inputs, summed over `n_tokens` tokens."""

    total: Tensor
    n_tokens: int

    def __add__(self, other: InputSum) -> InputSum:
        return InputSum(self.total + other.total, self.n_tokens + other.n_tokens)

    def mean(self) -> Tensor:
        """The mean over the tokens, in the sum's dtype."""
        return self.total / self.n_tokens


class OutOfStepError(Exception):
    """A module's input has not one row per token, so the mask cannot say which rows count."""


class InputObserver(Protocol):
    """Takes the inputs of modules."""

    def see(self, path: str, x: Tensor) -> None:
        """Take the input, (..., in_features), of the module at `path`, before it runs."""


class _LastTensor:
    """The last tensor, as a weak reference; a tensor that was written to since is another one."""

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = -1

    def is_still(self, x: Tensor) -> bool:
        """Whether a tensor is the last one, unchanged."""
        return self._x is not None and self._x() is x and self._version == x._version

    def set(self, x: Tensor) -> None:
        """Remember a tensor."""
        self._x, self._version = weakref.ref(x), x._version


class InputRecorder:
    """Sums a statistic over the kept tokens of each module's input.

    q, k and v have the same input tensor, and so have gate and up: computing the sum once keeps the
    pass near the price of a plain forward. Only a weak reference and one sum are kept for this,
    never an activation.
    """

    def __init__(self, statistic: Statistic) -> None:
        self.totals: dict[str, InputSum] = {}
        self._statistic = statistic
        self._of_batch: dict[str, InputSum] = {}
        self._n_rows = 0
        self._kept: Tensor | None = None  # flat indices of the kept tokens; None: all of them
        self._last = _LastTensor()
        self._last_sum: InputSum | None = None

    def start(self, batch: TokenBatch) -> None:
        """Prepare for the inputs of a batch."""
        mask = batch.attention_mask.flatten()
        self._n_rows = len(mask)
        self._kept = None if bool(mask.all()) else mask.nonzero().flatten()
        self._of_batch = {}

    def finish(self) -> None:
        """Add the batch to the totals; a batch that was not finished does not count."""
        made: dict[tuple[int, int], InputSum] = {}  # modules that share a sum share the next one
        for path, added in self._of_batch.items():
            before = self.totals.get(path)
            both = id(before), id(added)
            if both not in made:
                made[both] = before + added if before else added
            self.totals[path] = made[both]

    def see(self, path: str, x: Tensor) -> None:
        """Add a module's input: (..., in_features), a row for each token of the batch.

        Raises:
            OutOfStepError: it has not one row per token, and some tokens are padding.
        """
        added = self._sum(x)
        if added.n_tokens:
            before = self._of_batch.get(path)
            self._of_batch[path] = before + added if before else added

    def _sum(self, x: Tensor) -> InputSum:
        if self._last_sum is None or not self._last.is_still(x):
            rows = x.detach().reshape(-1, x.shape[-1])
            if self._kept is not None:
                if len(rows) != self._n_rows:
                    raise OutOfStepError
                rows = rows.index_select(0, self._kept.to(rows.device))
            self._last_sum = InputSum(self._statistic(rows), len(rows))
            self._last.set(x)
        return self._last_sum


class FirstInputError(Exception):
    """Leaves a forward pass; `x` is the input of the module that would run next."""

    def __init__(self, x: Tensor) -> None:
        super().__init__("a module's input was reached")
        self.x = x


class FirstInput:
    """Stops the forward pass at the first input."""

    def see(self, path: str, x: Tensor) -> NoReturn:  # noqa: ARG002
        """Stop.

        Raises:
            FirstInputError: always.
        """
        raise FirstInputError(x)


class CallOrder:
    """Records in which order modules are called, and which have the same input tensor."""

    def __init__(self) -> None:
        self.levels: list[list[str]] = []
        self.n_rows: dict[str, list[int]] = {}  # path -> rows of each call
        self._last = _LastTensor()

    def see(self, path: str, x: Tensor) -> None:
        """Record a call."""
        calls = self.n_rows.setdefault(path, [])
        calls.append(x.numel() // x.shape[-1])
        if not self._last.is_still(x):
            self.levels.append([])  # stays empty if all its modules were called before
        if len(calls) == 1:
            self.levels[-1].append(path)
        self._last.set(x)


@contextmanager
def hooked(modules: Mapping[str, Linear], *observers: InputObserver) -> Iterator[None]:
    """Show the inputs of modules, by their paths, to observers inside the context."""
    handles = []
    try:
        for path, module in modules.items():
            for observer in observers:
                hook = _input_hook(path, observer)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(path: str, observer: InputObserver) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        observer.see(path, args[0] if args else next(iter(named.values())))

    return hook


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the context; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def forward(
    model: PreTrainedModel, batch: TokenBatch, products: ProductRecorder | None = None
) -> None:
    """Run the blocks, if possible without the head, whose output is not needed.

    A decoder after an encoder gets the same text, shifted to the right by one token. `products`
    sees the products of parameters that no Linear owns.
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
    with ByOneDNN(), products or nullcontext():  # `products` must see a Linear's own factors
        body(input_ids=ids, attention_mask=mask, **options)


def block_linears(model: nn.Module, name: str) -> dict[str, Linear]:
    """Every Linear of a block by its path; a module with two paths has the first.

    Raises:
        CalibrationModelError: there is none; `name` is the source for the message.
    """
    found: dict[str, Linear] = {}
    for path, blocks in block_lists(model).items():
        found |= linears(path, blocks)
    if not found:
        problem = "no Linear module in a list of blocks was found"
        remedy = "Importance is measured on those; use guide `uniform` for this architecture."
        raise CalibrationModelError(name, problem, remedy)
    return found


def check_tokens_fit(model: PreTrainedModel, name: str, tokens: CalibrationTokens) -> None:
    """Refuse token ids and lengths without an embedding with a CalibrationModelError."""
    n_rows = len(cast("Tensor", model.get_input_embeddings().weight))
    highest = max(map(max, tokens.ids))
    if highest >= n_rows:
        problem = f"token {highest} of {tokens.tokenizer} is not among its {n_rows} embeddings"
        remedy = "Calibrate with the tokenizer that base and experts share."
        raise CalibrationModelError(name, problem, remedy)
    n_positions = config_value(model, "max_position_embeddings")
    longest = max(map(len, tokens.ids))
    if longest > (n_positions or 0) > 0:  # -1 stands for "no limit" in some configurations
        problem = f"a calibration text has {longest} tokens, the model {n_positions} positions"
        remedy = f"Set `max_tokens: {n_positions}`, or less, in the calibration."
        raise CalibrationModelError(name, problem, remedy)


def require_seen(measured: Mapping[str, object], name: str) -> None:
    """Refuse an empty measurement of the source `name` with an EmptyCalibrationError."""
    if not measured:
        remedy = "Choose calibration data with texts in it."
        raise EmptyCalibrationError(name, "no calibration token reached a block", remedy)


def require_finite(totals: Mapping[str, InputSum], name: str) -> None:
    """Refuse sums that are NaN or infinite with a CalibrationModelError."""
    for path, one in totals.items():
        if not torch.isfinite(one.total).all():
            problem = f"the activations before {path} are not finite"
            remedy = "Its weights may be broken, or overflow in float16: try `--device cpu`."
            raise CalibrationModelError(name, problem, remedy)


def unpadded(batch: TokenBatch) -> Iterator[TokenBatch]:
    """Split into batches of texts of equal length."""
    lengths = batch.attention_mask.sum(dim=1)
    for length in sorted(set(lengths.tolist()) - {0}):
        texts = lengths == length
        yield TokenBatch(batch.input_ids[texts, :length], batch.attention_mask[texts, :length])


def unpadded_batches(tokens: CalibrationTokens) -> Iterator[TokenBatch]:
    """Batches without padding."""
    for batch in batches(tokens):
        yield from unpadded(batch)
