"""Name to guide. A guide is a function from what is known about an expert to densities.

A package adds its own by an entry point in the group `lewis_hub.guides`, named as the guide, that
loads a function under `@register`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal

from lewis_hub.errors import GuideError

GROUP = "lewis_hub.guides"

Need = Literal["importance"]


@dataclass(frozen=True)
class Statistics:
    """What a guide decides from, for one expert. What it does not need is empty."""

    matrices: tuple[str, ...]  # modules of all weight matrices in the blocks of the checkpoint
    base: Mapping[str, float]  # module -> importance, on the expert's calibration set
    expert: Mapping[str, float]


# (statistics, gamma, epsilon) -> module -> density, each in [gamma, epsilon]
GuideFunction = Callable[[Statistics, float, float], Mapping[str, float]]


@dataclass(frozen=True)
class Guide:
    """A registered guide; `needs` says what has to be measured before it is called."""

    name: str
    decide: GuideFunction
    needs: tuple[Need, ...] = ()
    paper: str | None = None

    @property
    def summary(self) -> str:
        """One sentence for a list of guides."""
        return (self.decide.__doc__ or "").strip().partition("\n")[0]


_guides: dict[str, Guide] = {}


def register(
    name: str, *, needs: tuple[Need, ...] = (), paper: str | None = None
) -> Callable[[GuideFunction], GuideFunction]:
    """Add the decorated function to the guides.

    Raises:
        GuideError: another function already has the name.
    """

    def add(decide: GuideFunction) -> GuideFunction:
        taken = _guides.get(name)
        if taken is not None:
            owner = f"{taken.decide.__module__}.{taken.decide.__qualname__}"
            problem = f"the name is already taken by {owner}"
            raise GuideError(f"guide `{name}`", problem, "Register it under another name.")
        _guides[name] = Guide(name, decide, needs, paper)
        return decide

    return add


def find(name: str) -> Guide:
    """Look a guide up; an installed package is asked only for a name that is not built in.

    Raises:
        GuideError: no guide has the name, or the package that offers it does not load.
    """
    if name not in _guides:
        _load(name)
    if name not in _guides:
        known = sorted({*_guides, *entry_points(group=GROUP).names})
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise GuideError(f"guide `{name}`", "there is none", f"Guides: {', '.join(known)}.{hint}")
    return _guides[name]


def guides() -> tuple[Guide, ...]:
    """Every guide by name, those of installed packages too."""
    for name in entry_points(group=GROUP).names:
        if name not in _guides:
            _load(name)
    return tuple(_guides[name] for name in sorted(_guides))


def _load(name: str) -> None:
    for entry in entry_points(group=GROUP, name=name):
        package = entry.dist.name if entry.dist else entry.value
        remedy = f"Repair or remove the package: pip uninstall {package}."
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            problem = f"{package} offers it but does not load: {error}"
            raise GuideError(f"guide `{name}`", problem, remedy) from error
        if name not in _guides:
            problem = f"{package} offers it but {entry.value} does not register it"
            raise GuideError(f"guide `{name}`", problem, remedy)
