"""Several tokenizers as one: the base's, and what the others know besides."""

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
UNLIKELY = 10.0  # below all other scores: a Unigram piece that only added tokens lead to


@dataclass(frozen=True)
class _Pieces:
    """Tokens of one source's model that are new to the merge, in the order of their ids."""

    of: Vocabulary
    tokens: Sequence[str]

    @property
    def scores(self) -> Mapping[str, float]:
        """Of a Unigram model."""
        assert self.of.document  # a tokenizer without one is not united
        told = dict(self.of.document["model"]["vocab"])
        return {token: told[token] for token in self.tokens}

    @property
    def merges(self) -> Iterator[tuple[str, str]]:
        """Of a BPE model: those that lead to the new tokens."""
        assert self.of.document  # a tokenizer without one is not united
        model, new = self.of.document["model"], set(self.tokens)
        prefix = model.get("continuing_subword_prefix") or ""
        for left, right in _merges(model):
            if left + right.removeprefix(prefix) in new:
                yield left, right


def unite(base: Vocabulary, others: Sequence[Vocabulary], wanted: Sequence[str] = ()) -> Vocabulary:
    """Add the tokens of other tokenizers to the base's; all ids of the base stay.

    First come the pieces of the others' models, with the merges that lead to them after all of the
    base's: texts are cut as the base cuts them, and the parts joined further. Then come the tokens
    that were added to the others, with their flags: the first source's where several have one.

    Args:
        base: whose tokenizer is extended.
        others: in the order in which their tokens get ids.
        wanted: tokens to add where none of them has them.

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
    found = load("the merge", document).get_vocab(with_added_tokens=True)
    if found != ids:
        problem = f"{sum(found.get(t) != i for t, i in ids.items())} of its tokens get other ids"
        raise TokenizerError("union of the tokenizers", problem, "Set `tokenizer_source: base`.")
    return Vocabulary("the merge", ids, {**base.added, **added}, document)


def _require_same_kind(base: Vocabulary, other: Vocabulary, own: Sequence[str]) -> None:
    if own and other.document is None:
        raise _not_fast(other)
    if own and other.kind != base.kind:
        raise TokenizerError(
            f"{other.label}: tokenizer.json",
            f"its tokenizer ({other.kind}) cannot be united with that of {base.label} "
            f"({base.kind}): {len(own)} of its tokens, such as {own[0]!r}, would never be met",
            "Set `tokenizer_source` to `base` or to one of the models.",
        )


def _not_fast(vocabulary: Vocabulary) -> TokenizerError:
    problem = "it has no tokenizer.json, which a tokenizer that gets new tokens needs"
    remedy = "Save its tokenizer again with transformers' `AutoTokenizer` and `save_pretrained`, "
    return TokenizerError(vocabulary.label, problem, remedy + "or set `tokenizer_source: base`.")


def _extended(
    base: Vocabulary,
    ids: Mapping[str, int],
    pieces: Sequence[_Pieces],
    added: Mapping[str, Flags],
) -> dict[str, Any]:
    """The base's `tokenizer.json` with new pieces and new added tokens."""
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
    # pieces lie above the base's added tokens, which keep their ids only if the model has them
    if model["type"] == "Unigram":
        lowest = min((score for _, score in model["vocab"]), default=0.0) - UNLIKELY
        scores = {token: score for one in pieces for token, score in one.scores.items()}
        later = sorted(ids, key=ids.__getitem__)[len(model["vocab"]) :]
        model["vocab"] += [[token, scores.get(token, lowest)] for token in later]
    else:
        new = {token for one in pieces for token in one.tokens} | set(added)
        model["vocab"] |= {token: ids[token] for token in new}
    if model["type"] == "BPE":
        merges = (*_merges(model), *(merge for one in pieces for merge in one.merges))
        model["merges"] = [list(merge) for merge in dict.fromkeys(merges)]
    return document


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """As pairs, also where the file has them as texts with a space between."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


# They would say something else than tokenizer.json, which has all that they say.
STALE = ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model")
TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
KEEPERS = (TEMPLATE, CONFIG, "chat_template.json")  # of a template; the first that has one counts
TEMPLATES = ("chat_template.json", "additional_chat_templates")  # others; beside the one they clash


def extended(vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, str]:
    """The files of a tokenizer that got new tokens.

    Args:
        vocabulary: with its `tokenizer.json`.
        config: the `tokenizer_config.json` that it extends; empty where there is none.
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
    """The files that carry a chat template.

    Args:
        template: its text.
        config: the `tokenizer_config.json` beside it, from which any template is taken out.
    """
    kept = {key: value for key, value in config.items() if key != "chat_template"}
    return {TEMPLATE: template} | ({CONFIG: _json(kept)} if len(kept) < len(config) else {})


def built_in(name: str) -> str:
    """The text of one of `recipe.schema.CHAT_TEMPLATES`."""
    place = resources.files("lewis_hub.templates").joinpath("chat", f"{name}.jinja")
    return place.read_text(encoding="utf-8")


def template_of(label: str, files: Mapping[str, bytes]) -> str | None:
    """A source's chat template, wherever it keeps it; None where it has none.

    Args:
        label: the source, for messages.
        files: the content of those of `KEEPERS` that the source has.

    Raises:
        TokenizerError: a file is broken.
    """
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8", errors="replace")
    for name in KEEPERS[1:]:
        found = json_object(label, files, name).get("chat_template")
        if isinstance(found, list):  # several with names
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"
