"""Pictures of models that were matched: how similar their blocks are, and their matched units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.merge.aligned import CALLED, AlignedModel, MatchedBlocks
from lewis_hub.merge.symmetries import MLP, RESIDUAL
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
from lewis_hub.report.profiles import short_name, unique_slugs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

FONT = 9.5
CELL = 0.24  # inches
LEAST, MOST = 1.6, 4.4  # inches: of a side of the map
NAMED = 3.0  # inches beside a map whose rows have names
SEEN = {"outputs": "CKA of outputs", "updates": "CKA of what they add"}
EVERY = (1, 2, 4, 5, 10, 20, 50, 100, 200)  # steps between numbered blocks


@dataclass(frozen=True)
class SimilarityMap:
    """How similar blocks are in pairs, or matched units of each kind in each block."""

    stem: str  # of its files
    values: Sequence[Sequence[float]]  # by row and column; NaN: nothing was matched
    framed: tuple[tuple[int, int], ...]  # row and column
    rows: tuple[str, ...]  # names; empty: numbers
    across: str  # what the columns are
    down: str
    caption: str


@dataclass(frozen=True)
class MatchPictures:
    """The pictures of a model that was matched."""

    blocks: Picture | None
    units: Picture | None

    @property
    def drawn(self) -> tuple[Picture, ...]:
        """Those that there are."""
        return tuple(one for one in (self.blocks, self.units) if one)


def draw_matches(models: Iterable[AlignedModel], folder: Path) -> dict[str, MatchPictures]:
    """Draw each model of another depth or width, light and dark; return source -> pictures.

    The same data give the same bytes with the same version of matplotlib.
    """
    resized = [one for one in models if one.blocks or one.widths]
    slugs = unique_slugs([one.source for one in resized])
    return {
        one.source: MatchPictures(
            _drawn(_of_blocks(one, one.blocks), slug, folder) if one.blocks else None,
            _drawn(_of_units(one), slug, folder) if one.widths else None,
        )
        for slug, one in zip(slugs, resized, strict=True)
    }


def _drawn(similar: SimilarityMap, slug: str, folder: Path) -> Picture:
    files = [f"{similar.stem}-{slug}-{theme.name}.png" for theme in THEMES]
    for theme, file in zip(THEMES, files, strict=True):
        _save(similar, theme, folder / file)
    return Picture(files[0], files[1], similar.caption)


def _of_blocks(model: AlignedModel, blocks: MatchedBlocks) -> SimilarityMap:
    reference, own = short_name(model.reference), short_name(model.source)
    shares = {
        "cosine of weights": blocks.weight_similarity,
        SEEN[blocks.compared]: 1 - blocks.weight_similarity,
    }
    parts = [f"{100 * share:g} % {name}" for name, share in shares.items() if share]
    similarity = f"Similarity ({', '.join(parts)}) of the blocks of {reference} (rows) and {own}"
    across, down = (f"block of {shortened(drawable(name), 24)}" for name in (own, reference))
    return SimilarityMap(
        "blocks",
        blocks.similarity,
        tuple((row, column) for row, column in enumerate(blocks.numbers) if column is not None),
        (),
        across,
        down,
        f"{similarity} (columns). Framed pairs were matched.",
    )


def _of_units(model: AlignedModel) -> SimilarityMap:
    kinds = [kind for kind in CALLED if kind != RESIDUAL]
    empty = model.blocks.identity if model.blocks else ()
    n_blocks = sum(group.endswith(f".{MLP}") for group in model.orders) + len(empty)
    values = [[model.after.get(f"{n}.{kind}", nan) for n in range(n_blocks)] for kind in kinds]
    reference, own = short_name(model.reference), short_name(model.source)
    caption = f"Mean similarity of the matched units of {own} and {reference}, by kind and block"
    caption += f" of {reference}. Columns of identity blocks are empty." if empty else "."
    rows = tuple(CALLED[kind] for kind in kinds)
    return SimilarityMap("units", values, (), rows, "block", "", caption)


def _save(drawn: SimilarityMap, theme: Theme, path: Path) -> None:
    n_rows, n_columns = len(drawn.values), len(drawn.values[0])
    width, height = (min(max(CELL * n, LEAST), MOST) for n in (n_columns, n_rows))
    with own_style(theme.ink):
        from matplotlib.figure import Figure

        size = width + (NAMED if drawn.rows else 1.9), height + 0.8
        figure = Figure(figsize=size, dpi=DPI, facecolor=theme.paper, layout="constrained")
        axes = figure.add_subplot()
        image = _draw(axes, drawn, theme)
        axes.set_xlabel(drawn.across, size=FONT)
        axes.set_ylabel(drawn.down, size=FONT)
        bar = figure.colorbar(image, ax=axes, label="similarity")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=FONT - 1)
        figure.savefig(path, metadata={"Software": None})


def _draw(axes: Axes, drawn: SimilarityMap, theme: Theme) -> AxesImage:
    from matplotlib.patches import Rectangle

    axes.set_facecolor(theme.paper)
    image = axes.imshow(
        drawn.values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1
    )
    for row, column in drawn.framed:
        corner = column - 0.5, row - 0.5
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=HIGHLIGHT, lw=1.6))
    sizes = len(drawn.values[0]), len(drawn.values)
    for n_places, set_ticks in zip(sizes, (axes.set_xticks, axes.set_yticks), strict=True):
        step = next(s for s in EVERY if n_places <= 12 * s)
        set_ticks(range(0, n_places, step))
    if drawn.rows:
        axes.set_yticks(range(len(drawn.rows)), drawn.rows)
    axes.tick_params(length=0, labelsize=FONT - 1)
    axes.spines[:].set_visible(False)
    return image
