"""Tables and sentences that the commands print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lewis_hub.display import size

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType
    from rich.table import Table

    from lewis_hub.calibration.profile import ImportanceProfile
    from lewis_hub.demo.bench import Timing, Usage
    from lewis_hub.display import TextTable
    from lewis_hub.evaluate.scores import MetricScore, Scores
    from lewis_hub.hub.publish import Published
    from lewis_hub.merge.task_vectors import Extracted
    from lewis_hub.pipeline import Merged
    from lewis_hub.report.profiles import ProfileComparison
    from lewis_hub.tune.run import Tuned
    from lewis_hub.workflow.calibrate import Calibrated
    from lewis_hub.workflow.check import CheckReport
    from lewis_hub.workflow.verify import Verdict


COLUMN_GAP = 2  # spaces after a column


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, COLUMN_GAP, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    return table


def plain(*cells: str) -> tuple[RenderableType, ...]:
    """Wrap texts so that rich does not read names from repos as markup."""
    from rich.text import Text

    return tuple(map(Text, cells))


def check_tables(report: CheckReport) -> tuple[RenderableType, ...]:
    """Sources, problems, and what the merge will take."""
    return (_of_texts(report.table), "", *plain(*report.lines))


def _of_texts(texts: TextTable) -> Table:
    table = _table(*texts.header)
    for row in texts.rows:
        table.add_row(*plain(*row))
    return table


def scores_table(scores: Scores) -> RenderableType:
    """A row per task and metric, a column per model."""
    from lewis_hub.report.findings import model_name

    header = ("task", "metric", "n", *map(model_name, scores.labels))
    return _of_texts(replace(scores.table, header=header))


def models_table(merges: Mapping[str, Scores]) -> RenderableType:
    """Several merges of the same experts: a row per model, a column per task and metric.

    Args:
        merges: display name of each merge -> its scores and those of the models that it was
            compared with. No two merges have a twin of the same kind.
    """
    from lewis_hub.evaluate.scores import MERGED, TWINS
    from lewis_hub.report.findings import metric_name, model_name

    rows: dict[str, dict[str, MetricScore]] = {}
    for title, scores in merges.items():
        for task, scored in scores.tasks.items():
            for label in sorted(scored.models, key=lambda label: label in TWINS):  # twins last
                name = title if label == MERGED else model_name(label)
                row = rows.setdefault(f"its {name}" if label in TWINS else name, {})
                metrics = scored.models[label].items()
                row |= {f"{task} ({metric_name(key)})": score for key, score in metrics}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = _table("model", *columns)
    for name, row in rows.items():
        table.add_row(*plain(name, *(str(row.get(column, "-")) for column in columns)))
    return table


def density_table(calibrated: Calibrated) -> RenderableType:
    """Mean, lowest and highest density of each expert, or weight where only those are set."""
    return _of_texts(calibrated.table)


def importance_table(profile: ImportanceProfile, n_shown: int) -> RenderableType:
    """The modules with the highest importance."""
    from lewis_hub.report.profiles import short_name

    table = _table("source", "module", "importance")
    for entry in profile.sources:
        ranked = sorted(entry.modules.items(), key=lambda item: -item[1])
        for module, value in ranked[:n_shown]:
            table.add_row(*plain(short_name(entry.source), module, f"{value:,.4g}"))
    return table


def comparison_table(pair: ProfileComparison, n_shown: int) -> Iterator[RenderableType]:
    """The modules with the largest change, and sentences about the rank correlation."""
    from lewis_hub.report.profiles import short_name

    table = _table("source", "module", "A", "B", "change")
    for row in pair.by_change[:n_shown]:
        change = "-" if row.change is None else f"{row.change:+.1%}"
        numbers = (f"{row.before:,.4g}", f"{row.after:,.4g}", change)
        table.add_row(*plain(short_name(pair.after), row.module, *numbers))
    yield table
    yield from plain(*pair.sentences)


def trials_tables(tuned: Tuned, n_shown: int, width: int) -> Iterator[RenderableType]:
    """The best trials, and always the recipe's own settings.

    Columns that do not fit into the width follow in further tables.
    """
    from lewis_hub.tune.space import short_name, shown_value

    lower = tuned.objective.lower_is_better
    complete = [(trial.value, trial) for trial in tuned.trials if trial.value is not None]
    ranked = [t for _, t in sorted(complete, key=lambda pair: pair[0] if lower else -pair[0])]
    shown = ranked[:n_shown]
    if tuned.start and tuned.start not in shown:
        shown.append(tuned.start)
    parts = (
        "best" if trial is tuned.best else "recipe" if trial is tuned.start else ""
        for trial in shown
    )
    keys = [["trial", *(str(trial.number) for trial in shown)], ["", *parts]]
    metric = tuned.objective.metric.removesuffix(",none")
    columns = [[_in_lines(metric), *(f"{trial.value:.4f}" for trial in shown)]]
    for name in dict.fromkeys(name for trial in shown for name in trial.values):
        values = (shown_value(trial.values.get(name)) for trial in shown)
        columns.append([_in_lines(short_name(name)), *values])
    for number, group in enumerate(_fit_columns(keys, columns, width)):
        if number:
            yield from plain("")
        table = _table(*(column[0] for column in group))
        for cells in zip(*(column[1:] for column in group), strict=True):
            table.add_row(*plain(*cells))
        yield table


def _in_lines(head: str) -> str:
    """Break a column's head between words, because heads are wider than numbers."""
    return head.replace("_", "_\n").replace(".", ".\n").replace(",", ",\n")


def _fit_columns(
    keys: Sequence[Sequence[str]], columns: Sequence[Sequence[str]], width: int
) -> Iterator[list[Sequence[str]]]:
    """Split columns into groups that fit into `width`; every group starts with `keys`."""
    group, left = [*keys], width - sum(map(_width, keys))
    for column in columns:
        if _width(column) > left and len(group) > len(keys):
            yield group
            group, left = [*keys], width - sum(map(_width, keys))
        group.append(column)
        left -= _width(column)
    yield group


def _width(column: Sequence[str]) -> int:
    return max(len(line) for cell in column for line in cell.split("\n")) + COLUMN_GAP


def outcome(merged: Merged, published: Published | None) -> Iterator[RenderableType]:
    """Scores, verdict of the gate, output folder and published address."""
    if merged.scores:
        yield scores_table(merged.scores)
    yield from plain(*merged.lines)
    if published and not merged.published:
        yield from plain(str(published))


def verdict_lines(verdict: Verdict, *, rebuilt: bool) -> tuple[RenderableType, ...]:
    """The problems, or the confirmation that there are none."""
    if verdict.problems:
        return plain(*(f"problem: {problem}" for problem in verdict.problems))
    rebuild = " Repeating the merge gave the same files." if rebuilt else ""
    signature = {
        "none": "The merge is not signed.",
        "unchecked": "The merge is signed: check the signature with --public-key.",
        "holds": "The signature is valid.",
    }
    return plain(
        f"{verdict.n_files} files match the lock {verdict.lock.digest[:19]}….{rebuild}",
        signature[verdict.signature],
    )


def schedules_table(schedules: Sequence[Mapping[str, str | None]]) -> RenderableType:
    """A row per schedule."""
    table = _table("id", "schedule", "flavor", "command")
    for schedule in schedules:
        cells = (schedule[name] for name in ("id", "schedule", "flavor", "command"))
        table.add_row(*plain(*(cell or "-" for cell in cells)))
    return table


def timings_table(timings: Sequence[Timing]) -> RenderableType:
    """A row per case; without mergekit our figures alone."""
    table = _table("model", "merge", "lewis-hub", "peak", "first run", "mergekit", "peak", "ratio")
    for timing in timings:
        model, _, merge = timing.case.name.partition(", ")
        ratio = f"{timing.ratio:.1f} ×" if timing.ratio else "-"
        first = f"{timing.first.seconds:.2f} s"
        cells = (*_usage(timing.ours), first, *_usage(timing.mergekit), ratio)
        table.add_row(*plain(model, merge, *cells))
    return table


def _usage(usage: Usage | None) -> tuple[str, str]:
    return (f"{usage.seconds:.2f} s", size(usage.peak_bytes)) if usage else ("-", "-")


def extraction(adapter: Extracted, output: Path) -> tuple[RenderableType, ...]:
    """Ranks and relative errors of an extracted adapter, and its size."""
    ranks = [fit.rank for fit in adapter.fits.values()]
    errors = [fit.error for fit in adapter.fits.values()]
    parts = []
    if ranks:
        parts.append(
            f"{len(ranks)} modules of rank {min(ranks)} to {max(ranks)}, relative error "
            f"{sum(errors) / len(errors):.2%} on average and {max(errors):.2%} at most"
        )
    if adapter.whole:
        parts.append(f"{len(adapter.whole)} tensors stored whole")
    return plain("; ".join(parts), f"{size(adapter.n_bytes)} in {output}")
