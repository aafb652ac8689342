"""How a model was quantised, as its configuration describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from lewis_hub.checkpoint.header import Layout

KEYS = ("quantization_config", "compression_config")  # in config.json; the second is older
FP8_METHODS = {"fp8", "fbgemm_fp8"}
UNPACKED_FORMATS = ("naive-quantized", "int-quantized", "float-quantized")  # compressed-tensors
PACKED_FORMAT = "pack-quantized"  # compressed-tensors
PACKED_BITS = (4, 8)  # codes of other widths cross the borders of words
GPTQ_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # checkpoint format -> subtracted from its zeros
FP8_BLOCK = (128, 128)  # rows and columns that share a scale, unless a configuration names others


@dataclass(frozen=True)
class Quantisation:
    """How a model was quantised."""

    method: str  # as its configuration names it
    is_read: bool  # whether this version reads its weights
    block: tuple[int, int] = FP8_BLOCK  # that shares a scale, if not a row, group or tensor does
    integers: bool = False  # whether integers with scales are weights, as in compressed-tensors
    n_packed_bits: int | None = None  # of codes in 32-bit words; None if there are none
    layout: Layout | None = None  # of matrices that are stored by columns; None if there are none
    offset: int = 0  # was subtracted from each zero before it was stored


def read_quantisation(
    config: Mapping[str, Any], modelopt: Mapping[str, Any] | None = None
) -> Quantisation | None:
    """Read the quantisation from the content of `config.json`; None if it names none.

    `modelopt` is the content of `hf_quant_config.json`, a file of ModelOpt.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    settings = next((part[key] for part in parts for key in KEYS if part.get(key)), None)
    if settings is None and modelopt:
        settings = {"quant_method": "modelopt", **_mapping(modelopt.get("quantization"))}
    if settings is None:
        return None
    settings = _mapping(settings)
    method = str(settings.get("quant_method") or "unknown")
    blocks = (weights.get("block_structure") for _, weights in _groups(settings))
    block = settings.get("weight_block_size") or next(filter(None, blocks), FP8_BLOCK)
    if not _is_block(block):
        return Quantisation(f"{method}, blocks of {block}", is_read=False)
    if method in METHODS:
        return METHODS[method](settings)
    if method == "compressed-tensors":
        return _compressed_tensors(settings, (block[0], block[1]))
    return Quantisation(method, _is_fp8(method, settings), (block[0], block[1]))


def _is_fp8(method: str, settings: Mapping[str, Any]) -> bool:
    if method == "modelopt":
        return settings.get("quant_algo") == "FP8"
    return method in FP8_METHODS and settings.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")


def _gptq(settings: Mapping[str, Any]) -> Quantisation:
    form = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    is_marlin, words = settings.get("is_marlin_format"), settings.get("pack_dtype", "int32")
    if form not in GPTQ_OFFSETS or is_marlin or words != "int32":
        form = "marlin" if is_marlin else form
        return Quantisation(f"gptq, {form} in {words}", is_read=False)
    n_bits = settings.get("bits")
    if not _are_packed(n_bits):
        return Quantisation(f"gptq, {n_bits} bits", is_read=False)
    offset = GPTQ_OFFSETS[form]
    return Quantisation("gptq", is_read=True, n_packed_bits=n_bits, layout="GPTQ", offset=offset)


def _awq(settings: Mapping[str, Any]) -> Quantisation:
    form = str(settings.get("version") or settings.get("format") or "gemm").lower()
    n_bits = settings.get("bits", settings.get("w_bit"))
    if form != "gemm" or n_bits != 4:
        return Quantisation(f"awq, {form} of {n_bits} bits", is_read=False)
    return Quantisation("awq", is_read=True, n_packed_bits=4, layout="AWQ")


METHODS: Mapping[str, Callable[[Mapping[str, Any]], Quantisation]] = {
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": lambda _: Quantisation("mxfp4", is_read=True, n_packed_bits=4, layout="MXFP4"),
    "bitsandbytes": lambda _: Quantisation("bitsandbytes", is_read=True),
}


def _compressed_tensors(settings: Mapping[str, Any], block: tuple[int, int]) -> Quantisation:
    """Read only if every group of tensors is, and nothing else was done to the weights."""
    weights = [
        (group.get("format") or settings.get("format"), how) for group, how in _groups(settings)
    ]
    packed = [how.get("num_bits") for form, how in weights if form == PACKED_FORMAT]
    sparsity = _mapping(settings.get("sparsity_config")).get("format", "dense")
    transforms = _mapping(settings.get("transform_config")).get("config_groups")
    is_plain = bool(weights) and sparsity == "dense" and not transforms
    is_plain = is_plain and packed == packed[:1] * len(packed)
    if not is_plain or not all(_is_read_format(form, how) for form, how in weights):
        forms = sorted({str(form) for form, _ in weights} or {str(settings.get("format"))})
        return Quantisation(f"compressed-tensors, {' and '.join(forms)}", is_read=False)
    return Quantisation(
        "compressed-tensors",
        is_read=True,
        block=block,
        integers=any(how.get("type", "int") == "int" for _, how in weights),
        n_packed_bits=next(iter(packed), None),
    )


def _are_packed(n_bits: object) -> TypeGuard[int]:
    return type(n_bits) is int and n_bits in PACKED_BITS


def _is_read_format(form: object, weights: Mapping[str, Any]) -> bool:
    n_bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if form == PACKED_FORMAT:
        return kind == "int" and _are_packed(n_bits)
    return form in UNPACKED_FORMATS and n_bits == 8 and kind in ("int", "float")


def _groups(settings: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The groups of quantised tensors, each with the settings of its weights."""
    for group in map(_mapping, _mapping(settings.get("config_groups")).values()):
        if group.get("weights"):
            yield group, _mapping(group["weights"])


def _is_block(value: object) -> TypeGuard[Sequence[int]]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(type(n) is int and n > 0 for n in value)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
