"""Vocabularies of tokenizers: how two of them differ, their union, and the files of the result."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import count
from typing import TYPE_CHECKING, Any

from lewis_hub.documents import MAX_TABLE_BYTES, SURROGATE, read_json
from lewis_hub.errors import LewisHubError, TokenizerError
from lewis_hub.loadable import limited_load
from lewis_hub.text_growth import require_modest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token

Flags = Mapping[str, bool]
Document = Mapping[str, Any]

# a token that a recipe names, as transformers' `add_tokens` makes it
NO_WORDS = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
PLAIN: Flags = {**dict.fromkeys(FLAGS, False), "normalized": True}
LETTERS, SPACES, PLAIN_LETTERS = "bytes as letters", "▁ for spaces", "plain letters"
DAMAGED = "The file is damaged: use an intact copy."
ID = re.compile(r"\d{1,9}", re.ASCII)
MAX_UNUSED = 1 << 16  # ids that may be unused beside one for each token
UNLIKELY = 10.0  # how far below all other scores an added token is in a Unigram model

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
# describe the base's vocabulary; tokenizer.json has it all
STALE = (
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
# files with a chat template; the first counts
TEMPLATE_SOURCES = (TEMPLATE, CONFIG, "chat_template.json")
OTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates")  # would clash with `TEMPLATE`


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
        marks = [model.get(mark) for mark in ("continuing_subword_prefix", "end_of_word_suffix")]
        return ", ".join([model["type"], self.spelling, *(repr(mark) for mark in marks if mark)])

    @property
    def spelling(self) -> str:
        """How the tokens of the model write spaces and bytes; `Ġ` is a byte's letter."""
        if self.document is None:
            return LETTERS if any("Ġ" in token for token in self.ids) else PLAIN_LETTERS
        parts = [self.document.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
        text = json.dumps(parts, ensure_ascii=False)
        if "▁" in text:
            return SPACES
        return LETTERS if '"ByteLevel"' in text else PLAIN_LETTERS


def read_vocabulary(label: str, files: Mapping[str, bytes]) -> Vocabulary | None:
    """Read the id of each token; None if only its own code or SentencePiece can read a tokenizer.

    `files` has the content of those of `FILES` that the source has. A broken file is a
    TokenizerError.
    """
    config = json_object(label, files, CONFIG)
    if "tokenizer.json" in files:
        return _with_usual_ids(_fast(label, files, config), "tokenizer.json")
    if "vocab.json" in files:
        model, added = (json_object(label, files, name) for name in FILES[2:])
        ids = model | added
        if all(type(i) is int for i in ids.values()):
            return _with_usual_ids(Vocabulary(label, ids, {}, None), "vocab.json")
    return None


def _with_usual_ids(found: Vocabulary, name: str) -> Vocabulary:
    """Refuse ids that are far above the number of tokens: each takes a row of the embeddings."""
    limit = 2 * len(found.ids) + MAX_UNUSED
    unusual = ((token, i) for token, i in found.ids.items() if not 0 <= i < limit)
    for token, token_id in unusual:
        problem = f"{token[:20]!r} has the id {token_id}, but it has {len(found.ids):,} tokens"
        raise TokenizerError(f"{found.label}: {name}", problem, DAMAGED)
    return found


def _fast(label: str, files: Mapping[str, bytes], config: Document) -> Vocabulary:
    """Let the tokenizers library read it: it gives added tokens its own ids."""
    from tokenizers import AddedToken

    document = json_object(label, files, "tokenizer.json")
    tokenizer = load_tokenizer(label, document)
    document["model"].setdefault("type", type(tokenizer.model).__name__)  # old files lack it
    decoder = config.get("added_tokens_decoder")
    entries = decoder.items() if isinstance(decoder, dict) else ()
    for token_id, entry in entries:
        if not (ID.fullmatch(token_id) and _is_token(entry)):
            problem = f"entry {token_id[:20]!r} of `added_tokens_decoder` is not an id with a token"
            raise TokenizerError(f"{label}: {CONFIG}", problem, DAMAGED)
    ordered = (entry for _, entry in sorted(entries, key=lambda item: int(item[0])))
    tokens = [
        AddedToken(entry["content"], **{flag: bool(entry[flag]) for flag in FLAGS if flag in entry})
        for entry in ordered
    ]
    tokenizer.add_tokens(tokens)  # at once, as each call takes all of them; known ones are ignored
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return Vocabulary(
        label,
        tokenizer.get_vocab(with_added_tokens=True),
        {token.content: {flag: getattr(token, flag) for flag in FLAGS} for _, token in added},
        document,
    )


def _is_token(entry: object) -> bool:
    content = entry.get("content") if isinstance(entry, dict) else None
    return isinstance(content, str) and not SURROGATE.search(content)


def load_tokenizer(label: str, document: Document) -> Tokenizer:
    """Load a `tokenizer.json`, which neither normalizes, pads nor truncates then.

    The library would pass each added token through the normalizer, whose patterns may take for
    ever; it is read alone.

    Raises:
        TokenizerError: the tokenizers library cannot read it, or it makes texts very long.
    """
    require_modest(label, document)
    _loaded(label, {"model": NO_WORDS, "normalizer": document.get("normalizer")})
    return _loaded(label, {**document, "normalizer": None})


def load_without_added(label: str, document: Document) -> Tokenizer:
    """Load a `tokenizer.json` without its added tokens, as `load_tokenizer` does, to encode."""
    require_modest(label, document)
    return _loaded(label, {**document, "added_tokens": []})


def _loaded(label: str, document: Document) -> Tokenizer:
    from tokenizers import Tokenizer

    where = f"{label}: tokenizer.json"
    with limited_load(TokenizerError, where), refused_by_library(label):
        tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    apply_all_merges(tokenizer)
    return tokenizer


def apply_all_merges(tokenizer: Any) -> None:
    """Let BPE apply all its merges, also if its file has a `dropout`, which is for training.

    Each run would have other tokens by chance, and so other weights and scores. The tokenizer is
    one of the tokenizers library, or of transformers, where only fast ones have a dropout.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "model", None)
    if getattr(model, "dropout", None) is not None:
        model.dropout = None


@contextmanager
def refused_by_library(label: str) -> Iterator[None]:
    """Make TokenizerErrors of what the tokenizers library raises for a `tokenizer.json`."""
    try:
        with panics_as_errors():
            yield
    except Exception as error:  # noqa: BLE001 (the library raises no other class)
        remedy = "Save it again with transformers' `AutoTokenizer` and `save_pretrained`."
        problem = f"the tokenizers library cannot use it ({error})"
        raise TokenizerError(f"{label}: tokenizer.json", problem, remedy) from None


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Make errors of the panics of the tokenizers library, which are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error


def token_ids(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    """The token ids that a tokenizer of transformers makes of a text, or of each of several.

    Raises:
        TokenizerError: it fails, as with a letter that it does not know.
    """
    try:
        with panics_as_errors():
            return tokenizer(texts, **options)["input_ids"]
    except (LewisHubError, MemoryError, OSError):
        raise
    except Exception as error:  # the tokenizers library raises no other class
        problem = f"it makes no tokens of a text: {type(error).__name__}: {error}"
        remedy = "Use other texts, or a copy of the model with another tokenizer."
        raise TokenizerError(str(tokenizer.name_or_path), problem, remedy) from error


def json_object(label: str, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The content of a JSON file, checked to be an object; empty if the source lacks it."""
    try:
        document = read_json(files.get(name, b"{}"), MAX_TABLE_BYTES)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise TokenizerError(f"{label}: {name}", "it is not a JSON object", DAMAGED)
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


@dataclass(frozen=True)
class _Pieces:
    """The tokens of one source's model that are new in the merge, in the order of their ids."""

    model: Mapping[str, Any]
    tokens: Sequence[str]

    @property
    def scores(self) -> Mapping[str, float]:
        """Their scores in a Unigram model."""
        scores = dict(self.model["vocab"])
        return {token: scores[token] for token in self.tokens}

    @property
    def merges(self) -> Iterator[tuple[str, str]]:
        """The merges of a BPE model that make the new tokens."""
        prefix, new = self.model.get("continuing_subword_prefix") or "", set(self.tokens)
        for left, right in _merges(self.model):
            if left + right.removeprefix(prefix) in new:
                yield left, right


def unite(base: Vocabulary, others: Sequence[Vocabulary], wanted: Sequence[str] = ()) -> Vocabulary:
    """Add the tokens of other tokenizers to the base's; the base's tokens keep their ids.

    First come the tokens of the others' models; their merges follow all merges of the base, so a
    text is split as the base splits it, then its parts are joined further. Then come the added
    tokens of the others with their flags; those of the first source count. Last come the `wanted`
    tokens that no tokenizer has. A TokenizerError refuses tokenizers without `tokenizer.json`, or
    with another spelling of tokens.
    """
    ids, numbers = dict(base.ids), count(base.n_rows)
    pieces = []
    for other in others:
        new = [t for t in sorted(other.ids, key=other.ids.__getitem__) if t not in ids]
        own = [token for token in new if token not in other.added]
        if own:
            pieces.append(_Pieces(_document(other)["model"], own))
            _require_same_kind(base, other, own)
        ids |= zip(own, numbers, strict=False)
    added: dict[str, Flags] = {}
    for other in others:
        added |= {t: flags for t, flags in other.added.items() if t not in ids and t not in added}
    added |= {token: PLAIN for token in wanted if token not in ids and token not in added}
    ids |= zip(added, numbers, strict=False)
    if not pieces and not added:
        return base
    document = _extended(base, ids, pieces, {**base.added, **added})
    loaded = load_tokenizer("the merge", document).get_vocab(with_added_tokens=True)
    if loaded != ids:
        n_moved = sum(loaded.get(token) != token_id for token, token_id in ids.items())
        problem = f"{n_moved} of its tokens get other ids when it is loaded"
        raise TokenizerError("union of the tokenizers", problem, "Set `tokenizer_source: base`.")
    return Vocabulary("the merge", ids, {**base.added, **added}, document)


def _require_same_kind(base: Vocabulary, other: Vocabulary, own: Sequence[str]) -> None:
    if other.kind != base.kind:
        raise TokenizerError(
            f"{other.label}: tokenizer.json",
            f"its tokenizer ({other.kind}) cannot be united with that of {base.label} "
            f"({base.kind}): {len(own)} of its tokens, such as {own[0]!r}, "
            "could never occur in a text",
            "Set `tokenizer_source` to `base` or to one of the models.",
        )


def _document(vocabulary: Vocabulary) -> Document:
    if vocabulary.document is None:
        problem = "it has no tokenizer.json, which is needed to add tokens"
        remedy = "Save its tokenizer again with transformers' `AutoTokenizer` and "
        remedy += "`save_pretrained`, or set `tokenizer_source: base`."
        raise TokenizerError(vocabulary.label, problem, remedy)
    return vocabulary.document


def _extended(
    base: Vocabulary,
    ids: Mapping[str, int],
    pieces: Sequence[_Pieces],
    added: Mapping[str, Flags],
) -> dict[str, Any]:
    """The base's `tokenizer.json` with the new tokens of the models and new added tokens."""
    document: dict[str, Any] = copy.deepcopy(dict(_document(base)))
    document["added_tokens"] = [
        {"id": ids[token], "content": token, **added[token]}
        for token in sorted(added, key=ids.__getitem__)
    ]
    model = document["model"]
    if not pieces:
        return document
    # new ids are above those of the base's added tokens, which keep theirs only inside the model
    if model["type"] == "Unigram":
        lowest = min((score for _, score in model["vocab"]), default=0.0) - UNLIKELY
        scores = {token: score for new in pieces for token, score in new.scores.items()}
        later = sorted(ids, key=ids.__getitem__)[len(model["vocab"]) :]
        model["vocab"] += [[token, scores.get(token, lowest)] for token in later]
    else:
        tokens = {token for new in pieces for token in new.tokens} | set(added)
        model["vocab"] |= {token: ids[token] for token in sorted(tokens, key=ids.__getitem__)}
    if model["type"] == "BPE":
        merges = (*_merges(model), *(merge for new in pieces for merge in new.merges))
        model["merges"] = [list(merge) for merge in dict.fromkeys(merges)]
    return document


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The merges as pairs; older files write them as strings with a space."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def extended_files(vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, str]:
    """The files of a tokenizer with new tokens, by name.

    `config` is the content of the base's `tokenizer_config.json`; empty if it has none.
    """
    written = {"tokenizer.json": _json(vocabulary.document)}
    if "added_tokens_decoder" in config:
        decoder = {
            str(vocabulary.ids[token]): {"content": token, **flags}
            for token, flags in vocabulary.added.items()
        }
        written[CONFIG] = _json({**config, "added_tokens_decoder": decoder})
    return written


def template_files(template: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The files of a chat template, by name.

    `config` is the content of `tokenizer_config.json`, whose own template is removed.
    """
    kept = {key: value for key, value in config.items() if key != "chat_template"}
    return {TEMPLATE: template} | ({CONFIG: _json(kept)} if len(kept) < len(config) else {})


def shipped_template(name: str) -> str:
    """The text of one of `recipe.schema.CHAT_TEMPLATES`."""
    file = resources.files("lewis_hub.templates").joinpath("chat", f"{name}.jinja")
    return file.read_text(encoding="utf-8")


def template_of(label: str, files: Mapping[str, bytes]) -> str | None:
    """A source's chat template; None if it has none.

    `files` has the content of those of `TEMPLATE_SOURCES` that the source has. A broken file is a
    TokenizerError.
    """
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8", errors="replace")
    for name in TEMPLATE_SOURCES[1:]:
        template = json_object(label, files, name).get("chat_template")
        if isinstance(template, list):  # several with names
            entries = (entry for entry in template if isinstance(entry, dict))
            named = (one.get("template") for one in entries if one.get("name") == "default")
            template = next(named, None)
        if isinstance(template, str):
            return template
    return None


def _json(document: object) -> str:
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"
