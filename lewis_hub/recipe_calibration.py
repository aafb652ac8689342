"""What a recipe says of its calibration: which texts run through base and experts."""

from __future__ import annotations

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
    samples: int = Field(15, ge=1, description="Rows drawn by `seed`.")
    max_tokens: int = Field(512, ge=1, description="Longer texts are cut here.")
    allow_overlap: bool = Field(
        default=False, description="Carry on where items are drawn that `evaluate` scores."
    )

    @model_validator(mode="after")
    def _one_template(self) -> Calibration:
        if (self.dataset is None) == (self.task is None):
            raise ValueError("give `dataset` (with a template) or `task` (an lm-eval task)")
        if self.task is None and (self.text is None) == (self.messages is None):
            raise ValueError("give `text` (a template over columns) or `messages` (a column)")
        other = ("config", "text", "messages") if self.task else ("include", "revision")
        for key in other:
            if getattr(self, key) is not None:
                raise ValueError(f"`{key}` does not go with `{'task' if self.task else 'dataset'}`")
        return self

    @property
    def data(self) -> str:
        """The dataset or task, for messages."""
        return self.dataset or f"task {self.task}"
