"""The vocabulary of a tokenizer: its tokens and their ids, and how two vocabularies differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lewis_hub.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token

Flags = Mapping[str, bool]
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a tokenizer."""

    label: str  # the source, for messages
    ids: Mapping[str, int]  # token -> id, of the model's vocab and of the added tokens
    added: Mapping[str, Flags]  # added token -> its flags, in the order of the ids
    document: Document | None  # the content of `tokenizer.json`; None without this file

    @property
    def n_rows(self) -> int:
        """The rows that an embedding needs to have one for each token."""
        return max(self.ids.values(), default=-1) + 1

    @property
    def kind(self) -> str:
        """Model and spelling of tokens. Tokenizers can be united only if they agree in both."""
        if self.document is None:
            return "unknown"
        model = self.document["model"]
        parts = [self.document.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
        text = json.dumps(parts, ensure_ascii=False)
        spelling = "bytes as letters" if '"ByteLevel"' in text else "plain letters"
        spelling = "▁ for spaces" if "▁" in text else spelling
        marks = [model.get(mark) for mark in ("continuing_subword_prefix", "end_of_word_suffix")]
        return ", ".join([model["type"], spelling, *(repr(mark) for mark in marks if mark)])


def read_vocabulary(label: str, files: Mapping[str, bytes]) -> Vocabulary | None:
    """Read the id of each token.

    Args:
        label: the source, for messages.
        files: name -> content of those of `FILES` that the source has.

    Returns:
        None for a tokenizer that only its own code or SentencePiece can read.

    Raises:
        TokenizerError: a file is broken.
    """
    config = json_object(label, files, "tokenizer_config.json")
    if "tokenizer.json" in files:
        return _fast(label, files, config)
    if "vocab.json" in files:
        ids = json_object(label, files, "vocab.json") | json_object(
            label, files, "added_tokens.json"
        )
        if all(type(i) is int for i in ids.values()):
            return Vocabulary(label, ids, {}, None)
    return None


def _fast(label: str, files: Mapping[str, bytes], config: Document) -> Vocabulary:
    """Let the tokenizers library read it: it gives added tokens its own ids."""
    from tokenizers import AddedToken

    document = json_object(label, files, "tokenizer.json")
    tokenizer = load(label, document)
    decoder = config.get("added_tokens_decoder")
    entries = decoder.items() if isinstance(decoder, dict) else ()
    for _, entry in sorted(entries, key=lambda item: int(item[0])):
        flags = {flag: bool(entry[flag]) for flag in FLAGS if flag in entry}
        tokenizer.add_tokens([AddedToken(entry["content"], **flags)])  # ignored if it exists
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return Vocabulary(
        label,
        tokenizer.get_vocab(with_added_tokens=True),
        {token.content: {flag: getattr(token, flag) for flag in FLAGS} for _, token in added},
        document,
    )


def load(label: str, document: Document) -> Tokenizer:
    """Load the tokenizer of a `tokenizer.json`.

    Raises:
        TokenizerError: the tokenizers library cannot read it.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # noqa: BLE001 (the library raises no other class)
        remedy = "Save it again with transformers' `AutoTokenizer` and `save_pretrained`."
        problem = f"the tokenizers library cannot read it ({error})"
        raise TokenizerError(f"{label}: tokenizer.json", problem, remedy) from None


def json_object(label: str, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The content of a JSON file; empty if the source does not have it.

    Raises:
        TokenizerError: it is not a JSON object.
    """
    try:
        document = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        remedy = "The file is damaged: use an intact copy."
        raise TokenizerError(f"{label}: {name}", "it is not a JSON object", remedy)
    return document


def disagreement(base: Vocabulary, other: Vocabulary) -> str | None:
    """The first id with two meanings in two vocabularies; None if they agree.

    An id that only one of them uses is padding in the other.
    """
    clashes = sorted(set(_clashes(base, other)))
    if not clashes:
        return None
    token_id, ours, theirs = clashes[0]
    more = f" (and {len(clashes) - 1} more)" if len(clashes) > 1 else ""
    return f"id {token_id} is {theirs!r} in {other.label} and {ours!r} in {base.label}{more}"


def _clashes(base: Vocabulary, other: Vocabulary) -> Iterator[tuple[int, str, str]]:
    by_id = {token_id: token for token, token_id in base.ids.items()}
    for token, token_id in other.ids.items():
        if token_id in by_id and base.ids.get(token) != token_id:
            yield token_id, by_id[token_id], token
        elif base.ids.get(token, token_id) != token_id:
            yield token_id, "nothing", token


@dataclass(frozen=True)
class Translation:
    """The ids of one vocabulary in another."""

    ids: Mapping[int, int]  # id -> the other's id of the same token
    lacking: Mapping[int, str]  # id -> the token, if the other has no row for it


def translation(ours: Vocabulary, theirs: Vocabulary, n_rows: int) -> Translation:
    """Find each token of a vocabulary in another, whose embeddings have `n_rows` rows."""
    ids, lacking = {}, {}
    for token, token_id in sorted(ours.ids.items(), key=lambda item: item[1]):
        their_id = theirs.ids.get(token, n_rows)
        if their_id < n_rows:
            ids[token_id] = their_id
        else:
            lacking[token_id] = token
    return Translation(ids, lacking)
