"""The files beside the weights: configuration, tokenizer, chat template, licence texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lewis_hub.checkpoint.quantised import KEYS

# Weights are merged, not carried; the card is our own; the rest is for tools that made the base.
NOT_CARRIED = frozenset(
    {".gitattributes", "README.md", "model.safetensors.index.json", "mergekit_config.yml"}
    | {"hf_quant_config.json", "pytorch_model.bin.index.json", "converted.json"}
)
NOT_CARRIED_SUFFIXES = frozenset({".safetensors", ".png", ".jpg", ".svg"})


TOKENIZER = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    | {"vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"}
    | {"sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"}
)
TOKENS = frozenset({".tiktoken", ".spm"})
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class TokenizerFiles:
    """How the tokenizer of a merge differs from the base's.

    Attributes:
        folder: of the source whose tokenizer files are carried.
        written: content of files that are written anew.
        dropped: names of files, or of folders, that are not carried.
        config: what is put in `config.json`; None takes a key out of it.
        generation: likewise in `generation_config.json`.
    """

    folder: Path
    written: Mapping[str, str] = field(default_factory=dict)
    dropped: Collection[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)


def write_sidecars(
    base: Path,
    output: Path,
    dtype: str | None,
    *,
    code: bool,
    tokenizer: TokenizerFiles | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Carry over what a merged model needs beside its weights.

    What ``config.json`` says of quantisation is left out: what is merged is plain floats.

    Args:
        base: folder of the source whose configuration and tokenizer the merge carries.
        output: folder to write into.
        dtype: of the merged weights, such as ``bfloat16``; None where each tensor kept its own.
        code: whether the base's ``*.py`` files come along. They are never run here. Without
            them, ``auto_map`` leaves the configuration, which would name files that are not there.
        tokenizer: None where the merge has the base's.
        config: takes the place of the base's own ``config.json``; None: that stays.

    Returns:
        Paths of the written files, relative to `output`, sorted.
    """
    tokenizer = tokenizer or TokenizerFiles(base)
    written = set()
    for relative, source in _sources(base, tokenizer):
        if not _carried(relative, code=code):
            continue
        target = output / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if relative.name.endswith("config.json") and (
            relative.name != "generation_config.json" or tokenizer.generation
        ):
            told = json.loads(source.read_text(encoding="utf-8"))
            if relative == PurePosixPath("config.json"):
                told = _plain(config if config is not None else told)
                told = _with(_with_dtype(told, dtype) if dtype else told, tokenizer.config)
            elif relative == PurePosixPath("generation_config.json"):
                told = _with(told, tokenizer.generation)
            target.write_text(_json(told if code else _without_code(told)), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
        written.add(str(relative))
    for name, text in tokenizer.written.items():
        (output / name).write_text(text, encoding="utf-8")
        written.add(name)
    return tuple(sorted(written))


def _sources(base: Path, tokenizer: TokenizerFiles) -> Iterator[tuple[PurePosixPath, Path]]:
    """What may be carried: the tokenizer's files from its source, the others from the base."""
    for folder in dict.fromkeys((base, tokenizer.folder)):
        for path in sorted(folder.rglob("*")):
            relative = PurePosixPath(path.relative_to(folder))
            wanted = tokenizer.folder if _is_tokenizer(relative) else base
            dropped = relative.parts[0] in tokenizer.dropped or str(relative) in tokenizer.written
            if path.is_file() and folder == wanted and not dropped:
                yield relative, path


def _is_tokenizer(path: PurePosixPath) -> bool:
    if path.parts[0] == TEMPLATES:
        return True
    return len(path.parts) == 1 and (path.name in TOKENIZER or path.suffix in TOKENS)


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


def _with(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Put values where the configuration has their keys, in its text part too, else at the top."""
    inner = config.get("text_config")
    told: dict[str, Any] = dict(config)
    if isinstance(inner, dict):
        told["text_config"] = _with(inner, {k: v for k, v in values.items() if k in inner})
        values = {k: v for k, v in values.items() if k in config or k not in inner}
    told |= values
    return {key: value for key, value in told.items() if value is not None or key not in values}


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
