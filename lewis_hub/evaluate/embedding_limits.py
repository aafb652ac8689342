"""Limits of what an embedding model makes of a batch of texts.

They do not depend on names of settings, so they hold for those that no check knows.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from lewis_hub.documents import texts_in
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.harness import OVERFLOWS
from lewis_hub.evaluate.text_limits import FEWER, MAX_BYTES
from lewis_hub.limits import TooMuchError, limited
from lewis_hub.loadable import SMALLER
from lewis_hub.system import limited_memory

BATCH_BYTES = 1 << 30  # of a batch of texts as tokens
MAX_DIMENSION = 16_384  # numbers in the vector of a text; several times those of large models
MAX_NUMBERS = 4096  # of a sparse vector, that are not 0: each takes 20 bytes; SPLADE has some 200
SHORT = "a few words"
VECTORS = ("sentence_embedding", "scores")  # what models give for a batch, by name
NUMBER_BYTES = 4
MADE = 3  # copies of vectors: as they come, in one array, and scaled; searching takes 2.7
COMPARED = 4  # of those that wait for others, to be compared in pairs: that takes 3.6 of both
TIMES_OF_TEXT = 1000  # and so much for each letter: a tokenizer takes some 100 to 300 bytes
MAX_BATCH_LETTERS = 8_000_000  # of all its texts together
MAX_BATCH_BYTES = 4 << 30


def limit_batches(where: str, model: Any) -> None:
    """Let a loaded model refuse to make very much of a batch of texts, before it is run.

    It raises an EvaluationError then.
    """
    preprocess: Callable[..., Any] = model.preprocess

    @functools.wraps(preprocess)
    def preprocess_within_limits(inputs: Any, *args: Any, **options: Any) -> Any:
        n_letters = sum(map(len, texts_in(inputs)))
        if n_letters > MAX_BATCH_LETTERS:  # a tokenizer cannot be stopped inside of a batch
            problem = f"a batch of texts has {n_letters:,} letters, the limit is "
            remedy = "Set a smaller `batch_size` in `evaluate`."
            raise EvaluationError(where, f"{problem}{MAX_BATCH_LETTERS:,}", remedy)
        n_bytes = min(BATCH_BYTES + TIMES_OF_TEXT * n_letters, MAX_BATCH_BYTES)
        try:
            with limited_memory(2 * n_bytes), limited(math.inf, "a batch", max_bytes=n_bytes):
                return preprocess(inputs, *args, **options)
        except TooMuchError as error:
            raise EvaluationError(f"{where}: its tokenizer", str(error), SMALLER) from None
        except MemoryError:
            problem = "it takes too much memory for a batch"
            raise EvaluationError(f"{where}: its tokenizer", problem, SMALLER) from None

    model.preprocess = preprocess_within_limits


def limit_vectors(where: str, model: Any, *, is_sparse: bool) -> None:
    """Let a loaded model refuse to give very long vectors, which are kept for all texts.

    It raises an EvaluationError then. Of a sparse model the numbers that are not 0 count. Vectors
    without a finite length are refused, too.
    """
    forward: Callable[..., Any] = model.forward
    limit = MAX_NUMBERS if is_sparse else MAX_DIMENSION

    @functools.wraps(forward)
    def forward_within_limits(*args: Any, **options: Any) -> Any:
        found = forward(*args, **options)
        for key in VECTORS if isinstance(found, Mapping) else ():
            vectors = found.get(key)
            if vectors is None:
                continue
            _require_finite(where, vectors)
            if vectors.ndim > 1:
                many = (vectors != 0).sum(-1).max() if is_sparse else vectors.shape[-1]
                if many > limit:
                    problem = f"its vector of a text has {int(many):,} numbers, the limit is "
                    raise EvaluationError(where, f"{problem}{limit:,}", SMALLER)
        return found

    model.forward = forward_within_limits


def limit_held_vectors(where: str, model: Any) -> None:
    """Let a loaded model refuse to embed more texts than there is memory for their vectors.

    It raises an EvaluationError then, before the first one runs. mteb gives it all texts at once
    that it compares; vectors of earlier texts count as long as they are kept.
    """
    encode: Callable[..., Any] = model.encode
    held: dict[int, int] = {}  # number of a call -> bytes
    width = 0

    @functools.wraps(encode)
    def encode_within_limits(inputs: Any, *args: Any, **options: Any) -> Any:
        nonlocal width
        texts = [inputs] if isinstance(inputs, str) else inputs
        width = width or encode(texts[:1], show_progress_bar=False).shape[-1]
        n_texts = len(texts)
        n_bytes = COMPARED * sum(held.values()) + MADE * n_texts * width * NUMBER_BYTES
        if n_bytes > MAX_BYTES:
            problem = f"its vectors have {width:,} numbers, so those of {n_texts:,} texts may take "
            problem += f"{n_bytes / 1e9:.1f} GB while they are scored, the limit is "
            raise EvaluationError(where, f"{problem}{MAX_BYTES / 1e9:.1f} GB.", FEWER)
        found = encode(inputs, *args, **options)
        if hasattr(found, "nbytes"):  # one array of all
            call = id(found)
            held[call] = found.nbytes
            weakref.finalize(found, held.pop, call, None)
        return found

    model.encode = encode_within_limits


def _require_finite(where: str, vectors: Any) -> None:
    """Refuse vectors, or scores, whose squares have no finite sum: mteb would compare 0 instead."""
    if not vectors.float().square().sum(-1).isfinite().all():
        problem = "gives texts vectors that are not finite (NaN, or too large), so it cannot be "
        raise EvaluationError(where, f"{problem}scored.", OVERFLOWS)
