"""The facts that a model card states: of a merge, and of the methods and guides of this package.

The BibTeX entries of their papers are in `templates/citations.bib`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.profile import ImportanceProfile
from lewis_hub.evaluate.benchmarks import ScoredData
from lewis_hub.evaluate.gate import GateVerdict
from lewis_hub.evaluate.scores import MERGED, Scores
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.hub.facts import Licence, ModelFacts
from lewis_hub.hub.source import Source
from lewis_hub.merge.aligned import AlignedModel
from lewis_hub.methods.registry import Method
from lewis_hub.recipe.formats import ExportFormat
from lewis_hub.report.cost import Machine, StageCost
from lewis_hub.report.matches import MatchPictures
from lewis_hub.report.plots import Picture
from lewis_hub.report.usage import ModelUsage

if TYPE_CHECKING:
    from lewis_hub.merge.transplant import RowOrigins, TransplantSettings

LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")
ENTRY = re.compile(r"^@\w+\{([\w-]+),\n.*?^\}$", re.MULTILINE | re.DOTALL)
HARNESS = "eval-harness"
SEQUENTIAL = ("nguyen2026regmean", "gu2026featcal")  # the nearest published fits in sequence
DUAL_SPACE = "xu2024training"  # matching of units by activations and weights
HETEROGENEOUS = "xu2024heterogeneous"  # matching of models of different depth or width
BY_ACTIVATION = "sun2024simple"  # magnitude times activation norm, of a weight


@dataclass(frozen=True)
class KnownMethod:
    """The name of a method in a sentence, and the keys of its papers."""

    title: str
    papers: tuple[str, ...] = ()


@dataclass(frozen=True)
class KnownGuide:
    """A sentence on the origin of a guide's densities or factors, and the key of its paper."""

    origin: str
    paper: str | None = None


METHODS = {
    "linear": KnownMethod("a weighted average of their weights", ("wortsman2022model",)),
    "task_arithmetic": KnownMethod("task arithmetic", ("ilharco2023editing",)),
    "ties": KnownMethod("TIES-Merging", ("yadav2023ties",)),
    "dare_linear": KnownMethod(
        "DARE with task arithmetic", ("yu2024language", "ilharco2023editing")
    ),
    "dare_ties": KnownMethod("DARE with TIES-Merging", ("yu2024language", "yadav2023ties")),
    "della": KnownMethod("DELLA-Merging", ("deep2024della",)),
    "della_linear": KnownMethod(
        "DELLA with task arithmetic", ("deep2024della", "ilharco2023editing")
    ),
    "breadcrumbs": KnownMethod("Model Breadcrumbs", ("davari2024model",)),
    "breadcrumbs_ties": KnownMethod(
        "Model Breadcrumbs with TIES-Merging", ("davari2024model", "yadav2023ties")
    ),
    "sce": KnownMethod("SCE", ("wan2025fusechat",)),
    "cabs": KnownMethod("a simplified form of CABS", ("yang2025cabs",)),
    "pcb": KnownMethod("a simplified form of PCB-Merging", ("du2024parameter",)),
    "regmean": KnownMethod("RegMean on task vectors", ("jin2023dataless", "ilharco2023editing")),
    "wudi": KnownMethod("WUDI-Merging in closed form", ("cheng2025whoever",)),
    "tsv_m": KnownMethod("TSV-Merge", ("gargiulo2025task",)),
    "iso_c": KnownMethod("isotropic merging (Iso-C)", ("marczak2025no",)),
    "knots_ties": KnownMethod("KnOTS with TIES-Merging", ("stoica2025model", "yadav2023ties")),
    "ram": KnownMethod("Reinforced Agent Merging (RAM)", ("yuan2026behavior",)),
    "ramplus_tl": KnownMethod("Reinforced Agent Merging (RAM+)", ("yuan2026behavior",)),
    "model_stock": KnownMethod("Model Stock", ("jang2024model",)),
    "slerp": KnownMethod("spherical interpolation (SLERP)"),
    "nuslerp": KnownMethod("spherical interpolation (NuSLERP)"),
    "multislerp": KnownMethod("spherical interpolation (Multi-SLERP)"),
    "karcher": KnownMethod("their Karcher mean"),
    "arcee_fusion": KnownMethod("Arcee Fusion"),
    "nearswap": KnownMethod("NearSwap"),
    "passthrough": KnownMethod("passthrough"),
}
DERIVED = "It derives these values from"
GUIDES = {
    "lewis": KnownGuide(
        f"{DERIVED} the change of importance from base to expert on calibration texts.",
        "chopra2025lewis",
    ),
    "lewis_reference": KnownGuide(
        f"{DERIVED} the change of importance from base to expert on calibration texts, measured by "
        "the procedure of its authors.",
        "chopra2025lewis",
    ),
    "magnitude": KnownGuide(
        f"{DERIVED} the size of the weight changes, relative to the base's weights."
    ),
    "activation_shift": KnownGuide(
        f"{DERIVED} the difference between the outputs of base and expert on calibration texts."
    ),
    "aim": KnownGuide(
        f"{DERIVED} the importance of input channels to the base on calibration texts: a module "
        "gets the lower a value, the more evenly its channels matter. This simplifies AIM, which "
        "scales each channel.",
        "nobari2025activation",
    ),
    "owl": KnownGuide(
        f"{DERIVED} each block's share of outliers in the expert on calibration texts.",
        "yin2024outlier",
    ),
    "random": KnownGuide(
        "It is a control: it assigns the densities of LEWIS to the blocks at random."
    ),
    "inverse": KnownGuide("It is a control: it inverts the densities of LEWIS."),
}


@dataclass(frozen=True)
class Guided:
    """The decision of a guide and its inputs; the files of `maps` are in the folder `lewis`."""

    guide: str
    profile: ImportanceProfile | None
    schedule: DensitySchedule
    notes: tuple[str, ...] = ()
    maps: Picture | None = None


@dataclass(frozen=True)
class Measured:
    """A source and the settings that fix its calibration texts."""

    source: str  # pinned
    calibration: Mapping[str, Any]


@dataclass(frozen=True)
class StackedBlocks:
    """Blocks of the output, and the blocks of the sources that they are made from, in order."""

    blocks: range
    sources: tuple[tuple[Source, range], ...]
    base: Source | None  # that task vectors start from

    @property
    def base_first(self) -> list[tuple[Source, range]]:
        """The sources with their blocks, the base before all others."""
        return sorted(self.sources, key=lambda pair: pair[0] != self.base)


@dataclass(frozen=True)
class MixedExpert:
    """An expert of a mixture, and the texts that its router weights come from."""

    source: Source
    is_shared: bool
    positive_prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    residual_scale: float | None


@dataclass(frozen=True)
class MixtureFacts:
    """A mixture of experts."""

    architecture: str
    experts: tuple[MixedExpert, ...]  # routed, then shared
    experts_per_token: int
    gate_mode: str
    is_random: bool  # whether the router weights are random


@dataclass(frozen=True)
class TransplantFacts:
    """A model with the tokenizer of another one."""

    model: Source
    donor: Source
    models: Mapping[str, ModelFacts]  # pinned source -> facts from its own card
    licence: Licence | None  # None: the two differ, or state none
    settings: TransplantSettings
    origins: RowOrigins
    errors: Mapping[str, float]  # tensor -> mean relative error of `omp` in the donor's
    usage: ModelUsage
    chat: bool  # the tokenizer has a chat template
    digest: str  # of the lock

    @property
    def sources(self) -> tuple[Source, ...]:
        """The model, then the donor, each once."""
        return tuple(dict.fromkeys((self.model, self.donor)))

    @property
    def licences_differ(self) -> bool:
        """Whether the cards of the two state different licences, or one of them states none."""
        return len({self.models[source.pinned].licence for source in self.sources}) > 1

    @property
    def n_padding(self) -> int:
        """The number of rows that are no token."""
        return self.origins.n_rows - self.origins.n_tokens


@dataclass(frozen=True)
class CardFacts:
    """All facts that a card states. Strings may come from anywhere; the card escapes them."""

    title: str
    repo: str | None  # the Hub repo that it is published to; None if it stays on disk
    base: Source | None  # the source that task vectors start from; None for a method without a base
    experts: tuple[Source, ...]
    models: Mapping[str, ModelFacts]  # pinned source -> facts from its own card
    datasets: tuple[Source, ...]  # of the calibration, each once
    dtype: str | None  # None if each tensor kept its own dtype
    method: Method
    recipe: str  # as run, with pinned revisions, as YAML
    licence: Licence | None
    licence_chosen: bool  # the recipe states it; otherwise it follows from the parents
    custom_code: bool  # transformers needs `trust_remote_code` to load the model
    mergekit: bool  # there is a `mergekit_config.yml` beside the card
    digest: str
    software: Mapping[str, str]  # name -> version, with lewis_hub
    stack: tuple[StackedBlocks, ...] = ()
    mixture: MixtureFacts | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)  # tensor -> number of parameters
    guided: Guided | None = None  # None if the densities come from the recipe's own settings
    scores: Scores | None = None
    scored_data: Mapping[str, ScoredData] = field(default_factory=dict)  # task -> its dataset
    chart: Picture | None = None  # of the scores; its files are in the folder `lewis`
    usage: ModelUsage = field(default_factory=ModelUsage)
    costs: tuple[StageCost, ...] = ()  # of the run that finished the merge
    config: Mapping[str, Any] = field(default_factory=dict)  # `config.json`, unchecked
    chat: bool = False  # the tokenizer has a chat template
    generated: bool = False  # it has the texts that the experts wrote
    gate: GateVerdict | None = None
    measured: tuple[Measured, ...] = ()  # of each expert, for a method that merges by statistics
    aligned: tuple[AlignedModel, ...] = ()  # models matched with another
    matches: Mapping[str, MatchPictures] = field(default_factory=dict)  # of aligned models
    in_sequence: bool = False  # matrices were fitted one by one, on the merged model's inputs
    in_expert_blocks: bool = False  # on inputs in the experts' blocks, as RegMean++
    trims_by_activation: bool = False
    notes: tuple[str, ...] = ()  # warnings about those statistics, in plain words
    machine: Machine | None = None
    exports: tuple[ExportFormat, ...] = ()  # formats beside the safetensors
    scored_in_chat: bool = False  # prompts went through each model's chat template

    @property
    def sources(self) -> tuple[Source, ...]:
        """The base, then the experts; a base that is also merged occurs once."""
        others = tuple(expert for expert in self.experts if expert != self.base)
        return (self.base, *others) if self.base else others

    @property
    def languages(self) -> list[str]:
        """The language codes in the parents' cards, each once."""
        stated = (self.models[source.pinned].languages for source in self.sources)
        unique = dict.fromkeys(language for languages in stated for language in languages)
        return [language for language in unique if LANGUAGE.fullmatch(language)]

    @property
    def was_scored(self) -> bool:
        """Whether the merged model itself was scored."""
        tasks = self.scores.tasks.values() if self.scores else ()
        return any(MERGED in task.models for task in tasks)

    @property
    def bibtex(self) -> list[str]:
        """The entries of the papers of the guide, the method and the evaluation."""
        guide = GUIDES.get(self.guided.guide) if self.guided else None
        method = METHODS.get(self.method.name)
        keys = [guide.paper] if guide and guide.paper else []
        keys += method.papers if method else ()
        keys += [DUAL_SPACE] if any(one.orders for one in self.aligned) else []
        keys += [HETEROGENEOUS] if any(one.blocks or one.widths for one in self.aligned) else []
        keys += SEQUENTIAL[: 1 if self.in_expert_blocks else None] if self.in_sequence else ()
        keys += [BY_ACTIVATION] if self.trims_by_activation else []
        keys += [HARNESS] if self.was_scored else []
        text = files("lewis_hub.templates").joinpath("citations.bib").read_text(encoding="utf-8")
        entries = {entry[1]: entry[0] for entry in ENTRY.finditer(text)}
        return [entries[key] for key in keys]
