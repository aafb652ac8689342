"""What a model's configuration says about its quantisation, and whether that can be read here.

8-bit floats (F8_E4M3) with a scale for each block, row or tensor are read: those that DeepSeek,
Qwen and Mistral publish, and what AutoFP8, FBGEMM, ModelOpt and compressed-tensors write of the
kind. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lewis_hub.checkpoint.eight_bit import BLOCK
from lewis_hub.checkpoint.header import COPIED
from lewis_hub.checkpoint.reader import Checkpoint

KEYS = ("quantization_config", "compression_config")  # in config.json; the second is the older
FP8_FORMATS = {"float-quantized", "naive-quantized"}  # of compressed-tensors
PLAIN_FP8 = {"fp8", "fbgemm_fp8"}  # methods whose every quantised tensor is of the kind
ENDINGS = {  # of tensors that only a quantised model has -> who writes them
    ".qweight": "GPTQ and AWQ",
    ".qzeros": "GPTQ and AWQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors",
    ".weight_scale_2": "ModelOpt",
    ".pre_quant_scale": "ModelOpt",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    "._data": "quanto",
    "_qdata": "torchao",
    "_blocks": "gpt-oss (MXFP4)",
}


@dataclass(frozen=True)
class Quantisation:
    """How a model was quantised.

    Attributes:
        method: as its configuration calls it.
        is_read: whether its 8-bit floats can be read here.
        block: rows and columns that share a scale, where a scale is for neither row nor tensor.
    """

    method: str
    is_read: bool
    block: tuple[int, int] = BLOCK


def read_quantisation(
    config: Mapping[str, Any], beside: Mapping[str, Any] | None = None
) -> Quantisation | None:
    """What a configuration says; None where it says nothing of quantisation.

    Args:
        config: the content of ``config.json``.
        beside: that of ``hf_quant_config.json``, where ModelOpt says it.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    told = next((part[key] for part in parts for key in KEYS if part.get(key)), None)
    if told is None and beside:
        told = {"quant_method": "modelopt", **_mapping(beside.get("quantization"))}
    if told is None:
        return None
    told = _mapping(told)
    method = str(told.get("quant_method") or "unknown")
    block = told.get("weight_block_size") or next(_blocks(told), None) or BLOCK
    if not _is_block(block):
        return Quantisation(f"{method}, blocks of {block}", is_read=False)
    return Quantisation(method, _is_read(method, told), (block[0], block[1]))


def signs(checkpoint: Checkpoint) -> str | None:
    """A tensor that shows quantisation where the configuration is silent; None: there is none."""
    for name, tensor in checkpoint.tensors.items():
        writer = next((who for ending, who in ENDINGS.items() if name.endswith(ending)), None)
        if writer:
            return f"{name}, as in {writer}"
        is_matrix = name.endswith(".weight") and len(tensor.shape) > 1
        if is_matrix and tensor.dtype in COPIED:
            return f"{name} as {tensor.dtype}"
    return None


def _is_read(method: str, told: Mapping[str, Any]) -> bool:
    if method == "modelopt":
        return told.get("quant_algo") == "FP8"
    if method == "compressed-tensors":
        return _is_scaled_fp8(told)
    return method in PLAIN_FP8 and told.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")


def _is_scaled_fp8(told: Mapping[str, Any]) -> bool:
    """Whether every group of compressed-tensors has 8-bit floats, and nothing else was done."""
    groups = [_mapping(group) for group in _mapping(told.get("config_groups")).values()]
    weights = [_mapping(group["weights"]) for group in groups if group.get("weights")]
    formats = {group.get("format") or told.get("format") for group in groups}
    sparsity = _mapping(told.get("sparsity_config")).get("format", "dense")
    rotated = _mapping(told.get("transform_config")).get("config_groups")
    return (
        bool(weights)
        and formats <= FP8_FORMATS
        and sparsity == "dense"
        and not rotated
        and all(one.get("num_bits") == 8 and one.get("type") == "float" for one in weights)
    )


def _blocks(told: Mapping[str, Any]) -> Iterator[Any]:
    for group in _mapping(told.get("config_groups")).values():
        block = _mapping(_mapping(group).get("weights")).get("block_structure")
        if block:
            yield block


def _is_block(found: Any) -> bool:
    pair = isinstance(found, (list, tuple)) and len(found) == 2
    return pair and all(type(n) is int and n > 0 for n in found)


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, dict) else {}
