"""Errors of a source's own code and files, as messages. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from lewis_hub.errors import CalibrationModelError, LewisHubError


def check_padding(name: str, max_tokens: int, n_positions: int | None) -> None:
    """Refuse texts that guide `lewis_reference` pads beyond a model's last position.

    Args:
        name: the source for messages.
        max_tokens: of the calibration.
        n_positions: None, 0 or less: unlimited.
    """
    if max_tokens > (n_positions or 0) > 0:
        problem = (
            f"guide `lewis_reference` pads every text to `max_tokens`, {max_tokens}, and the model "
            f"has {n_positions} positions"
        )
        remedy = f"Set `max_tokens: {n_positions}`, or less, in the calibration."
        raise CalibrationModelError(name, problem, remedy)


@contextmanager
def refusals(name: str, what: str) -> Iterator[None]:
    """Turn the errors of transformers for a folder that it cannot load into one error.

    Args:
        name: the source for messages.
        what: "model" or "tokenizer".
    """
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        text = str(error)
        line = next((line.strip() for line in text.splitlines() if line.strip()), repr(error))
        remedy = f"Calibration loads a {what} with transformers; see what it needs above."
        if "trust_remote_code" in text:
            line = f"its {what} needs Python code from its repo, which is not run"
            remedy = "Take a source that transformers supports by itself, or use guide `uniform`."
        elif "Unrecognized configuration class" in text:
            line = "its architecture is no causal language model"
            remedy = "Calibration measures decoders; merge it with guide `uniform` instead."
        elif "does not recognize this architecture" in text:
            line = "this version of transformers does not know its architecture"
            remedy = "Upgrade: pip install -U transformers."
        elif "out of memory" in text:
            line, remedy = "there is not enough memory to load it", "Use a larger device, or cpu."
        raise CalibrationModelError(name, line.rstrip("."), remedy) from error


@contextmanager
def run_refusals(name: str, by: str) -> Iterator[None]:
    """Turn the errors of a model's own code, while texts run through it, into one error.

    An error without a frame of transformers is a bug of this program, and keeps its traceback.

    Args:
        name: the source for messages.
        by: what needs the measurement, such as "guide `lewis`".
    """
    try:
        yield
    except LewisHubError:
        raise
    except Exception as error:
        frames = (frame for frame, _ in walk_tb(error.__traceback__))
        if not any(frame.f_globals["__name__"].startswith("transformers.") for frame in frames):
            raise
        text = str(error)
        line = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
        problem = f"{by} cannot measure it: {type(error).__name__}: {line.rstrip('.')}"
        remedy = (
            "Its own code fails so on calibration texts. Guides `uniform` and `magnitude`, and "
            "methods without statistics, run no model."
        )
        if "out of memory" in text or "allocate memory" in text:
            problem = f"{by} cannot measure it: there is not enough memory"
            remedy = "Use a larger device, or measure it block by block: `--max-memory 1GB`."
        raise CalibrationModelError(name, problem, remedy) from error
