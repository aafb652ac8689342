"""A forward pass of a short text through a model that was just loaded, within limits.

Some settings pad every text to a length, or repeat a part of the model: a small file could keep
any text for ever, or fill the memory. So a few tokens run first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lewis_hub.errors import SourceError
from lewis_hub.evaluate.empty_models import DRIVER_BYTES, OUT_OF_MEMORY
from lewis_hub.limits import TooMuchError, limited
from lewis_hub.loadable import SMALLER
from lewis_hub.system import limited_memory
from lewis_hub.tokenizer import panics_as_errors

if TYPE_CHECKING:
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
    n_bytes = sum(one.numel() * one.element_size() for one in model.parameters())
    on_gpu = any(one.device.type != "cpu" for one in model.parameters())
    most = MAX_PASS_BYTES + COPIES * n_bytes + (DRIVER_BYTES if on_gpu else 0)
    try:
        with (
            panics_as_errors(),
            limited_memory(most),
            limited(_seconds(n_bytes), "a few words", max_bytes=most),
        ):
            run()
    except TooMuchError as error:
        raise SourceError(where, str(error), SMALLER) from None
    except Exception as error:  # noqa: BLE001 - tokenizers and models raise any class
        if isinstance(error, MemoryError) or OUT_OF_MEMORY in str(error):
            problem = f"it takes more than {most / 1e9:.1f} GB for a few words"
            raise SourceError(where, problem, SMALLER) from None


@contextmanager
def limited_batch(where: str, n_bytes: int, n_tokens: int) -> Iterator[None]:
    """Stop a batch of texts that takes far longer in a part of a model than its weights tell.

    Args:
        where: the model, for the message.
        n_bytes: of the weights of the part.
        n_tokens: of all texts in the batch.

    Raises:
        SourceError: it takes too long.
    """
    seconds = round(MAX_PASS_S + n_bytes * n_tokens / PRODUCTS_PER_S)
    try:
        with limited(seconds, "a batch of texts"):
            yield
    except TooMuchError as error:
        raise SourceError(where, str(error), SMALLER) from None


def _seconds(n_bytes: int) -> float:
    return round(MAX_PASS_S + n_bytes / BYTES_PER_S)
