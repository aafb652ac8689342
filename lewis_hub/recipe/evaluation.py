"""What scores a merge and decides whether it is published, in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from lewis_hub.recipe.backend import Running
from lewis_hub.recipe.reference import Part, listed


class Gate(Part):
    """A condition for publishing: the merge is compared by one metric of one task."""

    task: str = Field(description="One of `evaluate.tasks`.")
    metric: str = Field(description="`metric,filter` as lm-eval names it: `exact_match,none`.")
    not_worse_than: tuple[Literal["base", "experts", "uniform", "previous"], ...] = Field(
        ("uniform",),
        min_length=1,
        description="What the merge is compared with. `uniform`: the same merge with one density "
        "for all tensors, or without statistics. `previous`: the merge that is in `publish.repo`. "
        "The others must be in `evaluate.compare`.",
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="How much worse the merge may be, in the unit of the metric.",
    )
    on_refusal: Literal["stop", "pull-request"] = Field(
        "stop", description="On failure --push pushes nothing, or opens a marked pull request."
    )


Gates = Annotated[
    tuple[Gate, ...],
    Field(min_length=1),
    BeforeValidator(listed, json_schema_input_type=Gate | tuple[Gate, ...]),
]


class Benchmark(Part):
    """A benchmark on the Hub that belongs to a task; the score is published to its leaderboard."""

    dataset: str = Field(description="owner/name of a dataset that the Hub lists as a benchmark.")
    task_id: str = Field(min_length=1, description="The task's id in the dataset's `eval.yaml`.")
    metric: str = Field(description="`metric,filter` as lm-eval names it: `exact_match,none`.")
    scale: float = Field(
        100.0, gt=0, allow_inf_nan=False, description="Factor of the metric; 100 gives percent."
    )


class Evaluation(Running):
    """The tasks that score the merge, and the models that are scored with it."""

    tasks: tuple[str, ...] = Field(
        min_length=1, description="lm-eval tasks, groups or tags, or tasks of mteb."
    )
    include: str | None = Field(
        None,
        description="Folder with your own task files, below the folder of the recipe. The "
        "files that are used are copied to `lewis/tasks`, with the Python that they import and "
        "their data in the folder. Their Python may name or open no other file in it.",
    )
    limit: int | None = Field(None, ge=1, description="Score only the first items of each task.")
    chat_template: bool = Field(
        default=False,
        description="Format prompts with each model's own chat template; every compared model "
        "must have one.",
    )
    compare: tuple[Literal["base", "experts", "uniform"], ...] = Field(
        ("base", "experts", "uniform"),
        description="Models that are scored on the same items as the merge. `uniform`: the same "
        "merge without guidance.",
    )
    log_samples: Literal["public", "all", "none"] | None = Field(
        None,
        description="Tasks whose questions and answers the report shows: those with public data "
        "(default), all, or none. Scores of items are always shown.",
    )
    gate: Gates | None = Field(
        None, description="One or several conditions. If one fails, the merge is not published."
    )
    benchmarks: Mapping[str, Benchmark] | None = Field(
        None, min_length=1, description="Task -> benchmark on the Hub that gets the score."
    )
