"""What a card says of the model as such: shape, languages, what it is for, its licence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lewis_hub.hub.facts import Licence, stated_licence
from lewis_hub.report import markdown, tables
from lewis_hub.report.facts import CardFacts
from lewis_hub.report.metadata import languages

DISAGREE = "The parents do not agree"
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def details(facts: CardFacts) -> Iterator[str]:
    """Lines of a list, as Markdown."""
    text_config = facts.config.get("text_config")
    config = text_config if isinstance(text_config, Mapping) else facts.config
    n_parameters, dtype = sum(facts.parameters.values()), facts.dtype or "its parents' precision"
    yield f"**Parameters:** {n_parameters:,} in {markdown.text(dtype)}"
    named = facts.config.get("architectures")
    n_blocks = _count(config, BLOCKS)
    if isinstance(named, list) and named:
        depth = f", {n_blocks:,} blocks" if n_blocks else ""
        yield f"**Architecture:** {markdown.code(named[0])}{depth}"
    if n_tokens := _count(config, CONTEXT):
        yield f"**Context:** {n_tokens:,} tokens"
    if n_vocabulary := _count(config, ("vocab_size",)):
        yield f"**Vocabulary:** {n_vocabulary:,} tokens"
    yield f"**Chat template:** {'yes' if facts.chat else 'none'}"
    spoken = ", ".join(markdown.text(language) for language in languages(facts))
    told = f"{spoken}, as its parents' cards say" if spoken else "its parents' cards say none"
    yield f"**Languages:** {told}"
    if facts.repo:
        owner = facts.repo.partition("/")[0]
        place = f"{facts.endpoint}/{owner}"
        talk = markdown.link("discussions", f"{facts.endpoint}/{facts.repo}/discussions")
        who = markdown.link(markdown.text(owner), place)
        yield f"**Published by:** {who}; questions and reports go to its {talk}"
    stated = markdown.text(facts.licence) if facts.licence else "none stated"
    yield f"**Licence:** {stated} ([why](#made-from))"


def intended(facts: CardFacts) -> Iterator[str]:
    """Lines of a list: for what, on what it was tested, and for what not."""
    sources = [source for source in facts.sources if facts.models[source.pinned].url]
    cards = ", ".join(tables.model(facts, source) for source in sources)
    where = f": see {cards}" if cards else ""
    task = "Chat and other text generation" if facts.chat else "Text generation"
    yield f"**Meant for:** {task} of the kind that its parents were made for{where}."
    yield "**Further:** it can be fine-tuned, quantised or merged again like any of its parents."
    tasks = [markdown.code(name) for name in facts.scores.tasks] if facts.scores else []
    measured = f"Beyond {', '.join(tasks)} nothing" if tasks else "Nothing"
    yield (
        "**Not meant for**, until you have tested it for that yourself: what harms somebody when "
        "it goes wrong, such as advice on health, law or money, or decisions about people. "
        f"{measured} was measured here. What a parent's card or licence rules out is ruled out too."
    )


def licence(facts: CardFacts) -> str:
    """What each parent says, what follows from it, and who decided."""
    parents = [(one, stated_licence(facts.models[one.pinned])) for one in facts.sources]
    stated = list(dict.fromkeys(said for _, said in parents))
    if len(stated) > 1:
        reasons = "; ".join(f"{tables.model(facts, one)} {_says(said)}" for one, said in parents)
        reason = f"{DISAGREE}: {reasons}."
    elif stated[0]:
        reason = f"The cards of all its parents say {_named(stated[0])}."
    else:
        reason = "None of the parents' cards states a licence."
    if facts.licence is None:
        return f"{reason} No licence is stated here. Ask their owners before you use or share it."
    name = _named(facts.licence)
    if not facts.licence_chosen:
        return f"{reason} So this model is under the same: {name}."
    if stated == [facts.licence]:
        return f"{reason} Its publisher states the same for this model: {name}."
    judged = f"{reason} Its publisher states {name} for this model, which is their own judgement"
    return (
        f"{judged}: without it lewis-hub refuses to publish." if len(stated) > 1 else f"{judged}."
    )


def _says(stated: Licence | None) -> str:
    return f"says {_named(stated)}" if stated else "says nothing"


def _named(stated: Licence) -> str:
    return markdown.link(markdown.text(stated), stated.link)


def _count(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    found = next((config[key] for key in keys if key in config), None)
    return found if type(found) is int else None
