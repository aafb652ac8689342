"""Baselines: one density everywhere, simple measures, AIM and OWL, and controls of `lewis`."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

from lewis_hub.checkpoint import names
from lewis_hub.guides.lewis import importance_shifts, spread
from lewis_hub.guides.registry import Decision, Measurements, register

OMEGA = 0.4  # how much of a task vector the base's most active channel takes, in AIM


@register("uniform", version=2)
def uniform(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Every matrix of a block gets the midpoint of gamma and epsilon; nothing is measured."""
    return dict.fromkeys(statistics.matrices, (gamma + epsilon) / 2)


@register("magnitude", needs=("task_vector",), version=2)
def magnitude(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow the size of the task vector relative to the base's weight; no data needed.

    One min-max of ‖expert - base‖ / ‖base‖ (Frobenius) over all modules spans [gamma, epsilon]:
    modules that fine-tuning changed most have the highest densities. No paper.
    """
    return spread(statistics.expert["task_vector"], gamma, epsilon)


@register("activation_shift", needs=("output_shift",), version=2)
def activation_shift(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow how much a module's output differs from base to expert on calibration data.

    One min-max over all modules of the relative root mean square difference (`output_shift`) spans
    [gamma, epsilon]. Changes of earlier blocks count too, so it grows with depth. Both models are
    in memory at once. No paper.
    """
    return spread(statistics.expert["output_shift"], gamma, epsilon)


@register("aim", needs=("evenness",), paper="https://arxiv.org/abs/2502.02421", version=2)
def aim(statistics: Measurements, gamma: float, epsilon: float) -> Decision:
    """Densities and weights fall where many input channels matter to the base (AIM, simplified).

    AIM multiplies column j of a merged task vector by f_j = 1 - (1 - ω) · a_j / max a, with the
    base's activations a. A guide decides for a whole module, so the mean of f over its channels is
    the weight, and one min-max of it over all modules spans [gamma, epsilon].

    Source:
        AIM, arXiv:2502.02421, which scales channel by channel after the merge, by the mean of
        |activation|; here it is the root mean square, and each expert's own texts.
    """
    even = statistics.base["evenness"]
    factors = {module: 1 - (1 - OMEGA) * value for module, value in even.items()}
    return Decision(spread(factors, gamma, epsilon), factors)


@register("owl", needs=("outliers",), paper="https://arxiv.org/abs/2310.05175", version=2)
def owl(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """Densities follow each block's share of outliers in the expert, as OWL prunes models.

    Outliers are entries whose |W| times activation norm is above 5 times the mean of their block.
    All modules of a block get one density. One min-max over the blocks spans [gamma, epsilon]; the
    paper's [S - λ, S + λ] about the mean S is that range with `mean_density`.

    Source:
        OWL, arXiv:2310.05175, prunes a model's weights. Here the same shares set the density of the
        expert's task vector.
    """
    return spread(statistics.expert["outliers"], gamma, epsilon)


@register("random", needs=("lewis",), version=2)
def random(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """A control: the densities of `lewis`, shuffled among the blocks by the seed.

    Each component keeps its own densities, so the mean over parameters does not change if a
    component has one shape in all blocks.
    """
    densities = spread(importance_shifts(statistics), gamma, epsilon)
    of_component: defaultdict[tuple[str | None, str], list[str]] = defaultdict(list)
    for module in densities:
        of_component[names.stack(module), names.component(module)].append(module)
    shuffled: dict[str, float] = {}
    for modules in of_component.values():
        drawn = sorted(modules, key=lambda module: _random_key(statistics.seed, module))
        shuffled |= {to: densities[other] for to, other in zip(modules, drawn, strict=True)}
    return {module: shuffled[module] for module in densities}


@register("inverse", needs=("lewis",), version=2)
def inverse(statistics: Measurements, gamma: float, epsilon: float) -> Mapping[str, float]:
    """A control: the densities of `lewis` upside down, gamma + epsilon - density."""
    densities = spread(importance_shifts(statistics), gamma, epsilon)
    return {
        module: min(max(gamma + epsilon - density, gamma), epsilon)
        for module, density in densities.items()
    }


def _random_key(seed: int, module: str) -> bytes:
    return hashlib.blake2b(f"{seed} {module}".encode(), digest_size=16).digest()
