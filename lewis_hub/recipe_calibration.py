"""What a recipe says of its calibration: which texts run through base and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from lewis_hub.recipe_settings import Part


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
