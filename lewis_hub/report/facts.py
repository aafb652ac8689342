"""The facts that a model card states, as one value that is complete once the merge is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lewis_hub.calibration.profile import ImportanceProfile
from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.evaluate.scores import Scores
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.hub.facts import Licence, ModelFacts
from lewis_hub.hub.source import Source
from lewis_hub.methods.registry import Method
from lewis_hub.report.cost import Machine, StageCost
from lewis_hub.report.plots import Plot


@dataclass(frozen=True)
class Guided:
    """The decision of a guide and its inputs.

    Attributes:
        guide: its name.
        profile: None if the guide measures nothing.
        notes: warnings for the user, in plain words.
        plots: their files are in the model's folder `lewis`.
    """

    guide: str
    profile: ImportanceProfile | None
    schedule: DensitySchedule
    notes: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A source and the settings that fix its calibration texts."""

    source: str  # pinned
    calibration: Mapping[str, Any]


@dataclass(frozen=True)
class StackedBlocks:
    """Blocks of the output, and the blocks of the sources that they are made from, in order.

    Attributes:
        base: the source that task vectors start from; None for a method without a base.
    """

    blocks: range
    sources: tuple[tuple[Source, range], ...]
    base: Source | None


@dataclass(frozen=True)
class CardFacts:
    """All facts that a card states. Strings may come from anywhere; the card escapes them.

    Attributes:
        title: the name of the model, such as the last part of `repo`.
        repo: the Hub repo that it is published to; None if it stays on disk.
        endpoint: address of the Hub, without a slash at the end.
        base: the source that task vectors start from; None for a method without a base.
        experts: the merged sources in the recipe's order.
        models: pinned source -> facts from its own card.
        datasets: of the calibration, each once.
        parameters: tensor of the merge -> number of parameters.
        dtype: of the merge; None if each tensor kept its own dtype.
        method: from the registry.
        guided: None if the densities come from the recipe's own settings.
        measured: for a method that merges by statistics, the calibration of each expert.
        in_sequence: whether matrices were fitted one after the other, on the merged model's inputs.
        notes: warnings about those statistics, in plain words.
        machine: the machine of this run; None if unknown.
        scores: None if nothing was scored.
        costs: of the run that finished the merge.
        recipe: as run, with pinned revisions, as YAML.
        licence: None if no licence is stated.
        licence_chosen: whether the recipe states it; otherwise it follows from the parents.
        config: the content of the merge's `config.json`, unchecked.
        chat: whether the tokenizer has a chat template.
        custom_code: whether transformers needs `trust_remote_code` to load the model.
        mergekit: whether there is a `mergekit_config.yml` beside the card.
        digest: of the lock.
        software: name -> version, with lewis_hub.
        stack: the slices of a model whose blocks were stacked.
        gate: the verdict of the quality gate; None without a gate.
        scored_in_chat: whether prompts went through each model's chat template.
    """

    title: str
    repo: str | None
    endpoint: str
    base: Source | None
    experts: tuple[Source, ...]
    models: Mapping[str, ModelFacts]
    datasets: tuple[Source, ...]
    parameters: Mapping[str, int]
    dtype: str | None
    method: Method
    guided: Guided | None
    scores: Scores | None
    costs: tuple[StageCost, ...]
    recipe: str
    licence: Licence | None
    licence_chosen: bool
    config: Mapping[str, Any]
    chat: bool
    custom_code: bool
    mergekit: bool
    digest: str
    software: Mapping[str, str]
    stack: tuple[StackedBlocks, ...] = ()
    gate: GateVerdict | None = None
    measured: tuple[Measured, ...] = ()
    in_sequence: bool = False
    notes: tuple[str, ...] = ()
    machine: Machine | None = None
    scored_in_chat: bool = False

    @property
    def sources(self) -> tuple[Source, ...]:
        """The base, then the experts; a base that is also merged occurs once."""
        others = tuple(expert for expert in self.experts if expert != self.base)
        return (self.base, *others) if self.base else others
