"""What a recipe says of leaderboards."""

from __future__ import annotations

from pydantic import Field

from lewis_hub.recipe_settings import Part


class Benchmark(Part):
    """The benchmark dataset on the Hub that a task is: its leaderboard is told the score."""

    dataset: str = Field(description="owner/name of a dataset that the Hub lists as a benchmark.")
    task_id: str = Field(min_length=1, description="As the dataset's `eval.yaml` names it.")
    metric: str = Field(description="`metric,filter` as lm-eval names it: `exact_match,none`.")
    scale: float = Field(100.0, gt=0, description="Times the metric; most leaderboards: percent.")
