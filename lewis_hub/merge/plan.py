"""What will be done: every output shard, what goes in it, and how each tensor is made.

A plan is made from headers alone and is cheap to make again, with other densities for instance.
A shard's plan can be sent to a worker; its digest fixes the bytes of the shard.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.layout import DTYPES, OutputTensor, ShardLayout, lay_out
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import MergeError
from lewis_hub.merge import parameters
from lewis_hub.merge.alignment import Alignment, arrange, shape
from lewis_hub.merge.compare import compare
from lewis_hub.merge.fitting import require_number_of_experts, require_schedule_fits
from lewis_hub.merge.rows import Assembled
from lewis_hub.methods import random_bits, registry
from lewis_hub.methods.registry import PER_SOURCE, Method
from lewis_hub.recipe import Missing
from lewis_hub.recipe_settings import Settings

if TYPE_CHECKING:
    from lewis_hub.merge.statistics import Gram

VERSION = 1  # of the arithmetic: raised when the same plan would give other bytes

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


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is made.

    Attributes:
        inputs: one a source, the base's first; that one alone for a tensor that is copied. Of a
            slice they may be of other blocks than the output.
        sources: of the inputs, as `ShardPlan.labels` counts them.
        weights: one an expert; none for a tensor that is copied.
        densities: one an expert; none where the method takes none.
        streams: of random bits, one an expert; none where the method draws none.
        own: what else an expert has of its own, by the function's keyword: one value an expert.
        options: the method's, by the recipe's names.
        assembled: one a source, where its tensor is put together from rows of several; none where
            all lie as they are needed.
        grams: of its inputs, one an expert, None where there are none; none at all where the method
            asks for none.
    """

    output: OutputTensor
    inputs: tuple[TensorHeader, ...]
    sources: tuple[int, ...]
    weights: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    streams: tuple[int, ...] = ()
    own: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    assembled: tuple[Assembled | None, ...] = ()
    grams: tuple[Gram | None, ...] = ()

    @property
    def told(self) -> Mapping[str, Any]:
        """All that fixes its bytes, as plain JSON."""
        rows = [made and made.digest() for made in self.assembled]
        return asdict(replace(self, assembled=())) | {"assembled": rows}

    @property
    def is_transposed(self) -> bool:
        """Whether it is a matrix that lies as (in, out); known of those with second moments."""
        return any(gram.transposed for gram in self.grams if gram)

    @property
    def is_copied(self) -> bool:
        """Whether it is taken from the base as it is: counts and masks."""
        return not self.weights


@dataclass(frozen=True)
class ShardPlan:
    """One output file; complete in itself.

    Attributes:
        statistics: label of each expert's -> digest; none where the method asks for none.
    """

    method: str
    labels: tuple[str, ...]  # of the sources, as `TensorPlan.sources` counts them
    bases: tuple[str | None, ...]  # of an adapter: label of the checkpoint that it changes
    source_digests: tuple[str, ...]
    layout: ShardLayout
    tensors: tuple[TensorPlan, ...]  # in the order of the layout
    allow_nan: bool = False  # whether sources may hold NaN and infinity; see `mending`
    statistics: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Over all that fixes the bytes of the shard: equal digests, equal bytes."""
        told: dict[str, Any] = {
            "version": VERSION,
            "method": self.method,
            "sources": self.source_digests,
            "tensors": [tensor.told for tensor in self.tensors],
        }
        told |= {"allow_nan": True} if self.allow_nan else {}
        told |= {"statistics": list(self.statistics.values())} if self.statistics else {}
        text = json.dumps(told, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class MergePlan:
    """All output shards."""

    shards: tuple[ShardPlan, ...]

    @property
    def allowing_nan(self) -> MergePlan:
        """The same plan, whatever the sources hold."""
        return MergePlan(tuple(replace(shard, allow_nan=True) for shard in self.shards))

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
