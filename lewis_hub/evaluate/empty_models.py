"""Models that configurations describe, built without memory for values; limits of a load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lewis_hub.checkpoint.configuration import DAMAGED
from lewis_hub.errors import LocatedError, SourceError
from lewis_hub.limits import TooMuchError, limited
from lewis_hub.loadable import MAX_LOAD_BYTES, MAX_MAPPED_BYTES, limited_model
from lewis_hub.system import is_out_of_memory, limited_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers is imported in functions: a backend may need none.

VALUE_BYTES = 4  # of a weight in memory, which is float32 on a CPU
MOST_TIMES = 16  # with four bits a weight in the files, and a head that they have as embeddings
MAX_BUILD_S, MAX_BUILD_BYTES = 45, 1_500_000_000  # of modules without values
FREE_WEIGHT_BYTES = 64 << 20  # beyond that: weights that are in no file, such as fixed positions
FREE_BYTES = 1 << 30  # beyond that: buffers, which are in no file
DRIVER_BYTES = 8 << 30  # that the libraries of a GPU may take in the first load


def model_class(folder: Path) -> Any:
    """The class that a configuration names, or causal language models if there is no such."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    names = filter(str.isidentifier, map(str, config.architectures or ()))
    named = [getattr(transformers, name, None) for name in names]
    return next(filter(None, named), transformers.AutoModelForCausalLM)


def builder(kind: Any) -> Callable[..., Any]:
    """What builds a model of a configuration; an automatic class would ask to run other code."""
    if hasattr(kind, "_from_config"):
        return cast("Callable[..., Any]", kind._from_config)
    return partial(kind.from_config, trust_remote_code=False)


def build_empty(folder: Path, kind: Any, where: str | None = None) -> PreTrainedModel:
    """Build a model with all its values on the meta device; other errors are those of transformers.

    Many keys of configurations count modules, each of which takes some memory and time.

    Args:
        folder: with its config.json.
        kind: the class of transformers that is to load it: another one may be far smaller.
        where: names it in a message; None: the folder.

    Raises:
        SourceError: it takes too much time or memory.
    """
    import torch
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    plain = {"dtype": torch.float32, "attn_implementation": "eager"}  # needs no other package
    try:
        limits = limited(MAX_BUILD_S, "its modules", max_bytes=MAX_BUILD_BYTES)
        with limited_memory(MAX_MAPPED_BYTES), limits, no_init_weights(), torch.device("meta"):
            return cast("PreTrainedModel", builder(kind)(config, **plain))
    except (TooMuchError, MemoryError, RuntimeError) as error:
        if not (isinstance(error, TooMuchError) or is_out_of_memory(error)):
            raise
        what = error if isinstance(error, TooMuchError) else "it takes too much memory"
        problem = f"the model that its config.json describes cannot be built: {what}"
        raise SourceError(where or str(folder), problem, DAMAGED) from None


def require_size_of_files(
    where: str, folder: Path, kind: Any, stored_bytes: int | None = None
) -> int:
    """Refuse a configuration whose model takes far more memory than its files.

    transformers makes weights that no file has, however large, before it tells of them.

    Args:
        where: the model, for messages.
        folder: has the configuration.
        kind: the class of transformers that is to load it.
        stored_bytes: the size of its weights in the files; None: of those in the folder.

    Returns:
        The bytes of the model in memory.

    Raises:
        SourceError: it is larger.
    """
    described = build_empty(folder, kind, where)
    weight_bytes = sum(VALUE_BYTES * one.numel() for one in described.parameters())
    n_bytes = weight_bytes + sum(one.numel() * one.element_size() for one in described.buffers())
    if stored_bytes is None:
        stored_bytes = stored_in(folder)
    most = MOST_TIMES * stored_bytes
    if weight_bytes > most + FREE_WEIGHT_BYTES or n_bytes > most + FREE_BYTES:
        problem = f"its config.json describes a model of {n_bytes:,} bytes, but its weights have "
        problem += f"{stored_bytes:,} bytes in its files"
        raise SourceError(where, problem, DAMAGED)
    return n_bytes


def require_whole(where: str, missing: Iterable[str], error: type[LocatedError]) -> None:
    """Refuse a model with weights that are in no file, and would be random.

    Args:
        where: the model, for the message.
        missing: names of parameters.
        error: what is raised, if there is one.
    """
    absent = sorted(missing)
    if absent:
        others = f"{len(absent) - 1} more of the weights that its architecture needs"
        problem = f"its files lack {absent[0]} (and {others})"
        remedy = "The config does not describe these files: check the source, or take another."
        raise error(where, problem, remedy)


def stored_in(folder: Path) -> int:
    """The bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextmanager
def limited_load(where: str, stored_bytes: int, device: str) -> Iterator[None]:
    """Stop a load that takes more memory than the files of a model may, with its tokenizer.

    Args:
        where: the model, for a message.
        stored_bytes: the size of its weights in the files.
        device: "cpu", or a GPU, whose libraries take memory, too.

    Raises:
        SourceError: it takes more.
    """
    n_bytes = MOST_TIMES * stored_bytes + FREE_BYTES + MAX_LOAD_BYTES
    n_bytes += 0 if device == "cpu" else DRIVER_BYTES
    with limited_model(where, math.inf, "its load", n_bytes):
        yield
