"""Score an embedding model by mteb: its main scores, and numbers per item where they are means.

mteb reports a number per task. Where its predictions give a number per item whose mean is that
number, models are compared item by item; other scores have no interval.
"""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lewis_hub.display import Advance
from lewis_hub.errors import EvaluationError, LewisHubError
from lewis_hub.evaluate.backends import EvaluationSettings, leads_elsewhere
from lewis_hub.evaluate.chat import limit_tokenizer
from lewis_hub.evaluate.embedding_files import ModelFiles, folder_of, in_folder, normal
from lewis_hub.evaluate.embedding_limits import (
    SHORT,
    limit_batches,
    limit_held_vectors,
    limit_vectors,
)
from lewis_hub.evaluate.embedding_modules import (
    listed_modules,
    require_memory,
    require_supported,
)
from lewis_hub.evaluate.embedding_settings import FILE, require_own_settings
from lewis_hub.evaluate.embedding_tasks import (
    documents_of,
    guarded_scoring,
    metric_of,
    subsets_of,
)
from lewis_hub.evaluate.empty_models import limited_load, require_size_of_files, require_whole
from lewis_hub.evaluate.harness import quiet_libraries, seeded
from lewis_hub.evaluate.scores import MetricResult, ModelResult, TaskResult
from lewis_hub.evaluate.short_text import require_short_run
from lewis_hub.files import require_inside
from lewis_hub.hub.source import EMBEDDER
from lewis_hub.loadable import only_files_of, require_loadable
from lewis_hub.tokenizer import panics_as_errors

BATCH_SIZE = 32  # as in mteb
MAX_PROMPT = 10_000  # letters, before each text
ROUNDED = 1e-5  # mteb rounds the scores of retrieval
GAIN = "ndcg_at_"
LOADERS = {  # what a transformer is loaded for -> the class of transformers that loads it
    "sequence-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "any-to-any": "AutoModelForMultimodalLM",
}
TASKS = {  # a class of sentence-transformers -> what it loads a transformer for; others: features
    "CrossEncoder": "sequence-classification",
    "SparseEncoder": "fill-mask",
    "MLMTransformer": "fill-mask",
}

LOADED = ("SentenceTransformer", "SparseEncoder", "CrossEncoder")  # classes of models
POOLER = ("pooler.",)  # in the names of its weights
Predictions = Mapping[str, Mapping[str, Any]]  # subset -> split -> what mteb keeps of it


def evaluate_embedder(
    folder: Path, tasks: Mapping[str, Any], settings: EvaluationSettings, advance: Advance
) -> ModelResult:
    """Score the model in a folder on loaded tasks; `advance` counts their items.

    No code of the folder is run, and only its safetensors files are read as weights.

    Raises:
        EvaluationError: the model cannot be loaded, or a task cannot score it.
    """
    with quiet_libraries(), seeded():
        model, found = load_embedder(folder, settings), {}
        for name, task in tasks.items():
            found[name] = _scored(model, name, _with_fresh_seed(task), settings)
            advance(len(found[name].documents))
    del model
    gc.collect()  # one model in memory at a time
    return ModelResult(found, settings.stated)


def digest_of_items(tasks: Mapping[str, Any]) -> str:
    """A digest of the items of loaded tasks: rows, or queries."""
    digest = hashlib.sha256()
    for name, task in tasks.items():
        for split in task.eval_splits:
            for one in documents_of(task, split):
                digest.update(f"{name} {_digest(*one)}\n".encode())
    return digest.hexdigest()


def load_embedder(folder: Path, settings: EvaluationSettings) -> Any:
    """Load the model in a folder by the class of sentence-transformers that its files name.

    A plain encoder gets the mean over its tokens, as sentence-transformers does it.
    """
    import sentence_transformers

    dtype = "float32" if settings.device == "cpu" else "auto"
    own = {"device": settings.device, "trust_remote_code": False, "local_files_only": True}
    own["model_kwargs"] = {"use_safetensors": True, "dtype": dtype}
    try:
        with panics_as_errors(), only_files_of(folder, and_others=leads_elsewhere(settings)):
            files = in_folder(folder)
            _require_no_code(folder, files)
            for place in sorted({file.parent for file in folder.rglob("*token*.json")}):
                require_loadable(place)
            _require_memory(folder, files)
            kind = getattr(sentence_transformers, _class_of(files))
            limits = limited_load(files.where, files.stored_bytes(), settings.device)
            with limits, _whole_models(files):
                model = kind(str(folder.resolve()), **own, **settings.backend_args)
    except LewisHubError:
        raise
    except Exception as error:  # of any class, where a file has values of other types
        raise _not_loaded(str(folder), error) from error
    limit_tokenizer(str(folder), getattr(model, "tokenizer", None))
    limit_batches(str(folder), model)
    kind_of_model = _class_of(files)
    limit_vectors(str(folder), model, is_sparse=kind_of_model == "SparseEncoder")
    if kind_of_model == "SentenceTransformer":
        limit_held_vectors(str(folder), model)
    for name, prompt in (getattr(model, "prompts", None) or {}).items():
        if len(str(prompt)) > MAX_PROMPT:
            problem = f"its prompt `{str(name)[:100]}`, which goes before each text, has "
            problem += f"{len(str(prompt)):,} letters; the limit is {MAX_PROMPT:,}"
            raise EvaluationError(str(folder), problem, "Use a copy with a shorter prompt.")
    _require_short_run(folder, model)
    return model


def _require_short_run(folder: Path, model: Any) -> None:
    """Refuse a model that takes very long, or much memory, for a few words."""
    ranks = hasattr(model, "predict")  # pairs of texts
    run = partial(model.predict if ranks else model.encode, show_progress_bar=False)
    require_short_run(str(folder), model, lambda: run([(SHORT, SHORT)] if ranks else [SHORT]))


def require_embedder(files: ModelFiles) -> None:
    """Refuse what `load_embedder` would, as far as small files tell; no library is imported.

    Raises:
        EvaluationError: the model cannot be loaded, or not within the limits.
        SourceError: its configuration cannot be used.
    """
    try:
        require_own_settings(files)
        require_supported(files)
        require_memory(files)
    except LewisHubError:
        raise
    except Exception as error:  # as above
        raise _not_loaded(files.where, error) from error


@contextmanager
def _whole_models(files: ModelFiles) -> Iterator[None]:
    """Have transformers refuse a model with weights that are in no file, which would be random.

    Many encoders have no pooler, and need none, unless their settings name its output.
    """
    from transformers import PreTrainedModel

    kind: Any = PreTrainedModel
    settings = filter(FILE.fullmatch, files.sizes)
    unused = () if any(b"pooler" in (files.read(path) or b"") for path in settings) else POOLER
    before = kind.__dict__["from_pretrained"]

    @functools.wraps(before.__func__)
    def load(model_class: type, *args: Any, **options: Any) -> Any:
        asked = {**options, "output_loading_info": True}
        model, report = before.__func__(model_class, *args, **asked)
        missing = (name for name in report["missing_keys"] if not name.startswith(unused))
        require_whole(files.where, missing, EvaluationError)
        return model

    kind.from_pretrained = classmethod(load)
    try:
        yield
    finally:
        kind.from_pretrained = before


def _not_loaded(where: str, error: Exception) -> EvaluationError:
    problem = f"cannot be loaded as an embedding model: {type(error).__name__}: {error}"
    remedy = "Expected: a folder that sentence-transformers can load."
    return EvaluationError(where, problem, remedy)


def _require_memory(folder: Path, files: ModelFiles) -> None:
    """Refuse transformers, and modules together, that take far more memory than the files."""
    built: dict[str, int] = {}
    for place, kind in _loaders(folder, files):
        n_bytes = require_size_of_files(str(place), place, kind)
        path = normal(place.relative_to(folder).as_posix())
        built[path] = max(n_bytes, built.get(path, 0))
    require_memory(files, built)


def _loaders(folder: Path, files: ModelFiles) -> Iterator[tuple[Path, Any]]:
    """The folders with weights of transformers' models, each with the classes that may load it.

    They are not those for ONNX or of other modules.
    """
    import transformers

    kinds = {one.path: one.kind for one in listed_modules(files)}
    for path in files.configurations():
        place = folder_of(path)
        known = files.document(path).get("model_type") in transformers.CONFIG_MAPPING
        if known and Path(path).name == "config.json" and files.stored_bytes(place):
            yield folder / place, transformers.AutoModel
            kind = kinds.get(place, "") if kinds else _class_of(files)
            if loader := LOADERS.get(str(_task(files, place) or TASKS.get(kind))):
                yield folder / place, getattr(transformers, loader)


def _task(files: ModelFiles, place: str) -> object:
    """What a transformer is loaded for, if its settings tell."""
    found = (path for path in files.configurations() if FILE.fullmatch(path))
    stated = (files.document(path) for path in found if folder_of(path) == place)
    return next(filter(None, (one.get("transformer_task") for one in stated)), None)


def _require_no_code(folder: Path, files: ModelFiles) -> None:
    """Refuse what leads sentence-transformers out of the folder: other code, models and pickles."""
    require_own_settings(files)
    for module in listed_modules(files):
        if (folder / module.path).exists():  # a module without settings needs no folder
            require_inside(folder, folder / module.path, EvaluationError)
    require_supported(files)


def _class_of(files: ModelFiles) -> str:
    stated = files.document(EMBEDDER).get("model_type")
    if stated in LOADED:
        return str(stated)
    if stated is not None:  # sentence-transformers would load another model by its transformer
        problem = f"its {EMBEDDER} names {str(stated)[:100]!r}"
        raise EvaluationError(files.where, problem, f"Expected: {' or '.join(LOADED)}.")
    ranks = "sentence_transformers" in files.document("config.json")
    return "CrossEncoder" if ranks else "SentenceTransformer"


def _with_fresh_seed(task: Any) -> Any:
    """The same task and data: a task that samples moves its generators on with every model."""
    fresh = copy.copy(task)
    fresh.rng_state, fresh.np_rng = copy.deepcopy((task.rng_state, task.np_rng))
    return fresh


def _scored(model: Any, name: str, task: Any, settings: EvaluationSettings) -> TaskResult:
    import mteb

    with TemporaryDirectory() as kept:
        try:
            with panics_as_errors(), guarded_scoring(task):
                report = mteb.evaluate(
                    model,
                    [task],
                    cache=None,
                    co2_tracker=False,
                    prediction_folder=kept,
                    show_progress_bar=False,
                    encode_kwargs={
                        "batch_size": settings.batch_size or BATCH_SIZE,
                        "show_progress_bar": False,
                    },
                )
            if not report.task_results:
                problem = "mteb gave no result: its data may be private"
                raise EvaluationError(name, problem, "Check `hf auth login`.")
            file = Path(kept) / task.prediction_file_name
            predictions = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            return _task_result(task, report.task_results[0].scores, predictions)
        except (OSError, LewisHubError):
            raise
        except Exception as error:  # of any class: from the columns of the data
            problem = f"mteb could not score the model: {type(error).__name__}: {error}"
            remedy = "Choose tasks for this kind of model, and check the columns of their data."
            raise EvaluationError(name, problem, remedy) from error


def _task_result(
    task: Any, scores: Mapping[str, Sequence[Mapping[str, Any]]], predictions: Predictions
) -> TaskResult:
    """The main score of each split, the mean over the subsets as in mteb."""
    documents: list[str] = []
    metrics: dict[str, MetricResult] = {}
    starts = {}
    for split in task.eval_splits:
        starts[split] = len(documents)
        documents += [_digest(*one) for one in documents_of(task, split)]
    for split in task.eval_splits:
        values = [float(one["main_score"]) for one in scores[split]]
        value = math.fsum(values) / len(values)
        if not math.isfinite(value):
            problem = f"its main score is no number ({value}): its data give none"
            remedy = "Check its data: similarities that are NaN, or all the same, have none."
            raise EvaluationError(task.metadata.name, problem, remedy)
        own = _item_values(task, split, predictions)
        around = starts[split], len(documents)
        metrics[metric_of(task, split)] = _metric(value, own, around)
    return TaskResult(
        version=str(task.metadata.dataset["revision"]),
        documents=tuple(documents),
        prompts=(_digest(str(task.metadata.prompt)),) * len(documents),
        metrics=metrics,
    )


def _metric(value: float, own: Sequence[float], around: tuple[int, int]) -> MetricResult:
    """A score with the numbers of its items, if their mean is the score; other items have none."""
    first, n = around
    mean = math.fsum(own) / len(own) if own else math.nan
    if not math.isclose(mean, value, abs_tol=ROUNDED):
        return MetricResult(value, None, higher_is_better=True)
    after = n - first - len(own)
    return MetricResult(mean, (*[None] * first, *own, *[None] * after), higher_is_better=True)


def _item_values(task: Any, split: str, predictions: Predictions) -> list[float]:
    """A number for each item of a split, whose mean is to be the main score; empty if unknown."""
    found: list[float] = []
    for subset, data in subsets_of(task, split):
        kept = predictions.get(subset, {}).get(split)
        if kept is None:
            return []
        is_similarity = task.metadata.type.startswith(("STS", "VisualSTS"))
        if is_similarity and task.metadata.main_score == "cosine_spearman":
            found += correlation_parts(data["score"], kept["cosine_scores"])
        elif task.metadata.main_score == "accuracy" and task.metadata.type == "Classification":
            found += _shares_right(data[task.label_column_name], kept)
        elif isinstance(data, Mapping) and task.metadata.main_score.startswith(GAIN):
            found += _gains(data, kept, int(task.metadata.main_score.removeprefix(GAIN)))
        else:
            return []
    return found


def correlation_parts(expected: Sequence[float], found: Sequence[float]) -> list[float]:
    """A number for each item, with Spearman's correlation as their mean.

    They are the correlation plus each item's influence on it, that of Pearson's correlation of the
    ranks: z w - rho (z^2 + w^2) / 2 + rho. So the standard error of their mean is the delta
    method's, without the part that comes from ranks being estimated.
    """
    ranks = [_ranks(np.asarray(one, dtype=np.float64)) for one in (expected, found)]
    if any(one.std() == 0 for one in ranks):
        return []
    z, w = ((one - one.mean()) / one.std() for one in ranks)
    rho = float((z * w).mean())
    return [float(part) for part in z * w - rho * (z**2 + w**2) / 2 + rho]


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rank of each value; equal values have the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return means[places]


def _shares_right(labels: Sequence[Any], experiments: Sequence[Sequence[Any]]) -> list[float]:
    """The share of mteb's experiments that found each item's label."""
    if any(len(one) != len(labels) for one in experiments):
        return []
    right = [np.asarray(one) == np.asarray(labels) for one in experiments]
    return [float(share) for share in np.mean(right, axis=0)]


def _gains(data: Mapping[str, Any], ranked: Mapping[str, Any], k: int) -> list[float]:
    """The discounted gain of each query's first k documents; 0 for a query without any."""
    import pytrec_eval

    relevant, measure = data["relevant_docs"], f"ndcg_cut_{k}"
    by_query = pytrec_eval.RelevanceEvaluator(relevant, {f"ndcg_cut.{k}"}).evaluate(ranked)
    queries = list(dict.fromkeys(row["id"] for row in data["queries"]))
    return [float(by_query.get(query, {}).get(measure, 0.0)) for query in queries]


def _kind(value: object) -> str:
    """What stands for a value that is no JSON, such as a picture."""
    return type(value).__name__


def _digest(*parts: object) -> str:
    text = "\n".join(
        part if isinstance(part, str) else json.dumps(part, sort_keys=True, default=_kind)
        for part in parts
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
