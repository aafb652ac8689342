"""Compare the tokenizers of the sources, and decide tokenizer and embeddings of the merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from huggingface_hub import HfApi

from lewis_hub import tokenizer
from lewis_hub.errors import TokenizerError
from lewis_hub.hub.fetch import read_small
from lewis_hub.merge.alignment import Alignment, Override, by_row, by_token, rows_of, token_tensors
from lewis_hub.merge.sidecars import TokenizerFiles
from lewis_hub.merge.token_matches import ROLE_FILES, read_roles
from lewis_hub.recipe.schema import CHAT_TEMPLATES
from lewis_hub.recipe.tokens import ModelToken, TokenEmbedding, Tokenizer
from lewis_hub.tokenizer import CONFIG, Translation, Vocabulary, disagreement, translation
from lewis_hub.workflow.open import MergeSources, OpenedSource
from lewis_hub.workflow.token_ids import Configuration, Moved, new_ids

FAST, GENERATION = "tokenizer.json", "generation_config.json"

N_SHOWN = 3


@dataclass(frozen=True)
class Tokens:
    """The tokenizer and token alignment of a merge."""

    carried: TokenizerFiles | None = None  # None: the base's tokenizer, unchanged
    alignment: Alignment | None = None  # None if row i is the same token in all sources
    # pinned source -> its ids of the base's tokens, if they differ
    translations: Mapping[str, Translation] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizerRequest:
    """The tokenizer settings of a recipe, and the small files of the models that are compared."""

    asked: Tokenizer | None  # None: the tokenizers must agree
    chat_template: str | None  # a name, a model or a text; None or `auto`: unchanged
    named: Mapping[str, OpenedSource]  # the models in these settings, by name
    models: tuple[OpenedSource, ...]  # first the source of the merge's tensors and configuration
    api: HfApi

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of the base's tensors with a row per token."""
        config = self.base.config
        n_tokens = (config.get("text_config") or config).get("vocab_size", config.get("vocab_size"))
        return tuple(token_tensors(self.base.checkpoint, n_tokens))

    @property
    def base(self) -> OpenedSource:
        """The source of the merge's tensors and configuration."""
        return self.models[0]

    def rows(self, source: OpenedSource) -> int:
        """Return the number of rows of a source's embeddings."""
        return rows_of(source.checkpoint, self.tensors)

    def is_alike(self, source: OpenedSource) -> bool:
        """Return whether a source has the same tokenizer files and number of rows as the base."""
        if self.rows(source) != self.rows(self.base):
            return False
        if source.pinned == self.base.pinned:
            return True
        ours, theirs = self.base.source.file(FAST), source.source.file(FAST)
        if not ours or not theirs or ours.digest != theirs.digest:
            return False
        added = "added_tokens_decoder"  # tokens that are not in `tokenizer.json`
        ours_added, theirs_added = self.read_json(self.base, CONFIG), self.read_json(source, CONFIG)
        return bool(ours_added.get(added) == theirs_added.get(added))

    def read(self, source: OpenedSource, *names: str) -> dict[str, bytes]:
        """Read small files; missing files are left out."""
        found = {name: read_small(self.api, source.source, name) for name in names}
        return {name: content for name, content in found.items() if content is not None}

    def read_json(self, source: OpenedSource, name: str) -> dict[str, Any]:
        """Read a small JSON file; empty if it is missing."""
        return tokenizer.json_object(source.name, self.read(source, name), name)

    def vocabulary(self, source: OpenedSource) -> Vocabulary | None:
        """Read a source's vocabulary; None if that would need its code."""
        return tokenizer.read_vocabulary(source.name, self.read(source, *tokenizer.FILES))


def _assembled(asked: Tokenizer, sources: TokenizerRequest) -> Tokens:
    """Align embeddings token by token for the tokenizer that the recipe names."""
    base = sources.base
    named = _named(asked, sources)
    carried = TokenizerFiles(named.pinned)
    changes = asked.tokens or asked.pad_to_multiple_of
    if not changes and all(map(sources.is_alike, sources.models)):
        same = named.pinned == base.pinned
        return Tokens(None if same else _with_ids(carried, sources, named, lambda i: i))
    if not sources.tensors:
        problem = "none of its tensors has as many rows as its config.json has tokens"
        remedy = "Remove `tokenizer_source`: its embeddings cannot be aligned by token."
        raise TokenizerError(base.name, problem, remedy)
    vocabularies = _vocabularies(sources)
    others = [vocabularies[s.pinned] for s in sources.models] if asked.source == "union" else []
    start = vocabularies[named.pinned]
    merged = tokenizer.unite(start, others, tuple(asked.tokens))
    n_rows = sources.rows(named)
    if asked.pad_to_multiple_of:
        n_rows = -(-merged.n_rows // asked.pad_to_multiple_of) * asked.pad_to_multiple_of
    elif merged is not start:
        n_rows = max(n_rows, merged.n_rows)
    alignment = by_token(
        merged, vocabularies, sources.tensors, n_rows, base.pinned, padding=named.pinned
    )
    overrides = {
        merged.ids[token]: override
        for token, one in asked.tokens.items()
        if (override := _override(sources, vocabularies, token, one))
    }
    if merged is not start:
        written = tokenizer.extended_files(merged, sources.read_json(named, CONFIG))
        carried = replace(carried, written=written, dropped=tokenizer.STALE)
    ours = vocabularies[base.pinned]
    translations = {
        source.pinned: translation(ours, vocabularies[source.pinned], sources.rows(source))
        for source in sources.models
        if disagreement(ours, vocabularies[source.pinned]) or sources.rows(source) < ours.n_rows
    }
    if n_rows != sources.rows(base):
        carried = replace(carried, config={"vocab_size": n_rows})
    if named.pinned != base.pinned:
        carried = _with_ids(carried, sources, named, _moved(ours, merged))
    return Tokens(carried, replace(alignment, overrides=overrides), translations)


def _named(asked: Tokenizer, sources: TokenizerRequest) -> OpenedSource:
    """Return the source whose tokenizer is copied, or extended to a union."""
    if asked.source in ("base", "union"):
        return sources.base
    found = sources.named[asked.source]
    if not any(map(found.source.file, (FAST, "vocab.json"))):
        remedy = "Name a model that has one, or write `base` or `union`."
        raise TokenizerError(f"tokenizer_source: {found.name}", "it has no tokenizer.json", remedy)
    return found


def _vocabularies(sources: TokenizerRequest) -> dict[str, Vocabulary]:
    """Return the vocabulary of each pinned source; an unknown one of equal length is the base's."""
    base = sources.vocabulary(sources.base)
    found: dict[str, Vocabulary] = {}
    for source in sources.models:
        alike = base is not None and sources.is_alike(source)
        own = base if alike or source.pinned == sources.base.pinned else sources.vocabulary(source)
        if own is None and base and sources.rows(source) == sources.rows(sources.base):
            own = base
        if own is None:
            problem = "it has no tokenizer.json, so the tokens of its rows are unknown"
            remedy = "Save its tokenizer with transformers' `AutoTokenizer` and `save_pretrained`."
            raise TokenizerError(source.name, problem, remedy)
        found[source.pinned] = own
    return found


def _override(
    sources: TokenizerRequest,
    vocabularies: Mapping[str, Vocabulary],
    token: str,
    one: TokenEmbedding,
) -> Override | None:
    if one.source is None:
        return None
    if one.model is None:
        return Override(None, is_forced=one.force)
    source = sources.named[one.model]
    asked = one.source if isinstance(one.source, ModelToken) else None
    text = asked.token if asked and asked.token is not None else token
    row = asked.token_id if asked else None
    row = vocabularies[source.pinned].ids.get(text) if row is None else row
    if row is None or row >= sources.rows(source):
        lacking = f"for {text!r}" if row is None else f"{row}: it has {sources.rows(source)}"
        problem = f"{source.name} has no row {lacking}"
        raise TokenizerError(f"tokenizer.tokens.{token}", problem, "Name a token that it has.")
    return Override(source.pinned, row, one.force)


def _moved(ours: Vocabulary, merged: Vocabulary) -> Moved:
    """Return a function from an id of the base's tokenizer to that of the same token."""
    tokens = {token_id: token for token, token_id in ours.ids.items()}
    used = frozenset(merged.ids.values())

    def moved(token_id: int) -> int | None:
        if token_id in tokens:
            return merged.ids.get(tokens[token_id])
        return None if token_id in used else token_id  # a row of padding in both

    return moved


def _with_ids(
    carried: TokenizerFiles, sources: TokenizerRequest, named: OpenedSource, moved: Moved
) -> TokenizerFiles:
    """Set the ids of special tokens for the tokenizer of another model than the base."""
    vocabulary = sources.vocabulary(named)
    texts = read_roles(named.name, sources.read(named, *ROLE_FILES))
    ids = vocabulary.ids if vocabulary else {}
    roles = {role: ids[token] for role, token in texts.items() if token in ids}
    model, donor = (
        Configuration(one.name, one.config, sources.read_json(one, GENERATION))
        for one in (sources.base, named)
    )
    new = new_ids(model, donor, roles, moved)
    config = {**carried.config, **new.config}
    return replace(carried, config=config, generation=new.generation)


def compare_tokenizers(request: TokenizerRequest) -> Tokens:
    """Compare the tokenizers of sources, and decide on the tokenizer of the merge."""
    try:
        asked = request.asked
        return _with_template(_assembled(asked, request) if asked else _agreeing(request), request)
    except TokenizerError as error:
        return Tokens(problems=(str(error),))


def calibration_notes(sources: MergeSources) -> list[str]:
    """Return notes on sources that may lack tokens of the calibration texts."""
    return [
        f"{source.name} lacks {_listed([*source.translation.lacking.values()])} of "
        f"{sources.donor.name}, whose tokenizer cuts the calibration texts. A text with such a "
        "token is refused."
        for source in sources.distinct
        if source.translation and source.translation.lacking
    ]


def _agreeing(sources: TokenizerRequest) -> Tokens:
    """Require that tokenizers agree; tokens that the base lacks are dropped as padding."""
    others = [s for s in sources.models if not sources.is_alike(s)]
    base = sources.vocabulary(sources.base) if others else None
    if base is None:
        return Tokens()
    problems, notes, translations = [], [], {}
    for source in others:
        own = sources.vocabulary(source)
        if own is None:
            if sources.rows(source) != sources.rows(sources.base):
                return Tokens()  # the tokens of the rows are unknown, so the check compares shapes
            continue
        clash = disagreement(base, own)
        if clash:
            problems.append(
                f"{clash}, so the rows of their embeddings are different tokens. Set "
                "`tokenizer_source`: with `base` the merge has the base's tokens, with `union` "
                "those of all models."
            )
        elif extra := sorted(own.ids.keys() - base.ids.keys(), key=own.ids.__getitem__):
            notes.append(
                f"{source.name} has {_listed(extra)}, which the base's tokenizer lacks; "
                "`tokenizer_source: union` would keep them."
            )
        if clash or sources.rows(source) < base.n_rows:
            translations[source.pinned] = translation(base, own, sources.rows(source))
    every = [source.checkpoint for source in sources.models]
    differ = len({sources.rows(source) for source in sources.models}) > 1
    alignment = by_row(every[0], every, sources.tensors) if differ and not problems else None
    return Tokens(None, alignment, translations, tuple(problems), tuple(notes))


def _with_template(found: Tokens, sources: TokenizerRequest) -> Tokens:
    asked = sources.chat_template
    if asked is None or asked == "auto":
        return found
    text = tokenizer.shipped_template(asked) if asked in CHAT_TEMPLATES else asked
    if source := sources.named.get(asked):
        own = tokenizer.template_of(source.name, sources.read(source, *tokenizer.TEMPLATE_SOURCES))
        if own is None:
            problem, remedy = "has no chat template", "Name a model that has one, or give its text."
            raise TokenizerError("chat_template", f"{source.name} {problem}", remedy)
        text = own
    carried = found.carried or TokenizerFiles(sources.base.pinned)
    donor = next(s for s in sources.models if s.pinned == carried.source)
    changed = carried.written.get(CONFIG)
    config = json.loads(changed) if changed else sources.read_json(donor, CONFIG)
    written = {**carried.written, **tokenizer.template_files(text, config)}
    dropped = (*carried.dropped, *tokenizer.OTHER_TEMPLATES)
    return replace(found, carried=replace(carried, written=written, dropped=dropped))


def _listed(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:N_SHOWN]))
    if len(tokens) > N_SHOWN:
        return f"{len(tokens)} tokens ({shown}, ...)"
    return f"the token{'s' * (len(tokens) > 1)} {shown}"
