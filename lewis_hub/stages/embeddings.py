"""Embeddings that are put together token by token, for the tokenizer that the recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lewis_hub.errors import TokenizerError
from lewis_hub.hub.source import Source
from lewis_hub.merge.alignment import Override
from lewis_hub.merge.vocabularies import by_token
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_tokenizer import ModelToken, TokenEmbedding, Tokenizer
from lewis_hub.stages.sources import source_of
from lewis_hub.stages.tokenizers import Carried, Sources, Tokens
from lewis_hub.vocabulary import files
from lewis_hub.vocabulary.tokens import Vocabulary, disagreement
from lewis_hub.vocabulary.translation import translation
from lewis_hub.vocabulary.union import unite

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def assembled(recipe: Recipe, asked: Tokenizer, sources: Sources) -> Tokens:
    """Embeddings are put together token by token, for the tokenizer that is asked for."""
    inputs, base = sources.inputs, sources.base
    named = _named(recipe, asked, sources)
    carried = Carried(named.pinned)
    changes = asked.tokens or asked.pad_to_multiple_of
    if not changes and all(map(sources.is_alike, inputs.models)):
        return Tokens(carried if named is not base else None)
    if not sources.tensors:
        problem = "none of its tensors has as many rows as its config.json says there are tokens"
        remedy = "Leave `tokenizer_source` out: its embeddings cannot be put together by token."
        raise TokenizerError(base.name, problem, remedy)
    vocabularies = _vocabularies(sources)
    others = [vocabularies[s.pinned] for s in inputs.models] if asked.source == "union" else []
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
        if (override := _override(recipe, sources, vocabularies, token, one))
    }
    if merged is not start:
        written = files.extended(merged, sources.read_json(named, files.CONFIG))
        carried = replace(carried, written=written, dropped=files.STALE)
    ours = vocabularies[base.pinned]
    translations = {
        source.pinned: translation(ours, vocabularies[source.pinned], sources.rows(source))
        for source in inputs.models
        if disagreement(ours, vocabularies[source.pinned]) or sources.rows(source) < ours.n_rows
    }
    carried = _with_ids(carried, sources, named, n_rows)
    return Tokens(carried, replace(alignment, overrides=overrides), translations)


def _named(recipe: Recipe, asked: Tokenizer, sources: Sources) -> Source:
    """The source whose tokenizer is carried, or extended to a union."""
    if asked.source in ("base", "union"):
        return sources.base
    named = source_of(recipe, sources.inputs, asked.source)
    if not any(map(named.file, ("tokenizer.json", "vocab.json"))):
        remedy = "Name a model that has one, or write `base` or `union`."
        raise TokenizerError(f"tokenizer_source: {named.name}", "it has no tokenizer.json", remedy)
    return named


def _vocabularies(sources: Sources) -> dict[str, Vocabulary]:
    """Of all sources, by pinned source; one that tells nothing and is as long has the base's."""
    base = sources.vocabulary(sources.base)
    found: dict[str, Vocabulary] = {}
    for source in sources.inputs.models:
        alike = base is not None and sources.is_alike(source)
        own = base if alike or source is sources.base else sources.vocabulary(source)
        if own is None and base and sources.rows(source) == sources.rows(sources.base):
            own = base
        if own is None:
            problem = "it has no tokenizer.json, so nothing tells which token a row is for"
            remedy = "Save its tokenizer with transformers' `AutoTokenizer` and `save_pretrained`."
            raise TokenizerError(source.name, problem, remedy)
        found[source.pinned] = own
    return found


def _override(
    recipe: Recipe,
    sources: Sources,
    vocabularies: Mapping[str, Vocabulary],
    token: str,
    one: TokenEmbedding,
) -> Override | None:
    if one.source is None:
        return None
    if one.model is None:
        return Override(None, is_forced=one.force)
    source = source_of(recipe, sources.inputs, one.model)
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


def _with_ids(carried: Carried, sources: Sources, named: Source, n_rows: int) -> Carried:
    """Numbers in the configurations that follow the tokenizer."""
    config: dict[str, Any] = {}
    if n_rows != sources.rows(sources.base):
        config["vocab_size"] = n_rows
    if named is sources.base:
        return replace(carried, config=config)
    told = sources.configs[named.pinned]
    generation = sources.read_json(named, "generation_config.json")
    inner = told.get("text_config") or {}
    own = {key: told.get(key, inner.get(key)) for key in SPECIAL}
    return replace(
        carried,
        config=config | own,
        generation={key: generation.get(key, own[key]) for key in SPECIAL},
    )
