"""Unite tokenizers: add the tokens of others to the base's, and write tokenizer files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import count
from typing import Any

from lewis_hub.errors import TokenizerError
from lewis_hub.tokenizer.vocabulary import Flags, Vocabulary, json_object, load

PLAIN: Flags = {  # a token that a recipe names, as transformers' `add_tokens` makes it
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}
UNLIKELY = 10.0  # how far below all other scores an added token is in a Unigram model

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
# describe the base's vocabulary; tokenizer.json has it all
STALE = ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model")
KEEPERS = (TEMPLATE, CONFIG, "chat_template.json")  # files with a chat template; the first counts
TEMPLATES = ("chat_template.json", "additional_chat_templates")  # would clash with `TEMPLATE`


@dataclass(frozen=True)
class _Pieces:
    """The tokens of one source's model that are new in the merge, in the order of their ids."""

    of: Vocabulary
    tokens: Sequence[str]

    @property
    def scores(self) -> Mapping[str, float]:
        """Their scores in a Unigram model."""
        assert self.of.document  # `unite` refuses a tokenizer without it
        scores = dict(self.of.document["model"]["vocab"])
        return {token: scores[token] for token in self.tokens}

    @property
    def merges(self) -> Iterator[tuple[str, str]]:
        """The merges of a BPE model that make the new tokens."""
        assert self.of.document  # `unite` refuses a tokenizer without it
        model, new = self.of.document["model"], set(self.tokens)
        prefix = model.get("continuing_subword_prefix") or ""
        for left, right in _merges(model):
            if left + right.removeprefix(prefix) in new:
                yield left, right


def unite(base: Vocabulary, others: Sequence[Vocabulary], wanted: Sequence[str] = ()) -> Vocabulary:
    """Add the tokens of other tokenizers to the base's; the base's tokens keep their ids.

    First come the tokens of the others' models; their merges follow all merges of the base, so a
    text is split as the base splits it, then its parts are joined further. Then come the added
    tokens of the others with their flags; those of the first source count.

    Args:
        base: the tokenizer that is extended.
        others: in the order in which their tokens get ids.
        wanted: tokens to add if no tokenizer has them.

    Raises:
        TokenizerError: a tokenizer has no `tokenizer.json`, or spells its tokens in another way.
    """
    ids, numbers = dict(base.ids), count(base.n_rows)
    pieces = []
    for other in others:
        new = [t for t in sorted(other.ids, key=other.ids.__getitem__) if t not in ids]
        own = [token for token in new if token not in other.added]
        _require_same_kind(base, other, own)
        pieces += [_Pieces(other, own)] if own else []
        ids |= zip(own, numbers, strict=False)
    added: dict[str, Flags] = {}
    for other in others:
        added |= {t: flags for t, flags in other.added.items() if t not in ids and t not in added}
    added |= {token: PLAIN for token in wanted if token not in ids and token not in added}
    ids |= zip(added, numbers, strict=False)
    if not pieces and not added:
        return base
    document = _extended(base, ids, pieces, {**base.added, **added})
    loaded = load("the merge", document).get_vocab(with_added_tokens=True)
    if loaded != ids:
        n_moved = sum(loaded.get(token) != token_id for token, token_id in ids.items())
        problem = f"{n_moved} of its tokens get other ids when it is loaded"
        raise TokenizerError("union of the tokenizers", problem, "Set `tokenizer_source: base`.")
    return Vocabulary("the merge", ids, {**base.added, **added}, document)


def _require_same_kind(base: Vocabulary, other: Vocabulary, own: Sequence[str]) -> None:
    if own and other.document is None:
        raise _not_fast(other)
    if own and other.kind != base.kind:
        raise TokenizerError(
            f"{other.label}: tokenizer.json",
            f"its tokenizer ({other.kind}) cannot be united with that of {base.label} "
            f"({base.kind}): {len(own)} of its tokens, such as {own[0]!r}, "
            "could never occur in a text",
            "Set `tokenizer_source` to `base` or to one of the models.",
        )


def _not_fast(vocabulary: Vocabulary) -> TokenizerError:
    problem = "it has no tokenizer.json, which is needed to add tokens"
    remedy = "Save its tokenizer again with transformers' `AutoTokenizer` and `save_pretrained`, "
    return TokenizerError(vocabulary.label, problem, remedy + "or set `tokenizer_source: base`.")


def _extended(
    base: Vocabulary,
    ids: Mapping[str, int],
    pieces: Sequence[_Pieces],
    added: Mapping[str, Flags],
) -> dict[str, Any]:
    """The base's `tokenizer.json` with the new tokens of the models and new added tokens."""
    if base.document is None:
        raise _not_fast(base)
    document: dict[str, Any] = copy.deepcopy(dict(base.document))
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
        model["vocab"] |= {token: ids[token] for token in tokens}
    if model["type"] == "BPE":
        merges = (*_merges(model), *(merge for new in pieces for merge in new.merges))
        model["merges"] = [list(merge) for merge in dict.fromkeys(merges)]
    return document


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The merges as pairs; older files write them as strings with a space."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def extended(vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, str]:
    """The files of a tokenizer with new tokens, by name.

    Args:
        vocabulary: with its `tokenizer.json`.
        config: the content of the base's `tokenizer_config.json`; empty if it has none.
    """
    written = {"tokenizer.json": _json(vocabulary.document)}
    if "added_tokens_decoder" in config:
        decoder = {
            str(vocabulary.ids[token]): {"content": token, **flags}
            for token, flags in vocabulary.added.items()
        }
        written[CONFIG] = _json({**config, "added_tokens_decoder": decoder})
    return written


def with_template(template: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The files of a chat template, by name.

    Args:
        template: its text.
        config: the content of `tokenizer_config.json`, whose own template is removed.
    """
    kept = {key: value for key, value in config.items() if key != "chat_template"}
    return {TEMPLATE: template} | ({CONFIG: _json(kept)} if len(kept) < len(config) else {})


def built_in(name: str) -> str:
    """The text of one of `recipe.schema.CHAT_TEMPLATES`."""
    file = resources.files("lewis_hub.templates").joinpath("chat", f"{name}.jinja")
    return file.read_text(encoding="utf-8")


def template_of(label: str, files: Mapping[str, bytes]) -> str | None:
    """A source's chat template; None if it has none.

    Args:
        label: the source, for messages.
        files: name -> content of those of `KEEPERS` that the source has.

    Raises:
        TokenizerError: a file is broken.
    """
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8", errors="replace")
    for name in KEEPERS[1:]:
        template = json_object(label, files, name).get("chat_template")
        if isinstance(template, list):  # several with names
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def _json(document: object) -> str:
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"
