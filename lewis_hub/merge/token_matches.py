"""Match the tokens of two vocabularies by the bytes that they stand for.

Byte-level vocabularies write each byte as a letter (`Ġthe` is ` the`). SentencePiece writes a space
as `▁`, and a single byte as `<0xE2>`. Special tokens match by their text or by their role.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lewis_hub.documents import MAX_TABLE_BYTES, read_json
from lewis_hub.errors import TokenizerError
from lewis_hub.tokenizer import (
    CONFIG,
    LETTERS,
    PLAIN_LETTERS,
    SPACES,
    Vocabulary,
    json_object,
    load_tokenizer,
    refused_by_library,
)

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# GPT-2's alphabet: printable bytes of Latin-1 are themselves, all others follow from U+0100 on
PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
OTHERS = tuple(byte for byte in range(0x100) if byte not in PRINTED)
BYTES = {chr(byte): byte for byte in PRINTED} | {chr(0x100 + i): b for i, b in enumerate(OTHERS)}

ROLES = ("eos", "bos", "unk", "pad", "sep", "cls", "mask")  # the first role of a token counts
ROLE_FILES = ("special_tokens_map.json", CONFIG)  # the last counts
MAX_SPLIT = 512  # bytes of a text that is split: a longer one takes long
MAX_SPLIT_S, TEXTS_A_S = 30.0, 1000  # time to split texts, and texts that add a second to it
TEXTS_AT_ONCE = 8  # a step may make each 2,000 times as long, and a letter takes some 100 bytes
# a program that reads a `tokenizer.json` and texts in hexadecimal, a line each
ENCODE = """
import json, sys
n_texts, longest = map(int, sys.argv[1:])
from tokenizers import Tokenizer
document, *texts = (bytes.fromhex(line).decode() for line in sys.stdin)
tokenizer = Tokenizer.from_str(document)
tokenizer.no_padding()
tokenizer.no_truncation()
if getattr(tokenizer.model, "dropout", None) is not None:
    tokenizer.model.dropout = None
for first in range(0, len(texts), n_texts):
    encoded = tokenizer.encode_batch(texts[first : first + n_texts], add_special_tokens=False)
    print(json.dumps([one.ids if len(one) <= longest else [] for one in encoded]))
"""


@dataclass(frozen=True)
class Spelled:
    """A vocabulary, and the bytes of its tokens that have a row in the embeddings."""

    vocabulary: Vocabulary
    texts: Mapping[int, bytes]  # id -> bytes
    ids: Mapping[bytes, int]  # bytes -> id; a piece counts before a byte token, then the lower id
    roles: Mapping[str, int]  # role -> id
    n_rows: int  # of the embeddings

    @cached_property
    def readings(self) -> frozenset[int]:
        """The ids that `ids` leads to: of each text one."""
        return frozenset(self.ids.values())


def spell(vocabulary: Vocabulary, roles: Mapping[str, str], n_rows: int) -> Spelled:
    """Read the bytes of each token with an id below `n_rows`; `roles` maps roles to tokens."""
    order = sorted(vocabulary.ids.items(), key=lambda item: (is_byte(item[0]), item[1]))
    spelling = vocabulary.spelling
    texts, ids = {}, dict[bytes, int]()
    for token, token_id in order:
        if token_id < n_rows:
            own = PLAIN_LETTERS if spelling == LETTERS and token in vocabulary.added else spelling
            texts[token_id] = _bytes(token, own)
            ids.setdefault(texts[token_id], token_id)
    found = {
        role: vocabulary.ids[roles[role]] for role in ROLES if roles.get(role) in vocabulary.ids
    }
    stored = {role: token_id for role, token_id in found.items() if token_id in texts}
    return Spelled(vocabulary, texts, ids, stored, n_rows)


def is_byte(token: str) -> bool:
    """Whether a token is SentencePiece's name of a single byte."""
    return BYTE.fullmatch(token) is not None


def _bytes(token: str, spelling: str) -> bytes:
    if spelling == SPACES:
        if byte := BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        token = token.replace("▁", " ")
    elif spelling == LETTERS and BYTES.keys() >= set(token):
        return bytes(BYTES[letter] for letter in token)
    return token.encode("utf-8", "surrogatepass")


def read_roles(label: str, files: Mapping[str, bytes]) -> dict[str, str]:
    """The special tokens by their roles, such as `eos`, from the tokenizer's configuration."""
    found: dict[str, str] = {}
    for name in ROLE_FILES:
        document = json_object(label, files, name)
        for role in ROLES:
            token: Any = document.get(f"{role}_token")
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                found[role] = content
    return found


@dataclass(frozen=True)
class TokenMatches:
    """The tokens of a donor's vocabulary that a model's vocabulary has, too."""

    rows: Mapping[int, int]  # the donor's id -> the model's
    shared: tuple[tuple[int, int], ...]  # pairs of one token in both, each id once, by donor's id


def match(model: Spelled, donor: Spelled) -> TokenMatches:
    """Match tokens by their spelling, then by their bytes, then by their roles.

    A role matches only if no other token of the donor is that token of the model: two tokens with
    equal rows in the head would have equal logits.
    """
    ours = model.vocabulary.ids
    is_same_spelling = model.vocabulary.spelling == donor.vocabulary.spelling
    rows: dict[int, int] = {}
    for token, token_id in sorted(donor.vocabulary.ids.items(), key=lambda item: item[1]):
        if token_id not in donor.texts:
            continue
        same = ours.get(token) if is_same_spelling else None
        found = same if same in model.texts else model.ids.get(donor.texts[token_id])
        if found is not None:
            rows[token_id] = found
    pairs = {i: row for i, row in rows.items() if i in donor.readings and row in model.readings}
    taken = set(rows.values())
    for role, token_id in donor.roles.items():
        row = model.roles.get(role)
        if token_id not in rows and row is not None and row not in taken:
            rows[token_id] = pairs[token_id] = row
            taken.add(row)
    return TokenMatches(rows, tuple(sorted(pairs.items())))


def split(model: Spelled, texts: Sequence[bytes]) -> list[tuple[int, ...]]:
    """Split texts into tokens of a model as its tokenizer does; empty if they cannot write it.

    So is a text of more than MAX_SPLIT bytes.
    A tokenizer may put a space before a text or change letters. If its tokens do not spell the text
    exactly, the text is split from left to right into the longest tokens.

    Raises:
        TokenizerError: the model has no `tokenizer.json`, or one that takes too long.
    """
    document, label = model.vocabulary.document, model.vocabulary.label
    if document is None:
        problem = "it has no tokenizer.json, which is needed to split the donor's tokens"
        remedy = "Save its tokenizer with transformers' `AutoTokenizer` and `save_pretrained`, or "
        raise TokenizerError(label, problem, f"{remedy}choose another --method.")
    load_tokenizer(label, document)  # refuses one that makes texts very long
    limit_s = MAX_SPLIT_S + len(texts) / TEXTS_A_S
    until = time.monotonic() + limit_s
    short = [text if len(text) <= MAX_SPLIT else b"" for text in texts]
    plain = [text.decode("utf-8", "replace") for text in short]
    # a tokenizer that puts a space before the text gets it without its own
    bare = [text.removeprefix(" ") for text in plain]
    found: list[tuple[int, ...]] = []
    with _in_time(label, limit_s):
        ids = _encoded(label, document, [*plain, *bare], limit_s)
        for text, whole, spaced in zip(short, ids, ids[len(short) :], strict=False):
            exact = _exact(model, text, whole) or _exact(model, text, spaced)
            found.append(exact or _longest(model, text))
            if time.monotonic() > until:
                raise TimeoutError
    return found


@contextmanager
def _in_time(label: str, limit_s: float) -> Iterator[None]:
    try:
        yield
    except (TimeoutError, subprocess.TimeoutExpired):
        problem = f"it takes more than {limit_s:.0f} s to split the donor's tokens"
        remedy = "Choose another --method."
        raise TokenizerError(f"{label}: tokenizer.json", problem, remedy) from None


def _encoded(
    label: str, document: Mapping[str, Any], texts: Sequence[str], limit_s: float
) -> list[list[int]]:
    """The tokens of texts, by a process of its own: a regular expression can take for ever."""
    given = "".join(f"{text.encode().hex()}\n" for text in (json.dumps(document), *texts))
    limits = map(str, (TEXTS_AT_ONCE, MAX_SPLIT))  # each token stands for a byte
    ended = subprocess.run(
        [sys.executable, "-P", "-c", ENCODE, *limits],
        input=given.encode(),
        capture_output=True,
        timeout=limit_s,
        check=False,
    )
    with refused_by_library(label):
        if ended.returncode:
            said = ended.stderr.decode("utf-8", "replace").strip()
            raise ValueError(said.rpartition("\n")[2][:200])
        lines = ended.stdout.splitlines()
        return [ids for line in lines for ids in read_json(line, MAX_TABLE_BYTES)]


def _exact(model: Spelled, text: bytes, ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens of a text; empty where they do not spell it."""
    spelled = b"".join(model.texts.get(i, b"") for i in ids)
    return tuple(ids) if spelled == text and model.texts.keys() >= set(ids) else ()


def _longest(model: Spelled, text: bytes) -> tuple[int, ...]:
    found, start = [], 0
    while start < len(text):
        stops = range(len(text), start, -1)
        stop = next((stop for stop in stops if text[start:stop] in model.ids), None)
        if stop is None:
            return ()
        found.append(model.ids[text[start:stop]])
        start = stop
    return tuple(found)
