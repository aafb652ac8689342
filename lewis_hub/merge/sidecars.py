"""The files beside the weights: configuration, tokenizer, chat template, licence texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lewis_hub.checkpoint.quantisation import KEYS

# Weights are merged, not carried; the card is our own; the rest is for tools that made the base.
NOT_CARRIED = frozenset(
    {".gitattributes", "README.md", "model.safetensors.index.json", "mergekit_config.yml"}
    | {"hf_quant_config.json", "pytorch_model.bin.index.json", "converted.json"}
)
NOT_CARRIED_SUFFIXES = frozenset({".safetensors", ".png", ".jpg", ".svg"})


def write_sidecars(base: Path, output: Path, dtype: str | None, *, code: bool) -> tuple[str, ...]:
    """Carry over what a merged model needs beside its weights.

    What ``config.json`` says of quantisation is left out: what is merged is plain floats.

    Args:
        base: folder of the source whose configuration and tokenizer the merge carries.
        output: folder to write into.
        dtype: of the merged weights, such as ``bfloat16``; None where each tensor kept its own.
        code: whether the base's ``*.py`` files come along. They are never run here. Without
            them, ``auto_map`` leaves the configuration, which would name files that are not there.

    Returns:
        Paths of the written files, relative to `output`, sorted.
    """
    written = []
    for source in sorted(base.rglob("*")):
        relative = PurePosixPath(source.relative_to(base))
        if not source.is_file() or not _carried(relative, code=code):
            continue
        target = output / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if relative.name.endswith("config.json") and relative.name != "generation_config.json":
            config = json.loads(source.read_text(encoding="utf-8"))
            config = config if code else _without_code(config)
            if relative == PurePosixPath("config.json"):
                config = _plain(config)
                config = _with_dtype(config, dtype) if dtype else config
            target.write_text(_json(config), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
        written.append(str(relative))
    return tuple(written)


def _carried(path: PurePosixPath, *, code: bool) -> bool:
    if any(part.startswith(".") or part == "lewis" for part in path.parts):
        return False
    if path.name in NOT_CARRIED or path.suffix in NOT_CARRIED_SUFFIXES:
        return False
    return code or path.suffix != ".py"


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Say the dtype wherever the configuration says one, parts of multi-part models included."""
    told = {
        key: _with_dtype(value, dtype)
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value)
        else value
        for key, value in config.items()
    }
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return told | dict.fromkeys(keys, dtype)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says nothing of quantisation: merged weights are plain floats."""
    return {
        key: _plain(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in KEYS
    }


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "auto_map"}


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
