"""Calibration texts that an expert writes: answers to prompts, or samples.

They are kept in `generated.jsonl`, a line for each text: what the model wrote, not the prompt. A
line is used again if model, prompts, settings and seed are the same, and its digest says that
nobody changed it. So an interrupted run goes on after the last whole batch. Answers to prompts
that are not public are not part of a merge.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.subject import CalibrationSet
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.documents import MAX_TABLE_BYTES, read_json
from lewis_hub.errors import CalibrationError, CalibrationModelError, RecipeError
from lewis_hub.files import text_of, write_whole
from lewis_hub.hub.source import Source
from lewis_hub.recipe.schema import Calibration
from lewis_hub.workflow.fetch import ModelLoader
from lewis_hub.workflow.open import MergeSources, OpenedSource
from lewis_hub.workflow.resources import Loading, Measurement
from lewis_hub.workflow.samples import is_beside
from lewis_hub.workflow.texts import (
    DrawnText,
    ScoredTasks,
    Sets,
    TextSettings,
    refuse_overlap,
    remap_token_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "generated.jsonl"
VERSION = 1  # raised when the same model and prompts give other tokens
ELSEWHERE = (
    "Run `lewis-hub importance` on a machine with enough room: this run uses the folder "
    "importance/ that it writes beside the recipe. Or give texts with answers."
)
MAX_TOKEN = 1 << 31
LEFT_OUT = (
    f"the merge does not have {FILE}, since it is not known that everybody may read the prompts."
)
PER_SECOND = 3e10  # float operations of one CPU, for estimates

Tokens = dict[int, tuple[int, ...]]  # number of a prompt -> the tokens after it


@dataclass(frozen=True)
class TextRequest:
    """The texts that an expert writes."""

    calibration: Calibration
    expert: OpenedSource
    prompts: CalibrationSet  # in the token ids of the source whose tokenizer cuts the texts
    seed: int

    @property
    def key(self) -> str:
        """Digest of all that determines the tokens."""
        tokens, asked = self.prompts.tokens, self.calibration
        facts = {
            "version": VERSION,
            "model": self.expert.digest,
            "tokenizer": self.prompts.facts.get("tokenizer"),
            "prompts": [tokens.facts["rows_digest"], tokens.facts["tokens_digest"], tokens.limit],
            "sampling": [asked.temperature or 1, asked.top_p or 1, self.seed]
            if asked.source
            else None,
        }
        return _sha256(json.dumps(facts, sort_keys=True))

    def completed(self, written: Tokens) -> CalibrationSet:
        """The texts with what the expert wrote."""
        prompts = self.prompts.tokens
        ids = tuple((*own, *written[number]) for number, own in enumerate(prompts.ids))
        tokens = replace(prompts, ids=ids)
        facts = {**self.prompts.facts, "written_by": self.expert.digest, **tokens.facts}
        return CalibrationSet(facts, tokens)

    def lines(self, written: Tokens, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        """The lines of the file, in the order of the prompts."""
        rows, key = self.prompts.tokens.rows, self.key
        for number in sorted(written):
            line = {
                "source": self.expert.pinned,
                "row": rows[number],
                "text": tokenizer.decode([*written[number]]),
                "tokens": list(written[number]),
                "texts": key,
                "sha256": _line_digest(key, number, written[number]),
            }
            yield json.dumps(line, ensure_ascii=False)

    def known(self, lines: Sequence[Mapping[str, Any]]) -> Tokens:
        """The tokens that lines of a file hold, without lines that no expert could have written."""
        prompts = self.prompts.tokens
        numbers = {row: number for number, row in enumerate(prompts.rows)}
        found: Tokens = {}
        for line in lines:
            number, tokens = numbers[line["row"]], tuple(line["tokens"])
            fits = len(tokens) <= max(0, prompts.limit - len(prompts.ids[number]))
            could_be = fits and all(map(_is_token, tokens))
            if could_be and line["sha256"] == _line_digest(self.key, number, tokens):
                found[number] = tokens
        return found


@dataclass(frozen=True)
class GeneratedTexts:
    """The sets of all experts, and the lines of the file."""

    sets: Sets
    lines: tuple[str, ...] = ()  # without answers to prompts that are not public


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_TOKEN


def _line_digest(key: str, number: int, tokens: Sequence[int]) -> str:
    return _sha256(f"{key}:{number}:{','.join(map(str, tokens))}")


def requests_of(
    settings: TextSettings, sets: Sets, experts: Sequence[OpenedSource]
) -> dict[int, TextRequest]:
    """Return number of the expert -> what it writes; `sets` hold the prompts."""
    together = zip(settings.calibrations, experts, sets, strict=True) if sets else ()
    return {
        number: TextRequest(calibration, expert, prompts, settings.seed)
        for number, (calibration, expert, prompts) in enumerate(together)
        if calibration.is_written
    }


def _lines_by_key(stores: Sequence[Path]) -> dict[str, list[Mapping[str, Any]]]:
    """Read the lines of all files that there are; others are left out."""
    found: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for path in stores:
        try:
            for line in map(read_json, text_of(path, MAX_TABLE_BYTES).splitlines()):
                found[line["texts"]].append(line)
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return found


def _known(request: TextRequest, stores: Sequence[Path]) -> Tokens:
    try:
        return request.known(_lines_by_key(stores).get(request.key, ()))
    except (TypeError, KeyError):
        return {}


def require_whole_models(
    requests: Mapping[int, TextRequest],
    loading: Loading,
    stores: Sequence[Path],
    *,
    keeps_models: bool,
) -> None:
    """Refuse, before any weights are downloaded, to decode with a model that is not in memory.

    Each token would read all blocks again. Texts of an earlier run need no model.
    """
    for request in requests.values():
        expert, n_prompts = request.expert, len(request.prompts.tokens.ids)
        if len(_known(request, stores)) == n_prompts:
            continue
        asked = "`from: model`" if request.calibration.source else "`answers: model`"
        if not keeps_models:
            problem = f"{asked} loads {expert.name} whole, and --stream keeps no whole model."
            raise RecipeError("recipe", "calibration", problem, ELSEWHERE)
        if loading.is_too_large(expert.checkpoint):
            n_bytes = loading.model_bytes(expert.checkpoint)
            problem = f"{asked} loads it whole, {n_bytes:,} bytes, more than `--max-memory` allows"
            raise CalibrationModelError(expert.name, problem, f"Raise the limit. {ELSEWHERE}")


def write_texts(
    settings: TextSettings,
    requests: Mapping[int, TextRequest],
    sets: Sets,
    loader: ModelLoader,
    stores: Sequence[Path],
    scored: ScoredTasks | None,
) -> GeneratedTexts:
    """Let the experts write their texts, which must not contain items that `scored` scores.

    Known texts are read from all `stores`, which are files `generated.jsonl`; the first is written
    after each batch.
    """
    if not requests:
        return GeneratedTexts(sets)
    from lewis_hub.calibration.model import load_tokenizer  # torch: only here

    donor = settings.tokenizer
    tokenizer = load_tokenizer(str(loader.files.folders[donor.pinned]), donor.name)
    written = {number: _known(request, stores) for number, request in requests.items()}

    def lines(numbers: Iterable[int]) -> tuple[str, ...]:
        each = (requests[n].lines(written[n], tokenizer) for n in numbers)
        return tuple(chain.from_iterable(each))

    def keep() -> None:
        write_whole(stores[0], "\n".join(lines(written)) + "\n")

    completed = list(sets)
    screened: defaultdict[Calibration, list[DrawnText]] = defaultdict(list)
    for number, request in requests.items():
        for batch in _left(request, written[number].keys(), donor.name, loader):
            written[number] |= batch
            keep()
        completed[number] = request.completed(written[number])
        tokens = completed[number].tokens
        loader.progress.say(_told(request, tokens.ids))
        texts = (tokenizer.decode([*ids], skip_special_tokens=True) for ids in tokens.ids)
        screened[request.calibration] += [DrawnText((str(text),), ()) for text in texts]
    refuse_overlap(scored, screened, loader.progress)
    keep()
    public = [n for n, one in requests.items() if _is_public(settings, one.calibration)]
    for expert in (one.expert for n, one in requests.items() if n not in public):
        loader.progress.say(f"{expert.name}: {LEFT_OUT}")
    return GeneratedTexts(tuple(completed), lines(public))


def _is_public(settings: TextSettings, asked: Calibration) -> bool:
    """Return whether anybody may read the prompts, so that a merge may have the answers."""
    if asked.source:
        return True
    data = settings.data[asked]
    if isinstance(data, Source):
        return data.access == "public"
    include = data.selection.include
    return all(
        one.access == "public" or (one.folder is not None and is_beside(one.folder, include))
        for one in data.datasets
    )


def _told(request: TextRequest, ids: Sequence[Sequence[int]]) -> str:
    limit = request.prompts.tokens.limit
    n_cut = sum(len(text) == limit for text in ids)
    cut = f"; {n_cut} reach `max_tokens`, {limit}, without an end token" if n_cut else ""
    return f"{request.expert.name} wrote {len(ids):,} texts, {sum(map(len, ids)):,} tokens{cut}."


def _left(
    request: TextRequest, known: Collection[int], tokenizer: str, loader: ModelLoader
) -> Iterator[Tokens]:
    """Write the texts that are not known, batch by batch; without any, no model is loaded."""
    expert = request.expert
    if len(known) == len(request.prompts.tokens.ids):
        return
    from lewis_hub.calibration import generate
    from lewis_hub.calibration.model import load_model, run_refusals

    asked, to_donor = request.calibration, _to_donor(expert, tokenizer)
    own = remap_token_ids(request.prompts, expert, tokenizer).tokens
    sampling = None
    if asked.source:
        sampling = generate.Sampling(asked.temperature or 1, asked.top_p or 1, request.seed)
    model = load_model(loader.materialize_checkpoint(expert), loader.loading.device, expert.name)
    title = f"Writing texts with {expert.name}"
    with (
        loader.progress.stage(title, generate.n_new(own), "tokens") as advance,
        run_refusals(expert.pinned, "`from: model`" if asked.source else "`answers: model`"),
    ):
        for batch in generate.write_texts(model, expert.name, own, sampling, known, advance):
            yield {number: to_donor(tokens) for number, tokens in batch.items()}


def _to_donor(expert: OpenedSource, tokenizer: str) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """Return a function from the token ids of an expert to those of the texts."""
    if expert.translation is None:
        return tuple
    ids = {own: donor for donor, own in expert.translation.ids.items()}

    def to_donor(tokens: Sequence[int]) -> tuple[int, ...]:
        if lacking := [token for token in tokens if token not in ids]:
            problem = f"{expert.name} wrote its token {lacking[0]}, which {tokenizer} lacks"
            remedy = "Models with other tokens need texts with answers."
            raise CalibrationError("calibration texts", problem, remedy)
        return tuple(ids[token] for token in tokens)

    return to_donor


def writing_notes(measurement: Measurement, sources: MergeSources, loading: Loading) -> list[str]:
    """Return notes: what the experts will write, and how long it may take."""
    notes = []
    for calibration, expert in zip(measurement.calibrations, sources.experts, strict=False):
        if calibration.is_written:
            n_tokens = calibration.samples * calibration.max_tokens
            what = "texts" if calibration.source else "answers"
            note = f"{expert.name} writes {calibration.samples:,} {what}, {n_tokens:,} tokens with "
            note += "their prompts at most"
            if loading.device == "cpu":
                n_operations = 2 * _n_elements(expert.checkpoint) * n_tokens
                note += f": up to {_duration(n_operations / PER_SECOND)} on a CPU"
            notes.append(f"{note}.")
    return notes


def _n_elements(checkpoint: Checkpoint) -> int:
    return sum(tensor.n_elements for tensor in checkpoint.tensors.values())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.0f} hours"
