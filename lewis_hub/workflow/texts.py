"""Draw calibration texts, and refuse texts that hold scored items."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import nsmallest
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from lewis_hub.calibration import texts as calibration_texts
from lewis_hub.calibration.profile import calibration_facts
from lewis_hub.calibration.subject import CalibrationSet
from lewis_hub.calibration.texts import CalibrationTokens, Template, TextRows
from lewis_hub.display import Advance, Progress, shared
from lewis_hub.documents import leaves
from lewis_hub.errors import CalibrationError, EvaluationError
from lewis_hub.evaluate import items
from lewis_hub.evaluate.benchmarks import LoadedTasks
from lewis_hub.evaluate.contained import contained_items
from lewis_hub.evaluate.items import TaskItem, TaskRows, chat_of
from lewis_hub.evaluate.libraries import library_of
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.hub.changes import require_unchanged
from lewis_hub.hub.rows import load_rows
from lewis_hub.hub.source import Source
from lewis_hub.recipe.schema import Calibration
from lewis_hub.workflow.fetch import small_files
from lewis_hub.workflow.open import OpenedSource
from lewis_hub.workflow.task_data import PinnedTask, ScoredSources, commits_of, scored_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Values = frozenset[str]  # texts without case and white space
MAX_COMPARED = 256  # values of a text with those of each item; rows of benchmarks have about 20


@dataclass(frozen=True)
class DrawnText:
    """A calibration text or an item to tune on."""

    texts: tuple[str, ...]  # the rendered text, and the part of it that comes from the data
    fixing: tuple[Values, ...]  # sets of values of which each identifies the item


def drawn_texts(rows: TextRows, template: Template, tokens: CalibrationTokens) -> list[DrawnText]:
    """Return drawn rows for the comparison."""
    table = rows.rows(tokens.rows)
    if isinstance(rows, TaskRows):
        fixing = fixing_values(rows, template, tokens.rows)
        both = zip(table, fixing, strict=True)
        return [DrawnText(template.parts(row), known) for row, known in both]
    drawn = []
    for index, row in zip(tokens.rows, table, strict=True):
        parts = template.parts(row)
        joined = "\n".join(str(part) for part in parts if part is not None)
        drawn.append(DrawnText((template.render(index, row), joined), (values(parts),)))
    return drawn


def fixing_values(
    rows: TextRows, template: Template, indices: Sequence[int]
) -> list[tuple[Values, ...]]:
    """Return the sets of values of which each identifies a row.

    The columns of its text identify a row of a dataset. Its document, or its prompt with its
    answer, identifies an item of a task.
    """
    if isinstance(rows, TaskRows):
        return [_fixing(item) for item in rows.items(indices)]
    return [(values(template.parts(row)),) for row in rows.rows(indices)]


def drawn_items(items: Iterable[TaskItem]) -> list[DrawnText]:
    """Return items without few-shot examples for the comparison."""
    return [DrawnText((f"{item.prompt} {item.answer}",), _fixing(item)) for item in items]


def _fixing(item: TaskItem) -> tuple[Values, ...]:
    return values(item.document), values((item.prompt, item.answer))


def values(document: Any) -> Values:
    """Return all texts and numbers in a document, without case and white space."""
    found = (str(leaf) for leaf in leaves(document) if leaf is not None)
    return frozenset(" ".join(text.split()).casefold() for text in found) - {""}


def count_overlap(
    drawn: Sequence[DrawnText], scored: Sequence[TaskItem], advance: Advance
) -> Counter[str]:
    """Return the number of drawn items that each task scores; `advance` counts scored items."""
    found = {(item.task, index) for index, item in overlaps(drawn, scored, advance)}
    return Counter(task for task, _ in found)


def overlaps(
    drawn: Sequence[DrawnText], scored: Sequence[TaskItem], advance: Advance
) -> Iterator[tuple[int, TaskItem]]:
    """Yield the index of each drawn text that matches a scored item, with that item.

    The text contains the item's question (`contained_items`), or the item's document, prompt and
    answer contain all values that identify the text. Of more than `MAX_COMPARED` of them, only
    those that the fewest texts have are compared.
    """
    told = shared(advance, n_passes=2)
    texts = [(index, text) for index, one in enumerate(drawn) for text in one.texts]
    for place, item in contained_items([text for _, text in texts], _telling(scored, told)):
        yield texts[place][0], item
    by_rarest: defaultdict[str, list[tuple[int, tuple[str, ...]]]] = defaultdict(list)
    for index, rarest in _rarest_values(drawn):
        by_rarest[rarest[0]].append((index, rarest))
    for item in _telling(scored, told):
        whole = item.prompt + item.answer, f"{item.prompt} {item.answer}"
        known = values((item.document, item.prompt, item.answer, whole))
        for text in by_rarest.keys() & known:
            yield from ((i, item) for i, rarest in by_rarest[text] if known.issuperset(rarest))


def _telling(items: Sequence[TaskItem], advance: Advance) -> Iterator[TaskItem]:
    """Yield items, and tell each that is done."""
    for item in items:
        yield item
        advance(1)


def _rarest_values(drawn: Sequence[DrawnText]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the index of a text with values that identify it: the rarest first, then the longest.

    A value that many texts have would lead every item that has it, too, to all of them.
    """
    fixing = [(i, one) for i, text in enumerate(drawn) for one in filter(None, text.fixing)]
    n_texts = Counter(chain.from_iterable(one for _, one in fixing))
    for index, one in fixing:
        rarest = nsmallest(MAX_COMPARED, one, key=lambda text: (n_texts[text], -len(text), text))
        yield index, tuple(rarest)


@dataclass(frozen=True)
class ScoredTasks:
    """Tasks that are scored now or later; they are loaded on first use."""

    selection: TaskSelection
    are_scored_now: bool  # whether this run scores them; otherwise a later run does
    api: HfApi
    progress: Progress

    @cached_property
    def sources(self) -> ScoredSources:
        """The pinned repos and folders of their data."""
        return scored_sources(self.api, self.selection)

    @cached_property
    def loaded(self) -> LoadedTasks:
        """The loaded tasks."""
        self.progress.say("Loading the benchmarks")
        return library_of(self.selection).load(self.selection, commits_of(self.sources))

    def items(self) -> list[TaskItem]:
        """Return every item of every task."""
        try:
            return list(library_of(self.selection).items(self.loaded))
        except EvaluationError as error:
            if self.are_scored_now:
                raise
            remedy = f"{error.remedy}\nOr merge without comparing: `--allow-overlap`."
            raise EvaluationError(error.where, error.problem, remedy) from error


def refuse_overlap(
    scored: ScoredTasks | None, drawn: Mapping[Calibration, Sequence[DrawnText]], progress: Progress
) -> None:
    """Refuse calibrations whose texts contain items that are scored now or later."""
    for error in overlap_errors(scored, drawn, progress):
        raise error


def overlap_errors(
    scored: ScoredTasks | None, drawn: Mapping[Calibration, Sequence[DrawnText]], progress: Progress
) -> Iterator[CalibrationError]:
    """Yield an error for each calibration whose texts contain items that are scored."""
    compared = {one: items for one, items in drawn.items() if not one.allow_overlap}
    if scored is None or not compared:
        return
    known = scored.items()
    for calibration, texts in compared.items():
        title = f"Comparing texts of {calibration.data} with the items that are scored"
        with progress.stage(title, len(known), "items") as advance:
            found = count_overlap(texts, known, advance)
        if found:
            counts = ", ".join(f"{n} of {task}" for task, n in sorted(found.items()))
            yield CalibrationError(
                f"calibration on {calibration.data}, split {calibration.split}",
                f"of {len(texts)} texts, `evaluate` scores {counts}",
                "A score on calibration texts is meaningless: name another split, or another "
                "`seed`.\n`allow_overlap: true` in this calibration, or `--allow-overlap`, "
                "continues anyway.",
            )


Sets = Sequence[CalibrationSet]  # one per expert; empty if nothing is measured on texts


@dataclass(frozen=True)
class TextSettings:
    """The data of the calibration texts."""

    tokenizer: Source  # source whose tokenizer cuts the texts
    seed: int
    allow_code: bool
    data: Mapping[Calibration, Source | PinnedTask]
    calibrations: tuple[Calibration, ...]  # of each expert; empty if nothing is measured on texts
    beside: tuple[Path, ...] = ()  # folders in which texts of an earlier run may be


@dataclass(frozen=True)
class TextData:
    """The rows that texts of a calibration are drawn from, and what makes texts of them."""

    rows: TextRows
    facts: Mapping[str, Any]  # that name the data, for the profile
    template: Template
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Drawn:
    """Tokens to measure on, and the texts that are compared with scored items."""

    tokens: CalibrationSet
    texts: list[DrawnText]


def draw(settings: TextSettings, calibration: Calibration, api: HfApi, progress: Progress) -> Drawn:
    """Draw, render and tokenise the texts of one calibration."""
    donor = settings.tokenizer
    if calibration.source:
        begun = calibration_texts.beginnings(calibration, _load_tokenizer(donor, api))
        named, digest = {"dataset": calibration.data}, _tokenizer_digest(donor)
        facts = calibration_facts(calibration, named, settings.seed, digest)
        return Drawn(CalibrationSet(facts | begun.facts, begun), [])
    data = load_data(settings, calibration, api)
    tokens = calibration_texts.calibration_tokens(
        data.rows, calibration, data.tokenizer, settings.seed
    )
    drawn = f"{len(tokens.ids):,} texts, {tokens.n_tokens:,} tokens"
    progress.say(f"{calibration.data}: {'; '.join((drawn, *tokens.notes))}.")
    facts = calibration_facts(calibration, data.facts, settings.seed, _tokenizer_digest(donor))
    texts = drawn_texts(data.rows, data.template, tokens)
    return Drawn(CalibrationSet(facts | tokens.facts, tokens), texts)


def load_data(settings: TextSettings, calibration: Calibration, api: HfApi) -> TextData:
    """Load the rows of a calibration that does not write its texts from nothing."""
    tokenizer = _load_tokenizer(settings.tokenizer, api)
    template = calibration_texts.template_of(calibration, tokenizer)
    data = settings.data[calibration]
    if isinstance(data, Source):
        facts = {"dataset": data.pinned, "dataset_sha": data.commit_sha}
        table = load_rows(api, data, calibration.config, calibration.split)
        return TextData(table, facts, template, tokenizer)
    may_overlap = calibration.allow_overlap
    selection = replace(data.selection, allow_code=settings.allow_code)
    rows = items.load_rows(selection, calibration.split, data.commits, allow_scored=may_overlap)
    for source in data.datasets:
        require_unchanged(source)
    rows = replace(rows, chat=chat_of(tokenizer)) if calibration.chat_template else rows
    rows = replace(rows, answered=calibration.answers is None)
    return TextData(rows, data.facts, template, tokenizer)


def _load_tokenizer(source: Source, api: HfApi) -> PreTrainedTokenizerBase:
    from lewis_hub.calibration.model import load_tokenizer  # torch: only here

    return load_tokenizer(str(small_files(api, source)), source.name)


def _tokenizer_digest(source: Source) -> str:
    """Return a digest over the tokenizer's files, which determine the token ids."""
    files = [file for file in source.files if "token" in file.path or "vocab" in file.path]
    lines = "\n".join(f"{file.path} {file.digest}" for file in files)
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def draw_texts(
    settings: TextSettings, scored: ScoredTasks | None, api: HfApi, progress: Progress
) -> dict[Calibration, Drawn]:
    """Draw the texts of all calibrations; no text may hold an item that `scored` scores."""
    distinct = dict.fromkeys(settings.calibrations)
    drawn = {texts: draw(settings, texts, api, progress) for texts in distinct}
    refuse_overlap(scored, {key: one.texts for key, one in drawn.items()}, progress)
    return drawn


def calibration_sets(
    settings: TextSettings, drawn: Mapping[Calibration, Drawn], experts: Sequence[OpenedSource]
) -> tuple[CalibrationSet, ...]:
    """Return a set per expert; equal sets are shared."""
    sets = tuple(drawn[texts].tokens for texts in settings.calibrations)
    if sets:
        for expert, texts in zip(experts, sets, strict=True):
            remap_token_ids(texts, expert, settings.tokenizer.name)
    return sets


def remap_token_ids(texts: CalibrationSet, source: OpenedSource, tokenizer: str) -> CalibrationSet:
    """Return a set in the token ids of a source; `tokenizer` names the model that cut the texts."""
    remap, tokens = source.translation, texts.tokens
    if remap is None:
        return texts
    used = dict.fromkeys(i for text in tokens.ids for i in text)
    if lacking := [remap.lacking.get(i, f"number {i}") for i in used if i not in remap.ids]:
        problem = f"{source.name} has no token {lacking[0]!r}"
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        remedy = "All models need the same tokens: choose other texts, use guide `uniform`, or "
        remedy += "remove this model."
        where = f"calibration texts, cut by the tokenizer of {tokenizer}"
        raise CalibrationError(where, problem + more, remedy)
    ids = tuple(tuple(remap.ids[i] for i in text) for text in tokens.ids)
    end = None if tokens.end is None else remap.ids.get(tokens.end)
    return replace(texts, tokens=replace(tokens, ids=ids, end=end))
