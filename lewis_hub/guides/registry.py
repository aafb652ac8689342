"""Name to guide. A guide is a function from what is known about an expert to densities.

A package adds its own by an entry point in the group `lewis_hub.guides`, named as the guide, that
loads a function under `@register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from lewis_hub.errors import GuideError
from lewis_hub.registry import Registry

GROUP = "lewis_hub.guides"

Need = Literal["importance"]
Measure = Literal["lewis", "lewis_reference"]  # how importance is measured


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
    """A registered guide; `needs` says what has to be measured before it is called, and how.

    `version` is raised when the same measurements give other densities, so that locks differ.
    """

    name: str
    decide: GuideFunction
    needs: tuple[Need, ...] = ()
    paper: str | None = None
    measure: Measure = "lewis"
    version: int = 1

    @property
    def summary(self) -> str:
        """One sentence for a list of guides."""
        return (self.decide.__doc__ or "").strip().partition("\n")[0]


_registry: Registry[Guide] = Registry("guide", GROUP, GuideError)
find, guides = _registry.find, _registry.all


def register(
    name: str,
    *,
    needs: tuple[Need, ...] = (),
    paper: str | None = None,
    measure: Measure = "lewis",
    version: int = 1,
) -> Callable[[GuideFunction], GuideFunction]:
    """Add the decorated function to the guides.

    Raises:
        GuideError: another function already has the name.
    """

    def add(decide: GuideFunction) -> GuideFunction:
        _registry.add(name, Guide(name, decide, needs, paper, measure, version), decide)
        return decide

    return add
