"""The configuration of a model in a GGUF file, and what llama.cpp cannot express."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lewis_hub.errors import ExportError
from lewis_hub.export.architectures import WITH_CONVERTER, ExportTensor, Rules

if TYPE_CHECKING:
    from gguf import GGUFWriter

Config = Mapping[str, Any]
INTEGERS = (  # method of the writer, key of `config.json`
    ("add_block_count", "num_hidden_layers"),
    ("add_context_length", "max_position_embeddings"),
    ("add_embedding_length", "hidden_size"),
    ("add_feed_forward_length", "intermediate_size"),
    ("add_head_count", "num_attention_heads"),
    ("add_head_count_kv", "num_key_value_heads"),
    ("add_vocab_size", "vocab_size"),
)
MAX_HEAD = 1 << 16
MAX_NUMBER = 3.4e38
UNREADABLE = (  # what a value of another type, or out of all bounds, raises where it is used
    *(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, struct.error),
)
FULL, WINDOW = "full_attention", "sliding_attention"


def complete_config(label: str, config: Config) -> dict[str, Any]:
    """Return a `config.json` with the defaults of transformers for the keys that it leaves out."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    given = {key: value for key, value in config.items() if key != "model_type"}
    try:
        found = AutoConfig.for_model(config["model_type"], **given).to_dict()
        heads, size = found["num_attention_heads"], found["hidden_size"]
        found["head_dim"] = found.get("head_dim") or size // heads
        found["num_key_value_heads"] = found.get("num_key_value_heads") or heads
        if not 0 < found["head_dim"] <= MAX_HEAD:
            raise ValueError(f"its heads have {found['head_dim']} entries")
    except (*UNREADABLE, StrictDataclassError) as error:
        problem = f"transformers cannot read its config.json ({error})"
        raise ExportError(label, problem, "Use an intact copy of the model.") from None
    return dict(found)


def require_expressible(label: str, rules: Rules, config: Config) -> None:
    """Refuse a configuration that llama.cpp would run in another way than transformers.

    Args:
        label: the model, for messages.
        rules: of its architecture.
        config: from `complete_config`.

    Raises:
        ExportError: a value has no equivalent.
    """
    problem = next(filter(None, (check(rules, config) for check in CHECKS)), None)
    if problem:
        where = f"llama.cpp's {rules.name} cannot run it as transformers does: {problem}"
        raise ExportError(label, where, WITH_CONVERTER)


def _activation(rules: Rules, config: Config) -> str | None:
    found = config.get("hidden_activation") or config.get("hidden_act")
    return None if found in rules.activations else f"the activation is {found}"


def _rope(rules: Rules, config: Config) -> str | None:
    rope = rope_of(config)
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    known = {"default", "linear", "yarn", "llama3"}
    if rules.name == "phi3":
        known = {"default", "longrope"}
    elif rules.name != "llama":
        known -= {"llama3"}
    if kind not in known:
        return f"the rope type is {kind}"
    if part != 1.0 and rules.name != "phi3":
        return f"the partial_rotary_factor is {part}"
    return _yarn(rope) if kind == "yarn" else None


def _yarn(rope: Config) -> str | None:
    """Check what llama.cpp fixes for these models, though the format has keys for some of it."""
    growth = 0.1 * math.log(max(finite(rope["factor"]), 1.0))
    found, scales = rope.get("attention_factor"), (rope.get("mscale"), rope.get("mscale_all_dim"))
    if found is None and all(scales):
        found = (growth * finite(scales[0]) + 1) / (growth * finite(scales[1]) + 1)
    if found is not None and not math.isclose(finite(found), growth + 1, rel_tol=1e-3):
        return f"the attention_factor of yarn is {found:.4g}, not {growth + 1:.4g}"
    for key, value in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if rope.get(key) not in (None, value):
            return f"the {key} of yarn is {rope[key]}"
    return None


def _attention(rules: Rules, config: Config) -> str | None:
    """Check what the models with windows fix; the others must have no windows."""
    if rules.window_every is None:
        is_used = config.get("use_sliding_window")
        return "it uses a sliding window" if is_used else None
    pattern = [
        FULL if (i + 1) % rules.window_every == 0 else WINDOW
        for i in range(config["num_hidden_layers"])
    ]
    if config.get("layer_types") not in (None, pattern):
        return f"not every {rules.window_every}. block has full attention"
    scaled_by = config["head_dim"]
    if config["num_hidden_layers"] == rules.blocks_of_largest:
        scaled_by = config["hidden_size"] // config["num_attention_heads"]
    if config["query_pre_attn_scalar"] != scaled_by:
        return f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}, not {scaled_by}"
    return None


def _soft_caps(rules: Rules, config: Config) -> str | None:
    attention, final = (config.get(f"{n}_logit_softcapping") for n in ("attn", "final"))
    if rules.name == "gemma2" and not (attention and final):
        return "attn_logit_softcapping or final_logit_softcapping is off"
    if rules.name == "gemma3" and attention:
        return "attn_logit_softcapping is on"
    return None


CHECKS = (_activation, _rope, _attention, _soft_caps)


def rope_of(config: Config) -> Config:
    """Return the settings of the rotary embedding, those of blocks that see all tokens."""
    rope = config.get("rope_parameters") or {}
    return rope.get(FULL) or rope


def finite(value: Any) -> float:
    """Return a number of a configuration, which Python also reads from `NaN` and `Infinity`.

    Raises:
        ValueError: it is none of float32.
    """
    number = float(value)
    if not abs(number) <= MAX_NUMBER:
        raise ValueError(f"{number} is no finite number of float32")
    return number


def add_hyperparameters(writer: GGUFWriter, rules: Rules, config: Config) -> None:
    """Write a configuration; `config` is from `complete_config`."""
    for add, key in INTEGERS:
        getattr(writer, add)(int(config[key]))
    writer.add_layer_norm_rms_eps(finite(config["rms_norm_eps"]))
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    rope = rope_of(config)
    if rules.name in ("llama", "phi3"):
        part = rope.get("partial_rotary_factor") or 1.0
        writer.add_rope_dimension_count(int(part * config["head_dim"]))
    _add_rope(writer, rules, config, rope)
    if rules.window_every:
        writer.add_sliding_window(int(config["sliding_window"]))
        in_windows = (config.get("rope_parameters") or {}).get(WINDOW) or {}
        if theta := in_windows.get("rope_theta"):
            writer.add_rope_freq_base_swa(finite(theta))
    elif rules.name == "phi3":
        writer.add_sliding_window(int(config.get("sliding_window") or 0))
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(finite(config["attn_logit_softcapping"]))
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(finite(config["final_logit_softcapping"]))


def _add_rope(writer: GGUFWriter, rules: Rules, config: Config, rope: Config) -> None:
    import gguf

    writer.add_rope_freq_base(finite(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(finite(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(_original_length(config, rope))
    if rules.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(_original_length(config, rope))
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(_longrope_scale(config, rope))


def _original_length(config: Config, rope: Config) -> int:
    length = rope.get("original_max_position_embeddings")
    length = length or config.get("original_max_position_embeddings")
    return int(length or config["max_position_embeddings"])


def _longrope_scale(config: Config, rope: Config) -> float:
    """Return the factor of cos and sin, as LongRoPE (arXiv 2402.13753) defines it."""
    if rope.get("attention_factor") is not None:
        return finite(rope["attention_factor"])
    original = _original_length(config, rope)
    factor = config["max_position_embeddings"] / original
    return finite(math.sqrt(1 + math.log(factor) / math.log(original))) if factor > 1 else 1.0


def rope_tensors(config: Config) -> tuple[ExportTensor, ...]:
    """Return the factors that divide each frequency, for llama3 and longrope; empty for others."""
    rope = rope_of(config)
    if rope.get("rope_type") == "longrope":
        return tuple(
            ExportTensor(f"rope_factors_{name}.weight", None, tuple(map(finite, rope[key])))
            for name, key in (("long", "long_factor"), ("short", "short_factor"))
        )
    if rope.get("rope_type") == "llama3":
        return (ExportTensor("rope_freqs.weight", None, _llama3_factors(config, rope)),)
    return ()


def _llama3_factors(config: Config, rope: Config) -> tuple[float, ...]:
    """The factor for long waves, 1 for short ones, and in between what interpolates 1/factor."""
    factor, theta, size = finite(rope["factor"]), finite(rope["rope_theta"]), config["head_dim"]
    low, high = finite(rope["low_freq_factor"]), finite(rope["high_freq_factor"])
    original = _original_length(config, rope)
    found = []
    for i in range(0, size, 2):
        turns = original / (2 * math.pi * theta ** (i / size))  # in the original context
        share = min(max((turns - low) / (high - low), 0.0), 1.0)  # of the frequency that stays
        found.append(1 / ((1 - share) / factor + share))
    return tuple(map(finite, found))
