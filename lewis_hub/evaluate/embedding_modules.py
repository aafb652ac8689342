"""What the modules of a model of sentence-transformers are, and how much memory they take.

`modules.json` lists them. Each is built by its settings before its weights are opened, as often as
it is listed. Only kinds of modules that a merge can have are loaded, all with a `config.json` and a
`model.safetensors` alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lewis_hub.checkpoint.configuration import DAMAGED
from lewis_hub.documents import read_json
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.embedding_files import CONFIGURATION, PICKLE, ModelFiles, normal
from lewis_hub.evaluate.empty_models import FREE_BYTES, MOST_TIMES, VALUE_BYTES
from lewis_hub.hub.source import MODULE_FOLDER, MODULES, SINGLE

SAVE_AGAIN = "Load it in sentence-transformers and save it again."
MAX_MODULES = 100  # as listed; most models have two to four
N_MODES = 6  # of pooling
PART_BYTES = 1 << 14  # of a module beside its weights
JSON_TIMES = 16  # the memory of a vocabulary by that of its JSON
KINDS = {  # package of sentence-transformers -> its module -> the class in it
    "base": {"dense": "Dense", "normalize": "Normalize", "transformer": "Transformer"},
    "sentence_transformer": {
        "dropout": "Dropout",
        "layer_norm": "LayerNorm",
        "pooling": "Pooling",
    },
    "sparse_encoder": {"mlm_transformer": "MLMTransformer", "splade_pooling": "SpladePooling"},
    "cross_encoder": {"logit_score": "LogitScore"},
}
# a class -> the settings whose product is the number of its weights
SIZED = {"Dense": ("in_features", "out_features"), "LayerNorm": ("dimension",)}


def _names() -> Iterator[str]:
    """The classes as `modules.json` names them, in the words of all versions."""
    for package, kinds in KINDS.items():
        for module, kind in kinds.items():
            yield f"sentence_transformers.{package}.modules.{module}.{kind}"
            yield f"sentence_transformers.{package}.modules.{kind}"
            older = "sparse_encoder." if package == "sparse_encoder" else ""
            if kind != "LogitScore":  # which is newer
                yield f"sentence_transformers.{older}models.{kind}"
                yield f"sentence_transformers.{older}models.{kind}.{kind}"


SUPPORTED = frozenset(_names())
ALONE = ", ".join(sorted(kind for kinds in KINDS.values() for kind in kinds.values()))


@dataclass(frozen=True)
class Listed:
    """A module as it is listed: the path of its folder, and its class."""

    path: str  # empty: the folder of the model
    named: str  # by the whole name of its class

    @property
    def kind(self) -> str:
        """The name of its class."""
        return self.named.rpartition(".")[2]


def listed_modules(files: ModelFiles) -> list[Listed]:
    """All modules, each as often as it is built.

    Raises:
        ValueError: there is no list of modules in `modules.json`.
        EvaluationError: there are more than MAX_MODULES.
    """
    content = files.read(MODULES)
    found = read_json(content) if content is not None else []
    if not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
        raise ValueError("modules.json is no list of modules")
    if len(found) > MAX_MODULES:
        problem = f"it lists more than {MAX_MODULES} modules"
        raise EvaluationError(f"{files.where}: {MODULES}", problem, DAMAGED)
    return [Listed(normal(str(one.get("path"))), str(one.get("type"))) for one in found]


def require_supported(files: ModelFiles) -> None:
    """Refuse modules of other classes, in other folders or whose weights are in no safetensors.

    Raises:
        EvaluationError: there is such a module.
    """
    for module in listed_modules(files):
        if module.named not in SUPPORTED:
            problem = f"its module `{module.named[:100]}` is none that is loaded"
            remedy = f"Use a model with modules of these classes of sentence-transformers: {ALONE}."
            raise EvaluationError(files.where, problem, remedy)
        if module.path and not MODULE_FOLDER.fullmatch(module.path):
            problem = f"`{MODULES}` names the folder `{module.path[:100]}`, expected one such as "
            raise EvaluationError(files.where, f"{problem}`1_Pooling`", SAVE_AGAIN)
        _require_stored(files, module)


def _require_stored(files: ModelFiles, module: Listed) -> None:
    """Refuse a module whose weights are pickled, or more than its file has: it is built first."""
    place = f"{module.path}/" if module.path else ""
    shape, stored = _shape(files, module), files.stored_bytes(module.path)
    is_stored = f"{place}{SINGLE}" in files.sizes if shape else stored
    if f"{place}{PICKLE}" in files.sizes and not is_stored:
        problem = f"the weights of its module {module.path or module.kind} are pickled"
        raise EvaluationError(files.where, problem, SAVE_AGAIN)
    if shape and not is_stored:  # of a repo, no pickle was downloaded
        problem = f"the weights of its module {module.path} are in no safetensors file"
        raise EvaluationError(files.where, problem, SAVE_AGAIN)
    if shape and math.prod(shape) > stored:
        problem = f"its module {module.path} has {' × '.join(map(str, shape))} weights, its file "
        remedy = "The file is damaged: use an intact copy."
        raise EvaluationError(files.where, f"{problem}fewer", remedy)


def _shape(files: ModelFiles, module: Listed) -> tuple[int, ...]:
    """The sizes of the weights that a module's settings describe; empty if they describe none."""
    path, settings = _settings(files, module)
    found = []
    for key in SIZED.get(module.kind, ()):
        value = settings.get(key, 0)
        if type(value) is not int or value < 0:
            problem = f"`{key}` is {str(value)[:100]}, expected a whole number, 0 or more"
            raise EvaluationError(f"{files.where}: {path}", problem, DAMAGED)
        found.append(value)
    return tuple(found)


def _settings(files: ModelFiles, module: Listed) -> tuple[str, Mapping[str, Any]]:
    """The path and the content of a module's settings."""
    path = f"{module.path}/{CONFIGURATION}" if module.path else CONFIGURATION
    return path, files.document(path)


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
        described = max(_described_bytes(files, module), (built or {}).get(module.path, 0))
        n_bytes = max(files.stored_bytes(module.path), described)
        total += n_times * (n_bytes + JSON_TIMES * files.json_bytes(module.path))
    stored = files.stored_bytes()
    if total > MOST_TIMES * stored + FREE_BYTES:
        problem = f"its {len(listed)} modules take {total:,} bytes as they are listed, but its "
        problem += f"weights have {stored:,} bytes in its files; the limit is {MOST_TIMES} times "
        raise EvaluationError(files.where, f"{problem}these and 1 GiB", DAMAGED)


def _described_bytes(files: ModelFiles, module: Listed) -> int:
    """The memory of a module that is built of its settings, without that of a transformer."""
    path, settings = _settings(files, module)
    if module.kind == "Pooling":
        _require_few_modes(f"{files.where}: {path}", settings)
    shape = _shape(files, module)
    n_values = math.prod(shape) if shape else 0
    if settings.get("use_residual"):
        n_values *= 2
    return VALUE_BYTES * n_values + PART_BYTES


def _require_few_modes(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse a pooling whose vectors are put together of more parts than it has ways to pool."""
    modes = settings.get("pooling_mode")
    if isinstance(modes, list) and len(modes) > N_MODES:
        problem = f"`pooling_mode` has {len(modes):,} values, there are {N_MODES}"
        raise EvaluationError(where, problem, DAMAGED)
