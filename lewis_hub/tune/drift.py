"""The objective "drift": how far a merge's predictions are from each expert's on its own texts."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.display import Advance
from lewis_hub.errors import TuningError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.harness import load, threads_for
from lewis_hub.recipe.schema import Calibration
from lewis_hub.tune.objective import N_PARTS, Objective, Share
from lewis_hub.workflow.fetch import ModelLoader
from lewis_hub.workflow.open import OpenedSource

if TYPE_CHECKING:
    from lewis_hub.calibration.drift import Predictions

METRIC = "drift"
FOLDER = "predictions"
VERSION = 1  # of the arithmetic
WHOLE_BYTES = 1 << 30  # of all experts' predictions, up to which every token is kept
N_KEPT = 256  # likeliest tokens of a prediction beyond that


@dataclass(frozen=True)
class DriftTexts:
    """The held-out texts of an expert, and the folder of its predictions on them."""

    expert: OpenedSource
    calibration: Calibration
    tokens: CalibrationTokens
    n_vocabulary: int
    n_kept: int  # likeliest tokens that are stored of each prediction
    device: str
    store: Path

    @property
    def keeps_all(self) -> bool:
        """Whether whole distributions are stored."""
        return self.n_kept >= self.n_vocabulary

    @property
    def digest(self) -> str:
        """A digest over all that the predictions depend on."""
        facts = {
            "version": VERSION,
            "expert": self.expert.digest,
            "texts": [*self.tokens.ids],
            "n_kept": self.n_kept,
            "n_parts": self.n_parts,
            "device": self.device.partition(":")[0],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def n_parts(self) -> int:
        """The number of groups of texts; a trial can be pruned after each."""
        return min(N_PARTS, len(self.tokens.ids))

    def part(self, number: int) -> CalibrationTokens:
        """The texts of a part."""
        return replace(self.tokens, ids=self.tokens.ids[number :: self.n_parts])

    def file(self, number: int) -> Path:
        """The file with the expert's predictions of a part."""
        return self.store / FOLDER / self.digest[:32] / f"{number}.safetensors"

    @property
    def missing(self) -> tuple[int, ...]:
        """The parts that no run has predicted yet."""
        return tuple(n for n in range(self.n_parts) if not self.file(n).exists())

    @property
    def n_bytes(self) -> int:
        """The size of the predictions."""
        return n_predicted(self.tokens) * _bytes_of_prediction(self.n_vocabulary, self.n_kept)


def n_predicted(tokens: CalibrationTokens) -> int:
    """The number of tokens that are predicted: of each text all but the first."""
    return tokens.n_tokens - len(tokens.ids)


def _bytes_of_prediction(n_vocabulary: int, n_kept: int) -> int:
    return 4 * n_vocabulary if n_kept >= n_vocabulary else 8 * n_kept + 4


def drift_texts(
    experts: Sequence[OpenedSource],
    texts: Sequence[tuple[Calibration, CalibrationTokens]],
    n_vocabulary: int,
    device: str,
    store: Path,
) -> tuple[DriftTexts, ...]:
    """Return the texts of each expert; whole distributions are kept up to WHOLE_BYTES."""
    n_tokens = sum(n_predicted(tokens) for _, tokens in texts)
    is_small = n_tokens * _bytes_of_prediction(n_vocabulary, n_vocabulary) <= WHOLE_BYTES
    n_kept = n_vocabulary if is_small else min(N_KEPT, n_vocabulary)
    return tuple(
        DriftTexts(expert, calibration, tokens, n_vocabulary, n_kept, device, store)
        for expert, (calibration, tokens) in zip(experts, texts, strict=True)
    )


def by_drift(texts: Sequence[DriftTexts]) -> Objective:
    """Return the objective "drift", in nats: the mean over tokens, then over experts.

    Its parts read the files that `predict` writes.
    """
    n_parts = min(one.n_parts for one in texts)
    parts = tuple(partial(_measure, texts, number) for number in range(n_parts))
    digest = hashlib.sha256("\n".join([METRIC, *(one.digest for one in texts)]).encode())
    n_texts = sum(len(one.tokens.ids) for one in texts)
    return Objective(
        METRIC, lower_is_better=True, parts=parts, n_items=n_texts, digest=digest.hexdigest()
    )


def _measure(texts: Sequence[DriftTexts], number: int, lm: Any, advance: Advance) -> list[Share]:
    """Return the drift of a loaded model from each expert, on a part of the texts."""
    from lewis_hub.calibration.drift import divergence, log_probabilities

    shares = []
    for one in texts:
        tokens, total, row = one.part(number), 0.0, 0
        expert = _read(one.file(number))
        with threads_for(lm.model):
            for log_q in log_probabilities(lm.model, tokens, one.n_vocabulary):
                known = expert.rows(row, row + len(log_q))
                total += float(divergence(known, log_q).sum())
                row += len(log_q)
                advance(1)
        shares.append(Share(one.expert.pinned, total, row))
    return shares


def _read(file: Path) -> Predictions:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lewis_hub.calibration.drift import stored

    try:
        return stored(load_file(file))
    except (OSError, SafetensorError) as error:
        problem = f"the predictions cannot be read: {type(error).__name__}: {error}"
        raise TuningError(str(file), problem, "Delete the file, and run again.") from error


def predict(texts: Sequence[DriftTexts], loader: ModelLoader) -> None:
    """Store the predictions of each expert on its texts; those of earlier runs stay."""
    left = [one for one in texts if one.missing]
    folders = [loader.materialize_checkpoint(one.expert) for one in left]
    n_texts = sum(len(one.part(number).ids) for one in left for number in one.missing)
    with loader.progress.stage("Predicting by the experts", n_texts, "items") as advance:
        for one, folder in zip(left, folders, strict=True):
            _predict(one, folder, advance)
            gc.collect()  # only one model fits into memory


def _predict(one: DriftTexts, folder: Path, advance: Advance) -> None:
    from lewis_hub.calibration.drift import joined, likeliest, log_probabilities
    from lewis_hub.calibration.grams import write_tensors

    lm = load(folder, EvaluationSettings(device=one.device))
    for number in one.missing:
        kept = []
        with threads_for(lm.model):
            for log_p in log_probabilities(lm.model, one.part(number), one.n_vocabulary):
                kept.append(likeliest(log_p, one.n_kept))
                advance(1)
        one.file(number).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(joined(kept).named(), one.file(number))
