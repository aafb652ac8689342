"""Whether lm-eval or mteb can score a model, by its class.

lm-eval runs models that generate text. mteb runs encoders, and models of sentence-transformers.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lewis_hub.errors import EvaluationError
from lewis_hub.recipe.backend import Backend

END = "_MAPPING_NAMES"
MULTIMODAL = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
OF_TOKENIZERS = re.compile(  # names of files
    r"(?:.*/)?(?:[^/]*(?:token|vocab|merges)[^/]*|[^/]+\.(?:model|spm|tiktoken|codes)"
    r"|tekken\.json|dict\.txt)"
)
WITHOUT_FILES = frozenset({"canine", "dia", "esmc", "esmfold2", "perceiver"})  # types of models
GENERATE = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")  # the mappings of transformers that lm-eval loads


def named_classes(mapping: str) -> frozenset[str]:
    """The classes in `MODEL_FOR_<mapping>_MAPPING_NAMES` of transformers, or for `MODEL`."""
    return frozenset(named for _, named in _mappings()[_variable(mapping)])


def is_known(named: str) -> bool:
    """Whether transformers has a class of this name for one of its automatic classes."""
    return any(named == known for pairs in _mappings().values() for _, known in pairs)


def _variable(mapping: str) -> str:
    return "MODEL" if mapping == "MODEL" else f"MODEL_FOR_{mapping}"


@cache
def _mappings() -> Mapping[str, Sequence[tuple[str, str]]]:
    """Mapping, such as `MODEL_FOR_CAUSAL_LM`, to its pairs of a model type and a class.

    They are read from the file of transformers: its import would import torch, which takes seconds
    and memory that a merge does not need.
    """
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return found
    file = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
            mapping = target.id.removesuffix(END)
            if mapping != target.id and mapping.startswith("MODEL"):
                found[mapping] = list(_pairs(node.value))
    return found


def _pairs(mapping: ast.expr) -> Iterator[tuple[str, str]]:
    """Model types and classes in the source of a mapping; a type may have several classes."""
    for node in ast.walk(mapping):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2 and _is_text(node.elts[0]):
            model_type, value = ast.literal_eval(node)
            yield from (
                (model_type, one) for one in ((value,) if _is_text(node.elts[1]) else value)
            )


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class that a `config.json` names first; None if it names none."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else None


def only(backend: Backend) -> str:
    """What the library of a backend runs."""
    if backend == "mteb":
        return "mteb runs only models that give embeddings"
    return "lm-eval runs only models that generate text"


def unscorable(
    config: Mapping[str, Any], backend: Backend = "hf", *, has_modules: bool = False
) -> str | None:
    """The class of a model that cannot be scored; None if it can, or if the class is unknown.

    lm-eval loads every model by the class for its model type that generates text. Of a classifier
    or an encoder it would load a class whose head is in no file, and score random weights. Of a
    model that also reads pictures or sound it loads the language model, if there is such a class;
    vLLM loads the whole. What a server loads is not known here. `has_modules`: whether there is a
    `modules.json` of sentence-transformers.
    """
    named = architecture(config)
    if backend == "mteb":
        embeds = has_modules or "sentence_transformers" in config
        return None if embeds or named is None or _is_encoder_or_unknown(named) else named
    generates = any(named in named_classes(mapping) for mapping in GENERATE)
    if named is None or generates or backend == "local-completions":
        return None
    types = {model_type for model_type, _ in _mappings()[_variable("CAUSAL_LM")]}
    reads_more = any(named in named_classes(mapping) for mapping in MULTIMODAL)
    if reads_more and (backend == "vllm" or config.get("model_type") in types):
        return None
    return named if is_known(named) else None


def _is_encoder_or_unknown(named: str) -> bool:
    return named in named_classes("MODEL") or not is_known(named)


def scored_elsewhere(named: str, *, has_modules: bool = False) -> str:
    """A sentence on what scores models of a class that lm-eval cannot score."""
    if has_modules or named in named_classes("MODEL"):
        return "`backend: mteb` scores embeddings on tasks of mteb."
    return "Score it on labelled data of your own."


def require_scorable(
    name: str, config: Mapping[str, Any], backend: Backend = "hf", *, has_modules: bool = False
) -> None:
    """Refuse a model that lm-eval would load with a random head, or that gives no embeddings."""
    if named := unscorable(config, backend, has_modules=has_modules):
        remedy = scored_elsewhere(named, has_modules=has_modules)
        if backend == "mteb":
            remedy = "Score it by lm-eval: leave `backend` out, and name its tasks."
        raise EvaluationError(name, f"is a {named}, and {only(backend)}.", remedy)


def require_tokenizer_files(name: str, paths: Iterable[str], config: Mapping[str, Any]) -> None:
    """Refuse a model without any file of a tokenizer: transformers would make one without words.

    Args:
        name: of the model, for the message.
        paths: of its files.
        config: its `config.json`.

    Raises:
        EvaluationError: as said.
    """
    has_files = any(map(OF_TOKENIZERS.fullmatch, paths))
    if not has_files and config.get("model_type") not in WITHOUT_FILES:
        problem = "it has no files of a tokenizer, so no text can run through it"
        raise EvaluationError(name, problem, "Use a copy with the files, such as tokenizer.json.")
