"""How much longer the steps of a tokenizer can make a text: a small file could fill the memory.

The steps of `tokenizer.json` follow one another, so what each can do is multiplied. Of a step that
occurs twice, such as one that writes each byte as a letter of two bytes, the second finds more. The
last step adds special tokens, and a template of it may repeat them and the text.

What the steps can do at most is far above what they do to usual texts: one letter of Unicode has 18
in its normal form. So files are refused only for much, and texts are measured before they are
tokenised.
"""

from __future__ import annotations

import base64
import functools
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lewis_hub.display import printable
from lewis_hub.documents import read_json, texts_in
from lewis_hub.errors import TokenizerError
from lewis_hub.limits import ended_after, ended_at_last

MAX_GROWTH = 2000  # how much longer the steps of a tokenizer may make a text; ALBERT's: 594
MAX_WRITTEN = 100  # how much longer it may make what a model wrote
MAX_TOKENS = 1000  # that it may make of one
MAX_MULTIPLE = 1024  # tokens; the length of a text is padded to a multiple of it
MAX_PADDED = 131_072  # tokens to which a tokenizer pads every text
MAX_MADE = 5_000_000  # bytes and tokens that it may make of a batch of texts: each takes 300 bytes
MAX_TIMES = 4  # and so many of each byte of them; NFD makes three of one, in Korean
PIECE = 100  # letters that are normalised at a time, to count them: nothing stops it meanwhile
MAX_TOKEN = 10_000  # letters: of a Unigram model, the library ends by a signal at 160,000
MAX_WORD = 10_000  # letters of a word of WordPiece, for which it takes the cube of them as time
MAX_PATTERNS = 20_000  # letters: some take 15 kB of memory each
MAX_S = 30.0  # to tokenise texts; they take 1 s for each megabyte, and 40 microseconds for each
AT_LAST_S = 10.0  # after it
BYTES_A_S = 50_000  # for which there is more time
TEXTS_A_S = 100
MAX_OVERLAP = 10  # times that it may give each token, where its pieces of a text overlap
NO_LENGTH = 10**20  # transformers takes a length above it for none
BEFORE = ("normalizer", "pre_tokenizer")
TEMPLATES = ("single", "pair")
STEPS = {
    BEFORE: MAX_GROWTH,
    ("post_processor",): MAX_TOKENS,
    ("decoder",): MAX_WRITTEN,
}
BY_TYPE = {  # letters, or bytes of one, that a step can make of a letter, or tokens of a token
    "ByteLevel": 5,  # four bytes, and a space before them
    **dict.fromkeys(("NFC", "NFD"), 4),
    **dict.fromkeys(("NFKC", "NFKD"), 18),
    "BertNormalizer": 12,  # NFD, and a space on both sides
    **dict.fromkeys(("BertProcessing", "RobertaProcessing"), 3),
}
NORMAL = {"NFC", "NFD", "NFKC", "NFKD", "BertNormalizer", "ByteLevel"}  # of Unicode, or bytes
CUT = ("suffix", "pad_token", "word_delimiter_token")  # what a decoder replaces
# a regular expression of letters and classes, each once or more often: it matches no empty text
LETTERS = re.compile(
    r"(?:(?:[^\\\[\](){}|*?+.^$&]|\\[sSdDwWnrt]|\[[^\\\[\]&]+\])(?:\+|\{[1-9]\d*,\d*\})?)+"
)


def require_modest(label: str, document: Mapping[str, Any]) -> None:
    """Refuse a `tokenizer.json` that makes texts very long: before, as or after their tokens.

    And one with a token, a word or a pattern of such a length that the tokenizers library needs
    much memory or time, or ends the process.

    Raises:
        TokenizerError: its steps together may exceed MAX_GROWTH, MAX_TOKENS or MAX_WRITTEN, or a
            length exceeds MAX_TOKEN, MAX_WORD or MAX_PATTERNS.
    """
    for parts, limit in STEPS.items():
        total = 1
        for growth in _growth([document.get(part) for part in parts]):
            total *= growth
            if total > limit:
                problem = f"it may make a text more than {limit:,} times as long"
                remedy = "The file is damaged: use an intact copy."
                raise TokenizerError(f"{label}: tokenizer.json", problem, remedy)
    for what, length, limit in (
        ("a token", _longest_token(document.get("model")), MAX_TOKEN),
        ("`max_input_chars_per_word`: words", _longest_word(document.get("model")), MAX_WORD),
        ("patterns", sum(map(len, _patterns(document))), MAX_PATTERNS),
    ):
        if length > limit:
            problem = f"it has {what} of {length:,} letters, the limit is {limit:,}"
            remedy = "The file is damaged: use an intact copy."
            raise TokenizerError(f"{label}: tokenizer.json", problem, remedy)


def _longest_token(model: object) -> int:
    """The letters of the longest token of a model, whose vocabulary is a mapping or a list."""
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):
        entries = (entry[0] if isinstance(entry, list) and entry else entry for entry in vocabulary)
        vocabulary = [entry for entry in entries if isinstance(entry, str)]
    return max(map(len, vocabulary), default=0) if isinstance(vocabulary, list | Mapping) else 0


def _longest_word(model: object) -> float:
    return _number(model.get("max_input_chars_per_word")) if isinstance(model, Mapping) else 0


def _patterns(document: Mapping[str, Any]) -> Iterator[str]:
    """The regular expressions of all steps, and the texts in the place of one."""
    waiting: list[object] = [document.get(part) for parts in STEPS for part in parts]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            pattern = one.get("pattern")
            found = pattern.values() if isinstance(pattern, Mapping) else [pattern]
            yield from (text for text in found if isinstance(text, str))
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def require_modest_padding(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings in `tokenizer.json` or `tokenizer_config.json` that pad or repeat texts.

    Raises:
        TokenizerError: a number is above its limit; it names `where`.
    """
    padding, cut = (
        one if isinstance(one := settings.get(key), Mapping) else {}
        for key in ("padding", "truncation")
    )
    strategy = padding.get("strategy")
    fixed = strategy.get("Fixed") if isinstance(strategy, Mapping) else None
    if settings.get("padding") == "max_length":
        length = _number(settings.get("max_length") or settings.get("model_max_length"))
        fixed = length if length <= NO_LENGTH else None
    multiple = padding.get("pad_to_multiple_of") or settings.get("pad_to_multiple_of")
    for what, value, limit in (
        ("pads each text to", fixed, MAX_PADDED),
        ("pads each text to a multiple of", multiple, MAX_MULTIPLE),
    ):
        if _number(value) > limit:
            problem = f"it {what} {value:,} tokens, the limit is {limit:,}"
            raise TokenizerError(where, problem, "Use a copy of the model without this padding.")
    for one in (cut, settings):
        stride, length = _number(one.get("stride")), _number(one.get("max_length"))
        if stride and length > MAX_OVERLAP * max(0, length - stride):
            problem = f"it cuts texts into pieces of {length:,} tokens, of which {stride:,} overlap"
            remedy = f"Set `stride` to 0 in a copy: a token is in at most {MAX_OVERLAP} pieces."
            raise TokenizerError(where, problem, remedy)


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else 0


def limit_texts(label: str, tokenizer: Any, max_s: float = MAX_S) -> None:
    """Let a tokenizer of transformers refuse texts of which its steps make far more.

    It raises a TokenizerError then, before it tokenises them: code in Rust cannot be stopped. All
    its methods that tokenise call `_encode_plus`. If it takes very long for them, as a regular
    expression or a long word can, the process ends: after `max_s`, and what texts add to it.

    Raises:
        TokenizerError: as `require_modest`, of the steps of a tokenizer that may be made of other
            files.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # of a server, or in Python
        return
    steps = {name: getattr(backend, name, None) for parts in STEPS for name in parts}
    states = {name: read_json(step.__getstate__()) for name, step in steps.items() if step}
    require_modest(label, states)
    made, time_left = _Made.of(states, backend.normalizer), _TimeLeft(label, max_s)
    encode: Callable[..., Any] = tokenizer._encode_plus

    @functools.wraps(encode)
    def encode_within_limits(*args: Any, **options: Any) -> Any:
        texts = [*texts_in((*args[:2], options.get("text"), options.get("text_pair")))]
        n_bytes = _n_bytes(texts)
        with time_left.for_texts(len(texts), n_bytes):
            n_made, limit = made.number(texts, n_bytes), MAX_MADE + MAX_TIMES * n_bytes
            if n_made > limit:
                problem = f"it may make {n_made:,} bytes and tokens of a text of {n_bytes:,} bytes"
                remedy = "Use shorter texts, or a copy of the model with another tokenizer."
                raise TokenizerError(label, f"{problem}, the limit is {limit:,}", remedy)
            return encode(*args, **options)

    tokenizer._encode_plus = encode_within_limits


@dataclass
class _TimeLeft:
    """The seconds that a tokenizer may still take; each text that it is given adds some."""

    label: str
    seconds: float

    @contextmanager
    def for_texts(self, n_texts: int, n_bytes: int) -> Iterator[None]:
        """Take the time of the block, and end the process if that is too much."""
        self.seconds += n_bytes / BYTES_A_S + n_texts / TEXTS_A_S
        began = time.monotonic()
        problem = f"its tokenizer takes {self.seconds:.0f} s longer for its texts than others do"
        error = TokenizerError(self.label, problem, "Use a copy of the model with another one.")
        try:
            with ended_after(self.seconds, printable(f"lewis-hub: {error}")):
                yield
        finally:
            self.seconds -= time.monotonic() - began


@dataclass(frozen=True)
class _Made:
    """What the steps of a tokenizer make of texts."""

    normalizer: Any  # of the tokenizers library; None if there is none
    most: int  # times that a text becomes longer, at most
    written: int  # the same without what is counted: normal forms of Unicode, letters of bytes
    added: int  # tokens for each text
    repeats: int  # times that a template has a text

    @classmethod
    def of(cls, states: Mapping[str, Any], normalizer: Any) -> _Made:
        before, after = [states.get(part) for part in BEFORE], states.get("post_processor")
        return cls(
            normalizer=normalizer,
            most=math.prod(_growth(before)),
            written=math.prod(_growth(before, is_counted=True)),
            added=math.prod(_growth(after)),
            repeats=_repeats(after),
        )

    def number(self, texts: list[str], n_bytes: int) -> int:
        """The bytes and tokens of texts, at most."""
        n_made = n_bytes * self.most
        if n_made > MAX_MADE:  # else they need not be counted
            if self.normalizer:
                last_s = MAX_S + n_bytes / BYTES_A_S + AT_LAST_S
                with ended_at_last(last_s):  # in a piece no other thread runs, nor does Ctrl-C
                    n_bytes = _n_bytes(map(self.normalizer.normalize_str, _pieces(texts)))
            # in pieces a pattern may find less: what it writes is multiplied all the same
            n_made = min(n_made, n_bytes * self.written)
        return n_made * self.repeats + len(texts) * self.added


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def _n_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode(errors="surrogatepass")) for text in texts)


def _repeats(part: object) -> int:
    """How often the templates of a step, and of those inside of it, have one text."""
    if isinstance(part, list):
        return math.prod(map(_repeats, part))
    if not isinstance(part, dict):
        return 1
    templates = [pieces for key in TEMPLATES if isinstance(pieces := part.get(key), list)]
    named = [Counter(map(_name_of_text, pieces)) for pieces in templates]
    most = max((n for each in named for name, n in each.items() if name), default=1)
    return most * _repeats([value for value in part.values() if isinstance(value, list | dict)])


def _name_of_text(piece: object) -> str | None:
    text = piece.get("Sequence") if isinstance(piece, dict) else None
    return str(text.get("id")) if isinstance(text, dict) else None


def _growth(part: object, *, is_counted: bool = False) -> Iterator[int]:
    """How much longer each step inside a part can make a text.

    With `is_counted`, normal forms of Unicode are left out, and letters that are made of bytes, as
    the bytes of normal texts are known.
    """
    if isinstance(part, list):
        for item in part:
            yield from _growth(item, is_counted=is_counted)
    elif isinstance(part, dict):
        kind = str(part.get("type"))
        yield 1 if is_counted and kind in NORMAL else BY_TYPE.get(kind, 1)
        added = part.get("content")
        if isinstance(added, str):
            yield max(1, len(added) + ("pattern" in part and _may_be_empty(part["pattern"])))
        yield len(before) if isinstance(before := part.get("prepend"), str) and before else 1
        yield 2 ** [part.get(key) for key in CUT].count("")
        yield max(_tokens_of(part, key) for key in TEMPLATES)
        charsmap = part.get("precompiled_charsmap")
        if isinstance(charsmap, str) and not is_counted:
            yield _longest_replacement(charsmap)
        inside = [value for value in part.values() if isinstance(value, list | dict)]
        yield from _growth(inside, is_counted=is_counted)


def _tokens_of(part: Mapping[str, Any], key: str) -> int:
    """How many tokens a template makes of one: those of its special tokens, and each text again."""
    pieces, special = part.get(key), part.get("special_tokens")
    if not (isinstance(pieces, list) and isinstance(special, dict)):
        return 1
    ids = {name: one.get("ids") for name, one in special.items() if isinstance(one, dict)}
    named = Counter(_special_token(piece) for piece in pieces)
    return sum(n * _length(ids.get(name)) for name, n in named.items())


def _special_token(piece: object) -> str | None:
    token = piece.get("SpecialToken") if isinstance(piece, dict) else None
    name = token.get("id") if isinstance(token, dict) else None
    return name if isinstance(name, str) else None


def _length(ids: object) -> int:
    return len(ids) if isinstance(ids, list) else 1


def _may_be_empty(pattern: object) -> bool:
    """Whether what is replaced may be the place between two letters, which are kept."""
    if isinstance(pattern, dict) and isinstance(text := pattern.get("String"), str):
        return not text
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    return not (isinstance(expression, str) and LETTERS.fullmatch(expression))


def _longest_replacement(charsmap: str) -> int:
    """The bytes of the longest text in SentencePiece's map of characters.

    It has the size of a trie, the trie, and then the texts, each with a zero byte at its end.
    """
    with suppress(ValueError):  # the library refuses it
        content = base64.b64decode(charsmap)
        n_trie = int.from_bytes(content[:4], "little")
        return max(1, *map(len, content[4 + n_trie :].split(b"\0")))
    return 1
