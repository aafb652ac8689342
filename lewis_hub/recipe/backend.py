"""The part of `evaluate` that says how lm-eval, or mteb, runs the models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from lewis_hub.recipe.reference import Part

Backend = Literal["hf", "vllm", "local-completions", "mteb"]
Option = bool | int | float | str | tuple[str, ...]

TEXT_ONLY = ("chat_template", "num_fewshot", "generation", "limit")  # what mteb does not have

OURS = {  # arguments of a backend that lewis-hub sets -> what to do instead
    "pretrained": "the models are those of the recipe",
    "tokenizer": "each model has its own tokenizer",
    "trust_remote_code": "no code of a model is run",
    "use_safetensors": "weights are read from safetensors files only",
    "load_format": "weights are read from safetensors files only",
    "device": "use `--device`",
    "batch_size": "set `batch_size` beside `backend_args`",
    "auth_token": "put it into the variable OPENAI_API_KEY, which no file records",
    "header": "put the key into the variable OPENAI_API_KEY, which no file records",
}


class Running(Part):
    """How the models that are scored are run."""

    backend: Backend | None = Field(
        None,
        description="lm-eval's backend: hf (default), vllm, or local-completions (a server). Or "
        "mteb, which scores embedding models on its own tasks.",
    )
    backend_args: Mapping[str, Option] | None = Field(
        None,
        description="Arguments of the backend, by lm-eval's names (mteb: those of "
        "sentence-transformers). A server needs {base_url: http://127.0.0.1:8000/v1/completions}.",
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples in a prompt. Default: the task's number."
    )
    batch_size: int | None = Field(
        None, ge=1, description="Requests at a time. Default: as many as memory allows."
    )
    generation: Mapping[str, Option] | None = Field(
        None,
        description="Options for tasks that generate: {temperature: 0.6, max_gen_toks: 512}. They "
        "replace those of the task's file.",
    )

    @model_validator(mode="after")
    def _backend_fits(self) -> Running:
        given = self.backend_args or {}
        if refused := [name for name in given if name in OURS]:
            raise ValueError(f"`backend_args.{refused[0]}` is not yours to set: {OURS[refused[0]]}")
        served = self.backend == "local-completions"
        if served and "base_url" not in given:
            url = "http://127.0.0.1:8000/v1/completions"
            raise ValueError(
                f"`{self.backend}` needs the server's address: `backend_args: {{base_url: {url}}}`"
            )
        if not served and "base_url" in given:
            raise ValueError("`base_url` is an argument of `backend: local-completions`")
        other = [name for name in TEXT_ONLY if getattr(self, name, None) not in (None, False)]
        if self.backend == "mteb" and other:
            raise ValueError(f"`{other[0]}` does not apply to `backend: mteb`")
        return self
