"""Pictures of matched blocks: the similarity of all pairs, with the pairs that were matched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lewis_hub.merge.aligned import AlignedModel, MatchedBlocks
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

STEM = "blocks"
FONT = 9.5
CELL = 0.24  # inches
LEAST, MOST = 1.6, 4.4  # inches: of a side of the map
EVERY = (1, 2, 4, 5, 10, 20, 50, 100, 200)  # steps between numbered blocks


def draw_blocks(models: Iterable[AlignedModel], folder: Path) -> dict[str, Picture]:
    """Draw the blocks of each model of another depth, light and dark; return source -> picture.

    The same data give the same bytes with the same version of matplotlib.
    """
    found = {one.source: (one, one.blocks) for one in models if one.blocks}
    pictures = {}
    for slug, (model, blocks) in zip(unique_slugs(list(found)), found.values(), strict=True):
        files = [f"{STEM}-{slug}-{theme.name}.png" for theme in THEMES]
        for theme, file in zip(THEMES, files, strict=True):
            _save(model, blocks, theme, folder / file)
        pictures[model.source] = Picture(files[0], files[1], _sentence(model, blocks))
    return pictures


def _sentence(model: AlignedModel, blocks: MatchedBlocks) -> str:
    reference, own = short_name(model.reference), short_name(model.source)
    shares = {
        "cosine of weights": blocks.weight_similarity,
        "CKA of outputs": 1 - blocks.weight_similarity,
    }
    parts = [f"{100 * share:g} % {name}" for name, share in shares.items() if share]
    similarity = f"Similarity ({', '.join(parts)}) of the blocks of {reference} (rows) and {own}"
    return f"{similarity} (columns). Framed pairs were matched."


def _save(model: AlignedModel, blocks: MatchedBlocks, theme: Theme, path: Path) -> None:
    from matplotlib.figure import Figure

    n_rows, n_columns = len(blocks.similarity), len(blocks.similarity[0])
    width, height = (min(max(CELL * n, LEAST), MOST) for n in (n_columns, n_rows))
    with own_style(theme.ink):
        size = width + 1.9, height + 0.8
        figure = Figure(figsize=size, dpi=DPI, facecolor=theme.paper, layout="constrained")
        axes = figure.add_subplot()
        image = _draw(axes, blocks, theme)
        names = [shortened(drawable(short_name(n)), 24) for n in (model.source, model.reference)]
        axes.set_xlabel(f"block of {names[0]}", size=FONT)
        axes.set_ylabel(f"block of {names[1]}", size=FONT)
        bar = figure.colorbar(image, ax=axes, label="similarity")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=FONT - 1)
        figure.savefig(path, metadata={"Software": None})


def _draw(axes: Axes, blocks: MatchedBlocks, theme: Theme) -> AxesImage:
    from matplotlib.patches import Rectangle

    axes.set_facecolor(theme.paper)
    image = axes.imshow(
        blocks.similarity, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1
    )
    for row, column in enumerate(blocks.numbers):
        if column is not None:
            corner = column - 0.5, row - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=HIGHLIGHT, lw=1.6))
    sizes = len(blocks.similarity[0]), len(blocks.similarity)
    for n_blocks, set_ticks in zip(sizes, (axes.set_xticks, axes.set_yticks), strict=True):
        step = next(s for s in EVERY if n_blocks <= 12 * s)
        set_ticks(range(0, n_blocks, step))
    axes.tick_params(length=0, labelsize=FONT - 1)
    axes.spines[:].set_visible(False)
    return image
