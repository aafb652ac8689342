"""Mixtures of experts: the MLPs of dense models become the experts of each block of a new model.

All other tensors are the base's. Router weights are measured, and copied from a file of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.writer import DTYPES, OutputTensor
from lewis_hub.errors import MergeError
from lewis_hub.merge.architectures import BLOCK, MLP, NO_DENSE, Architecture
from lewis_hub.merge.plan import MergePlan, MergeSource, TensorPlan, plan_shards, require_few

METHOD = "linear"  # of one source, with its factor as the weight
RESIDUAL = "down_proj"  # its output is that of the MLP
BUFFERS = "rotary_emb.inv_freq"  # stored by old versions of transformers, which computes it now
OUTSIDE = frozenset({"model.embed_tokens", "model.norm", "lm_head"})


@dataclass(frozen=True)
class MixtureExpert:
    """A dense model whose MLPs become an expert of each block."""

    source: MergeSource
    residual_scale: float = 1.0  # factor of its down projections


@dataclass(frozen=True)
class MixtureSettings:
    """The models of a mixture."""

    architecture: Architecture
    base: MergeSource
    routed: tuple[MixtureExpert, ...]  # in the order of the router's rows
    shared: MixtureExpert | None = None
    dtype: str | None = None  # of the output; None: each tensor has that of the base's

    @property
    def sources(self) -> tuple[MergeSource, ...]:
        """All models, each once, the base first."""
        experts = (*self.routed, *([self.shared] if self.shared else []))
        found = (self.base, *(expert.source for expert in experts))
        return tuple({source.label: source for source in found}.values())

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the base's attention has biases."""
        return any(name.endswith("self_attn.q_proj.bias") for name in self.base.checkpoint.tensors)

    @property
    def routers(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all router weights, by their names, block by block."""
        gates = {n: t for n, t in self.base.checkpoint.tensors.items() if _projection(n) == MLP[0]}
        return {r: shape for name, gate in gates.items() for r, shape in _routers(self, name, gate)}


def make_mixture_plan(settings: MixtureSettings, max_shard_bytes: int) -> MergePlan:
    """Plan a mixture from headers alone; router weights have no inputs until they are measured.

    Raises:
        MergeError: a model lacks an MLP or has one of another shape, or the architecture has no
            place for a tensor of the base.
    """
    numbers = {source.label: number for number, source in enumerate(settings.sources)}
    n_dense = sum(_projection(name) is not None for name in settings.base.checkpoint.tensors)
    require_few(n_dense * len(settings.routed), "experts")
    made: dict[str, TensorPlan] = {}
    for name, tensor in settings.base.checkpoint.tensors.items():
        projection = _projection(name)
        if projection is None:
            if not name.endswith(BUFFERS):
                _require_place(settings, name)
                made[name] = _taken(_output(settings, name, tensor), tensor, 0, 1.0)
            continue
        for component, expert in _experts(settings, projection):
            stored = _stored(expert.source, name, tensor)
            output = _output(settings, _beside(name, component), tensor)
            scale = expert.residual_scale if projection == RESIDUAL else 1.0
            made[output.name] = _taken(output, stored, numbers[expert.source.label], scale)
        if projection == MLP[0]:
            for router, shape in _routers(settings, name, tensor):
                output = _output(settings, router, tensor)
                made[router] = TensorPlan(OutputTensor(router, output.dtype, shape), (), ())
    _require_mlps(settings)
    return plan_shards(METHOD, settings.sources, made, max_shard_bytes)


def _experts(settings: MixtureSettings, projection: str) -> Iterator[tuple[str, MixtureExpert]]:
    """The component of each expert's matrix in a block."""
    for number, expert in enumerate(settings.routed):
        yield settings.architecture.routed(number, projection), expert
    if settings.shared:
        yield settings.architecture.shared(projection), settings.shared


def _routers(
    settings: MixtureSettings, name: str, gate: TensorHeader
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The router weights of the block of a dense model's `gate_proj`, and their shapes."""
    kind, width = settings.architecture, gate.shape[-1]
    yield _beside(name, kind.router), (len(settings.routed), width)
    if settings.shared:
        yield _beside(name, kind.shared_gate), (1, width)


def _output(settings: MixtureSettings, name: str, like: TensorHeader) -> OutputTensor:
    kept = like.kept_dtype
    dtype = DTYPES[settings.dtype] if settings.dtype and kept in MERGEABLE else kept
    return OutputTensor(name, dtype, like.shape)


def _taken(output: OutputTensor, stored: TensorHeader, source: int, scale: float) -> TensorPlan:
    """One source's tensor times a number, in the output's dtype."""
    if stored.dtype not in MERGEABLE:
        return TensorPlan(output, (stored,), (source,))
    options = {"normalize": False}
    return TensorPlan(output, (stored,), (source,), (scale,), options=options)


def _stored(source: MergeSource, name: str, like: TensorHeader) -> TensorHeader:
    found = source.checkpoint.tensors.get(name)
    remedy = "All experts must be dense models with MLPs of the base's shapes."
    if found is None:
        raise MergeError("experts", f"{source.label} has no tensor {name}", remedy)
    if found.shape != like.shape:
        problem = f"{name} has shape {[*like.shape]} in the base and {[*found.shape]} in "
        raise MergeError("experts", f"{problem}{source.label}", remedy)
    return found


def _require_place(settings: MixtureSettings, name: str) -> None:
    kind, component = settings.architecture, names.component(name)
    inside = names.block(name) is not None
    suffix = name[len(names.module(name)) :]
    allowed: Collection[str] = BLOCK | kind.further if inside else OUTSIDE
    if (component + suffix if inside else names.module(name)) not in allowed:
        problem = f"{kind.name} has no place for {name} of {settings.base.label}"
        raise MergeError("base_model", problem, NO_DENSE)


def _require_mlps(settings: MixtureSettings) -> None:
    if not settings.routers:
        problem = f"{settings.base.label} has no tensor `model.layers.0.mlp.gate_proj.weight`"
        raise MergeError("base_model", problem, NO_DENSE)
    numbers = {names.block(name) for name in settings.routers}
    if numbers != {*range(len(numbers))}:
        problem = f"the blocks of {settings.base.label} are not numbered from 0 on, without gaps"
        raise MergeError("base_model", problem, NO_DENSE)


def _projection(name: str) -> str | None:
    """The matrix of a dense MLP that a tensor is; None for all other tensors."""
    if names.block(name) is None or not name.endswith(".weight"):
        return None
    path, _, last = names.component(name).rpartition(".")
    return last if path == "mlp" and last in MLP else None


def _beside(name: str, component: str) -> str:
    """The tensor of a component in the same block."""
    return f"{names.stack(name)}.{names.block(name)}.{component}"
