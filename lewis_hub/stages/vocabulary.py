"""Vocabulary: which token each row stands for, in the sources and in the merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import TokenizerError
from lewis_hub.merge.vocabularies import by_row, token_tensors
from lewis_hub.recipe import Recipe
from lewis_hub.recipe_tokenizer import CHAT_TEMPLATES
from lewis_hub.stages.embeddings import assembled
from lewis_hub.stages.slicing import at_the_ends
from lewis_hub.stages.sources import Inputs, measures_on_texts, source_of
from lewis_hub.stages.tokenizers import Carried, Sources, Tokens
from lewis_hub.vocabulary import files
from lewis_hub.vocabulary.tokens import disagreement
from lewis_hub.vocabulary.translation import translation

if TYPE_CHECKING:
    from huggingface_hub import HfApi

N_SHOWN = 3


def examine_tokens(
    recipe: Recipe,
    inputs: Inputs,
    api: HfApi,
    checkpoints: Mapping[str, Checkpoint],
    configs: Mapping[str, Mapping[str, Any]],
) -> Tokens:
    """Hold the tokenizers against each other, and decide on that of the merge."""
    config = configs[inputs.donor.pinned]
    n_tokens = (config.get("text_config") or config).get("vocab_size", config.get("vocab_size"))
    tensors = token_tensors(checkpoints[inputs.donor.pinned], n_tokens)
    sources = Sources(inputs, api, checkpoints, configs, tensors)
    asked = recipe.asked_tokenizer
    if recipe.slices and not asked and not measures_on_texts(recipe):
        sources = replace(sources, inputs=at_the_ends(recipe, inputs))
    try:
        found = assembled(recipe, asked, sources) if asked else _agreeing(sources)
        return _with_template(recipe, found, sources)
    except TokenizerError as error:
        return Tokens(problems=(str(error),))


def calibration_notes(recipe: Recipe, inputs: Inputs, tokens: Tokens) -> list[str]:
    """Sources that may lack tokens of the calibration texts, which are not drawn yet."""
    found = tokens.translations if measures_on_texts(recipe) else {}
    return [
        f"{source.name} lacks {_listed([*found[source.pinned].lacking.values()])} of "
        f"{inputs.donor.name}, whose tokenizer cuts the calibration texts: a text that has one is "
        "refused."
        for source in dict.fromkeys(inputs.models)
        if source.pinned in found and found[source.pinned].lacking
    ]


def _agreeing(sources: Sources) -> Tokens:
    """Nothing was asked: tokenizers must agree, and what one has beyond the others is padding."""
    others = [s for s in sources.inputs.models if not sources.is_alike(s)]
    base = sources.vocabulary(sources.base) if others else None
    if base is None:
        return Tokens()
    problems, notes, translations = [], [], {}
    for source in others:
        own = sources.vocabulary(source)
        if own is None:
            if sources.rows(source) != sources.rows(sources.base):
                return Tokens()  # the check tells the shapes: nobody knows what the rows mean
            continue
        clash = disagreement(base, own)
        if clash:
            problems.append(
                f"{clash}, so rows of their embeddings do not belong together. Set "
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
    every = [sources.checkpoints[source.pinned] for source in sources.inputs.models]
    differ = len({sources.rows(source) for source in sources.inputs.models}) > 1
    alignment = by_row(every[0], every, sources.tensors) if differ and not problems else None
    return Tokens(None, alignment, translations, tuple(problems), tuple(notes))


def _with_template(recipe: Recipe, found: Tokens, sources: Sources) -> Tokens:
    asked = recipe.chat_template
    if asked is None or asked == "auto":
        return found
    text: str | None = files.built_in(asked) if asked in CHAT_TEMPLATES else asked
    if recipe.reference(asked):
        source = source_of(recipe, sources.inputs, asked)
        text = files.template_of(source.name, sources.read(source, *files.KEEPERS))
        if text is None:
            remedy = "Name a model that has one, or give its text."
            raise TokenizerError("chat_template", f"{source.name} has no chat template", remedy)
    assert text is not None  # a text, or refused above
    carried = found.carried or Carried(sources.base.pinned)
    donor = next(s for s in sources.inputs.models if s.pinned == carried.donor)
    changed = carried.written.get(files.CONFIG)
    config = json.loads(changed) if changed else sources.read_json(donor, files.CONFIG)
    written = {**carried.written, **files.with_template(text, config)}
    dropped = (*carried.dropped, *files.TEMPLATES)
    return replace(found, carried=replace(carried, written=written, dropped=dropped))


def _listed(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:N_SHOWN]))
    if len(tokens) > N_SHOWN:
        return f"{len(tokens)} tokens ({shown}, ...)"
    return f"the token{'s' * (len(tokens) > 1)} {shown}"
