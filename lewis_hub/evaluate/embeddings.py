"""Score an embedding model by mteb: its main scores, and numbers per item where they are means.

mteb reports a number per task. Where its predictions give a number per item whose mean is that
number, models are compared item by item; other scores have no interval.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lewis_hub.checkpoint.configuration import require_buildable
from lewis_hub.display import Advance
from lewis_hub.documents import read_json
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.backends import EvaluationSettings, leads_elsewhere
from lewis_hub.evaluate.chat import limit_tokenizer
from lewis_hub.evaluate.embedding_tasks import documents_of, metric_of
from lewis_hub.evaluate.empty_models import require_size_of_files
from lewis_hub.evaluate.harness import quiet_libraries, seeded
from lewis_hub.evaluate.scores import MetricResult, ModelResult, TaskResult
from lewis_hub.files import is_hidden, require_inside
from lewis_hub.loadable import only_files_of, require_loadable

BATCH_SIZE = 32  # as in mteb
MAX_PROMPT = 10_000  # letters, before each text
ROUNDED = 1e-5  # mteb rounds the scores of retrieval
GAIN = "ndcg_at_"
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
OTHER = "Only the files of the model are used: use another one."
SAVE_AGAIN = "Load it in sentence-transformers and save it again."
OWN, TOKENIZER = "sentence_transformers.", "tokenizer_class"
CLASSES = (  # a file of a module -> its key with names of classes
    *(("router_config.json", "types"), ("config.json", "types")),
    ("wordembedding_config.json", TOKENIZER),
)
# settings that a transformer hands on to transformers, among them paths, repos and kernels
HANDED_ON, OTHER_TOKENIZER = ("_args", "_kwargs"), "tokenizer_name_or_path"
# a file -> its setting with a model, or a file with weights, that is loaded instead
ELSEWHERE = {"adapter_config.json": "base_model_name_or_path", "config.json": "path"}
WORD = re.compile(r"\w*", re.ASCII)
ACTIVATIONS = ("activation_fn", "activation_function", "sbert_ce_default_activation_function")
SIZES = {  # a file of a module -> its settings that have as many weights as their product, or more
    "config.json": (("in_features", "out_features"), ("input_dim", "hidden_dim"), ("dimension",)),
    "lstm_config.json": (
        ("hidden_dim", "hidden_dim"),
        ("embedding_dimension", "hidden_dim"),
        ("word_embedding_dimension", "hidden_dim"),
    ),
    "cnn_config.json": (
        ("in_embedding_dimension", "out_channels", "kernel_sizes"),
        ("in_word_embedding_dimension", "out_channels", "kernel_sizes"),
    ),
}

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
    import transformers
    from safetensors import SafetensorError

    dtype = "float32" if settings.device == "cpu" else "auto"
    own = {"device": settings.device, "trust_remote_code": False, "local_files_only": True}
    own["model_kwargs"] = {"use_safetensors": True, "dtype": dtype}
    try:
        with only_files_of(folder, and_others=leads_elsewhere(settings)):
            _require_no_code(folder)
            for place in sorted({file.parent for file in folder.rglob("*token*.json")}):
                require_loadable(place)
            for place in _models_in(folder):
                require_size_of_files(str(place), place, transformers.AutoModel)
            kind = getattr(sentence_transformers, _class_of(folder))
            model = kind(str(folder.resolve()), **own, **settings.backend_args)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        problem = f"cannot be loaded as an embedding model: {type(error).__name__}: {error}"
        remedy = "Expected: a folder that sentence-transformers can load."
        raise EvaluationError(str(folder), problem, remedy) from error
    limit_tokenizer(str(folder), getattr(model, "tokenizer", None))
    for name, prompt in (getattr(model, "prompts", None) or {}).items():
        if len(str(prompt)) > MAX_PROMPT:
            problem = f"its prompt `{str(name)[:100]}`, which goes before each text, has "
            problem += f"{len(str(prompt)):,} letters; the limit is {MAX_PROMPT:,}"
            raise EvaluationError(str(folder), problem, "Use a copy with a shorter prompt.")
    return model


def _models_in(folder: Path) -> list[Path]:
    """The folders with weights of transformers' models, not those for ONNX or of other modules."""
    from transformers import CONFIG_MAPPING

    files = [file for file in sorted(folder.rglob("config.json")) if _read(file)]
    known = [file.parent for file in files if _read(file).get("model_type") in CONFIG_MAPPING]
    return [place for place in known if any(place.glob("*.safetensors*"))]


def _require_no_code(folder: Path) -> None:
    """Refuse what leads sentence-transformers out of the folder: other code, models and pickles."""
    _require_own_settings(folder)
    file = folder / "modules.json"
    for module in read_json(file.read_bytes()) if file.exists() else ():
        if not isinstance(module, Mapping):
            raise ValueError("modules.json is no list of modules")
        place = folder / str(module.get("path"))
        if place.exists():  # a module without settings needs no folder
            require_inside(folder, place, EvaluationError)
        inner = list(_inner_modules(place))
        for path in (str(module.get("path")), *(path for path, _ in inner)):
            if is_hidden(PurePath(path)):
                problem = f"its module `{path}` is hidden, and so no file of the model"
                raise EvaluationError(str(folder), problem, OTHER)
        for kind in (str(module.get("type")), *(kind for _, kind in inner)):
            if not kind.startswith(OWN):
                problem = f"its module `{kind}` is no class of sentence-transformers"
                remedy = "No other code is run: use another model."
                raise EvaluationError(str(folder), problem, remedy)
        for pickled in [place / PICKLE] if place == folder else sorted(place.rglob(PICKLE)):
            if pickled.exists() and not pickled.with_name(WEIGHTS).exists():
                problem = f"the weights of its module {pickled.parent.name} are pickled"
                raise EvaluationError(str(folder), problem, SAVE_AGAIN)


def _require_stored(folder: Path, file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a module that is larger than the files with its weights: it is built first."""
    files = (*file.parent.glob("*.safetensors"), *file.parent.glob(PICKLE))
    stored = sum(weights.stat().st_size for weights in files)
    for keys in SIZES.get(file.name, ()):
        values = [settings.get(key) for key in keys]
        largest = [max(value, default=1) if isinstance(value, list) else value for value in values]
        numbers = [number for number in largest if isinstance(number, int)]
        if len(numbers) == len(keys) and math.prod(numbers) > stored:
            shape = " × ".join(map(str, numbers))
            problem = f"its module {file.parent.name} has {shape} weights, its file fewer"
            remedy = "The file is damaged: use an intact copy."
            if not files:  # of a repo, no pickle was downloaded
                problem = f"the weights of its module {file.parent.name} are in no safetensors file"
                remedy = SAVE_AGAIN
            raise EvaluationError(str(folder), problem, remedy)


def _require_own_settings(folder: Path) -> None:
    """Refuse settings by which transformers loads more than this folder, or builds for ever."""
    for file in sorted(folder.rglob("*config.json")):
        found = _read(file)
        named = [text for key in ACTIVATIONS for text in _texts(found.get(key))]
        inner = found.get("sentence_transformers")
        named += _texts(inner.get("activation_fn")) if isinstance(inner, Mapping) else ()
        # sentence-transformers calls what is in torch; it ignores other names
        wrong = [text for text in named if text.startswith("torch.") and text[:9] != "torch.nn."]
        if file.name.startswith("sentence_"):
            wrong += _texts(found.get(OTHER_TOKENIZER))
            handed = (value for key, value in found.items() if key.endswith(HANDED_ON))
            texts = _texts([*handed])  # Rust opens a file of the working folder, too
            wrong += (one for one in texts if not WORD.fullmatch(one) or Path(one).is_file())
        wrong += _texts(found.get(ELSEWHERE.get(file.name, "")))
        if wrong:
            problem = f"its {file.relative_to(folder).as_posix()} names `{wrong[0][:100]}`, which "
            problem += "is not in its folder"
            raise EvaluationError(str(folder), problem, OTHER)
        require_buildable(str(file.parent), found)
        _require_stored(folder, file, found)


def _texts(value: object) -> Iterator[str]:
    """All texts in a document, without the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _inner_modules(place: Path) -> Iterator[tuple[str, str]]:
    """The paths and classes that the configurations in a module's folder name.

    A router has other modules; a tokenizer has no path.
    """
    for name, key in CLASSES:
        for file in sorted(place.rglob(name)):
            named = _read(file).get(key)
            if isinstance(named, Mapping):
                yield from ((path, str(kind)) for path, kind in named.items())
            elif key == TOKENIZER and named is not None:
                yield "", str(named)


def _class_of(folder: Path) -> str:
    stated = _read(folder / "config_sentence_transformers.json").get("model_type")
    if stated in ("SentenceTransformer", "SparseEncoder", "CrossEncoder"):
        return str(stated)
    ranks = "sentence_transformers" in _read(folder / "config.json")
    return "CrossEncoder" if ranks else "SentenceTransformer"


def _read(file: Path) -> Mapping[str, Any]:
    found = read_json(file.read_bytes()) if file.exists() else {}
    return found if isinstance(found, dict) else {}


def _with_fresh_seed(task: Any) -> Any:
    """The same task and data: a task that samples moves its generators on with every model."""
    fresh = copy.copy(task)
    fresh.rng_state, fresh.np_rng = copy.deepcopy((task.rng_state, task.np_rng))
    return fresh


def _scored(model: Any, name: str, task: Any, settings: EvaluationSettings) -> TaskResult:
    import mteb

    with TemporaryDirectory() as kept:
        try:
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
        except OSError:
            raise
        except Exception as error:  # of any class: from the columns of the data
            problem = f"mteb could not score the model: {type(error).__name__}: {error}"
            remedy = "Choose tasks for this kind of model, and check the columns of their data."
            raise EvaluationError(name, problem, remedy) from error
        file = Path(kept) / task.prediction_file_name
        predictions = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not report.task_results:
        problem = "mteb gave no result: its data may be private"
        raise EvaluationError(name, problem, "Check `hf auth login`.")
    return _task_result(task, report.task_results[0].scores, predictions)


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
    for subset in task.hf_subsets:
        kept = predictions.get(subset, {}).get(split)
        data = task.dataset[split] if subset not in task.dataset else task.dataset[subset][split]
        if kept is None:
            return []
        if task.metadata.main_score == "cosine_spearman":
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
