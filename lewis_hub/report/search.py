"""A search as a table, a picture and a document: what was tried and how good it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.report.plots import THEMES, Theme, own_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Value = float | bool | str
BEST = "#d1495b"  # no colour of the scale


@dataclass(frozen=True)
class Tried:
    """One trial; `value` is None where it was left early or failed."""

    number: int
    values: Mapping[str, Value]
    value: float | None


@dataclass(frozen=True)
class Picture:
    """Trials as lines over their axes.

    Attributes:
        trials: those that were scored to the end are drawn.
        best: number of the one that stands out.
    """

    title: str
    objective: str
    trials: tuple[Tried, ...]
    best: int
    lower_is_better: bool


def draw_search(picture: Picture, folder: Path) -> tuple[str, ...]:
    """Draw it light and dark; returns the files' names, none where there is nothing to draw."""
    complete = [trial for trial in picture.trials if trial.value is not None]
    if not any(trial.values for trial in complete):
        return ()
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for theme in THEMES:
        names.append(f"search-{theme.name}.png")
        _save(picture, complete, theme, folder / names[-1])
    return tuple(names)


def places(trials: Sequence[Tried], axis: str) -> dict[int, float]:
    """Number of each trial that has the axis -> its place on it, 0 to 1.

    Numbers lie between the lowest and the highest that were tried; choices are evenly spread.
    """
    values = {trial.number: trial.values[axis] for trial in trials if axis in trial.values}
    if any(isinstance(value, str | bool) for value in values.values()):
        order = sorted({str(value) for value in values.values()})
        last = max(len(order) - 1, 1)
        return {number: order.index(str(value)) / last for number, value in values.items()}
    numbers = {number: float(value) for number, value in values.items()}
    low, high = min(numbers.values()), max(numbers.values())
    span = high - low
    return {number: (value - low) / span if span else 0.5 for number, value in numbers.items()}


def _save(picture: Picture, complete: Sequence[Tried], theme: Theme, path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for trial in complete for name in trial.values))
    values = [trial.value for trial in complete if trial.value is not None]
    # the better a trial, the more it stands out from the paper
    low_is_dark = picture.lower_is_better == (theme.name == "light")
    scale = colormaps["viridis" if low_is_dark else "viridis_r"]
    colours: Any = ScalarMappable(Normalize(min(values), max(values)), scale)
    with own_style(theme):
        width = max(5.0, 1.25 * len(names) + 1.6)
        figure = Figure(figsize=(width, 3.6), dpi=144, facecolor=theme.paper, layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor(theme.paper)
        at = {name: places(complete, name) for name in names}
        for trial in sorted(complete, key=lambda one: one.number == picture.best):
            is_best = trial.number == picture.best
            across = [i for i, name in enumerate(names) if name in trial.values]
            axes.plot(
                across,
                [at[names[i]][trial.number] for i in across],
                color=BEST if is_best else colours.to_rgba(trial.value),
                lw=2.4 if is_best else 1.0,
                alpha=1.0 if is_best else 0.8,
                marker="o",
                ms=3,
            )
        _label(axes, complete, names, theme)
        axes.set_title(picture.title, loc="left", size=10, weight="bold", color=theme.ink)
        bar = figure.colorbar(colours, ax=axes, label=picture.objective)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        figure.savefig(path, metadata={"Software": None})


def _label(axes: Axes, complete: Sequence[Tried], names: Sequence[str], theme: Theme) -> None:
    """Each axis with its name, and what its ends stand for."""
    axes.set_xticks(range(len(names)), [name.replace(".", ".\n", 1) for name in names])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylim(-0.12, 1.12)
    axes.set_xlim(-0.4, len(names) - 0.6)
    for i, name in enumerate(names):
        axes.axvline(i, color=theme.faint, lw=1, zorder=0)
        of = {place: trial for trial in complete for place in _place(complete, name, trial)}
        for place in {min(of), max(of)}:
            value = of[place].values[name]
            told = f"{value:.3g}" if isinstance(value, float) else str(value).lower()
            above = place > 0.5
            axes.text(
                i, place + (0.04 if above else -0.04), told, size=7.5, ha="center",
                va="bottom" if above else "top", color=theme.ink,
            )  # fmt: skip


def _place(complete: Sequence[Tried], name: str, trial: Tried) -> list[float]:
    found = places(complete, name)
    return [found[trial.number]] if trial.number in found else []
