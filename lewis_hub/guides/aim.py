"""AIM: change less where many input channels are active in the base."""

from __future__ import annotations

from lewis_hub.guides.lewis import spread
from lewis_hub.guides.registry import Decision, Measurements, register

OMEGA = 0.4  # how much of a task vector the base's most active channel takes


@register("aim", needs=("evenness",), paper="https://arxiv.org/abs/2502.02421", version=2)
def aim(statistics: Measurements, gamma: float, epsilon: float) -> Decision:
    """Densities and weights fall where many input channels matter to the base, after AIM.

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
