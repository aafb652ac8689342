"""Whether lm-eval can score a model: it runs those that generate text, by two classes."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lewis_hub.errors import EvaluationError

ONLY = "lm-eval runs only models that generate text"
END = "_MAPPING_NAMES"
GENERATE = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")  # the mappings of transformers that lm-eval loads


def named_classes(mapping: str) -> frozenset[str]:
    """The classes in `MODEL_FOR_<mapping>_MAPPING_NAMES` of transformers, or for `MODEL`."""
    return _classes()["MODEL" if mapping == "MODEL" else f"MODEL_FOR_{mapping}"]


def is_known(named: str) -> bool:
    """Whether transformers has a class of this name for one of its automatic classes."""
    return any(named in classes for classes in _classes().values())


@cache
def _classes() -> Mapping[str, frozenset[str]]:
    """Mapping, such as `MODEL_FOR_CAUSAL_LM`, to the names of its classes.

    They are read from the file of transformers: its import would import torch, which takes seconds
    and memory that a merge does not need.
    """
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return defaultdict(frozenset)
    file = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    found: dict[str, frozenset[str]] = defaultdict(frozenset)
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
            mapping = target.id.removesuffix(END)
            if mapping != target.id and mapping.startswith("MODEL"):
                found[mapping] = frozenset(_second_texts(node.value))
    return found


def _second_texts(mapping: ast.expr) -> Iterator[str]:
    """The texts in the second place of each pair, in the source of a mapping."""
    for node in ast.walk(mapping):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2 and _is_text(node.elts[0]):
            value = ast.literal_eval(node.elts[1])
            yield from (value,) if isinstance(value, str) else value


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class that a `config.json` names first; None if it names none."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else None


def unscorable(config: Mapping[str, Any]) -> str | None:
    """The class of a model that lm-eval cannot score; None if it can, or if the class is unknown.

    lm-eval loads every model by the class for its model type that generates text. Of a classifier
    or an encoder it would load a class whose head is in no file, and score random weights.
    """
    named = architecture(config)
    if named is None or any(named in named_classes(mapping) for mapping in GENERATE):
        return None
    return named if is_known(named) else None


def scored_elsewhere(named: str) -> str:
    """A sentence on what scores models of a class that lm-eval cannot score."""
    if named in named_classes("MODEL"):
        return "mteb (`pip install mteb`) scores embeddings."
    return "Score it on labelled data of your own."


def require_scorable(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that lm-eval would load with a random head."""
    if named := unscorable(config):
        raise EvaluationError(name, f"is a {named}, and {ONLY}.", scored_elsewhere(named))
