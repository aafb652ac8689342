"""A LoRA adapter and its base as one checkpoint: which tensors the adapter changes, and how.

Only headers and the configuration are read. PEFT names its tensors after the modules of the loaded
model, `base_model.model.<module>.lora_A.weight`; `names.find` maps these to the base's tensors.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import MERGEABLE, Adapted, LowRank, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.documents import read_json
from lewis_hub.errors import AdapterError

if TYPE_CHECKING:
    import re2

FOLD = (
    "Merge it into its base with peft (`merge_and_unload`), save that with `save_pretrained`, and "
    "use the result as the expert."
)
DAMAGED = "The file is damaged: use an intact copy."
# settings of training and of running, or that the tensors show: they change no weight
IGNORED = frozenset(
    {"auto_mapping", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern"}
    | {"layers_to_transform", "lora_dropout", "megatron_core", "peft_version"}
    | {"qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"}
)
INITIALISED = (True, False, "gaussian", "orthogonal")  # these leave the base's weights unchanged

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer."  # an adapted module keeps its own weight under this name
LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
SUFFIXES = {  # of a key -> part of its module's update
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
}

CLASSIFIERS = frozenset({"classifier", "score"})  # PEFT names both, whichever a model has

# a name as a pattern: maybe anchored, with its dots escaped or not
PLAIN_NAME = re.compile(r"(\^?)([\w-]+(?:\\?\.[\w-]+)*)\$?", re.ASCII)
MAX_EXPRESSIONS = 256
DOT = re.compile(r"\.")
MAX_EXPRESSION_BYTES = 256 << 10  # of memory for each
MAX_VALUES = 1_000_000  # of its configuration: pydantic takes a kB to tell what is wrong with each
MAX_STEPS = 50_000  # of all; each letter of a module's name may take all of them
MAX_LEVELS = 4  # of modules in one that is saved whole, such as a projector
Value = TypeVar("Value", int, float)
UpdateParts = Mapping[str, TensorHeader]  # such as `lora_A` -> its tensor


class AdapterConfig(BaseModel):
    """The settings of `adapter_config.json` that decide about weights, with PEFT's defaults."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    r: PositiveInt = 8
    lora_alpha: float = Field(8, allow_inf_nan=False)
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] = Field((), strict=False, fail_fast=True)
    init_lora_weights: bool | str = True
    ensure_weight_tying: bool = False

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_patterns(cls, value: dict[str, float]) -> dict[str, float]:
        _Patterns.of(value)
        return value

    @property
    def has_head_saved(self) -> bool:
        """Whether the head was trained whole, and is stored."""
        return any(names.is_head(f"{module}.weight") for module in self.modules_to_save)

    @cached_property
    def _ranks(self) -> _Patterns[int]:
        return _Patterns.of(self.rank_pattern)

    @cached_property
    def _alphas(self) -> _Patterns[float]:
        return _Patterns.of(self.alpha_pattern)

    def rank(self, module: str) -> int:
        """The rank of the update of a module of the base."""
        return self._ranks.value(module, self.r)

    def scale(self, module: str) -> float:
        """The factor of b @ a: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        rank = self.rank(module)
        alpha = self._alphas.value(module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class _Patterns(Generic[Value]):
    """The values that an adapter gives to modules, by the ends of their names, as in PEFT.

    PEFT matches a pattern as the whole name, or what stands behind a dot in it, by `re`, which can
    take for ever. Here plain names are looked up, and RE2 matches the rest in linear time; it knows
    neither look-around nor back-references.
    """

    names: Mapping[str, tuple[int, Value]]  # place among all patterns, and value
    expressions: Sequence[tuple[int, Value, re2._Regexp]]

    @classmethod
    def of(cls, values: Mapping[str, Value]) -> _Patterns[Value]:
        """Compile patterns; a ValueError says which one is wrong."""
        names: dict[str, tuple[int, Value]] = {}
        expressions: list[tuple[int, Value, re2._Regexp]] = []
        for place, (pattern, value) in enumerate(values.items()):
            if plain := PLAIN_NAME.fullmatch(pattern):
                names.setdefault(plain[1] + plain[2].replace("\\", ""), (place, value))
            else:
                expressions.append((place, value, _compiled(pattern)))
            if len(expressions) > MAX_EXPRESSIONS:
                problem = f"more than {MAX_EXPRESSIONS} of its keys are regular expressions"
                raise ValueError(problem)
            if sum(one.programsize for _, _, one in expressions) > MAX_STEPS:
                raise ValueError("its regular expressions are too long")
        return cls(names, expressions)

    def value(self, module: str, default: Value) -> Value:
        """The value of the first pattern that matches the end of the module's name."""
        ends = [f"^{module}", module, *(module[dot.end() :] for dot in DOT.finditer(module))]
        found = [self.names[end] for end in ends if end in self.names]
        matching = (one for one in self.expressions if one[2].fullmatch(module))
        found += ((place, value) for place, value, _ in itertools.islice(matching, 1))
        return min(found, default=(0, default))[1]


def _compiled(pattern: str) -> re2._Regexp:
    import re2

    options = re2.Options()
    options.max_mem, options.log_errors = MAX_EXPRESSION_BYTES, False
    options.never_capture = True  # to note where thousands of groups match takes their square
    try:
        re2.compile(pattern, options)  # alone, for the message of an error
        return re2.compile(rf"(?:.*\.)?(?:{pattern})", options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace")
        problem = f"{pattern[:100]!r} is not a regular expression that RE2 knows: {reason}"
        raise ValueError(problem) from None


def read_config(where: str, text: bytes) -> AdapterConfig:
    """Read an `adapter_config.json`, or refuse it with an AdapterError that names it `where`."""
    try:
        stated = read_json(text, max_values=MAX_VALUES).items()
        settings = {key: value for key, value in stated if value is not None}
    except (ValueError, AttributeError):
        raise AdapterError(where, "it is not a JSON object", DAMAGED) from None
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(where, f"it is an adapter of type {kind!r}; only LORA is read", FOLD)
    try:
        config = AdapterConfig.model_validate({"peft_type": kind} | settings)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        field = ".".join(map(str, detail["loc"]))
        message = detail["msg"].removeprefix("Value error, ")
        problem = f"`{field}` is not what PEFT writes: {message}"
        remedy = FOLD if detail["type"] == "value_error" else DAMAGED  # of a pattern
        raise AdapterError(where, problem, remedy) from None
    _require_computed(where, config)
    return config


def _require_computed(where: str, config: AdapterConfig) -> None:
    """Refuse settings that change weights in a way that this version does not compute."""
    start = config.init_lora_weights
    if start not in INITIALISED:
        problem = f"`init_lora_weights` is {start!r}, which changed the base's weights before "
        remedy = "Save it again with peft's `path_initial_model_for_weight_conversion`, which makes"
        raise AdapterError(where, f"{problem}training", f"{remedy} an ordinary LoRA of it.")
    tying = {"ensure_weight_tying": config.ensure_weight_tying and not config.has_head_saved}
    for key, value in {**(config.model_extra or {}), **tying}.items():
        if value and key not in IGNORED:
            problem = f"`{key}` is set, and this version does not know how it changes weights"
            raise AdapterError(where, problem, FOLD)


def adapt(
    label: str, base: Checkpoint, stored: Sequence[TensorHeader], config: AdapterConfig
) -> Checkpoint:
    """Apply an adapter to a base: all tensors of the base, the changed ones in float32.

    The result is labelled as the adapter; `stored` are the tensors of the adapter's file. An
    AdapterError says that one of them is unknown, matches no tensor of the base, or has another
    shape.
    """
    if not stored:
        raise AdapterError(label, "its file contains no tensors", "Use an intact copy.")
    file = stored[0].shard
    changes = _changes(_AdapterFile(f"{label}: {file}", base, config), stored)
    changed = {
        name: TensorHeader(name, "F32", one.base.shape, file, 0, 4 * one.base.n_elements, one)
        for name, one in changes.items()
    }
    return Checkpoint(label, {**base.tensors, **changed}, base.label)


def adapted_module(factor: TensorHeader) -> str:
    """The module that a factor belongs to, as PEFT calls it: a base's file may leave out a prefix.

    `factor` is one of those in a `LowRank`.
    """
    name = factor.name.removeprefix(PREFIX)
    return next(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))


def own_tensors(adapter: Checkpoint) -> tuple[TensorHeader, ...]:
    """The tensors that an adapter's own file contains."""
    adapted = (tensor.adapted for tensor in adapter.tensors.values())
    return tuple(own for change in adapted if change for own in change.own)


@dataclass(frozen=True)
class _AdapterFile:
    """An adapter's file, as messages name it, with its base and its configuration."""

    where: str
    base: Checkpoint
    config: AdapterConfig

    @cached_property
    def names(self) -> names.TensorNames:
        """The names of the base's tensors."""
        return names.TensorNames(self.base.tensors)

    def error(self, problem: str, remedy: str = FOLD) -> AdapterError:
        return AdapterError(self.where, problem, remedy)

    def target(self, name: str, key: str) -> TensorHeader:
        """The base's tensor that the file's tensor `key` changes."""
        found = self.names.find(name)
        if len(found) != 1:
            which = "several tensors" if found else "no tensor"
            near = names.nearest(name, self.base.tensors, cutoff=0.8)
            hint = f" (the nearest is {near})" if near else ""
            problem = f"`{key}` matches {which} of the base {self.base.label}{hint}"
            remedy = "Name the base that it was trained on as `base_model`. If that is the one, "
            raise self.error(problem, remedy + FOLD[0].lower() + FOLD[1:])
        tensor = self.base.tensors[found[0]]
        if tensor.dtype not in MERGEABLE:
            problem = f"`{key}` changes {tensor.name}, which the base stores as {tensor.dtype}"
            raise self.error(problem, "Use the base in bfloat16, float16 or float32.")
        return tensor


def _changes(file: _AdapterFile, stored: Sequence[TensorHeader]) -> dict[str, Adapted]:
    """The changed tensors of the base by name."""
    modules, saved = _by_module(file, stored)
    _require_saved(file, saved)
    changes: dict[str, Adapted] = {}
    for name, tensor in saved.items():
        twin = _twin(file, name, saved)
        if twin and not file.names.find(name):
            continue  # the base ties its head
        target = file.target(name, tensor.name)
        if target.name in changes:
            raise file.error(f"`{tensor.name}` replaces {target.name} a second time")
        _require_shape(file, target, tensor)
        changes[target.name] = Adapted(target, twin or tensor, None)
    targets = {
        module: file.target(f"{module}.weight", next(iter(parts.values())).name)
        for module, parts in modules.items()
    }
    orders = _orders(file, modules, targets)
    for module, target in targets.items():
        update = _update(file, module, modules[module], target, orders[names.stack(target.name)])
        before = changes.get(target.name)
        if before and before.update:
            raise file.error(f"`{update.a.name}` changes {target.name} a second time")
        changes[target.name] = Adapted(target, before.saved if before else None, update)
    return changes


def _by_module(
    file: _AdapterFile, stored: Sequence[TensorHeader]
) -> tuple[dict[str, dict[str, TensorHeader]], dict[str, TensorHeader]]:
    """The parts of each module's update, and the tensors that replace those of their name."""
    modules: defaultdict[str, dict[str, TensorHeader]] = defaultdict(dict)
    saved: dict[str, TensorHeader] = {}
    for tensor in stored:
        if tensor.dtype not in MERGEABLE:
            problem = f"`{tensor.name}` is {tensor.dtype}, which this version does not read"
            raise file.error(problem, "Save the adapter in bfloat16, float16 or float32.")
        name = tensor.name.removeprefix(PREFIX)
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if not suffix and "lora_" in name:
            raise file.error(f"`{tensor.name}` is not a LoRA tensor that this version knows")
        group = modules[name.removesuffix(suffix)] if suffix else saved
        name = SUFFIXES[suffix] if suffix else name.replace(BASE_LAYER, ".")
        if name in group:
            raise file.error(f"`{group[name].name}` and `{tensor.name}` are the same tensor")
        group[name] = tensor
    return modules, saved


def _require_saved(file: _AdapterFile, saved: Mapping[str, TensorHeader]) -> None:
    stored, of_base = _modules(saved), _modules(file.base.tensors)
    for module in file.config.modules_to_save:
        if module in CLASSIFIERS and not of_base.has_end(module):
            continue
        if not stored.has_end(module):
            problem = f"its configuration says that `{module}` was trained whole (modules_to_save),"
            problem += " but the file does not contain it"
            raise file.error(problem, "Save the adapter again, or use an intact copy.")


def _modules(tensors: Iterable[str]) -> names.TensorNames:
    """The modules that have these tensors, and those that they are parts of."""
    found = {names.module(name) for name in tensors}
    for _ in range(MAX_LEVELS):
        found |= {name.rpartition(".")[0] for name in found}
    return names.TensorNames(found - {""})


def _twin(file: _AdapterFile, name: str, saved: Mapping[str, TensorHeader]) -> TensorHeader | None:
    """The saved embeddings that PEFT kept equal to a saved head; None if it did not."""
    if not (file.config.ensure_weight_tying and names.is_head(name)):
        return None
    tables = (tensor for other, tensor in saved.items() if names.is_token_embedding(other))
    return next((one for one in tables if one.shape == saved[name].shape), None)


def _require_shape(file: _AdapterFile, target: TensorHeader, tensor: TensorHeader) -> None:
    if tensor.shape != target.shape:
        problem = f"`{tensor.name}` has shape {list(tensor.shape)}, {target.name} of the base "
        problem += f"{file.base.label} has {list(target.shape)}"
        remedy = "If only the vocabulary differs, resize the base to the adapter's vocabulary with "
        remedy += "transformers' `model.resize_token_embeddings` and use that as `base_model`."
        raise file.error(problem, remedy)


def _orders(
    file: _AdapterFile,
    modules: Mapping[str, UpdateParts],
    targets: Mapping[str, TensorHeader],
) -> defaultdict[str | None, set[bool]]:
    """Whether weights in a list of blocks are stored as (in, out), which square ones do not show.

    The other weights of the blocks show it: those that the adapter changes, and those of the base
    by their biases. The saved `fan_in_fan_out` does not count: PEFT goes by the classes of modules,
    sets it for each in turn, and so saves that of the last one, such as a head.
    """
    seen = defaultdict[str | None, set[bool]](set)
    for module, parts in modules.items():
        target = targets[module]
        factors = [parts[part] for part in LINEAR if part in parts]
        if _shows_order(target) and [len(one.shape) for one in factors] == [2, 2]:
            a, b = factors
            is_transposed = target.shape == (a.shape[1], b.shape[0])
            seen[names.stack(target.name)].add(is_transposed)
    for weight in filter(_shows_order, file.base.tensors.values()):
        bias = file.base.tensors.get(f"{names.module(weight.name)}.bias")
        if bias and len(bias.shape) == 1 and bias.shape[0] in weight.shape:
            seen[names.stack(weight.name)].add(bias.shape == weight.shape[1:])
    return seen


def _shows_order(weight: TensorHeader) -> bool:
    """Whether a weight is a matrix in a block, and not square."""
    return names.block(weight.name) is not None and len({*weight.shape}) == len(weight.shape) == 2


def _update(
    file: _AdapterFile,
    module: str,
    parts: UpdateParts,
    target: TensorHeader,
    orders: set[bool],
) -> LowRank:
    magnitude = parts.get(MAGNITUDE)
    pair = next((pair for pair in (LINEAR, EMBEDDING) if set(pair) == set(parts) - {MAGNITUDE}), ())
    if not pair or file.config.use_dora != (magnitude is not None):
        expected = f"lora_A, lora_B{f', {MAGNITUDE}' if file.config.use_dora else ''}"
        problem = f"`{module}` has {', '.join(sorted(parts))}, expected {expected}"
        raise file.error(problem, "The file is not what PEFT writes: use an intact copy.")
    a, b = (parts[part] for part in pair)
    if len(target.shape) != 2:
        problem = f"`{a.name}` changes {target.name} of shape {list(target.shape)}, expected a "
        raise file.error(f"{problem}matrix")
    transposed = pair == EMBEDDING or target.shape != (*b.shape[:1], *a.shape[-1:])
    is_square = len(set(target.shape)) == 1
    if is_square and len(orders) > 1:
        problem = f"{target.name} is square, and other weights of its blocks are stored both as "
        raise file.error(f"{problem}(in, out) and as (out, in)")
    if is_square and pair == LINEAR:
        transposed = orders == {True}
    rank = file.config.rank(module)
    n_out, n_in = target.shape[::-1] if transposed else target.shape
    fits = a.shape == (rank, n_in) and b.shape == (n_out, rank)
    if not fits or (magnitude and magnitude.shape != (n_out,)):
        shapes = ", ".join(f"{part} of shape {list(parts[part].shape)}" for part in sorted(parts))
        problem = f"`{module}` has {shapes} for rank {rank}, which do not fit {target.name} "
        problem += f"of shape {list(target.shape)}"
        raise file.error(problem, "Name the base that it was trained on as `base_model`.")
    return LowRank(a, b, file.config.scale(module), transposed, magnitude)
