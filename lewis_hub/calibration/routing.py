"""Router weights of a mixture of experts, from prompts or at random.

A router scores each expert by the product of its row with a token's hidden state. So the row of an
expert is the direction of the hidden states that the base has on the expert's prompts, minus that
of its negative prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import cache
from math import inf

import numpy as np
import torch
from torch import Tensor

from lewis_hub.calibration.forward import ActivationCache, deterministic_threads, enter_blocks
from lewis_hub.calibration.meta_model import build_meta_model
from lewis_hub.calibration.model import check_rows, check_tokens_fit, linears, load_tokenizer
from lewis_hub.calibration.subject import Weights
from lewis_hub.calibration.texts import CalibrationTokens, TokenBatch
from lewis_hub.checkpoint import names
from lewis_hub.errors import CalibrationError
from lewis_hub.kernels import random_bits
from lewis_hub.recipe.mixture import GateMode, RoutedExpert
from lewis_hub.tokenizer import token_ids

SMALLEST = 1e-8  # a shorter vector is not made longer, as in mergekit

Ids = tuple[int, ...]


def prompt_rows(
    weights: Weights, experts: Sequence[RoutedExpert], mode: GateMode, device: str
) -> Tensor:
    """The router's row of each expert in each block, by the base's hidden states or embeddings.

    Args:
        weights: of the base, which is run block by block.
        experts: with their prompts.
        mode: `cheap_embed`: the sum of the embeddings of all prompts' tokens, the same in all
            blocks. `hidden_avg`: the mean hidden state before the block, over all tokens of a
            prompt. `hidden` and `hidden_last`: that of a prompt's last token.
        device: torch device of the forward pass.

    Returns:
        (n_blocks, n_experts, hidden_size) float32, each row of length 1.

    Raises:
        CalibrationError: the base cannot be run, or a prompt has no token.
    """
    name = weights.checkpoint.label
    tokenizer = load_tokenizer(str(weights.folder), name)
    start = str(tokenizer.bos_token or "")

    @cache
    def ids(text: str) -> Ids:
        found = tuple(token_ids(tokenizer, start + text, add_special_tokens=False))
        if not found:
            problem = f"the tokenizer makes no token of the prompt {text!r}"
            raise CalibrationError(name, problem, "Remove the prompt, or write another.")
        return found

    texts = (text for one in experts for text in (*one.positive_prompts, *one.negative_prompts))
    every = dict.fromkeys(map(ids, texts))
    if mode == "cheap_embed":
        states = _embedding_sums(weights, tuple(every))
    else:
        states = _hidden_states(weights, tuple(every), device, is_mean=mode == "hidden_avg")

    def side(texts: Sequence[str]) -> Tensor:
        found = torch.stack([states[ids(text)] for text in texts])
        return unit(found.sum(0)) if mode == "cheap_embed" else found.mean(0)

    def row(expert: RoutedExpert) -> Tensor:
        found = side(expert.positive_prompts)
        return unit(found - side(expert.negative_prompts) if expert.negative_prompts else found)

    rows = torch.stack([row(expert) for expert in experts], dim=1)
    if not rows.isfinite().all():
        problem = "its hidden states on the prompts are not all finite"
        raise CalibrationError(name, problem, "Use another revision of it, or a random router.")
    return rows


def unit(vectors: Tensor) -> Tensor:
    """Vectors along the last dimension, divided by their lengths."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / lengths.clamp(min=SMALLEST)


def _hidden_states(
    weights: Weights, prompts: Sequence[Ids], device: str, *, is_mean: bool
) -> dict[Ids, Tensor]:
    """The hidden state before each block, (n_blocks, hidden_size), of each prompt by itself."""
    model = build_meta_model(weights, device)
    check_tokens_fit(model.model, model.name, _as_tokens(prompts, model.name))
    batches = [
        TokenBatch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
        for ids in prompts
    ]
    found: list[Tensor] = []
    modules = (module for _, module in linears(model.path, model.blocks))
    with (
        deterministic_threads(modules),
        ActivationCache(weights.scratch) as held,
        closing(model.walk()) as walk,
    ):
        for number, _ in enumerate(walk):
            if number == 0:
                [states] = enter_blocks(model, [batches], held)
            hidden = (held.read(state.key)[0].float() for state in states)
            found.append(torch.stack([one.mean(0) if is_mean else one[-1] for one in hidden]).cpu())
            if number < len(model.blocks) - 1:
                for state in states:
                    state.move(state.run())
    by_prompt = torch.stack(found, dim=1)
    return dict(zip(prompts, by_prompt, strict=True))


def _as_tokens(prompts: Sequence[Ids], name: str) -> CalibrationTokens:
    return CalibrationTokens(tuple(prompts), (), len(prompts), 0, 0, name)


def _embedding_sums(weights: Weights, prompts: Sequence[Ids]) -> dict[Ids, Tensor]:
    """The sum of the embeddings of each prompt, (n_blocks, hidden_size), equal in all blocks."""
    tensors = weights.checkpoint.tensors
    table = next((t for name, t in tensors.items() if names.is_token_embedding(name)), None)
    if table is None:
        problem = "no table of token embeddings was found"
        remedy = "Set `gate_mode: hidden`."
        raise CalibrationError(weights.checkpoint.label, problem, remedy)
    n_blocks = len({names.block(name) for name in tensors} - {None})
    with closing(weights.parts([[table]])) as parts:
        embeddings = next(parts)[table.name]
    check_rows(
        len(embeddings), weights.checkpoint.label, _as_tokens(prompts, weights.checkpoint.label)
    )
    return {ids: embeddings[list(ids)].sum(0).expand(n_blocks, -1) for ids in prompts}


def random_rows(name: str, shape: tuple[int, ...], mode: GateMode, seed: int) -> Tensor:
    """A router's random weights, float32: normal, or uniform as torch initialises a Linear.

    They depend only on the seed, the tensor's name, and the place in the tensor.
    """
    n_rows, width = shape
    bits = random_bits.halves(random_bits.stream(seed, name, 0), 2 * n_rows * width)
    first, second = (bits.astype(np.float64) + 0.5).reshape(2, n_rows, width) / random_bits.HALVES
    if mode == "uniform_random":
        values = (2 * first - 1) / np.sqrt(width)
    else:  # Box and Muller, 1958
        values = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
    return torch.from_numpy(values.astype(np.float32))


def condition_numbers(rows: Tensor) -> list[float]:
    """The condition number of each block's rows; infinite if a row depends on others.

    `rows` are (n_blocks, n_experts, hidden_size).
    """
    singular = torch.linalg.svdvals(rows.double())
    return [float(one[0] / one[-1]) if one[-1] else inf for one in singular]
