"""A source's model and tokenizer, as transformers loads them from a local folder.

Nothing here runs a repo's own code or opens a connection.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lewis_hub.errors import CalibrationModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(folder: Path, device: str, name: str) -> PreTrainedModel:
    """Load a language model for measuring, in eval mode.

    Its class is the one that its configuration names, as the files hold the tensors of that one;
    where none is named that transformers has, it is loaded as a causal language model.

    On a CPU the arithmetic is float32, whatever the file's dtype: it is the definition, and half
    precision is slow there. Elsewhere the file's own dtype is kept.

    Args:
        folder: a complete local snapshot.
        device: as torch names it: "cpu", "cuda", "cuda:1".
        name: the source as the user knows it, for messages.

    Raises:
        CalibrationModelError: transformers cannot load it, it needs own code, or weights that the
            architecture needs are not in the files.
    """
    import torch

    with refusals(name, "model"), quiet():
        model, report = model_class(folder).from_pretrained(
            folder,
            dtype=torch.float32 if device == "cpu" else "auto",
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            experts_implementation="eager",
        )
        check_complete(name, report["missing_keys"])
        check_reads_tokens(name, model)
        model.config.get_text_config().use_cache = False  # some keep one unless this says so
        return cast("PreTrainedModel", model.to(device).eval())


def model_class(folder: Path) -> Any:
    """The class of transformers that a folder's configuration names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    return next(filter(None, named), transformers.AutoModelForCausalLM)


def check_complete(name: str, missing: Iterable[str]) -> None:
    """Refuse weights that are in no file: random ones would mean nothing."""
    absent = sorted(missing)
    if absent:
        others = f"{len(absent) - 1} more of the weights that its architecture needs"
        problem = f"its files lack {absent[0]} (and {others})"
        remedy = "The config does not describe these files: check the source, or take another."
        raise CalibrationModelError(name, problem, remedy)


def check_reads_tokens(name: str, model: PreTrainedModel) -> None:
    """Refuse a model of pictures or sound alone."""
    if "input_ids" not in inspect.signature(model.forward).parameters:
        problem = f"{type(model).__name__} reads no tokens"
        remedy = "Calibration measures language models; merge it with guide `uniform` instead."
        raise CalibrationModelError(name, problem, remedy)


@contextmanager
def refusals(name: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for a folder that it cannot load into one error.

    Args:
        name: the source as the user knows it.
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
def quiet() -> Iterator[None]:
    """Only the command line prints: no progress bar and no report from transformers."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def config_value(model: PreTrainedModel, key: str) -> Any:
    """A value of the language model's configuration, None where it has none."""
    return getattr(model.config.get_text_config(), key, None)
