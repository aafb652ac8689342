"""The numbers of a `config.json` that transformers builds modules for, before it opens weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lewis_hub.errors import SourceError

MAX_LAYERS = 1000
FEW_LAYERS = 100  # which take no second to build
MAX_EXPERTS = 100_000
MAX_VALUES = 300_000  # of the whole document, which transformers copies many times
MAX_KEYS = 20_000  # of each of which transformers makes an attribute, for each model several times
NO_ATTRIBUTES = frozenset({"id2label", "label2id", "quantization_config"})  # large in some models
MAX_LABELS = 1_000_000
MAX_REPEATS = 100  # of a part of a model; of published ones 20
MAX_CHUNK, MAX_WINDOW = 1024, 8192  # of tokens, to multiples of which texts are padded
MAX_POSITIONS, MAX_HEADS = 200_000, 1000  # of MPT, which makes a number for each of both
LIMITS = {  # keys, in the words of all architectures -> their limit
    re.compile(r"(?:.*_)?(?:layers?|blocks?|depth)"): MAX_LAYERS,
    re.compile(r"num_hidden_groups|inner_group_num|num_feedforward_networks"): MAX_LAYERS,
    re.compile(r"(?:.*_)?experts"): MAX_EXPERTS,
    re.compile(r"num_labels"): MAX_LABELS,
    re.compile(
        r"block_repeats|[HL]_cycles|(?:.*_)?sinkhorn_iters|(?:.*_)?recurrent_loops|num_hashes"
        r"|loop_num_passes|pretraining_tp"
    ): MAX_REPEATS,
    re.compile(r"(?:mamba_|ssm_)?chunk_size|(?:lsh|local)_attn_chunk_length"): MAX_CHUNK,
    re.compile(r"attention_window"): MAX_WINDOW,
    re.compile(r"max_seq_len"): MAX_POSITIONS,
    re.compile(r"n_heads|num_attention_heads"): MAX_HEADS,
}
COUNTED = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # of the model itself
ELSEWHERE = {  # keys that lead out of `config.json` -> what is in a value that does, and where to
    re.compile(r"_?(?:attn|experts)_implementation(?:_internal)?"): ("/", "code of the Hub"),
    re.compile(r"architecture|backbone"): (r"^[\w-]+:", "a model elsewhere"),  # of timm
    re.compile(r"checkpoint_path"): ("", "a file"),  # which timm opens
    re.compile(r"audio_tokenizer_name_or_path|class_info_file|repo_path"): ("", "files elsewhere"),
    re.compile(r"speculators_config"): ("name_or_path", "another model"),  # that vLLM runs instead
    re.compile(r"transformers_weights"): ("", "other weights"),
    re.compile(r"configuration_files"): ("", "another configuration"),
    re.compile(r"attribute_map"): ("", "other keys for its values"),
}
WITHOUT = "Remove it in a copy of the model: only its own values and weights are used."
DAMAGED = "The file is damaged: use an intact copy of the model."


def require_buildable(where: str, config: Mapping[str, Any], n_tensors: int | None = None) -> None:
    """Refuse a configuration of which a model could not be built in a reasonable time, or safely.

    `n_tensors` are those of the checkpoint, if they are known: each layer has some.

    Raises:
        SourceError: a number is above its limit, or transformers would read other values than
            these, files elsewhere, or code of the Hub, such as a kernel; it names `where`.
    """
    if _n_values(config) > MAX_VALUES:
        problem = f"its config.json has more than {MAX_VALUES:,} values"
        raise SourceError(where, problem, DAMAGED)
    if _n_keys(config) > MAX_KEYS:
        problem = f"its config.json has more than {MAX_KEYS:,} keys"
        raise SourceError(where, problem, DAMAGED)
    for key, value in _values(config):
        for pattern, (sign, what) in ELSEWHERE.items():
            if value and pattern.fullmatch(key) and re.search(sign, str(value)):
                problem = f"`{key}` of its config.json names {what}, {str(value)[:100]}"
                raise SourceError(where, problem, WITHOUT)
        limit = next((n for pattern, n in LIMITS.items() if pattern.fullmatch(key)), None)
        numbers = value if isinstance(value, list) else [value]
        largest = max((one for one in numbers if isinstance(one, int | float)), default=0)
        if limit is not None and largest > limit:
            problem = f"`{key}` of its config.json is above the limit of {limit:,}"
            raise SourceError(where, problem, DAMAGED)
    if n_tensors is None:
        return
    for key in (key for key in COUNTED if isinstance(config.get(key), int | float)):
        if config[key] > max(n_tensors, FEW_LAYERS):
            problem = f"`{key}` of its config.json is {config[key]}, but it has {n_tensors} tensors"
            raise SourceError(where, problem, DAMAGED)


def _n_values(value: Any) -> int:
    if isinstance(value, Mapping):
        return 1 + sum(map(_n_values, value.values()))
    return 1 + sum(map(_n_values, value)) if isinstance(value, list) else 1


def _n_keys(value: Any) -> int:
    if isinstance(value, Mapping):
        inner = (one for key, one in value.items() if key not in NO_ATTRIBUTES)
        return len(value) + sum(map(_n_keys, inner))
    return sum(map(_n_keys, value)) if isinstance(value, list) else 0


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _values(value)
