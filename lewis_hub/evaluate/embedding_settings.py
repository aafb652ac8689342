"""What `sentence_bert_config.json` of an embedding model may say, as published models do.

sentence-transformers hands most of it on to transformers, by any name: padding to any length, the
sizes of a model, kernels of the Hub, a method of the model that writes texts for ever. So it is a
list of what is allowed, not of what is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lewis_hub.checkpoint.configuration import require_buildable
from lewis_hub.documents import texts_in
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.embedding_files import ModelFiles
from lewis_hub.text_growth import MAX_MULTIPLE, require_modest_padding

FILE = re.compile(r"(?:.*/)?sentence_[^/]*config\.json")
MAX_PADDED = 1024  # tokens to which all texts are made as long; SigLIP's: 64
MAX_PIXELS = 1 << 24  # of a picture; Qwen's processors take 13 million
MAX_SAMPLES = 192_000  # of sound, per second
# a file -> its setting with a model that is loaded instead
ELSEWHERE = {"adapter_config.json": "base_model_name_or_path"}
ACTIVATIONS = ("activation_fn", "activation_function", "sbert_ce_default_activation_function")
OTHER = "Only the files of the model are used: use another one."
REMEDY = "Remove it in a copy of the model: it is loaded and run by its own files and sizes only."


@dataclass(frozen=True)
class _Rule:
    """What a setting may be; `inner`: those in it, if it is a mapping."""

    expected: str
    fits: Callable[[Any], bool]
    inner: Mapping[str, _Rule] | None = None


def _one_of(*values: str) -> _Rule:
    return _Rule(" or ".join(values), lambda value: value in values)


def _at_most(limit: int) -> _Rule:
    return _Rule(f"a whole number from 0 to {limit:,}", lambda value: _is_number(value, limit))


def _mapping(**inner: _Rule) -> _Rule:
    return _Rule(f"a mapping of {_list(inner)}", lambda value: isinstance(value, dict), inner)


def _list(names: Mapping[str, object]) -> str:
    return ", ".join(names)


def _is_number(value: object, limit: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _is_output(value: object) -> bool:
    """Names and places of what a model returns, such as `["hidden_states", -1]`."""
    parts = value if isinstance(value, list) else [value]
    return len(parts) < 10 and all(
        isinstance(part, int) or (isinstance(part, str) and NAME.fullmatch(part)) for part in parts
    )


NAME = re.compile(r"[a-zA-Z]\w{0,100}", re.ASCII)
METHOD = re.compile(r"forward|get_[a-z]+_features")  # `generate` may write for ever
MODALITIES = re.compile(r"(?:text|image|audio|video|message)(?:\+(?:text|image|audio|video))*")
FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
LENGTH = _Rule("a whole number", _is_number)  # at which texts are cut
SIDE = _one_of("left", "right")
SHORTER = ("longest", "do_not_pad")
CUT = ("longest_first", "only_first", "only_second", "do_not_truncate")
TEXT = {
    "padding": _Rule(
        "true, false, longest or max_length",
        lambda value: isinstance(value, bool) or value in (*SHORTER, "max_length"),
    ),
    "max_length": LENGTH,
    "pad_to_multiple_of": _at_most(MAX_MULTIPLE),
    "truncation": _Rule(
        f"true, false or {', '.join(CUT)}", lambda value: isinstance(value, bool) or value in CUT
    ),
    "padding_side": SIDE,
    "logits_to_keep": _at_most(1),
    "add_special_tokens": FLAG,
    "return_attention_mask": FLAG,
    "return_token_type_ids": FLAG,
}
PIXELS = {"min_pixels": _at_most(MAX_PIXELS), "max_pixels": _at_most(MAX_PIXELS)}
RETURNED = _mapping(return_tensors=_one_of("pt"), return_mm_token_type_ids=FLAG)
CALLED = _mapping(
    common=RETURNED,
    text=_mapping(**TEXT),
    image=_mapping(**PIXELS),
    video=_mapping(**PIXELS, fps=_at_most(60), num_frames=_at_most(1000)),
    audio=_mapping(sampling_rate=_at_most(MAX_SAMPLES), padding=FLAG, truncation=FLAG),
    chat_template=_mapping(
        add_generation_prompt=FLAG,
        continue_final_message=FLAG,
        restore_suffix=FLAG,
        enable_thinking=FLAG,
        add_vision_id=FLAG,
    ),
)
DTYPE = _one_of("auto", "float32", "float16", "bfloat16", "torch.float16", "torch.bfloat16")
ATTENTION = _one_of("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
FLAGS = {  # of the model's own architecture: they change no size
    name: FLAG
    for name in (
        *("trust_remote_code", "use_cache", "is_causal", "is_decoder", "output_hidden_states"),
        *("use_bidirectional_attention", "unpad_inputs", "use_memory_efficient_attention"),
    )
}
MODEL = _mapping(
    dtype=DTYPE,
    torch_dtype=DTYPE,
    attn_implementation=ATTENTION,
    use_safetensors=FLAG,
    low_cpu_mem_usage=FLAG,
    add_pooling_layer=FLAG,
    **FLAGS,
)
PROCESSOR = _mapping(
    model_max_length=LENGTH,
    padding_side=SIDE,
    truncation_side=SIDE,
    **PIXELS,
    **{
        name: FLAG
        for name in (
            *("trust_remote_code", "use_fast", "do_lower_case", "legacy", "add_prefix_space"),
            *("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"),
            *("fix_mistral_regex", "strip_accents", "tokenize_chinese_chars"),
        )
    },
)
CONFIG = _mapping(dtype=DTYPE, torch_dtype=DTYPE, attn_implementation=ATTENTION, **FLAGS)
MODALITY = _mapping(
    method=_Rule("forward or get_..._features", lambda value: _is_match(METHOD, value)),
    method_output_name=_Rule("names of outputs", _is_output),
    format=_one_of("structured", "flat", "auto"),
)
SETTINGS = _mapping(
    max_seq_length=LENGTH,
    do_lower_case=FLAG,
    transformer_task=_one_of(
        *("feature-extraction", "sequence-classification", "text-generation", "fill-mask"),
        "any-to-any",
    ),
    modality_config=_Rule(
        "a mapping of modalities, such as text or image+text",
        lambda value: isinstance(value, dict) and all(_is_match(MODALITIES, one) for one in value),
    ),
    module_output_name=_Rule("the name of an output", lambda value: _is_match(NAME, value)),
    processing_kwargs=CALLED,
    unpad_inputs=FLAG,
    query_length=LENGTH,
    document_length=LENGTH,
    query_expansion=_mapping(
        strategy=_one_of("fixed", "min"),
        attend=FLAG,
        token=_Rule("a token", lambda value: isinstance(value, str) and len(value) < 100),
        length=_at_most(MAX_PADDED),
    ),
    tokenizer_name_or_path=_Rule("null", lambda _: False),
    model_args=MODEL,
    model_kwargs=MODEL,
    tokenizer_args=PROCESSOR,
    processor_kwargs=PROCESSOR,
    config_args=CONFIG,
    config_kwargs=CONFIG,
)


def _is_match(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def require_own_settings(files: ModelFiles) -> None:
    """Refuse settings by which more than this model is loaded, or more is built or run.

    Raises:
        EvaluationError: a file has such a setting.
        TokenizerError: a tokenizer pads texts to a great length.
        SourceError: transformers could not build a model in a reasonable time, or safely.
    """
    for path in files.configurations():
        found = files.document(path)
        named = [text for key in ACTIVATIONS for text in texts_in(found.get(key))]
        inner = found.get("sentence_transformers")
        named += texts_in(inner.get("activation_fn")) if isinstance(inner, Mapping) else ()
        # sentence-transformers calls what is in torch; it ignores other names
        wrong = [text for text in named if text.startswith("torch.") and text[:9] != "torch.nn."]
        wrong += texts_in(found.get(ELSEWHERE.get(PurePosixPath(path).name, "")))
        if wrong:
            problem = f"its {path} names `{wrong[0][:100]}`, which is not in its folder"
            raise EvaluationError(files.where, problem, OTHER)
        if FILE.fullmatch(path):
            require_known_settings(files.where, path, found)
        if PurePosixPath(path).name == "tokenizer_config.json":
            require_modest_padding(f"{files.where}: {path}", found)
        require_buildable(str(Path(files.where, path).parent), found)


def require_known_settings(where: str, name: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that published models do not have, or that make every text very long.

    A setting that is null is none.

    Args:
        where: the model, for messages.
        name: of the file, in the model.
        settings: its content.

    Raises:
        EvaluationError: it has such a setting.
    """
    place = f"{where}: {name}"
    _require(place, "", settings, SETTINGS)
    for key, value in (settings.get("modality_config") or {}).items():
        _require(place, f"modality_config.{key}", value, MODALITY)
    text = (settings.get("processing_kwargs") or {}).get("text") or {}
    if text.get("padding") == "max_length":  # without it, a text is only cut
        key, length = "processing_kwargs.text.max_length", _at_most(MAX_PADDED)
        if not length.fits(text.get("max_length")):
            raise _refused(place, key, text.get("max_length"), length.expected)


def _require(place: str, name: str, value: object, rule: _Rule) -> None:
    if value is None:
        return
    if not rule.fits(value):
        raise _refused(place, name, value, rule.expected)
    if rule.inner is None or not isinstance(value, Mapping):
        return
    for key, one in value.items():
        full = f"{name}.{key}" if name else str(key)
        if key not in rule.inner and one is not None:
            raise _refused(place, full, one, f"only {_list(rule.inner)}")
        _require(place, full, one, rule.inner.get(key, rule))


def _refused(place: str, name: str, value: object, expected: str) -> EvaluationError:
    found = json.dumps(value)
    shown = found if len(found) <= 100 else f"{found[:100]}..."
    problem = f"`{name[:100]}` is {shown}, expected {expected}"
    return EvaluationError(place, problem, REMEDY)
