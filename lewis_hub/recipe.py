"""What the user asks: the types of a recipe. `recipe_file` reads one from YAML.

A recipe is a superset of a mergekit configuration. Every type is frozen and refuses unknown keys;
the field descriptions are the text that editors show through the JSON Schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    field_validator,
    model_serializer,
    model_validator,
)

from lewis_hub.recipe_benchmark import Benchmark
from lewis_hub.recipe_calibration import Calibration, as_scored
from lewis_hub.recipe_gate import Gates
from lewis_hub.recipe_settings import ApplyTo, Parameters, Part
from lewis_hub.recipe_tokenizer import CHAT_TEMPLATES, Tokenizer

DType = Annotated[
    Literal["float32", "float16", "bfloat16"],
    BeforeValidator(lambda name: name.removeprefix("torch.") if isinstance(name, str) else name),
]
Missing = Literal["error", "base"]

REPO = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


class ModelReference(Part):
    """A model as the user wrote it: `owner/name`, `owner/name@revision` or a local folder.

    `BASE+ADAPTER` is an adapter, `on` a base: which must be the recipe's own.
    """

    name: str = Field(min_length=1)
    revision: str | None = None
    on: ModelReference | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "model" in value:  # mergekit's long form
            if odd := value.keys() - {"model", "revision", "lora"}:
                raise ValueError(f"`{min(odd)}` of a model is not understood")
            whole = _long_form(value["model"], value.get("revision"))
            lora = value.get("lora")
            return {**_long_form(lora, None), "on": whole} if lora else whole
        if not isinstance(value, str):
            return value
        base, plus, adapter = value.partition("+")
        if plus and not _is_path_with_plus(value, adapter):
            if "+" in adapter:
                raise ValueError("one adapter at a time: list each as an expert of its own")
            return {**_name_and_revision(adapter), "on": base}
        return _name_and_revision(value)

    @model_serializer
    def _as_written(self) -> str:
        return str(self)

    def __str__(self) -> str:
        own = f"{self.name}@{self.revision}" if self.revision else self.name
        return f"{self.on}+{own}" if self.on else own


def _long_form(value: Any, revision: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and "path" in value:
        return {"name": value["path"], "revision": value.get("revision", revision)}
    if isinstance(value, str) and revision is None:
        return _name_and_revision(value)
    return {"name": value, "revision": revision}


def _name_and_revision(value: str) -> dict[str, Any]:
    if _is_path(value):
        return {"name": value}
    name, _, revision = value.partition("@")
    return {"name": name, "revision": revision or None}


def _is_path_with_plus(value: str, after: str) -> bool:
    """Whether `value` is a folder whose name has a plus, and no adapter on a base."""
    if Path(value).exists():
        return True
    return _is_path(value) and not (_is_path(after) or REPO.fullmatch(after.partition("@")[0]))


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).exists()


class ModelEntry(Part):
    """An expert, or any source of a method without a base."""

    model: ModelReference
    parameters: Parameters = Field(default_factory=dict, description="weight, density, ...")
    calibration: Calibration | None = Field(None, description="Own texts for this expert.")


class SliceSource(Part):
    """Consecutive blocks of one model."""

    model: ModelReference
    layer_range: tuple[int, int] = Field(
        description="The first block and the one after the last: [0, 16] are blocks 0 to 15."
    )
    parameters: Parameters = Field(default_factory=dict, description="weight, density, scale, ...")

    @field_validator("layer_range", mode="before")
    @classmethod
    def _is_range(cls, value: Any) -> Any:
        pair = list(value) if isinstance(value, list | tuple) else []
        if len(pair) != 2 or any(type(number) is not int for number in pair):
            raise ValueError(f"expected [first block, one after the last], found {value}")
        if not 0 <= pair[0] < pair[1]:
            raise ValueError(f"{pair} is no range of blocks: they count from 0, the end exclusive")
        return value

    @property
    def blocks(self) -> range:
        """Their numbers in the model."""
        return range(*self.layer_range)


class Slice(Part):
    """The next blocks of the output: the same number from each source, merged one by one."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    base_model: ModelReference | None = Field(
        None, description="One of `sources`: what task vectors start from in this slice."
    )
    parameters: Parameters = Field(default_factory=dict, description="For this slice alone.")


class Guide(Part):
    """How calibration becomes densities."""

    name: str = Field("lewis", description="`lewis-hub guides` lists them.")
    gamma: float = Field(0.3, gt=0, le=1, description="Lowest density of the schedule.")
    epsilon: float = Field(0.8, gt=0, le=1, description="Highest density of the schedule.")
    default_density: float = Field(
        1.0, gt=0, le=1, description="Of embeddings, norms, biases and head."
    )
    mean_density: float | None = Field(None, gt=0, le=1, description="Shifts the schedule to it.")
    apply_to: ApplyTo = Field("density", description="What the schedule sets.")
    calibration: Calibration | None = Field(
        None, description="For experts that carry no calibration of their own."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Guide:
        if self.gamma > self.epsilon:
            raise ValueError(f"gamma ({self.gamma:g}) is above epsilon ({self.epsilon:g})")
        if self.apply_to == "weight" and self.mean_density is not None:
            raise ValueError("`mean_density` is given, and `apply_to: weight` sets no densities")
        return self


class Evaluation(Part):
    """Which lm-eval tasks score the merge, and beside what."""

    tasks: tuple[str, ...] = Field(min_length=1, description="lm-eval task names.")
    include: str | None = Field(None, description="Folder with own lm-eval task files.")
    limit: int | None = Field(None, ge=1, description="Score the first items only.")
    chat_template: bool = Field(
        default=False, description="Put prompts through each model's own chat template."
    )
    compare: tuple[Literal["base", "experts", "uniform"], ...] = Field(
        ("base", "experts", "uniform"),
        description="Scored on the same items as the merge; `uniform`: its twin without guidance.",
    )
    gate: Gates | None = Field(None, description="One or several; missed: not published.")
    benchmarks: Mapping[str, Benchmark] | None = Field(
        None, min_length=1, description="Task -> the Hub's benchmark whose leaderboard is told."
    )


class Publishing(Part):
    """Where the merge goes, and under which licence."""

    repo: str = Field(description="owner/name on the Hub.")
    private: bool = False
    license: str | None = Field(None, description="Needed where the parents' licences differ.")
    landing: Literal["commit", "pull-request"] = Field("commit", alias="as")
    tag: str | None = None

    @field_validator("repo")
    @classmethod
    def _is_repo(cls, value: str) -> str:
        if not REPO.fullmatch(value):
            raise ValueError(f"{value!r} is not owner/name (letters, digits, `-`, `_`, `.`)")
        return value


class Recipe(Part):
    """A whole merge, from sources to a published model."""

    base_model: ModelReference | None = Field(
        None, description="What task vectors start from: repo, repo@revision or folder."
    )
    models: tuple[ModelEntry, ...] = Field((), min_length=1, description="Or else `slices`.")
    slices: tuple[Slice, ...] = Field(
        (), min_length=1, description="Ranges of blocks, stacked in this order; or else `models`."
    )
    merge_method: str = Field(description="`lewis-hub methods` lists them.")
    parameters: Parameters = Field(default_factory=dict, description="For all models.")
    dtype: DType | None = Field(None, description="Of the output; absent: as in the base.")
    out_dtype: DType | None = Field(None, description="mergekit's name for `dtype`; wins over it.")
    missing: Missing = Field(
        "error",
        description="An expert without some of the base's tensors: refused, or the base's stand in."
        " Tensors that only an expert has are then left out.",
    )
    tokenizer_source: str | None = Field(
        None,
        description="base, union, or one of the models: embeddings are put together token by token."
        " Absent: the base's tokenizer, which those of the others must agree with.",
    )
    tokenizer: Tokenizer | None = Field(None, description="The same, with settings for tokens.")
    chat_template: str | None = Field(
        None,
        description="auto (that of the tokenizer), one of the models, a template's text, or one of "
        f"{', '.join(CHAT_TEMPLATES)}.",
    )
    allow_code: tuple[str, ...] = Field(
        (), description="Models whose *.py files are carried into the merge; never run here."
    )
    seed: int = Field(42, ge=0, lt=2**63, description="Of random masks and of row sampling.")
    guide: Guide | None = None
    calibration: Calibration | None = Field(
        None, description="Without a guide: for experts without calibration of their own."
    )
    evaluate: Evaluation | None = None
    publish: Publishing | None = None

    _folder: Path = PrivateAttr(default_factory=Path)

    @model_validator(mode="before")
    @classmethod
    def _calibrated_as_scored(cls, document: Any) -> Any:
        """A task's items go through a chat template in calibration where they do in `evaluate`."""
        return as_scored(document)

    def placed_in(self, folder: Path) -> Recipe:
        """The same recipe, its relative paths looked up in `folder` first."""
        placed = self.model_copy()
        placed._folder = folder
        return placed

    def locate(self, name: str) -> str:
        """The absolute path of a local file or folder; a repo's name comes back as it is.

        A relative path is looked up beside the recipe, then in the working folder.
        """
        for candidate in (self._folder / Path(name).expanduser(), Path(name).expanduser()):
            if candidate.exists():
                return str(candidate.resolve())
        return str(self._folder.resolve() / name) if name.startswith((".", "/", "~")) else name

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The models other than the base; mergekit's configs often list the base among them.

        Of `slices` each model stands once, in the order in which they name it.
        """
        named = dict.fromkeys(source.model for one in self.slices for source in one.sources)
        listed = self.models or tuple(ModelEntry(model=model) for model in named)
        return tuple(entry for entry in listed if entry.model != self.base_model)

    @property
    def asked_tokenizer(self) -> Tokenizer | None:
        """What is asked of the tokenizer, in whichever form; None: nothing."""
        source = self.tokenizer_source
        return self.tokenizer if source is None else Tokenizer(source=source)

    def reference(self, name: str) -> ModelReference | None:
        """The base or the model that is written so, with or without its revision."""
        listed = [entry.model for entry in self.models or self.experts]
        known = [self.base_model, *listed] if self.base_model else listed
        exact = [model for model in known if str(model) == name]
        return next(iter(exact or [model for model in known if model.name == name]), None)

    @property
    def output_dtype(self) -> DType | None:
        """The dtype on disk; None keeps each tensor's own."""
        return self.out_dtype or self.dtype

    def calibration_of(self, entry: ModelEntry) -> Calibration | None:
        """The expert's own calibration, or else the guide's or the recipe's."""
        common = self.guide.calibration if self.guide else None
        return entry.calibration or common or self.calibration
