"""The files beside the weights: configuration, tokenizer, chat template, licence texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lewis_hub.checkpoint.quantisation import KEYS
from lewis_hub.documents import read_json
from lewis_hub.errors import SourceError
from lewis_hub.hub.fetch import CODE_FILES, read_pinned, require_small
from lewis_hub.hub.source import EMBEDDER, LICENCES, MODULES, Source, SourceFile
from lewis_hub.merge.modules import DAMAGED, Read, module_weights

TOKENIZER = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    | {"vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"}
    | {"sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "tekken.json"}
)
VOCABULARIES = frozenset({".model", ".tiktoken", ".spm"})  # endings of the carried ones
TEMPLATES = "additional_chat_templates"
# Only these files of a source are carried, by `Source.matching`. A folder may hold anything:
# weights of other formats, states of an optimizer, scripts, keys.
CARRIED = (
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json"),
    *(
        MODULES,
        "sentence_bert_config.json",
        EMBEDDER,
        "[0-9]_*/config.json",
    ),
    *sorted(TOKENIZER),
    *("*.tiktoken", "*.spm", "*.jinja", f"{TEMPLATES}/*.jinja", *LICENCES),
    *(f"{name}*.model" for name in ("tokenizer", "tiktoken", "sentencepiece", "spm", "vocab")),
)


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

    def require_readable(self, sources: Mapping[str, Source], read: Read) -> None:
        """Check all that `write` will write, before any weight is read.

        Raises:
            SourceError: a file is too large, or a configuration or template cannot be read.
        """
        tokenizer = self.tokenizer or TokenizerFiles(self.donor)
        for name, text in tokenizer.written.items():
            _encoded(sources[tokenizer.source], name, text)
        for source, file in self._files(sources, tokenizer, read):
            require_small(source, file)
            if file.path.endswith(("config.json", ".jinja")):
                self._content(source, file.path, read(source, file.path) or b"")

    def write(self, sources: Mapping[str, Source], output: Path) -> tuple[str, ...]:
        """Write the files; return their paths, relative to `output` and sorted.

        `sources` are fetched, by label. Their pinned files alone decide what is written.

        Raises:
            SourceError: a file is not the pinned one any more, or cannot be read.
        """
        tokenizer = self.tokenizer or TokenizerFiles(self.donor)
        written = set(tokenizer.written)
        for source, file in self._files(sources, tokenizer, _read_fetched):
            target = output / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self._content(source, file.path, read_pinned(source, file)))
            written.add(file.path)
        for name, text in tokenizer.written.items():
            (output / name).write_bytes(_encoded(sources[tokenizer.source], name, text))
        return tuple(sorted(written))

    def _files(
        self, sources: Mapping[str, Source], tokenizer: TokenizerFiles, read: Read
    ) -> Iterator[tuple[Source, SourceFile]]:
        """The tokenizer's files of its source, and the other files of the donor."""
        for label in dict.fromkeys((self.donor, tokenizer.source)):
            modules = module_weights(sources[label], read(sources[label], MODULES))
            code = CODE_FILES if self.code else ()
            for file in sources[label].matching((*CARRIED, *modules, *code)):
                path = PurePosixPath(file.path)
                wanted = tokenizer.source if _is_tokenizer(path) else self.donor
                dropped = path.parts[0] in tokenizer.dropped or file.path in tokenizer.written
                if label == wanted and not dropped:
                    yield sources[label], file

    def _content(self, source: Source, path: str, stored: bytes) -> bytes:
        """The content of a file in the merge."""
        try:
            if path.endswith(".jinja"):
                stored.decode()
            if not path.endswith("config.json"):
                return stored
            document = read_json(stored)
            if not isinstance(document, dict):
                raise ValueError("it is not a JSON object")
            if path == "generation_config.json" and not (
                self.tokenizer and self.tokenizer.generation
            ):
                return stored
            changed = self._changed(PurePosixPath(path), document)
        except ValueError as error:
            problem = f"`{path}` cannot be used: {error}"
            raise SourceError(source.pinned, problem, DAMAGED) from None
        return _encoded(source, path, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")

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


def _read_fetched(source: Source, path: str) -> bytes | None:
    file = source.file(path)
    return read_pinned(source, file) if file else None


def _encoded(source: Source, path: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # JSON can write half a letter, UTF-8 cannot
        problem = f"`{path}` cannot be used: {error}"
        raise SourceError(source.pinned, problem, DAMAGED) from None


def _is_tokenizer(path: PurePosixPath) -> bool:
    if path.parts[0] == TEMPLATES:
        return True
    return len(path.parts) == 1 and (path.name in TOKENIZER or path.suffix in VOCABULARIES)


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
