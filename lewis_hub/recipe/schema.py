"""What the user asks: the types of a recipe. `recipe.read` reads a recipe from YAML.

A recipe is a superset of a mergekit configuration. Every type is frozen and refuses unknown keys;
the field descriptions are the text that editors show through the JSON Schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

ApplyTo = Literal["density", "weight", "both"]  # what a guide's schedule sets

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", re.ASCII)


def _number(value: bool | int | float | str) -> bool | int | float | str:  # noqa: FBT001
    """YAML reads 1e-5, which has no point, as text."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


Scalar = Annotated[bool | int | float | str, AfterValidator(_number)]
Gradient = Annotated[tuple[float, ...], Field(min_length=1)]


class Part(BaseModel):
    """A part of a recipe: it stays as it was read, and refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Conditional(Part):
    """A value for the tensors whose names contain `filter`; the first that matches counts."""

    filter: str | None = Field(None, description="Part of a tensor's name; absent or `*`: any.")
    value: Scalar | Gradient


def _listed(value: Any) -> Any:
    """Mergekit takes a single condition without a list."""
    return [value] if isinstance(value, Mapping) else value


Conditions = Annotated[
    tuple[Conditional, ...],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=Conditional | tuple[Conditional, ...]),
]
Setting = Scalar | Gradient | Conditions
Settings = Mapping[str, Setting]


def _present(value: Any) -> Any:
    return {} if value is None else value


Parameters = Annotated[Settings, BeforeValidator(_present)]  # a key without a value is allowed


class Calibration(Part):
    """Texts to run through base and expert. They pay when they resemble the benchmark."""

    dataset: str | None = Field(
        None, description="Repo, repo@revision, or a local .jsonl or .parquet file; or else `task`."
    )
    task: str | None = Field(
        None, description="lm-eval task whose own items are put through its prompt and target."
    )
    include: str | None = Field(None, description="Folder with own lm-eval task files.")
    revision: str | None = Field(None, description="Of the task's dataset; absent: its newest.")
    config: str | None = Field(None, description="Configuration (subset) of the dataset.")
    split: str = Field("train", description="Split to draw from; never one that is scored.")
    text: str | None = Field(None, description="Template over columns: `{question} {answer}`.")
    messages: str | None = Field(None, description="Column of chat messages instead of `text`.")
    chat_template: bool | None = Field(
        None, description="Of a task: put prompts through it. Absent: as `evaluate` says."
    )
    samples: int = Field(15, ge=1, description="Rows drawn by `seed`.")
    max_tokens: int = Field(
        512, ge=1, description="Longer texts are cut: a task's at the beginning, others at the end."
    )
    allow_overlap: bool = Field(
        default=False, description="Carry on where items are drawn that `evaluate` scores."
    )

    @model_validator(mode="after")
    def _one_template(self) -> Calibration:
        if (self.dataset is None) == (self.task is None):
            raise ValueError("give `dataset` (with a template) or `task` (an lm-eval task)")
        if self.task is None and (self.text is None) == (self.messages is None):
            raise ValueError("give `text` (a template over columns) or `messages` (a column)")
        of_data, of_task = ("config", "text", "messages"), ("include", "revision", "chat_template")
        other = of_data if self.task else of_task
        for key in other:
            if getattr(self, key) is not None:
                raise ValueError(f"`{key}` does not go with `{'task' if self.task else 'dataset'}`")
        return self

    @property
    def data(self) -> str:
        """The dataset or task, for messages."""
        return self.dataset or f"task {self.task}"


def as_scored(document: Any) -> Any:
    """A recipe's document, each calibration on a task told to use the chat template.

    So it is where `evaluate` uses it and the calibration does not say; else nothing changes.
    """
    scoring = document.get("evaluate") if isinstance(document, Mapping) else None
    in_chat = isinstance(scoring, Mapping) and scoring.get("chat_template") is True
    return _in_chat(document) if in_chat else document


def _in_chat(place: Any) -> Any:
    if isinstance(place, list):
        return [_in_chat(one) for one in place]
    if not isinstance(place, Mapping):
        return place
    told = {key: _in_chat(value) for key, value in place.items()}
    of = told.get("calibration")
    if isinstance(of, Mapping) and of.get("task") is not None:
        told["calibration"] = {"chat_template": True, **of}
    return told


CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")  # that come with the package


class ModelToken(Part):
    """A token of one of the models, by its text or its id."""

    kind: Literal["model_token"]
    model: str = Field(min_length=1)
    token: str | None = None
    token_id: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_name(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give `token` (its text) or `token_id`")
        return self


class Zero(Part):
    """No token at all: zeros."""

    kind: Literal["zero"]


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", "model")
    return kind if kind in ("model", "zero") else "model_token"


Origin = Annotated[
    Annotated[str, Tag("model")]
    | Annotated[ModelToken, Tag("model_token")]
    | Annotated[Zero, Tag("zero")],
    Discriminator(_kind),
]


class TokenEmbedding(Part):
    """Whose row a token gets, instead of the usual rule."""

    source: Origin | None = Field(
        None, description="One of the models, {kind: model_token, ...} or {kind: zero}."
    )
    force: bool = Field(default=False, description="Also for the models that have the token.")

    @property
    def model(self) -> str | None:
        """The model whose row it is, as it is written; None for zeros and for the usual rule."""
        if isinstance(self.source, str):
            return self.source
        return self.source.model if isinstance(self.source, ModelToken) else None


class Tokenizer(Part):
    """The tokenizer of the merge, and how its embeddings are put together."""

    source: str = Field("union", description="base, union, or one of the models.")
    tokens: Mapping[str, TokenEmbedding] = Field(
        default_factory=dict, description="By the token's text; new ones are added."
    )
    pad_to_multiple_of: int | None = Field(None, ge=1, description="Of the rows of embeddings.")

    @field_validator("tokens", mode="before")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        return {} if value is None else value


class Gate(Part):
    """What a merge has to reach on one metric of one task to be published."""

    task: str = Field(description="One of `evaluate.tasks`.")
    metric: str = Field(description="`metric,filter` as lm-eval names it: `exact_match,none`.")
    not_worse_than: tuple[Literal["base", "experts", "uniform", "previous"], ...] = Field(
        ("uniform",),
        min_length=1,
        description="`uniform`: each twin, the same merge with one density everywhere or without "
        "statistics; `previous`: the merge now in `publish.repo`.",
    )
    tolerance: float = Field(0.0, ge=0, description="How much worse is no matter.")
    on_refusal: Literal["stop", "pull-request"] = Field(
        "stop", description="With --push: nothing is pushed, or a marked pull request opened."
    )


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


Gates = Annotated[
    tuple[Gate, ...],
    Field(min_length=1),
    BeforeValidator(_one_or_more, json_schema_input_type=Gate | tuple[Gate, ...]),
]


class Benchmark(Part):
    """The benchmark dataset on the Hub that a task is: its leaderboard is told the score."""

    dataset: str = Field(description="owner/name of a dataset that the Hub lists as a benchmark.")
    task_id: str = Field(min_length=1, description="As the dataset's `eval.yaml` names it.")
    metric: str = Field(description="`metric,filter` as lm-eval names it: `exact_match,none`.")
    scale: float = Field(100.0, gt=0, description="Times the metric; most leaderboards: percent.")


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
