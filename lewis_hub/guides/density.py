"""A guide's densities on the tensors of a checkpoint: the schedule that a merge follows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from lewis_hub.checkpoint import names
from lewis_hub.errors import GuideError
from lewis_hub.guides import document
from lewis_hub.guides.budget import shifted, weighted_mean
from lewis_hub.guides.deciding import decide
from lewis_hub.guides.experts import completed, notes, seen_by_both
from lewis_hub.guides.importance import ImportanceProfile
from lewis_hub.guides.lewis import Dominance, dominance
from lewis_hub.guides.matrices import block_matrices, checkpoint_tensor
from lewis_hub.guides.registry import OF_PAIRS, Decision, Guide, Measure, Statistics, Values
from lewis_hub.recipe_settings import ApplyTo


@dataclass(frozen=True)
class Bounds:
    """Where densities may lie: 0 < gamma <= epsilon <= 1.

    Raises:
        GuideError: they do not.
    """

    gamma: float
    epsilon: float
    default_density: float = 1.0  # of tensors that the guide leaves alone
    mean: float | None = None  # of each expert's densities, over parameters; None: as they come

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= self.epsilon <= 1:
            problem = f"gamma {self.gamma:g} and epsilon {self.epsilon:g} are no range of densities"
            raise GuideError("guide", problem, "Choose 0 < gamma <= epsilon <= 1.")
        if not 0 < self.default_density <= 1:
            problem = f"default_density {self.default_density:g} is no density"
            raise GuideError("guide", problem, "Choose 0 < default_density <= 1.")


@dataclass(frozen=True)
class Use:
    """What a guide's values are used for, and the recipe's seed for those that draw."""

    apply_to: ApplyTo = "density"
    seed: int = 42

    @property
    def sets_densities(self) -> bool:
        """Whether they say which fraction is kept."""
        return self.apply_to != "weight"

    @property
    def sets_weights(self) -> bool:
        """Whether an expert's weight is multiplied by them."""
        return self.apply_to != "density"


@dataclass(frozen=True)
class ExpertSchedule:
    """Which fraction of each tensor's task vector one expert keeps, and how much it weighs there.

    Attributes:
        tensors: scheduled tensor -> density, in the checkpoint's names and the guide's order. With
            none the recipe's own densities stand.
        weights: tensor -> what the expert's weight is multiplied by; 1 where it is not named.
    """

    source: str
    default_density: float
    tensors: Mapping[str, float]
    weights: Mapping[str, float] = field(default_factory=dict)

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
        scheduled = {(e.source, t): d for e in self.experts for t, d in e.tensors.items()}
        if not scheduled:
            problem = "no tensor is scheduled, so there is no mean density"
            raise GuideError("schedule", problem, "Check that the guide applies to this model.")
        return weighted_mean(scheduled, {key: sizes[key[1]] for key in scheduled})

    def uniform_twin(self, sizes: Mapping[str, int]) -> DensitySchedule:
        """The same schedule with every scheduled density replaced by the mean: the control.

        So is every weight, by the mean of its expert's.
        """
        mean = self.mean(sizes) if any(e.tensors for e in self.experts) else 1.0
        return DensitySchedule(
            tuple(
                replace(
                    e, tensors=dict.fromkeys(e.tensors, mean), weights=_levelled(e.weights, sizes)
                )
                for e in self.experts
            )
        )

    def to_json(self) -> str:
        """Write it as `lewis/density.json`; an expert without `weights` has its own everywhere."""
        experts = [
            {
                "source": e.source,
                "default_density": e.default_density,
                "tensors": dict(e.tensors),
            }
            | ({"weights": dict(e.weights)} if e.weights else {})
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


def _levelled(weights: Mapping[str, float], sizes: Mapping[str, int]) -> Mapping[str, float]:
    return dict.fromkeys(weights, weighted_mean(weights, sizes)) if weights else {}


def _expert(read: Any, file: str) -> ExpertSchedule:
    expert = ExpertSchedule(
        source=document.take(read, "source", str, file),
        default_density=document.take_number(read, "default_density", file),
        tensors=document.take_numbers(read, "tensors", file),
        weights=document.take_numbers(read, "weights", file) if "weights" in read else {},
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


def schedule(  # noqa: PLR0913
    guide: Guide,
    bounds: Bounds,
    experts: Sequence[str],
    tensors: Mapping[str, Sequence[int]],
    profile: ImportanceProfile | None = None,
    use: Use = Use(),
) -> GuidedSchedule:
    """Ask a guide for every expert and put what it says on the checkpoint's tensors.

    All guides give a density to the same tensors, those of `block_matrices`; of what a guide does
    not decide, `completed` tells.

    Args:
        guide: from the registry.
        bounds: the recipe's.
        experts: their pinned sources, in the recipe's order.
        tensors: name -> shape of the base checkpoint.
        profile: with all that the guide needs; its experts in the same order.
        use: the recipe's.

    Raises:
        GuideError: no tensor is a matrix of a block; the guide fails, names a module that is none,
            or leaves the bounds; or a mean density is out of reach.
        ProfileError: the profile lacks an expert, or the base on its calibration set.
    """
    sizes = {
        module: prod(tensors[checkpoint_tensor(module, tensors)])
        for module in block_matrices(tensors)
    }
    if not sizes:
        problem = "by their names, none of the base's tensors is a matrix of a block"
        remedy = "Leave `guide` out, and give `density` in `parameters`."
        raise GuideError(f"guide `{guide.name}`", problem, remedy)
    schedules, told = [], []
    for i, source in enumerate(experts):
        statistics = _statistics(guide, tuple(sizes), tensors, profile, i, use.seed)
        decided = decide(guide, statistics, (bounds.gamma, bounds.epsilon), source)
        every = Decision(*(completed(v, sizes) for v in (decided.densities, decided.weights)))
        schedules.append(_on_tensors(source, bounds, every, tensors, use))
        found = (*notes(decided.densities, sizes), *map(str, _dominances(guide, statistics)))
        told += [f"{source}: {note}" for note in found]
    return GuidedSchedule(DensitySchedule(tuple(schedules)), tuple(told))


def _dominances(guide: Guide, statistics: Statistics) -> Iterable[Dominance]:
    for measure in guide.needs:
        if measure in ("lewis", "lewis_reference") and (found := dominance(statistics, measure)):
            yield found


def _statistics(  # noqa: PLR0913
    guide: Guide,
    matrices: tuple[str, ...],
    tensors: Mapping[str, Sequence[int]],
    profile: ImportanceProfile | None,
    i: int,
    seed: int,
) -> Statistics:
    base: dict[Measure, Values] = {}
    expert: dict[Measure, Values] = {}

    def of_matrices(values: Values) -> Values:
        """By the checkpoint's own names; what is no matrix of a block is left out."""
        named = {names.module(checkpoint_tensor(m, tensors)): v for m, v in values.items()}
        return {module: value for module, value in named.items() if module in inside}

    inside = set(matrices)
    for measure in guide.needs:
        measured = profile.by(measure) if profile else None
        if measured is None or i >= len(measured.experts):
            problem = f"expert {i + 1} was not measured, and guide `{guide.name}` needs it"
            raise document.broken("importance.json", problem)
        entry = measured.experts[i]
        expert[measure] = of_matrices(entry.modules)
        if measure not in OF_PAIRS:
            of_base = of_matrices(measured.base_of(entry).modules)
            base[measure], expert[measure] = seen_by_both(of_base, expert[measure])
    drawn = hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest()
    return Statistics(matrices, base, expert, int.from_bytes(drawn, "big"))


def _on_tensors(
    source: str,
    bounds: Bounds,
    decided: Decision,
    tensors: Mapping[str, Sequence[int]],
    use: Use,
) -> ExpertSchedule:
    def named(values: Values) -> dict[str, float]:
        return {checkpoint_tensor(module, tensors): value for module, value in values.items()}

    densities = named(decided.densities) if use.sets_densities else {}
    if bounds.mean is not None:
        sizes = {tensor: prod(tensors[tensor]) for tensor in densities}
        densities = shifted(densities, sizes, bounds.mean)
    weights = named(decided.weights) if use.sets_weights else {}
    return ExpertSchedule(source, bounds.default_density, densities, weights)
