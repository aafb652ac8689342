"""Settings become a plan, from headers alone: it is cheap to make again, with other densities."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.checkpoint.writer import DTYPES, OutputTensor, lay_out
from lewis_hub.errors import MergeError
from lewis_hub.kernels import random_bits
from lewis_hub.merge import settings as parameters
from lewis_hub.merge.alignment import Alignment, arrange, shape
from lewis_hub.merge.compare import compare
from lewis_hub.merge.plan import MergePlan, ShardPlan, TensorPlan
from lewis_hub.methods import registry
from lewis_hub.methods.registry import PER_SOURCE, Method
from lewis_hub.recipe.schema import Missing, Settings


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
            problem = f"it sets a weight for {min(unknown)}, which {expert.label} does not have"
            raise MergeError("guide", problem, "Measure the importance of these sources anew.")
    for label, densities in schedule.items():
        if label not in labels:
            problem = f"it sets densities for {label}, which is not merged"
            raise MergeError("guide", problem, f"Experts: {', '.join(labels)}.")
        for name, density in densities.items():
            if name not in labels[label]:
                problem = f"it sets a density for {name}, which {label} does not have"
                raise MergeError("guide", problem, "Measure the importance of these sources anew.")
            if not 0 <= density <= 1:
                problem = f"it gives {name} the density {density:g}"
                raise MergeError("guide", problem, "A density lies between 0 and 1.")


Schedule = Mapping[str, Mapping[str, float]]  # label of an expert -> tensor -> density


@dataclass(frozen=True)
class MergeSource:
    """A checkpoint that goes into a merge."""

    checkpoint: Checkpoint
    digest: str  # of its content: a commit sha, or a digest over a folder's files; and the base's
    parameters: Settings = field(default_factory=dict)  # its own; the recipe's hold otherwise
    weights: Mapping[str, float] = field(default_factory=dict)  # a guide's: tensor -> factor on it

    @property
    def label(self) -> str:
        """The source as messages call it."""
        return self.checkpoint.label


@dataclass(frozen=True)
class MergeSettings:
    """What is merged, and how.

    Attributes:
        base: None for a method that takes no base.
        experts: in the recipe's order. For a method without a base: all models that are listed.
        parameters: the recipe's own, for all models and tensors.
        dtype: of the output: float32, float16 or bfloat16; None keeps the base's, tensor by tensor;
            that of 8-bit floats is bfloat16.
        seed: of random methods.
        missing: "base": the base's tensors stand in for those that an expert lacks.
        alignment: of vocabularies that differ; None where row i means the same in all sources.
    """

    method: str
    base: MergeSource | None
    experts: tuple[MergeSource, ...]
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 42
    missing: Missing = "error"
    alignment: Alignment | None = None

    @property
    def sources(self) -> tuple[MergeSource, ...]:
        """In the order in which plans count them: the base first, where the method takes one."""
        takes_base = registry.find(self.method).takes_base
        return (self.base, *self.experts) if self.base and takes_base else self.experts


def make_plan(
    settings: MergeSettings, max_shard_bytes: int, schedule: Schedule | None = None
) -> MergePlan:
    """Plan a merge from headers alone.

    Args:
        settings: what is merged, and how.
        max_shard_bytes: largest output file, unless a single tensor is larger.
        schedule: a guide's densities; they go before those of `settings`. A tensor that it does
            not name keeps the density that the settings give it.

    Raises:
        MergeError: unknown method or parameter, a filter or schedule that fits no tensor, or
            sources that do not fit together.
    """
    require_mergeable(settings)
    tensors = settings.sources[0].checkpoint.tensors
    own = [expert.parameters for expert in settings.experts]
    parameters.require_filters_fit(settings.parameters, own, tensors)
    require_schedule_fits(registry.find(settings.method), settings, schedule or {})
    made = plan_tensors(settings, parameters.depths(tensors), schedule or {})
    return plan_shards(settings.method, settings.sources, made, max_shard_bytes)


def require_mergeable(settings: MergeSettings) -> None:
    """Refuse sources that do not fit the method or each other, and settings that it has not.

    Raises:
        MergeError: as for `make_plan`.
    """
    method = registry.find(settings.method)
    _require_sources(method, settings)
    own = [expert.parameters for expert in settings.experts]
    parameters.require_valid(method, settings.parameters, own)


def plan_tensors(
    settings: MergeSettings, depths: Mapping[str, float], schedule: Schedule
) -> dict[str, TensorPlan]:
    """Plan every tensor of `depths`, in its order; `sources` count those of the settings."""
    tensors = settings.sources[0].checkpoint.tensors
    return {
        name: _plan_tensor(
            settings,
            schedule,
            OutputTensor(
                name,
                _output_dtype(tensors[name], settings.dtype),
                shape(settings.alignment, tensors[name]),
            ),
            depth,
        )
        for name, depth in depths.items()
    }


def plan_shards(
    method: str,
    sources: Sequence[MergeSource],
    made: Mapping[str, TensorPlan],
    max_shard_bytes: int,
) -> MergePlan:
    """Put tensors into files, in their order; `sources` are those that they count."""
    outputs = [tensor.output for tensor in made.values()]
    return MergePlan(
        tuple(
            ShardPlan(
                method,
                tuple(source.label for source in sources),
                tuple(source.checkpoint.base for source in sources),
                tuple(source.digest for source in sources),
                layout,
                tuple(made[tensor.name] for tensor in layout.tensors),
            )
            for layout in lay_out(outputs, max_shard_bytes)
        )
    )


def _plan_tensor(
    settings: MergeSettings, schedule: Schedule, output: OutputTensor, depth: float
) -> TensorPlan:
    method, name = registry.find(settings.method), output.name
    parts = [source.checkpoint.tensors.get(name) for source in settings.sources]
    labels = [source.label for source in settings.sources]
    inputs, assembled = arrange(settings.alignment, name, output.shape, labels, parts)
    if inputs[0].dtype not in MERGEABLE:
        return TensorPlan(output, inputs[:1], (0,))
    options = parameters.options_of(method, settings.parameters, name, depth)
    own = {
        keyword: tuple(
            _setting(setting, settings, e, _own_name(e, name), depth) for e in settings.experts
        )
        for keyword, setting in PER_SOURCE.items()
        if keyword == "weights" or method.takes(keyword)
    }
    factors = [expert.weights.get(name, 1.0) for expert in settings.experts]
    weights = tuple(map(operator.mul, own.pop("weights"), factors))
    parameters.require_divisor(method, options, weights, name)
    densities: tuple[float, ...] = ()
    if method.takes_density:
        densities = tuple(
            schedule.get(expert.label, {}).get(name, density)
            for expert, density in zip(settings.experts, own.pop("densities"), strict=True)
        )
    streams: tuple[int, ...] = ()
    if method.is_random:
        streams = tuple(
            random_bits.stream(settings.seed, name, i) for i in range(len(settings.experts))
        )
    used = tuple(range(len(inputs)))
    return TensorPlan(output, inputs, used, weights, densities, streams, own, options, assembled)


def _own_name(source: MergeSource, name: str) -> str:
    """What the tensor is called in the source itself, whose block may have another number."""
    tensor = source.checkpoint.tensors.get(name)
    return tensor.name if tensor else name


def _setting(
    setting: str, settings: MergeSettings, expert: MergeSource, name: str, depth: float
) -> float:
    places = (expert.parameters, settings.parameters, parameters.DEFAULTS)
    return float(parameters.look_up(setting, places, name, depth))


def _output_dtype(tensor: TensorHeader, dtype: str | None) -> str:
    return DTYPES[dtype] if dtype and tensor.kept_dtype in MERGEABLE else tensor.kept_dtype


def _require_sources(method: Method, settings: MergeSettings) -> None:
    where = f"method `{method.name}`"
    if method.needs_base and settings.base is None:
        raise MergeError(where, "it needs a base to start from", "Name a `base_model`.")
    if not settings.experts:
        raise MergeError(where, "there is nothing to merge", "List at least one expert.")
    require_number_of_experts(method, settings)
    first, *others = (source.checkpoint for source in settings.sources)
    assembled = settings.alignment.tensors if settings.alignment else frozenset()
    mismatches = compare(first, others, settings.missing, assembled)
    if mismatches:
        problem = f"the sources do not fit together: {mismatches[0].source} {mismatches[0].problem}"
        raise MergeError(where, problem, mismatches[0].remedy)
