"""A LoRA adapter on its base, as one checkpoint: which tensors it changes, and how.

Only headers and the configuration are looked at. PEFT names what it stores after the modules of
the loaded model, `base_model.model.<module>.lora_A.weight`; `names.find` knows where those lie.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import MERGEABLE, Adapted, LowRank, ShardHeader, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import AdapterError

FOLD = (
    "Merge it into its base with peft (`merge_and_unload`), save that with `save_pretrained`, and "
    "use the result as the expert."
)
# of training and of running, or told by the tensors themselves: they change no weight
UNREAD = frozenset(
    {"auto_mapping", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"}
    | {"lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"}
    | {"runtime_config", "target_modules", "task_type"}
)
INITIALISED = (True, False, "gaussian", "orthogonal")  # they leave the base's weights alone

Value = TypeVar("Value", int, float)


class AdapterConfig(BaseModel):
    """How the tensors of an adapter are meant, in PEFT's words and with its defaults."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    r: PositiveInt = 8
    lora_alpha: float = Field(8, allow_inf_nan=False)
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] = Field((), strict=False)
    init_lora_weights: bool | str = True

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _compile(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no pattern: {error}") from None
        return value

    def rank(self, module: str) -> int:
        """The rank that a module of the base was given."""
        return _of(module, self.rank_pattern, self.r)

    def scale(self, module: str) -> float:
        """What b @ a is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        rank = self.rank(module)
        alpha = _of(module, self.alpha_pattern, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(where: str, text: bytes) -> AdapterConfig:
    """Read the configuration of an adapter.

    Args:
        where: the source and the file, for messages.
        text: of `adapter_config.json`.

    Raises:
        AdapterError: it is no configuration, or asks for what is not computed here.
    """
    try:
        found: Any = json.loads(text)
        told = {key: value for key, value in found.items() if value is not None}
    except (ValueError, RecursionError, AttributeError):
        problem = "it is not a JSON object"
        raise AdapterError(where, problem, "The file is damaged: use an intact copy.") from None
    kind = told.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(where, f"it is an adapter of type {kind!r}; only LORA is read", FOLD)
    try:
        config = AdapterConfig.model_validate({"peft_type": kind} | told)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(map(str, detail["loc"]))
        problem = (
            f"`{place}` is not what PEFT writes: {detail['msg'].removeprefix('Value error, ')}"
        )
        raise AdapterError(where, problem, "The file is damaged: use an intact copy.") from None
    for problem, remedy in _refusals(config):
        raise AdapterError(where, problem, remedy)
    return config


def _refusals(config: AdapterConfig) -> Iterator[tuple[str, str]]:
    """What would make another model of it if it were passed over, and what to do."""
    first = config.init_lora_weights
    if first not in INITIALISED:
        yield (
            f"`init_lora_weights` is {first!r}, which changed the base's weights before training",
            "Save it again with peft's `path_initial_model_for_weight_conversion`, which makes an "
            "ordinary LoRA of it.",
        )
    for key, value in (config.model_extra or {}).items():
        if value and key not in UNREAD:
            yield f"`{key}` is set, and this version does not know what it does to weights", FOLD


def _of(module: str, patterns: Mapping[str, Value], default: Value) -> Value:
    """The first pattern that fits the end of the module's name counts, as in PEFT."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


PREFIX = "base_model.model."
KEPT = ".base_layer."  # a module that was adapted keeps its own weight under this name
LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
SUFFIXES = {  # how a key ends -> which part of its module's update it is
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
}

Parts = Mapping[str, TensorHeader]


@dataclass(frozen=True)
class _Placing:
    """What it takes to place an adapter's tensors, and where messages point to."""

    where: str
    base: Checkpoint
    config: AdapterConfig

    def refused(self, problem: str, remedy: str = FOLD) -> AdapterError:
        return AdapterError(self.where, problem, remedy)

    def target(self, name: str, key: str) -> TensorHeader:
        """The base's tensor that `key` is about."""
        found = names.find(name, self.base.tensors)
        if len(found) != 1:
            which = "several tensors" if found else "no tensor"
            near = difflib.get_close_matches(name, self.base.tensors, n=1, cutoff=0.8)
            hint = f" (the nearest is {near[0]})" if near else ""
            problem = f"`{key}` belongs to {which} of the base {self.base.label}{hint}"
            remedy = "Name the base that it was trained on as `base_model`. If that is the one, "
            raise self.refused(problem, remedy + FOLD[0].lower() + FOLD[1:])
        tensor = self.base.tensors[found[0]]
        if tensor.dtype not in MERGEABLE:
            problem = f"`{key}` changes {tensor.name}, which the base holds as {tensor.dtype}"
            raise self.refused(problem, "Use the base in bfloat16, float16 or float32.")
        return tensor


def adapt(label: str, base: Checkpoint, stored: ShardHeader, config: AdapterConfig) -> Checkpoint:
    """Put an adapter on a base: the base's tensors, those that the adapter changes in float32.

    Args:
        label: the adapter, for messages; what the result is called.
        base: whose tensors are changed.
        stored: header of the adapter's file.
        config: the adapter's.

    Raises:
        AdapterError: a tensor of the file is unknown, belongs to none of the base's, or does not
            fit its shape.
    """
    if not stored.tensors:
        raise AdapterError(label, "its file holds no tensors", "Use an intact copy.")
    file = stored.tensors[0].shard
    changed = _changes(_Placing(f"{label}: {file}", base, config), stored)
    tensors = {
        name: TensorHeader(name, "F32", t.shape, file, 0, 4 * t.n_elements, changed[name])
        if name in changed
        else t
        for name, t in base.tensors.items()
    }
    return Checkpoint(label, tensors, base.metadata, base.label)


def _changes(placing: _Placing, stored: ShardHeader) -> dict[str, Adapted]:
    """The base's tensors that are changed, and how."""
    modules, saved = _sorted(placing, stored)
    _require_saved(placing, saved)
    changed: dict[str, Adapted] = {}
    for name, tensor in saved.items():
        target = placing.target(name, tensor.name)
        changed[target.name] = _replaced(placing, target, tensor, changed.get(target.name))
    targets = {
        module: placing.target(f"{module}.weight", next(iter(parts.values())).name)
        for module, parts in modules.items()
    }
    squares = _squares_transposed(placing.config, modules, targets)
    for module, target in targets.items():
        update = _update(placing, module, modules[module], target, squares_transposed=squares)
        before = changed.get(target.name)
        if before and before.update:
            raise placing.refused(f"`{update.a.name}` changes {target.name} a second time")
        changed[target.name] = Adapted(target, before.saved if before else None, update)
    return changed


def own_tensors(adapter: Checkpoint) -> tuple[TensorHeader, ...]:
    """What an adapter's own file holds."""
    adapted = (t.adapted for t in adapter.tensors.values() if t.adapted)
    return tuple(own for one in adapted for own in one.own)


def _sorted(
    placing: _Placing, stored: ShardHeader
) -> tuple[dict[str, dict[str, TensorHeader]], dict[str, TensorHeader]]:
    """The parts of each module's update, and the tensors that replace those of their name."""
    modules: defaultdict[str, dict[str, TensorHeader]] = defaultdict(dict)
    saved: dict[str, TensorHeader] = {}
    for tensor in stored.tensors:
        if tensor.dtype not in MERGEABLE:
            problem = f"`{tensor.name}` is {tensor.dtype}, which this version does not read"
            raise placing.refused(problem, "Save the adapter in bfloat16, float16 or float32.")
        name = tensor.name.removeprefix(PREFIX)
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if not suffix and "lora_" in name:
            raise placing.refused(f"`{tensor.name}` is no part of a LoRA that this version knows")
        place = modules[name.removesuffix(suffix)] if suffix else saved
        name = SUFFIXES[suffix] if suffix else name.replace(KEPT, ".")
        if name in place:
            raise placing.refused(f"`{place[name].name}` and `{tensor.name}` mean the same tensor")
        place[name] = tensor
    return modules, saved


def _require_saved(placing: _Placing, saved: Mapping[str, TensorHeader]) -> None:
    for module in placing.config.modules_to_save:
        if not any(f".{names.module(name)}".endswith(f".{module}") for name in saved):
            problem = f"its configuration says that `{module}` was trained whole (modules_to_save),"
            problem += " but the file does not hold it"
            raise placing.refused(problem, "Save the adapter again, or use an intact copy.")


def _replaced(
    placing: _Placing, target: TensorHeader, tensor: TensorHeader, before: Adapted | None
) -> Adapted:
    if before:
        raise placing.refused(f"`{tensor.name}` replaces {target.name} a second time")
    if tensor.shape != target.shape:
        problem = f"`{tensor.name}` has shape {list(tensor.shape)}, {target.name} of the base "
        problem += f"{placing.base.label} has {list(target.shape)}"
        remedy = "If only the vocabulary differs, bring the base to the adapter's with "
        remedy += "transformers' `model.resize_token_embeddings` and use that as `base_model`."
        raise placing.refused(problem, remedy)
    return Adapted(target, tensor, None)


def _squares_transposed(
    config: AdapterConfig,
    modules: Mapping[str, Parts],
    targets: Mapping[str, TensorHeader],
) -> bool:
    """Whether square weights lie as (in, out), which their shapes do not tell.

    The other ones in the blocks tell it: PEFT sets `fan_in_fan_out` anew at each module, so what
    it saves is true of the last, such as a head.
    """
    told = set()
    for module, parts in modules.items():
        shape = targets[module].shape
        if names.block(module) is not None and set(LINEAR) <= set(parts):
            a, b = (parts[part].shape for part in LINEAR)
            if len(set(shape)) == 2 and len(a) == len(b) == 2:
                told.add(shape == (a[1], b[0]))
    return told.pop() if len(told) == 1 else config.fan_in_fan_out


def _update(
    placing: _Placing, module: str, parts: Parts, target: TensorHeader, *, squares_transposed: bool
) -> LowRank:
    magnitude = parts.get(MAGNITUDE)
    pair = next((pair for pair in (LINEAR, EMBEDDING) if set(pair) == set(parts) - {MAGNITUDE}), ())
    if not pair or placing.config.use_dora != (magnitude is not None):
        wanted = f"lora_A, lora_B{f', {MAGNITUDE}' if placing.config.use_dora else ''}"
        problem = f"of `{module}` it holds {', '.join(sorted(parts))}, expected {wanted}"
        raise placing.refused(problem, "The file is not what PEFT writes: use an intact copy.")
    a, b = (parts[part] for part in pair)
    if len(target.shape) != 2:
        problem = f"`{a.name}` changes {target.name} of shape {list(target.shape)}, no matrix"
        raise placing.refused(problem)
    transposed = pair == EMBEDDING or target.shape != (b.shape[0], a.shape[-1])
    if len(set(target.shape)) == 1 and pair == LINEAR:
        transposed = squares_transposed
    rank = placing.config.rank(module)
    n_out, n_in = target.shape[::-1] if transposed else target.shape
    fits = a.shape == (rank, n_in) and b.shape == (n_out, rank)
    if not fits or (magnitude and magnitude.shape != (n_out,)):
        held = ", ".join(f"{part} of shape {list(parts[part].shape)}" for part in sorted(parts))
        problem = f"of `{module}` it holds {held} for rank {rank}, which do not fit {target.name} "
        problem += f"of shape {list(target.shape)}"
        raise placing.refused(problem, "Name the base that it was trained on as `base_model`.")
    return LowRank(a, b, placing.config.scale(module), transposed, magnitude)
