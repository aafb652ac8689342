"""Draw a calibration's texts, from a dataset's rows or a task's items, and tokenise them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lewis_hub.evaluate import items
from lewis_hub.evaluate.chat import chat_of
from lewis_hub.guides.calibrate import CalibrationSet
from lewis_hub.guides.importance import calibration_facts
from lewis_hub.guides.template import template_of
from lewis_hub.guides.tokens import Rows, calibration_tokens, load_tokenizer
from lewis_hub.hub.rows import load_rows
from lewis_hub.hub.source import Source
from lewis_hub.progress import Progress
from lewis_hub.recipe_calibration import Calibration
from lewis_hub.stages.downloading import small_files
from lewis_hub.stages.overlap import DrawnText, drawn_texts
from lewis_hub.stages.task_data import PinnedTask

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Drawing:
    """What is the same for all calibrations of a merge.

    Attributes:
        donor: whose tokenizer makes tokens of the texts.
        allow_code: whether tasks may run code.
    """

    api: HfApi
    donor: Source
    seed: int
    allow_code: bool


@dataclass(frozen=True)
class Drawn:
    """Tokens to measure on, and each text as `overlap` compares it."""

    tokens: CalibrationSet
    values: list[DrawnText]


def draw(
    how: Drawing, calibration: Calibration, data: Source | PinnedTask, progress: Progress
) -> Drawn:
    """Draw, render and tokenise.

    Raises:
        SourceError: a configuration or split is not there.
        EvaluationError: a task has no such split, or its items cannot be rendered.
        CalibrationError: the template does not fit, or no text is left.
    """
    tokenizer = load_tokenizer(str(small_files(how.api, how.donor)), how.donor.name)
    rows = _rows(how, calibration, data)
    template = template_of(calibration, tokenizer)
    if isinstance(rows, items.TaskRows) and calibration.chat_template:
        rows = replace(rows, chat=chat_of(tokenizer))
    tokens = calibration_tokens(rows, calibration, tokenizer, how.seed)
    drawn = f"{len(tokens.ids):,} texts, {tokens.n_tokens:,} tokens"
    progress.say(f"{calibration.data}: {'; '.join((drawn, *tokens.notes))}.")
    facts = calibration_facts(calibration, _facts(data), how.seed, _tokenizer_digest(how.donor))
    texts = drawn_texts(rows, template, tokens)
    return Drawn(CalibrationSet(facts | tokens.facts, tokens), texts)


def _rows(how: Drawing, calibration: Calibration, data: Source | PinnedTask) -> Rows:
    if isinstance(data, Source):
        return load_rows(how.api, data, calibration.config, calibration.split)
    selection = replace(data.selection, allow_code=how.allow_code)
    return items.load_rows(
        selection, calibration.split, data.commits, allow_scored=calibration.allow_overlap
    )


def _facts(data: Source | PinnedTask) -> dict[str, str]:
    if isinstance(data, Source):
        return {"dataset": data.pinned, "dataset_sha": data.commit_sha}
    return data.facts


def _tokenizer_digest(source: Source) -> str:
    """Over the tokenizer's files: what fixes token ids, wherever the files lie."""
    files = [file for file in source.files if "token" in file.path or "vocab" in file.path]
    told = "\n".join(f"{file.path} {file.digest}" for file in files)
    return "sha256:" + hashlib.sha256(told.encode()).hexdigest()
