"""A forward pass of a short text through a model that was just loaded, within limits.

Some settings pad every text to a length, or repeat a part of the model: a small file could keep
any text for ever, or fill the memory. So a few tokens run first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lewis_hub.errors import SourceError
from lewis_hub.evaluate.empty_models import DRIVER_BYTES
from lewis_hub.loadable import SMALLER, limited_model
from lewis_hub.system import is_out_of_memory, limited_memory
from lewis_hub.tokenizer import panics_as_errors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

N_TOKENS = 8
MAX_PASS_S, MAX_PASS_BYTES = 30.0, 1 << 30  # of a tiny model, which takes milliseconds
BYTES_PER_S = 100_000_000  # of weights; a slow CPU multiplies some GB in a second
PRODUCTS_PER_S = 500_000_000  # of the bytes of weights and tokens; a slow CPU does four times more
COPIES = 2  # of weights, in another layout


def require_short_pass(where: str, model: PreTrainedModel) -> None:
    """Refuse a language model that takes very long, or much memory, for a few tokens.

    Other errors are left to the texts that run later.

    Args:
        where: the model, for the message.
        model: as loaded.

    Raises:
        SourceError: as said.
    """
    import torch

    ids = torch.zeros(1, N_TOKENS, dtype=torch.long, device=model.device)
    options = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, **options)

    require_short_run(where, model, run)


def require_short_run(where: str, model: Any, run: Callable[[], object]) -> None:
    """The same for any model of torch's, where `run` runs a short text through it."""
    n_bytes = _n_bytes(model)
    on_gpu = any(one.device.type != "cpu" for one in model.parameters())
    most = MAX_PASS_BYTES + COPIES * n_bytes + (DRIVER_BYTES if on_gpu else 0)
    seconds = round(MAX_PASS_S + n_bytes / BYTES_PER_S)
    with limited_model(where, seconds, "a few words", most):
        try:
            with panics_as_errors(), limited_memory(most):
                run()
        except Exception as error:  # noqa: BLE001 - tokenizers and models raise any class
            if is_out_of_memory(error):
                problem = f"it takes more than {most / 1e9:.1f} GB for a few words"
                raise SourceError(where, problem, SMALLER) from None


def limited_batch(where: str, part: nn.Module, n_tokens: int) -> AbstractContextManager[None]:
    """Stop a batch of texts that takes far longer in a part of a model than its weights tell.

    Inside the block it is a SourceError if it takes too long.

    Args:
        where: the model, for the message.
        part: of the model; parameters that are on meta do not count.
        n_tokens: of all texts in the batch.
    """
    seconds = round(MAX_PASS_S + _n_bytes(part) * n_tokens / PRODUCTS_PER_S)
    return limited_model(where, seconds, "a batch of texts")


def _n_bytes(model: nn.Module) -> int:
    weights = (one for one in model.parameters() if not one.is_meta)
    return sum(one.numel() * one.element_size() for one in weights)
