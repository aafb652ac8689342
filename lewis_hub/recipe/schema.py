"""The types of a recipe. `recipe.read` reads a recipe from YAML.

A recipe is a superset of a mergekit configuration. Every type is frozen and refuses unknown keys.
Editors show the docstrings and field descriptions through the JSON Schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from lewis_hub.files import path_of, starts_like_path
from lewis_hub.recipe.alignment import Alignment
from lewis_hub.recipe.evaluation import Evaluation
from lewis_hub.recipe.formats import Exports
from lewis_hub.recipe.mixture import Mixture
from lewis_hub.recipe.reference import (
    REPO,
    TAG,
    ModelReference,
    Part,
    allow_name,
    listed,
    present,
)
from lewis_hub.recipe.tokens import Tokenizer

ApplyTo = Literal["density", "weight", "both"]
Missing = Literal["error", "base"]
Arithmetic = Literal["float32", "float64"]

CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")  # shipped with the package
SEED = AliasChoices("seed", "random_seed")
MAX_BLOCKS = 100_000
MAX_MERGES = 100  # of a recipe: the last, and all that it starts from
MAX_OWN_TEXTS = 100_000  # that a model samples without data: there is no end of rows
MAX_TEXTS = 1_000_000  # of a calibration, and tokens of a text
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", re.ASCII)


def _number(value: bool | int | float | str) -> bool | int | float | str:  # noqa: FBT001
    """YAML reads a number such as 1e-5, which has no point, as a string."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


Scalar = Annotated[bool | int | float | str, AfterValidator(_number)]
Gradient = Annotated[tuple[float, ...], Field(min_length=1)]


class Conditional(Part):
    """A value for the tensors whose names contain `filter`. The first match counts."""

    filter: str | None = Field(None, description="Part of a tensor's name; `*` or absent: any.")
    value: Scalar | Gradient


Conditions = Annotated[
    tuple[Conditional, ...],
    Field(min_length=1),
    BeforeValidator(listed, json_schema_input_type=Conditional | tuple[Conditional, ...]),
]
Setting = Scalar | Gradient | Conditions
Settings = Mapping[str, Setting]


Parameters = Annotated[Settings, BeforeValidator(present)]


class Calibration(Part):
    """Texts that are run through base and expert. They help if they resemble the benchmark."""

    dataset: str | None = Field(
        None,
        description="A repo, repo@revision, or a local .jsonl, .json, .parquet or .csv file. Or "
        "set `task`, or `from: model`.",
    )
    task: str | None = Field(
        None, description="lm-eval task or group: its items in its own prompt format."
    )
    include: str | None = Field(None, description="Folder with your own lm-eval task files.")
    revision: str | None = Field(
        None, description="Revision of the task's dataset. Default: the newest commit."
    )
    config: str | None = Field(None, description="Configuration (subset) of the dataset.")
    split: str = Field("train", description="Split to sample from. It must not be scored.")
    text: str | None = Field(None, description="Template over columns: `{question} {answer}`.")
    messages: str | None = Field(
        None, description="Column of chat messages; they are formatted with the chat template."
    )
    chat_template: bool | None = Field(
        None,
        description="Whether the prompts of a task are formatted with the chat template. "
        "Default: as `evaluate.chat_template`.",
    )
    answers: Literal["model"] | None = Field(
        None,
        description="`model`: each expert answers the prompts itself, with its most likely tokens, "
        "up to an end token or `max_tokens`. `text` is then the prompt alone; of `messages` the "
        "last turn is left out if it is the assistant's; of a `task` the right answer is left out.",
    )
    source: Literal["model"] | None = Field(
        None,
        alias="from",
        description="`model`: no data; each expert samples its texts itself, up to an end token or "
        "`max_tokens`.",
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        description="With `from: model`: the beginning of each text, such as `Question:`. Default: "
        "the tokenizer's first token alone.",
    )
    temperature: float | None = Field(
        None, gt=0, le=10, description="With `from: model`: divides the logits. Default: 1."
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="With `from: model`: tokens are drawn from the most likely ones that together "
        "have this probability. Default: 1.",
    )
    samples: int = Field(
        15,
        ge=1,
        le=MAX_TEXTS,
        description="Number of rows, sampled with `seed` and used in the order of the data.",
    )
    max_tokens: int = Field(
        512,
        ge=1,
        le=MAX_TEXTS,
        description="Truncate longer texts: those of a task at the beginning, others at the end.",
    )
    allow_overlap: bool = Field(default=False, description="Allow samples that are also scored.")

    @model_validator(mode="after")
    def _one_template(self) -> Calibration:
        if (self.dataset, self.task, self.source).count(None) != 2:
            choices = "`dataset` (with a template), `task` (an lm-eval task) or `from: model`"
            raise ValueError(f"give {choices}")
        if self.dataset and (self.text is None) == (self.messages is None):
            raise ValueError("give `text` (a template over columns) or `messages` (a column)")
        of_data, of_task = ("config", "text", "messages"), ("include", "revision", "chat_template")
        of_model = ("prompt", "temperature", "top_p")
        kind, others = "dataset", [*of_task, *of_model]
        if self.task:
            kind, others = "task", [*of_data, *of_model]
        elif self.source:
            kind, others = "from: model", [*of_data, *of_task, "answers"]
        for key in others:
            if getattr(self, key) is not None:
                raise ValueError(f"`{key}` cannot be used with `{kind}`")
        if self.source and self.samples > MAX_OWN_TEXTS:
            raise ValueError(f"a model writes at most {MAX_OWN_TEXTS:,} `samples`")
        return self

    @property
    def is_written(self) -> bool:
        """Whether the expert that is measured writes the texts, or the end of each."""
        return bool(self.answers or self.source)

    @property
    def data(self) -> str:
        """The dataset or task, for messages."""
        return self.dataset or (f"task {self.task}" if self.task else "the model's own texts")


def _in_chat(node: Any) -> Any:
    """Set `chat_template: true` in calibrations on tasks that do not set it."""
    if isinstance(node, list):
        return [_in_chat(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    changed = {key: _in_chat(value) for key, value in node.items()}
    calibration = changed.get("calibration")
    if isinstance(calibration, Mapping) and calibration.get("task") is not None:
        changed["calibration"] = {"chat_template": True, **calibration}
    return changed


DType = Annotated[
    Literal["float32", "float16", "bfloat16", "float64"],
    BeforeValidator(lambda name: name.removeprefix("torch.") if isinstance(name, str) else name),
]


class ModelEntry(Part):
    """An expert, or any source of a method without a base; a name alone is an entry too."""

    model_config = ConfigDict(json_schema_extra=allow_name)

    model: ModelReference = Field(
        description="A model, a LoRA adapter of the base, or BASE+ADAPTER. If the base is listed, "
        "it is skipped."
    )
    parameters: Parameters = Field(
        default_factory=dict,
        description="Settings of this model: `weight`, `density`; for some methods `gamma`, "
        "`epsilon` or `scale`.",
    )
    calibration: Calibration | None = Field(None, description="Texts for this expert.")
    align: Alignment | None = Field(
        None,
        description="`dual_space`: match its units with those of the base or of the first model, "
        "for models that were trained from different starts. `segment_wise`: match its blocks, for "
        "models of different depth. `neuron_matching`, `neuron_zipping`: match its units, for "
        "models of different width. `{depth: segment_wise, width: neuron_matching}`: both.",
    )

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str | Path | ModelReference) else value


class SliceSource(Part):
    """Consecutive blocks of one model."""

    model: ModelReference
    layer_range: tuple[int, int] = Field(
        description="First block and last block + 1: [0, 16] are blocks 0 to 15."
    )
    parameters: Parameters = Field(default_factory=dict, description="weight, density, scale, ...")

    @field_validator("layer_range", mode="before")
    @classmethod
    def _is_range(cls, value: Any) -> Any:
        pair = list(value) if isinstance(value, list | tuple) else []
        if len(pair) != 2 or any(type(number) is not int for number in pair):
            raise ValueError(f"expected [first block, last block + 1], found {value}")
        if not 0 <= pair[0] < pair[1]:
            rule = "blocks count from 0, and the end is exclusive"
            raise ValueError(f"{pair} is not a range of blocks: {rule}")
        if pair[1] > MAX_BLOCKS:
            raise ValueError(f"no model has more than {MAX_BLOCKS:,} blocks")
        return value

    @property
    def blocks(self) -> range:
        """The numbers of the blocks in the model."""
        return range(*self.layer_range)


class Slice(Part):
    """The next blocks of the output: equally many of each source, merged block by block."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    base_model: ModelReference | None = Field(None, description="One of `sources`: the base here.")
    parameters: Parameters = Field(default_factory=dict, description="Parameters of this slice.")
    merge_method: str | None = Field(None, exclude=True, description="The recipe's, or absent.")


class Guide(Part):
    """How calibration determines the densities."""

    name: str = Field("lewis", description="The guide; `lewis-hub guides` lists all.")
    gamma: float = Field(0.3, gt=0, le=1, description="Lowest density of the schedule.")
    epsilon: float = Field(0.8, gt=0, le=1, description="Highest density of the schedule.")
    default_density: float = Field(
        1.0, gt=0, le=1, description="Density of embeddings, norms, biases and the head."
    )
    mean_density: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Shift gamma, epsilon and all densities between them, so that each expert's "
        "densities have exactly this mean over parameters.",
    )
    apply_to: ApplyTo = Field(
        "density",
        description="What the schedule sets. `weight`: its values multiply the expert's weight, "
        "module by module, and the densities are those of the recipe. `both`: its values are "
        "densities and factors.",
    )
    calibration: Calibration | None = Field(
        None, description="Calibration texts for experts without their own."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Guide:
        if self.gamma > self.epsilon:
            raise ValueError(f"gamma ({self.gamma:g}) is above epsilon ({self.epsilon:g})")
        if self.apply_to == "weight" and self.mean_density is not None:
            raise ValueError("`mean_density` has no effect with `apply_to: weight`")
        return self


class Publishing(Part):
    """Where the merge is published, and under which licence."""

    repo: str = Field(description="owner/name on the Hub.")
    private: bool = Field(default=False, description="Whether a new repo is private.")
    license: str | None = Field(
        None, description="Licence of the merge. Required if the licences of the models differ."
    )
    landing: Literal["commit", "pull-request"] = Field(
        "commit", alias="as", description="Push a commit, or open a pull request."
    )
    tag: str | None = Field(None, description="Tag of the new commit.")

    @field_validator("repo")
    @classmethod
    def _is_repo(cls, value: str) -> str:
        if not REPO.fullmatch(value):
            raise ValueError(f"{value!r} is not owner/name (letters, digits, `-`, `_`, `.`)")
        return value

    @field_validator("tag")
    @classmethod
    def _is_tag(cls, value: str | None) -> str | None:
        if value is not None and not TAG.fullmatch(value):
            raise ValueError(f"{value!r} is not a name that git allows for a tag, such as v1.0")
        return value


class Recipe(Mixture):
    """A whole merge, from its sources to the published model."""

    name: str | None = Field(
        None, min_length=1, description="Name by which other documents of the file use this merge."
    )
    base_model: ModelReference | None = Field(
        None, description="The base of the task vectors: a repo, repo@revision or folder."
    )
    models: tuple[ModelEntry, ...] = Field(
        (), min_length=1, description="The models that are merged. Or set `slices`."
    )
    slices: tuple[Slice, ...] = Field(
        (), min_length=1, description="Ranges of blocks, stacked in this order. Or set `models`."
    )
    merge_method: str = Field(description="The merge method; `lewis-hub methods` lists all.")
    parameters: Parameters = Field(
        default_factory=dict,
        description="Settings for all models, and options of the method: `normalize`, `lambda`, "
        "`t`, ...",
    )
    dtype: DType | None = Field(
        None,
        description="Dtype of the files. Default: the base's. The arithmetic is float32; with "
        "`float64` it is float64, and slower.",
    )
    out_dtype: DType | None = Field(
        None, description="mergekit's name for `dtype`. If both are set, this one is used."
    )
    missing: Missing = Field(
        "error",
        description="If an expert lacks a tensor of the base: stop with an error, or use the base's"
        " tensor. With `base`, tensors that only an expert has are left out.",
    )
    tokenizer_source: str | None = Field(
        None,
        description="`base`, `union`, or one of the models: embeddings are matched by token. "
        "Default: the base's tokenizer; the tokenizers of the other models must agree with it.",
    )
    tokenizer: Tokenizer | None = Field(
        None, description="`tokenizer_source` with settings for single tokens."
    )
    chat_template: str | None = Field(
        None,
        description="`auto` (the tokenizer's), one of the models, the text of a template, or one "
        f"of {', '.join(CHAT_TEMPLATES)}.",
    )
    allow_code: tuple[str, ...] = Field(
        (), description="Models whose *.py files are copied into the merge. They are never run."
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**63,
        validation_alias=SEED,
        description="Seed of random masks and of calibration samples; also written `random_seed`.",
    )
    guide: Guide | None = Field(None, description="Sets densities by calibration.")
    calibration: Calibration | None = Field(
        None, description="Calibration texts for experts without their own, if there is no guide."
    )
    evaluate: Evaluation | None = Field(None, description="Scores the merge.")
    export: Exports | None = Field(None, description="Also write these formats, as `gguf:q8_0`.")
    publish: Publishing | None = Field(None, description="Publishes the merge to the Hub.")
    intermediate: SkipJsonSchema[tuple[Recipe, ...]] = ()  # merges that this one uses by name

    _folder: Path = PrivateAttr(default_factory=Path)
    _made: Mapping[str, Path] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _calibrated_as_scored(cls, document: Any) -> Any:
        """Calibration on a task uses the chat template if `evaluate` does."""
        scoring = document.get("evaluate") if isinstance(document, Mapping) else None
        in_chat = isinstance(scoring, Mapping) and scoring.get("chat_template") is True
        return _in_chat(document) if in_chat else document

    @model_validator(mode="after")
    def _has_few_merges(self) -> Recipe:
        if self.n_merges > MAX_MERGES:
            raise ValueError(f"it has {self.n_merges} merges, the limit is {MAX_MERGES}")
        return self

    @property
    def n_merges(self) -> int:
        """The merges of the recipe, with those that it starts from, and that these start from."""
        return 1 + sum(part.n_merges for part in self.intermediate)

    def placed_in(self, folder: Path) -> Recipe:
        """The same recipe; relative paths are searched in `folder` first."""
        placed = self.model_copy()
        placed._folder = folder
        return placed

    def placed_as(self, other: Recipe) -> Recipe:
        """The same recipe; it finds local files and merges as another recipe does."""
        return self.placed_in(other._folder).reading(other._made)

    @property
    def made(self) -> Mapping[str, Path]:
        """The folders of merges that were made for this one, by their names."""
        return self._made

    def reading(self, folders: Mapping[str, Path]) -> Recipe:
        """The same recipe; merges with these names are in these folders."""
        placed = self.model_copy()
        placed._made = {**self._made, **folders}
        return placed

    def locate(self, name: str) -> str:
        """The absolute path of a local file or folder; the name of a repo is returned unchanged.

        A relative path is searched beside the recipe, then in the working folder.
        """
        if name in self._made:
            return str(self._made[name])
        for candidate in (self._folder / path_of(name), path_of(name)):
            if candidate.exists():
                return str(candidate.resolve())
        return str(self._folder.resolve() / name) if starts_like_path(name) else name

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The models other than the base, which mergekit's configurations often list too.

        With `slices`, each model once, in the order of its first slice; so with `experts`.
        """
        named = dict.fromkeys(source.model for part in self.slices for source in part.sources)
        named |= dict.fromkeys(expert.source_model for expert in self.mixed)
        listed = self.models or tuple(ModelEntry(model=model) for model in named)
        return tuple(entry for entry in listed if entry.model != self.base_model)

    @property
    def effective_tokenizer(self) -> Tokenizer | None:
        """The settings of the tokenizer, from either field; None: the base's tokenizer."""
        source = self.tokenizer_source
        return self.tokenizer if source is None else Tokenizer(source=source)

    @property
    def by_name(self) -> Mapping[str, ModelReference]:
        """The base and the models by their names with and without revisions, the first of each."""
        listed = [entry.model for entry in self.models or self.experts]
        known = [self.base_model, *listed] if self.base_model else listed
        exact = {str(model): model for model in reversed(known)}
        return {model.name: model for model in reversed(known)} | exact

    @property
    def output_dtype(self) -> DType | None:
        """The dtype on disk; None keeps that of each tensor."""
        return self.out_dtype or self.dtype

    @property
    def arithmetic(self) -> Arithmetic:
        """The dtype in which tensors are merged."""
        return "float64" if "float64" in (self.dtype, self.out_dtype) else "float32"

    def calibration_of(self, entry: ModelEntry) -> Calibration | None:
        """The expert's own calibration, or that of the guide or the recipe."""
        common = self.guide.calibration if self.guide else None
        return entry.calibration or common or self.calibration
