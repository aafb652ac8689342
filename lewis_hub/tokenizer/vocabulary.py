"""A source's tokenizer as a list: which token has which id."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lewis_hub.errors import TokenizerError

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Flags = Mapping[str, bool]
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a tokenizer.

    Attributes:
        label: the source, for messages.
        ids: token -> id; those that were added to the model's own are among them.
        added: token -> how it is found in a text; in the order of their ids.
        document: `tokenizer.json`; None where the source has none.
    """

    label: str
    ids: Mapping[str, int]
    added: Mapping[str, Flags]
    document: Document | None

    @property
    def n_rows(self) -> int:
        """The fewest rows that have one for each token."""
        return max(self.ids.values(), default=-1) + 1

    @property
    def kind(self) -> str:
        """What two tokenizers share whose tokens mean the same: model, and how words are spelt."""
        if self.document is None:
            return "unknown"
        model = self.document["model"]
        parts = [self.document.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
        told = json.dumps(parts, ensure_ascii=False)
        spelt = "bytes as letters" if '"ByteLevel"' in told else "plain letters"
        spelt = "▁ for spaces" if "▁" in told else spelt
        marks = [model.get(mark) for mark in ("continuing_subword_prefix", "end_of_word_suffix")]
        return ", ".join([model["type"], spelt, *(repr(mark) for mark in marks if mark)])


def read_vocabulary(label: str, files: Mapping[str, bytes]) -> Vocabulary | None:
    """Read which id each token has.

    Args:
        label: the source, for messages.
        files: the content of those of `FILES` that the source has.

    Returns:
        None where they do not say: a tokenizer that only its own code or SentencePiece can read.

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
    """As the library reads it, which numbers added tokens itself, whatever the file says."""
    from tokenizers import AddedToken

    document = json_object(label, files, "tokenizer.json")
    tokenizer = load(label, document)
    later = config.get("added_tokens_decoder")
    for _, told in sorted(later.items(), key=_by_id) if isinstance(later, dict) else ():
        flags = {flag: bool(told[flag]) for flag in FLAGS if flag in told}
        tokenizer.add_tokens([AddedToken(told["content"], **flags)])  # passed over if it is there
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return Vocabulary(
        label,
        tokenizer.get_vocab(with_added_tokens=True),
        {one.content: {flag: getattr(one, flag) for flag in FLAGS} for _, one in added},
        document,
    )


def _by_id(item: tuple[str, Any]) -> int:
    return int(item[0])


def load(label: str, document: Document) -> Any:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        TokenizerError: the library cannot read it.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # noqa: BLE001 (the library raises no other class)
        remedy = "Save it again with transformers' `AutoTokenizer` and `save_pretrained`."
        raise TokenizerError(f"{label}: tokenizer.json", f"{error}", remedy) from None


def json_object(label: str, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The content of a JSON file; empty where a source has none.

    Raises:
        TokenizerError: it is something else.
    """
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        remedy = "The file is damaged: use an intact copy."
        raise TokenizerError(f"{label}: {name}", "it is not a JSON object", remedy)
    return found


def disagreement(base: Vocabulary, other: Vocabulary) -> str | None:
    """The first id that means something else in two vocabularies; None where there is none.

    What only one of them has is padding to the other.
    """
    clashes = sorted(set(_clashes(base, other)))
    if not clashes:
        return None
    row, ours, theirs = clashes[0]
    more = f" (and {len(clashes) - 1} more)" if len(clashes) > 1 else ""
    return f"id {row} is {theirs!r} in {other.label} and {ours!r} in {base.label}{more}"


def _clashes(base: Vocabulary, other: Vocabulary) -> Iterator[tuple[int, str, str]]:
    by_id = {row: token for token, row in base.ids.items()}
    for token, row in other.ids.items():
        if row in by_id and base.ids.get(token) != row:
            yield row, by_id[row], token
        elif base.ids.get(token, row) != row:
            yield row, "nothing", token


@dataclass(frozen=True)
class Translation:
    """What the ids of one vocabulary are in another.

    Attributes:
        ids: id -> the other's id of the same token.
        lacking: id -> the token, where the other has none or no row for it.
    """

    ids: Mapping[int, int]
    lacking: Mapping[int, str]


def translation(ours: Vocabulary, theirs: Vocabulary, n_rows: int) -> Translation:
    """Find each token of a vocabulary in another, whose embeddings have so many rows."""
    ids, lacking = {}, {}
    for token, row in sorted(ours.ids.items(), key=lambda item: item[1]):  # told in this order
        own = theirs.ids.get(token, n_rows)
        if own < n_rows:
            ids[row] = own
        else:
            lacking[row] = token
    return Translation(ids, lacking)
