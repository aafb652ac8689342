"""Mixtures of experts: the settings of a recipe, and the measurement of router weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.grams import write_tensors
from lewis_hub.calibration.subject import in_folder
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import torch_dtypes
from lewis_hub.checkpoint.reader import local_header
from lewis_hub.errors import MergeError
from lewis_hub.files import sha256_of
from lewis_hub.merge.architectures import NO_DENSE, choose_architecture, mixture_config
from lewis_hub.merge.mixture import MixtureExpert, MixtureSettings, make_mixture_plan
from lewis_hub.merge.plan import Fitted, MergeSource
from lewis_hub.recipe.mixture import WITHOUT_PROMPTS, GateMode, RoutedExpert
from lewis_hub.recipe.reference import ModelReference
from lewis_hub.recipe.schema import Recipe
from lewis_hub.report.facts import MixedExpert, MixtureFacts
from lewis_hub.workflow.fetch import ModelLoader
from lewis_hub.workflow.open import MergeSources, OpenedSource
from lewis_hub.workflow.resolve import Inputs, by_reference
from lewis_hub.workflow.statistics import Gathered

if TYPE_CHECKING:
    from torch import Tensor

LABEL = "router weights"
FILE = "router.safetensors"  # in the scratch folder
ALIKE = 5.0  # condition number of a block's router above which mergekit warns, too


def mixture_settings(
    recipe: Recipe, sources: MergeSources, references: Mapping[ModelReference, OpenedSource]
) -> MixtureSettings:
    """Return the models of a mixture.

    Raises:
        MergeError: no architecture fits the models.
    """
    used = {one.pinned: one for one in (sources.donor, *sources.experts)}
    _require_alike(list(used.values()))
    kind = choose_architecture(
        {label: one.config.get("model_type") for label, one in used.items()},
        recipe.architecture,
        has_shared=bool(recipe.shared_experts),
    )

    def source(opened: OpenedSource) -> MergeSource:
        return MergeSource(opened.checkpoint, opened.digest)

    def expert(one: RoutedExpert) -> MixtureExpert:
        scale = 1.0 if one.residual_scale is None else one.residual_scale
        return MixtureExpert(source(references[one.source_model]), scale)

    return MixtureSettings(
        architecture=kind,
        base=source(sources.donor),
        routed=tuple(map(expert, recipe.routed or ())),
        shared=next(map(expert, recipe.shared_experts or ()), None),
        dtype=recipe.output_dtype,
    )


def _require_alike(models: list[OpenedSource]) -> None:
    """Refuse experts whose MLPs compute something else with the same matrices."""
    base = models[0]
    for one in models[1:]:
        found, expected = (m.config.get("hidden_act", "silu") for m in (one, base))
        if found != expected:
            problem = f"{one.name} has the activation `{found}`, the base `{expected}`"
            raise MergeError("experts", problem, NO_DENSE)


def config_of(recipe: Recipe, settings: MixtureSettings, sources: MergeSources) -> dict[str, Any]:
    """Return the mixture's `config.json`.

    Raises:
        MergeError: that of the base has no mixture, or does not tell the number of its blocks.
    """
    n_blocks = len({names.block(name) for name in settings.routers})
    stated = sources.donor.config.get("num_hidden_layers")
    if n_blocks not in (0, stated):
        problem = f"its config.json has {stated} blocks, its weights have {n_blocks}"
        raise MergeError(sources.donor.name, problem, "Use an intact copy of the model.")
    return mixture_config(
        settings.architecture,
        sources.donor.pinned,
        sources.donor.config,
        (len(settings.routed), recipe.experts_per_token or len(settings.routed)),
        qkv_bias=settings.has_qkv_bias,
    )


def mixture_facts(recipe: Recipe, settings: MixtureSettings, inputs: Inputs) -> MixtureFacts:
    """Return what the card says about a mixture."""
    sources, n_routed = by_reference(recipe, inputs.base, inputs.experts), len(recipe.routed or ())
    experts = tuple(
        MixedExpert(
            source=sources[one.source_model],
            is_shared=number >= n_routed,
            positive_prompts=one.positive_prompts,
            negative_prompts=one.negative_prompts,
            residual_scale=one.residual_scale,
        )
        for number, one in enumerate(recipe.mixed)
    )
    mode = recipe.gate_mode or "hidden"
    return MixtureFacts(
        architecture=settings.architecture.name,
        experts=experts,
        experts_per_token=recipe.experts_per_token or n_routed,
        gate_mode=mode,
        is_random=mode in WITHOUT_PROMPTS,
    )


def mixture_notes(recipe: Recipe) -> list[str]:
    """Return what a user should know about a mixture before it is made."""
    models = {expert.source_model for expert in recipe.mixed}
    if len(models) > 1:
        return []
    return [
        f"all experts are {recipe.mixed[0].source_model}, so the mixture computes what this model "
        "computes, with more memory. It is a start for training only."
    ]


@dataclass(frozen=True)
class RouterSettings:
    """The settings that determine router weights."""

    base: OpenedSource
    routed: tuple[RoutedExpert, ...]
    shared: tuple[RoutedExpert, ...]
    mode: GateMode
    seed: int
    dtypes: Mapping[str, str]  # tensor -> dtype, as safetensors writes it
    shapes: Mapping[str, tuple[int, ...]]  # tensor -> shape


def router_settings(
    recipe: Recipe, settings: MixtureSettings, sources: MergeSources
) -> RouterSettings:
    """Return the settings for the router weights of a mixture."""
    shapes = settings.routers
    planned = make_mixture_plan(settings, 1 << 40).shards
    outputs = (tensor.output for shard in planned for tensor in shard.tensors)
    return RouterSettings(
        base=sources.donor,
        routed=recipe.routed or (),
        shared=recipe.shared_experts or (),
        mode=recipe.gate_mode or "hidden",
        seed=recipe.seed,
        dtypes={output.name: output.dtype for output in outputs if output.name in shapes},
        shapes=shapes,
    )


def measure_routers(settings: RouterSettings, loader: ModelLoader) -> Gathered:
    """Compute the router weights, from the base's hidden states on the prompts, or at random."""
    is_random = settings.mode in WITHOUT_PROMPTS
    rows, notes = (_random(settings), ()) if is_random else _on_prompts(settings, loader)
    for note in notes:
        loader.progress.say(note)
    types = torch_dtypes()
    rounded = {
        name: tensor.to(types[settings.dtypes[name]]).contiguous() for name, tensor in rows.items()
    }
    folder = loader.scratch / "router"
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(rounded, folder / FILE)
    headers = {header.name: header for header in local_header(LABEL, folder / FILE)}
    fitted = Fitted(LABEL, f"sha256:{sha256_of(folder / FILE)}", headers)
    return Gathered(fitted, {LABEL: folder}, notes=notes)


def _random(settings: RouterSettings) -> dict[str, Tensor]:
    from lewis_hub.calibration.routing import random_rows  # torch: only here

    return {
        name: random_rows(name, shape, settings.mode, settings.seed)
        for name, shape in settings.shapes.items()
    }


def _on_prompts(
    settings: RouterSettings, loader: ModelLoader
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    from lewis_hub.calibration.model import run_refusals  # torch: only here
    from lewis_hub.calibration.routing import condition_numbers, prompt_rows

    placed = loader.load_for_calibration(loader.subject(settings.base), settings.base)
    weights = placed.weights or in_folder(placed.source, placed.folder, loader.scratch)
    experts, n_routed = (*settings.routed, *settings.shared), len(settings.routed)
    with (
        loader.progress.stage("Measuring the router", len(experts), "items") as advance,
        run_refusals(placed.source, f"gate_mode `{settings.mode}`"),
    ):
        found = prompt_rows(weights, experts, settings.mode, loader.loading.device)
        advance(len(experts))
    rows = {}
    for name in settings.shapes:
        of_block = found[names.block(name) or 0]
        is_shared = name.endswith("shared_expert_gate.weight")
        rows[name] = of_block[n_routed:] if is_shared else of_block[:n_routed]
    numbers = condition_numbers(found[:, :n_routed])
    return rows, _alike_note([number for number in numbers if number > ALIKE], len(numbers))


def _alike_note(numbers: list[float], n_blocks: int) -> tuple[str, ...]:
    """Return a note on blocks whose router can hardly tell experts apart."""
    if not numbers:
        return ()
    worst = f"up to {max(numbers):.3g}" if isfinite(max(numbers)) else "one row repeats others"
    return (
        f"In {len(numbers)} of {n_blocks} blocks the router's rows are close to each other "
        f"(condition number above {ALIKE:g}: {worst}), so some experts may get few tokens. Give "
        "prompts that differ more, add negative prompts, or train the router.",
    )
