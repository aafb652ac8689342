"""Describe: what tells of a finished merge, to people and to leaderboards: card, page, entries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lewis_hub.errors import PublishError
from lewis_hub.files import write_whole
from lewis_hub.hub.facts import Licence, ModelFacts, combined_licence
from lewis_hub.methods import registry
from lewis_hub.report import leaderboards, page
from lewis_hub.report.card import model_card
from lewis_hub.report.cost import Costs
from lewis_hub.report.facts import CardFacts, Guided
from lewis_hub.report.lock import Lock
from lewis_hub.report.mergekit import FILE as MERGEKIT
from lewis_hub.report.plots import Plot
from lewis_hub.stages.calibration import Guidance
from lewis_hub.stages.evaluation import Scored
from lewis_hub.stages.execution import Step
from lewis_hub.stages.merging import MergedModel
from lewis_hub.stages.slicing import stacked_blocks

CARD = "README.md"


def describe(step: Step, folder: Path, facts: CardFacts, scored: Scored | None) -> tuple[str, ...]:
    """Write them into the model's folder; returns their paths, relative to it.

    None of them is part of the lock: they tell of one run, and their owner may change them.
    """
    asked = step.recipe.evaluate
    results = scored.results if scored else {}
    texts = {CARD: str(model_card(facts)), page.FILE: page.report_page(facts, results)}
    if facts.scores and asked and asked.benchmarks:
        texts |= leaderboards.entries(facts.scores, asked.benchmarks, facts)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_whole(folder / name, text)
    return tuple(texts)


def guided(step: Step, guidance: Guidance | None, plots: tuple[Plot, ...]) -> Guided | None:
    """What the card says of the guide; None where there is none."""
    if guidance is None or step.recipe.guide is None:
        return None
    name = step.recipe.guide.name
    return Guided(name, guidance.profile, guidance.schedule, guidance.notes, plots)


def card_facts(
    step: Step,
    merged: MergedModel,
    guided: Guided | None,
    scored: Scored | None,
    costs: Costs,
    locked: Lock,
) -> CardFacts:
    """Gather all that a card states; the recipe as run lies in the folder already."""
    recipe, inputs, examined = step.recipe, step.inputs, step.examined
    repo = recipe.publish.repo if recipe.publish else None
    chosen = recipe.publish.license if recipe.publish else None
    return CardFacts(
        title=repo.partition("/")[2] if repo else "Merged model",
        repo=repo,
        endpoint=step.api.endpoint,
        base=inputs.base,
        experts=inputs.experts,
        models=examined.facts,
        datasets=inputs.calibration_data,
        parameters=merged.parameters,
        dtype=recipe.output_dtype,
        method=registry.find(recipe.merge_method),
        guided=guided,
        scores=scored.scores if scored else None,
        gate=scored.gate if scored else None,
        costs=tuple(costs.stages),
        recipe=(merged.folder / "lewis" / "recipe.yaml").read_text(encoding="utf-8"),
        licence=_licence([examined.facts[s.pinned] for s in inputs.models], chosen),
        licence_chosen=chosen is not None,
        config=json.loads((merged.folder / "config.json").read_text(encoding="utf-8")),
        chat=_chats(merged.folder),
        custom_code=inputs.donor.name in recipe.allow_code,
        mergekit=MERGEKIT in locked.outputs,
        digest=locked.digest,
        software=locked.software,
        stack=stacked_blocks(recipe, inputs),
        scored_in_chat=recipe.evaluate is not None and recipe.evaluate.chat_template,
    )


def _chats(folder: Path) -> bool:
    """Whether the tokenizer has a chat template, in a file of its own or in its configuration."""
    config = folder / "tokenizer_config.json"
    inside = config.exists() and '"chat_template"' in config.read_text(encoding="utf-8")
    return inside or (folder / "chat_template.jinja").exists()


def _licence(facts: Sequence[ModelFacts], chosen: str | None) -> Licence | None:
    """What follows from the parents; nothing where they differ and nobody decided."""
    try:
        return combined_licence(facts, chosen)
    except PublishError:
        return None
