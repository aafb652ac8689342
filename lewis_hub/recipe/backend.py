"""The part of `evaluate` that says how lm-eval, or mteb, runs the models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Literal

from pydantic import Field, model_validator

from lewis_hub.recipe.reference import Part

Backend = Literal["hf", "vllm", "local-completions", "mteb"]
Option = bool | int | float | str | tuple[str, ...]

TEXT_ONLY = ("chat_template", "num_fewshot", "generation", "limit")  # what mteb does not have

OURS = {  # arguments of a backend, or of a generation, that lewis-hub sets -> what to do instead
    "pretrained": "the models are those of the recipe",
    "tokenizer": "each model has its own tokenizer",
    "trust_remote_code": "no code of a model is run",
    "custom_generate": "no code of a model is run",
    "use_safetensors": "weights are read from safetensors files only",
    "load_format": "weights are read from safetensors files only",
    "device": "use `--device`",
    "batch_size": "set `batch_size` beside `backend_args`",
    "auth_token": "put it into the variable OPENAI_API_KEY, which no file records",
    "header": "put the key into the variable OPENAI_API_KEY, which no file records",
    "token": "put it into the variable HF_TOKEN, which no file records",
    "hf_token": "put it into the variable HF_TOKEN, which no file records",
}

ADDRESS = "base_url"
# What a recipe may set of a backend: how large and how exact a run is. Others may name code, files,
# repos and hosts; a recipe may be of someone else.
EXACTNESS = (
    *("dtype", "softmax_dtype", "mixed_precision_dtype", "attn_implementation", "quantization"),
    *("load_in_4bit", "load_in_8bit", "kv_cache_dtype", "enforce_eager", "seed"),
    *("truncation", "truncation_side", "truncate", "truncate_dim", "similarity_fn_name"),
    *("add_bos_token", "prefix_token_id", "enable_thinking", "use_fast_tokenizer"),
    *("tokenizer_backend", "tokenizer_mode", "tokenized_requests", "default_prompt_name"),
)
SIZE = (
    *("max_length", "max_model_len", "max_gen_toks", "max_batch_size", "max_num_seqs"),
    *("max_num_batched_tokens", "gpu_memory_utilization", "cpu_offload_gb", "swap_space"),
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "parallelize"),
    *("disable_custom_all_reduce", "enable_prefix_caching", "enable_chunked_prefill"),
    *("enable_expert_parallel", "block_size", "max_memory_per_gpu", "low_cpu_mem_usage"),
    *("logits_cache", "num_concurrent", "max_retries", "timeout"),
)
TEXTS = ("model", "eos_string", "think_end_token")  # that are sent or searched, and nothing else
WORD = re.compile(r"[\w.-]*", re.ASCII)  # no path and no repo, such as that of a kernel
# no parser of addresses reads another host in it
HERE = re.compile(r"https?://(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?(/[\w./-]*)?", re.ASCII)


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
        for key, options in (("backend_args", given), ("generation", self.generation or {})):
            if refused := [name for name in options if name in OURS]:
                name, instead = refused[0], OURS[refused[0]]
                raise ValueError(f"`{key}.{name}` is not yours to set: {instead}")
            for name, value in options.items():
                if isinstance(value, float) and not isfinite(value):  # JSON has no such number
                    raise ValueError(f"`{key}.{name}` is {value}, expected a finite number")
        served = self.backend == "local-completions"
        if served and ADDRESS not in given:
            url = "http://127.0.0.1:8000/v1/completions"
            raise ValueError(
                f"`{self.backend}` needs the server's address: `backend_args: {{base_url: {url}}}`"
            )
        if not served and ADDRESS in given:
            raise ValueError("`base_url` is an argument of `backend: local-completions`")
        other = [name for name in TEXT_ONLY if getattr(self, name, None) not in (None, False)]
        if self.backend == "mteb" and other:
            raise ValueError(f"`{other[0]}` does not apply to `backend: mteb`")
        return self


def unsafe_args(given: Mapping[str, Option]) -> Iterator[tuple[str, str]]:
    """Yield the names of `backend_args` that a recipe may not set, and why."""
    for name, value in given.items():
        if name == ADDRESS and not HERE.fullmatch(str(value)):
            yield name, "it is not on this machine, and would get the prompts and your API key."
        elif name not in (ADDRESS, *TEXTS, *EXACTNESS, *SIZE):
            yield name, "it may name code, files or hosts, and a recipe may be of someone else."
        elif name in EXACTNESS and isinstance(value, str) and not WORD.fullmatch(value):
            yield name, "it may name code of the Hub, and a recipe may be of someone else."
