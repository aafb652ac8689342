"""Texts that a model writes: greedy answers to prompts, or samples.

The same model, prompts and settings give the same tokens, on any number of threads: the forward
passes are those of `forward`, the batches depend on the prompts alone, and a random number is a
hash of (seed, text, step). A run that is continued gives the same tokens too, as it continues
after a whole batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lewis_hub.calibration.forward import ByOneDNN, deterministic_threads
from lewis_hub.calibration.model import block_linears, check_tokens_fit, config_value, stacks
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.display import Advance
from lewis_hub.errors import CalibrationModelError

TOGETHER = 8192  # tokens of a batch, with all that it may write: each keeps its keys and values
LESS_PADDING = 2  # at most 1 / this of the longest prompt of a batch is padding before another

Written = Mapping[int, tuple[int, ...]]  # number of a prompt -> the tokens after it


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from the most likely ones, which together have `top_p`."""

    temperature: float
    top_p: float
    seed: int


def write_texts(
    model: PreTrainedModel,
    name: str,
    prompts: CalibrationTokens,
    sampling: Sampling | None,
    known: Collection[int],
    advance: Advance,
) -> Iterator[Written]:
    """Continue prompts up to an end token, or up to the limit of a text, batch by batch.

    Args:
        model: causal LM in eval mode.
        name: of the model, for messages.
        prompts: in the model's token ids; a prompt that fills the limit gets no token.
        sampling: None takes the most likely token.
        known: numbers of prompts that were continued before. A batch of these is left out.
        advance: called with the number of tokens done, of `n_new` in all.

    Yields:
        The tokens after each prompt of a batch, without the end token.
    """
    require_writer(model, name, prompts)
    ends = end_tokens(model, prompts)
    groups = list(_batches(prompts, _most_padding(model, prompts)))
    with deterministic_threads(block_linears(model, name).values()):
        for numbers in groups:
            if not known or not set(numbers) <= set(known):
                yield _written(model, prompts, numbers, ends, sampling, advance)
            else:
                advance(n_new(prompts, numbers))


def n_new(prompts: CalibrationTokens, numbers: Collection[int] | None = None) -> int:
    """The largest number of tokens that are written after all prompts, or after some of them."""
    chosen = range(len(prompts.ids)) if numbers is None else numbers
    return sum(max(0, prompts.limit - len(prompts.ids[number])) for number in chosen)


def require_writer(model: PreTrainedModel, name: str, prompts: CalibrationTokens) -> None:
    """Refuse models that do not continue a text, and prompts that do not fit."""
    if model.config.is_encoder_decoder or not model.can_generate():
        problem = f"{type(model).__name__} does not continue a text"
        remedy = "`answers: model` and `from: model` need a causal language model: calibrate on "
        raise CalibrationModelError(name, problem, f"{remedy}texts with answers.")
    check_tokens_fit(model, name, prompts)
    n_positions = config_value(model, "max_position_embeddings")
    if prompts.limit > (n_positions or 0) > 0:
        problem = f"it is to write texts of {prompts.limit} tokens, and has {n_positions} positions"
        remedy = f"Set `max_tokens: {n_positions}`, or less, in the calibration."
        raise CalibrationModelError(name, problem, remedy)


def end_tokens(model: PreTrainedModel, prompts: CalibrationTokens) -> tuple[int, ...]:
    """The tokens that end a text: those of the generation settings, and the tokenizer's."""
    settings: GenerationConfig | None = model.generation_config
    stated = settings.eos_token_id if settings else None
    stated = config_value(model, "eos_token_id") if stated is None else stated
    listed = stated if isinstance(stated, list) else [stated]
    return tuple(sorted({one for one in (*listed, prompts.end) if type(one) is int}))


def _most_padding(model: PreTrainedModel, prompts: CalibrationTokens) -> int:
    """The most tokens that may precede a prompt.

    None where they would enter a recurrent state, or take part in the choice of experts. A batch
    runs until its shortest prompt has a whole text, so the longest one needs positions beyond.
    """
    if stacks(model) or getattr(model, "_is_stateful", False):
        return 0
    n_positions = config_value(model, "max_position_embeddings") or 0
    return n_positions - prompts.limit if n_positions > 0 else prompts.limit


def _batches(prompts: CalibrationTokens, most_padding: int) -> Iterator[list[int]]:
    """Numbers of prompts of like length, the longest first."""
    lengths = [len(ids) for ids in prompts.ids]
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    most, batch = max(1, TOGETHER // prompts.limit), list[int]()
    for number in order:
        longest = lengths[batch[0]] if batch else lengths[number]
        padding = longest - lengths[number]
        if len(batch) == most or padding > min(most_padding, longest // LESS_PADDING):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _written(
    model: PreTrainedModel,
    prompts: CalibrationTokens,
    numbers: Sequence[int],
    ends: Sequence[int],
    sampling: Sampling | None,
    advance: Advance,
) -> Written:
    """Continue the prompts of one batch, padded on the left."""
    rows = [prompts.ids[number] for number in numbers]
    width, room = max(map(len, rows)), [max(0, prompts.limit - len(ids)) for ids in rows]
    if not max(room):
        return dict.fromkeys(numbers, ())
    device = model.device
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    counted = _Counted(max(room), sum(room), advance)
    processors = [_Sampled(sampling, numbers, width)] if sampling else []
    model.generation_config = _settings()  # no penalties or limits of its own
    settings = _settings(max_new_tokens=max(room), eos_token_id=list(ends) or None)
    generate = cast("Callable[..., Tensor]", model.generate)
    with torch.no_grad(), ByOneDNN():
        made = generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([counted]),
        )
    counted.finish()
    after = made[:, width:].tolist()
    return {
        number: tuple(_before_end(tokens[:most], ends))
        for number, tokens, most in zip(numbers, after, room, strict=True)
    }


def _settings(**options: object) -> GenerationConfig:
    configuration: Callable[..., GenerationConfig] = GenerationConfig  # not typed
    return configuration(do_sample=False, use_cache=True, pad_token_id=0, **options)


def _before_end(tokens: Sequence[int], ends: Collection[int]) -> Iterator[int]:
    for token in tokens:
        if token in ends:
            return
        yield token


class _Counted(StoppingCriteria):
    """Reports each step of a batch; it never stops."""

    def __init__(self, n_steps: int, n_tokens: int, advance: Advance) -> None:
        self._n_steps, self._n_tokens, self._advance = n_steps, n_tokens, advance
        self._step, self._told = 0, 0

    def __call__(self, input_ids: Tensor, *_: object, **__: object) -> Tensor:
        """Report the share of a step."""
        self._step += 1
        self._tell(self._n_tokens * self._step // self._n_steps)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Report the steps that an early end saved."""
        self._tell(self._n_tokens)

    def _tell(self, done: int) -> None:
        self._advance(done - self._told)
        self._told = done


class _Sampled(LogitsProcessor):
    """Leaves one token of each text, drawn by nucleus sampling (arXiv:1904.09751)."""

    def __init__(self, sampling: Sampling, numbers: Sequence[int], width: int) -> None:
        self._sampling, self._numbers, self._width = sampling, numbers, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Give all other tokens a score of minus infinity."""
        step = input_ids.shape[1] - self._width
        draw = partial(uniform, self._sampling.seed, step)
        shares = torch.tensor([draw(number) for number in self._numbers], dtype=torch.float64)
        chosen = nucleus(scores.cpu(), self._sampling.temperature, self._sampling.top_p, shares)
        left = torch.full_like(scores, -torch.inf)
        return left.scatter(1, chosen.to(scores.device)[:, None], 0.0)


def uniform(seed: int, step: int, number: int) -> float:
    """A number in [0, 1): blake2b-64 of the text "seed:number:step", over 2^64."""
    digest = hashlib.blake2b(f"{seed}:{number}:{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)


def nucleus(logits: Tensor, temperature: float, top_p: float, shares: Tensor) -> Tensor:
    """Draw a token per row from the fewest most likely ones with a probability of `top_p` or more.

    Args:
        logits: (n_texts, n_vocabulary).
        temperature: divides the logits.
        top_p: in (0, 1].
        shares: (n_texts,) float64 in [0, 1): the token is where the cumulative probability of the
            nucleus, in the order of probability, exceeds this share of it.

    Returns:
        (n_texts,) int64.
    """
    likely = (logits.double() / temperature).softmax(dim=1)
    likely, order = likely.sort(dim=1, descending=True, stable=True)
    total = likely.cumsum(dim=1)
    kept = (total - likely < top_p).sum(dim=1, keepdim=True)
    target = shares[:, None] * total.gather(1, kept - 1)
    place = (total <= target).sum(dim=1, keepdim=True).minimum(kept - 1)
    return order.gather(1, place)[:, 0]
