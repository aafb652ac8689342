"""The pictures of a merge: what calibration measured and what the guide made of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lewis_hub.errors import ProfileError
from lewis_hub.guides.density import DensitySchedule, ExpertSchedule
from lewis_hub.guides.importance import ImportanceProfile, SourceImportance
from lewis_hub.report.grid import arrange, clip, relative_change
from lewis_hub.report.heatmap import THEMES, HeatMap, note_on, save

Kind = Literal["importance", "density", "weight"]

WORDS = {  # measure -> what a map of it shows
    "lewis": "importance",
    "lewis_reference": "importance",
    "outliers": "share of outliers",
    "evenness": "evenness of input channels",
    "output_shift": "change of outputs",
    "task_vector": "size of the task vector",
}
PAIRED = ("output_shift", "task_vector")  # relative to the base's already


@dataclass(frozen=True)
class Plot:
    """A picture in its two versions.

    Attributes:
        expert: the source that it is of.
        light: file name, such as `density-math-light.png`.
        dark: the same picture for dark pages.
        caption: what it shows, in words.
        note: where its colours end below the highest values; empty where they do not.
    """

    kind: Kind
    expert: str
    light: str
    dark: str
    caption: str
    note: str = ""

    @property
    def files(self) -> tuple[str, str]:
        """Both file names."""
        return self.light, self.dark


def draw(
    profile: ImportanceProfile | None, schedule: DensitySchedule | None, folder: Path
) -> tuple[Plot, ...]:
    """Draw a map of what was measured and one of what was decided per expert into `folder`.

    The same data gives the same bytes under one version of matplotlib.

    Args:
        profile: None where nothing was measured; its experts get no importance map.
        schedule: None where no guide decided; no density map then.
        folder: is made where it is not there.

    Returns:
        The plots, importance before density, experts in the recipe's order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    profile = profile.by(profile.measures[0]) if profile and profile.measures else None
    measured = profile.experts if profile else ()
    scheduled = schedule.experts if schedule else ()
    sources = dict.fromkeys([e.source for e in measured] + [e.source for e in scheduled])
    slugs = dict(zip(sources, unique_slugs(sources), strict=True))
    maps: list[tuple[Kind, str, HeatMap | None]] = []
    if profile:
        maps += [("importance", one.source, _importance(profile, one)) for one in measured]
    maps += [("density", one.source, _density(one)) for one in scheduled]
    maps += [("weight", one.source, _weight(one)) for one in scheduled if one.weights]
    return tuple(
        _draw(kind, source, heat, f"{kind}-{slugs[source]}", folder)
        for kind, source, heat in maps
        if heat
    )


def _draw(kind: Kind, source: str, heat: HeatMap, stem: str, folder: Path) -> Plot:
    light, dark = (f"{stem}-{theme.name}.png" for theme in THEMES)
    for theme, name in zip(THEMES, (light, dark), strict=True):
        save(heat, theme, folder / name)
    note = note_on(heat.clipped) if heat.clipped else ""
    return Plot(kind, source, light, dark, f"{heat.title}, {heat.scale}.", note)


def _density(expert: ExpertSchedule) -> HeatMap | None:
    return _plain(f"Density of {short_name(expert.source)}", "fraction kept", expert.tensors)


def _weight(expert: ExpertSchedule) -> HeatMap | None:
    return _plain(f"Weight of {short_name(expert.source)}", "times its own", expert.weights)


def _plain(title: str, scale: str, values: Mapping[str, float]) -> HeatMap | None:
    grid = arrange(values)
    if grid is None:
        return None
    low, high = grid.known[0], grid.known[-1]
    return HeatMap(title, scale, percent=False, bottom=low, top=high, grid=grid)


def _importance(profile: ImportanceProfile, expert: SourceImportance) -> HeatMap | None:
    try:
        base: Mapping[str, float] | None = profile.base_of(expert).modules
    except ProfileError:
        base = None
    paired = expert.measure in PAIRED
    percents = {module: 100 * value for module, value in expert.modules.items()}
    grid = arrange(percents if paired else relative_change(expert.modules, base))
    if grid is None:
        return None
    clipped, name = clip(grid), short_name(expert.source)
    word = WORDS.get(expert.measure, expert.measure)
    return HeatMap(
        title=f"Change of {word}, base to {name}" if base else f"{word.capitalize()} in {name}",
        scale="% of the base's" if base or paired else "% of the component's mean",
        percent=True,
        bottom=0.0,
        top=clipped.limit if clipped else grid.known[-1],
        grid=grid,
        clipped=clipped,
    )


def short_name(source: str) -> str:
    """A pinned source for readers: a repo without its commit, a folder without the path to it."""
    name = re.sub(r"@[0-9a-f]{40}$", "", source)
    return Path(name).expanduser().resolve().name if name.startswith((".", "/", "~")) else name


def unique_slugs(sources: Iterable[str]) -> tuple[str, ...]:
    """A file name's part for each source: lower case letters, digits and `-`, no two alike."""
    taken: list[str] = []
    for source in sources:
        name = short_name(source).rstrip("/").rpartition("/")[2]
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower())[:60].strip("-") or "expert"
        slug, n = plain, 1
        while slug in taken:
            n += 1
            slug = f"{plain}-{n}"
        taken.append(slug)
    return tuple(taken)
