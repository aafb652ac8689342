"""Forward passes of texts: through a whole model, or through one of its blocks at a time.

The own loop of a decoder, or encoder, runs once for each batch, with blocks that compute nothing,
and shows what it calls each block with. After that a block needs its weights, the hidden states and
those arguments.

Both ways give equal bytes on any number of threads. torch gives each thread an equal share of a
tensor and works on it by pairs of vectors; the rest of a share takes another path, on which an
activation function may round otherwise. Shares of whole pairs have no rest. Matrices are multiplied
by oneDNN, which, unlike MKL, adds up each output in one order whatever the number of threads, and
is faster on AMD's processors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from math import gcd
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from lewis_hub.calibration.hooks import ProductRecorder
from lewis_hub.calibration.meta_model import SHARES, UNCHAINED, MetaModel
from lewis_hub.calibration.model import Linear, config_value, matrix
from lewis_hub.calibration.subject import FEWER, HELD_BYTES, STATES
from lewis_hub.calibration.texts import TokenBatch
from lewis_hub.errors import NotByBlockError, OutputError
from lewis_hub.evaluate.short_text import limited_batch
from lewis_hub.files import require_room
from lewis_hub.methods.numerics import torch_threads

PAIR = 32  # float32 numbers in two of a CPU's widest vectors, AVX-512
SEVERAL = (tuple, list)  # types that a block may return, hidden states first; no subclasses

RunModel = Callable[[TokenBatch], None]
Further = Callable[[], tuple[Any, ...] | None]  # what blocks return after the hidden states


def whole_shares(widths: Iterable[int], available: int) -> int:
    """The most threads, a power of two, that split every row into shares of whole pairs.

    `widths` are numbers of features that activation functions work on.
    """
    width = gcd(*widths)
    n_threads = 1
    while 2 * n_threads <= available and width % (2 * n_threads * PAIR) == 0:
        n_threads *= 2
    return n_threads


@contextmanager
def deterministic_threads(modules: Iterable[Linear]) -> Iterator[None]:
    """Limit torch to as many threads as leave the result of a model's forward pass unchanged."""
    widths = {matrix(module).shape[1] for module in modules}
    with torch_threads(whole_shares(widths, torch.get_num_threads())):
        yield


class ByOneDNN(TorchFunctionMode):
    """A context manager without gradients: inside it Linears and Conv1Ds multiply by `by_rows`.

    So do slices of a parameter that are multiplied as a Linear's weight.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch's, or `by_rows` in its place."""
        if func is torch.addmm and not kwargs and args[0].dim() == 1:  # as Conv1D multiplies
            bias, rows, weight = args
            return by_rows(rows, weight.T, bias)
        return (by_rows if func is linear else func)(*args, **(kwargs or {}))


def by_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """`torch.nn.functional.linear` without gradients, by oneDNN in float32 on a CPU that has it."""
    if weight.is_meta and not input.is_meta:
        raise RuntimeError("a weight that is on meta has no values")  # torch returns nonsense
    on_cpu = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
    fits = input.numel() > 0 and input.shape[-1] == weight.shape[-1]
    fits = fits and (bias is None or bias.is_contiguous())  # oneDNN reads the next bytes instead
    if not (on_cpu and fits and has_onednn() and _is_plain(weight)):
        return linear(input, weight, bias)
    multiply = _without_copies()
    if multiply is None or input.numel() == input.shape[-1]:  # one row: it may round otherwise
        return linear(input.to_mkldnn(), weight, bias).to_dense()
    return multiply(input, weight, bias, "none", [], "")


@cache
def _without_copies() -> Callable[..., Tensor] | None:
    """The product by oneDNN for torch's compiler, without copies of rows.

    It has the same bytes with AVX2; with AVX-512 nobody has looked.
    """
    backends: Any = torch.backends  # not all typed
    if backends.cpu.get_cpu_capability() != "AVX2":
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _is_plain(weight: Tensor) -> bool:
    """Whether it is a matrix, not a subclass, in a layout that oneDNN's kernels take."""
    is_dense = weight.is_contiguous() or weight.T.is_contiguous()
    return weight.dim() == 2 and is_dense and type(weight) in (Tensor, Parameter)


@cache
def has_onednn() -> bool:
    """Whether torch has oneDNN for this processor."""
    backends: Any = torch.backends  # not all typed
    has_avx = backends.cpu.get_cpu_capability().startswith("AVX")
    return bool(has_avx and backends.mkldnn.is_available())


def forward(
    model: PreTrainedModel,
    batch: TokenBatch,
    products: ProductRecorder | None = None,
    encoded: Tensor | None = None,
) -> None:
    """Run the blocks, if possible without the head, whose output is not needed.

    A decoder after an encoder gets the same text, shifted to the right by one token. `encoded` is
    the output of the encoder, which then does not run.
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
        if encoded is not None:
            options["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
    options = {key: value for key, value in options.items() if key in accepted}
    # `products` is innermost, as it must see a Linear's own factors
    with torch.no_grad(), ByOneDNN(), products or nullcontext():
        body(input_ids=ids, attention_mask=mask, **options)


class ReachedError(Exception):
    """Leaves a forward pass; `value` is the input or the output of the module that it reached."""

    def __init__(self, value: Any) -> None:
        super().__init__("a module was reached")
        self.value = value


def block_output(block: nn.Module, run: Callable[[], None]) -> list[Any]:
    """The output of a block in a list, empty if the forward pass `run` does not reach the block."""

    def leave(_: nn.Module, _inputs: object, returned: Any) -> None:
        raise ReachedError(returned)

    with block.register_forward_hook(leave):
        try:
            run()
        except ReachedError as reached:
            return [reached.value]
    return []


@dataclass(frozen=True)
class _Slot:
    """Where a tensor is in the file; `reserved_bytes` may be more than it takes."""

    start: int
    reserved_bytes: int
    like: Tensor  # on meta
    device: torch.device


class ActivationCache:
    """Hidden states by number, on disk if all together take more than HELD_BYTES.

    The file has no name, so that it is deleted however the process ends. Tensors are read and
    written, not mapped, as mapped pages would count as the process's memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path(gettempdir())
        self._file = SpooledTemporaryFile(HELD_BYTES, dir=str(self._folder))  # noqa: SIM115
        self._slots: list[_Slot] = []
        self._end = 0

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def require_room(self, n_bytes: int) -> None:
        """Refuse `n_bytes` more, with an OutputError, if the disk has no room for them."""
        if self._end + n_bytes > HELD_BYTES:
            require_room(self._folder, n_bytes, STATES, FEWER)

    def add(self, tensor: Tensor) -> int:
        """Store a tensor; returns its number."""
        self._slots.append(_Slot(self._end, 0, tensor, tensor.device))
        self.write(len(self._slots) - 1, tensor)
        return len(self._slots) - 1

    def read(self, number: int) -> Tensor:
        """A copy of the tensor with a number."""
        slot = self._slots[number]
        tensor = torch.empty_like(slot.like, device="cpu")
        self._file.seek(slot.start)
        self._file.readinto(_bytes(tensor))
        return tensor.to(slot.device)

    def write(self, number: int, tensor: Tensor) -> None:
        """Replace the tensor with a number."""
        slot = replace(self._slots[number], like=tensor.to("meta"), device=tensor.device)
        if tensor.nbytes > slot.reserved_bytes:  # the first block may return a wider dtype
            slot = replace(slot, start=self._end, reserved_bytes=tensor.nbytes)
            self._end += tensor.nbytes
        self._slots[number] = slot
        try:
            self._file.seek(slot.start)
            self._file.write(_bytes(torch.empty_like(slot.like, device="cpu").copy_(tensor)))
        except OSError as error:
            problem = f"{STATES} cannot be written: {error.strerror}."
            remedy = f"Free some space, or {FEWER}."
            raise OutputError(str(self._folder), problem, remedy) from None


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a dense tensor on the CPU, in their order in memory."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


class NotAChainError(Exception):
    """The decoder does not give each block exactly what the block before it returned."""


# (block, hidden states) -> what the block returns with the arguments that the decoder gave it
BlockCall = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True)
class Entry:
    """How a batch gets to the blocks of a model, and what they return beside hidden states."""

    model: MetaModel
    batch: TokenBatch
    run_model: RunModel  # runs the batch through the stack of blocks
    further: Further  # None: they return hidden states alone
    is_constant: bool  # whether `further` does not depend on hidden states

    def enter(self) -> tuple[Tensor, list[BlockCall]]:
        """The input of the first block, and what each block is called with."""
        blocks = list(self.model.blocks)
        return enter(
            blocks, self.batch, self.run_model, self.further(), is_constant=self.is_constant
        )

    def leave(self, hidden: Tensor) -> Tensor:
        """The output of the stack for the output of its last block."""
        further = self.further()
        returned = hidden if further is None else (hidden, *further)
        with replaced_forwards(list(self.model.blocks), lambda _: lambda *_a, **_n: returned):
            [output] = block_output(self.model.stack, partial(self.run_model, self.batch))
        return _hidden_of([output[0]])


@dataclass
class BatchState:
    """A batch of texts before a block of a model."""

    entry: Entry
    cache: ActivationCache  # holds the block's input, (n_texts, n_tokens, width), under `key`
    key: int
    number: int = 0  # of the block

    @property
    def model(self) -> MetaModel:
        """The model."""
        return self.entry.model

    @property
    def batch(self) -> TokenBatch:
        """The texts."""
        return self.entry.batch

    @property
    def block(self) -> nn.Module:
        """The block, which has its weights when it is run."""
        return self.model.blocks[self.number]

    @property
    def path(self) -> str:
        """The path of the block in the model."""
        return f"{self.model.path}.{self.number}"

    @property
    def n_tokens(self) -> int:
        """The number of tokens without padding."""
        return int(self.batch.attention_mask.sum())

    def run(self, products: ProductRecorder | None = None) -> Tensor:
        """The hidden states after the block; the texts stay before it."""
        n_tokens = self.batch.input_ids.numel()
        limits = limited_batch(self.model.name, self.model.stack, n_tokens)
        with torch.no_grad(), _chain_errors(self.model), limits:
            call = self.entry.enter()[1][self.number]
            with ByOneDNN(), products or nullcontext():
                return _hidden_of(call(self.block, self.cache.read(self.key)))

    def move(self, hidden: Tensor) -> None:
        """Go on to the next block, with its input."""
        self.cache.write(self.key, hidden)
        self.number += 1

    def leave(self) -> None:
        """Replace the hidden states after the last block by the output of the stack."""
        with torch.no_grad(), _chain_errors(self.model):
            self.cache.write(self.key, self.entry.leave(self.cache.read(self.key)))


def enter_blocks(
    model: MetaModel,
    groups: Sequence[Sequence[TokenBatch]],
    cache: ActivationCache,
    encoded: Sequence[Sequence[BatchState]] = (),
) -> list[list[BatchState]]:
    """Run all batches up to the first block; the model has the weights of all before it.

    `encoded` are the batches behind the encoder, for the decoder of an encoder-decoder. It is an
    OutputError if the disk has no room for the hidden states, and a NotByBlockError if the decoder
    is not a chain of blocks.
    """

    def run_of(before: BatchState | None) -> RunModel:
        if before is None:
            return partial(forward, model.stack)
        return lambda batch: forward(model.stack, batch, encoded=before.cache.read(before.key))

    befores: Sequence[Sequence[BatchState | None]]
    befores = encoded or [[None] * len(group) for group in groups]
    blocks, first, run = list(model.blocks), groups[0][0], run_of(befores[0][0])
    with _chain_errors(model):
        with limited_batch(model.name, model.stack, first.input_ids.numel()):
            rest = further_outputs(blocks, first, run)
            is_constant = rest is not None and are_constant(blocks, first, run, rest)

        def state(batch: TokenBatch, before: BatchState | None) -> BatchState:
            run = run_of(before)
            further = _kept(further_outputs(blocks, batch, run), cache) if is_constant else None
            entry = Entry(model, batch, run, further or (lambda: rest), is_constant)
            return BatchState(entry, cache, cache.add(entry.enter()[0]))

        with limited_batch(model.name, model.stack, first.input_ids.numel()):
            entered = enter(blocks, first, run, rest, is_constant=is_constant)
        token_bytes = entered[0].nbytes // first.input_ids.numel()
        n_tokens = sum(batch.input_ids.numel() for group in groups for batch in group)
        cache.require_room(token_bytes * n_tokens)
        return [
            [state(*one) for one in zip(group, before, strict=True)]
            for group, before in zip(groups, befores, strict=True)
        ]


def _kept(further: tuple[Any, ...] | None, cache: ActivationCache) -> Further:
    """A function that returns further outputs, whose tensors are in the cache."""
    numbers = [cache.add(one) if isinstance(one, Tensor) else None for one in further or ()]
    return lambda: tuple(None if number is None else cache.read(number) for number in numbers)


@contextmanager
def _chain_errors(model: MetaModel) -> Iterator[None]:
    """Explain why a decoder cannot be run block by block."""
    try:
        yield
    except (NotAChainError, RuntimeError) as error:
        if not isinstance(error, NotAChainError) and "meta" not in str(error):
            raise
        problem = SHARES if error.args == (SHARES,) else UNCHAINED
        raise NotByBlockError(model.name, problem, model.weights.remedy) from error


def further_outputs(
    blocks: Sequence[nn.Module], batch: TokenBatch, run: RunModel
) -> tuple[Any, ...] | None:
    """What the first block returns after the hidden states; None if it returns them alone.

    A NotAChainError says that it is never called, or returns something else.
    """
    outputs = block_output(blocks[0], partial(run, batch))
    if not outputs:
        raise NotAChainError
    _hidden_of(outputs[0])
    return tuple(outputs[0][1:]) if type(outputs[0]) in SEVERAL else None


def are_constant(
    blocks: Sequence[nn.Module], batch: TokenBatch, run: RunModel, further: tuple[Any, ...]
) -> bool:
    """Whether further outputs of the first block stay the same for other hidden states."""

    def change(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if args:
            return (args[0].flip(-1), *args[1:]), named
        keyword = next(iter(named))  # a norm would undo a factor, not another order of features
        return args, {**named, keyword: named[keyword].flip(-1)}

    if not any(isinstance(one, Tensor) for one in further):
        return False
    with blocks[0].register_forward_pre_hook(change, with_kwargs=True):
        others = further_outputs(blocks, batch, run) or ()
    return len(others) == len(further) and all(
        torch.equal(one, other) if isinstance(one, Tensor) else one is None
        for one, other in zip(further, others, strict=True)
    )


def enter(
    blocks: Sequence[nn.Module],
    batch: TokenBatch,
    run: RunModel,
    rest: tuple[Any, ...] | None,
    *,
    is_constant: bool = False,
) -> tuple[Tensor, list[BlockCall]]:
    """Run a batch up to the first block, and record what each block is called with.

    The stack's blocks compute nothing here; all modules outside them have their weights. `rest`
    is from `further_outputs`. A NotAChainError says that a block is left out, called twice, called
    with hidden states that the block before it did not return, or with further outputs of it,
    unless these do not depend on hidden states (`is_constant`).
    """
    calls: list[BlockCall] = []
    hiddens: list[Tensor] = []
    variable = () if is_constant else [one for one in rest or () if one is not None]

    def recorder(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **named: Any) -> Any:
            hidden, *others = (*args, *named.values())
            if number < len(calls):
                raise NotAChainError(SHARES)
            leaks = any(one is value for one in variable for value in others)
            if number > len(calls) or leaks or any(hidden is not one for one in hiddens):
                raise NotAChainError
            calls.append(_block_call(args, named))
            hiddens[:] = [hidden]
            return hidden if rest is None else (hidden, *rest)

        return forward

    with replaced_forwards(blocks, recorder):
        run(batch)
    if len(calls) != len(blocks):
        raise NotAChainError
    return hiddens[0], calls


@contextmanager
def replaced_forwards(
    blocks: Sequence[nn.Module], forward_of: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Other `forward` functions inside the context; the blocks keep all other attributes."""
    try:
        for number, block in enumerate(blocks):
            vars(block)["forward"] = forward_of(number)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _block_call(args: tuple[Any, ...], named: Mapping[str, Any]) -> BlockCall:
    """Call a block again with all arguments but the first, which are its hidden states."""
    if args:
        positional = args[1:]
        return lambda block, hidden: block(hidden, *positional, **named)
    keyword, *others = named
    kept = {name: named[name] for name in others}
    return lambda block, hidden: block(**{keyword: hidden}, **kept)


def _hidden_of(returned: Any) -> Tensor:
    hidden = returned[0] if type(returned) in SEVERAL and returned else returned
    if not isinstance(hidden, Tensor):
        raise NotAChainError
    return hidden
