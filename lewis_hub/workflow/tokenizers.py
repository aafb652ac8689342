"""Compare the tokenizers of the sources, and decide tokenizer and embeddings of the merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import TokenizerError
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.source import Source
from lewis_hub.merge.alignment import Alignment, Override, by_row, by_token, rows_of, token_tensors
from lewis_hub.recipe.schema import CHAT_TEMPLATES, ModelToken, TokenEmbedding, Tokenizer
from lewis_hub.tokenizer import (
    CONFIG,
    FILES,
    OTHER_TEMPLATES,
    STALE,
    TEMPLATE_SOURCES,
    Translation,
    Vocabulary,
    disagreement,
    extended_files,
    json_object,
    read_vocabulary,
    shipped_template,
    template_files,
    template_of,
    translation,
    unite,
)
from lewis_hub.workflow.open import MergeSources, OpenedSources

if TYPE_CHECKING:
    from huggingface_hub import HfApi


FAST = "tokenizer.json"

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
N_SHOWN = 3


@dataclass(frozen=True)
class Carried:
    """The differences between the merge's and the base's tokenizer; see `TokenizerFiles`."""

    donor: str  # pinned
    written: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """The tokenizer and token alignment of a merge.

    Attributes:
        carried: None: the base's tokenizer, unchanged.
        alignment: None if row i is the same token in all sources.
        translations: pinned source -> its ids of the base's tokens, if they differ.
    """

    carried: Carried | None = None
    alignment: Alignment | None = None
    translations: Mapping[str, Translation] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizerRequest:
    """The tokenizer settings of a recipe.

    Attributes:
        tokenizer: None: the tokenizers must agree.
        chat_template: a name, a model or a text; None or `auto`: unchanged.
        named: pinned sources of the models in these settings, by name.
    """

    tokenizer: Tokenizer | None
    chat_template: str | None
    named: Mapping[str, Source]


@dataclass(frozen=True)
class TokenizerSources:
    """The small files of tokenizers, and the number of rows of their embeddings."""

    models: tuple[Source, ...]  # first the source of the merge's tensors and configuration
    api: HfApi
    checkpoints: Mapping[str, Checkpoint]
    configs: Mapping[str, Mapping[str, Any]]
    tensors: tuple[str, ...]  # names of the base's tensors with a row per token

    @property
    def base(self) -> Source:
        """The source of the merge's tensors and configuration."""
        return self.models[0]

    def rows(self, source: Source) -> int:
        """Return the number of rows of a source's embeddings."""
        return rows_of(self.checkpoints[source.pinned], self.tensors)

    def is_alike(self, source: Source) -> bool:
        """Return whether a source has the same tokenizer files and number of rows as the base."""
        if self.rows(source) != self.rows(self.base):
            return False
        ours, theirs = self.base.file(FAST), source.file(FAST)
        same = bool(ours and theirs and ours.digest == theirs.digest)
        return source is self.base or (same and self._later(source) == self._later(self.base))

    def read(self, source: Source, *names: str) -> dict[str, bytes]:
        """Read small files; missing files are left out."""
        found = {name: read_small(self.api, source, name) for name in names}
        return {name: content for name, content in found.items() if content is not None}

    def read_json(self, source: Source, name: str) -> dict[str, Any]:
        """Read a small JSON file; empty if it is missing."""
        return json_object(source.name, self.read(source, name), name)

    def _later(self, source: Source) -> object:
        """Return the added tokens, which are not in `tokenizer.json`."""
        return self.read_json(source, CONFIG).get("added_tokens_decoder")

    def vocabulary(self, source: Source) -> Vocabulary | None:
        """Read a source's vocabulary; None if that would need its code."""
        return read_vocabulary(source.name, self.read(source, *FILES))


def _assembled(
    asked: Tokenizer, named_sources: Mapping[str, Source], sources: TokenizerSources
) -> Tokens:
    """Align embeddings token by token for the tokenizer that the recipe names."""
    base = sources.base
    named = _named(asked, named_sources, sources)
    carried = Carried(named.pinned)
    changes = asked.tokens or asked.pad_to_multiple_of
    if not changes and all(map(sources.is_alike, sources.models)):
        return Tokens(carried if named is not base else None)
    if not sources.tensors:
        problem = "none of its tensors has as many rows as its config.json has tokens"
        remedy = "Remove `tokenizer_source`: its embeddings cannot be aligned by token."
        raise TokenizerError(base.name, problem, remedy)
    vocabularies = _vocabularies(sources)
    others = [vocabularies[s.pinned] for s in sources.models] if asked.source == "union" else []
    start = vocabularies[named.pinned]
    merged = unite(start, others, tuple(asked.tokens))
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
        if (override := _override(named_sources, sources, vocabularies, token, one))
    }
    if merged is not start:
        written = extended_files(merged, sources.read_json(named, CONFIG))
        carried = replace(carried, written=written, dropped=STALE)
    ours = vocabularies[base.pinned]
    translations = {
        source.pinned: translation(ours, vocabularies[source.pinned], sources.rows(source))
        for source in sources.models
        if disagreement(ours, vocabularies[source.pinned]) or sources.rows(source) < ours.n_rows
    }
    carried = _with_ids(carried, sources, named, n_rows)
    return Tokens(carried, replace(alignment, overrides=overrides), translations)


def _named(asked: Tokenizer, named: Mapping[str, Source], sources: TokenizerSources) -> Source:
    """Return the source whose tokenizer is copied, or extended to a union."""
    if asked.source in ("base", "union"):
        return sources.base
    found = named[asked.source]
    if not any(map(found.file, ("tokenizer.json", "vocab.json"))):
        remedy = "Name a model that has one, or write `base` or `union`."
        raise TokenizerError(f"tokenizer_source: {found.name}", "it has no tokenizer.json", remedy)
    return found


def _vocabularies(sources: TokenizerSources) -> dict[str, Vocabulary]:
    """Return the vocabulary of each pinned source; an unknown one of equal length is the base's."""
    base = sources.vocabulary(sources.base)
    found: dict[str, Vocabulary] = {}
    for source in sources.models:
        alike = base is not None and sources.is_alike(source)
        own = base if alike or source is sources.base else sources.vocabulary(source)
        if own is None and base and sources.rows(source) == sources.rows(sources.base):
            own = base
        if own is None:
            problem = "it has no tokenizer.json, so the tokens of its rows are unknown"
            remedy = "Save its tokenizer with transformers' `AutoTokenizer` and `save_pretrained`."
            raise TokenizerError(source.name, problem, remedy)
        found[source.pinned] = own
    return found


def _override(
    named: Mapping[str, Source],
    sources: TokenizerSources,
    vocabularies: Mapping[str, Vocabulary],
    token: str,
    one: TokenEmbedding,
) -> Override | None:
    if one.source is None:
        return None
    if one.model is None:
        return Override(None, is_forced=one.force)
    source = named[one.model]
    asked = one.source if isinstance(one.source, ModelToken) else None
    text = asked.token if asked and asked.token is not None else token
    row = asked.token_id if asked else None
    row = vocabularies[source.pinned].ids.get(text) if row is None else row
    if row is None or row >= sources.rows(source):
        problem = (
            f"{source.name} has no row for {text!r}"
            if row is None
            else (f"{source.name} has no row {row}: it has {sources.rows(source)}")
        )
        raise TokenizerError(f"tokenizer.tokens.{token}", problem, "Name a token that it has.")
    return Override(source.pinned, row, one.force)


def _with_ids(carried: Carried, sources: TokenizerSources, named: Source, n_rows: int) -> Carried:
    """Set vocabulary size and special token ids in the configurations."""
    config: dict[str, Any] = {}
    if n_rows != sources.rows(sources.base):
        config["vocab_size"] = n_rows
    if named is sources.base:
        return replace(carried, config=config)
    config_of_named = sources.configs[named.pinned]
    generation = sources.read_json(named, "generation_config.json")
    inner = config_of_named.get("text_config") or {}
    own = {key: config_of_named.get(key, inner.get(key)) for key in SPECIAL}
    return replace(
        carried,
        config=config | own,
        generation={key: generation.get(key, own[key]) for key in SPECIAL},
    )


def compare_tokenizers(
    request: TokenizerRequest,
    models: Sequence[Source],
    api: HfApi,
    opened: OpenedSources,
    checkpoints: Mapping[str, Checkpoint],
) -> Tokens:
    """Compare the tokenizers of sources, and decide on the tokenizer of the merge.

    `models` begins with the source of the merge's tensors and configuration.
    """
    donor = models[0].pinned
    config = opened.configs[donor]
    n_tokens = (config.get("text_config") or config).get("vocab_size", config.get("vocab_size"))
    tensors = token_tensors(checkpoints[donor], n_tokens)
    sources = TokenizerSources(tuple(models), api, checkpoints, opened.configs, tensors)
    asked = request.tokenizer
    try:
        found = _assembled(asked, request.named, sources) if asked else _agreeing(sources)
        return _with_template(request, found, sources)
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


def _agreeing(sources: TokenizerSources) -> Tokens:
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
    every = [sources.checkpoints[source.pinned] for source in sources.models]
    differ = len({sources.rows(source) for source in sources.models}) > 1
    alignment = by_row(every[0], every, sources.tensors) if differ and not problems else None
    return Tokens(None, alignment, translations, tuple(problems), tuple(notes))


def _with_template(request: TokenizerRequest, found: Tokens, sources: TokenizerSources) -> Tokens:
    asked = request.chat_template
    if asked is None or asked == "auto":
        return found
    text = shipped_template(asked) if asked in CHAT_TEMPLATES else asked
    if asked in request.named:
        text = _template_of(request.named[asked], sources)
    carried = found.carried or Carried(sources.base.pinned)
    donor = next(s for s in sources.models if s.pinned == carried.donor)
    changed = carried.written.get(CONFIG)
    config = json.loads(changed) if changed else sources.read_json(donor, CONFIG)
    written = {**carried.written, **template_files(text, config)}
    dropped = (*carried.dropped, *OTHER_TEMPLATES)
    return replace(found, carried=replace(carried, written=written, dropped=dropped))


def _template_of(source: Source, sources: TokenizerSources) -> str:
    text = template_of(source.name, sources.read(source, *TEMPLATE_SOURCES))
    if text is None:
        remedy = "Name a model that has one, or give its text."
        raise TokenizerError("chat_template", f"{source.name} has no chat template", remedy)
    return text


def _listed(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:N_SHOWN]))
    if len(tokens) > N_SHOWN:
        return f"{len(tokens)} tokens ({shown}, ...)"
    return f"the token{'s' * (len(tokens) > 1)} {shown}"
