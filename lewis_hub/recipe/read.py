"""Read a recipe from YAML. Every error that needs no network to be found is raised here.

A message names the file, the line, the field, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lewis_hub.documents import DocumentError, read_yaml_documents
from lewis_hub.errors import RecipeError
from lewis_hub.recipe.parts import arranged
from lewis_hub.recipe.rules import (
    SETTING,
    Complaint,
    FieldPath,
    contradictions,
    only_by_options,
)
from lewis_hub.recipe.schema import MAX_MERGES, Recipe

# keys that mergekit or another version knows: the message says what to write instead
UNSUPPORTED = {
    "slices.residual_weight": "mergekit reads it and ignores it: remove it.",
    "modules": "Only `modules: {default: ...}` is: list whole models under `models`.",
    "guide.trim": "Trimming is a setting of the method: `parameters: {trim: activation}`.",
}

MAX_BYTES = 256 << 10  # of a recipe: some thousand slices
MAX_SHOWN = 50  # problems after the first
MERGED = "tag:yaml.org,2002:merge"  # the key `<<`, of a mapping whose keys are used
Rules = Callable[[Recipe], Iterable[Complaint]]


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, and reads `modules: {default: ...}`."""

    def construct_document(self, node: yaml.Node) -> Any:
        return super().construct_document(_unwrapped(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 (PyYAML's signature)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGED:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key}` is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path | str, rules: Rules = contradictions) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: a YAML file. Relative paths in it are searched beside it, then in the working folder.
        rules: find contradictions in the whole recipe.

    Raises:
        RecipeError: the file is missing, is not YAML, or is not a valid recipe.
    """
    path = Path(path)
    try:
        with TextIOWrapper(path.open("rb"), encoding="utf-8") as opened:
            text = opened.read(4 * MAX_BYTES)  # what is longer may have no end, and is refused
    except FileNotFoundError:
        remedy = "Name a recipe, or write one with `lewis-hub init`."
        raise RecipeError(str(path), "", "the file does not exist.", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        remedy = "A recipe is a YAML file in UTF-8."
        raise RecipeError(str(path), "", f"it cannot be read: {error}", remedy) from None
    return parse_recipe(text, str(path), rules).placed_in(path.parent)


def parse_recipe(text: str, file: str, rules: Rules = contradictions) -> Recipe:
    """Validate the text of a recipe; messages name it `file`.

    Raises:
        RecipeError: as for `read_recipe`.
    """
    try:
        documents = read_yaml_documents(text, _Loader, MAX_BYTES)
    except DocumentError as error:
        place = f"{file}:{error.line}" if error.line else file
        invalid = f"not valid YAML: {error.problem}."
        raise RecipeError(place, "", invalid, "Fix the line, then run again.") from None
    given = [one for one in documents if one[1] is not None] or [(None, None)]
    _require_few(len(given), "documents", file)
    recipes = [_parse(node, document, file, rules) for node, document in given]
    _require_few(sum(one.n_merges for one in recipes), "merges", file)
    return arranged(recipes, file) if len(recipes) > 1 else recipes[0]


def _require_few(number: int, things: str, file: str) -> None:
    if number > MAX_MERGES:
        problem = f"found {number} {things}, the limit is {MAX_MERGES}."
        raise RecipeError(file, "", problem, "Merge some of them first, from a file of their own.")


def _parse(node: yaml.Node | None, document: Any, file: str, rules: Rules) -> Recipe:
    if not isinstance(document, dict):
        problem = f"expected a mapping with `models` and `merge_method`, found {_kind(document)}."
        raise RecipeError(file, "", problem, "`lewis-hub init` writes a recipe to start from.")
    complaints = list(islice(_complaints(document, rules), MAX_SHOWN + 2))
    if complaints:
        (where, problem, remedy), *rest = complaints
        shown = rest[:MAX_SHOWN]
        others = tuple(f"{file}:{_line(node, w)}: `{dotted(w)}`: {p}" for w, p, _ in shown)
        others += ("There are more problems.",) if rest != shown else ()
        raise RecipeError(f"{file}:{_line(node, where)}", dotted(where), problem, remedy, others)
    return Recipe.model_validate(document)


def schema() -> str:
    """The recipe's JSON Schema, for editors.

    Example:
        >>> import json
        >>> json.loads(schema())["title"]
        'Recipe'
    """
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


def _unwrapped(node: yaml.Node) -> yaml.Node:
    """A document without mergekit's `modules: {default: ...}`, of which only the content is kept.

    A key that is given inside and outside is an error, but for `parameters`, which are joined.
    """
    keys = _pairs(node)
    outer, inner = keys.get("modules"), {}
    if outer and list(_pairs(outer[1])) == ["default"]:
        inner = _pairs(_pairs(outer[1])["default"][1])
    if not inner or not isinstance(node, yaml.MappingNode):
        return node
    key, own = inner.pop("parameters", (None, None))
    common = keys.get("parameters", (None, None))[1]
    if isinstance(common, yaml.MappingNode) and isinstance(own, yaml.MappingNode):
        common.value = [*own.value, *common.value]
    elif key is not None and own is not None:
        inner["parameters"] = (key, own)
    node.value = [pair for pair in node.value if pair[0].value != "modules"] + [*inner.values()]
    return node


def _pairs(node: yaml.Node) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """The keys and values of a mapping by their keys; nothing for another node."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {key.value: (key, value) for key, value in pairs if isinstance(key.value, str)}


def _complaints(document: Mapping[str, Any], rules: Rules) -> Iterator[Complaint]:
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        by_path: dict[FieldPath, list[ErrorDetails]] = {}
        for detail in error.errors(include_url=False):
            by_path.setdefault(_in_document(detail, document), []).append(detail)
        around = {where[:depth] for where in by_path for depth in range(len(where))}
        # pydantic also reports a list or a union only because an item of it is wrong
        paths = [w for w, d in by_path.items() if w not in around or "value_error" in _types(d)]
        paths.sort(key=lambda where: by_path[where][0]["type"] != "extra_forbidden")
        yield from (_complaint(where, by_path[where]) for where in paths)
    else:
        yield from rules(recipe)
        yield from only_by_options(recipe)


def _types(details: Sequence[ErrorDetails]) -> set[str]:
    return {detail["type"] for detail in details}


def _complaint(where: FieldPath, details: Sequence[ErrorDetails]) -> Complaint:
    kinds = _types(details)
    key = str(where[-1]) if where else ""
    found = details[0]["input"]
    if kinds == {"extra_forbidden"}:
        later = UNSUPPORTED.get(".".join(step for step in where if isinstance(step, str)))
        if later:
            return where, f"`{key}` is not supported by this version.", later
        if key == "revision" and {"models", "sources"} & {*where}:
            written = f"Write it after the model's name: `model: OWNER/NAME@{found}`."
            return where, "`revision` is not a key of its own.", written
        return where, f"unknown key `{key}`.", _nearest(key, _known_keys(where[:-1]))
    if kinds == {"missing"}:
        return where, f"`{key}` is missing.", f"Add `{key}:`; `lewis-hub schema` describes it."
    if "parameters" in where:
        return where, f"found {_kind(found)}.", f"Expected {SETTING}."
    return where, _in_words(details[0]), "`lewis-hub schema` describes every field."


def _in_words(detail: ErrorDetails) -> str:
    if detail["type"] == "value_error":
        return f"{detail['msg'].removeprefix('Value error, ')}."
    expected = detail["msg"].removeprefix("Input should be ").replace("a valid tuple", "a list")
    if detail["type"] == "too_short":
        expected = "at least one item"
    return f"expected {expected}, found {_kind(detail['input'])}."


def _in_document(detail: ErrorDetails, document: Any) -> FieldPath:
    """The path of an error in the user's document: without pydantic's branches of unions."""
    where: list[str | int] = []
    for step in detail["loc"]:
        inside = isinstance(document, dict) and step in document
        if inside or (isinstance(document, list) and isinstance(step, int)):
            document = document[step]
            where.append(step)
    if detail["type"] == "missing":
        where.append(detail["loc"][-1])
    if "parameters" in where and detail["type"] not in {"missing", "extra_forbidden"}:
        where = where[: where.index("parameters") + 2]  # all branches of the union at once
    return tuple(where)


def _known_keys(where: FieldPath) -> list[str]:
    model: type[BaseModel] | None = Recipe
    for step in where:
        if isinstance(step, str) and model:
            names = {field.alias or name: field for name, field in model.model_fields.items()}
            if step in names:  # otherwise it is a key of a mapping, such as a parameter's name
                model = _model_in(names[step].annotation)
    if model is None:
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean `{close[0]}`?"
    return f"Known here: {', '.join(known)}." if known else "Remove it."


def _line(node: yaml.Node | None, where: FieldPath) -> int:
    line = node.start_mark.line if node else 0
    for step in where:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if getattr(k, "value", None) == str(step)]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
            line = node.start_mark.line
    return line + 1


def dotted(where: FieldPath) -> str:
    """A path as messages write it: `models[0].parameters.density`."""
    text = ""
    for step in where:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value)
