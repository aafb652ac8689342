"""lm-eval on one model folder: the same items, prompts and seeds for every model."""

from __future__ import annotations

import gc
import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.benchmarks import Benchmarks, code_allowed, reset_fewshot
from lewis_hub.evaluate.results import MetricResult, ModelResult, TaskResult, pooled
from lewis_hub.evaluate.tasks import compiled_once, quiet_libraries
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from torch import Tensor


CPU_BYTES = 2_000_000_000
MOST_TOGETHER = 128  # more is not faster
TINY = 20_000_000  # parameters


@dataclass(frozen=True)
class EvaluationSettings:
    """How models are run; the same for all that are compared.

    Attributes:
        device: a torch device. On `cpu` the arithmetic is float32, else the model's own dtype.
        batch_size: requests answered together; None: as many as an eighth of a GPU's memory, or
            2 GB on a CPU, allow. Scores depend on it only by rounding.
        chat_template: whether prompts go through each model's own chat template.
        seed: for tasks that sample their answers.
    """

    device: str = "cpu"
    batch_size: int | None = None
    chat_template: bool = False
    seed: int = 1234


def evaluate_model(
    folder: Path, benchmarks: Benchmarks, settings: EvaluationSettings, advance: Advance
) -> ModelResult:
    """Score the model in a folder; `advance` counts answered requests.

    No code of the folder is run, and nothing but safetensors is read from it.

    Raises:
        EvaluationError: the model cannot be loaded, or is too short for a task's answers.
    """
    lm = load(folder, settings)
    result = evaluate_loaded(lm, benchmarks, settings, advance)
    del lm
    gc.collect()  # one model in memory at a time
    return result


def load(folder: Path, settings: EvaluationSettings) -> Any:
    """lm-eval's wrapper round the model in a folder, as every model is run here.

    Raises:
        EvaluationError: it cannot be loaded.
    """
    with quiet_libraries():
        return _load(folder, settings)


def evaluate_loaded(
    lm: Any, benchmarks: Benchmarks, settings: EvaluationSettings, advance: Advance
) -> ModelResult:
    """Score a model from `load`, as `evaluate_model` does."""
    code = code_allowed(allowed=benchmarks.allow_code)
    with quiet_libraries(), code, compiled_once(), _seeded(settings.seed):
        if settings.batch_size is None:
            lm.batch_size_per_gpu = _affordable_batch(lm, benchmarks)
        lm.set_cache_hook(_Counter(advance))
        _check_chat(lm, settings)
        for name, task in benchmarks.tasks.items():
            _check_length(name, task, lm)
            reset_fewshot(task)
        with fitting_threads(lm):
            return _result(_answered(lm, benchmarks, settings), benchmarks)


def _answered(lm: Any, benchmarks: Benchmarks, settings: EvaluationSettings) -> Mapping[str, Any]:
    """What lm-eval reports; a task that cannot score its answers is told by its name."""
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate

    try:
        found: Mapping[str, Any] = evaluate(
            lm=lm,
            task_dict={"tasks": benchmarks.tasks, "groups": benchmarks.groups},
            limit=benchmarks.limit,
            bootstrap_iters=0,  # standard errors are ours: lm-eval's start processes and print
            apply_chat_template=settings.chat_template,
            confirm_run_unsafe_code=benchmarks.allow_code,
        )
    except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
        problem = f"lm-eval could not score the answers: {type(error).__name__}: {error}"
        remedy = "Check the metrics, filters and columns of the task files."
        raise EvaluationError(", ".join(benchmarks.tasks), problem, remedy) from error
    return found


class _Counter:
    """lm-eval's cache hook: called once for each answered request, which is all it does here."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:  # noqa: ARG002 - their signature
        self.advance(1)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators that sampling tasks draw from, seeded and then put back."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def fitting_threads(lm: Any) -> Iterator[None]:
    """One thread for a tiny model: several wait for each other longer than they work."""
    import torch

    before = torch.get_num_threads()
    if lm.model.num_parameters() < TINY:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(folder: Path, settings: EvaluationSettings) -> Any:
    from lm_eval.models.huggingface import HFLM
    from safetensors import SafetensorError

    path = str(folder.resolve())  # a relative one is taken for the name of a repo
    try:
        return HFLM(
            pretrained=path,
            tokenizer=path,
            device=settings.device,
            dtype="float32" if settings.device == "cpu" else "auto",
            batch_size=settings.batch_size or 1,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        problem = f"cannot be loaded as a language model: {type(error).__name__}: {error}"
        remedy = (
            "Expected: config.json, tokenizer files and safetensors that transformers can load."
        )
        raise EvaluationError(str(folder), problem, remedy) from error


def _affordable_batch(lm: Any, benchmarks: Benchmarks) -> int:
    import torch

    on_gpu = lm.device.type == "cuda"
    memory = torch.cuda.get_device_properties(lm.device).total_memory // 8 if on_gpu else CPU_BYTES
    requests = (request for task in benchmarks.tasks.values() for request in task.instances)
    longest = max(("".join(filter(_is_text, request.args)) for request in requests), key=len)
    n_tokens = min(len(lm.tok_encode(longest)) + 1, lm.max_length)
    return affordable_batch(n_tokens, lm.model.config.get_text_config().vocab_size, memory)


def affordable_batch(n_tokens: int, n_vocabulary: int, memory_bytes: int) -> int:
    """How many texts fit: lm-eval holds float32 logits of every token, and their log-softmax."""
    return max(1, min(MOST_TOGETHER, memory_bytes // (n_tokens * n_vocabulary * 8)))


def _is_text(argument: Any) -> bool:
    return isinstance(argument, str)


def _check_chat(lm: Any, settings: EvaluationSettings) -> None:
    if settings.chat_template and not lm.tokenizer.chat_template:
        remedy = "Leave out `evaluate.chat_template`, or what it is compared with."
        raise EvaluationError(lm.tokenizer.name_or_path, "has no chat template.", remedy)


def _check_length(name: str, task: Any, lm: Any) -> None:
    """Refuse a task whose longest answer leaves no room for a prompt; lm-eval only asserts it."""
    if task.get_config("output_type") != "generate_until":
        return
    options: Mapping[str, Any] = task.get_config("generation_kwargs") or {}
    longest = int(options.get("max_gen_toks", options.get("max_new_tokens", lm.max_gen_toks)))
    if longest >= lm.max_length:
        problem = f"asks for {longest} tokens, and the model's context is {lm.max_length}."
        raise EvaluationError(name, problem, "Set `generation_kwargs.max_gen_toks` in its file.")


def _result(found: Mapping[str, Any], benchmarks: Benchmarks) -> ModelResult:
    tasks = {name: _task_result(found, name, task) for name, task in benchmarks.tasks.items()}
    for name, group in benchmarks.groups.items():
        scores = _scores(found["results"][name])
        if scores:
            parts = [tasks[task.task_name] for task in group.get_all_tasks()]
            tasks[name] = _group_result(str(found["versions"].get(name)), parts, scores)
    return ModelResult(tasks)


def _task_result(found: Mapping[str, Any], name: str, task: Any) -> TaskResult:
    from lm_eval.api.metrics import mean

    rows: dict[str, dict[int, Mapping[str, Any]]] = {}  # filter -> item -> what it gave
    for row in found["samples"][name]:
        rows.setdefault(row["filter"], {})[row["doc_id"]] = row
    items = next(iter(rows.values()))
    scores = _scores(found["results"][name])
    metrics: dict[str, MetricResult] = {}
    for key, value in scores.items():
        metric, _, filter_name = key.partition(",")
        is_mean = task.aggregation().get(metric, mean) is mean
        answers = [rows[filter_name].get(item, {}).get(metric) for item in items]
        direction = task.higher_is_better().get(metric)
        metrics[key] = MetricResult(value, _numbers(answers) if is_mean else None, direction)
    return TaskResult(
        version=str(task.VERSION),
        documents=tuple(_digest(row["doc_hash"], row["target_hash"]) for row in items.values()),
        prompts=tuple(_digest(row["prompt_hash"]) for row in items.values()),
        metrics=metrics,
    )


def _group_result(
    version: str, parts: Sequence[TaskResult], scores: Mapping[str, float]
) -> TaskResult:
    return TaskResult(
        version=version,
        documents=tuple(item for part in parts for item in part.documents),
        prompts=tuple(item for part in parts for item in part.prompts),
        metrics={key: pooled(parts, key, value) for key, value in scores.items()},
    )


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among what lm-eval reports of a task: their keys are `metric,filter`."""
    return {
        key: float(value)
        for key, value in results.items()
        if "," in key and not key.partition(",")[0].endswith("_stderr")
    }


def _numbers(answers: Sequence[Any]) -> tuple[float | None, ...] | None:
    """One number per item, None where the task gave none; nothing if one is not finite."""
    numbers = tuple(None if answer is None else float(answer) for answer in answers)
    finite = all(number is None or math.isfinite(number) for number in numbers)
    return numbers if finite else None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def exchange(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Make of a loaded model what would have been loaded from a folder with these tensors.

    transformers' own rules say what becomes of them: tensors of a file may be put together, split
    or renamed in memory. Tokenizer and configuration stay.

    Args:
        model: of what `load` returns.
        tensors: all of the other model, by the names that a file has for them.

    Raises:
        EvaluationError: a weight of the model is not among them, or has another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    loading = LoadStateDictConfig(
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        device_map={"": model.device},
        weight_mapping=cast("Any", get_model_conversion_mapping(model)),
    )
    with quiet_libraries():
        found, _ = convert_and_load_state_dict_in_model(model, dict(tensors), loading)
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(found)
    parameters = {name for name, _ in model.named_parameters()}
    absent = parameters & {*found.missing_keys, *(key for key, *_ in found.mismatched_keys)}
    if absent:
        problem = f"{len(absent)} of its weights cannot be exchanged, {min(absent)} among them."
        raise EvaluationError("the model", problem, "Expected: a merge with the same tensors.")
