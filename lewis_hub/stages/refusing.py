"""Refuse: what of a recipe cannot be done with these sources, known from their headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import CalibrationModelError, EvaluationError, MergeError, PublishError
from lewis_hub.evaluate.declared import require_metric
from lewis_hub.evaluate.tasks import check_tasks
from lewis_hub.guides import registry as guides
from lewis_hub.guides.loading import check_padding
from lewis_hub.hub.facts import ModelFacts, combined_licence
from lewis_hub.hub.fetch import read_small
from lewis_hub.methods import registry
from lewis_hub.recipe import Recipe
from lewis_hub.stages.evaluation import selection
from lewis_hub.stages.merging import plan
from lewis_hub.stages.slicing import uncompared
from lewis_hub.stages.sources import Inputs, calibrations
from lewis_hub.stages.tokenizers import Tokens
from lewis_hub.vocabulary.files import KEEPERS, template_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

POSITIONS = ("max_position_embeddings", "n_positions")  # what configurations call their number


def refusals(
    recipe: Recipe,
    inputs: Inputs,
    checkpoints: Mapping[str, Checkpoint],
    tokens: Tokens,
    facts: Mapping[str, ModelFacts],
) -> list[str]:
    """What the rooms would refuse later: settings, guide, licence; one message each."""
    found = []
    try:
        if all(checkpoint.tensors for checkpoint in checkpoints.values()):
            plan(recipe, inputs, checkpoints, tokens.alignment, None, max_shard_bytes=1 << 40)
        found += guide_refusals(recipe)
        if recipe.guide and recipe.slices and guides.find(recipe.guide.name).needs:
            found += uncompared(inputs, checkpoints)
    except MergeError as error:
        found.append(str(error))
    try:
        if recipe.publish:
            combined_licence([facts[s.pinned] for s in inputs.models], recipe.publish.license)
    except PublishError as error:
        found.append(str(error))
    return found


def guide_refusals(recipe: Recipe) -> list[str]:
    """Why a recipe's guide would do nothing under its method."""
    method = registry.find(recipe.merge_method)
    if recipe.guide is None:
        return []
    if recipe.slices and recipe.guide.apply_to != "density":
        return ["guide: a stack takes densities alone. Set `apply_to: density`."]
    weighs = method.takes_task_vectors and method.takes("weights")
    if recipe.guide.apply_to != "density" and not weighs:
        return [
            f"guide: `{method.name}` has no weights of task vectors for `apply_to` to scale. "
            "Set `apply_to: density`, or use `ties`, `dare_ties` or `task_arithmetic`."
        ]
    if recipe.guide.apply_to != "weight" and not method.takes_density:
        return [
            f"guide: `{method.name}` keeps every entry, so densities would do nothing. "
            "Use `ties`, `dare_ties` or `dare_linear`, or remove the guide."
        ]
    return []


def padding_refusals(
    recipe: Recipe, inputs: Inputs, configs: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Which models have no room for what `lewis_reference` pads, as their configurations say."""
    measured = guides.find(recipe.guide.name).needs if recipe.guide else ()
    if "lewis_reference" not in measured:
        return []
    longest = max((one.max_tokens for one in calibrations(recipe)), default=0)
    found = []
    for source in dict.fromkeys(inputs.models):
        config = configs[source.pinned]
        text = config.get("text_config") or config
        told = next((text[key] for key in POSITIONS if key in text), None)
        try:
            check_padding(source.name, longest, told if isinstance(told, int) else None)
        except CalibrationModelError as error:
            found.append(str(error))
    return found


def benchmark_refusals(recipe: Recipe, *, allow_code: bool) -> list[str]:
    """What is wrong with the tasks, with the gate's metrics or with those of leaderboards."""
    asked = recipe.evaluate
    if asked is None:
        return []
    try:
        selected = selection(recipe, asked, allow_code=allow_code)
        check_tasks(selected)
        for gate in asked.gate or ():
            require_metric(selected, gate.task, gate.metric)
        for task, benchmark in (asked.benchmarks or {}).items():
            require_metric(selected, task, benchmark.metric)
    except EvaluationError as error:
        return [str(error)]
    return []


def chat_refusals(recipe: Recipe, inputs: Inputs, api: HfApi) -> list[str]:
    """Which of the models that are scored have no chat template, where prompts go through it.

    An adapter's expert has its base's, and the merge what the recipe gives it.
    """
    asked = recipe.evaluate
    if asked is None or not asked.chat_template:
        return []
    merged = inputs.donor if recipe.chat_template in (None, "auto") else None
    base = inputs.base if "base" in asked.compare else None
    experts = inputs.experts if "experts" in asked.compare else ()
    scored = {one.pinned: one for one in (merged, base, *experts) if one and not one.is_adapter}
    found = []
    for source in scored.values():
        files = {name: read_small(api, source, name) for name in KEEPERS}
        there = {name: content for name, content in files.items() if content is not None}
        if template_of(source.name, there) is None:
            found.append(
                f"evaluate.chat_template: {source.pinned} has no chat template.\n"
                "Leave it out of `evaluate.compare`, or score without `chat_template`."
            )
    return found
