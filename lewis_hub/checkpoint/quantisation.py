"""What a model's configuration says about its quantisation, and whether that can be read here.

8-bit floats (F8_E4M3) with a scale for each block, row or tensor are read: those that DeepSeek,
Qwen and Mistral publish, and what AutoFP8, FBGEMM, ModelOpt and compressed-tensors write of the
kind; compressed-tensors' integers of 8 bits, or packed ones of 4 and 8; what bitsandbytes writes;
GPTQ of 4 and 8 bits, AWQ's gemm, and gpt-oss' MXFP4. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lewis_hub.checkpoint.codes import Layout
from lewis_hub.checkpoint.eight_bit import BLOCK
from lewis_hub.checkpoint.header import COPIED
from lewis_hub.checkpoint.reader import Checkpoint

KEYS = ("quantization_config", "compression_config")  # in config.json; the second is the older
LOOSE = {"naive-quantized", "int-quantized", "float-quantized"}  # formats of compressed-tensors
PACKED = "pack-quantized"
PACKED_BITS = {4, 8}  # others lie across words, and in older files otherwise
SELF_TELLING = "bitsandbytes"  # its tensors say how they were quantised
GPTQ_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # its formats -> what zeros are stored less
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
        is_read: whether its weights can be read here.
        block: rows and columns that share a scale, where a scale is for none of row, group and
            tensor.
        integers: whether integers with scales are weights, as in compressed-tensors.
        n_packed_bits: of integers that lie in words of 32 bits; None: none do.
        layout: of matrices that are stored by columns; None: none are.
        offset: of zeros, which are stored less this.
    """

    method: str
    is_read: bool
    block: tuple[int, int] = BLOCK
    integers: bool = False
    n_packed_bits: int | None = None
    layout: Layout | None = None
    offset: int = 0


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
    if method == "compressed-tensors":
        return _compressed(method, told, (block[0], block[1]))
    if method in BY_COLUMNS:
        return BY_COLUMNS[method](method, told)
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
    if method == SELF_TELLING:
        return True
    return method in PLAIN_FP8 and told.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")


def _gptq(method: str, told: Mapping[str, Any]) -> Quantisation:
    form = str(told.get("checkpoint_format") or told.get("format") or "gptq").lower()
    is_own = form not in GPTQ_OFFSETS or told.get("is_marlin_format")
    if is_own or told.get("pack_dtype", "int32") != "int32":
        form = "marlin" if told.get("is_marlin_format") else form
        return Quantisation(f"{method}, {form} in {told.get('pack_dtype', 'int32')}", is_read=False)
    n_bits = told.get("bits")
    if n_bits not in PACKED_BITS:
        return Quantisation(f"{method}, {n_bits} bits", is_read=False)
    offset = GPTQ_OFFSETS[form]
    return Quantisation(method, is_read=True, n_packed_bits=n_bits, layout="GPTQ", offset=offset)


def _awq(method: str, told: Mapping[str, Any]) -> Quantisation:
    form = str(told.get("version") or told.get("format") or "gemm").lower()
    n_bits = told.get("bits", told.get("w_bit"))
    if form != "gemm" or n_bits != 4:
        return Quantisation(f"{method}, {form} of {n_bits} bits", is_read=False)
    return Quantisation(method, is_read=True, n_packed_bits=4, layout="AWQ")


def _mxfp4(method: str, _: Mapping[str, Any]) -> Quantisation:
    return Quantisation(method, is_read=True, n_packed_bits=4, layout="MXFP4")


BY_COLUMNS = {"gptq": _gptq, "awq": _awq, "mxfp4": _mxfp4}


def _compressed(method: str, told: Mapping[str, Any], block: tuple[int, int]) -> Quantisation:
    """Read only where every group of tensors can be, and nothing else was done to them."""
    groups = [_mapping(group) for group in _mapping(told.get("config_groups")).values()]
    weights = [
        (group.get("format") or told.get("format"), _mapping(group["weights"]))
        for group in groups
        if group.get("weights")
    ]
    packed = {one.get("num_bits") for form, one in weights if form == PACKED}
    sparsity = _mapping(told.get("sparsity_config")).get("format", "dense")
    rotated = _mapping(told.get("transform_config")).get("config_groups")
    is_plain = bool(weights) and sparsity == "dense" and not rotated and len(packed) < 2
    if not is_plain or not all(_is_code(form, one) for form, one in weights):
        forms = sorted({str(form) for form, _ in weights} or {str(told.get("format"))})
        return Quantisation(f"{method}, {' and '.join(forms)}", is_read=False)
    integers = any(one.get("type", "int") == "int" for _, one in weights)
    n_bits = next(iter(packed), None)
    return Quantisation(method, is_read=True, block=block, integers=integers, n_packed_bits=n_bits)


def _is_code(form: Any, weights: Mapping[str, Any]) -> bool:
    """Whether weights of a format of compressed-tensors are read."""
    n_bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if form == PACKED:
        return kind == "int" and n_bits in PACKED_BITS
    return form in LOOSE and n_bits == 8 and kind in ("int", "float")


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
