"""Whether the number of sources and a guide's schedule fit the method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lewis_hub.errors import MergeError
from lewis_hub.methods.registry import Method

if TYPE_CHECKING:
    from lewis_hub.merge.planning import MergeSettings, Schedule


def require_number_of_experts(method: Method, settings: MergeSettings) -> None:
    """Refuse fewer or more sources than the method takes.

    Raises:
        MergeError: naming how many it takes.
    """
    least, most = method.n_experts
    n = len(settings.experts)
    if n >= least and (most is None or n <= most):
        return
    models = "1 model" if least == 1 else f"{least} models"
    beside = " beside the base" if method.takes_base and settings.base else ""
    problem = f"it takes {'at least' if most is None else 'exactly'} {models}{beside}, found {n}"
    remedy = f"List {least - n} more."
    if most is not None and n > most:
        remedy = f"Remove {n - most} of them, or merge in several steps."
    raise MergeError(f"method `{method.name}`", problem, remedy)


def require_schedule_fits(method: Method, settings: MergeSettings, schedule: Schedule) -> None:
    """Refuse densities of what is not merged, or for a method that takes none.

    Raises:
        MergeError: naming what the schedule says and cannot.
    """
    if schedule and not method.takes_density:
        problem = f"`{method.name}` keeps every entry, so a guide's densities would do nothing"
        raise MergeError("guide", problem, "Use `ties`, `dare_ties` or `dare_linear`.")
    labels = {expert.label: expert.checkpoint.tensors for expert in settings.experts}
    for expert in settings.experts:
        if unknown := expert.weights.keys() - expert.checkpoint.tensors.keys():
            problem = f"it weighs {min(unknown)} of {expert.label}, which no source has"
            raise MergeError("guide", problem, "Measure the importance of these sources anew.")
    for label, densities in schedule.items():
        if label not in labels:
            problem = f"it schedules {label}, which is not merged"
            raise MergeError("guide", problem, f"Experts: {', '.join(labels)}.")
        for name, density in densities.items():
            if name not in labels[label]:
                problem = f"it schedules {name}, which no source has"
                raise MergeError("guide", problem, "Measure the importance of these sources anew.")
            if not 0 <= density <= 1:
                problem = f"it gives {name} the density {density:g}"
                raise MergeError("guide", problem, "A density lies between 0 and 1.")
