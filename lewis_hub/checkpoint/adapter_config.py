"""What a LoRA adapter's `adapter_config.json` says, as PEFT means it. Files may be hostile.

What changes the weights in a way that is not computed here is refused by name, and so is what a
later PEFT may add: an adapter that is read only in part would be another model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

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
