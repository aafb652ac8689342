"""The files beside the weights: configuration, tokenizer, chat template, licence texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lewis_hub.checkpoint.quantised import KEYS

# Weights are merged, the card is written anew, and the rest is for tools that made the base.
NOT_COPIED = frozenset(
    {".gitattributes", "README.md", "model.safetensors.index.json", "mergekit_config.yml"}
    | {"hf_quant_config.json", "pytorch_model.bin.index.json", "converted.json"}
)
NOT_COPIED_SUFFIXES = frozenset({".safetensors", ".png", ".jpg", ".svg"})
TOKENIZER = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    | {"vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"}
    | {"sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"}
)
TOKENS = frozenset({".tiktoken", ".spm"})
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a merge, if it is not the donor's."""

    source: str  # label of the source whose tokenizer files are copied
    written: Mapping[str, str] = field(default_factory=dict)  # name -> content of new files
    dropped: tuple[str, ...] = ()  # names of files or folders that are not copied
    config: Mapping[str, Any] = field(default_factory=dict)  # new values; None removes a key
    generation: Mapping[str, Any] = field(default_factory=dict)  # of generation_config.json


@dataclass(frozen=True)
class SidecarSettings:
    """The settings of the files beside the weights.

    Python files are copied but never run here. Without them, `auto_map`, which names them, is
    removed from the configuration, and so are settings of quantisation.
    """

    donor: str  # label of the source of the files
    dtype: str | None  # in `config.json`, such as bfloat16; None: the donor's
    code: bool = False  # whether the donor's Python files are copied
    tokenizer: TokenizerFiles | None = None  # None: the donor's
    config: Mapping[str, Any] | None = None  # `config.json`; None: the donor's

    def write(self, folders: Mapping[str, Path], output: Path) -> tuple[str, ...]:
        """Write the files; return their paths, relative to `output` and sorted.

        `folders` are those of the sources, by label.
        """
        tokenizer = self.tokenizer or TokenizerFiles(self.donor)
        written = set(tokenizer.written)
        for relative, source in _files(folders[self.donor], folders[tokenizer.source], tokenizer):
            if not _is_copied(relative, code=self.code):
                continue
            target = output / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            if relative.name.endswith("config.json") and (
                relative.name != "generation_config.json" or tokenizer.generation
            ):
                document = self._changed(relative, json.loads(source.read_text(encoding="utf-8")))
                text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
                target.write_text(text, encoding="utf-8", newline="\n")
            else:
                shutil.copyfile(source, target)
            written.add(str(relative))
        for name, text in tokenizer.written.items():
            (output / name).write_text(text, encoding="utf-8", newline="\n")
        return tuple(sorted(written))

    def _changed(self, path: PurePosixPath, document: dict[str, Any]) -> dict[str, Any]:
        """The content of a JSON file of the donor, or of the tokenizer's source, in the merge."""
        tokenizer = self.tokenizer or TokenizerFiles(self.donor)
        if path == PurePosixPath("config.json"):
            document = _plain(document if self.config is None else self.config)
            document = _with_dtype(document, self.dtype) if self.dtype else document
            document = _with(document, tokenizer.config)
        elif path == PurePosixPath("generation_config.json"):
            document = _with(document, tokenizer.generation)
        return document if self.code else {k: v for k, v in document.items() if k != "auto_map"}


def _files(
    donor: Path, source: Path, tokenizer: TokenizerFiles
) -> Iterator[tuple[PurePosixPath, Path]]:
    """The tokenizer's files of its source, and the other files of the donor."""
    for folder in dict.fromkeys((donor, source)):
        for path in sorted(folder.rglob("*")):
            relative = PurePosixPath(path.relative_to(folder))
            wanted = source if _is_tokenizer(relative) else donor
            dropped = relative.parts[0] in tokenizer.dropped or str(relative) in tokenizer.written
            if path.is_file() and folder == wanted and not dropped:
                yield relative, path


def _is_tokenizer(path: PurePosixPath) -> bool:
    if path.parts[0] == TEMPLATES:
        return True
    return len(path.parts) == 1 and (path.name in TOKENIZER or path.suffix in TOKENS)


def _is_copied(path: PurePosixPath, *, code: bool) -> bool:
    if any(part.startswith(".") or part == "lewis" for part in path.parts):
        return False
    if path.name in NOT_COPIED or path.suffix in NOT_COPIED_SUFFIXES:
        return False
    return code or path.suffix != ".py"


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Set the dtype wherever the configuration has one, also of parts of a multimodal model."""
    document = {
        key: _with_dtype(value, dtype)
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value)
        else value
        for key, value in config.items()
    }
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return document | dict.fromkeys(keys, dtype)


def _with(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Set values where the configuration has their keys, also in its text part, or at the top."""
    inner = config.get("text_config")
    document: dict[str, Any] = dict(config)
    if isinstance(inner, dict):
        document["text_config"] = _with(inner, {k: v for k, v in values.items() if k in inner})
        values = {k: v for k, v in values.items() if k in config or k not in inner}
    document |= values
    return {key: value for key, value in document.items() if value is not None or key not in values}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without quantisation settings: merged weights are plain floats."""
    return {
        key: _plain(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in KEYS
    }
