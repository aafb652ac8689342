"""What the modules of a model of sentence-transformers are, and how much memory they take.

`modules.json` lists them, and a router's configuration more. Each is built by its settings before
its weights are opened, as often as it is listed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from lewis_hub.checkpoint.configuration import DAMAGED
from lewis_hub.documents import read_json
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.embedding_files import CONFIGURATION, PICKLE, ModelFiles, folder_of, normal
from lewis_hub.evaluate.empty_models import FREE_BYTES, MOST_TIMES, VALUE_BYTES
from lewis_hub.files import is_hidden

MODULES, ROUTER = "modules.json", "router_config.json"
SAVE_AGAIN = "Load it in sentence-transformers and save it again."
OTHER = "Only the files of the model are used: use another one."
MAX_MODULES = 100  # as listed; a model for queries and documents has some ten
N_MODES = 6  # of pooling
MAX_PARTS = 100  # layers of an LSTM, or kernels of a CNN, which has three
PART_BYTES = 1 << 14  # of a layer beside its weights
JSON_TIMES = 16  # the memory of a vocabulary by that of its JSON
TOKENIZER = "tokenizer_class"
CLASSES = (  # a file of a module -> its key with names of classes
    *((ROUTER, "types"), (CONFIGURATION, "types")),
    ("wordembedding_config.json", TOKENIZER),
)
KINDS = {  # package of sentence-transformers -> its module -> the class in it
    "base": {
        "dense": "Dense",
        "normalize": "Normalize",
        "router": "Router",
        "transformer": "Transformer",
    },
    "sentence_transformer": {
        "bow": "BoW",
        "clip_model": "CLIPModel",
        "cnn": "CNN",
        "dropout": "Dropout",
        "layer_norm": "LayerNorm",
        "lstm": "LSTM",
        "pooling": "Pooling",
        "static_embedding": "StaticEmbedding",
        "weighted_layer_pooling": "WeightedLayerPooling",
        "word_embeddings": "WordEmbeddings",
        "word_weights": "WordWeights",
    },
    "sparse_encoder": {
        "mlm_transformer": "MLMTransformer",
        "sparse_auto_encoder": "SparseAutoEncoder",
        "sparse_static_embedding": "SparseStaticEmbedding",
        "splade_pooling": "SpladePooling",
    },
    "cross_encoder": {"logit_score": "LogitScore"},
    "multi_vector_encoder": {
        "multi_vector_mask": "MultiVectorMask",
        "token_pooling": "HierarchicalTokenPooling",
    },
}
TOKENIZERS = {
    "phrase": "PhraseTokenizer",
    "whitespace": "WhitespaceTokenizer",
    "word": "TransformersTokenizerWrapper",
}
SIZED = {  # a class -> its settings that are numbers, and those that are a list of them
    "Dense": ("in_features", "out_features"),
    "SparseAutoEncoder": ("input_dim", "hidden_dim"),
    "LayerNorm": ("dimension",),
    "LSTM": ("embedding_dimension", "word_embedding_dimension", "hidden_dim", "num_layers"),
    "CNN": (
        *("in_embedding_dimension", "in_word_embedding_dimension", "out_channels"),
        *("kernel_sizes", "stride_sizes"),
    ),
    "WeightedLayerPooling": (
        *("embedding_dimension", "word_embedding_dimension"),
        *("layer_start", "num_hidden_layers"),
    ),
}
LISTS = ("kernel_sizes", "stride_sizes")
SETTINGS = {"LSTM": "lstm_config.json", "CNN": "cnn_config.json"}  # others: config.json


def _names() -> Iterator[str]:
    """The classes as `modules.json` names them, in the words of all versions."""
    for package, kinds in KINDS.items():
        for module, kind in kinds.items():
            yield f"sentence_transformers.{package}.modules.{module}.{kind}"
            yield f"sentence_transformers.{package}.modules.{kind}"
            older = "sparse_encoder." if package == "sparse_encoder" else ""
            yield from _older(f"sentence_transformers.{older}models", kind)
    yield from _older("sentence_transformers.models", "Asym")  # a router
    yield "sentence_transformers.base.modules.router.Asym"
    for module, kind in TOKENIZERS.items():
        yield f"sentence_transformers.sentence_transformer.modules.tokenizer.{module}.{kind}"
        yield from _older("sentence_transformers.models.tokenizer", kind)


def _older(package: str, kind: str) -> tuple[str, str]:
    return f"{package}.{kind}", f"{package}.{kind}.{kind}"


SUPPORTED = frozenset(_names())


@dataclass(frozen=True)
class Listed:
    """A module as it is listed: the path of its folder, and its class."""

    path: str
    named: str  # by the whole name of its class

    @property
    def kind(self) -> str:
        """The name of its class; a router has had two."""
        return self.named.rpartition(".")[2].replace("Asym", "Router")


def listed_modules(files: ModelFiles) -> list[Listed]:
    """All modules, also those of routers, each as often as it is built.

    Raises:
        ValueError: there is no list of modules in `modules.json`.
        EvaluationError: there are more than MAX_MODULES.
    """
    content = files.read(MODULES)
    first = read_json(content) if content is not None else []
    if not (isinstance(first, list) and all(isinstance(one, dict) for one in first)):
        raise ValueError("modules.json is no list of modules")
    left = [Listed(str(one.get("path")), str(one.get("type"))) for one in first]
    found: list[Listed] = []
    inner: dict[str, list[tuple[str, str]]] = {}  # folder of a router -> its modules
    while left:
        module = left.pop(0)
        found.append(module)
        if module.kind == "Router":
            place = normal(module.path)
            if place not in inner:
                inner[place] = _routed(files, place)
            left += [Listed(str(PurePosixPath(place) / path), kind) for path, kind in inner[place]]
        if len(found) + len(left) > MAX_MODULES:
            problem = f"it lists more than {MAX_MODULES} modules"
            raise EvaluationError(f"{files.where}: {MODULES}", problem, DAMAGED)
    return found


def _routed(files: ModelFiles, place: str) -> list[tuple[str, str]]:
    """The paths and classes of the modules of a router, each as often as its routes run it."""
    settings, older = (
        files.document(normal(str(PurePosixPath(place) / name))) for name in (ROUTER, CONFIGURATION)
    )
    types, routes = (_mapping((settings or older).get(key)) for key in ("types", "structure"))
    run = Counter(str(one) for route in routes.values() if _is_listed(route) for one in route)
    return [(path, str(kind)) for path, kind in types.items() for _ in range(max(1, run[path]))]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_listed(route: object) -> bool:
    return isinstance(route, (list, str))  # the modules of a text are its letters


def require_supported(files: ModelFiles) -> None:
    """Refuse modules of other classes, in hidden folders or with pickled weights.

    Raises:
        EvaluationError: there is such a module.
    """
    listed = listed_modules(files)
    inner = list(_inner_modules(files)) if listed else []
    for path in (*(one.path for one in listed), *(path for path, _ in inner)):
        if is_hidden(PurePosixPath(path)):
            problem = f"its module `{path}` is hidden, and so no file of the model"
            raise EvaluationError(files.where, problem, OTHER)
    for named in (*(one.named for one in listed), *(named for _, named in inner)):
        if named not in SUPPORTED:
            problem = f"its module `{named[:100]}` is no class of sentence-transformers"
            raise EvaluationError(files.where, problem, "No other code is run: use another model.")
    for path in {normal(one.path) for one in listed}:
        _require_unpickled(files, path)


def _inner_modules(files: ModelFiles) -> Iterator[tuple[str, str]]:
    """The paths and classes that the configurations of modules name; a tokenizer has no path."""
    for path in files.configurations():
        for name, key in CLASSES:
            if PurePosixPath(path).name == name:
                named = files.document(path).get(key)
                if isinstance(named, Mapping):
                    yield from ((inner, str(kind)) for inner, kind in named.items())
                elif key == TOKENIZER and named is not None:
                    yield "", str(named)


def _require_unpickled(files: ModelFiles, place: str) -> None:
    for path in files.sizes:
        is_of_it = path == PICKLE if not place else path.startswith(f"{place}/")
        folder = folder_of(path)
        whole = f"{folder}/model.safetensors" if folder else "model.safetensors"
        if is_of_it and PurePosixPath(path).name == PICKLE and whole not in files.sizes:
            problem = f"the weights of its module {PurePosixPath(folder).name} are pickled"
            raise EvaluationError(files.where, problem, SAVE_AGAIN)


def require_stored(files: ModelFiles, path: str, settings: Mapping[str, Any]) -> None:
    """Refuse a module that is larger than the files with its weights: it is built first.

    Its class is not looked at: the settings in a file of this name tell what it may be.
    """
    folder = folder_of(path)
    pickled = f"{folder}/{PICKLE}" if folder else PICKLE
    stored = files.stored_bytes(folder)
    n_pickled = files.sizes.get(pickled, 0)
    for kind in SIZED:
        is_of_it = SETTINGS.get(kind, CONFIGURATION) == PurePosixPath(path).name
        # of a transformer's configuration only what it cannot mean otherwise
        is_stated = kind in SETTINGS or settings.keys() >= {*SIZED[kind]}
        shape = _shape(kind, settings) if is_of_it and is_stated else ()
        if shape and math.prod(shape) > stored + n_pickled:
            name = PurePosixPath(folder).name or PurePosixPath(files.where).name
            problem = f"its module {name} has {' × '.join(map(str, shape))} weights, its file fewer"
            remedy = "The file is damaged: use an intact copy."
            if not files.has_weights(folder):  # of a repo, no pickle was downloaded
                problem = f"the weights of its module {name} are in no safetensors file"
                remedy = SAVE_AGAIN
            raise EvaluationError(files.where, problem, remedy)


def _shape(kind: str, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The sizes of the largest part that these settings describe; empty if there is none."""

    def size(*keys: str, default: int = 0) -> int:
        found = [value for key in keys if isinstance(value := settings.get(key), int)]
        return max(found, default=default)

    if kind == "LSTM":
        hidden = size("hidden_dim")
        return hidden, size("embedding_dimension", "word_embedding_dimension", "hidden_dim")
    if kind == "CNN":
        inputs = size("in_embedding_dimension", "in_word_embedding_dimension")
        return inputs, size("out_channels", default=256), sum(_kernels(settings))
    if kind == "SparseAutoEncoder":
        return size("input_dim"), size("hidden_dim", default=512)
    return tuple(map(size, SIZED[kind])) if kind in ("Dense", "LayerNorm") else ()


def _kernels(settings: Mapping[str, Any]) -> list[int]:
    found = settings.get("kernel_sizes", [1, 3, 5])  # the defaults of sentence-transformers
    return [n for n in found if isinstance(n, int)] if isinstance(found, list) else []


def require_memory(files: ModelFiles, built: Mapping[str, int] | None = None) -> None:
    """Refuse modules that together take far more memory than the model's files.

    Args:
        files: of the model.
        built: folder of a transformer -> the bytes of the model that its configuration describes.

    Raises:
        EvaluationError: they take more, or a size of one is no number.
    """
    total, listed = 0, listed_modules(files)
    for module, n_times in Counter(listed).items():  # one is looked at once
        place = normal(module.path)
        described = max(_described_bytes(files, module), (built or {}).get(place, 0))
        n_bytes = max(files.stored_bytes(place), described)
        total += n_times * (n_bytes + JSON_TIMES * files.json_bytes(place))
    stored = files.stored_bytes()
    if total > MOST_TIMES * stored + FREE_BYTES:
        problem = f"its {len(listed)} modules take {total:,} bytes as they are listed, but its "
        problem += f"weights have {stored:,} bytes in its files; the limit is {MOST_TIMES} times "
        raise EvaluationError(files.where, f"{problem}these and 1 GiB", DAMAGED)


def _described_bytes(files: ModelFiles, module: Listed) -> int:
    """The memory of a module that is built of its settings, without that of a transformer."""
    if module.kind == "Pooling":
        _require_few_modes(files, normal(str(PurePosixPath(module.path) / CONFIGURATION)))
    if module.kind not in SIZED:
        return PART_BYTES
    path = str(PurePosixPath(module.path) / SETTINGS.get(module.kind, CONFIGURATION))
    settings = files.document(normal(path))
    _require_sizes(f"{files.where}: {normal(path)}", module.kind, settings)
    shape = _shape(module.kind, settings)
    n_values, n_parts = math.prod(shape) if shape else 0, 1
    if max(_layers(settings), len(_kernels(settings))) > MAX_PARTS:
        problem = f"it has more than {MAX_PARTS} layers or kernels"
        raise EvaluationError(f"{files.where}: {normal(path)}", problem, DAMAGED)
    if module.kind == "Dense" and settings.get("use_residual"):
        n_values *= 2
    elif module.kind == "CNN":
        n_parts = len(_kernels(settings))
    elif module.kind == "LSTM":  # four gates, of inputs and of states; the next get both directions
        n_parts = max(1, _layers(settings))
        n_values *= 4 * 2 * 2 * 2 * n_parts
    return VALUE_BYTES * n_values + PART_BYTES * n_parts


def _require_few_modes(files: ModelFiles, path: str) -> None:
    """Refuse a pooling whose vectors are put together of more parts than it has ways to pool."""
    modes = files.document(path).get("pooling_mode")
    if isinstance(modes, list) and len(modes) > N_MODES:
        problem = f"`pooling_mode` has {len(modes):,} values, there are {N_MODES}"
        raise EvaluationError(f"{files.where}: {path}", problem, DAMAGED)


def _require_sizes(where: str, kind: str, settings: Mapping[str, Any]) -> None:
    for key in SIZED[kind]:
        value = settings.get(key)
        numbers = value if key in LISTS and isinstance(value, list) else [value]
        if value is not None and not all(type(n) is int and n >= 0 for n in numbers):
            problem = f"`{key}` is {str(value)[:100]}, expected "
            problem += "whole numbers" if key in LISTS else "a whole number, 0 or more"
            raise EvaluationError(where, problem, DAMAGED)


def _layers(settings: Mapping[str, Any]) -> int:
    found = settings.get("num_layers", 1)
    return found if isinstance(found, int) else 1
