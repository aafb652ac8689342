"""A forward pass of a short text through a model that was just loaded, within limits.

Some settings pad every text to a length, or repeat a part of the model: a small file could keep
any text for ever, or fill the memory. So a few tokens run first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lewis_hub.errors import SourceError
from lewis_hub.evaluate.empty_models import DRIVER_BYTES, OUT_OF_MEMORY
from lewis_hub.limits import TooMuchError, limited
from lewis_hub.loadable import SMALLER
from lewis_hub.system import limited_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

N_TOKENS = 8
MAX_PASS_S, MAX_PASS_BYTES = 30.0, 1 << 30  # of a tiny model, which takes milliseconds
BYTES_PER_S = 100_000_000  # of weights; a slow CPU multiplies some GB in a second
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
        with limited_memory(most), limited(_seconds(n_bytes), "a few words", max_bytes=most):
            run()
    except TooMuchError as error:
        raise SourceError(where, str(error), SMALLER) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY not in str(error):
            return
        problem = f"it takes more than {most / 1e9:.1f} GB for a few words"
        raise SourceError(where, problem, SMALLER) from None
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError):
        return


def _seconds(n_bytes: int) -> float:
    return round(MAX_PASS_S + n_bytes / BYTES_PER_S)
