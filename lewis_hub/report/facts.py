"""What a card is made from: all that the path knows once the merge is scored."""

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
    """What a guide decided, and from what.

    Attributes:
        guide: its name.
        profile: None where it measures nothing.
        notes: what a user should know about it, in plain words.
        plots: they lie in the model's folder `lewis`.
    """

    guide: str
    profile: ImportanceProfile | None
    schedule: DensitySchedule
    notes: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A source, and what fixes the calibration set that it was measured on."""

    source: str  # pinned
    calibration: Mapping[str, Any]


@dataclass(frozen=True)
class StackedBlocks:
    """Blocks of the output, and the sources' blocks that they were made from, one by one.

    Attributes:
        base: which of the sources task vectors start from; None for a method that takes none.
    """

    blocks: range
    sources: tuple[tuple[Source, range], ...]
    base: Source | None


@dataclass(frozen=True)
class CardFacts:
    """All that a card states. Strings are as they were found; the card escapes them.

    Attributes:
        title: what the model is called, such as the last part of `repo`.
        repo: where it goes; None where it stays on disk.
        endpoint: of the Hub, without a slash at the end.
        base: what the task vectors start from; None for a method that takes none.
        experts: what was merged, in the recipe's order.
        models: pinned source -> what its own card says.
        datasets: of the calibration, each once.
        parameters: tensor of the merge -> number of parameters.
        dtype: of the merge; None where each tensor kept its own.
        method: from the registry.
        guided: None where the recipe's own settings gave the densities.
        measured: what statistics were gathered on, one an expert, where the method merges by them.
        in_sequence: whether matrices were fitted one after the other, on the merge's own inputs.
        notes: on those statistics, in plain words.
        machine: that this run was made on; None where nobody looked.
        scores: None where nothing was scored.
        costs: of the run that finished the merge.
        recipe: as run, revisions pinned, as YAML.
        licence: None where nobody stated one.
        licence_chosen: whether the recipe states it, rather than the parents alone.
        config: the merge's `config.json`, as found.
        chat: whether the tokenizer has a chat template.
        custom_code: whether transformers needs `trust_remote_code` to load it.
        mergekit: whether `mergekit_config.yml` lies beside the card.
        digest: the lock's.
        software: name -> version, lewis_hub among them.
        stack: the slices, where blocks were stacked.
        gate: what the quality gate says; None where there is none.
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
        """Base first; a base that is also merged stands once."""
        others = tuple(one for one in self.experts if one != self.base)
        return (self.base, *others) if self.base else others
