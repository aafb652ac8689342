"""The chart of a card: every model's score on every task with its 95 % interval, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.evaluate.scores import BASE, EXPERT, MERGED, Scores
from lewis_hub.report.findings import MERGED_ROW, in_order, interval, model_name, readable_metric
from lewis_hub.report.plots import (
    DPI,
    HIGHLIGHT,
    THEMES,
    Picture,
    Theme,
    drawable,
    own_style,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEM = "scores"
WIDTH = 5.0  # inches: a phone shows it at half its size, where 10 pt are still readable
FONT = 10.0
MODEL, GAP, AXIS = 0.14, 0.36, 0.34  # inches: of a model, of a row's title, below an axis
MAX_ROWS = 16  # with more, only the first metric of each task is drawn
MAX_TEXT = 46  # characters of a title or name
EXPERT_MARKS, TWIN_MARKS = "osv^Dph<>", "x+*"
BLUES = {"light": "#1d5fa8", "dark": "#7db1ff"}
GREYS = {"light": "#6b7280", "dark": "#9ca3af"}


@dataclass(frozen=True)
class Point:
    """A model's score on a task: a label in the scores, a value, its interval."""

    label: str
    value: float
    ends: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """A task and metric with the points of all models."""

    title: str
    points: tuple[Point, ...]

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest end of its intervals."""
        values = [value for point in self.points for value in (point.value, *(point.ends or ()))]
        return min(values), max(values)

    @property
    def is_share(self) -> bool:
        """Whether all its values are between 0 and 1."""
        return all(0 <= point.value <= 1 for point in self.points)


@dataclass(frozen=True)
class Mark:
    """How a model is drawn: by colour and by form, so that either tells it from the others."""

    form: str
    colour: str
    is_filled: bool


def draw_scores(scores: Scores, folder: Path) -> Picture | None:
    """Draw the chart into a folder; the same scores give equal bytes. None: no score is finite."""
    rows = score_rows(scores)
    if not rows:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {point.label for row in rows for point in row.points}
    labels = [label for label in in_order(scores) if label in drawn]
    names = tuple(f"{STEM}-{theme.name}.png" for theme in THEMES)
    for theme, name in zip(THEMES, names, strict=True):
        _save(rows, labels, theme, folder / name)
    caption = f"Scores of {len(labels)} models with 95 % intervals: "
    return Picture(names[0], names[1], caption + "; ".join(row.title for row in rows) + ".")


def score_rows(scores: Scores) -> list[Row]:
    """A row per task and metric, or per task if there are too many; first those between 0 and 1."""
    rows: dict[tuple[str, str], Row] = {}
    for name, task in scores.tasks.items():
        for metric in task.models.get(MERGED, {}):
            known = {label: one[metric] for label, one in task.models.items() if metric in one}
            points = tuple(
                Point(label, float(known[label].value), interval(known[label], task.n))
                for label in in_order(scores)
                if label in known and isfinite(known[label].value)
            )
            if points:
                lower = "" if known[MERGED].higher_is_better else ", lower is better"
                title = f"{name}, {readable_metric(metric)}, {task.n:,} items{lower}"
                rows[name, metric] = Row(title, points)
    if len(rows) > MAX_ROWS:
        first = {name: metric for name, metric in reversed(rows)}
        rows = {key: row for key, row in rows.items() if first[key[0]] == key[1]}
    return sorted(rows.values(), key=lambda row: not row.is_share)


def marks(labels: Sequence[str], theme: Theme) -> dict[str, Mark]:
    """The mark of each model; only the merge is red."""
    found: dict[str, Mark] = {}
    n_experts = n_twins = 0
    for label in labels:
        if label == MERGED:
            found[label] = Mark("D", HIGHLIGHT, is_filled=True)
        elif label.startswith(EXPERT):
            form = EXPERT_MARKS[n_experts % len(EXPERT_MARKS)]
            found[label] = Mark(form, BLUES[theme.name], is_filled=True)
            n_experts += 1
        elif label == BASE:
            found[label] = Mark("o", GREYS[theme.name], is_filled=False)
        else:
            form = TWIN_MARKS[n_twins % len(TWIN_MARKS)]
            found[label] = Mark(form, GREYS[theme.name], is_filled=True)
            n_twins += 1
    return found


def _save(rows: Sequence[Row], labels: Sequence[str], theme: Theme, path: Path) -> None:
    """Draw the chart; lengths are in inches from the top."""
    shares = [row for row in rows if row.is_share]
    groups = [group for group in (shares, *([row] for row in rows if not row.is_share)) if group]
    heights = [sum(GAP + MODEL * len(row.points) for row in group) for group in groups]
    legend = 0.18 * len(labels) + 0.12
    up = legend + sum(heights) + AXIS * len(groups) + 0.05
    with own_style(theme.ink):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, up), dpi=DPI, facecolor=theme.paper)
        used, drawn_as, top = marks(labels, theme), [], legend
        for group, height in zip(groups, heights, strict=True):
            below = 1 - (top + height) / up
            axes = figure.add_axes((0.03, below, 0.94, height / up))
            _draw(axes, group, used, theme)
            top += height + AXIS
        for label in labels:
            name = MERGED_ROW if label == MERGED else drawable(model_name(label))
            drawn_as.append((_handle(used[label]), shortened(name, MAX_TEXT)))
        handles, names = zip(*drawn_as, strict=True)
        figure.legend(
            handles,
            names,
            loc="upper left",
            bbox_to_anchor=(0.01, 1),
            frameon=False,
            fontsize=FONT,
            labelspacing=0.25,
            handletextpad=0.4,
            borderaxespad=0.3,
        )
        figure.savefig(path, metadata={"Software": None})


def _handle(mark: Mark) -> object:
    from matplotlib.lines import Line2D

    face = mark.colour if mark.is_filled else "none"
    return Line2D([], [], marker=mark.form, color=mark.colour, mfc=face, ls="none", ms=6)


def _draw(axes: Axes, rows: Sequence[Row], used: dict[str, Mark], theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    y = 0.0
    for row in rows:
        y += GAP
        axes.annotate(
            shortened(drawable(row.title), MAX_TEXT),
            (0, y - 0.12),
            xycoords=("axes fraction", "data"),
            size=FONT,
            weight="bold",
            va="bottom",
            annotation_clip=False,
        )
        for point in row.points:
            mark = used[point.label]
            if point.ends:
                axes.plot(point.ends, (y, y), color=mark.colour, lw=1.4, solid_capstyle="butt")
            face = mark.colour if mark.is_filled else theme.paper
            size = 6.5 if point.label == MERGED else 5.5
            axes.plot(
                point.value,
                y,
                marker=mark.form,
                color=mark.colour,
                mfc=face,
                ms=size,
                clip_on=False,
            )
            y += MODEL
    low, high = min(row.ends[0] for row in rows), max(row.ends[1] for row in rows)
    margin = 0.04 * (high - low or 1.0)
    axes.set_xlim(0.0 - margin if low >= 0 else low - margin, high + margin)
    axes.set_ylim(y, 0.0)
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=FONT)
    axes.grid(axis="x", color=theme.faint, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
