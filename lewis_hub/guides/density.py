"""A guide's densities on the tensors of a checkpoint: the schedule that a merge follows."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum
from typing import Any

from lewis_hub.checkpoint import names
from lewis_hub.errors import GuideError
from lewis_hub.guides import document
from lewis_hub.guides.experts import seen_by_both, unseen
from lewis_hub.guides.importance import ImportanceProfile
from lewis_hub.guides.lewis import dominance
from lewis_hub.guides.registry import Guide, Statistics


@dataclass(frozen=True)
class Bounds:
    """Where densities may lie: 0 < gamma <= epsilon <= 1.

    Raises:
        GuideError: they do not.
    """

    gamma: float
    epsilon: float
    default_density: float = 1.0  # of tensors that the guide leaves alone

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= self.epsilon <= 1:
            problem = f"gamma {self.gamma:g} and epsilon {self.epsilon:g} are no range of densities"
            raise GuideError("guide", problem, "Choose 0 < gamma <= epsilon <= 1.")
        if not 0 < self.default_density <= 1:
            problem = f"default_density {self.default_density:g} is no density"
            raise GuideError("guide", problem, "Choose 0 < default_density <= 1.")


@dataclass(frozen=True)
class ExpertSchedule:
    """Which fraction of each tensor's task vector one expert keeps."""

    source: str
    default_density: float
    tensors: Mapping[str, float]  # the scheduled ones, in the checkpoint's names and guide's order

    def density(self, tensor: str) -> float:
        """The tensor's density, in (0, 1]."""
        return self.tensors.get(tensor, self.default_density)


@dataclass(frozen=True)
class DensitySchedule:
    """One schedule per expert, in the recipe's order."""

    experts: tuple[ExpertSchedule, ...]

    def mean(self, sizes: Mapping[str, int]) -> float:
        """The parameter-weighted mean density of the scheduled tensors of all experts.

        Args:
            sizes: tensor -> number of parameters.

        Raises:
            GuideError: no tensor is scheduled.
        """
        scheduled = [(sizes[t], d) for e in self.experts for t, d in e.tensors.items()]
        if not scheduled:
            problem = "no tensor is scheduled, so there is no mean density"
            raise GuideError("schedule", problem, "Check that the guide applies to this model.")
        mean = fsum(n * d for n, d in scheduled) / sum(n for n, _ in scheduled)
        densities = [d for _, d in scheduled]
        return min(max(mean, min(densities)), max(densities))  # rounding may step just outside

    def uniform_twin(self, sizes: Mapping[str, int]) -> DensitySchedule:
        """The same schedule with every scheduled density replaced by the mean: the control."""
        mean = self.mean(sizes)
        return DensitySchedule(
            tuple(replace(e, tensors=dict.fromkeys(e.tensors, mean)) for e in self.experts)
        )

    def to_json(self) -> str:
        """Write it as `lewis/density.json`."""
        experts = [
            {
                "source": e.source,
                "default_density": e.default_density,
                "tensors": dict(e.tensors),
            }
            for e in self.experts
        ]
        return document.write({"version": document.VERSION, "experts": experts})

    @classmethod
    def from_json(cls, text: str, file: str = "density.json") -> DensitySchedule:
        """Read what `to_json` wrote; `file` is named in messages.

        Raises:
            ProfileError: not JSON, another version, a missing field, or a density outside (0, 1].
        """
        experts = document.take(document.read(text, file), "experts", list, file)
        return cls(tuple(_expert(expert, file) for expert in experts))


def _expert(read: Any, file: str) -> ExpertSchedule:
    expert = ExpertSchedule(
        source=document.take(read, "source", str, file),
        default_density=document.take_number(read, "default_density", file),
        tensors=document.take_numbers(read, "tensors", file),
    )
    for name, density in (("default_density", expert.default_density), *expert.tensors.items()):
        if not 0 < density <= 1:
            raise document.broken(file, f"`{name}` is {density:g}, which is no density")
    return expert


@dataclass(frozen=True)
class GuidedSchedule:
    """A schedule, and what a user should know about how it came out."""

    schedule: DensitySchedule
    notes: tuple[str, ...] = ()


def schedule(
    guide: Guide,
    bounds: Bounds,
    experts: Sequence[str],
    tensors: Mapping[str, Sequence[int]],
    profile: ImportanceProfile | None = None,
) -> GuidedSchedule:
    """Ask a guide for every expert and put its densities on the checkpoint's tensors.

    Args:
        guide: from the registry.
        bounds: the recipe's.
        experts: their pinned sources, in the recipe's order.
        tensors: name -> shape of the base checkpoint.
        profile: needed by a guide that needs importance; its experts in the same order.

    Raises:
        GuideError: the guide names a module that no tensor belongs to, or leaves the bounds.
        ProfileError: the profile lacks an expert, or the base on its calibration set.
    """
    matrices = tuple(_block_matrices(tensors))
    schedules, notes = [], []
    for i, source in enumerate(experts):
        statistics = _statistics(guide, matrices, profile, i)
        densities = guide.decide(statistics, bounds.gamma, bounds.epsilon)
        rest = unseen(matrices, densities)
        schedules.append(_on_tensors(source, guide, bounds, {**densities, **rest}, tensors))
        if rest:
            notes.append(
                f"{source}: no calibration token reached {len(rest)} of the matrices of routed "
                "experts, in it or in the base: they get the mean density of their component."
            )
        if "importance" in guide.needs and (found := dominance(statistics)):
            notes.append(f"{source}: {found}")
    return GuidedSchedule(DensitySchedule(tuple(schedules)), tuple(notes))


def _statistics(
    guide: Guide, matrices: tuple[str, ...], profile: ImportanceProfile | None, i: int
) -> Statistics:
    if "importance" not in guide.needs:
        return Statistics(matrices, {}, {})
    if profile is None or i >= len(profile.experts):
        problem = f"expert {i + 1} was not measured, and guide `{guide.name}` needs it"
        raise document.broken("importance.json", problem)
    expert = profile.experts[i]
    return Statistics(matrices, *seen_by_both(profile.base_of(expert).modules, expert.modules))


def _block_matrices(tensors: Mapping[str, Sequence[int]]) -> Iterable[str]:
    """Modules whose weight is a matrix, or a stack of them, inside a block."""
    for name, shape in tensors.items():
        is_stack = len(shape) >= 3 and names.module(name) == name  # of experts, under a bare name
        is_weight = len(shape) >= 2 and name.endswith(".weight")
        if (is_stack or is_weight) and names.block(name) is not None:
            yield names.module(name)


def _on_tensors(
    source: str,
    guide: Guide,
    bounds: Bounds,
    densities: Mapping[str, float],
    tensors: Mapping[str, Sequence[int]],
) -> ExpertSchedule:
    scheduled: dict[str, float] = {}
    for module, density in densities.items():
        if not bounds.gamma <= density <= bounds.epsilon:
            problem = f"it gives {module} the density {density:g}, outside gamma and epsilon"
            raise GuideError(f"guide `{guide.name}`", problem, "This is a fault of the guide.")
        scheduled[checkpoint_tensor(module, tensors)] = density
    return ExpertSchedule(source, bounds.default_density, scheduled)


def checkpoint_tensor(module: str, tensors: Collection[str]) -> str:
    """The checkpoint's name for a module's weight; the module's own for a stack of experts.

    Raises:
        GuideError: no tensor, or more than one, has the name.
    """
    name = f"{module}.weight"
    if module in tensors and name not in tensors:
        return module
    found = names.find(name, tensors)
    if len(found) == 1:
        return found[0]
    near = difflib.get_close_matches(name, tensors, n=1)
    hint = f"The nearest is {near[0]}. " if near else ""
    problem = f"a density is given to {name}, which {'several' if found else 'no'} tensors match"
    remedy = hint + "The checkpoint stores this architecture otherwise: use guide `uniform`."
    raise GuideError("schedule", problem, remedy)
