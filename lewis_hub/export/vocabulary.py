"""The tokenizer of a model in a GGUF file.

llama.cpp runs two kinds of tokenizers of language models: `gpt2`, BPE on bytes, and `llama`, the
BPE of SentencePiece, which joins the two neighbours whose joint piece has the highest score. A
tokenizer.json has ranked merges instead of scores: a piece gets the rank of its first merge, which
joins neighbours in the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lewis_hub.errors import ExportError
from lewis_hub.export.pretokenizers import pretokenizer_name
from lewis_hub.tokenizer import (
    CONFIG,
    TEMPLATE_SOURCES,
    Vocabulary,
    json_object,
    load_without_added,
    read_vocabulary,
    refused_by_library,
    template_of,
)
from lewis_hub.tokenizer import FILES as TOKENIZER_FILES

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILES = tuple(dict.fromkeys((*TOKENIZER_FILES, *TEMPLATE_SOURCES)))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
SPACE = "▁"
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# added tokens that stand for no text, even where a tokenizer does not call them special
CONTROL_LIKE = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
UNMERGED = -10_000.0  # the score of a piece that no merge makes
SPECIAL = ("bos", "eos", "unk", "pad")
SAVE = "Save its tokenizer again with transformers' `AutoTokenizer` and `save_pretrained`."
OTHER = "llama.cpp would split texts in another way, so the model would get worse: use another "
OTHER += "tokenizer, or see the pre-tokenizers in llama.cpp's convert_hf_to_gguf.py."


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer as llama.cpp stores it."""

    model: str  # gpt2 or llama
    pre: str  # name of the pre-tokenizer
    tokens: tuple[str, ...]  # one for each row of the embeddings
    types: tuple[int, ...]  # of each token
    scores: tuple[float, ...] = ()  # of each token; empty with `merges`
    merges: tuple[str, ...] = ()  # two pieces with a space between them, the first merge first
    ids: Mapping[str, int] = field(default_factory=dict)  # bos, eos, unk, pad -> id
    adds: Mapping[str, bool] = field(default_factory=dict)  # bos, eos -> whether texts get it
    space_first: bool | None = None  # whether a text gets a space in front; None: no such setting
    template: str | None = None  # the chat template

    def add_to(self, writer: GGUFWriter) -> None:
        """Write it."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        for name, is_added in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(is_added)
        if self.space_first is not None:
            writer.add_add_space_prefix(self.space_first)
        if self.template:
            writer.add_chat_template(self.template)


def read_gguf_vocabulary(
    label: str, files: Mapping[str, bytes], n_rows: int, config: Mapping[str, Any]
) -> GgufVocabulary:
    """Read a tokenizer.

    Args:
        label: the model, for messages.
        files: the content of those of `FILES` that it has.
        n_rows: rows of its embeddings; rows without a token get a name.
        config: its `config.json`, for ids that the tokenizer does not name.

    Raises:
        ExportError: llama.cpp has no such tokenizer, or it has more tokens than rows.
        TokenizerError: a file is broken.
    """
    found = read_vocabulary(label, files)
    if found is None or found.document is None:
        raise ExportError(label, "it has no tokenizer.json", SAVE)
    if found.n_rows > n_rows:
        problem = f"its tokenizer has {found.n_rows} tokens, its embeddings have {n_rows} rows"
        raise ExportError(label, problem, "Use a tokenizer that fits the model.")
    settings = json_object(label, files, CONFIG)
    special = dict(_special_ids(found, settings, config))
    is_bytes = '"ByteLevel"' in json.dumps(found.document.get("pre_tokenizer"))
    if is_bytes:
        pre = _require_bytes(label, found.document)
    else:
        _require_pieces(label, found.document)
    texts = _Texts(label, found, special)  # its steps are known to be quick
    tokens, types = _tokens(found, n_rows, special.get("unk"), pieces=not is_bytes)
    adds: dict[str, bool] = {
        name: texts.adds(name, settings) for name in ("bos", "eos") if name in special
    }
    template, merges = template_of(label, files), _merges(found.document)
    common = GgufVocabulary("", "", tokens, types, ids=special, adds=adds, template=template)
    if is_bytes:
        joined = tuple(f"{_visible(a)} {_visible(b)}" for a, b in merges)
        return replace(common, model="gpt2", pre=pre, merges=joined)
    first, scores = texts.starts_with_space, _scores(found, merges, n_rows)
    return replace(common, model="llama", pre="default", scores=scores, space_first=first)


def _tokens(
    found: Vocabulary, n_rows: int, unknown: int | None, *, pieces: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the text and type of the token of each row; `pieces`: of SentencePiece."""
    tokens = [f"[PAD{i}]" for i in range(n_rows)]
    types = [UNUSED] * n_rows
    for token, number in found.ids.items():
        flags = found.added.get(token)
        if flags is None:
            is_byte = pieces and BYTE_PIECE.fullmatch(token)
            types[number] = BYTE if is_byte else NORMAL
        elif flags["special"] or CONTROL_LIKE.fullmatch(token):
            types[number] = CONTROL
        else:
            types[number] = USER_DEFINED
            token = token.replace(SPACE, " ") if pieces else token
        tokens[number] = token
    if pieces and unknown is not None:
        types[unknown] = UNKNOWN
    return tuple(tokens), tuple(types)


def _merges(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a BPE; empty for another model."""
    merges = document["model"].get("merges") or []
    pairs = (tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in merges)
    return [(pair[0], pair[1]) for pair in pairs]


def _visible(piece: str) -> str:
    """Write a space as byte-level BPE writes the byte; llama.cpp splits a merge at its space."""
    return piece.replace(" ", "Ġ")


def _scores(found: Vocabulary, merges: list[tuple[str, str]], n_rows: int) -> tuple[float, ...]:
    scores = [UNMERGED - len(merges)] * n_rows
    for rank, (left, right) in reversed([*enumerate(merges)]):
        scores[found.ids[left + right]] = -float(rank)
    return tuple(scores)


def _require_bytes(label: str, document: Mapping[str, Any]) -> str:
    """Return the name of the pre-tokenizer of a BPE on bytes."""
    pre = pretokenizer_name(document)
    normalizers = [step.get("type") for step in _steps(document.get("normalizer"), "normalizers")]
    if document["model"]["type"] != "BPE" or pre is None or set(normalizers) - {"NFC"}:
        shown = json.dumps(document.get("pre_tokenizer"), ensure_ascii=False)[:200]
        problem = "llama.cpp has no pre-tokenizer for its tokenizer.json"
        raise ExportError(label, f"{problem} ({shown})", OTHER)
    return pre


def _require_pieces(label: str, document: Mapping[str, Any]) -> None:
    """Refuse what is not the BPE of SentencePiece with a token for each byte."""
    model = document["model"]
    steps = [*_steps(document.get("normalizer"), "normalizers")]
    steps += _steps(document.get("pre_tokenizer"), "pretokenizers")
    is_bpe = model["type"] == "BPE" and model.get("byte_fallback")
    if not is_bpe or not all(map(_is_spacing, steps)):
        kinds = ", ".join([model["type"], *(str(step.get("type")) for step in steps)])
        problem = "llama.cpp has no tokenizer like its tokenizer.json"
        raise ExportError(label, f"{problem} ({kinds})", OTHER)


def _steps(part: object, inner: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(part, Mapping):
        if part.get("type") == "Sequence":
            for step in part.get(inner, ()):
                yield from _steps(step, inner)
        else:
            yield part


def _is_spacing(step: Mapping[str, Any]) -> bool:
    """Return whether a step only writes spaces as ▁ or splits at them."""
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "Prepend":
        return step.get("prepend") == SPACE
    if kind == "Replace":
        return pattern == {"String": " "} and step.get("content") == SPACE
    if kind == "Split":
        return pattern == {"String": " "} and step.get("behavior") == "MergedWithPrevious"
    return kind == "Metaspace" and step.get("replacement") == SPACE


def _special_ids(
    found: Vocabulary, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    for name in SPECIAL:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        number = found.ids.get(token) if isinstance(token, str) else None
        number = config.get(f"{name}_token_id") if number is None else number
        if type(number) is int and 0 <= number < found.n_rows:
            yield name, number


class _Texts:
    """What the tokenizer does at the ends of a text."""

    def __init__(self, label: str, found: Vocabulary, special: Mapping[str, int]) -> None:
        assert found.document is not None
        tokenizer = load_without_added(label, found.document)
        self._special = special
        with refused_by_library(label):
            self._whole = tokenizer.encode("a").ids
            self._plain = tokenizer.encode("a", add_special_tokens=False)

    @property
    def starts_with_space(self) -> bool:
        tokens = self._plain.tokens
        return bool(tokens) and tokens[0].startswith(SPACE)

    def adds(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Return whether a text gets the token at its beginning or end."""
        stated = settings.get(f"add_{name}_token")
        if isinstance(stated, bool):
            return stated
        end = 0 if name == "bos" else -1
        is_longer = len(self._whole) > len(self._plain.ids)
        return is_longer and self._whole[end] == self._special[name]
