"""What will be done: every output shard, what goes in it, and how each tensor is made.

A plan is made from headers alone and is cheap to make again, with other densities for instance.
A shard's plan can be sent to a worker; its digest fixes the bytes of the shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.layout import DTYPES, OutputTensor, ShardLayout, lay_out
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import MergeError
from lewis_hub.merge import parameters
from lewis_hub.merge.compare import compare
from lewis_hub.methods import random_bits, registry
from lewis_hub.methods.registry import PER_SOURCE, Method
from lewis_hub.recipe import Settings

VERSION = 1  # of the arithmetic: raised when the same plan would give other bytes

Schedule = Mapping[str, Mapping[str, float]]  # label of an expert -> tensor -> density


@dataclass(frozen=True)
class MergeSource:
    """A checkpoint that goes into a merge."""

    checkpoint: Checkpoint
    digest: str  # of its content: a commit sha, or a digest over a folder's files; and the base's
    parameters: Settings = field(default_factory=dict)  # its own; the recipe's hold otherwise

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
    """

    method: str
    base: MergeSource | None
    experts: tuple[MergeSource, ...]
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 42

    @property
    def sources(self) -> tuple[MergeSource, ...]:
        """In the order in which plans count them: the base first, where the method takes one."""
        takes_base = registry.find(self.method).takes_base
        return (self.base, *self.experts) if self.base and takes_base else self.experts


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is made.

    Attributes:
        inputs: one a source; the base's alone for a tensor that is copied.
        weights: one an expert; none for a tensor that is copied.
        densities: one an expert; none where the method takes none.
        streams: of random bits, one an expert; none where the method draws none.
        own: what else an expert has of its own, by the function's keyword: one value an expert.
        options: the method's, by the recipe's names.
    """

    output: OutputTensor
    inputs: tuple[TensorHeader, ...]
    weights: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    streams: tuple[int, ...] = ()
    own: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_copied(self) -> bool:
        """Whether it is taken from the base as it is: counts and masks."""
        return not self.weights


@dataclass(frozen=True)
class ShardPlan:
    """One output file; complete in itself."""

    method: str
    labels: tuple[str, ...]  # of the sources, as `TensorPlan.inputs` counts them
    bases: tuple[str | None, ...]  # of an adapter: label of the checkpoint that it changes
    source_digests: tuple[str, ...]
    layout: ShardLayout
    tensors: tuple[TensorPlan, ...]  # in the order of the layout

    @property
    def digest(self) -> str:
        """Over all that fixes the bytes of the shard: equal digests, equal bytes."""
        told = {
            "version": VERSION,
            "method": self.method,
            "sources": self.source_digests,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }
        text = json.dumps(told, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class MergePlan:
    """All output shards."""

    shards: tuple[ShardPlan, ...]

    @property
    def layouts(self) -> tuple[ShardLayout, ...]:
        """What the output will look like."""
        return tuple(shard.layout for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """Of all output files; what `advance` will have been called with in the end."""
        return sum(layout.n_bytes for layout in self.layouts)

    @property
    def digest(self) -> str:
        """Over the digests of all shards."""
        told = "\n".join(shard.digest for shard in self.shards)
        return "sha256:" + hashlib.sha256(told.encode()).hexdigest()


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
    method = registry.find(settings.method)
    sources = settings.sources
    _require_sources(method, settings)
    own = [expert.parameters for expert in settings.experts]
    parameters.require_valid(method, settings.parameters, own)
    tensors = sources[0].checkpoint.tensors
    parameters.require_filters_fit(settings.parameters, own, tensors)
    _require_schedule_fits(method, settings, schedule or {})
    outputs = [
        OutputTensor(name, _output_dtype(tensor, settings.dtype), tensor.shape)
        for name, tensor in tensors.items()
    ]
    depths = parameters.depths(tensors)
    made = {
        output.name: _plan_tensor(settings, schedule or {}, output, depths[output.name])
        for output in outputs
    }
    return MergePlan(
        tuple(
            ShardPlan(
                method.name,
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
    inputs = tuple(source.checkpoint.tensors[name] for source in settings.sources)
    if inputs[0].dtype not in MERGEABLE:
        return TensorPlan(output, inputs[:1])
    options = parameters.options_of(method, settings.parameters, name, depth)
    own = {
        keyword: tuple(_setting(setting, settings, e, name, depth) for e in settings.experts)
        for keyword, setting in PER_SOURCE.items()
        if keyword == "weights" or method.takes(keyword)
    }
    weights = own.pop("weights")
    _require_divisor(method, options, weights, name)
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
    return TensorPlan(output, inputs, weights, densities, streams, own, options)


def _require_divisor(
    method: Method, options: Mapping[str, Any], weights: tuple[float, ...], name: str
) -> None:
    """Refuse weights that the models would be divided by and that add up to zero."""
    models = [] if method.takes_task_vectors else ["normalize", "normalize_weights"]
    for option in models:
        if options.get(option) and not sum(weights):
            problem = f"the weights of {name} add up to zero"
            remedy = f"Change one, or set `{option}: false`."
            raise MergeError("parameter `weight`", problem, remedy)


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
    _require_number_of_experts(method, settings)
    first, *others = (source.checkpoint for source in settings.sources)
    mismatches = compare(first, others)
    if mismatches:
        problem = f"the sources do not fit together: {mismatches[0].source} {mismatches[0].problem}"
        raise MergeError(where, problem, mismatches[0].remedy)


def _require_number_of_experts(method: Method, settings: MergeSettings) -> None:
    least, most = method.n_experts
    n = len(settings.experts)
    if n >= least and (most is None or n <= most):
        return
    models = "1 model" if least == 1 else f"{least} models"
    beside = " beside the base" if method.takes_base and settings.base else ""
    problem = f"it takes {'at least' if most is None else 'exactly'} {models}{beside}, found {n}"
    remedy = f"List {least - n} more under `models`."
    if most is not None and n > most:
        remedy = f"Remove {n - most} from `models`, or merge in several steps."
    raise MergeError(f"method `{method.name}`", problem, remedy)


def _require_schedule_fits(method: Method, settings: MergeSettings, schedule: Schedule) -> None:
    if schedule and not method.takes_density:
        problem = f"`{method.name}` keeps every entry, so a guide's densities would do nothing"
        raise MergeError("guide", problem, "Use `ties`, `dare_ties` or `dare_linear`.")
    labels = {expert.label: expert.checkpoint.tensors for expert in settings.experts}
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
