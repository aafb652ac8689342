"""lm-eval on one model: the same items, prompts and seeds for every model.

All that reaches into lm-eval, transformers or datasets further than their documentation goes is in
this file and in `benchmarks.at_commits`: progress bars are silenced, compiled templates are kept.
tests/evaluate/test_harness.py fails where a library moves what is replaced here.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lewis_hub.display import Advance
from lewis_hub.errors import EvaluationError, LewisHubError, UnscorableAnswerError
from lewis_hub.evaluate.answers import recorded_answers
from lewis_hub.evaluate.backends import EvaluationSettings, load_backend
from lewis_hub.evaluate.scores import MetricResult, ModelResult, TaskResult, pooled
from lewis_hub.evaluate.text_limits import (
    FEWER,
    MAX_BYTES,
    TOKENIZER_BYTES,
    require_short_answer,
)
from lewis_hub.hub.rows import library
from lewis_hub.limits import TooMuchError, limited
from lewis_hub.methods.numerics import torch_threads
from lewis_hub.recipe.backend import ADDRESS
from lewis_hub.tokenizer import panics_as_errors

if TYPE_CHECKING:
    from torch import Tensor

FEWSHOT_SEED = 1234  # the same few-shot examples for every model and run
SAMPLING_SEED = 1234  # for tasks that sample their answers
CPU_BYTES = 2_000_000_000
GENERATE = "generate_until"  # an output type of lm-eval
MAX_BATCH_SIZE = 128  # a larger batch is not faster
TINY = 20_000_000  # parameters
LONGEST_CAUSE = 500  # characters
OVERFLOWS = (  # what to do about a model whose answers are no numbers
    "Its activations overflow. Of a merge, lower the weights; of another model, leave it out of "
    "`compare`."
)


@dataclass(frozen=True)
class Benchmarks:
    """Tasks whose data and prompts are ready for any number of models."""

    tasks: Mapping[str, Any]  # lm-eval's task objects by name
    groups: Mapping[str, Any]  # its group objects by name
    limit: int | None  # number of first items of each task that are scored; None: all
    allow_code: bool  # tasks may run code that the model writes

    @property
    def n_requests(self) -> int:
        """The number of requests that one model answers."""
        return sum(each.repeats for task in self.tasks.values() for each in task.instances)

    @property
    def digest(self) -> str:
        """A digest of the items and of what a model is asked about them."""
        digest = hashlib.sha256()
        for name, task in self.tasks.items():
            for each in task.instances:
                digest.update(repr((name, each.doc_id, each.doc, each.arguments)).encode())
        return digest.hexdigest()


def evaluate_model(
    folder: Path, benchmarks: Benchmarks, settings: EvaluationSettings, advance: Advance
) -> ModelResult:
    """Score the model in a folder; `advance` counts answered requests.

    No code of the folder is run, and only its safetensors files are read as weights.

    Raises:
        EvaluationError: the model cannot be loaded, or its context is too short for the answers
            of a task.
    """
    lm = load(folder, settings)
    result = evaluate_loaded(lm, benchmarks, settings, advance)
    del lm
    gc.collect()  # one model in memory at a time
    return result


def load(folder: Path, settings: EvaluationSettings) -> Any:
    """Load the model in a folder as lm-eval's `LM`, or raise an EvaluationError."""
    with quiet_libraries():
        return load_backend(folder, settings)


def exchange(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a loaded model the weights that a checkpoint with these tensors has.

    transformers maps tensors of a file to parameters in memory: it may join, split or rename them.
    Tokenizer and configuration stay.

    Raises:
        EvaluationError: a weight of the model is not among them, or has another shape. The model
            has no weights then.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    dtype, device = model.dtype, model.device
    for parameter in parameters.values():
        parameter.data = parameter.data.new_empty(0)  # only one model in memory at a time
    with quiet_libraries():
        other, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=dict(tensors),
            dtype=dtype,
            device_map={"": device},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    absent = parameters.keys() & {*info["missing_keys"], *mismatched}
    if absent:
        problem = f"{len(absent)} of its weights cannot be exchanged, {min(absent)} among them."
        raise EvaluationError("the model", problem, "Expected: a merge with the same tensors.")
    for name, parameter in other.named_parameters():
        parameters[name].data = parameter.data
    for name, buffer in other.named_buffers():
        buffers[name].data = buffer.data


def evaluate_loaded(
    lm: Any, benchmarks: Benchmarks, settings: EvaluationSettings, advance: Advance
) -> ModelResult:
    """Score a model from `load`, as `evaluate_model` does."""
    if settings.chat_template and not lm.tokenizer.chat_template:
        remedy = "Remove `evaluate.chat_template`, or compare with other models."
        raise EvaluationError(lm.tokenizer.name_or_path, "has no chat template.", remedy)
    with (
        library_settings(allow_code=benchmarks.allow_code),
        seeded(),
        _errors_named(benchmarks, settings),
        panics_as_errors(),
    ):
        if settings.backend == "hf":
            lm.batch_size_per_gpu = settings.batch_size or _affordable_batch(lm, benchmarks)
        lm.set_cache_hook(_Counter(lm, advance))
        for name, task in benchmarks.tasks.items():
            _check_length(name, task, lm)
            reset_fewshot(task)
        threads = threads_for(lm.model) if settings.backend == "hf" else nullcontext()
        with threads, _limited_growth(benchmarks):
            return _result(_run(lm, benchmarks, settings), benchmarks, settings)


@contextmanager
def _limited_growth(benchmarks: Benchmarks) -> Iterator[None]:
    """Refuse texts that take far more memory than their letters tell: each may be a token."""
    try:
        with limited(math.inf, "the requests", max_bytes=MAX_BYTES):
            yield
    except TooMuchError as error:
        raise EvaluationError(", ".join(benchmarks.tasks), str(error), FEWER) from None


@contextmanager
def _errors_named(benchmarks: Benchmarks, settings: EvaluationSettings) -> Iterator[None]:
    """Turn errors of lm-eval, of a server, and of the Python and data of tasks into one message."""
    import torch

    tasks = ", ".join(benchmarks.tasks)
    try:
        yield
    except LewisHubError:
        raise
    except OSError as error:  # the class of the errors of `requests`
        if ADDRESS not in settings.backend_args:
            raise
        where, lines = str(settings.backend_args[ADDRESS]), str(error).splitlines()
        problem = f"the server did not answer: {type(error).__name__}: {lines[0] if lines else ''}"
        raise EvaluationError(where, problem, "Start it, or correct `base_url`.") from error
    except torch.OutOfMemoryError as error:
        remedy = "Set a smaller `batch_size` in `evaluate`, or score on another `--device`."
        raise EvaluationError(
            tasks, "the device has too little memory to score.", remedy
        ) from error
    except Exception as error:  # of any class: a row that is no Python is a SyntaxError
        cause = " ".join(str(error).split())[:LONGEST_CAUSE]
        problem = f"lm-eval could not score the answers: {type(error).__name__}: {cause}"
        remedy = "Check the metrics, filters and columns of the task files."
        raise EvaluationError(tasks, problem, remedy) from error


def _run(lm: Any, benchmarks: Benchmarks, settings: EvaluationSettings) -> Mapping[str, Any]:
    """lm-eval's report."""
    from lm_eval.evaluator import evaluate

    report: Mapping[str, Any] = evaluate(
        lm=lm,
        task_dict={"tasks": benchmarks.tasks, "groups": benchmarks.groups},
        limit=benchmarks.limit,
        bootstrap_iters=0,  # standard errors are ours: lm-eval's start processes and print
        apply_chat_template=settings.chat_template,
        confirm_run_unsafe_code=benchmarks.allow_code,
    )
    return report


class _Counter:
    """A cache hook of lm-eval, which calls it for each answered request; it counts and checks."""

    def __init__(self, lm: Any, advance: Advance) -> None:
        self.lm, self.advance = lm, advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:  # noqa: ARG002 - their signature
        """Count an answer; a likelihood that is NaN would count as a choice of the first answer."""
        first = res[0] if isinstance(res, tuple) and res else res
        if isinstance(res, str):
            require_short_answer(self._model, res, *self._asked(req))
        if isinstance(first, float) and math.isnan(first):
            problem = "gives texts likelihoods that are not numbers (NaN), so it cannot be scored."
            raise UnscorableAnswerError(self._model, problem, OVERFLOWS)
        self.advance(1)

    @property
    def _model(self) -> str:
        return str(getattr(self.lm.tokenizer, "name_or_path", "the model"))

    def _asked(self, request: Any) -> tuple[Mapping[str, Any], int]:
        """The settings of a request of text, and the tokens that an answer has without any."""
        settings = request[1] if len(request) > 1 and isinstance(request[1], Mapping) else {}
        return settings, int(getattr(self.lm, "max_gen_toks", 0) or 0)


def configure(task: Any, settings: EvaluationSettings) -> None:
    """Set the number of few-shot examples and the generation options of a task, as lm-eval does.

    A task whose file says 0 examples stays without examples.
    """
    if settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", settings.num_fewshot)
    if settings.generation and task.get_config("output_type") == GENERATE:
        options = {
            k: list(v) if isinstance(v, tuple) else v for k, v in settings.generation.items()
        }
        task.set_config("generation_kwargs", options, update=True)


def reset_fewshot(task: Any) -> None:
    """Draw the same few-shot examples again: lm-eval's sampler moves on with every model."""
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(FEWSHOT_SEED)


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the global generators that sampling tasks draw from, and restore them afterwards."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(SAMPLING_SEED)
        np.random.seed(SAMPLING_SEED)
        torch.manual_seed(SAMPLING_SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def threads_for(model: Any) -> AbstractContextManager[None]:
    """Run a tiny model on one thread: several threads wait for each other longer than they work."""
    import torch

    return torch_threads(1 if model.num_parameters() < TINY else torch.get_num_threads())


def _affordable_batch(lm: Any, benchmarks: Benchmarks) -> int:
    """As many requests as an eighth of a GPU's memory, or CPU_BYTES, allow."""
    import torch

    on_gpu = lm.device.type == "cuda"
    memory = torch.cuda.get_device_properties(lm.device).total_memory // 8 if on_gpu else CPU_BYTES
    requests = (request for task in benchmarks.tasks.values() for request in task.instances)
    texts = ("".join(a for a in request.args if isinstance(a, str)) for request in requests)
    longest = max(texts, key=len)
    n_tokens = min(len(lm.tok_encode(longest)) + 1, lm.max_length)
    n_vocabulary = lm.model.config.get_text_config().vocab_size
    n = affordable_batch(n_tokens, n_vocabulary, memory, _most_beams(lm, benchmarks))
    return min(n, tokenisable_batch(len(longest)))


def _most_beams(lm: Any, benchmarks: Benchmarks) -> int:
    """The beams of a request: those of a task come before the model's own."""
    tasks = [t for t in benchmarks.tasks.values() if t.get_config("output_type") == GENERATE]
    options = [task.get_config("generation_kwargs") or {} for task in tasks]
    own = getattr(getattr(lm.model, "generation_config", None), "num_beams", None)
    return max((int(one.get("num_beams") or own or 1) for one in options), default=1)


def affordable_batch(n_tokens: int, n_vocabulary: int, memory_bytes: int, n_beams: int = 1) -> int:
    """Number of texts that fit: lm-eval holds float32 logits and log-softmax of every token."""
    n_bytes = n_tokens * n_vocabulary * 8 * n_beams
    return max(1, min(MAX_BATCH_SIZE, memory_bytes // n_bytes))


def tokenisable_batch(n_letters: int) -> int:
    """Number of texts of so many letters that a tokenizer takes CPU_BYTES for, before they are cut.

    It is at most MAX_BATCH_SIZE.
    """
    return max(1, min(MAX_BATCH_SIZE, CPU_BYTES // (TOKENIZER_BYTES * max(1, n_letters))))


def logits_bytes(config: Mapping[str, Any]) -> int:
    """Bound the logits in memory while a model with this configuration is scored on a CPU.

    Those of a batch stay until the next batch has its own, so they are there one and a half times.
    """
    text = config.get("text_config") or config
    names = (("max_position_embeddings", "n_positions"), ("vocab_size",))
    found = [[n for key in keys if isinstance(n := text.get(key), int)] for keys in names]
    largest = math.prod(numbers[0] for numbers in found) * MAX_BATCH_SIZE * 8 if all(found) else 0
    return 3 * min(CPU_BYTES, largest or CPU_BYTES) // 2


def _check_length(name: str, task: Any, lm: Any) -> None:
    """Refuse a task whose longest answer leaves no space for a prompt; lm-eval only asserts it."""
    if task.get_config("output_type") != GENERATE:
        return
    options: Mapping[str, Any] = task.get_config("generation_kwargs") or {}
    default = lm._max_gen_toks if hasattr(lm, "_max_gen_toks") else lm.max_gen_toks
    longest = int(options.get("max_gen_toks", options.get("max_new_tokens", default)))
    if longest >= lm.max_length:
        problem = (
            f"generates up to {longest} tokens, but the model's context is {lm.max_length} tokens."
        )
        remedy = "Set a smaller `generation_kwargs.max_gen_toks` in its file."
        raise EvaluationError(name, problem, remedy)


def _result(
    report: Mapping[str, Any], benchmarks: Benchmarks, settings: EvaluationSettings
) -> ModelResult:
    """Read lm-eval's report: tasks, then groups with scores of their own."""
    tasks = {name: _task_result(report, name, task) for name, task in benchmarks.tasks.items()}
    for name, group in benchmarks.groups.items():
        scores = _scores(report["results"][name])
        if scores:
            parts = [tasks[task.task_name] for task in group.get_all_tasks()]
            tasks[name] = TaskResult(
                version=str(report["versions"].get(name)),
                documents=tuple(item for part in parts for item in part.documents),
                prompts=tuple(item for part in parts for item in part.prompts),
                metrics={key: pooled(parts, key, value) for key, value in scores.items()},
            )
    return ModelResult(tasks, settings.stated)


def _task_result(report: Mapping[str, Any], name: str, task: Any) -> TaskResult:
    from lm_eval.api.metrics import mean

    rows: dict[str, dict[int, Mapping[str, Any]]] = {}  # filter -> item -> row
    for row in report["samples"][name]:
        rows.setdefault(row["filter"], {})[row["doc_id"]] = row
    items = next(iter(rows.values()))
    scores = _scores(report["results"][name])
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
        answers=recorded_answers(task, rows, metrics),
    )


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in lm-eval's report of a task: their keys are `metric,filter`."""
    return {
        key: float(value)
        for key, value in results.items()
        if "," in key and not key.partition(",")[0].endswith("_stderr")
    }


def _numbers(answers: Sequence[Any]) -> tuple[float | None, ...] | None:
    """A number per item, None where the task gives none; None if any number is not finite."""
    numbers = tuple(None if answer is None else float(answer) for answer in answers)
    finite = all(number is None or math.isfinite(number) for number in numbers)
    return numbers if finite else None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress warnings, log lines below an error and progress bars of lm-eval and its libraries.

    Everything is restored afterwards. Only calls into lm-eval run inside.
    """
    library()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        _hide_bars(stack)
        yield


def _hide_bars(stack: ExitStack) -> None:
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from datasets import utils as datasets_utils
    from transformers.utils import logging as untyped

    transformers_logging: Any = untyped

    if not datasets_utils.are_progress_bars_disabled():
        datasets_utils.disable_progress_bars()
        stack.callback(datasets_utils.enable_progress_bars)
    if transformers_logging.is_progress_bar_enabled():
        transformers_logging.disable_progress_bar()
        stack.callback(transformers_logging.enable_progress_bar)
    # lm-eval has no switch for its bars, so the name `tqdm` of its modules is replaced
    modules: tuple[Any, ...] = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
    others = (
        sys.modules.get(f"lm_eval.models.{name}") for name in ("api_models", "vllm_causallms")
    )
    for module in (*modules, *(one for one in others if hasattr(one, "tqdm"))):
        stack.callback(setattr, module, "tqdm", module.tqdm)
        module.tqdm = _without_bar(module.tqdm)
    api: Any = sys.modules.get("lm_eval.models.api_models")
    if bars := getattr(api, "tqdm_asyncio", None):  # of concurrent requests
        stack.callback(setattr, api, "tqdm_asyncio", bars)
        api.tqdm_asyncio = SimpleNamespace(gather=partial(bars.gather, disable=True))


def _without_bar(tqdm: Any) -> Any:
    return lambda *args, **kwargs: tqdm(*args, **{**kwargs, "disable": True})


@contextmanager
def library_settings(*, allow_code: bool) -> Iterator[None]:
    """Quiet libraries, prompt templates that are compiled once, and leave to run generated code.

    lm-eval compiles a template again for every item, which was more than half of the time of a
    small model's evaluation. A template holds no state, so the prompts are the same.
    """
    variable, before = "HF_ALLOW_CODE_EVAL", os.environ.get("HF_ALLOW_CODE_EVAL")
    with quiet_libraries():
        from lm_eval import utils

        environment: Any = utils.env
        environment.from_string = lru_cache(maxsize=256)(environment.from_string)
        os.environ[variable] = "1" if allow_code else "0"
        try:
            yield
        finally:
            del environment.from_string  # of the instance; its class has the method
            del os.environ[variable]
            if before is not None:
                os.environ[variable] = before
