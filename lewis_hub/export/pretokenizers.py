r"""Which of llama.cpp's pre-tokenizers splits a text as a `tokenizer.json` does.

llama.cpp knows a pre-tokenizer by a name, and its converter finds the name by the ids of a sample
text. Here the regular expressions themselves are compared. So a tokenizer with more tokens, or with
other ids, has the pre-tokenizer of the tokenizer that it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DIGITS = "single digits"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = CONTRACTIONS + WORDS + r"\p{N}{1,3}" + OTHERS + SPACES
QWEN2 = CONTRACTIONS + WORDS + r"\p{N}" + OTHERS + SPACES
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START = r"[^\r\n\p{L}\p{N}]?"
PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = f"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*" + r"|\p{N}" + PATHS + SPACES
GPT4O = (
    f"{START}{UPPER}*{LOWER}+{CONTRACTIONS}?|{START}{UPPER}+{LOWER}*{CONTRACTIONS}?"
    + r"|\p{N}{1,3}"
    + PATHS
    + SPACES
)
# splits in order, whether a whole word in the vocabulary needs no merges -> name
PRETOKENIZERS: dict[tuple[tuple[str | None, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
}


def pretokenizer_name(document: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level BPE; None: it has no such."""
    splits = tuple(_splits(document.get("pre_tokenizer")))
    ignores_merges = bool(document["model"].get("ignore_merges"))
    return PRETOKENIZERS.get((splits, ignores_merges))


def _splits(part: object) -> Iterator[str | None]:
    """Yield the regular expressions in order, None for a step that is not known."""
    step = part if isinstance(part, Mapping) else {}
    kind = step.get("type")
    if kind == "Sequence":
        for inner in step.get("pretokenizers", ()):
            yield from _splits(inner)
    elif kind == "Digits" and step.get("individual_digits"):
        yield DIGITS
    elif kind == "ByteLevel" and not step.get("add_prefix_space"):
        if step.get("use_regex", True):
            yield GPT2
    elif kind == "Split" and step.get("behavior") in ("Isolated", "Removed"):
        pattern = step.get("pattern")
        isolates = step["behavior"] == "Isolated" or bool(step.get("invert"))
        regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        yield regex if isolates else None
    else:
        yield None
