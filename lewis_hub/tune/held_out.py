"""Texts that a search measures drift on: further rows of each expert's calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any

from huggingface_hub import HfApi

from lewis_hub.calibration.texts import CalibrationTokens, tokens_of
from lewis_hub.display import SILENT, Progress
from lewis_hub.errors import CalibrationError, EvaluationError, SourceError
from lewis_hub.evaluate.backends import POSITIONS
from lewis_hub.recipe.schema import Calibration, ModelEntry
from lewis_hub.tune.objective import Search, draw_order
from lewis_hub.workflow.examine import Examined
from lewis_hub.workflow.open import OpenedSource
from lewis_hub.workflow.texts import (
    Drawn,
    DrawnText,
    ScoredTasks,
    TextData,
    TextSettings,
    Values,
    draw,
    drawn_texts,
    fixing_values,
    load_data,
    overlap_errors,
)

N_TEXTS = 64  # for each expert
READ_AT_ONCE = 64  # rows, each of which may be a book

_Further = tuple[CalibrationTokens, list[DrawnText]]


@dataclass(frozen=True)
class HeldOut:
    """The texts of all calibrations: those that a merge is fitted on, and those held out."""

    fitted: Mapping[Calibration, Drawn]
    held_out: Mapping[Calibration, CalibrationTokens]
    problems: tuple[str, ...]


def option_problems(asked: Search) -> Iterator[str]:
    """Yield the options that mean nothing for drift, as a problem with its remedy."""
    given = {"--metric": asked.metric, "--task": asked.tasks, "--split": asked.split}
    if named := [option for option, value in given.items() if value]:
        verb = "chooses" if len(named) == 1 else "choose"
        yield (
            f"{', '.join(named)} {verb} how answers are scored, but drift is measured on "
            "calibration texts without answers. Leave it out, or search by `--objective answers`."
        )


def missing_problems(
    declared: Iterable[tuple[ModelEntry, Calibration | None]],
) -> Iterator[str]:
    """Yield the experts without calibration data of their own."""
    for entry, calibration in declared:
        if calibration is None:
            yield (
                f"`{entry.model}` has no calibration data to measure drift on. Add `calibration` "
                "to this model: texts of the kind that it is good at; answers are not needed."
            )
        elif calibration.is_written:
            yield (
                f"`{entry.model}` writes its calibration texts itself, but drift is measured on "
                "further texts of the data. Leave `answers` and `from` out, or search by "
                "`--objective answers`."
            )


def model_problems(examined: Examined) -> Iterator[str]:
    """Yield why the predictions of the models cannot be compared token by token."""
    experts, donor = examined.sources.experts, examined.sources.donor
    others = [one.name for one in experts if one.translation is not None]
    if others or examined.tokens.alignment is not None:
        named = ", ".join(others) or "the merge"
        yield (
            f"{named}: its tokens have other ids than those of {donor.name}, but drift compares "
            "predictions token by token. Search by `--objective answers`."
        )
    if n_vocabulary(donor.config) is None:
        yield f"{donor.name}: its config.json has no `vocab_size`. Search by `--objective answers`."
    if donor.config.get("is_encoder_decoder"):
        yield (
            f"{donor.name} is an encoder-decoder, but drift is measured on texts that a decoder "
            "continues. Search by `--objective answers`."
        )


def n_vocabulary(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a model of this `config.json` predicts, if it says so."""
    return _config_value(config, "vocab_size")


def length_problems(donor: OpenedSource, known: HeldOut) -> Iterator[str]:
    """Yield the calibrations with a text that is longer than the models read."""
    n_positions = next(filter(None, (_config_value(donor.config, key) for key in POSITIONS)), None)
    for calibration, tokens in known.held_out.items():
        longest = max(map(len, tokens.ids), default=0)
        if longest > (n_positions or 0) > 0:
            yield (
                f"calibration on {calibration.data}: a text has {longest} tokens, but "
                f"{donor.name} has {n_positions} positions. Set `max_tokens: {n_positions}`, or "
                "less."
            )


def _config_value(config: Mapping[str, Any], key: str) -> int | None:
    value = (config.get("text_config") or config).get(key, config.get(key))
    return value if isinstance(value, int) else None


def hold_out(
    settings: TextSettings,
    n_texts: int,
    scored: ScoredTasks | None,
    api: HfApi,
    progress: Progress,
) -> HeldOut:
    """Draw the texts to fit on, and `n_texts` others of the same data for each calibration.

    The others follow in the order of the seed. A row is passed over if a merge is fitted on it, in
    whatever calibration or form, or if its text predicts no token.
    """
    fitted, held_out, problems = dict[Calibration, Drawn](), dict[Calibration, _Further](), []
    for calibration in dict.fromkeys(settings.calibrations):
        try:
            fitted[calibration] = draw(settings, calibration, api, SILENT)
        except (CalibrationError, EvaluationError, SourceError) as error:
            problems.append(str(error))
    for calibration in fitted:
        tokens, _ = held_out[calibration] = _further(settings, calibration, fitted, n_texts, api)
        where = f"{calibration.data}, split {calibration.split}"
        if len(tokens.ids) < n_texts:
            problems.append(
                f"calibration on {where}: {n_texts} texts are needed to measure drift, but "
                f"{len(tokens.ids)} are left besides the {calibration.samples} that a merge is "
                "fitted on. Give fewer --samples, or fewer `samples` in the calibration."
            )
        progress.say(
            f"{where}: {len(tokens.ids):,} texts, {tokens.n_tokens:,} tokens to measure drift on; "
            f"{len(fitted[calibration].texts):,} others are left to fit on."
        )
    texts = {one: [*fitted[one].texts, *others] for one, (_, others) in held_out.items()}
    problems += map(str, overlap_errors(scored, texts, progress))
    return HeldOut(fitted, {one: tokens for one, (tokens, _) in held_out.items()}, tuple(problems))


def _further(
    settings: TextSettings,
    calibration: Calibration,
    fitted: Mapping[Calibration, Drawn],
    n_texts: int,
    api: HfApi,
) -> _Further:
    """Return `n_texts` texts that no merge is fitted on, or all of the rows that are looked at."""
    rows = {
        row
        for other, drawn in fitted.items()
        if _has_same_rows(settings, other, calibration)
        for row in drawn.tokens.tokens.rows
    }
    known = {values for drawn in fitted.values() for text in drawn.texts for values in text.fixing}
    data = load_data(settings, calibration, api)
    looked_at = draw_order(len(data.rows), n_texts, len(rows), settings.seed)
    order = [i for i in looked_at if i not in rows]
    others, found = _others(data, order, known), list[int]()
    # a text that is passed over is not tokenised: of 400,000 equal ones that took minutes
    while some := list(islice(others, n_texts - len(found))):
        tokens = tokens_of(data.rows, some, calibration, data.tokenizer)
        found += [i for i, ids in zip(tokens.rows, tokens.ids, strict=True) if len(ids) > 1]
    tokens = tokens_of(data.rows, found, calibration, data.tokenizer)
    return tokens, drawn_texts(data.rows, data.template, tokens)


def _others(data: TextData, order: Sequence[int], known: Set[Values]) -> Iterator[int]:
    """Yield the rows that no known values identify, in this order."""
    for start in range(0, len(order), READ_AT_ONCE):
        some = order[start : start + READ_AT_ONCE]
        of_rows = fixing_values(data.rows, data.template, some)
        for row, fixing in zip(some, of_rows, strict=True):
            if known.isdisjoint(filter(None, fixing)):
                yield row


def _has_same_rows(settings: TextSettings, one: Calibration, other: Calibration) -> bool:
    is_same = settings.data[one] == settings.data[other]
    return is_same and (one.config, one.split) == (other.config, other.split)
