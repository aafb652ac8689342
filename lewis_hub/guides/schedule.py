"""From a guide's densities per module to the schedule of a merge: a density per tensor."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import fsum, prod
from typing import Annotated, TypeVar

from pydantic import Field, FiniteFloat

from lewis_hub.calibration import profile as document
from lewis_hub.calibration.profile import OF_PAIRS, ImportanceProfile, Measure, ModuleName
from lewis_hub.checkpoint import names
from lewis_hub.errors import GuideError
from lewis_hub.guides.lewis import Component, component, dominance
from lewis_hub.guides.registry import (
    Decision,
    Measurements,
    RegisteredGuide,
    Values,
    validated_decision,
)
from lewis_hub.recipe.schema import ApplyTo

Key = TypeVar("Key", bound=Hashable)
Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


def weighted_mean(values: Mapping[Key, float], sizes: Mapping[Key, int]) -> float:
    """The mean over parameters of tensor -> value, not empty; `sizes` are their numbers."""
    total = sum(sizes[tensor] for tensor in values)
    mean = fsum(sizes[tensor] * value for tensor, value in values.items()) / total
    return min(max(mean, min(values.values())), max(values.values()))  # despite rounding


def shifted(
    densities: Mapping[str, float], sizes: Mapping[str, int], mean: float
) -> dict[str, float]:
    """Add one number to all densities, so that their mean over parameters is `mean`.

    If a density would leave (0, 1], a GuideError says which range would fit.
    """
    if not densities:
        return {}
    low, high = min(densities.values()), max(densities.values())
    if low == high:
        return dict.fromkeys(densities, mean)
    centre = weighted_mean(densities, sizes)
    moved = {tensor: mean + (density - centre) for tensor, density in densities.items()}
    if min(moved.values()) > 0 and max(moved.values()) <= 1:
        return moved
    room = min(mean / (centre - low), (1 - mean) / (high - centre))  # of the range that was spanned
    problem = (
        f"a mean density of {mean:g} is out of reach: densities from {low:.3g} to {high:.3g}, of "
        f"mean {centre:.3g}, would lie from {mean + low - centre:.3g} to "
        f"{mean + high - centre:.3g}, and a density lies in (0, 1]"
    )
    fits = f"less than {room * (high - low):.3g}" if room else "0"
    remedy = f"Bring gamma and epsilon closer together: epsilon - gamma of {fits} fits."
    raise GuideError("guide.mean_density", problem, remedy)


def seen_by_both(
    base: Mapping[str, float], expert: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Leave out routed matrices that a token reached in only one of two models."""
    alone = {module for module in base.keys() ^ expert.keys() if names.is_routed(module)}
    kept = ({m: value for m, value in one.items() if m not in alone} for one in (base, expert))
    return next(kept), next(kept)


def completed(values: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Values for all matrices: a matrix without a value gets the mean of its component, or of all.

    Means are over parameters. The given values are first, in their order; without any, the result
    is empty.
    """
    if not values:
        return {}
    known: defaultdict[Component, dict[str, float]] = defaultdict(dict)
    for module, value in values.items():
        known[component(module)][module] = value
    every = weighted_mean(values, sizes)
    means = {part: weighted_mean(found, sizes) for part, found in known.items()}
    return {**values, **{m: means.get(component(m), every) for m in sizes if m not in values}}


def notes(values: Mapping[str, float], matrices: Iterable[str]) -> tuple[str, ...]:
    """Notes about the matrices that `completed` gave a mean."""
    known = {component(module) for module in values}
    rest = [module for module in matrices if module not in values]
    unseen: list[str] = []
    others: list[str] = []
    for module in rest:
        is_unseen = names.is_routed(module) and component(module) in known
        (unseen if is_unseen else others).append(module)
    told = []
    if unseen:
        told.append(
            f"no calibration token reached {len(unseen)} of the routed MoE matrices, in it "
            "or in the base: they get the mean density of their component."
        )
    if others:
        n_all = len(values) + len(rest)
        told.append(
            f"the guide has no measurement of {len(others)} of the {n_all} matrices of the blocks, "
            f"such as {others[0]}: they get the mean density of their component, or of all if "
            "it has none."
        )
    return tuple(told)


TOWER = re.compile(  # lists of blocks of encoders for images or sound, and of their connectors
    r"(?:^|[._])(?:vision|visual|vit|vq|image|img|video|audio|speech|"
    r"qformer|perceiver|resampler|projector|projection|connector|merger)"
)
NO_PRODUCT = re.compile(  # ends of components that hidden states are not multiplied with
    r"(?:conv|norm|embed|time_mix)[^.]*$|(?:bias|scale|decay|slope_rate)$|"
    r"(?:^|\.)(?:A_log|D|ape|tid2eid)$|(?:mixer|mamba)\.dt_proj$"
)
ACROSS = re.compile(r"encoder_att|cross_?att|EncDecAttention", re.IGNORECASE)
ENCODER = re.compile(r"(?:^|[._])encoder")


def block_matrices(tensors: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """The modules that every guide gives a density; `tensors` are name -> shape of a checkpoint.

    A tensor counts if its name has the number of a block of the text decoder or encoder, and it is
    a `.weight` or a bare tensor of two dimensions or more that has values. Tensors that are, by
    their names, a bias, a norm, an embedding, a convolution or a part of a recurrence do not count.
    Matrices that attend to an encoder count if there is one.
    """
    found = [
        name
        for name, shape in tensors.items()
        if len(shape) >= 2 and all(shape) and _is_matrix(name)
    ]
    has_encoder = any(ENCODER.search(names.stack(name) or "") for name in found)
    return tuple(
        names.module(name)
        for name in found
        if has_encoder or not ACROSS.search(names.component(name))
    )


def _is_matrix(name: str) -> bool:
    stack, component = names.stack(name), names.component(name)
    is_item = component == "weight"  # of a list of matrices, which are not blocks
    return not (stack is None or is_item or TOWER.search(stack) or NO_PRODUCT.search(component))


def checkpoint_tensor(module: str, tensors: Collection[str]) -> str:
    """The checkpoint's name for a module's weight; the module's own for a stack of matrices.

    It is a GuideError if no tensor, or more than one, has the name.
    """
    name = f"{module}.weight"
    if module in tensors and name not in tensors:
        return module
    found = names.find(name, tensors)
    if len(found) == 1:
        return found[0]
    near = names.nearest(name, tensors)
    hint = f"The nearest is {near}. " if near else ""
    problem = f"a density is given to {name}, which {'several' if found else 'no'} tensors match"
    remedy = hint + "The checkpoint stores this architecture otherwise: use guide `uniform`."
    raise GuideError("schedule", problem, remedy)


@dataclass(frozen=True)
class ScheduleSettings:
    """The recipe's settings of a schedule; it refuses others than 0 < gamma <= epsilon <= 1."""

    gamma: float  # the lowest density
    epsilon: float  # the highest
    default_density: float = 1.0  # of tensors that are not matrices of a block
    mean: float | None = None  # of each expert's densities, over parameters; None: unchanged
    apply_to: ApplyTo = "density"  # what a guide's values are used for
    seed: int = 42  # of random guides


@dataclass(frozen=True)
class ExpertSchedule:
    """The density of each tensor's task vector for one expert, and factors of its weight."""

    source: str
    default_density: Density
    # in the guide's order; if empty, the recipe's densities apply
    tensors: Mapping[ModuleName, Density]
    weights: Mapping[ModuleName, FiniteFloat] = field(default_factory=dict)  # 1 for all others

    def density(self, tensor: str) -> float:
        """The tensor's density, in (0, 1]."""
        return self.tensors.get(tensor, self.default_density)


@dataclass(frozen=True)
class DensitySchedule:
    """One schedule per expert, in the recipe's order."""

    experts: tuple[ExpertSchedule, ...]

    def mean(self, sizes: Mapping[str, int]) -> float:
        """The mean over parameters of all scheduled densities; a GuideError without any."""
        scheduled = {(e.source, t): d for e in self.experts for t, d in e.tensors.items()}
        if not scheduled:
            problem = "no tensor is scheduled, so there is no mean density"
            raise GuideError("schedule", problem, "Check that the guide applies to this model.")
        return weighted_mean(scheduled, {key: sizes[key[1]] for key in scheduled})

    def uniform_twin(self, sizes: Mapping[str, int]) -> DensitySchedule:
        """The control: every density is the mean of all, every weight the mean of its expert's."""
        mean = self.mean(sizes) if any(e.tensors for e in self.experts) else 1.0

        def uniform(expert: ExpertSchedule) -> ExpertSchedule:
            weights = expert.weights
            if weights:
                weights = dict.fromkeys(weights, weighted_mean(weights, sizes))
            return replace(expert, tensors=dict.fromkeys(expert.tensors, mean), weights=weights)

        return DensitySchedule(tuple(map(uniform, self.experts)))

    def to_json(self) -> str:
        """The text of `lewis/density.json`; `weights` are left out if an expert has none."""
        experts = [asdict(expert) for expert in self.experts]
        written = [{k: v for k, v in one.items() if k != "weights" or v} for one in experts]
        return document.write_document({"version": document.VERSION, "experts": written})

    @classmethod
    def from_json(cls, text: str, file: str = "density.json") -> DensitySchedule:
        """Read what `to_json` wrote; raises a ProfileError that names `file`."""
        return document.read_document(text, file, cls)


@dataclass(frozen=True)
class GuidedSchedule:
    """A schedule, and notes for the user."""

    schedule: DensitySchedule
    notes: tuple[str, ...] = ()


def schedule(
    guide: RegisteredGuide,
    settings: ScheduleSettings,
    experts: Sequence[str],
    tensors: Mapping[str, Sequence[int]],
    profile: ImportanceProfile | None = None,
) -> GuidedSchedule:
    """Call a guide for every expert, and assign its densities to the checkpoint's tensors.

    All guides schedule the same tensors, those of `block_matrices`; `completed` fills in the
    modules that a guide leaves out. `experts` are the pinned sources in the recipe's order, which
    is that of the `profile`; `tensors` are name -> shape of the base checkpoint.

    A GuideError says that no tensor is a matrix of a block, that a decision is refused, or that a
    mean density is out of reach; a ProfileError, that the profile lacks an expert or its base.
    """
    sizes = {
        module: prod(tensors[checkpoint_tensor(module, tensors)])
        for module in block_matrices(tensors)
    }
    if not sizes:
        problem = "by names and shapes, none of the base's tensors is a matrix of a block"
        remedy = "Leave `guide` out, and give `density` in `parameters`."
        raise GuideError(f"guide `{guide.name}`", problem, remedy)
    schedules, told = [], []
    for i, source in enumerate(experts):
        statistics = _statistics(guide, tuple(sizes), tensors, profile, i, settings.seed)
        limits = (settings.gamma, settings.epsilon)
        decided = validated_decision(guide, statistics, limits, source)
        every = Decision(*(completed(v, sizes) for v in (decided.densities, decided.weights)))
        schedules.append(_on_tensors(source, settings, every, tensors))
        found = [*notes(decided.densities, sizes)]
        for measure in guide.needs:
            if measure in ("lewis", "lewis_reference"):
                found += dominance(statistics, measure)
        told += [f"{source}: {note}" for note in found]
    return GuidedSchedule(DensitySchedule(tuple(schedules)), tuple(told))


def _statistics(  # noqa: PLR0913
    guide: RegisteredGuide,
    matrices: tuple[str, ...],
    tensors: Mapping[str, Sequence[int]],
    profile: ImportanceProfile | None,
    i: int,
    seed: int,
) -> Measurements:
    base: dict[Measure, Values] = {}
    expert: dict[Measure, Values] = {}

    def of_matrices(values: Values) -> Values:
        """The values of matrices of blocks, by the checkpoint's own names."""
        named = {names.module(checkpoint_tensor(m, known)): v for m, v in values.items()}
        return {module: value for module, value in named.items() if module in inside}

    inside, known = set(matrices), names.TensorNames(tensors)
    for measure in guide.needs:
        measured = profile.by(measure) if profile else None
        if measured is None or i >= len(measured.experts):
            problem = f"expert {i + 1} was not measured, and guide `{guide.name}` needs it"
            raise document.broken_document("importance.json", problem)
        entry = measured.experts[i]
        expert[measure] = of_matrices(entry.modules)
        if measure not in OF_PAIRS:
            of_base = of_matrices(measured.base_of(entry).modules)
            base[measure], expert[measure] = seen_by_both(of_base, expert[measure])
    drawn = hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest()
    return Measurements(matrices, base, expert, int.from_bytes(drawn, "big"))


def _on_tensors(
    source: str,
    settings: ScheduleSettings,
    decided: Decision,
    tensors: Mapping[str, Sequence[int]],
) -> ExpertSchedule:
    known = names.TensorNames(tensors)

    def named(values: Values) -> dict[str, float]:
        return {checkpoint_tensor(module, known): value for module, value in values.items()}

    densities = named(decided.densities) if settings.apply_to != "weight" else {}
    if settings.mean is not None:
        sizes = {tensor: prod(tensors[tensor]) for tensor in densities}
        densities = shifted(densities, sizes, settings.mean)
    weights = named(decided.weights) if settings.apply_to != "density" else {}
    return ExpertSchedule(source, settings.default_density, densities, weights)
