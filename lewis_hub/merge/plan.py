"""The plan of a merge: every output shard, the tensors in it, and how each tensor is made.

`make_plan` reads headers alone, so that a plan is cheap to make again with other densities. A
shard's plan can be sent to a worker; its digest determines the bytes of the shard.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.ranges import SourceTensor
from lewis_hub.checkpoint.reader import MAX_TENSORS, Checkpoint
from lewis_hub.checkpoint.writer import DTYPES, OutputTensor, ShardLayout, lay_out
from lewis_hub.errors import MergeError
from lewis_hub.kernels import random_bits
from lewis_hub.merge.alignment import Alignment, Assembled, assemble_inputs, output_shape
from lewis_hub.merge.compare import compare
from lewis_hub.merge.settings import (
    DEFAULTS,
    depths,
    look_up,
    options_of,
    require_divisor,
    require_filters_fit,
    require_valid,
)
from lewis_hub.methods import registry
from lewis_hub.methods.registry import PER_SOURCE, Method
from lewis_hub.recipe.schema import Arithmetic, Missing, Settings

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # of the arithmetic: raised when the same plan would give other bytes

Schedule = Mapping[str, Mapping[str, float]]  # label of an expert -> tensor -> density


@dataclass(frozen=True)
class MergeSource:
    """A checkpoint that goes into a merge."""

    checkpoint: Checkpoint
    digest: str  # of its content: a commit sha, or a digest of a folder's files; with its base's
    parameters: Settings = field(default_factory=dict)  # its own, which override the recipe's
    weights: Mapping[str, float] = field(default_factory=dict)  # a guide's factor for each tensor

    @property
    def label(self) -> str:
        """The source, for messages."""
        return self.checkpoint.label


@dataclass(frozen=True)
class MergeSettings:
    """The sources of a merge, and how they are merged."""

    method: str
    base: MergeSource | None  # None for a method without a base
    experts: tuple[MergeSource, ...]  # in the recipe's order; all models if there is no base
    parameters: Settings = field(default_factory=dict)  # the recipe's, for all models and tensors
    dtype: str | None = None  # of the output, a key of `DTYPES`; None keeps the base's
    seed: int = 42  # of random methods
    missing: Missing = "error"  # `base`: the base's tensors replace those that experts lack
    alignment: Alignment | None = None  # None: row i is the same token in all sources
    arithmetic: Arithmetic = "float32"  # float64: by the methods' definitions

    @property
    def sources(self) -> tuple[MergeSource, ...]:
        """All sources in the order of a plan: first the base, if the method takes one."""
        takes_base = registry.find(self.method).takes_base
        return (self.base, *self.experts) if self.base and takes_base else self.experts

    @property
    def pattern(self) -> Checkpoint:
        """The checkpoint whose tensors and dtypes the merge has; it need not be merged itself."""
        return (self.base or self.experts[0]).checkpoint

    @property
    def stand_in(self) -> MergeSource | None:
        """The base if its tensors may replace missing ones, and the method does not take it."""
        takes_base = registry.find(self.method).takes_base
        return None if takes_base or self.missing == "error" else self.base

    @property
    def read(self) -> tuple[MergeSource, ...]:
        """All sources whose files may be read: those of `sources`, then `stand_in`."""
        return (*self.sources, self.stand_in) if self.stand_in else self.sources


@dataclass(frozen=True)
class Gram:
    """Where second moments of a matrix's inputs are stored."""

    stored: TensorHeader  # (n_parts, width, width) float32; (n_matrices, ...) of a stack
    transposed: bool  # whether the matrix itself is stored as (in, out)


@dataclass(frozen=True)
class Moments:
    """Second moments of a matrix's inputs x, on the device that the matrix is merged on.

    If a sequence is empty, z is x and d is 0.
    """

    grams: Sequence[Tensor | None]  # E[x x^T], per expert
    cross_covariances: Sequence[Tensor | None] = ()  # E[z x^T], z: the expert's input
    transposed: bool = False  # whether the matrix is stored as (in, out)
    residual_covariances: Sequence[Tensor | None] = ()  # E[d x^T], d: missing output

    def in_float64(self) -> Moments:
        """The same moments in float64."""
        return Moments(
            _doubled(self.grams),
            _doubled(self.cross_covariances),
            self.transposed,
            _doubled(self.residual_covariances),
        )


def _doubled(moments: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [one if one is None else one.double() for one in moments]


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is made.

    A copied tensor has one input, the base's, and no weights. In a stack, the block of an input may
    have another number than the output's. `own` are settings of the experts by keyword of the
    method's function.
    """

    output: OutputTensor
    inputs: tuple[TensorHeader, ...]  # per source, the base first
    sources: tuple[int, ...]  # of the inputs, as indices of `ShardPlan.labels`
    weights: tuple[float, ...] = ()  # per expert
    densities: tuple[float, ...] = ()  # per expert; empty if the method takes none
    streams: tuple[int, ...] = ()  # of random bits, per expert; empty if it is not random
    own: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # keyword -> per expert
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method, by the recipe's names
    assembled: tuple[Assembled | None, ...] = ()  # per source: None if it is stored as needed
    grams: tuple[Gram | None, ...] = ()  # per expert; empty if the method takes none

    @property
    def is_copied(self) -> bool:
        """Whether the base's tensor is copied: counts and masks are."""
        return not self.weights

    @property
    def has_base(self) -> bool:
        """Whether the first input is the base, and experts follow."""
        return 0 < len(self.weights) < len(self.inputs)

    @property
    def is_transposed(self) -> bool:
        """Whether it is a matrix stored as (in, out); known for those with second moments."""
        return any(gram.transposed for gram in self.grams if gram)


@dataclass(frozen=True)
class ShardPlan:
    """One output file."""

    method: str
    labels: tuple[str, ...]  # of the sources
    bases: tuple[str | None, ...]  # of adapters: label of the checkpoint that it changes
    source_digests: tuple[str, ...]
    layout: ShardLayout
    tensors: tuple[TensorPlan, ...]  # in the order of the layout
    allow_nan: bool = False  # whether experts may hold NaN and infinity; see `NanReplacingReader`
    statistics: Mapping[str, str] = field(default_factory=dict)  # label -> digest, per expert
    arithmetic: Arithmetic = "float32"

    @property
    def reads(self) -> list[list[SourceTensor]]:
        """The source tensors that each tensor is made from."""
        return [list(self._reads(tensor)) for tensor in self.tensors]

    def _reads(self, tensor: TensorPlan) -> Iterator[SourceTensor]:
        assembled = tensor.assembled or (None,) * len(tensor.inputs)
        for number, header, rows in zip(tensor.sources, tensor.inputs, assembled, strict=True):
            parts = {number: header} if rows is None else rows.stored_parts()
            for source, part in parts.items():
                yield SourceTensor(self.labels[source], part, self.bases[source])

    @cached_property
    def digest(self) -> str:
        """Shards with the same digest have the same bytes."""
        facts = {
            "version": VERSION,
            "method": [self.method, registry.find(self.method).version],
            "sources": self.source_digests,
            "tensors": [
                asdict(replace(tensor, assembled=()), dict_factory=_digested)
                | {"assembled": [rows and rows.digest() for rows in tensor.assembled]}
                for tensor in self.tensors
            ],
            "allow_nan": self.allow_nan,
            "statistics": list(self.statistics.values()),
        }
        if self.arithmetic != "float32":
            facts["arithmetic"] = self.arithmetic
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _digested(fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a dataclass for a digest: orders of rows by their own, and only if there."""
    return {
        name: hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value
        for name, value in fields
        if name not in ("permuted", "fitted") or value is not None
    }


@dataclass(frozen=True)
class MergePlan:
    """All output shards."""

    shards: tuple[ShardPlan, ...]

    @property
    def allowing_nan(self) -> MergePlan:
        """The same plan for experts that may hold NaN and infinity."""
        return MergePlan(tuple(replace(shard, allow_nan=True) for shard in self.shards))

    def computed_in(self, arithmetic: Arithmetic) -> MergePlan:
        """The same plan in another dtype of the arithmetic."""
        return MergePlan(tuple(replace(one, arithmetic=arithmetic) for one in self.shards))

    @property
    def layouts(self) -> tuple[ShardLayout, ...]:
        """The layout of each file."""
        return tuple(shard.layout for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """The size of all files together."""
        return sum(layout.n_bytes for layout in self.layouts)

    @property
    def digest(self) -> str:
        """Merges with the same digest have the same bytes."""
        digests = "\n".join(shard.digest for shard in self.shards)
        return "sha256:" + hashlib.sha256(digests.encode()).hexdigest()


def make_plan(
    settings: MergeSettings, max_shard_bytes: int, schedule: Schedule | None = None
) -> MergePlan:
    """Plan a merge from headers alone; a guide's densities override those of the settings.

    Raises:
        MergeError: a method or parameter is unknown, a filter or the schedule names no tensor, or
            the sources do not fit together.
    """
    require_mergeable(settings)
    tensors = settings.pattern.tensors
    own = [expert.parameters for expert in settings.experts]
    require_filters_fit(settings.parameters, own, tensors)
    _require_schedule_fits(settings, schedule or {})
    made = plan_tensors(settings, depths(tensors), schedule or {})
    planned = plan_shards(settings.method, settings.read, made, max_shard_bytes)
    return planned.computed_in(settings.arithmetic)


def plan_tensors(
    settings: MergeSettings, depths: Mapping[str, float], schedule: Schedule
) -> dict[str, TensorPlan]:
    """Plan the tensors of `depths`, in this order; the sources are those of the settings."""
    tensors = settings.pattern.tensors
    found = {}
    for name, depth in depths.items():
        kept = tensors[name].kept_dtype
        dtype = DTYPES[settings.dtype] if settings.dtype and kept in MERGEABLE else kept
        output = OutputTensor(name, dtype, output_shape(settings.alignment, tensors[name]))
        found[name] = _plan_tensor(settings, schedule, output, depth)
    return found


def require_few(n_tensors: int, where: str) -> None:
    """Refuse a merge of more tensors than the headers of a model may list.

    A recipe of some kilobytes can ask for any number of copies of a model's blocks.
    """
    if n_tensors > MAX_TENSORS:
        problem = f"the merge would have more than {MAX_TENSORS:,} tensors, the limit of a model"
        raise MergeError(where, problem, "List fewer of them.")


def plan_shards(
    method: str,
    sources: Sequence[MergeSource],
    tensors: Mapping[str, TensorPlan],
    max_shard_bytes: int,
) -> MergePlan:
    """Distribute tensors over files, in their order."""
    outputs = [tensor.output for tensor in tensors.values()]
    return MergePlan(
        tuple(
            ShardPlan(
                method,
                tuple(source.label for source in sources),
                tuple(source.checkpoint.base for source in sources),
                tuple(source.digest for source in sources),
                layout,
                tuple(tensors[tensor.name] for tensor in layout.tensors),
            )
            for layout in lay_out(outputs, max_shard_bytes)
        )
    )


def _plan_tensor(
    settings: MergeSettings, schedule: Schedule, output: OutputTensor, depth: float
) -> TensorPlan:
    method, experts, name = registry.find(settings.method), settings.experts, output.name
    used = tuple(
        len(settings.sources) if settings.stand_in and name not in one.checkpoint.tensors else i
        for i, one in enumerate(settings.sources)
    )
    sources = [settings.read[number] for number in used]
    parts = [source.checkpoint.tensors.get(name) for source in sources]
    labels = [source.label for source in sources]
    inputs, assembled = assemble_inputs(settings.alignment, name, output.shape, labels, parts)
    if inputs[0].dtype not in MERGEABLE:
        return TensorPlan(replace(output, dtype=inputs[0].dtype), inputs[:1], used[:1])

    def value_of(setting: str, expert: MergeSource) -> float:
        tensor = expert.checkpoint.tensors.get(name)
        own_name = tensor.name if tensor else name  # its block may have another number there
        places = (expert.parameters, settings.parameters, DEFAULTS)
        return float(look_up(setting, places, own_name, depth))

    options = options_of(method, settings.parameters, name, depth)
    own = {
        keyword: tuple(value_of(setting, expert) for expert in experts)
        for keyword, setting in PER_SOURCE.items()
        if keyword == "weights" or method.takes(keyword)
    }
    factors = [expert.weights.get(name, 1.0) for expert in experts]
    weights = tuple(map(operator.mul, own.pop("weights"), factors))
    require_divisor(method, options, weights, name)
    densities = tuple(
        schedule.get(expert.label, {}).get(name, density)
        for expert, density in zip(experts, own.pop("densities", ()), strict=False)
    )
    n_streams = len(experts) if method.takes("streams") else 0
    streams = tuple(random_bits.stream(settings.seed, name, i) for i in range(n_streams))
    return TensorPlan(output, inputs, used, weights, densities, streams, own, options, assembled)


def require_mergeable(settings: MergeSettings) -> None:
    """Raise a MergeError for sources that do not fit, and for unknown or invalid settings."""
    method = registry.find(settings.method)
    where = f"method `{method.name}`"
    if method.takes_base and not method.base_is_optional and settings.base is None:
        raise MergeError(where, "it needs a base to start from", "Name a `base_model`.")
    if not settings.experts:
        raise MergeError(where, "there is nothing to merge", "List at least one expert.")
    _require_number_of_experts(method, settings)
    others = [one.checkpoint for one in settings.sources if one.checkpoint is not settings.pattern]
    labels, alignment = [source.label for source in settings.sources], settings.alignment
    assembled = alignment.tensors if alignment else frozenset()
    has_tokens = assembled & settings.pattern.tensors.keys()
    if alignment and has_tokens and (foreign := alignment.foreign_source(labels)):
        problem = f"a token takes its row from {foreign}, which is not merged"
        raise MergeError(where, problem, "Name one of the merged models, or list it among them.")
    mismatches = compare(settings.pattern, others, settings.missing, assembled)
    if mismatches:
        problem = f"the sources do not fit together: {mismatches[0].source} {mismatches[0].problem}"
        raise MergeError(where, problem, mismatches[0].remedy)
    require_valid(method, settings.parameters, [expert.parameters for expert in settings.experts])


def _require_number_of_experts(method: Method, settings: MergeSettings) -> None:
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


def _require_schedule_fits(settings: MergeSettings, schedule: Schedule) -> None:
    """Refuse a guide's settings of unknown sources or tensors, and densities out of range."""
    if schedule and not registry.find(settings.method).takes_density:
        problem = f"`{settings.method}` keeps every entry, so a guide's densities would do nothing"
        raise MergeError("guide", problem, "Use `ties`, `dare_ties` or `dare_linear`.")
    remedy = "Measure the importance of these sources anew."
    experts = {expert.label: expert for expert in settings.experts}
    for label, expert in experts.items():
        if unknown := expert.weights.keys() - expert.checkpoint.tensors.keys():
            problem = f"it sets a weight for {min(unknown)}, which {label} does not have"
            raise MergeError("guide", problem, remedy)
    for label, densities in schedule.items():
        if label not in experts:
            problem = f"it sets densities for {label}, which is not merged"
            raise MergeError("guide", problem, f"Experts: {', '.join(experts)}.")
        for name, density in densities.items():
            if name not in experts[label].checkpoint.tensors:
                problem = f"it sets a density for {name}, which {label} does not have"
                raise MergeError("guide", problem, remedy)
            if not 0 <= density <= 1:
                problem = f"it gives {name} the density {density:g}"
                raise MergeError("guide", problem, "A density lies between 0 and 1.")


@dataclass(frozen=True)
class Statistics:
    """Second moments of the inputs of one expert's matrices, in files of their own."""

    label: str  # of the files, in the `Locations` of the merge
    digest: str  # of their content
    grams: Mapping[str, Gram]  # by the tensors of the output


@dataclass(frozen=True)
class Fitted:
    """Tensors that were fitted with statistics and are copied into the output."""

    label: str  # of their files, in the `Locations` of the merge
    digest: str  # of their content
    tensors: Mapping[str, TensorHeader]  # by the names of the output


def with_statistics(plan: MergePlan, statistics: Sequence[Statistics] | Fitted) -> MergePlan:
    """Add second moments to a plan, one entry per expert; or copy what was fitted with them."""
    if isinstance(statistics, Fitted):
        return _with_fitted(plan, statistics)
    if not statistics:
        return plan
    digests = {one.label: one.digest for one in statistics}
    return MergePlan(
        tuple(
            replace(
                shard,
                statistics=digests,
                tensors=tuple(_with_grams(tensor, statistics) for tensor in shard.tensors),
            )
            for shard in plan.shards
        )
    )


def _with_grams(tensor: TensorPlan, statistics: Sequence[Statistics]) -> TensorPlan:
    grams = tuple(_fitting_gram(one, tensor.output) for one in statistics)
    return replace(tensor, grams=grams) if any(grams) and not tensor.is_copied else tensor


def _fitting_gram(statistics: Statistics, output: OutputTensor) -> Gram | None:
    """The gram of a matrix; None if the model that was run stores the matrix in another shape."""
    gram = statistics.grams.get(output.name)
    if gram is None or len(output.shape) not in (2, 3):
        return None
    *stack, n_parts, width, _ = gram.stored.shape
    *matrices, n_rows, n_columns = output.shape
    fits = n_parts * width == (n_rows if gram.transposed else n_columns)
    return gram if fits and stack == matrices else None


def lacking_statistics(plan: MergePlan, matrices: Sequence[str]) -> list[str]:
    """The matrices that lack second moments of at least one expert, in the plan's order."""
    return [
        tensor.output.name
        for shard in plan.shards
        for tensor in shard.tensors
        if tensor.output.name in matrices and not (tensor.grams and all(tensor.grams))
    ]


def _with_fitted(plan: MergePlan, fitted: Fitted) -> MergePlan:
    """Copy fitted tensors instead of merging them."""

    def copied(tensor: TensorPlan, source: int) -> TensorPlan:
        stored = fitted.tensors.get(tensor.output.name)
        return TensorPlan(tensor.output, (stored,), (source,)) if stored else tensor

    return MergePlan(
        tuple(
            replace(
                shard,
                labels=(*shard.labels, fitted.label),
                bases=(*shard.bases, None),
                source_digests=(*shard.source_digests, fitted.digest),
                tensors=tuple(copied(tensor, len(shard.labels)) for tensor in shard.tensors),
            )
            for shard in plan.shards
        )
    )
